"""Volume files of every kind, with headers as tools write them: read alike, or refused in one sentence."""

import gzip
import os
import re

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataInfo
from train.data.io import GRID_TOLERANCE, Grid, check_same_grid, read_scan
from train.data.volume_files import ending_of, open_volume, parts_of, stem, volumes_in
from train.errors import InputError
from train.predict import check_fits

SHAPE = (6, 5, 4)
TURN = nib.eulerangles.euler2mat(0.2, -0.1, 0.3)
# Oblique and anisotropic.
AFFINE = nib.affines.from_matvec(TURN @ np.diag([1.0, 1.5, 3.0]), [-20.0, 7.0, 30.0])


def scan(shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(0).gamma(2.0, 50.0, shape).astype(dtype)


def save(path, voxels, affine=AFFINE, kind=nib.Nifti1Image, **fields):
    """Writes a volume whose header has these fields, right or wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = kind(voxels, affine)
    nib.save(volume, path)
    if fields:
        whole = gzip.decompress(path.read_bytes()) if path.name.endswith("gz") else path.read_bytes()
        header = type(volume.header)(whole[: volume.header.sizeof_hdr], check=False)
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(bytes(header.binaryblock) + whole[volume.header.sizeof_hdr :])
    return path


def refuses(message, action, *args):
    with pytest.raises(InputError, match=message) as caught:
        action(*args)
    assert "\n" not in str(caught.value)


# Kinds of files.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.nii", nib.Nifti1Image),
        ("a.NII.GZ", nib.Nifti1Image),
        ("a.nii.bz2", nib.Nifti1Image),
        ("a.nii.gz", nib.Nifti2Image),
        ("a.hdr", nib.Nifti1Pair),
        ("a.mgz", nib.MGHImage),
        ("a.mgh", nib.MGHImage),
    ],
)
def test_every_kind_of_nibabel_is_the_same_scan(tmp_path, name, kind):
    expected, grid = read_scan([save(tmp_path / "plain.nii.gz", scan())])
    found, other = read_scan([save(tmp_path / name, scan(), kind=kind)])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(other.affine, grid.affine, atol=1e-5)
    assert type(other.header) is nib.Nifti1Header


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii"])
def test_what_simpleitk_writes_is_the_same_scan_in_every_format(tmp_path, ending, channels):
    sitk = pytest.importorskip("SimpleITK")
    voxels = scan((*SHAPE, *channels))
    volume = sitk.GetImageFromArray(
        voxels.transpose(2, 1, 0, *range(3, voxels.ndim)), isVector=bool(channels)
    )
    volume.SetSpacing((1.0, 1.5, 3.0))
    volume.SetOrigin((20.0, -7.0, 30.0))
    volume.SetDirection((np.diag([-1.0, -1.0, 1.0]) @ TURN).ravel().tolist())
    for file in (tmp_path / f"a{ending}", tmp_path / "b.nii.gz"):
        sitk.WriteImage(volume, file)
    opened = open_volume(tmp_path / f"a{ending}")
    assert (opened.shape, opened.channels) == (SHAPE, *(channels or (1,)))
    np.testing.assert_array_equal(opened.read(), voxels.reshape(*SHAPE, -1))
    np.testing.assert_allclose(opened.header.get_best_affine(), AFFINE, atol=1e-5)
    found, grid = read_scan([tmp_path / f"a{ending}"])
    expected, same = read_scan([tmp_path / "b.nii.gz"])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(grid.affine, same.affine, atol=1e-5)


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    (tmp_path / "a.mha").touch()
    refuses(r"a.mha is read by SimpleITK.*pip install 'calib_jax\[itk\]'", open_volume, tmp_path / "a.mha")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii.gz", "a.mgz", "a.hdr", "a.mnc", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"NRRD0004\ntype: short\n", b"\0" * 400, b"PK\3\4" + b"x" * 400, gzip.compress(b"x", mtime=0)],
)
def test_what_is_no_volume_is_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuses(name, open_volume, tmp_path / name)


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path):
    whole = save(tmp_path / "a.nii", scan()).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole)
    (tmp_path / "c.nii").write_bytes(gzip.compress(whole))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(open_volume(tmp_path / name).read()[..., 0], scan())


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=8), st.integers(0, 600), st.integers(1, 40), st.integers(0, 10**9))
def test_what_follows_the_compressed_data_is_ignored_and_nothing_before_it(
    tmp_path_factory, behind, zeros, cut, place
):
    """The gzip stream ends with its checksum and length: up to there each byte counts."""
    file = tmp_path_factory.mktemp("gzip") / "a.nii.gz"
    whole = save(file, scan()).read_bytes()
    if not behind.startswith(b"\x1f\x8b"):
        for end in (behind + b"\0" * zeros, b"\0" * zeros + behind.lstrip(b"\x1f")):
            file.write_bytes(whole + end)
            np.testing.assert_array_equal(open_volume(file).read()[..., 0], scan())
    file.write_bytes(whole[:-cut])
    refuses("a.nii.gz is truncated or corrupt", lambda: open_volume(file).read())
    broken = bytearray(whole)
    broken[-8 + place % 8] ^= 0xFF
    file.write_bytes(bytes(broken))
    refuses("a.nii.gz is truncated or corrupt", lambda: open_volume(file).read())


def test_several_compressed_members_are_one_file(tmp_path):
    whole = save(tmp_path / "a.nii", scan()).read_bytes()
    members = gzip.compress(whole[:500]) + b"\0\0" + gzip.compress(whole[500:])
    (tmp_path / "a.nii.gz").write_bytes(members)
    np.testing.assert_array_equal(open_volume(tmp_path / "a.nii.gz").read()[..., 0], scan())


def test_a_file_that_is_too_short_is_told_before_it_is_read(tmp_path):
    file = save(tmp_path / "a.nii", scan())
    file.write_bytes(file.read_bytes()[:-1])
    refuses("a.nii is truncated or corrupt, it has 831 bytes of 832", open_volume, file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    file = save(tmp_path / "a.nii", scan())
    file.chmod(0)
    refuses("a.nii cannot be read", open_volume, file)


def test_a_header_without_its_voxels_is_told_and_with_them_known(tmp_path):
    file = save(tmp_path / "a.hdr", scan(), kind=nib.Nifti1Pair)
    assert parts_of(file) == (file, tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    refuses("a.hdr is a header whose voxels", open_volume, file)


def test_hidden_files_are_no_volumes(tmp_path):
    save(tmp_path / "a.nii.gz", scan())
    (tmp_path / "._a.nii.gz").write_bytes(b"\0\5\26\7\0\2\0\0")
    (tmp_path / ".hidden.NII").touch()
    (tmp_path / "folder.nii").mkdir()
    assert volumes_in(tmp_path) == [tmp_path / "a.nii.gz"]
    refuses("what macOS keeps beside a file", open_volume, tmp_path / "._a.nii.gz")


@settings(max_examples=50, deadline=None)
@given(st.text("ab._-0", min_size=1), st.sampled_from([".nii", ".NII.GZ", ".Nii.gz", ".mha", ".nhdr"]))
def test_a_name_is_its_stem_and_its_ending(tmp_path_factory, name, ending):
    path = tmp_path_factory.getbasetemp() / f"{name}{ending}"
    assert (stem(path), ending_of(path)) == (name, ending)


# Shapes and types.


@pytest.mark.parametrize(
    ("shape", "spatial", "channels"),
    [
        ((6, 5), (6, 5, 1), 1),
        ((6, 5, 1), (6, 5, 1), 1),
        ((6, 5, 4), (6, 5, 4), 1),
        ((6, 5, 4, 1), (6, 5, 4), 1),
        ((6, 5, 4, 3), (6, 5, 4), 3),
        ((6, 5, 4, 1, 3), (6, 5, 4), 3),
        ((6, 5, 4, 3, 1), (6, 5, 4), 3),
        ((6, 5, 4, 1, 1), (6, 5, 4), 1),
        ((6, 5, 1, 1, 3), (6, 5, 1), 3),
        ((6, 5, 4, 1, 1, 3), (6, 5, 4), 3),
    ],
)
def test_shapes_whose_meaning_is_clear(tmp_path, shape, spatial, channels):
    voxels = scan(shape)
    opened = open_volume(save(tmp_path / "a.nii.gz", voxels))
    assert (opened.shape, opened.channels) == (spatial, channels)
    np.testing.assert_array_equal(opened.read(), voxels.reshape(*spatial, channels))


@pytest.mark.parametrize("shape", [(6,), (6, 5, 4, 2, 3), (6, 5, 0)])
def test_other_shapes_are_told(tmp_path, shape):
    refuses("has shape", open_volume, save(tmp_path / "a.nii.gz", np.zeros(shape, np.float32)))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8", "u8"]),
    st.sampled_from("<>"),
    st.sampled_from([None, (1.0, 0.0), (0.5, -3.0), (np.nan, np.nan), (0.0, 5.0)]),
)
def test_numbers_of_every_type_and_byte_order(tmp_path_factory, dtype, order, scaling):
    file = tmp_path_factory.mktemp("types") / "a.nii"
    voxels = np.random.default_rng(0).integers(0, 100, SHAPE).astype(order + dtype)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(voxels.dtype)
    nib.save(nib.Nifti1Image(voxels, AFFINE, header), file)
    content = file.read_bytes()
    if scaling is not None:
        packed = np.array(scaling, f"{order}f4").tobytes()  # scl_slope and scl_inter
        file.write_bytes(content[:112] + packed + content[120:])
    slope, inter = scaling if scaling and scaling[0] > 0 else (1, 0)
    opened = open_volume(file)
    found = opened.read()
    np.testing.assert_array_equal(found[..., 0], (voxels * slope + inter).astype(np.float32))
    assert found.dtype == np.dtype("=f4")
    assert opened.header.endianness == "<"
    np.testing.assert_allclose(opened.header.get_best_affine(), AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.complex64, "complex64"), ([(c, "u1") for c in "RGB"], "RGB")]
)
def test_other_types_are_told_from_the_header(tmp_path, dtype, name):
    refuses(
        f"has voxels of type {name}",
        open_volume,
        save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.dtype(dtype))),
    )


def test_numbers_of_128_bits_are_told(tmp_path):
    """nibabel knows them on some machines only."""
    refuses("float128|code 1536", open_volume, save(tmp_path / "a.nii", scan(), datatype=1536, bitpix=128))


def test_a_scaling_without_meaning_is_told(tmp_path):
    refuses("invalid intercept", open_volume, save(tmp_path / "a.nii", scan(), scl_slope=2, scl_inter=np.inf))


# Affines.

ZEROS = {f"srow_{axis}": 0 for axis in "xyz"}
NANS = {"srow_x": np.nan}
SINGULAR = {"srow_x": [1, 0, 0, 0], "srow_y": [1, 0, 0, 0]}
NO_ROTATION = {"quatern_b": 3, "quatern_c": 2}


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("fields", [ZEROS, NANS, SINGULAR])
def test_a_broken_sform_gives_way_to_the_qform(tmp_path, fields, code):
    """Also to one that is not declared, as nibabel writes it."""
    file = save(tmp_path / "a.nii", scan(), qform_code=code, **fields)
    header = open_volume(file).header
    np.testing.assert_allclose(header.get_best_affine(), AFFINE, atol=1e-4)


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("fields", [NO_ROTATION, {"quatern_d": np.nan}, {"pixdim": 0}, {"pixdim": np.nan}])
def test_a_broken_qform_or_spacing_gives_way_to_the_sform(tmp_path, fields, code):
    header = open_volume(save(tmp_path / "a.nii", scan(), sform_code=code, qform_code=1, **fields)).header
    np.testing.assert_allclose(header.get_best_affine(), AFFINE, atol=1e-4)
    np.testing.assert_allclose(header.get_qform(), AFFINE, atol=1e-4)  # what is written on has no broken one
    np.testing.assert_allclose(header.get_zooms()[:3], [1, 1.5, 3], atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"sform_code": 0, "qform_code": 0},
        {"sform_code": 0, "qform_code": 1} | NO_ROTATION | ZEROS,
        {"qform_code": 1} | NO_ROTATION | NANS,
        {"sform_code": 0, "qform_code": 0, "pixdim": [1, -1, -1.5, 3, 1, 1, 1, 1]},
    ],
)
def test_without_either_the_spacing_is_what_is_left(tmp_path, fields):
    header = open_volume(save(tmp_path / "a.nii", scan(), **fields)).header
    np.testing.assert_allclose(nib.affines.voxel_sizes(header.get_best_affine()), [1, 1.5, 3], atol=1e-5)


@pytest.mark.parametrize("spacing", [0, np.nan, np.inf])
@pytest.mark.parametrize("fields", [{"sform_code": 0}, ZEROS, SINGULAR])
def test_a_header_without_any_spacing_is_told(tmp_path, fields, spacing):
    file = save(tmp_path / "a.nii", scan(), pixdim=spacing, **fields)
    refuses("a.nii has no affine that can be inverted and the voxel spacing", open_volume, file)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, np.nan, np.inf, -1.0, 1.0, 1e30]), min_size=12, max_size=12),
    st.lists(st.sampled_from([0.0, np.nan, -2.0, 1.0, 0.5, 3.0]), min_size=7, max_size=7),
    st.integers(-1, 6),
    st.integers(-1, 6),
)
def test_any_header_has_a_usable_affine_or_is_told(tmp_path_factory, rows, rest, sform_code, qform_code):
    file = save(
        tmp_path_factory.mktemp("headers") / "a.nii",
        scan(),
        sform_code=sform_code,
        qform_code=qform_code,
        **{f"srow_{axis}": rows[4 * i : 4 * i + 4] for i, axis in enumerate("xyz")},
        **{f"quatern_{axis}": value for axis, value in zip("bcd", rest, strict=False)},
        pixdim=[rest[3], *rest[4:], 1, 1, 1, 1],
    )
    try:
        opened = open_volume(file)
    except InputError:
        refuses(re.escape(str(file)), open_volume, file)
        return
    grid = Grid.of(opened)
    assert np.isfinite(grid.affine).all()
    voxels = opened.read()[..., 0]
    np.testing.assert_array_equal(grid.to_file(grid.to_ras(voxels)), voxels)
    again = nib.Nifti1Image(voxels, grid.header.get_best_affine(), grid.header)
    for form, code in (again.get_sform(coded=True), again.get_qform(coded=True)):
        assert code == 0 or np.isfinite(form).all()


# One grid.


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["RAS", "LPS", "PIR", "SLA", "IAL"]), st.sampled_from(["RAS", "LAS", "AIL"]))
def test_files_turned_against_each_other_are_one_scan(tmp_path_factory, codes, label_codes):
    folder = tmp_path_factory.mktemp("turned")
    straight = [nib.Nifti1Image(scan(), AFFINE), nib.Nifti1Image(scan() ** 2, AFFINE)]
    for name, volume, turned in zip("ab", straight, (codes, label_codes), strict=True):
        change = nib.orientations.ornt_transform(
            nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(turned))
        )
        nib.save(volume.as_reoriented(change), folder / f"{name}.nii")
        nib.save(volume, folder / f"{name}{name}.nii")
    check_fits([folder / "a.nii", folder / "b.nii"], DataInfo("x", ("background", "y"), 2, 3))
    found, grid = read_scan([folder / "a.nii", folder / "b.nii"])
    expected, same = read_scan([folder / "aa.nii", folder / "bb.nii"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(grid.affine, same.affine, atol=1e-5)


def test_axes_that_lie_halfway_between_two_directions_stay_together(tmp_path):
    """RAS order is a toss-up for each file alone; the label must go where its image goes."""
    turns = [nib.eulerangles.euler2mat(np.pi / 4 + small) for small in (-1e-5, 1e-5)]
    files = [
        save(tmp_path / f"{i}.nii", scan(), nib.affines.from_matvec(turn)) for i, turn in enumerate(turns)
    ]
    image, label = map(open_volume, files)
    check_same_grid(image, label)
    grid = Grid.of(image)
    np.testing.assert_array_equal(grid.from_turned(label.read(), Grid.of(label)), image.read())


@pytest.mark.parametrize("spacing", [0.05, 0.7, 5.0])
@pytest.mark.parametrize("axis", range(3))
def test_a_shift_is_measured_in_voxels(tmp_path, spacing, axis):
    affine = np.diag([spacing] * 3 + [1])
    image = open_volume(save(tmp_path / "image.nii", scan(), affine))
    for share, is_same in (
        (0.002, True),
        (0.9 * GRID_TOLERANCE, True),
        (0.5, False),
        (-0.5, False),
        (1, False),
    ):
        moved = affine.copy()
        moved[axis, 3] += share * spacing
        label = open_volume(save(tmp_path / "label.nii", scan(), moved))
        if is_same:
            check_same_grid(image, label)
        else:
            refuses("label.nii has an affine that differs from its image's", check_same_grid, image, label)


def test_a_spacing_that_grows_apart_is_told_at_the_far_corner(tmp_path):
    """No voxel differs by more than 0.004 of its length, but the last one lies 0.2 voxels away."""
    shape = (50, 2, 2)
    image = open_volume(save(tmp_path / "image.nii", scan(shape), np.eye(4)))
    label = open_volume(save(tmp_path / "label.nii", scan(shape), np.diag([1.004, 1, 1, 1])))
    refuses("by up to 0.196 mm", check_same_grid, image, label)

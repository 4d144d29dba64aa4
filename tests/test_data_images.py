"""2-D images: PNG and its kin, in nnU-Net's layout and in a folder for each annotator."""

import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from train.check import check_data
from train.cli import main
from train.data.geometry import Geometry
from train.data.images import IMAGE_ENDINGS, open_image
from train.data.io import read_label
from train.data.open import open_dataset
from train.data.pipeline import train_batches
from train.errors import InputError
from train.evaluate import evaluate

WIDTH, HEIGHT = 12, 9
NAMES = ("B01", "B02", "B03", "B04")


def grey(seed, size=(WIDTH, HEIGHT)):
    return np.random.default_rng(seed).integers(1, 200, size).astype(np.uint8)


def mask(case, annotator, size=(WIDTH, HEIGHT)):
    """Where the annotator sees the cell: a rectangle that grows from one annotator to the next."""
    inside = np.zeros(size, bool)
    inside[2 : 6 + annotator, 1 : 4 + case] = True
    return inside


def save(path, pixels, mode=None):
    """Saves pixels `[x, y]` or `[x, y, channels]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1)))
    (image.convert(mode) if mode else image).save(path)


def write_folder(root, *, inside=0, outside=255, images="images"):
    """Four cases of three annotators, of the second in colours; one image is larger, one has a palette."""
    for case, name in enumerate(NAMES):
        size = (WIDTH + 8 * (name == "B02"), HEIGHT)
        save(root / images / f"{name}.png", grey(case, size), "P" if name == "B02" else None)
        for annotator in range(3):
            label = np.where(mask(case, annotator, size), inside, outside).astype(np.uint8)
            file = f"Seg_{name}.png" if (name, annotator) == ("B03", 2) else f"{name}.png"
            save(root / f"annotator{annotator + 1}" / file, label, "RGB" if annotator == 1 else None)


def write_nnunet(root, *, annotators=1, values=(0, 1), colours=False, ending=".png"):
    for case, name in enumerate(NAMES):
        image = np.stack([grey(case + 10 * c) for c in range(3)], -1) if colours else grey(case)
        save(root / "imagesTr" / f"{name}_0000{ending}", image)
        for annotator in range(annotators):
            label = np.where(mask(case, annotator), values[1], values[0]).astype(np.uint8)
            suffix = f"_annotator{annotator + 1}" if annotators > 1 else ""
            save(root / "labelsTr" / f"{name}{suffix}{ending}", label)
    description = {
        "channel_names": dict(enumerate("RGB")) if colours else {"0": "phase contrast"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": len(NAMES),
        "file_ending": ending,
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    (root / "dataset.json").write_text(json.dumps(description))


def normalised(image):
    return (image - image.mean()) / image.std()


# Files


@pytest.mark.parametrize("ending", [".png", ".tif", ".BMP"])
def test_an_image_is_read_by_columns_and_rows(ending, tmp_path):
    file = tmp_path / f"a{ending}"
    save(file, grey(0))
    shape, affine, decode = open_image(file)
    assert shape == (WIDTH, HEIGHT, 1)
    np.testing.assert_array_equal(affine, np.eye(4))
    np.testing.assert_array_equal(decode()[..., 0], grey(0))


def test_16_bits_and_floats_keep_their_values(tmp_path):
    save(tmp_path / "a.png", grey(0).astype(np.uint16) * 300)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png")[2]()[..., 0], grey(0) * 300.0)
    save(tmp_path / "a.tiff", grey(0) / np.float32(7))
    np.testing.assert_array_equal(open_image(tmp_path / "a.tiff")[2]()[..., 0], grey(0) / np.float32(7))


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("P", 1), ("1", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)]
)
def test_colours_are_channels_and_a_palette_of_greys_is_one(mode, channels, tmp_path):
    pixels = np.where(mask(0, 0), 255, 0).astype(np.uint8)
    save(tmp_path / "a.png", pixels, mode)
    shape, _, decode = open_image(tmp_path / "a.png")
    assert shape[3:] == ((channels,) if channels > 1 else ())
    assert decode().shape == shape
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", (0, 1, 255))[..., 0] > 0, mask(0, 0))


def test_a_palette_of_colours_is_rgb(tmp_path):
    colours = np.stack([grey(c) // 64 * 64 for c in range(3)], -1)
    save(tmp_path / "a.png", colours)
    Image.open(tmp_path / "a.png").quantize(256).save(tmp_path / "b.png")
    np.testing.assert_array_equal(open_image(tmp_path / "b.png")[2]()[:, :, 0], colours)


def test_what_is_no_label_or_no_image_is_told(tmp_path):
    save(tmp_path / "colour.png", np.stack([grey(c) for c in range(3)], -1))
    with pytest.raises(InputError, match=r"colour.png has pixels of a colour"):
        read_label(tmp_path / "colour.png", range(256))
    frames = [Image.fromarray(grey(0)), Image.fromarray(grey(1))]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"stack.tif holds 2 images: give a 2-D image"):
        read_label(tmp_path / "stack.tif", range(256))
    save(tmp_path / "cut.png", grey(0))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-60])
    with pytest.raises(InputError, match=r"cut.png is truncated or corrupt"):
        read_label(tmp_path / "cut.png", range(256))
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"text.png is truncated or corrupt"):
        read_label(tmp_path / "text.png", range(256))


# A folder for each annotator


def test_a_folder_of_annotators_is_read_as_it_is(tmp_path):
    write_folder(tmp_path)
    dataset = open_dataset(f"bu-bil:{tmp_path}", all_annotators=True)
    assert dataset.case_names == NAMES
    assert dataset.class_names == ("background", "cell")
    assert (dataset.spatial_dims, dataset.num_channels) == (2, 1)
    assert dataset.largest_shape == (WIDTH + 8, HEIGHT)
    for i, name in enumerate(NAMES):
        case, size = dataset.load(i), (WIDTH + 8 * (name == "B02"), HEIGHT)
        masks = np.stack([mask(i, annotator, size) for annotator in range(3)], -1)
        np.testing.assert_array_equal(case.annotations, masks)
        np.testing.assert_array_equal(case.label, masks.sum(-1) > 1)
        np.testing.assert_allclose(case.truth(2)[..., 1], masks.mean(-1), rtol=1e-6)
        np.testing.assert_allclose(case.image[..., 0], normalised(grey(i, size)), atol=1e-5)
    report = check_data(f"bu-bil:{tmp_path}")
    assert not report.faults
    assert report.num_cases == 4


def test_a_stray_value_of_bu_bil_is_the_nearer_one(tmp_path):
    write_folder(tmp_path)
    label = np.where(mask(0, 0), 0, 255).astype(np.uint8)
    label[0, 0], label[2, 1] = 140, 24
    save(tmp_path / "annotator1" / "B01.png", label)
    np.testing.assert_array_equal(open_dataset(f"bu-bil:{tmp_path}").load(0).label, mask(0, 0))
    with pytest.raises(InputError, match=r"B01.png holds the label value 24"):
        open_dataset(f"png:{tmp_path}").load(0)


@pytest.mark.parametrize("images", ["images", "."])
def test_values_are_0_and_255_or_those_that_are_given(images, tmp_path):
    write_folder(tmp_path, inside=255, outside=0, images=images)
    np.testing.assert_array_equal(open_dataset(f"png:{tmp_path}").load(0).label, mask(0, 0))
    inverted = open_dataset(f"png:{tmp_path}", label_values=(255, 0)).load(0)
    np.testing.assert_array_equal(inverted.label, ~mask(0, 0))
    with pytest.raises(
        InputError, match=r"label_values is \(0, 1, 2\), but .* background, foreground: give one"
    ):
        open_dataset(f"png:{tmp_path}", label_values=(0, 1, 2))
    with pytest.raises(InputError, match=r"B01.png holds the label value 0 .* \[1, 255\] are declared"):
        open_dataset(f"png:{tmp_path}", label_values=(1, 255)).load(0)
    with pytest.raises(InputError, match="label_values and subjects are for volumes on disk"):
        open_dataset("phantom2d", label_values=(255, 0))


def test_labels_and_images_that_do_not_fit_are_told(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "annotator2" / "B01.png").unlink()
    dataset = open_dataset(f"bu-bil:{tmp_path}", all_annotators=True)
    assert dataset.load(0).annotations.shape == (WIDTH, HEIGHT, 2)
    save(tmp_path / "annotator2" / "B01.png", grey(0, (WIDTH, WIDTH)))
    with pytest.raises(InputError, match=r"annotator2/B01.png has shape \(12, 12, 1\).*share a grid"):
        open_dataset(f"bu-bil:{tmp_path}")
    save(tmp_path / "annotator2" / "B01_again.png", grey(0))
    with pytest.raises(InputError, match=r"labels of one image: remove one"):
        open_dataset(f"bu-bil:{tmp_path}")
    (tmp_path / "annotator2" / "B01_again.png").rename(tmp_path / "annotator2" / "B011.png")
    with pytest.raises(InputError, match=r"B011.png is the label of no image"):
        open_dataset(f"bu-bil:{tmp_path}")
    (tmp_path / "annotator2" / "B011.png").unlink()
    for folder in tmp_path.glob("annotator*"):
        (folder / "B01.png").unlink()
    with pytest.raises(InputError, match=r"annotator1/B01.png does not exist"):
        open_dataset(f"bu-bil:{tmp_path}")


# nnU-Net's layout


def test_natural_images_of_nnunet(tmp_path):
    write_nnunet(tmp_path)
    dataset = open_dataset(f"nnunet:{tmp_path}")
    assert (dataset.case_names, dataset.spatial_dims, dataset.num_channels) == (NAMES, 2, 1)
    case = dataset.load(1)
    np.testing.assert_array_equal(case.label, mask(1, 0))
    np.testing.assert_allclose(case.image[..., 0], normalised(grey(1)), atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_the_colours_of_nnunet_lie_in_one_file_or_in_one_for_each(apart, tmp_path):
    write_nnunet(tmp_path, colours=True)
    for name in NAMES if apart else ():
        for channel in range(3):
            save(tmp_path / "imagesTr" / f"{name}_{channel:04d}.png", grey(NAMES.index(name) + 10 * channel))
    case = open_dataset(f"nnunet:{tmp_path}").load(2)
    assert case.image.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_allclose(case.image[..., 1], normalised(grey(12)), atol=1e-5)


def test_annotators_of_nnunet_with_any_values(tmp_path):
    write_nnunet(tmp_path, annotators=3, values=(255, 0), ending=".tif")
    dataset = open_dataset(f"nnunet:{tmp_path}", all_annotators=True, label_values=(255, 0))
    masks = np.stack([mask(0, annotator) for annotator in range(3)], -1)
    np.testing.assert_array_equal(dataset.load(0).annotations, masks)
    report = check_data(f"nnunet:{tmp_path}", (255, 0))
    assert not report.faults


def test_images_of_msd(tmp_path):
    write_nnunet(tmp_path)
    listed = [{"image": f"imagesTr/{name}_0000.png", "label": f"labelsTr/{name}.png"} for name in NAMES]
    labels = {"0": "background", "1": "cell"}
    description = {"modality": {"0": "grey"}, "labels": labels, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    dataset = open_dataset(f"msd:{tmp_path}")
    assert dataset.spatial_dims == 2
    np.testing.assert_array_equal(dataset.load(3).label, mask(3, 0))


def test_one_channel_too_many_is_told(tmp_path):
    write_nnunet(tmp_path, colours=True)
    text = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**text, "channel_names": {"0": "grey"}}))
    with pytest.raises(InputError, match=r"B01_0000.png has 3 channels"):
        open_dataset(f"nnunet:{tmp_path}")
    assert ".jpg" in IMAGE_ENDINGS


# Training and evaluation


def batches(dataset, **options):
    return list(islice(train_batches(dataset, ["B01"], patch=(8, 8), batch_size=2, seed=0, **options), 2))


def test_patches_hold_the_share_of_the_experts_or_their_majority(tmp_path):
    write_folder(tmp_path)
    dataset = open_dataset(f"bu-bil:{tmp_path}", all_annotators=True)
    soft, hard = batches(dataset), batches(dataset, majority=True)
    for a, b in zip(soft, hard, strict=True):
        assert (a["label"].shape, b["label"].shape) == ((2, 8, 8, 2), (2, 8, 8))
        assert (a["label"].dtype, b["label"].dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(a["label"][..., 1] > 0.5, b["label"])
        np.testing.assert_array_equal(a["image"], b["image"])
        assert set(np.unique(np.rint(a["label"] * 3))) == {0, 1, 2, 3}


class _Half:
    """Predicts the first image's shares, at the size of the image."""

    regions = ()

    def __call__(self, image):
        share = np.full(image.shape[:-1], 0.5, np.float32)
        return np.stack([1 - share, share], -1)


def test_images_are_resampled_and_evaluated_at_their_own_size(tmp_path):
    write_folder(tmp_path)
    geometry = Geometry((2.0, 2.0, 1.0))
    dataset = open_dataset(f"bu-bil:{tmp_path}", all_annotators=True, geometry=geometry)
    assert dataset.largest_shape == (10, 4)
    case = dataset.load(1)
    assert case.image.shape == (10, 4, 1)
    assert case.annotations.shape == (10, 4, 3)
    np.testing.assert_allclose(np.diag(case.affine), [2, 2.25, 1, 1])
    result = evaluate("half", _Half(), dataset, ["B01", "B02"])
    assert result.stats.count.sum((1, 2)).tolist() == [WIDTH * HEIGHT, (WIDTH + 8) * HEIGHT]
    shares = [np.mean([mask(i, a, (WIDTH + 8 * i, HEIGHT)) for a in range(3)]) for i in range(2)]
    np.testing.assert_allclose(result.metrics()["ACE"][:, 0], np.abs(0.5 - np.array(shares)), rtol=1e-5)


def test_a_2d_network_trains_on_the_folder(tmp_path):
    write_folder(tmp_path / "data")
    tiny = [
        "--channels",
        "4",
        "8",
        "--strides",
        "2",
        "--steps",
        "1",
        "--batch-size",
        "8",
        "--warmup-steps",
        "0",
    ]
    split = ["--num-test", "1", "--num-val", "0", "--patch", "8", "8", "--annotators", "average"]
    data, run = f"bu-bil:{tmp_path / 'data'}", str(tmp_path / "run")
    assert main(["fit", "--data", data, *split, *tiny, "--loss", "dice+ce", "--out", run]) == 0
    assert "dice" in (tmp_path / "run" / "log.csv").read_text(encoding="utf-8")

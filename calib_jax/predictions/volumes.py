"""Reads volume files of every format. One sentence says what is wrong with a file.

NIfTI is recognised by its content, not by its name. SimpleITK reads `.mha`, `.mhd`, `.nrrd`, `.nhdr` and `.gipl`;
nibabel reads everything else.
"""

import gzip
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32, Num
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.tripwire import TripWireError

from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.inflate import MOST_INFLATED, gunzip, is_gzip

Affine = Float[np.ndarray, "4 4"]
"""From voxel index to millimetres."""

ITK_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")
ENDINGS = (".nii.gz", ".nii", ".nii.bz2", ".hdr", ".mgz", ".mgh", ".mnc", *ITK_ENDINGS)
DETACHED = (".hdr", ".mhd", ".nhdr")
"""Headers whose voxels are in another file."""
_VOXEL_ENDINGS = (".img", ".img.gz", ".raw", ".raw.gz", ".zraw")

_HEADER = 1 << 20  # bytes in which a header of SimpleITK's formats ends
_APPLE_DOUBLE = b"\x00\x05\x16\x07"

# A field of a header that SimpleITK reads, and limits of MetaImage, beyond which it crashes.
_FIELD = re.compile(rb"\s*([A-Za-z ]+?)\s*[=:]([^\n]*)")
_ITK_DIMENSIONS = 10
_ITK_NAME = 256

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# nibabel logs each repair of a header; repairs are intended here.
_QUIET = logging.Logger("quiet", logging.CRITICAL + 1)


@dataclass(frozen=True)
class VolumeFile:
    """An opened volume: its header has been read, its voxels have not.

    Attributes:
        path: of the file.
        stored_shape: shape in the header.
        shape: three spatial lengths, in the file's order of axes.
        channels: number of values per voxel.
        header: NIfTI header with the file's affine, also where the file has another format.
        dtype: of the voxels as stored.
        is_scaled: whether the header scales stored voxels.
        decode: reads the array of `stored_shape`: unscaled voxels as stored or as float32, scaled ones as float32.
    """

    path: Path
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    channels: int
    header: Nifti1Header
    dtype: np.dtype
    is_scaled: bool
    decode: Callable[[], np.ndarray]

    def read(self) -> Float32[np.ndarray, "x y z channels"]:
        """Reads all voxels.

        Raises:
            PredictionError: the file is truncated or corrupt, or holds voxels that are not finite.
        """
        voxels = self.read_stored()
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, a fault below
            voxels = voxels.astype(np.float32, copy=False)
        bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
        if bad:
            raise PredictionError(
                f"{self.path} holds {bad} voxels that are NaN or infinite: mend or leave out this file."
            )
        return voxels

    def read_stored(self) -> Num[np.ndarray, "x y z channels"]:
        """Reads all voxels as `decode` returns them.

        Raises:
            PredictionError: the file is truncated or corrupt.
        """
        try:
            with np.errstate(over="ignore"):
                return self.decode().reshape(*self.shape, self.channels)
        except Exception as error:
            raise _corrupt(self.path, error) from error


def open_volume(path: Path) -> VolumeFile:
    """Opens a file and reads its header, not its voxels.

    Raises:
        PredictionError: the file does not exist, is no volume, has no usable affine, or has another rank or type.
    """
    try:
        if not path.is_file():
            raise PredictionError(f"{path} does not exist: check the path.")
        if path.name.lower().endswith(ITK_ENDINGS):
            return _open_itk(path)
        header = _nifti_header(path)
        return _open_nibabel(path) if header is None else _open_nifti(path, header)
    except Exception as error:
        raise _corrupt(path, error) from error


def open_with(path: Path, read: Callable[[Path], tuple[Any, ...]]) -> VolumeFile:
    """Opens a file of another format, of which `read` gives shape, affine and the function that decodes it.

    Raises:
        PredictionError: as `open_volume`.
    """
    try:
        if not path.is_file():
            raise PredictionError(f"{path} does not exist: check the path.")
        shape, affine, decode = read(path)
        dtype = np.dtype(np.float32)
        spatial, channels = _spatial_and_channels(path, shape)
        return VolumeFile(path, shape, spatial, channels, _new_header(spatial, affine), dtype, False, decode)
    except Exception as error:
        raise _corrupt(path, error) from error


def stem(path: Path) -> str:
    """The file's name without its volume ending, in upper or lower case.

    >>> stem(Path("scan.v2.NII.GZ"))
    'scan.v2'
    """
    return path.name.removesuffix(ending_of(path))


def ending_of(path: Path, endings: Sequence[str] = ENDINGS) -> str:
    """The one of the `endings` that the name has, as the name spells it; empty if it has none."""
    found = next((ending for ending in endings if path.name.lower().endswith(ending)), "")
    return path.name[len(path.name) - len(found) :]


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Matches in a folder, sorted, without hidden names such as the `._NAME` that macOS leaves in archives."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def volumes_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The visible volume files in a folder, sorted."""
    return [path for path in visible(folder, pattern) if ending_of(path) and path.is_file()]


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of a volume: the file itself and, for a detached header, its voxel files."""
    if not path.name.lower().endswith(DETACHED):
        return (path,)
    beside = [
        file
        for file in visible(path.parent)
        if file.name.lower() in {f"{stem(path).lower()}{ending}" for ending in _VOXEL_ENDINGS}
    ]
    return (path, *beside)


# NIfTI.


def _nifti_header(path: Path) -> Any:
    """The header as stored; None if the content is no NIfTI."""
    with path.open("rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if is_gzip(file) else file
        start = stream.read(348)
        kind = {
            b"n+1\0": Nifti1Header,
            b"ni1\0": Nifti1PairHeader,
            b"n+2\0": Nifti2Header,
            b"ni2\0": Nifti2PairHeader,
        }.get(start[4:8] if start[4:7] in (b"n+2", b"ni2") else start[344:348])
        stream.seek(0)
        return kind and kind.from_fileobj(stream, check=False)


def _open_nifti(path: Path, header: Any) -> VolumeFile:
    spacing = header["pixdim"][1:4].astype(float)
    header.check_fix(logger=_QUIET)
    is_scaled = header.get_slope_inter() not in ((None, None), (1, 0))  # raises if they make no sense
    shape = tuple(map(int, header.get_data_shape()))
    spatial, channels = _spatial_and_channels(path, shape)
    _check_type(path, header.get_data_dtype())
    source = path if header.is_single else next(iter(parts_of(path)[1:]), None)
    if source is None:
        raise PredictionError(
            f"{path} is a header whose voxels, {stem(path)}.img, are not beside it: fetch them too."
        )
    needed = header.get_data_offset() + math.prod(shape) * header.get_data_dtype().itemsize
    with source.open("rb") as file:
        compressed = is_gzip(file)
    found = source.stat().st_size
    if found * (MOST_INFLATED if compressed else 1) < needed:
        raise PredictionError(
            f"{source} is truncated or corrupt, it has {found} bytes of {needed}: fetch or export it again."
        )
    _mend_affine(path, header, spatial, spacing)

    def decode() -> np.ndarray:
        with source.open("rb") as file:
            if not is_gzip(file):
                dtype = np.float32 if is_scaled else None
                return np.asanyarray(ArrayProxy(file, header, mmap=False), dtype=dtype)
            content = gunzip(file, needed)
        if is_scaled:
            return np.asanyarray(ArrayProxy(io.BytesIO(content.data), header, mmap=False), dtype=np.float32)
        # No copy of the largest of all volumes: unscaled voxels lie in the buffer as they are.
        voxels = np.frombuffer(content, header.get_data_dtype(), math.prod(shape), header.get_data_offset())
        return voxels.reshape(shape, order="F")

    is_plain = type(header) is Nifti1Header
    kept = header.as_byteswapped("<") if is_plain else _new_header(spatial, header.get_best_affine())
    return VolumeFile(path, shape, spatial, channels, kept, header.get_data_dtype(), is_scaled, decode)


def _mend_affine(path: Path, header: Any, shape: tuple[int, ...], spacing: Float[np.ndarray, "3"]) -> None:
    """Replaces a declared sform or qform that is no affine by the best affine in the header.

    The best is the other form, even if it is filled in but not declared; without one, the spacing alone.

    Args:
        path: of the file.
        header: changed in place.
        shape: spatial lengths. The spacing of an axis with one voxel does not matter.
        spacing: along each axis, as stored.
    """
    is_spacing = np.isfinite(spacing) & (spacing != 0)
    has_spacing = bool(np.all(is_spacing | (np.array(shape) == 1)))
    header["pixdim"][1:4] = np.where(is_spacing, np.abs(spacing), 1)
    forms = {"sform": _form(header.get_sform), "qform": _form(header.get_qform) if has_spacing else None}
    declared = [name for name in forms if header[f"{name}_code"] > 0]
    broken = [name for name in declared if forms[name] is None]
    candidates = [*map(forms.get, declared), *(forms.values() if broken else ())]
    if has_spacing:
        candidates.append(header.get_base_affine())
    best = next((form for form in candidates if form is not None), None)
    if best is None:
        raise PredictionError(
            f"{path} has no affine that can be inverted and the voxel spacing {tuple(spacing.tolist())} in its "
            "header: write the spacing or the affine into the header."
        )
    if not has_spacing:
        header["pixdim"][1:4] = voxel_sizes(best)
    if "sform" in broken:
        header.set_sform(best, int(header["sform_code"]))
    if "qform" in broken:
        header.set_qform(best, int(header["qform_code"]))


def _form(read: Callable[[], Affine]) -> Affine | None:
    """An affine of a header; None if it cannot be inverted, or if its quaternion is no rotation."""
    try:
        return form if _is_affine(form := read()) else None
    except ValueError:
        return None


def _is_affine(affine: Affine) -> bool:
    """Whether the matrix is finite and can be inverted."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(
        np.isfinite(affine).all() and lengths.all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3
    )


# Other formats.


def _open_nibabel(path: Path) -> VolumeFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the files that nibabel leaves open
        volume: Any = nib.load(path)
    if not isinstance(volume, SpatialImage) or volume.affine is None:
        raise PredictionError(f"{path} is a {type(volume).__name__}, not a volume: convert it to .nii.gz.")
    _check_type(path, volume.get_data_dtype())
    return _volume(
        path,
        volume.shape,
        volume.affine,
        volume.get_data_dtype(),
        lambda: np.asanyarray(volume.dataobj, dtype=np.float32),
    )


def _open_itk(path: Path) -> VolumeFile:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import SimpleITK as sitk
    except ImportError as error:
        raise PredictionError(
            f"{path} is read by SimpleITK, which is not installed: pip install 'calib_jax[itk]'."
        ) from error
    _check_itk_header(path)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if not kind.endswith(("integer", "float")) or kind.startswith("complex"):
        raise _strange_type(path, kind)
    dims, components = reader.GetDimension(), reader.GetNumberOfComponents()
    affine = np.eye(4)
    used = min(dims, 3)
    direction = np.reshape(reader.GetDirection(), (dims, dims))[:used, :used]
    affine[:used, :used] = direction * reader.GetSpacing()[:used]
    affine[:used, 3] = reader.GetOrigin()[:used]
    shape = (*reader.GetSize(), *([1] * (3 - dims)), *([components] if components > 1 else []))

    def decode() -> np.ndarray:
        voxels = sitk.GetArrayFromImage(reader.Execute())  # axes reversed, components last
        return voxels.transpose(*reversed(range(dims)), *range(dims, voxels.ndim))

    return _volume(path, shape, _LPS_TO_RAS @ affine, _dtype_of(kind), decode)


def _check_itk_header(path: Path) -> None:
    """Raises for headers that would crash SimpleITK, or make it read files elsewhere."""
    with path.open("rb") as file:
        lines = file.read(_HEADER).split(b"\n")
    for line in lines:
        field = _FIELD.match(line)
        key, value = (part.strip() for part in field.groups()) if field else (b"", b"")
        if key == b"NDims" and not (value.isdigit() and 0 < int(value) <= _ITK_DIMENSIONS):
            raise PredictionError(f"{path} has no number of dimensions in its header: export it again.")
        if key == b"Name" and len(value) >= _ITK_NAME:
            raise PredictionError(f"{path} has a name of {len(value)} characters in its header: shorten it.")
        if key in (b"ElementDataFile", b"data file", b"datafile"):
            if value.startswith((b"/", b"\\")) or b".." in value or value[1:2] == b":":
                raise PredictionError(f"{path} has its voxels in another folder: convert it to .nii.gz.")
            if key == b"ElementDataFile" and b"%" in value:
                raise PredictionError(f"{path} has its voxels in many files: convert it to .nii.gz.")
            if key == b"ElementDataFile":
                return


def _dtype_of(kind: str) -> np.dtype:
    """The dtype that SimpleITK calls by a name such as "vector of 16-bit unsigned integer".

    >>> _dtype_of("32-bit float"), _dtype_of("vector of 16-bit unsigned integer")
    (dtype('float32'), dtype('uint16'))
    """
    *_, bits, _, name = kind.replace("-bit", " bit").replace("signed ", "signed_").split()
    letter = {"float": "f", "signed_integer": "i", "unsigned_integer": "u"}[name]
    return np.dtype(f"{letter}{int(bits) // 8}")


def _volume(
    path: Path, shape: Sequence[int], affine: Affine, dtype: np.dtype, decode: Callable[[], np.ndarray]
) -> VolumeFile:
    stored = tuple(map(int, shape))
    spatial, channels = _spatial_and_channels(path, stored)
    if not _is_affine(affine):
        raise PredictionError(
            f"{path} has an affine that cannot be inverted: write its voxel spacing into the header."
        )
    needed, found = math.prod(stored) * dtype.itemsize, sum(part.stat().st_size for part in parts_of(path))
    if found * MOST_INFLATED < needed and not path.name.lower().endswith(".bz2"):
        raise PredictionError(
            f"{path} is truncated or corrupt, it has {found} bytes and its header claims {needed}: fetch or export "
            "it again."
        )
    return VolumeFile(path, stored, spatial, channels, _new_header(spatial, affine), dtype, False, decode)


def _new_header(shape: Sequence[int], affine: Affine) -> Nifti1Header:
    header = Nifti1Header()
    header.set_data_shape(shape)
    header.set_sform(affine, "scanner")
    header.set_qform(affine, "scanner")
    header.set_xyzt_units("mm")
    return header


# Checks that all formats share.


def _spatial_and_channels(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Three spatial lengths, and the number of channels: the length of the only longer axis behind them."""
    channels = [size for size in shape[3:] if size > 1]
    if len(shape) < 2 or len(channels) > 1 or min(shape) < 1:
        raise PredictionError(
            f"{path} has shape {shape}: give a 3-D volume, or a 4-D one with the channels last."
        )
    return (*shape, 1)[:3], math.prod(channels)


def _check_type(path: Path, dtype: np.dtype) -> None:
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise _strange_type(path, "RGB" if dtype.kind == "V" else str(dtype))


def _strange_type(path: Path, kind: str) -> PredictionError:
    return PredictionError(f"{path} has voxels of type {kind}: give real numbers, one per voxel and channel.")


def _corrupt(path: Path, error: Exception) -> Exception:
    """The fault of a file whose reader raised `error`."""
    if isinstance(error, PredictionError | MemoryError):
        return error
    if isinstance(error, OSError) and error.errno:
        return PredictionError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        )
    if isinstance(error, TripWireError):
        return PredictionError(f"{path} cannot be read without another package: {error}")
    with path.open("rb") as file:
        start = file.read(4)
    if start == _APPLE_DOUBLE:
        return PredictionError(f"{path} holds what macOS keeps beside a file, no volume: remove it.")
    kind = f"{error}" if isinstance(error, HeaderDataError) else type(error).__name__
    return PredictionError(
        f"{path} is truncated or corrupt, or no volume file ({kind}): fetch or export it again."
    )

"""The one chain from a scan as stored to the network's input: normalise, crop, resample.

Training, evaluation and prediction all call `preprocess`. The `Placement` that it returns is the way back.
"""

import numpy as np
from jaxtyping import Float32

from train.data.geometry import Geometry, Placement
from train.data.shapes import Affine, Image, Scan


def preprocess(
    image: Scan,
    affine: Affine,
    *,
    intensity_range: tuple[float, float] | None = None,
    geometry: Geometry = Geometry(),  # noqa: B008, it is frozen
) -> tuple[Float32[np.ndarray, "*resampled channels"], Placement]:
    """Prepares a scan for the network.

    Args:
        image: intensities as stored, axes in RAS order.
        affine: from voxel index to millimetres.
        intensity_range: see `normalise`.
        geometry: how the scan is cropped and resampled.

    Returns:
        The network's input; and where it lies on the scan's own grid.
    """
    normalised = normalise(image, intensity_range)
    placement = geometry.place(normalised, affine, clipped=intensity_range is not None)
    return placement.image(normalised, geometry.interpolation), placement


def normalise(image: Scan, intensity_range: tuple[float, float] | None = None) -> Image:
    """`z_score_clipped` with an intensity range, `z_score_nonzero` without one."""
    return z_score_nonzero(image) if intensity_range is None else z_score_clipped(image, intensity_range)


def z_score_nonzero(image: Scan) -> Image:
    """Scales each channel to mean 0 and standard deviation 1 over its non-zero voxels.

    Voxels that are exactly zero (the background of skull-stripped scans) stay zero. A channel that is constant over
    its non-zero voxels becomes zero.

    Args:
        image: intensities, any unit.

    Returns:
        The image without unit, float32. The sums are float64.

    >>> z_score_nonzero(np.array([[0.0], [1.0], [3.0]])).ravel().tolist()
    [0.0, -1.0, 1.0]
    """
    nonzero = image != 0
    axes = tuple(range(image.ndim - 1))
    count = np.maximum(nonzero.sum(axes), 1)
    mean = image.sum(axes, dtype=np.float64) / count
    centred = np.where(nonzero, image - mean, 0.0)
    std = np.sqrt(np.square(centred).sum(axes) / count)
    return (centred / np.where(std > 0, std, 1.0)).astype(np.float32)


def z_score_clipped(image: Scan, intensity_range: tuple[float, float]) -> Image:
    """Clips intensities and scales each channel to mean 0 and standard deviation 1 over all voxels.

    Args:
        image: intensities in the unit of the range, Hounsfield units in CT.
        intensity_range: smallest and largest intensity after clipping.

    Returns:
        The image without unit, float32. A channel that is constant within the range becomes zero.

    >>> z_score_clipped(np.array([[-1000.0], [0.0], [100.0], [2000.0]]), (0.0, 100.0)).ravel().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    clipped = np.clip(image, *intensity_range)
    axes = tuple(range(image.ndim - 1))
    mean, std = clipped.mean(axes, dtype=np.float64), clipped.std(axes, dtype=np.float64)
    return ((clipped - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)

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
    """Scales each channel to mean 0 and standard deviation 1: over its non-zero voxels, or within a range.

    Without a range, voxels that are exactly zero (the background of skull-stripped scans) stay zero. With one,
    intensities are clipped to it first, and all voxels count. A channel that is constant over the voxels that count
    becomes zero.

    Args:
        image: intensities, any unit.
        intensity_range: smallest and largest intensity, in the unit of the image: Hounsfield units in CT.

    Returns:
        The image without unit, float32. The sums are float64.

    >>> normalise(np.array([[0.0], [1.0], [3.0]])).ravel().tolist()
    [0.0, -1.0, 1.0]
    >>> normalise(np.array([[-1000.0], [0.0], [100.0], [2000.0]]), (0.0, 100.0)).ravel().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    axes = tuple(range(image.ndim - 1))
    if intensity_range is None:
        nonzero = image != 0
        count = np.maximum(nonzero.sum(axes), 1)
        mean = image.sum(axes, dtype=np.float64) / count
        centred = np.where(nonzero, image - mean, 0.0)
        std = np.sqrt(np.square(centred).sum(axes) / count)
    else:
        clipped = np.clip(image, *intensity_range)
        centred = clipped - clipped.mean(axes, dtype=np.float64)
        std = clipped.std(axes, dtype=np.float64)
    return (centred / np.where(std > 0, std, 1.0)).astype(np.float32)

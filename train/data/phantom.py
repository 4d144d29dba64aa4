"""The embedded data set: synthetic scans whose labels are drawn from a known posterior.

Three nested structures, organ > ring > core, are smooth random ellipsoids, each given by a signed depth
d_k(x) in voxels, positive inside. Boundaries are ambiguous over a width w(x), in voxels, that varies along
them. With z_k = d_k / w, decreasing in k, and Φ the normal distribution function,

    P(label(x) >= k) = Φ(z_k(x))                   the posterior, exactly
    label(x) = number of k with u(x) < z_k(x)      one annotator, u a smooth Gaussian field of variance 1
    image(x) = bias(x) · (E[intensity of the class] + texture(x)) + noise

At every voxel u is N(0, 1), so the marginal of the label is the posterior. Along a boundary u is smooth, so the
label is one connected contour, displaced by u·w voxels, without speckle. The image depends on the posterior (a
boundary is blurred where annotators disagree), never on u.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from train.data.case import Case, Dataset
from train.data.preprocess import normalise
from train.data.shapes import Ids, Scan, Shares

CLASS_NAMES = ("background", "organ", "ring", "core")
# Rows: classes; columns: channels. The first shows a bright ring around a dark core, the other a bright core.
INTENSITIES = np.array([[0.30, 0.40], [0.60, 0.65], [0.90, 0.50], [0.45, 0.95]])
# Each structure's radius in units of the one around it: lower and upper end.
RELATIVE_RADII = ((0.70, 0.82), (0.45, 0.60))


@dataclass(frozen=True)
class PhantomDataset(Dataset):
    """Cases generated on demand from (seed, index); nothing is stored or downloaded.

    Attributes:
        spatial_shape: 2 or 3 lengths, in voxels of 1 mm.
        num_cases: number of cases.
        seed: of the data set.
        noise: standard deviation of the noise. Intensities of neighbouring classes differ by 0.15 to 0.45.
        ambiguity: median half-width of the boundaries, as a fraction of the shortest side.
    """

    spatial_shape: tuple[int, ...] = (32, 32, 32)
    num_cases: int = 100
    seed: int = 0
    noise: float = 0.1
    ambiguity: float = 0.014

    @property
    def name(self) -> str:
        return f"phantom{self.spatial_dims}d"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    @property
    def num_channels(self) -> int:
        return INTENSITIES.shape[1]

    @property
    def spatial_dims(self) -> int:
        return len(self.spatial_shape)

    @property
    def largest_shape(self) -> tuple[int, ...]:
        return self.spatial_shape

    @property
    def case_names(self) -> tuple[str, ...]:
        return tuple(f"phantom_{index:04d}" for index in range(self.num_cases))

    def load(self, index: int) -> Case:
        rng = np.random.default_rng((self.seed, index))
        shape = self.spatial_shape
        depths = nested_depths(rng, shape)
        # The half-width of the ambiguous zone is log-normal, from sharp to blurred within one case.
        z = depths / (self.ambiguity * min(shape) * np.exp(0.5 * smooth_field(rng, shape, min(shape) / 5)))
        posterior = ordinal_posterior(z)
        label = draw_label(rng, z)
        image = render(rng, posterior, self.noise)
        return Case(self.case_names[index], normalise(image), label, np.eye(4), posterior)


def smooth_field(
    rng: np.random.Generator, shape: Sequence[int], length: float
) -> Float[np.ndarray, "*spatial"]:
    """A Gaussian random field, N(0, 1) at every voxel, correlated over about `length` voxels.

    A Gaussian bump around each knot of a coarse grid spreads white noise. Per axis the weights of a voxel have unit
    Euclidean norm, so the variance is exactly 1, also at the border.
    """
    bases = [_bump_basis(size, length) for size in shape]
    coarse = rng.standard_normal([basis.shape[1] for basis in bases])
    # Each step contracts the first axis and appends the new one, so the axes end in order.
    return reduce(lambda field, basis: np.tensordot(field, basis, axes=(0, 1)), bases, coarse)


def _bump_basis(size: int, length: float) -> Float[np.ndarray, "voxels knots"]:
    knots = np.arange(-2 * length, size + 2 * length, length)
    weights = np.exp(-0.5 * ((np.arange(size)[:, None] - knots) / length) ** 2)
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def nested_depths(rng: np.random.Generator, shape: Sequence[int]) -> Float[np.ndarray, "structures *spatial"]:
    """Signed depths in voxels, positive inside, of organ, ring and core; each lies within the one before."""
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"), axis=-1)
    warp = np.stack([smooth_field(rng, shape, min(shape) / 5) for _ in shape], axis=-1)
    points = grid + 0.05 * min(shape) * warp
    centre = np.array(shape) / 2 + rng.uniform(-0.08, 0.08, len(shape)) * shape
    radii = rng.uniform(0.32, 0.42, len(shape)) * min(shape)
    depths = [_ellipsoid_depth(rng, points, centre, radii)]
    for smallest, largest in RELATIVE_RADII:
        inner = radii * rng.uniform(smallest, largest)
        centre = centre + 0.5 * (radii - inner) * rng.uniform(-1, 1, len(shape))
        radii = inner
        depths.append(np.minimum(depths[-1] - 1.0, _ellipsoid_depth(rng, points, centre, radii)))
    return np.stack(depths)


def _ellipsoid_depth(
    rng: np.random.Generator,
    points: Float[np.ndarray, "*spatial dims"],
    centre: Float[np.ndarray, " dims"],
    radii: Float[np.ndarray, " dims"],
) -> Float[np.ndarray, "*spatial"]:
    """Depth below the surface of a randomly turned ellipsoid, to first order."""
    rotation, _ = np.linalg.qr(rng.standard_normal((len(radii), len(radii))))
    scaled = (points - centre) @ rotation / radii
    return (1 - np.sqrt(np.einsum("...d,...d", scaled, scaled))) * radii.mean()


def ordinal_posterior(z: Float[np.ndarray, "structures *spatial"]) -> Shares:
    """P(label = k) = Φ(z_k) - Φ(z_{k+1}), where z_0 is +infinity and the last z is -infinity."""
    at_least = np.concatenate([np.ones_like(z[:1]), ndtr(z), np.zeros_like(z[:1])])
    return np.ascontiguousarray(np.moveaxis(at_least[:-1] - at_least[1:], 0, -1), dtype=np.float32)


def draw_label(rng: np.random.Generator, z: Float[np.ndarray, "structures *spatial"]) -> Ids:
    """One annotator's label: at each voxel a draw from `ordinal_posterior(z)`, smooth between voxels."""
    shape = z.shape[1:]
    u = smooth_field(rng, shape, min(shape) / 32)
    return (u < z).sum(axis=0, dtype=np.uint8)


def render(rng: np.random.Generator, posterior: Shares, noise: float) -> Scan:
    """The scan: blurred boundaries, texture within the tissues, a bias field of about 10%, white noise."""
    shape = posterior.shape[:-1]
    channels = range(INTENSITIES.shape[1])
    texture = np.stack([0.05 * smooth_field(rng, shape, 2.0) for _ in channels], axis=-1)
    bias = np.stack([np.exp(0.1 * smooth_field(rng, shape, min(shape) / 2)) for _ in channels], axis=-1)
    clean = bias * (posterior @ INTENSITIES + texture)
    return clean + noise * rng.standard_normal(clean.shape)

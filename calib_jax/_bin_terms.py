"""What is summed in the bins: of some probabilities of an image, in which bin each counts, and as what."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from calib_jax._compat import enable_x64

Edges = Any  # what of `index` differs from image to image: a tree of arrays, batch first, or None
BinIndex = Callable[[Array, Edges], Array]
Place = Callable[[Array], tuple[Array, Array]]
Bins = Int[Array, "*elements"]
Columns = tuple[Float[Array, "*elements"], ...]  # probabilities, then counts and labels or a tally
Pair = tuple[Array, Array]  # a sum as float32, and what did not fit into it


class Elements(NamedTuple):
    """Some probabilities of an image, and what goes with them, of shapes that broadcast to theirs."""

    probs: Float[Array, "*elements"]
    labels: Num[Array, "*elements"]
    classes: Int[Array, "*elements"] | None
    """The class that a probability is of, where labels are class ids."""
    keep: Bool[Array, "*elements"]


Terms = Callable[[Elements, Edges, int | None], list[tuple[Bins, Columns]]]
"""What to sum, and into which bins; a number of bits allows a tally of so many voxels."""


def hard_terms(
    index: BinIndex, elements: Elements, edges: Edges, bits: int | None
) -> list[tuple[Bins, Columns]]:
    """Probabilities, counts and labels, each voxel in its bin.

    Where labels are class ids, one number holds both counts, a tally: a voxel adds 1 to it, and one of the class a
    power of two above the voxels' number as well.
    """
    keep, probs = _kept(elements)
    bins, probs = index(probs, edges), probs.astype(jnp.float32)
    if elements.classes is not None and bits is not None:
        return [(bins, (probs, _tally(keep, _is_of_class(elements), bits)))]
    return [(bins, (probs, keep.astype(jnp.float32), _kept_labels(elements, keep)))]


def soft_terms(
    place: Place, num_bins: int, elements: Elements, edges: Edges, bits: int | None
) -> list[tuple[Bins, Columns]]:
    """Weighted probabilities, weights and weighted labels, for either neighbour of a voxel."""
    del edges, bits  # centres are the same everywhere, and weights are no counts
    keep, probs = _kept(elements)
    labels = _kept_labels(elements, keep)
    lower, share = place(probs)
    probs = probs.astype(jnp.float32)

    def neighbour(bins: Array, weight: Array) -> tuple[Bins, Columns]:
        weight = jnp.where(keep, weight, 0)
        return bins, (weight * probs, weight, weight * labels)

    return [neighbour(lower, 1 - share), neighbour(jnp.minimum(lower + 1, num_bins - 1), share)]


def _tally(keep: Array, is_of_class: Array, bits: int) -> Array:
    with enable_x64(True):
        kind = np.float32 if 2 * bits <= 24 else np.float64
        return jnp.where(keep, jnp.where(is_of_class, kind(1 + (1 << bits)), kind(1)), kind(0))


def counts_of(tally: Array, bits: int) -> tuple[Array, Array]:
    """Voxels, and those of the class."""
    of_class = jnp.floor(tally * 2.0**-bits)
    return tally - of_class * 2.0**bits, of_class


def _is_of_class(elements: Elements) -> Array:
    return elements.labels.astype(jnp.int32) == elements.classes


def _kept_labels(elements: Elements, keep: Array) -> Array:
    labels = elements.labels if elements.classes is None else _is_of_class(elements)
    return jnp.where(keep, labels.astype(jnp.float32), 0)


def _kept(elements: Elements) -> tuple[Array, Array]:
    """Which elements count, and their probabilities, zero elsewhere: float64 as it is, others as float32."""
    keep = jnp.broadcast_to(elements.keep, elements.probs.shape)
    return keep, jnp.where(keep, single_or_double(elements.probs), 0)


def single_or_double(x: Array) -> Array:
    """`x` as float32, unless it is float64: rounding could move it to another bin."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)

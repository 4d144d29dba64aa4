"""How a sum per bin is computed on each platform.

``jax.ops.segment_sum`` is the definition; anything else here is a faster equal of it.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BinIndex = Callable[[Float[Array, "..."]], Int[Array, "..."]]
Method = Literal["auto", "segment_sum"]


def bin_edges(num_bins: int) -> np.ndarray:
    """Float32 edges of ``torch.linspace(0, 1 + eps, num_bins + 1)``, bit for bit.

    torch walks half way up from 0 and half way down from the end, each with one fused multiply-add.
    The product of a float32 and a small integer is exact in float64, so rounding once gives its bits.
    """
    end = float(np.float32(1) + np.finfo(np.float32).eps)
    step = float(np.float32(end) / np.float32(num_bins))
    up = np.arange(num_bins + 1)
    return np.where(up < (num_bins + 1) // 2, step * up, end - step * (num_bins - up)).astype(np.float32)


def bin_index(
    probs: Float[Array, "..."], num_bins: int, closed: Literal["left", "right"] = "right"
) -> Int[Array, "..."]:
    """Index of the bin that holds each probability; out of range goes to the end bins, NaN to any bin."""
    edges = jnp.asarray(bin_edges(num_bins))
    probs = probs.astype(jnp.float32)
    guess = jnp.clip(jnp.floor(probs * num_bins), 0, num_bins - 1)
    guess = jnp.where(jnp.isnan(guess), 0, guess).astype(jnp.int32)
    lower, upper = edges[guess], edges[guess + 1]
    below, above = (probs <= lower, probs > upper) if closed == "right" else (probs < lower, probs >= upper)
    return jnp.clip(guess - below + above, 0, num_bins - 1)


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Int[Array, "batch voxels"] | Float[Array, "batch voxels classes"],
    where: Bool[Array, "batch voxels"] | Bool[Array, "batch voxels classes"] | None,
    index: BinIndex,
    num_bins: int,
    *,
    method: Method = "auto",
) -> tuple[
    Int[Array, "batch classes bins"], Float[Array, "batch classes bins"], Float[Array, "batch classes bins"]
]:
    """Voxels counted, sum of ``probs`` and sum of ``labels`` in every bin of every image and class.

    Args:
      probs: probabilities; any float type, added up in float32.
      labels: class ids, or an array of the shape of ``probs``.
      where: which elements count; ``None`` counts all.
      index: elementwise function from probabilities to bin indices in ``[0, num_bins)``. It is called on one
        block at a time, so that indices never exist for all voxels at once.
      num_bins: number of bins.
      method: forces one way to compute.

    Returns:
      ``(count int32, prob_sum float32, label_sum float32)``, each ``[batch, classes, num_bins]``.
    """
    del method
    size, classes = probs.shape[1:]
    block = min(size, 4096)
    pad = -size % block
    keep = jnp.ones(probs.shape[:2], bool) if where is None else where
    keep = jnp.broadcast_to(keep[..., None] if keep.ndim == 2 else keep, probs.shape)
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(x.shape[0], -1, block, *x.shape[2:]),
        1,
        0,
    )

    def image(p, y, k):
        p = p.astype(jnp.float32)
        hit = y[:, None] == jnp.arange(classes) if y.ndim == 1 else y
        ids = jnp.where(k, index(p) + num_bins * jnp.arange(classes), classes * num_bins)
        total = lambda v: jax.ops.segment_sum(v.reshape(-1), ids.reshape(-1), classes * num_bins + 1)[:-1]
        return total(jnp.ones(p.shape, jnp.int32)), total(p), total(hit.astype(jnp.float32))

    def step(carry, x):
        count, (prob, prob_low), (label, label_low) = carry
        n, p, y = jax.vmap(image)(*x)
        add = lambda hi, lo, v: (hi + v, lo + ((hi - ((hi + v) - ((hi + v) - hi))) + (v - ((hi + v) - hi))))
        return (count + n, add(prob, prob_low, p), add(label, label_low, y)), None

    zero = jnp.zeros((probs.shape[0], classes * num_bins), jnp.float32)
    init = (zero.astype(jnp.int32), (zero, zero), (zero, zero))
    (count, prob, label), _ = lax.scan(step, init, (split(probs), split(labels), split(keep)))
    shape = lambda x: x.reshape(-1, classes, num_bins)
    return shape(count), shape(sum(prob)), shape(sum(label))


def table_lookup(
    table: Float[Array, "batch classes bins"],
    probs: Float[Array, "batch voxels classes"],
    index: BinIndex,
) -> Float[Array, "batch voxels classes"]:
    """``table[b, c, index(probs[b, v, c])]``: the transpose of the sum over bins."""
    return jax.vmap(lambda t, p: t[jnp.arange(t.shape[0]), index(p)])(table, probs)

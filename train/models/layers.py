"""Convolutions and normalisation that are fast on CPU too.

Arrays are channel last, `[batch, *spatial, channels]`; kernels are `[*window, in, out]` with odd windows.

What a convolution computes is said by one call of `lax.conv_general_dilated`, and on GPU and TPU that call
is what runs. XLA's CPU compiler is fast at one kind only, the 2-D convolution of stride 1 with a dozen or
more channels; 3-D windows, strides and the gradients of both cost it ten times the arithmetic they need. So
on CPU everything is brought to that one kind, exactly:

- a stride of s turns s neighbours along an axis into s times the channels (`_to_phases`), after which the
  window is dense; a transposed convolution likewise yields all phases of its output at once;
- few channels are widened by a block of neighbours along the last axis (`_in_blocks`);
- the first axis of a 3-D window becomes output channels, shifted and summed afterwards (`_in_planes`);
- the kernel's gradient is such a convolution too, of images turned so that channels are the batch
  (`_kernel_gradient`).

`lax.platform_dependent` chooses when the program is lowered, so exporting for another platform is right too.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...]
Convolution = Callable[[Array, Array], Array]

_CHUNK = 2**21  # elements that stay near the cache


def convolve(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*window in out"], strides: Sequence[int]
) -> Float[Array, "batch *strided out"]:
    """Convolution with `window // 2` zeros at every border: a size of n becomes ceil(n / stride).

    Args:
        x: the image, with 2 or 3 spatial axes.
        kernel: weights; out[o] = sum over t of x[stride * o + t - window // 2] @ kernel[t].
        strides: one for each spatial axis.

    Example:
        >>> convolve(jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 1)), (2, 2)).shape
        (1, 3, 2, 1)
    """
    strides = tuple(strides)
    padding = tuple((k // 2, k // 2) for k in kernel.shape[:-2])
    fast = partial(_dense, padding=padding) if prod(strides) == 1 else partial(_in_phases, strides=strides)
    return _by_platform(fast, partial(_plain, strides=strides, padding=padding))(x, kernel)


def convolve_transpose(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*window in out"], strides: Sequence[int]
) -> Float[Array, "batch *upsampled out"]:
    """The transpose of `convolve`: a size of n becomes n * stride.

    It is a dense convolution that yields the phases of its output side by side, on every platform:
    convolutions with dilated inputs are slow on GPUs as well.

    Args:
        x: the image, with 2 or 3 spatial axes.
        kernel: weights; x[i] @ kernel[t] is added to out[stride * i + t - window // 2].
        strides: one for each spatial axis.

    Example:
        >>> convolve_transpose(jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 1)), (2, 2)).shape
        (1, 10, 8, 1)
    """
    strides = tuple(strides)
    downwards = _phase_kernel(jnp.swapaxes(kernel, -1, -2), strides)
    upwards, padding = _adjoint(*downwards)
    ones = (1,) * len(strides)
    dense = _by_platform(partial(_dense, padding=padding), partial(_plain, strides=ones, padding=padding))
    return _from_phases(dense(x, upwards), strides)


def _by_platform(fast: Convolution, plain: Convolution) -> Convolution:
    """`plain`, computed and differentiated by way of the equal `fast` on CPU."""
    if _is_partitioned():
        return plain

    @jax.custom_vjp
    def convolution(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=fast, default=plain)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return convolution(x, kernel), (x, kernel)

    def backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        # Chosen here once more: differentiating the choice would keep both branches' residuals.
        return lax.platform_dependent(*operands, g, cpu=_gradients(fast), default=_gradients(plain))

    convolution.defvjp(forward, backward)
    return convolution


def _is_partitioned() -> bool:
    """Whether the compiler splits what is traced over devices, which it knows to do with the plain operator."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and set(mesh.manual_axes) != set(mesh.axis_names)


def _gradients(convolution: Convolution) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    return lambda x, kernel, g: jax.vjp(convolution, x, kernel)[1](g)


def _plain(x: Array, kernel: Array, strides: Sequence[int], padding: Padding) -> Array:
    spatial = "DHW"[-len(strides) :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _in_phases(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """A strided convolution as a dense one over phases."""
    return _dense(_to_phases(x, strides), *_phase_kernel(kernel, strides))


def _to_phases(x: Array, strides: tuple[int, ...]) -> Array:
    """[batch, *spatial, c] -> [batch, *(spatial / strides), prod(strides) * c], with zeros up to a multiple."""
    missing = [(0, -n % s) for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = jnp.pad(x, ((0, 0), *missing, (0, 0)))
    coarse = [n // s for n, s in zip(x.shape[1:-1], strides, strict=True)]
    pairs = [side for pair in zip(coarse, strides, strict=True) for side in pair]
    split = x.reshape(x.shape[0], *pairs, x.shape[-1])
    last = split.ndim - 1
    phases = split.transpose(0, *range(1, last, 2), *range(2, last, 2), last)
    return phases.reshape(x.shape[0], *coarse, -1)


def _from_phases(x: Array, strides: tuple[int, ...]) -> Array:
    """The inverse of `_to_phases`."""
    ndim, coarse = len(strides), x.shape[1:-1]
    split = x.reshape(x.shape[0], *coarse, *strides, -1)
    pairs = [axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)]
    fine = [n * s for n, s in zip(coarse, strides, strict=True)]
    return split.transpose(0, *pairs, split.ndim - 1).reshape(x.shape[0], *fine, -1)


def _phase_kernel(kernel: Array, strides: tuple[int, ...]) -> tuple[Array, Padding]:
    """Kernel and padding of the convolution of these strides as a dense one over phases.

    `[*window, in, out]` becomes `[*coarse window, prod(strides) * in, out]`, with zeros where the dense window
    reaches beyond the given one.
    """
    axes = list(zip(kernel.shape[:-2], strides, strict=True))
    padding = tuple((-(-(k // 2) // s), (k - 1) // 2 // s) for k, s in axes)
    before = [s * lo - k // 2 for (k, s), (lo, _) in zip(axes, padding, strict=True)]
    sides = [s * (lo + 1 + hi) for (_, s), (lo, hi) in zip(axes, padding, strict=True)]
    widths = [(b, side - b - k) for b, side, (k, _) in zip(before, sides, axes, strict=True)]
    dense = jnp.pad(kernel, (*widths, (0, 0), (0, 0)))
    phases = _to_phases(dense.reshape(1, *sides, -1), strides)
    return phases.reshape(*phases.shape[1:-1], -1, kernel.shape[-1]), padding


def _adjoint(kernel: Array, padding: Padding) -> tuple[Array, Padding]:
    """Kernel and padding of the dense convolution that is the transpose of the given one."""
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2)))
    widths = tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(kernel.shape, padding, strict=False))
    return jnp.swapaxes(flipped, -1, -2), widths


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: Array, kernel: Array, padding: Padding) -> Array:
    """Convolution of stride 1, the way that suits CPUs."""
    *window, channels, out = kernel.shape
    width = x.shape[-2] + sum(padding[-1]) - window[-1] + 1
    # Fastest with up to 8 outputs and 256 products a tap; with many channels patches cost more than they gain.
    block = _chunk(width, max(32, channels * out), 256) if channels < 24 and prod(window) > 1 else 1
    return _in_blocks(x, kernel, padding, block) if block > 1 else _in_slices(x, kernel, padding)


def _in_blocks(x: Array, kernel: Array, padding: Padding, block: int) -> Array:
    """Few channels, widened by treating a block of outputs along the last axis as the channels of one voxel.

    Its inputs are a patch, the block and what the window sees beyond it. That costs (block + window - 1) / window
    times the arithmetic, but fills the vectors that a handful of channels would leave mostly empty.
    """
    patches = partial(_patches, block=block, window=kernel.shape[-3], padding=padding[-1])
    y = _in_slices(x, _patch_kernel(kernel, block), (*padding[:-1], (0, 0)), patches)
    return y.reshape(*y.shape[:-2], -1, kernel.shape[-1])


def _patches(x: Array, block: int, window: int, padding: tuple[int, int]) -> Array:
    """[batch, *spatial, width, c] -> [batch, *spatial, width / block, (block + window - 1) * c], overlapping."""
    *outer, width, channels = x.shape
    side, count = block + window - 1, (width + sum(padding) - window + 1) // block

    def part(start: int) -> Array:
        """What patches hold from `start` on, a block at most."""
        before = padding[0] - start
        widths = [*[(0, 0, 0)] * len(outer), (before, count * block - width - before, 0), (0, 0, 0)]
        blocks = lax.pad(x, jnp.zeros((), x.dtype), widths).reshape(*outer, count, block * channels)
        return blocks[..., : (side - start) * channels]

    return jnp.concatenate([part(start) for start in range(0, side, block)], -1)


def _patch_kernel(kernel: Array, block: int) -> Array:
    """The kernel from a patch to its block: `[*window, in, out]` -> `[..., 1, patch * in, block * out]`."""
    *outer, window, channels, out = kernel.shape
    widths = [(0, 0)] * len(outer)
    shifted = [jnp.pad(kernel, (*widths, (j, block - 1 - j), (0, 0), (0, 0))) for j in range(block)]
    wide = jnp.concatenate(shifted, -1)
    return wide.reshape(*outer, 1, (block + window - 1) * channels, block * out)


def _dense_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _dense(x, kernel, padding), (x, kernel)


def _dense_backward(padding: Padding, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = operands
    return _dense(g, *_adjoint(kernel, padding)), _kernel_gradient(x, g, kernel.shape, padding)


_dense.defvjp(_dense_forward, _dense_backward)


def _in_slices(
    x: Array, kernel: Array, padding: Padding, widen: Callable[[Array], Array] = lambda x: x
) -> Array:
    """2-D convolutions of what `widen` makes of x."""
    if len(padding) == 3:
        return _in_planes(x, kernel, padding, widen)
    return _plain(widen(x), kernel, (1, 1), padding)


def _in_planes(x: Array, kernel: Array, padding: Padding, widen: Callable[[Array], Array]) -> Array:
    """A 3-D convolution as 2-D ones: what each plane adds to its neighbours, shifted there and summed.

    The contributions are `taps` times the output, so they are summed by chunks that stay near the cache. A chunk
    hands the planes that it leaves unfinished to the next one.
    """
    (taps, *window, channels, out), (before, after) = kernel.shape, padding[0]
    depth = x.shape[1] + before + after - taps + 1
    folded = jnp.moveaxis(kernel, 0, -2).reshape(*window, channels, taps * out)

    def contributions(planes: Array) -> list[Array]:
        return jnp.split(_plain(widen(planes), folded, (1, 1), padding[1:]), taps, -1)

    plane = jax.eval_shape(contributions, jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype))[0].shape[1:]
    size = _chunk(x.shape[1], taps * prod(plane), _CHUNK)

    def add_chunk(unfinished: Array, planes: Array) -> tuple[Array, Array]:
        terms = [_shifted(c, k + 1 - taps, size + taps - 1) for k, c in enumerate(contributions(planes))]
        sums = reduce(jnp.add, terms, _shifted(unfinished, 0, size + taps - 1))
        return sums[size:], sums[:size]

    def image(planes: Array) -> Array:
        chunks = planes.reshape(-1, size, *planes.shape[1:])
        rest, finished = lax.scan(add_chunk, jnp.zeros((taps - 1, *plane), x.dtype), chunks)
        sums = jnp.concatenate([finished.reshape(-1, *plane), rest])
        return _shifted(sums, taps - 1 - before, depth)

    return lax.map(image, x)


def _shifted(x: Array, start: int, size: int) -> Array:
    """x[start : start + size], with zeros beyond its ends."""
    widths = [(-start, start + size - x.shape[0], 0), *[(0, 0, 0)] * (x.ndim - 1)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _kernel_gradient(x: Array, g: Array, shape: tuple[int, ...], padding: Padding) -> Array:
    """Gradient of `_dense` with respect to a kernel of that shape.

    The taps of a 3-D window's first axis are channels of g, shifted, which makes it a gradient of planes. They are
    put together by chunks: of planes or, where these are small, of whole images.
    """
    if len(padding) == 2:
        return _kernel_gradient(x[:, None], g[:, None], (1, *shape), ((0, 0), *padding))[0]
    (taps, *window, channels, out), (before, _) = shape, padding[0]
    batch, depth = x.shape[:2]
    plane = prod(g.shape[2:4]) * max(channels, taps * out)
    images, size = _chunk(batch, depth * plane, _CHUNK), _chunk(depth, plane, _CHUNK)
    first, last = taps - 1 - before, depth + before - g.shape[1]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (first, last, 0), *[(0, 0, 0)] * 3])

    def add_chunk(total: Array, corner: Array) -> tuple[Array, None]:
        start = (*corner, *[np.int32(0)] * 3)
        here = lax.dynamic_slice(x, start, (images, size, *x.shape[2:]))
        there = lax.dynamic_slice(g, start, (images, size + taps - 1, *g.shape[2:]))
        under_taps = jnp.concatenate([there[:, k : k + size] for k in reversed(range(taps))], -1)
        planes, gs = (a.reshape(-1, *a.shape[2:]) for a in (here, under_taps))
        return total + _plane_kernel_gradient(planes, gs, padding[1:]), None

    corners = jnp.array([*product(range(0, batch, images), range(0, depth, size))], jnp.int32)
    total, _ = lax.scan(add_chunk, jnp.zeros((*window, channels, taps * out), x.dtype), corners)
    return jnp.moveaxis(total.reshape(*window, channels, taps, out), -2, 0)


def _plane_kernel_gradient(x: Array, g: Array, padding: Padding) -> Array:
    """A convolution once more, with g as its kernel: x is turned so that its channels are the batch.

    The turning is written out, because XLA would not do it well inside of loops.
    """
    if x.shape[0] < 8:  # As channels these are too few for the vectors with which Eigen skips the padding.
        x, padding = jnp.pad(x, ((0, 0), *padding, (0, 0))), ((0, 0), (0, 0))
    y = _plain(jnp.swapaxes(x, 0, 3), jnp.moveaxis(g, 0, 2), (1, 1), padding)
    return jnp.moveaxis(y, 0, 2)


def _chunk(count: int, size: int, most: int) -> int:
    """How many of `count` things to take at once: a divisor, for no more than `most` elements if that can be."""
    return max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * size <= most))


def normalise(
    x: Float[Array, "batch *spatial channels"], groups: int, epsilon: float = 1e-5
) -> Float[Array, "batch *spatial channels"]:
    """Zero mean and unit variance per image and group of channels (one channel a group: instance norm)."""
    return _normalise(x, groups, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalise(x: Array, groups: int, epsilon: float) -> Array:
    return _normalise_fwd(x, groups, epsilon)[0]


def _normalise_fwd(x: Array, groups: int, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    wide = _at_least_float32(x)
    centred = wide - _group_mean(wide, groups)
    scale = lax.rsqrt(_group_mean(centred * centred, groups) + epsilon)
    y = (centred * scale).astype(x.dtype)
    return y, (y, scale)


def _normalise_bwd(groups: int, epsilon: float, saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, scale = saved
    wide_g, wide_y = _at_least_float32(g), _at_least_float32(y)
    d_x = scale * (wide_g - _group_mean(wide_g, groups) - wide_y * _group_mean(wide_g * wide_y, groups))
    return (d_x.astype(g.dtype),)


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


def _at_least_float32(x: Array) -> Array:
    """Half precision holds an activation, not a sum of many."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_mean(x: Array, groups: int) -> Array:
    """Mean per image and group, shaped to broadcast against x.

    Rows of the last spatial axis are summed first, voxel by voxel: additions over long vectors, which CPUs
    do several times faster than over a few channels.
    """
    batch, channels = x.shape[0], x.shape[-1]
    rows = x.reshape(batch, -1, x.shape[-2] * channels).mean(1)
    means = rows.reshape(batch, x.shape[-2], groups, channels // groups).mean((1, 3))
    return jnp.repeat(means, channels // groups, 1).reshape(batch, *(1,) * (x.ndim - 2), channels)

"""Convolutions that are fast on every platform, and the small layers of a U-Net.

Arrays are channel last, `[batch, *spatial, channels]`; kernels are `[*window, in, out]`.

What the two public convolutions compute is defined by one line of `lax.conv_general_dilated` each. On GPU
and TPU that line is what runs. On CPU XLA turns 3-D convolutions, strided ones, transposed ones and the
gradients of all of them into slow loops; there the same numbers come from the one case it does well, a dense
2-D convolution of stride 1 with a handful of channels:

- a stride becomes phases: `s` neighbouring voxels are `s` times the channels (`_to_phases`);
- the leading axis of a 3-D window becomes output channels that are then shifted and added (`_dense`);
- the kernel's gradient is computed in pieces small enough to stay in cache (`_kernel_gradient`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...]


def convolve(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*window in out"], strides: Sequence[int]
) -> Float[Array, "batch *strided out"]:
    """Convolution with `window // 2` zeros at each border, so that sizes shrink by the stride alone."""
    return _convolve(x, kernel, tuple(strides))


def convolve_transpose(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*window in out"], strides: Sequence[int]
) -> Float[Array, "batch *upsampled out"]:
    """The transpose of `convolve`: sizes grow by exactly the stride."""
    strides = tuple(strides)
    phases, padding = _phase_kernel(jnp.swapaxes(kernel, -1, -2), strides)
    flipped, padding = _adjoint(phases, padding)
    return _from_phases(_dense(x, flipped, padding), strides)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    return lax.platform_dependent(
        x, kernel, cpu=partial(_folded, strides=strides), default=partial(_plain, strides=strides)
    )


def _convolve_fwd(x: Array, kernel: Array, strides: tuple[int, ...]):
    return _convolve(x, kernel, strides), (x, kernel)


def _convolve_bwd(strides: tuple[int, ...], operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def transposed(convolution: Callable) -> Callable:
        return lambda x, kernel, g: jax.vjp(partial(convolution, strides=strides), x, kernel)[1](g)

    return lax.platform_dependent(*operands, g, cpu=transposed(_folded), default=transposed(_plain))


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _plain(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    padding = [(k // 2, k // 2) for k in kernel.shape[:-2]]
    return _conv(x, kernel, strides, padding)


def _conv(x: Array, kernel: Array, strides: Sequence[int], padding) -> Array:
    spatial = "DHW"[-len(strides) :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _folded(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    ndim = len(strides)
    if strides == (1,) * ndim:
        if x.shape[-1] * kernel.shape[-1] <= 16 and all(n % 2 == 0 for n in x.shape[-3:-1]) :
            blocks = (1,) * (ndim - 2) + (2, 2)
            k, p = _block_kernel(kernel, blocks)
            return _from_phases(_dense(_to_phases(x, blocks), k, p), blocks)
        return _dense(x, kernel, tuple((k // 2, k // 2) for k in kernel.shape[:-2]))
    phases, padding = _phase_kernel(kernel, strides)
    return _dense(_to_phases(x, strides), phases, padding)


def _to_phases(x: Array, strides: Sequence[int]) -> Array:
    """[batch, *spatial, c] -> [batch, *(spatial / stride), prod(stride) * c]; sizes are first made multiples."""
    ragged = [(0, -n % s) for n, s in zip(x.shape[1:-1], strides, strict=True)]
    if any(hi for _, hi in ragged):
        x = jnp.pad(x, ((0, 0), *ragged, (0, 0)))
    ndim = len(strides)
    split = [m for n, s in zip(x.shape[1:-1], strides, strict=True) for m in (n // s, s)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    order = (0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    x = x.transpose(order)
    return x.reshape(*x.shape[: ndim + 1], -1)


def _from_phases(x: Array, strides: Sequence[int]) -> Array:
    ndim = len(strides)
    sizes = x.shape[1:-1]
    x = x.reshape(x.shape[0], *sizes, *strides, -1)
    order = (0, *(a for i in range(ndim) for a in (1 + i, 1 + ndim + i)), 2 * ndim + 1)
    x = x.transpose(order)
    return x.reshape(x.shape[0], *(n * s for n, s in zip(sizes, strides, strict=True)), -1)


def _phase_kernel(kernel: Array, strides: tuple[int, ...], shift=None) -> tuple[Array, Padding]:
    ndim = len(strides)
    window = kernel.shape[:ndim]
    shift = shift or (0,) * ndim
    widths, padding = [], []
    for k, s, r in zip(window, strides, shift, strict=True):
        p = k // 2
        before = -(-p // s)
        after = (k - 1 - p + s - 1) // s if shift != (0,) * ndim or any(shift) else (k - 1 - p) // s
        lo = s * before - p + r
        widths.append((lo, s * (before + after + 1) - lo - k))
        padding.append((before, after))
    kernel = jnp.pad(kernel, (*widths, (0, 0), (0, 0)))
    split = [m for n, s in zip(kernel.shape[:ndim], strides, strict=True) for m in (n // s, s)]
    order = (*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2), 2 * ndim, 2 * ndim + 1)
    kernel = kernel.reshape(*split, *kernel.shape[-2:]).transpose(order)
    return kernel.reshape(*kernel.shape[:ndim], -1, kernel.shape[-1]), tuple(padding)


def _block_kernel(kernel: Array, blocks: tuple[int, ...]):
    import itertools
    ndim = len(blocks)
    window = kernel.shape[:ndim]
    out = []
    padding = tuple((-(-(k // 2) // s),) * 2 for k, s in zip(window, blocks))
    for r in itertools.product(*map(range, blocks)):
        widths = []
        for k, s, ri, (before, after) in zip(window, blocks, r, padding, strict=True):
            lo = s * before - k // 2 + ri
            widths.append((lo, s * (before + after + 1) - lo - k))
        out.append(jnp.pad(kernel, (*widths, (0, 0), (0, 0))))
    kernel = jnp.stack(out, -2)
    split = [m for n, s in zip(kernel.shape[:ndim], blocks, strict=True) for m in (n // s, s)]
    order = (*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2), 2 * ndim, 2 * ndim + 1, 2 * ndim + 2)
    kernel = kernel.reshape(*split, *kernel.shape[-3:]).transpose(order)
    return kernel.reshape(*kernel.shape[:ndim], kernel.shape[-3] * prod(blocks), -1), padding


def _adjoint(kernel: Array, padding: Padding) -> tuple[Array, Padding]:
    """Kernel and padding of the convolution that is the transpose of the given one."""
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2)))
    widths = tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(kernel.shape[:-2], padding, strict=True))
    return jnp.swapaxes(flipped, -1, -2), widths


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: Array, kernel: Array, padding: Padding) -> Array:
    return lax.platform_dependent(x, kernel, cpu=partial(_dense_cpu, padding=padding),
        default=partial(_conv, strides=(1,) * len(padding), padding=padding))


def _dense_fwd(x, kernel, padding):
    return _dense(x, kernel, padding), (x, kernel)


def _dense_bwd(padding, operands, g):
    def plain(x, kernel, g):
        return jax.vjp(partial(_conv, strides=(1,) * len(padding), padding=padding), x, kernel)[1](g)
    def fast(x, kernel, g):
        return _dense_cpu(g, *_adjoint(kernel, padding)), _kernel_gradient(x, g, kernel, padding)
    return lax.platform_dependent(*operands, g, cpu=fast, default=plain)


_dense.defvjp(_dense_fwd, _dense_bwd)


def _dense_cpu(x: Array, kernel: Array, padding: Padding) -> Array:
    if len(padding) < 3:
        return _conv(x, kernel, (1,) * len(padding), padding)
    taps, out = kernel.shape[0], kernel.shape[-1]
    planes = x.reshape(-1, *x.shape[2:])
    folded = jnp.moveaxis(kernel, 0, -2).reshape(*kernel.shape[1:-1], taps * out)
    y = _conv(planes, folded, (1, 1), padding[1:])
    y = y.reshape(*x.shape[:2], *y.shape[1:-1], taps, out)
    size = x.shape[1] + sum(padding[0]) - taps + 1
    return sum(_shift(y[..., k, :], k - padding[0][0], size) for k in range(taps))


def _shift(x: Array, by: int, size: int) -> Array:
    """x[:, by : by + size], zero beyond its borders."""
    widths = [(0, 0, 0)] * x.ndim
    widths[1] = (-by, size - (x.shape[1] - by), 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _kernel_gradient(x, g, kernel, padding):
    if len(padding) < 3:
        return _planes_gradient(x, g, kernel, padding)
    taps, out = kernel.shape[0], kernel.shape[-1]
    lo = padding[0][0]
    shifted = [_shift(g, lo - k, x.shape[1]) for k in range(taps)]
    g = jnp.concatenate(shifted, -1)
    g = g.reshape(-1, *g.shape[2:])
    folded = jnp.zeros((*kernel.shape[1:-1], taps * out), kernel.dtype)
    d = _planes_gradient(x.reshape(-1, *x.shape[2:]), g, folded, padding[1:])
    return jnp.moveaxis(d.reshape(*d.shape[:-1], taps, out), -2, 0)


def _planes_gradient(x, g, kernel, padding):
    n = len(x)
    rows = prod(x.shape[1:-1])
    chunks = min(16, max(1, n * rows // 6144))
    chunks = next(c for c in range(chunks, 0, -1) if n % c == 0)
    m = n // chunks
    conv = partial(_conv, strides=(1,) * len(padding), padding=padding)
    return sum(jax.vjp(lambda k, i=i: conv(x[i * m : (i + 1) * m], k), kernel)[1](g[i * m : (i + 1) * m])[0] for i in range(chunks))


def normalise(
    x: Float[Array, "batch *spatial channels"], groups: int, epsilon: float = 1e-5
) -> Float[Array, "batch *spatial channels"]:
    """Zero mean and unit variance per image and group of channels (one channel a group: instance norm)."""
    return _normalise(x, groups, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalise(x: Array, groups: int, epsilon: float) -> Array:
    return _normalise_fwd(x, groups, epsilon)[0]


def _normalise_fwd(x: Array, groups: int, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    centred = x - _group_mean(x, groups)
    scale = lax.rsqrt(_group_mean(centred * centred, groups) + epsilon)
    y = centred * scale
    return y, (y, scale)


def _normalise_bwd(groups: int, epsilon: float, saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, scale = saved
    return (scale * (g - _group_mean(g, groups) - y * _group_mean(g * y, groups)),)


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


def _group_mean(x: Array, groups: int) -> Array:
    """Mean per image and group, shaped to broadcast against x.

    Rows of the last spatial axis are summed first, voxel by voxel: additions over long vectors, which CPUs
    do several times faster than over a few channels.
    """
    batch, channels = x.shape[0], x.shape[-1]
    rows = x.reshape(batch, -1, x.shape[-2] * channels).mean(1)
    means = rows.reshape(batch, x.shape[-2], groups, channels // groups).mean((1, 3))
    return jnp.repeat(means, channels // groups, 1).reshape(batch, *(1,) * (x.ndim - 2), channels)

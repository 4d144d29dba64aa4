"""Convolutions and normalisation that are fast on CPUs too.

Arrays are channel last, `[batch, *spatial, channels]`; kernels are `[*kernel_size, in, out]` with odd sizes.

In two dimensions, GPUs and TPUs run one call of `lax.conv_general_dilated`. In three they run one of all planes in
two dimensions:

- On GPUs each plane has its neighbours' channels beside its own (`_beside_neighbours`). cuDNN's 3-D convolutions of
  few channels are slow, and XLA gives them channels in an order that cuDNN changes and changes back. On an H200 the
  training step of the paper's U-Net, batch 8 of 96x96x96 with 4 channels, takes 9.9 ms instead of 22.7 in bfloat16
  and 11.8 instead of 19.2 in float32, of which the kernel of the loss saves 1.3.
- On TPUs the planes yield what they contribute to their neighbours (`_in_stacked_planes`). XLA's TPU compiler pads
  the few channels of a 3-D convolution many times over. With 8 channels, 96^3 voxels and gradients this takes a
  seventh of the memory, a quarter of the traffic and half the time to compile.

XLA's CPU compiler is fast only at 2-D convolutions of
stride 1 with a dozen or more channels. 3-D kernels, strides, and gradients of both take it ten times longer than
their arithmetic needs. On CPUs every convolution is therefore rewritten, exactly, as 2-D convolutions of stride 1:

- With a stride of s, s neighbours along an axis become s times the channels (`_to_phases`), and the convolution
  becomes dense. A transposed convolution yields all phases of its output at once.
- A block of neighbours along the last axis widens few channels (`_in_blocks`).
- The first axis of a 3-D kernel becomes output channels, which are shifted and summed afterwards (`_in_planes`).
- The gradient for the kernel is a convolution of images whose channels are the batch (`_kernel_gradient`).

`lax.platform_dependent` chooses when the program is lowered, so that programs exported for another platform are
right too.

The compiler can split none of these forms but the plain one over devices. Where it splits a program, convolutions
are therefore split by hand: devices exchange the rims of their parts of a volume and run the fast form on these
parts (`_over_devices`). Shapes that do not split evenly run the plain form.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from train.models.patches import from_patches, to_patches
from train.sharding import AXES, BATCH, SPACE, batch_spec

Padding = tuple[tuple[int, int], ...]
Convolution = Callable[[Array, Array], Array]

EPSILON = 1e-5
"""Added to variances by norms, as in PyTorch."""
_CHUNK = 2**21  # elements that stay near the cache


def convolve(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*kernel in out"], strides: Sequence[int]
) -> Float[Array, "batch *strided out"]:
    """Convolution with `kernel_size // 2` zeros at every border: a size of n becomes ceil(n / stride).

    Args:
        x: the image, with 2 or 3 spatial axes.
        kernel: weights; out[o] = sum over t of x[stride * o + t - kernel_size // 2] @ kernel[t].
        strides: one for each spatial axis.

    Example:
        >>> convolve(jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 1)), (2, 2)).shape
        (1, 3, 2, 1)
    """
    strides = tuple(strides)
    first, *others = ((k // 2, k // 2) for k in kernel.shape[:-2])

    def padded(first: tuple[int, int]) -> Convolution:
        padding = (first, *others)
        on_cpu = _dense if prod(strides) == 1 else partial(_in_phases, strides=strides)
        on_tpu, elsewhere = (
            partial(form, strides=strides) for form in (_in_stacked_planes, _beside_neighbours)
        )
        return _by_platform(*(partial(form, padding=padding) for form in (on_cpu, on_tpu, elsewhere)))

    before = first[0]
    after = max((kernel.shape[0] - 1) // 2 - strides[0] + 1, 0)
    split = _split(padded((0, 0)), before, after) if before else padded(first)
    plain = partial(_plain, strides=strides, padding=(first, *others))
    return _over_devices(padded(first), split, plain, max(before, after))(x, kernel)


def convolve_transpose(
    x: Float[Array, "batch *spatial in"], kernel: Float[Array, "*kernel in out"], strides: Sequence[int]
) -> Float[Array, "batch *upsampled out"]:
    """The transpose of `convolve`: a size of n becomes n * stride.

    On CPUs and GPUs it is a dense convolution that yields the phases of its output side by side, since convolutions
    with dilated inputs are slow there. On TPUs such phases take thirty times the memory of the output.

    Args:
        x: the image, with 2 or 3 spatial axes.
        kernel: weights; x[i] @ kernel[t] is added to out[stride * i + t - kernel_size // 2].
        strides: one for each spatial axis.

    Example:
        >>> convolve_transpose(jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 1)), (2, 2)).shape
        (1, 10, 8, 1)
    """
    strides = tuple(strides)

    def in_phases(dense: Callable[..., Any]) -> Convolution:
        def convolution(x: Array, kernel: Array) -> Array:
            downwards = _phase_kernel(jnp.swapaxes(kernel, -1, -2), strides)
            upwards, padding = _adjoint(*downwards)
            return from_patches(dense(x, upwards, padding=padding), strides)

        return convolution

    plain, elsewhere = (
        in_phases(partial(form, strides=(1,) * len(strides))) for form in (_plain, _beside_neighbours)
    )
    on_tpu = partial(_transposed_in_stacked_planes, strides=strides)
    whole = _by_platform(in_phases(_dense), on_tpu, elsewhere)
    size, stride = kernel.shape[0], strides[0]
    before, after = (size - 1) // 2 // stride, (size // 2 + stride - 1) // stride

    def cropped(x: Array, kernel: Array) -> Array:
        return whole(x, kernel)[:, stride * before : stride * (x.shape[1] - after)]

    return _over_devices(whole, _split(cropped, before, after), plain, max(before, after))(x, kernel)


def _by_platform(on_cpu: Convolution, on_tpu: Convolution, elsewhere: Convolution) -> Convolution:
    """One of three equal convolutions, in the gradient too."""

    @jax.custom_vjp
    def convolution(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=on_tpu, default=elsewhere)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return convolution(x, kernel), (x, kernel)

    def backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        # A second choice: differentiating the first would keep the residuals of both branches.
        cpu, tpu, default = map(_gradients, (on_cpu, on_tpu, elsewhere))
        return lax.platform_dependent(*operands, g, cpu=cpu, tpu=tpu, default=default)

    convolution.defvjp(forward, backward)
    return convolution


def _over_devices(whole: Convolution, split: Convolution, plain: Convolution, rim: int) -> Convolution:
    """The convolution that suits how the traced program is split over devices.

    Args:
        whole: of all that a device has.
        split: of a device's part of the first spatial axis, which exchanges rims with the neighbours.
        plain: can be split by the compiler.
        rim: planes of a neighbour that `split` needs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names):
        return whole

    def convolution(x: Array, kernel: Array) -> Array:
        batch, space = prod(mesh.shape[axis] for axis in BATCH), mesh.shape[SPACE]
        if x.shape[0] % batch or x.shape[1] % space or x.shape[1] < rim * space:
            return plain(x, kernel)
        voxels = batch_spec(2)
        local = split if space > 1 else whole
        specs = (voxels, PartitionSpec())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=voxels, check_vma=False)(x, kernel)

    return convolution if set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes else plain


def _split(convolution: Convolution, before: int, after: int) -> Convolution:
    """A convolution of a device's planes and those of its neighbours, or zeros, `before` and `after` them."""

    def from_neighbour(rim: Array, step: int) -> Array:
        places = range(lax.axis_size(SPACE))
        return lax.ppermute(rim, SPACE, [(i, i + step) for i in places if i + step in places])

    def with_rims(x: Array, kernel: Array) -> Array:
        parts = [x]
        if before:
            parts.insert(0, from_neighbour(x[:, -before:], 1))
        if after:
            parts.append(from_neighbour(x[:, :after], -1))
        return convolution(jnp.concatenate(parts, 1), kernel)

    return with_rims


def _gradients(convolution: Convolution) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    return lambda x, kernel, g: jax.vjp(convolution, x, kernel)[1](g)


def _plain(x: Array, kernel: Array, strides: Sequence[int], padding: Padding) -> Array:
    spatial = "DHW"[-len(strides) :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _beside_neighbours(x: Array, kernel: Array, strides: Sequence[int], padding: Padding) -> Array:
    """A 3-D convolution as one 2-D convolution of all planes, each with its neighbours as further channels."""
    if len(strides) == 2:
        return _plain(x, kernel, strides, padding)
    taps, *size, channels, out = kernel.shape
    x = jnp.pad(x, ((0, 0), padding[0], *((0, 0),) * 3))
    last = x.shape[1] - taps + 1
    wide = jnp.concatenate([x[:, t : t + last : strides[0]] for t in range(taps)], -1)
    folded = jnp.moveaxis(kernel, 0, 2).reshape(*size, taps * channels, out)
    y = _plain(wide.reshape(-1, *wide.shape[2:]), folded, strides[1:], padding[1:])
    return y.reshape(*wide.shape[:2], *y.shape[1:])


def _in_stacked_planes(x: Array, kernel: Array, strides: Sequence[int], padding: Padding) -> Array:
    """A 3-D convolution as one 2-D convolution of all planes, whose output channels are the taps along depth."""
    if len(strides) == 2:
        return _plain(x, kernel, strides, padding)
    parts = _contributions(x, kernel, partial(_plain, strides=strides[1:], padding=padding[1:]))
    (before, after), stride = padding[0], strides[0]
    parts = [jnp.pad(part, ((0, 0), (before, after), *((0, 0),) * 3)) for part in parts]
    stop = parts[0].shape[1] - len(parts) + 1
    return reduce(jnp.add, [part[:, t : t + stop : stride] for t, part in enumerate(parts)])


def _transposed_in_stacked_planes(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """`convolve_transpose` as one 2-D convolution of all planes, which are then spread along depth and summed."""
    sides = kernel.shape[:-2]
    if len(strides) == 2:
        return _dilated(x, kernel, strides)
    parts = _contributions(x, kernel, partial(_dilated, strides=strides[1:]))
    low, stride = -(sides[0] // 2), strides[0]
    zero = jnp.zeros((), x.dtype)

    def spread(part: Array, before: int) -> Array:
        return lax.pad(part, zero, [(0, 0, 0), (before, stride - 1 - before, stride - 1), *((0, 0, 0),) * 3])

    return reduce(jnp.add, [spread(part, low + t) for t, part in enumerate(parts)])


def _contributions(x: Array, kernel: Array, convolve_planes: Convolution) -> list[Array]:
    """What all planes contribute to their neighbours, one array for each tap along depth."""
    (taps, *size, channels, out), (batch, depth, *plane, _) = kernel.shape, x.shape
    folded = jnp.moveaxis(kernel, 0, -2).reshape(*size, channels, taps * out)
    y = convolve_planes(x.reshape(batch * depth, *plane, channels), folded)
    return jnp.split(y.reshape(batch, depth, *y.shape[1:]), taps, -1)


def _dilated(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """A 2-D transposed convolution."""
    sides = kernel.shape[:-2]
    low = [k - 1 - k // 2 for k in sides]
    padding = [(lo, s + k - 2 - lo) for lo, s, k in zip(low, strides, sides, strict=True)]
    layout = ("NHWC", "HWIO", "NHWC")
    flipped = jnp.flip(kernel, (0, 1))
    return lax.conv_general_dilated(x, flipped, (1, 1), padding, strides, dimension_numbers=layout)


def _in_phases(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> Array:
    """A strided convolution, as a dense one over phases. On the first axis it needs no or all of the padding."""
    size, stride = kernel.shape[0], strides[0]
    if padding[0][0] == size // 2:
        return _dense(_to_phases(x, strides), *_phase_kernel(kernel, strides))
    rim = size // 2
    count = (x.shape[1] - size) // stride + 1
    x = jnp.pad(
        x, ((0, 0), (-rim % stride, 0), *((0, 0),) * (x.ndim - 2))
    )  # phases start at the first result
    y: Any = _dense(_to_phases(x, strides), *_phase_kernel(kernel, strides))
    return y[:, -(-rim // stride) :][:, :count]


def _to_phases(x: Array, strides: tuple[int, ...]) -> Array:
    """`to_patches`, with zeros up to a multiple of the strides."""
    missing = [(0, -n % s) for n, s in zip(x.shape[1:-1], strides, strict=True)]
    return to_patches(jnp.pad(x, ((0, 0), *missing, (0, 0))), strides)


def _phase_kernel(kernel: Array, strides: tuple[int, ...]) -> tuple[Array, Padding]:
    """Kernel and padding that turn a convolution of these strides into a dense one over phases.

    `[*kernel_size, in, out]` becomes `[*coarse, prod(strides) * in, out]`, with zeros where the dense kernel
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
    """Convolution of stride 1, rewritten for CPUs."""
    *size, channels, out = kernel.shape
    width = x.shape[-2] + sum(padding[-1]) - size[-1] + 1
    # Up to 8 outputs and 256 products a tap are fastest. With many channels blocks cost more than they gain.
    block = _chunk(width, max(32, channels * out), 256) if channels < 24 and prod(size) > 1 else 1
    return _in_blocks(x, kernel, padding, block) if block > 1 else _in_slices(x, kernel, padding)


def _in_blocks(x: Array, kernel: Array, padding: Padding, block: int) -> Array:
    """A convolution of few channels: a block of outputs along the last axis becomes the channels of one voxel.

    The inputs of a block are a patch: the block and the kernel's reach beyond it. This takes
    (block + size - 1) / size times the arithmetic, but fills vectors that few channels would leave mostly empty.
    """
    patches = partial(_patches, block=block, size=kernel.shape[-3], padding=padding[-1])
    y = _in_slices(x, _patch_kernel(kernel, block), (*padding[:-1], (0, 0)), patches)
    return y.reshape(*y.shape[:-2], -1, kernel.shape[-1])


def _patches(x: Array, block: int, size: int, padding: tuple[int, int]) -> Array:
    """[batch, *spatial, width, c] -> [batch, *spatial, width / block, (block + size - 1) * c], overlapping."""
    *outer, width, channels = x.shape
    side, count = block + size - 1, (width + sum(padding) - size + 1) // block

    def part(start: int) -> Array:
        """At most a block of each patch, from `start` on."""
        before = padding[0] - start
        widths = [*[(0, 0, 0)] * len(outer), (before, count * block - width - before, 0), (0, 0, 0)]
        blocks = lax.pad(x, jnp.zeros((), x.dtype), widths).reshape(*outer, count, block * channels)
        return blocks[..., : (side - start) * channels]

    return jnp.concatenate([part(start) for start in range(0, side, block)], -1)


def _patch_kernel(kernel: Array, block: int) -> Array:
    """The kernel from a patch to its block: `[*kernel_size, in, out]` -> `[..., 1, patch * in, block * out]`."""
    *outer, size, channels, out = kernel.shape
    widths = [(0, 0)] * len(outer)
    shifted = [jnp.pad(kernel, (*widths, (j, block - 1 - j), (0, 0), (0, 0))) for j in range(block)]
    wide = jnp.concatenate(shifted, -1)
    return wide.reshape(*outer, 1, (block + size - 1) * channels, block * out)


def _dense_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _dense(x, kernel, padding), (x, kernel)


def _dense_backward(padding: Padding, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = operands
    return _dense(g, *_adjoint(kernel, padding)), _kernel_gradient(x, g, kernel.shape, padding)


_dense.defvjp(_dense_forward, _dense_backward)


def _in_slices(
    x: Array, kernel: Array, padding: Padding, widen: Callable[[Array], Array] = lambda x: x
) -> Array:
    """2-D convolutions of `widen(x)`."""
    if len(padding) == 3:
        return _in_planes(x, kernel, padding, widen)
    return _plain(widen(x), kernel, (1, 1), padding)


def _in_planes(x: Array, kernel: Array, padding: Padding, widen: Callable[[Array], Array]) -> Array:
    """A 3-D convolution as 2-D ones: the contributions of each plane to its neighbours are shifted and summed.

    The contributions take `taps` times the memory of the output, so they are summed in chunks that fit the cache. A
    chunk hands its unfinished planes to the next one.
    """
    (taps, *size, channels, out), (before, after) = kernel.shape, padding[0]
    depth = x.shape[1] + before + after - taps + 1
    folded = jnp.moveaxis(kernel, 0, -2).reshape(*size, channels, taps * out)

    def contributions(planes: Array) -> list[Array]:
        return jnp.split(_plain(widen(planes), folded, (1, 1), padding[1:]), taps, -1)

    plane = jax.eval_shape(contributions, jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype))[0].shape[1:]
    planes_at_once = _chunk(x.shape[1], taps * prod(plane), _CHUNK)

    def add_chunk(unfinished: Array, planes: Array) -> tuple[Array, Array]:
        terms = [
            _shifted(c, k + 1 - taps, planes_at_once + taps - 1) for k, c in enumerate(contributions(planes))
        ]
        sums = reduce(jnp.add, terms, _shifted(unfinished, 0, planes_at_once + taps - 1))
        return sums[planes_at_once:], sums[:planes_at_once]

    def image(planes: Array) -> Array:
        chunks = planes.reshape(-1, planes_at_once, *planes.shape[1:])
        unfinished, finished = lax.scan(add_chunk, jnp.zeros((taps - 1, *plane), x.dtype), chunks)
        sums = jnp.concatenate([finished.reshape(-1, *plane), unfinished])
        return _shifted(sums, taps - 1 - before, depth)

    return lax.map(image, x)


def _shifted(x: Array, start: int, size: int) -> Array:
    """x[start : start + size], with zeros beyond its ends."""
    widths = [(-start, start + size - x.shape[0], 0), *[(0, 0, 0)] * (x.ndim - 1)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _kernel_gradient(x: Array, g: Array, shape: tuple[int, ...], padding: Padding) -> Array:
    """Gradient of `_dense` with respect to a kernel of that shape.

    The taps along the first axis of a 3-D kernel become shifted channels of g, so that planes remain. They are
    processed in chunks: of planes or, if planes are small, of whole images.
    """
    if len(padding) == 2:
        return _kernel_gradient(x[:, None], g[:, None], (1, *shape), ((0, 0), *padding))[0]
    (taps, *kernel_size, channels, out), (before, _) = shape, padding[0]
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
    total, _ = lax.scan(add_chunk, jnp.zeros((*kernel_size, channels, taps * out), x.dtype), corners)
    return jnp.moveaxis(total.reshape(*kernel_size, channels, taps, out), -2, 0)


def _plane_kernel_gradient(x: Array, g: Array, padding: Padding) -> Array:
    """Gradient for a 2-D kernel: a convolution with g as its kernel, of x with channels and batch exchanged.

    The exchange is explicit, because XLA does it badly inside loops.
    """
    if x.shape[0] < 8:  # too few channels for the vectors with which Eigen skips the padding
        x, padding = jnp.pad(x, ((0, 0), *padding, (0, 0))), ((0, 0), (0, 0))
    y = _plain(jnp.swapaxes(x, 0, 3), jnp.moveaxis(g, 0, 2), (1, 1), padding)
    return jnp.moveaxis(y, 0, 2)


def _chunk(count: int, size: int, most: int) -> int:
    """How many of `count` things to take at once: the largest divisor with at most `most` elements, or 1."""
    return max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * size <= most))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise(
    x: Float[Array, "batch *spatial channels"], groups: int
) -> Float[Array, "batch *spatial channels"]:
    """Zero mean and unit variance per image and group of channels. With one channel a group it is instance norm."""
    return _normalise_fwd(x, groups)[0]


def _normalise_fwd(x: Array, groups: int) -> tuple[Array, tuple[Array, Array]]:
    wide = _at_least_float32(x)
    centred = wide - _group_mean(wide, groups)
    scale = lax.rsqrt(_group_mean(centred * centred, groups) + EPSILON)
    y = (centred * scale).astype(x.dtype)
    return y, (y, scale)


def _normalise_bwd(groups: int, saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, scale = saved
    wide_g, wide_y = _at_least_float32(g), _at_least_float32(y)
    d_x = scale * (wide_g - _group_mean(wide_g, groups) - wide_y * _group_mean(wide_g * wide_y, groups))
    return (d_x.astype(g.dtype),)


normalise.defvjp(_normalise_fwd, _normalise_bwd)


def _at_least_float32(x: Array) -> Array:
    """Sums of many activations need more than half precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_mean(x: Array, groups: int) -> Array:
    """Mean per image and group, shaped to broadcast against x.

    Rows of the last spatial axis are summed first. These are additions of long vectors, several times faster on
    CPUs than additions of a few channels.
    """
    batch, channels = x.shape[0], x.shape[-1]
    rows = x.reshape(batch, -1, x.shape[-2] * channels).mean(1)
    means = rows.reshape(batch, x.shape[-2], groups, channels // groups).mean((1, 3))
    return jnp.repeat(means, channels // groups, 1).reshape(batch, *(1,) * (x.ndim - 2), channels)

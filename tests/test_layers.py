"""The fast convolutions against the plain operator, on the platform the tests run on."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from train.models import layers
from train.sharding import device_mesh, replicated

CASES = [
    # spatial sizes, in, out, window, strides
    ((9, 8, 7), 3, 3, (3, 3, 3), (1, 1, 1)),
    ((6, 5, 8), 4, 4, (3, 3, 3), (1, 1, 1)),
    ((4, 6, 10), 8, 16, (3, 3, 3), (1, 1, 1)),
    ((3, 4, 5), 16, 8, (1, 1, 1), (1, 1, 1)),
    ((5, 6, 7), 2, 5, (3, 1, 5), (1, 1, 1)),
    ((8, 6, 4), 1, 8, (3, 3, 3), (2, 2, 2)),
    ((7, 5, 9), 4, 6, (3, 3, 3), (2, 2, 2)),
    ((6, 8, 9), 3, 4, (5, 3, 3), (2, 1, 3)),
    ((4, 6, 8), 3, 4, (1, 1, 1), (2, 2, 2)),
    ((4, 3, 12), 1, 2, (3, 3, 5), (1, 1, 1)),  # blocks of 6
    ((2, 3, 12), 8, 8, (3, 3, 3), (1, 1, 1)),  # blocks of 4
    ((12, 9), 3, 2, (3, 3), (1, 1)),
    ((5, 9), 2, 1, (3, 3), (1, 1)),  # blocks of 3
    ((4, 8), 3, 4, (3, 3), (1, 1)),  # blocks of 8
    ((4, 10), 8, 12, (3, 5), (1, 1)),  # blocks of 2, whose patches reach over three
    ((3, 8), 24, 2, (3, 3), (1, 1)),  # no blocks
    ((7, 64), 12, 16, (5, 3), (1, 1)),
    ((8, 7), 1, 8, (3, 3), (2, 2)),
    ((9, 12), 5, 3, (3, 5), (3, 2)),
]


def operands(sizes, channels, out, window, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, *sizes, channels), (*window, channels, out)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def layout(strides):
    spatial = "DHW"[-len(strides) :]
    return (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")


def plain(x, kernel, strides):
    padding = [(k // 2, k // 2) for k in kernel.shape[:-2]]
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout(strides))


def plain_transpose(x, kernel, strides):
    """The kernel backwards over an input with gaps of zeros: the definition of a transposed convolution."""
    padding = [(k - 1 - k // 2, s - 1 + k // 2) for k, s in zip(kernel.shape, strides, strict=False)]
    flipped = jnp.flip(kernel, range(len(strides)))
    ones = (1,) * len(strides)
    return lax.conv_general_dilated(x, flipped, ones, padding, strides, dimension_numbers=layout(strides))


def assert_same(ours, expected, x, kernel):
    """Values and both gradients agree to float32's rounding, relative to the largest."""

    @jax.jit
    def everything(x, kernel, g):
        pairs = [jax.vjp(function, x, kernel) for function in (ours, expected)]
        return [(value, *pullback(g)) for value, pullback in pairs]

    shape = jax.eval_shape(expected, x, kernel).shape
    g = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    for a, b in zip(*everything(x, kernel, g), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("sizes", "channels", "out", "window", "strides"), CASES)
def test_convolve_equals_the_plain_operator(sizes, channels, out, window, strides):
    x, kernel = operands(sizes, channels, out, window)
    assert_same(
        lambda x, k: layers.convolve(x, k, strides),
        lambda x, k: plain(x, k, strides),
        x,
        kernel,
    )


@pytest.mark.parametrize(("sizes", "channels", "out", "window", "strides"), CASES)
def test_convolve_transpose_equals_the_plain_operator(sizes, channels, out, window, strides):
    x, kernel = operands(sizes, channels, out, window)
    assert_same(
        lambda x, k: layers.convolve_transpose(x, k, strides),
        lambda x, k: plain_transpose(x, k, strides),
        x,
        kernel,
    )


def test_convolve_transpose_is_the_transpose():
    """<convolve(x), y> = <x, convolve_transpose(y)> with in and out exchanged."""
    x, kernel = operands((6, 4, 8), 3, 5, (3, 3, 3))
    y = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 2, 4, 5)), jnp.float32)
    down = jnp.vdot(layers.convolve(x, kernel, (2, 2, 2)), y)
    up = jnp.vdot(x, layers.convolve_transpose(y, jnp.swapaxes(kernel, -1, -2), (2, 2, 2)))
    np.testing.assert_allclose(down, up, rtol=1e-4)


def test_many_chunks_of_planes(monkeypatch):
    """Planes beyond one chunk: every tap reaches across the chunks' borders, some across several."""
    x, kernel = operands((6, 48, 40), 2, 3, (5, 3, 3), batch=2)
    contributions = 48 * 40 * 5 * 3  # of one plane: each tap's to each voxel and channel
    assert [layers._chunk(6, contributions, most) for most in (1, 2 * contributions, 10**6)] == [1, 2, 6]
    for planes in (1, 2, 3):
        monkeypatch.setattr(layers, "_CHUNK", planes * contributions)
        assert_same(
            lambda x, k: layers._dense(x, k, ((2, 2), (1, 1), (1, 1))),
            lambda x, k: plain(x, k, (1, 1, 1)),
            x,
            kernel,
        )


def test_vmap():
    x, kernel = operands((4, 6, 8), 2, 3, (3, 3, 3), batch=4)
    pairs = x.reshape(2, 2, *x.shape[1:])
    ours = jax.vmap(lambda x: layers.convolve(x, kernel, (2, 2, 2)))(pairs)
    np.testing.assert_allclose(ours.reshape(4, 2, 3, 4, 3), plain(x, kernel, (2, 2, 2)), atol=1e-4)


@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2)])
def test_each_platform_gets_its_own_program(strides):
    """2-D convolutions, on CPUs in loops. On GPUs a plane has its two neighbours' channels as well, 6 of 2."""
    x, kernel = operands((8, 8, 8), 2, 3, (3, 3, 3))

    def value_and_gradients(x, kernel):
        value, pullback = jax.vjp(lambda x, k: layers.convolve(x, k, strides), x, kernel)
        return value, pullback(value)

    for platform, loops in [("cpu", True), ("cuda", False), ("tpu", False)]:
        program = export.export(jax.jit(value_and_gradients), platforms=[platform])(x, kernel).mlir_module()
        convolutions = [line for line in program.splitlines() if "stablehlo.convolution" in line]
        assert convolutions, platform
        assert not any("0, 1, 2" in line for line in convolutions), platform
        assert ("stablehlo.while" in program) is loops, platform
        assert any("tensor<3x3x6x3xf32>" in line for line in convolutions) is (platform == "cuda")


@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("sides", [(3, 3, 3), (1, 1, 1), (3, 1, 3)])
@pytest.mark.parametrize("form", [layers._in_stacked_planes, layers._beside_neighbours])
def test_two_dimensional_forms_equal_the_plain_operator(form, sides, strides):
    """The programs of TPUs and GPUs, on the platform the tests run on."""
    x, kernel = operands((8, 7, 6), 2, 3, sides)
    padding = tuple((side // 2, side // 2) for side in sides)
    run = jax.jit(
        lambda function: jax.value_and_grad(
            lambda *operands: jnp.sin(function(*operands, strides, padding)).sum(), argnums=(0, 1)
        )(x, kernel),
        static_argnums=0,
    )
    ours, theirs = run(form), run(layers._plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 2), (3, 1, 2), (2, 2)])
@pytest.mark.parametrize("side", [1, 3])
def test_transposed_stacked_planes_equal_the_phases(side, strides):
    x, kernel = operands((5, 4, 6)[: len(strides)], 2, 3, (side,) * len(strides))
    run = jax.jit(
        lambda function: jax.value_and_grad(
            lambda *operands: jnp.sin(function(*operands, strides)).sum(), argnums=(0, 1)
        )(x, kernel),
        static_argnums=0,
    )
    ours, theirs = run(layers._transposed_in_stacked_planes), run(layers.convolve_transpose)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    ("function", "side", "stride", "planes"),
    [
        (layers.convolve, 3, 1, 4),
        (layers.convolve, 3, 2, 8),
        (layers.convolve, 5, 2, 8),
        (layers.convolve, 3, 1, 6),  # uneven
        (layers.convolve_transpose, 3, 2, 4),
        (layers.convolve_transpose, 5, 2, 4),
    ],
)
def test_split_volumes_have_the_results_and_gradients_of_whole_ones(function, side, stride, planes):
    mesh = device_mesh("data=2,space=4", jax.devices()[:8])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, planes, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(side, side, 3, 2)), jnp.float32)

    def results(x, kernel):
        y, pull_back = jax.vjp(lambda *operands: function(*operands, (stride, stride)), x, kernel)
        return y, *pull_back(jnp.cos(y))

    def split(x, kernel):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return results(x, kernel)

    placed = jax.device_put((x, kernel), replicated(mesh))
    for whole, part in zip(jax.jit(results)(x, kernel), jax.jit(split)(*placed), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-5 * float(abs(whole).max()))


def test_memory_of_a_large_volume():
    """Nothing of the size of all windows (27 times the image) is ever held."""
    x = jax.ShapeDtypeStruct((1, 112, 112, 72, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 8, 8), jnp.float32)
    gradients = jax.grad(lambda x, k: layers.convolve(x, k, (1, 1, 1)).sum(), (0, 1))
    memory = jax.jit(gradients).lower(x, kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 9 * x.size * 4


@pytest.mark.parametrize(("sizes", "groups"), list(product([(4, 6, 5), (9, 4)], [8, 2, 1])))
def test_normalise(sizes, groups):
    rng = np.random.default_rng(0)
    x, g = rng.normal(3.0, 2.0, size=(2, 2, *sizes, 8))

    def naive(x):
        split = x.reshape(2, -1, groups, 8 // groups)
        mean, std = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True)
        return ((split - mean) / np.sqrt(std + 1e-5)).reshape(x.shape)

    step = 1e-6 * g
    along_g = np.sum(g * (naive(x + step) - naive(x - step))) / 2e-6
    ours, pullback = jax.vjp(lambda x: layers.normalise(x, groups), jnp.asarray(x, jnp.float32))
    (gradient,) = pullback(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(ours, naive(x), atol=1e-5)
    np.testing.assert_allclose(np.sum(gradient * g), along_g, rtol=1e-4)


def test_normalise_far_from_zero():
    """Squares of values around 1000 leave float32 no digits for a variance of 1."""
    x = np.random.default_rng(0).normal(1000.0, 1.0, size=(1, 16, 16, 16, 2)).astype(np.float32)
    exact = (x - x.astype(float).mean((1, 2, 3))) / np.sqrt(x.astype(float).var((1, 2, 3)) + 1e-5)
    np.testing.assert_allclose(layers.normalise(jnp.asarray(x), 2), exact, atol=1e-3)

"""The U-Net against MONAI's, and what it says to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import assert_equals_monai, make_unet, num_parameters

from train.errors import InputError
from train.monai.mapping import load_monai_weights

PAPER = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2}
SMALL = {"in_channels": 2, "out_channels": 3, "channels": (4, 8), "strides": (2,)}
CASES = {
    "paper, 3-D": (3, (16, 24, 16), {"in_channels": 1, "out_channels": 3, **PAPER}),
    "paper, 2-D": (2, (32, 24), {"in_channels": 4, "out_channels": 4, **PAPER}),
    "no residual units": (3, (8, 6, 4), {**SMALL, "num_res_units": 0}),
    "no residual units, 2-D": (2, (8, 6), {**SMALL, "num_res_units": 0}),
    "one subunit": (3, (8, 8, 12), {**SMALL, "num_res_units": 1}),
    "three levels of different strides": (
        2,
        (24, 18),
        {**SMALL, "channels": (4, 6, 8, 10), "strides": (3, 1, 2), "num_res_units": 1},
    ),
    "thick slices": (3, (8, 12, 4), {**PAPER, **SMALL, "channels": (4, 6, 8), "strides": (2, 2, 1, 2, 3, 2)}),
    "thick slices, no residual units": (3, (4, 6, 8), {**SMALL, "strides": (1, 3, 2), "num_res_units": 0}),
    # The reference's group norm wants its groups to divide the classes as well.
    "group norm": (
        2,
        (8, 12),
        {**SMALL, "channels": (8, 16), "out_channels": 8, "norm": "group", "num_res_units": 3},
    ),
    "affine instance norm": (2, (8, 12), {**SMALL, "norm": "affine-instance", "num_res_units": 2}),
}
NORMS = {
    "instance": "instance",
    "affine-instance": ("instance", {"affine": True}),
    "group": ("group", {"num_groups": 8}),
}  # as MONAI calls them


@pytest.mark.parametrize("name", CASES)
def test_equals_monai(name):
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    spatial_dims, sizes, options = CASES[name]
    torch.manual_seed(0)
    steps = len(options["channels"]) - 1
    # MONAI takes the strides of axes as a tuple for each level.
    strides = [tuple(level) for level in np.reshape(options["strides"], (steps, -1))]
    theirs = nets.UNet(
        spatial_dims,
        **options | {"strides": strides, "norm": NORMS[options.get("norm", "instance")]},
    )
    shape = (2, *sizes, options["in_channels"])
    assert_equals_monai(theirs, lambda: make_unet(spatial_dims=spatial_dims, **options), shape)


def test_number_of_parameters():
    """The paper's network for BraTS: 4 modalities, 4 classes."""
    model = make_unet(in_channels=4, out_channels=4)
    assert num_parameters(model) == 300_125


def test_initial_values_are_pytorchs():
    """Uniform within 1 / sqrt(fan-in), where a transposed kernel's fan-in counts its outputs."""
    model = make_unet(in_channels=4, out_channels=4, rngs=nnx.Rngs(1))
    for conv, fan_in in [
        (model.bottom.units[1].conv, 27 * 64),
        (model.down[1].units[0].conv, 27 * 8),
        (model.up[2].layers[0].conv, 27 * 16),
    ]:
        bound = fan_in**-0.5
        assert float(jnp.abs(conv.kernel[...]).max()) <= bound
        np.testing.assert_allclose(float(conv.kernel[...].std()), bound / 3**0.5, rtol=0.05)
        assert float(jnp.abs(conv.bias[...]).max()) <= bound
    assert float(model.bottom.units[0].act.slope[0]) == 0.25


def test_dropout_is_between_norm_and_activation():
    """Dropout halves the voxels and doubles the others, which PReLU keeps."""
    options = {**SMALL, "spatial_dims": 2, "num_res_units": 0}
    model = make_unet(**options, dropout=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 2))
    unit = model.down[0]
    dropped = unit(x)
    assert 0.45 < float((dropped == 0).mean()) < 0.55
    assert bool((model(x) != model(x)).any())
    model.eval()
    kept = unit(x)
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * kept), rtol=1e-5)
    np.testing.assert_array_equal(model(x), model(x))


def test_no_random_state_without_dropout():
    model = make_unet(**SMALL, spatial_dims=2)
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))


def test_compiles_once():
    traces = 0
    graphdef, params, rest = nnx.split(make_unet(**SMALL, spatial_dims=2), nnx.Param, ...)

    @jax.jit
    def forward(params, x):
        nonlocal traces
        traces += 1
        return nnx.merge(graphdef, params, rest)(x)

    for seed in range(3):
        forward(params, jax.random.normal(jax.random.key(seed), (1, 8, 8, 2)))
    assert traces == 1


@pytest.mark.parametrize(("norm", "matters"), [("instance", False), ("group", True)])
def test_bias_before_a_norm(norm, matters):
    """Instance norm takes it away again; a group of two channels does not."""
    model = make_unet(**SMALL | {"channels": (16, 16), "out_channels": 8}, spatial_dims=2, norm=norm)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 2))
    before = model(x)
    bias = model.down[0].units[0].conv.bias
    bias[...] = bias[...].at[0].add(3)
    assert bool(jnp.array_equal(model(x), before)) is not matters


def test_size_not_divided_by_strides():
    model = make_unet(**SMALL | {"channels": (4, 8, 8), "strides": (2, 2)}, spatial_dims=2)
    with pytest.raises(ValueError, match=r"Size 10 of axis 2 of the image \(1, 8, 10, 2\) .* by 4"):
        jax.eval_shape(model, jnp.zeros((1, 8, 10, 2)))


@pytest.mark.parametrize("shape", [(1, 8, 8, 8, 2), (1, 8, 8, 3), (8, 8, 2)])
def test_image_of_another_kind(shape):
    with pytest.raises(ValueError, match="expected \\[batch, 2 spatial axes, 2 channels\\]"):
        make_unet(**SMALL, spatial_dims=2)(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (2, 2, 2, 2)}, "one stride, 1 or more, between"),
        (
            {"strides": (2, 2, 1)},
            r"strides \(2, 2, 1\) are of 3 axes, the images have 2: give 1 or 2 strides",
        ),
        ({"channels": (4,), "strides": ()}, "two or more channels"),
        ({"norm": "spectral"}, "norm is 'spectral'"),
        ({"norm": "group"}, "divisor of 4"),
    ],
)
def test_options_that_make_no_network(options, message):
    with pytest.raises((InputError, ValueError), match=message):
        make_unet(**SMALL | {"spatial_dims": 2} | options)


def test_weights_of_another_network():
    model = make_unet(**SMALL, spatial_dims=2)
    with pytest.raises(
        ValueError, match=r"model\.0\.conv\.unit0\.conv\.weight \(and 20 more\) is missing and x is left over"
    ):
        load_monai_weights(model, {"x": np.zeros(1)})

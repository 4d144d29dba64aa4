"""What the tests of networks share: one way to compare them with MONAI's, live or by stored numbers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.models.configs import SegResNetConfig, UNetConfig, UNETRConfig
from train.models.segresnet import SegResNet
from train.models.unet import UNet
from train.models.unetr import UNETR
from train.monai.mapping import load_monai_weights, monai_names


def build(network, kind, options):
    """A network from the options of its config and its own in one."""
    own = {field.name for field in dataclasses.fields(kind)}
    config = kind(**{name: value for name, value in options.items() if name in own})
    return network(config, **{name: value for name, value in options.items() if name not in own})


def make_unet(**options):
    return build(UNet, UNetConfig, {"spatial_dims": 3, "rngs": nnx.Rngs(0)} | options)


def make_segresnet(**options):
    return build(SegResNet, SegResNetConfig, {"spatial_dims": 3, "rngs": nnx.Rngs(0)} | options)


def make_unetr(**options):
    return build(UNETR, UNETRConfig, {"rngs": nnx.Rngs(0)} | options)


GOLDEN = Path(__file__).parent / "golden" / "networks.npz"
TINY_UNETR = {"feature_size": 2, "hidden_size": 8, "mlp_dim": 12, "num_heads": 2}
# Name -> (MONAI's class, its options, ours, the image's size); 2-D throughout, 1 channel, 3 classes.
STORED = {
    "segresnet": (
        "SegResNet",
        {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 2), "blocks_up": (1,)},
        lambda: make_segresnet(in_channels=1, out_channels=3, spatial_dims=2, blocks_down=(1, 2)),
        (8, 6),
    ),
    "segresnet_ds": (
        "SegResNetDS",
        {"spatial_dims": 2, "init_filters": 4, "blocks_down": (1, 1, 1), "norm": "instance", "dsdepth": 2},
        lambda: make_segresnet(
            in_channels=1,
            out_channels=3,
            spatial_dims=2,
            init_filters=4,
            blocks_down=(1, 1, 1),
            norm="affine-instance",
            deep_supervision=2,
        ),
        (12, 8),
    ),
    "unetr": (
        "UNETR",
        {"spatial_dims": 2, "img_size": (32, 16), **TINY_UNETR},
        lambda: make_unetr(in_channels=1, out_channels=3, image_size=(32, 16), **TINY_UNETR),
        (32, 16),
    ),
}


def pattern(shape, phase, scale=0.3):
    """Numbers without a pattern to speak of, the same everywhere."""
    return (scale * np.sin(1.7 * np.arange(np.prod(shape)) ** 1.1 + phase)).astype(np.float32).reshape(shape)


def patterned_state(model):
    """Weights for `model` under MONAI's names, in PyTorch's order of axes."""
    state = {}
    for i, (name, (parameter, axes)) in enumerate(monai_names(model)):
        shape = tuple(parameter.shape[axes.index(i)] for i in range(len(axes))) or parameter.shape
        state[name] = pattern(shape, i) + np.float32(name.endswith(("norm1.weight", "norm2.weight")))
    return state


def empty(make):
    """The network with zeros for weights, which is quicker than drawing them."""
    graphdef, state = nnx.split(jax.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))


def outputs_and_gradients(model, x, gs):
    """Logits (a tuple of them), and gradients of the sum of <logits, g> by parameter and for x."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, x):
        y = nnx.merge(graphdef, params, rest)(x)
        return y if isinstance(y, tuple) else (y,)

    @jax.jit
    def run(params, x, gs):
        y, pullback = jax.vjp(forward, params, x)
        return y, *pullback(gs)

    return run(params, x, gs)


def assert_equals_monai(theirs, make, shape):
    """Logits within 1e-4 and gradients within 1e-3 of MONAI's, given its weights.

    MONAI computes in float64: kinks of activations near zero make its own float32 gradients differ from
    these by more than ours do.
    """
    import torch

    ours, expected = empty(make), empty(make)
    load_monai_weights(ours, {k: v.numpy() for k, v in theirs.state_dict().items()})
    if not theirs.training:
        ours.eval()
    theirs = theirs.double()
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    x_torch = torch.tensor(np.moveaxis(x, -1, 1).copy(), dtype=torch.float64, requires_grad=True)
    logits = theirs(x_torch)
    logits = logits if isinstance(logits, list) else [logits]
    gs = tuple(rng.normal(size=channel_last(level).shape).astype(np.float32) for level in logits)
    sum(
        (y * torch.tensor(np.moveaxis(g, -1, 1).copy())).sum() for y, g in zip(logits, gs, strict=True)
    ).backward()
    buffers = {k: v.numpy() for k, v in theirs.named_buffers()}
    grads = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    load_monai_weights(expected, buffers | grads)

    levels, params_grad, x_grad = outputs_and_gradients(ours, jnp.asarray(x), gs)
    for level, level_torch in zip(levels, logits, strict=True):
        np.testing.assert_allclose(level, channel_last(level_torch), atol=1e-4)
    assert_relatively_close(x_grad, channel_last(x_torch.grad))
    params_grad, expected_grad = (jax.tree.leaves(t) for t in (params_grad, nnx.state(expected, nnx.Param)))
    # A gradient that a norm takes away is rounding noise, judged by the network's scale.
    noise = 1e-6 * max(float(jnp.abs(e).max()) for e in expected_grad)
    for ours_grad, theirs_grad in zip(params_grad, expected_grad, strict=True):
        assert_relatively_close(ours_grad, theirs_grad, noise)


def assert_equals_stored(name):
    """Logits and the gradient for the image that MONAI gave for `patterned_state`."""
    _, _, make, sizes = STORED[name]
    model = empty(make)
    load_monai_weights(model, patterned_state(model))
    golden = np.load(GOLDEN)
    count = sum(key.startswith(f"{name}/logits") for key in golden)
    expected = [golden[f"{name}/logits{i}"] for i in range(count)]
    gs = tuple(pattern(level.shape, 3.0, 1.0) for level in expected)
    levels, _, x_grad = outputs_and_gradients(model, pattern((2, *sizes, 1), 5.0, 1.0), gs)
    for level, stored in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, stored, atol=1e-4)
    assert_relatively_close(x_grad, golden[f"{name}/gradient"])


def assert_relatively_close(ours, expected, noise=0.0):
    """Within a thousandth of the largest entry."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * scale + noise)


def channel_last(tensor):
    """A PyTorch tensor as a NumPy array, channels last."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def num_parameters(model):
    """How many numbers are trained."""
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))

"""UNETR against MONAI's, and what it says to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    TINY_UNETR,
    assert_equals_monai,
    assert_equals_stored,
    channel_last,
    make_unetr,
    num_parameters,
)

from train.errors import InputError
from train.models.configs import UNETRConfig
from train.models.unetr import TransformerBlock
from train.monai.mapping import load_monai_weights


def test_equals_monai():
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")  # which MONAI's attention is written in
    size = (16, 32, 16)
    torch.manual_seed(0)
    theirs = nets.UNETR(2, 3, size, **TINY_UNETR)
    assert_equals_monai(
        theirs,
        lambda: make_unetr(in_channels=2, out_channels=3, image_size=size, **TINY_UNETR),
        (2, *size, 2),
    )


def test_equals_monai_with_a_linear_patch_embedding():
    """As old versions of MONAI had it: a linear layer over a patch's voxels."""
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")
    size = (32, 16)
    torch.manual_seed(0)
    theirs = nets.UNETR(
        2, 3, size, spatial_dims=2, proj_type="perceptron", norm_name="instance", **TINY_UNETR
    )
    ours = make_unetr(in_channels=2, out_channels=3, image_size=size, **TINY_UNETR)
    load_monai_weights(ours, {name: array.numpy() for name, array in theirs.state_dict().items()})
    x = np.random.default_rng(0).normal(size=(2, *size, 2)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(np.moveaxis(x, -1, 1).copy()))
    np.testing.assert_allclose(ours(x), channel_last(expected), atol=1e-4)


def test_equals_what_monai_gave():
    assert_equals_stored("unetr")


def test_number_of_parameters():
    """The paper's network for BTCV; MONAI's counts 18,432 more, of norms that it does not use."""
    model = jax.eval_shape(lambda: make_unetr(in_channels=1, out_channels=14, image_size=(96, 96, 96)))
    assert num_parameters(model) == 92_784_046


def test_takes_no_image_of_another_size():
    model = jax.eval_shape(
        lambda: make_unetr(in_channels=1, out_channels=2, image_size=(16, 32), **TINY_UNETR)
    )
    with pytest.raises(ValueError, match=r"was made for \(16, 32\) voxels"):
        jax.eval_shape(model, jnp.zeros((1, 32, 32, 1)))


def test_dropout_in_every_transformer_block():
    block = TransformerBlock(UNETRConfig(**TINY_UNETR), 0.3, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    assert bool((block(x) != block(x)).any())
    block.eval()
    np.testing.assert_array_equal(block(x), block(x))


def test_options_that_make_no_network():
    with pytest.raises(InputError, match="hidden_size is 8: give a multiple of num_heads, 3"):
        UNETRConfig(hidden_size=8, num_heads=3)

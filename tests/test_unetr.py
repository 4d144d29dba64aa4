"""UNETR against MONAI's, and what it says to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import TINY_UNETR, assert_equals_monai, assert_equals_stored, num_parameters

from train.models import UNETR


@pytest.mark.parametrize("size", [(32, 16), (16, 32, 16)])
def test_equals_monai(size):
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")  # which MONAI's attention is written in
    torch.manual_seed(0)
    theirs = nets.UNETR(2, 3, size, spatial_dims=len(size), **TINY_UNETR)
    assert_equals_monai(
        theirs, lambda: UNETR(in_channels=2, out_channels=3, image_size=size, **TINY_UNETR), (2, *size, 2)
    )


def test_equals_what_monai_gave():
    assert_equals_stored("unetr")


def test_number_of_parameters():
    """The paper's network for BTCV; MONAI's counts 18,432 more, of norms that it does not use."""
    model = jax.eval_shape(lambda: UNETR(in_channels=1, out_channels=14, image_size=(96, 96, 96)))
    assert num_parameters(model) == 92_784_046


def test_takes_no_image_of_another_size():
    model = UNETR(in_channels=1, out_channels=2, image_size=(16, 32), **TINY_UNETR)
    with pytest.raises(ValueError, match=r"was made for \(16, 32\) voxels"):
        jax.eval_shape(model, jnp.zeros((1, 32, 32, 1)))


def test_dropout():
    model = UNETR(in_channels=1, out_channels=2, image_size=(16, 16), dropout=0.3, **TINY_UNETR)
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    assert bool((model(x) != model(x)).any())
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (16, 20)}, r"image_size is \(16, 20\)"),
        ({"image_size": (16,)}, "2 or 3 multiples of 16"),
        ({"num_heads": 3}, "hidden_size is 8; expected a multiple of num_heads, 3"),
    ],
)
def test_options_that_make_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        UNETR(**{"in_channels": 1, "out_channels": 2, "image_size": (16, 16), **TINY_UNETR, **options})

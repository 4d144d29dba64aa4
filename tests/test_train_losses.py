"""The trainer's losses by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calib_jax import mL1_ace
from train.errors import InputError
from train.losses import parse_loss


@pytest.mark.parametrize(("term", "binning"), [("ace", "hard"), ("softace", "soft")])
def test_calibration_terms_set_in_gradually(term: str, binning: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(1, 40, 3)), jnp.float32), rng.integers(0, 3, (1, 40))
    loss = parse_loss(f"dice+2*{term}")
    parts = loss.parts(logits, labels)
    ace = mL1_ace(jax.nn.softmax(logits), labels, binning=binning)
    np.testing.assert_allclose(parts[term], ace, rtol=1e-6)
    np.testing.assert_allclose(loss.total(parts, 0.25), parts["dice"] + 0.5 * ace, rtol=1e-6)


@pytest.mark.parametrize("name", ["dice+dice", "ace+softace"])
def test_a_term_stands_once(name: str) -> None:
    with pytest.raises(InputError, match="twice"):
        parse_loss(name)

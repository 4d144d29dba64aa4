"""The trainer's losses by name."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calib_jax import mL1_ace
from train.errors import InputError
from train.losses import parse_loss
from train.terms import TERMS


@pytest.mark.parametrize(("term", "binning"), [("ace", "hard"), ("softace", "soft")])
def test_calibration_terms_set_in_gradually(term: str, binning: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(1, 40, 3)), jnp.float32), rng.integers(0, 3, (1, 40))
    loss = parse_loss(f"dice+2*{term}")
    parts = loss.parts(logits, labels)
    ace = mL1_ace(jax.nn.softmax(logits), labels, binning=binning)
    np.testing.assert_allclose(parts[term], ace, rtol=1e-6)
    np.testing.assert_allclose(loss.total(parts, 0.25), parts["dice"] + 0.5 * ace, rtol=1e-6)


REGIONS = ((1, 2, 3), (2,))  # overlapping


def sigmoids(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two regions, class ids, and the memberships by hand."""
    rng = np.random.default_rng(seed)
    logits, ids = rng.normal(size=(2, 8, 6, 2)).astype(np.float32), rng.integers(0, 4, (2, 8, 6))
    return logits, ids, np.stack([np.isin(ids, region) for region in REGIONS], -1).astype(np.float32)


def test_regions_are_trained_by_sigmoids() -> None:
    """Dice, binary cross-entropy and mL1-ACE of each region, averaged over images and regions."""
    logits, ids, members = sigmoids()
    loss = dataclasses.replace(parse_loss("dice+ce+ace"), regions=REGIONS)
    parts = loss.parts(jnp.asarray(logits), jnp.asarray(ids))
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    overlap, total = (probs * members).sum((1, 2)), (probs + members).sum((1, 2))
    np.testing.assert_allclose(parts["dice"], (1 - 2 * overlap / total).mean(), rtol=1e-5)
    entropy = -np.log(np.where(members, probs, 1 - probs)).mean()
    np.testing.assert_allclose(parts["ce"], entropy, rtol=1e-5)
    np.testing.assert_allclose(parts["ace"], mL1_ace(jax.nn.sigmoid(logits), members), rtol=1e-5)
    half = loss.parts(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(ids))
    chex.assert_trees_all_close(half, parts, rtol=0.05)


def test_shares_of_classes_are_shares_of_regions() -> None:
    logits, ids, _ = sigmoids()
    loss = dataclasses.replace(parse_loss("dice+ce+ace+focal+ls"), regions=REGIONS)
    parts = loss.parts(jnp.asarray(logits), jnp.asarray(ids))
    chex.assert_trees_all_close(
        loss.parts(jnp.asarray(logits), jax.nn.one_hot(ids, 4)), parts, rtol=1e-5, atol=1e-6
    )
    half = jnp.full((2, 8, 6, 4), 0.25)  # the first region has 3/4 of every voxel, the second 1/4
    share = np.broadcast_to([0.75, 0.25], logits.shape)
    expected = optax.sigmoid_binary_cross_entropy(jnp.asarray(logits), jnp.asarray(share)).mean()
    np.testing.assert_allclose(loss.parts(jnp.asarray(logits), half)["ce"], expected, rtol=1e-5)


def test_every_level_of_sigmoids_counts() -> None:
    logits, ids, _ = sigmoids()
    loss = dataclasses.replace(parse_loss("dice+ace"), regions=REGIONS)
    levels = (jnp.asarray(logits), jnp.asarray(logits[:, ::2, ::2]))
    both = loss.parts(levels, jnp.asarray(ids))
    fine, coarse = (
        loss.parts(levels[0], jnp.asarray(ids)),
        loss.parts(levels[1], jnp.asarray(ids[:, 1::2, 1::2])),
    )
    for name in both:
        np.testing.assert_allclose(both[name], 2 / 3 * fine[name] + 1 / 3 * coarse[name], rtol=1e-5)


def test_a_sigmoid_is_half_a_softmax() -> None:
    """Every term of one region is that of a softmax over (0, x)."""
    logits, ids, _ = sigmoids()
    one = dataclasses.replace(
        parse_loss("+".join(set(TERMS) - {"ace", "dice", "dampeddice", "dscpp"})), regions=((2,),)
    )
    pair = jnp.stack([jnp.zeros((2, 8, 6)), jnp.asarray(logits[..., 1])], -1)
    expected = dataclasses.replace(one, regions=()).parts(pair, jnp.asarray(ids == 2, jnp.int32))
    expected.pop("softace")
    parts = one.parts(jnp.asarray(logits[..., 1:]), jnp.asarray(ids))
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["dice+dice", "ace+softace"])
def test_a_term_stands_once(name: str) -> None:
    with pytest.raises(InputError, match="twice"):
        parse_loss(name)

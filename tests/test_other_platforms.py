"""What GPUs and TPUs would compute, on this CPU: losses and metrics with the other platforms' forms give the same.

`test_sums.py` compares the sums in bins with float64, the kernel for GPUs among them. Here the public functions run
with every form that is plain XLA.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calib_jax
from train.evaluate import CaseStatistics, SumsOfClasses

SHAPE = (2, 5, 9, 7, 4)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=SHAPE).astype(np.float32)
PROBS = np.asarray(jax.nn.softmax(3 * LOGITS))
IDS = RNG.integers(-1, 4, SHAPE[:-1]).astype(np.int32)
OTHERS = RNG.integers(0, 4, SHAPE[:-1]).astype(np.int32)
SHARES = RNG.dirichlet(np.ones(4), SHAPE[:-1]).astype(np.float32)
WHERE = RNG.random(SHAPE[:-1]) < 0.7
OF_CLASSES = RNG.random(SHAPE) < 0.7

Figures = dict[str, Any]


def losses() -> Figures:
    def with_gradient(function: Any, *arguments: Any, **options: Any) -> Any:
        return jax.value_and_grad(function)(*arguments, **options)

    ace, loss = calib_jax.mL1_ace, calib_jax.segmentation_loss
    found = {}
    options: Any
    for binning in ("hard", "soft", "adaptive"):
        options = {"binning": binning, "include_background": False}
        found[f"ace {binning}"] = with_gradient(ace, PROBS, IDS, where=OF_CLASSES, **options)
        found[f"ace {binning} shares"] = with_gradient(ace, PROBS, SHARES, where=WHERE, **options)
    for part in ("dice", "cross_entropy", "focal", "mbls", "nacl"):
        options = dict.fromkeys(("dice", "cross_entropy", "ace"), 0.0) | {part: 1.0}
        found[part] = with_gradient(loss, LOGITS, IDS, where=WHERE, **options)
    found["together"] = with_gradient(loss, LOGITS, IDS)
    found["together, shares"] = with_gradient(loss, LOGITS, SHARES)
    return found


def metrics() -> Figures:
    found: Figures = {}
    for name, where in (("", None), (" where", WHERE)):
        found[f"brier{name}"] = calib_jax.brier_score(PROBS, IDS, where=where)
        found[f"nll{name}"] = calib_jax.negative_log_likelihood(LOGITS, IDS, where=where)
        found[f"nll shares{name}"] = calib_jax.negative_log_likelihood(LOGITS, SHARES, where=where)
        found[f"dice{name}"] = calib_jax.dice_score(IDS, OTHERS, num_classes=4, where=where)
        found[f"dice shares{name}"] = calib_jax.dice_score(PROBS, SHARES, where=where)
        found[f"expected dice{name}"] = calib_jax.expected_dice(PROBS, OTHERS, where=where)
        totals = calib_jax.dataset_totals(4, include_background=False)
        found[f"totals{name}"] = totals.compute(totals.update(totals.init(), PROBS, IDS, where))
    found["brier of classes"] = calib_jax.brier_score(PROBS, IDS, where=OF_CLASSES)
    for metric in (calib_jax.brier_score, calib_jax.negative_log_likelihood):
        found[f"gradient of {metric.__name__}"] = jax.grad(lambda x, m=metric: m(x, IDS).sum())(PROBS)
    return found


def evaluation() -> Figures:
    voxels = PROBS[0], OTHERS[0], WHERE[0]
    kinds = {
        "classes": CaseStatistics(),
        "regions": CaseStatistics(SumsOfClasses(((1, 2), (3,)))),
        "own regions": CaseStatistics(SumsOfClasses(((1, 2), (3,), (1,), (2,)), predicted=True)),
    }
    found: Figures = {name: jax.jit(kind)(*voxels) for name, kind in kinds.items()}
    return found | {"soft": jax.jit(CaseStatistics())(PROBS[0], SHARES[0], WHERE[0])}


@pytest.fixture(params=["tpu", "cuda"])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, programs take the form of that platform."""

    def chosen(*arguments: Any, default: Any = None, **forms: Any) -> Any:
        return forms.get(request.param, default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


EXPECTED = {figures: figures() for figures in (losses, metrics, evaluation)}


@pytest.mark.parametrize("figures", EXPECTED)
@pytest.mark.usefixtures("elsewhere")
def test_every_platform_gives_the_same(figures: Any) -> None:
    found, expected = figures(), EXPECTED[figures]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        for leaf, wanted in zip(jax.tree.leaves(value), jax.tree.leaves(expected[name]), strict=True):
            leaf, wanted = jnp.asarray(leaf), jnp.asarray(wanted)
            if jnp.issubdtype(wanted.dtype, jnp.integer):
                np.testing.assert_array_equal(leaf, wanted, err_msg=name)
            else:
                np.testing.assert_allclose(leaf, wanted, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_loss_scatters(platform: str) -> None:
    """A scatter is serial on a TPU, and the gradient of a look-up along the classes is one."""
    parts = tuple(inspect.signature(calib_jax.segmentation_loss).parameters)
    weights = [name for name in parts[2 : parts.index("where")] if name != "ace"]

    @jax.jit
    def gradient(logits: Any, ids: Any) -> Any:
        return jax.grad(calib_jax.segmentation_loss)(logits, ids, **dict.fromkeys(weights, 1.0))

    text = gradient.trace(LOGITS, IDS).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.exponential" in text
    assert "scatter" not in text

"""Temperature and vector scaling: known truths, other optimisers, streams, errors."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from calib_jax.metrics import negative_log_likelihood
from calib_jax.scaling import (
    VectorScaling,
    apply_temperature,
    apply_vector_scaling,
    fit_temperature,
    fit_vector_scaling,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

SCALE, BIAS = np.array([0.5, 1.25, 0.8]), np.array([0.7, -0.2, -0.5])
FITS = {"temperature": fit_temperature, "vector": fit_vector_scaling}


def drawn(seed, voxels=20_000, scaled=lambda x: x, spread=3.0, batch=2, classes=3):
    """Logits, and class ids drawn from the softmax of what `scaled` makes of them."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((batch, voxels, classes))).astype(np.float32)
    gumbel = rng.gumbel(size=logits.shape)
    return logits, (scaled(logits.astype(np.float64)) + gumbel).argmax(-1).astype(np.int32)


def by_class(logits, scale=SCALE, bias=BIAS):
    """Vector scaling of the log-probabilities, in float64."""
    logits = logits.astype(np.float64)
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)) * scale + bias


def mean_nll(logits, labels, scale=1.0, bias=0.0):
    """In float64, by NumPy."""
    z = by_class(logits, scale, bias)
    normaliser = np.logaddexp.reduce(z, axis=-1)
    return (normaliser - np.take_along_axis(z, labels[..., None], -1)[..., 0]).mean()


def volumes(seed=3, sizes=((5, 6, 7), (4, 4, 4), (9, 3, 2), (5, 6, 7))):
    """Batches of several shapes, with masks, and the same as arrays of voxels."""
    rng = np.random.default_rng(seed)
    batches = []
    for size in sizes:
        logits, labels = drawn(rng, np.prod(size), lambda x: x / 2, batch=1)
        where = rng.random(size)[None] < 0.8
        batches.append((logits.reshape(1, *size, 3), labels.reshape(1, *size), where))
    whole = [np.concatenate([b[i].reshape(1, -1, *b[i].shape[4:]) for b in batches], 1) for i in range(3)]
    return batches, whole


# Truths


@pytest.mark.parametrize("truth", [0.05, 0.4, 1.0, 3.0, 40.0])
def test_recovers_a_temperature(truth):
    logits, labels = drawn(1, scaled=lambda x: x / truth, spread=3 * truth)
    temperature = fit_temperature(logits, labels)
    assert (temperature.shape, temperature.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(temperature, truth, rtol=0.03)


def test_recovers_scale_and_bias_up_to_a_shift():
    logits, labels = drawn(2, 100_000, by_class)
    params = fit_vector_scaling(logits, labels)
    np.testing.assert_allclose(params.scale, SCALE, rtol=0.03)
    np.testing.assert_allclose(params.bias, BIAS - BIAS.mean(), atol=0.03)
    np.testing.assert_allclose(params.bias.sum(), 0, atol=1e-6)


def test_equals_scipy_in_float64():
    optimize = pytest.importorskip("scipy.optimize")
    logits, labels = drawn(3, 4_000, by_class)
    bounded = optimize.minimize_scalar(
        lambda t: mean_nll(logits, labels, np.exp(-t)), bounds=(-3, 3), options={"xatol": 1e-10}
    )
    np.testing.assert_allclose(fit_temperature(logits, labels), np.exp(bounded.x), rtol=2e-5)
    vector = optimize.minimize(
        lambda x: mean_nll(logits, labels, x[:3], x[3:]), np.array([1.0] * 3 + [0.0] * 3), tol=1e-10
    )
    params = fit_vector_scaling(logits, labels)
    np.testing.assert_allclose(params.scale, vector.x[:3], rtol=1e-4)
    np.testing.assert_allclose(params.bias, vector.x[3:] - vector.x[3:].mean(), atol=1e-4)


def test_equals_torch():
    torch = pytest.importorskip("torch")
    logits, labels = drawn(4, 3_000, by_class)
    x, y = torch.from_numpy(logits.reshape(-1, 3)), torch.from_numpy(labels.reshape(-1)).long()

    def fitted(scaled, *params):
        optimizer = torch.optim.LBFGS(
            params, max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(scaled(), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        return [p.detach().numpy() for p in params]

    t = torch.ones(1, requires_grad=True)
    np.testing.assert_allclose(fit_temperature(logits, labels), fitted(lambda: x / t, t)[0][0], rtol=1e-3)
    scale, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    fitted(lambda: x.log_softmax(-1) * scale + bias, scale, bias)
    params = fit_vector_scaling(logits, labels)
    np.testing.assert_allclose(params.scale, scale.detach().numpy(), rtol=1e-3)
    np.testing.assert_allclose(params.bias, bias.detach().numpy() - bias.detach().numpy().mean(), atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_the_likelihood_never_falls(seed):
    truth = 10 ** np.random.default_rng(seed).uniform(-1, 2)
    logits, labels = drawn(seed, 500, lambda x: by_class(x, SCALE / truth, 0), spread=5)
    before = mean_nll(logits, labels)
    by_temperature = mean_nll(logits, labels, 1 / float(fit_temperature(logits, labels)))
    by_vector = mean_nll(logits, labels, *map(np.asarray, fit_vector_scaling(logits, labels)))
    assert by_temperature <= before * (1 + 1e-6)
    assert by_vector <= by_temperature * (1 + 1e-6)


def test_a_segmentation_of_mostly_certain_voxels():
    """One voxel in a hundred is near a boundary: the mean is small and nearly flat."""
    logits, labels = drawn(5, 200_000, lambda x: x / 2)
    easy = np.arange(200_000) % 100 > 0
    logits[:, easy] = np.array([30, -10, -15], np.float32)
    labels[:, easy] = 0
    expected = fit_temperature(logits[:, ~easy], labels[:, ~easy])
    np.testing.assert_allclose(fit_temperature(logits, labels), expected, rtol=1e-2)


def test_soft_labels_of_a_known_distribution():
    logits, _ = drawn(6, 500)
    np.testing.assert_allclose(
        fit_temperature(logits, np.asarray(jax.nn.softmax(jnp.asarray(logits) / 1.7))), 1.7, rtol=1e-4
    )


def test_separable_logits_end_in_a_low_temperature():
    logits, _ = drawn(7, 500)
    with pytest.warns(RuntimeWarning, match="falls to 0"):
        temperature = fit_temperature(logits, logits.argmax(-1).astype(np.int32))
    assert 0 < temperature < 0.1


# Without an optimum


def wrong_everywhere():
    logits, _ = drawn(14, 300)
    return logits, logits.argmin(-1).astype(np.int32)


def separated():
    logits, _ = drawn(15, 300)
    return logits, logits.argmax(-1).astype(np.int32)


def equal_logits():
    return np.full((2, 50, 3), 0.1, np.float32), drawn(16, 50)[1]


def nearly_equal_logits():
    logits, labels = drawn(17, 300)
    return logits * np.float32(1e-7), labels


def without_last_class():
    logits, labels = drawn(18, 500)
    return logits, labels % 2


def one_class_apart():
    logits, labels = drawn(19, 500, lambda x: x / 4)
    logits[..., :2] -= np.logaddexp.reduce(logits[..., :2], axis=-1, keepdims=True)
    logits[..., 2] = np.where(labels == 2, 4, -4) + 0.1 * logits[..., 2]
    return logits, labels


NO_OPTIMUM = {
    "wrong": (fit_temperature, wrong_everywhere, "no larger than those of other classes"),
    "right": (fit_temperature, separated, "falls to 0"),
    "right_and_huge": (fit_temperature, lambda: (separated()[0] * 1e6, separated()[1]), "falls to 0"),
    "equal": (fit_temperature, equal_logits, "all equal"),
    "small": (fit_temperature, nearly_equal_logits, "too little.*multiply"),
    "one_label_for_other_logits": (
        fit_temperature,
        lambda: (np.tile(np.float32([5, 0, 0]), (1, 50, 1)), np.ones((1, 50), np.int32)),
        "no larger than",
    ),
    "vector_right": (fit_vector_scaling, separated, "every label right"),
    "vector_wrong": (fit_vector_scaling, lambda: (-separated()[0], separated()[1]), "every label right"),
    "vector_absent": (fit_vector_scaling, without_last_class, "no counted label is of class 2"),
    "vector_one_apart": (fit_vector_scaling, one_class_apart, "class 2 is larger"),
    "vector_small": (fit_vector_scaling, nearly_equal_logits, "too little"),
}


@pytest.mark.parametrize("name", NO_OPTIMUM)
@pytest.mark.parametrize("masked", [False, True])
def test_without_an_optimum_it_warns_once_and_stays_in_bounds(name, masked):
    fit, data, message = NO_OPTIMUM[name]
    (logits, labels), where = data(), None
    if masked:  # ordinary voxels that do not count
        others, other_labels = drawn(20, 50, batch=len(logits))
        where = np.arange(logits.shape[1] + 50)[None].repeat(len(logits), 0) < logits.shape[1]
        logits = np.concatenate([logits, others], 1)
        labels = np.concatenate([labels, other_labels], 1)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        params = fit(logits, labels, where=where)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    found = np.abs(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    assert (found <= 1e3).all()
    if fit is fit_temperature:
        assert 1e-3 <= params <= 1e3


@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_a_best_temperature_of_any_size_is_found_without_a_warning(scale):
    logits, labels = drawn(21, 2_000, lambda x: x / 3)
    found = fit_temperature(logits * np.float32(scale), labels)
    np.testing.assert_allclose(found, scale * fit_temperature(logits, labels), rtol=1e-2)


# Streams


@pytest.mark.parametrize("name", FITS)
def test_a_stream_equals_arrays(name):
    batches, (logits, labels, where) = volumes()
    whole = FITS[name](logits, labels, where=where)
    for stream in (batches, tuple(batches), lambda: iter(batches), lambda: (b for b in batches)):
        chex.assert_trees_all_close(FITS[name](stream), whole, rtol=1e-4, atol=1e-5)


def test_batches_without_masks():
    batches, _ = volumes()
    bare = [batch[:2] for batch in batches]
    everywhere = [(x, y, np.ones(y.shape, bool)) for x, y in bare]
    np.testing.assert_allclose(fit_temperature(bare), fit_temperature(everywhere), rtol=1e-5)
    np.testing.assert_allclose(fit_temperature([(x, y, None) for x, y in bare]), fit_temperature(bare))


def test_no_batch_is_kept():
    """At most one batch is alive at a time, beside the one being made."""
    batches, _ = volumes()
    alive = []

    class Logits(np.ndarray):
        pass

    def stream():
        import weakref

        for x, y, where in batches:
            tracked = x.copy().view(Logits)
            alive.append(weakref.ref(tracked))
            assert sum(ref() is not None for ref in alive) <= 2
            yield tracked, y, where
            del tracked

    fit_temperature(stream)
    assert len(alive) > 3 * len(batches)


@pytest.mark.parametrize("fit", [fit_temperature, fit_vector_scaling])
def test_batches_of_new_sizes_compile_nothing(fit):
    first, _ = volumes(sizes=((3, 5, 2), (2, 2, 7)))
    second, _ = volumes(sizes=((4, 5, 2), (3, 3, 7), (6, 5, 2)))
    fit(first)
    with compilations() as found:
        fit(second)
    assert not found


# What is not counted


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("form", ["ids", "one_hot"])
def test_masked_voxels_and_ids_outside_the_classes_do_not_count(name, form):
    logits, labels = drawn(8, 600, lambda x: x / 2)
    rng = np.random.default_rng(8)
    where, outside = rng.random((2, 2, 600)) < 0.5
    kept = [
        (x[keep][None], y[keep][None]) for x, y, keep in zip(logits, labels, where & ~outside, strict=True)
    ]
    expected = FITS[name](kept)
    logits = np.where(where[..., None], logits, np.nan)
    labels = np.where(outside, np.where(rng.random(labels.shape) < 0.5, -1, 3), labels).astype(np.int32)
    if form == "one_hot":
        labels = (labels[..., None] == np.arange(3)).astype(np.float32)
    chex.assert_trees_all_close(FITS[name](logits, labels, where=where), expected, rtol=1e-4, atol=1e-5)


def test_logits_of_half_precision():
    logits, labels = drawn(9, 2_000, lambda x: x / 2)
    half = jnp.asarray(logits, jnp.bfloat16)
    expected = fit_temperature(np.asarray(half.astype(jnp.float32)), labels)
    np.testing.assert_allclose(fit_temperature(half, labels), expected, rtol=1e-6)


# Application


def test_applied_in_jit_the_likelihood_is_the_fitted_one():
    logits, labels = drawn(10, 1_000, by_class)
    temperature, params = fit_temperature(logits, labels), fit_vector_scaling(logits, labels)

    @jax.jit
    def losses(logits, temperature, params):
        scaled = apply_temperature(logits, temperature), apply_vector_scaling(logits, params)
        return [negative_log_likelihood(x, labels).mean() for x in scaled]

    expected = (
        mean_nll(logits, labels, 1 / float(temperature)),
        mean_nll(logits, labels, *map(np.asarray, params)),
    )
    np.testing.assert_allclose(losses(logits, temperature, params), expected, rtol=1e-6)


def test_application_keeps_shape_and_dtype():
    logits = jnp.ones((2, 3, 4), jnp.bfloat16)
    params = VectorScaling(np.ones(4, np.float32), np.zeros(4, np.float32))
    for scaled in (apply_temperature(logits, 2.0), apply_vector_scaling(logits, params)):
        assert (scaled.shape, scaled.dtype) == (logits.shape, logits.dtype)
    np.testing.assert_array_equal(apply_temperature(np.float32([3.0]), jnp.float32(2)), [1.5])


def test_parameters_have_gradients():
    logits, labels = drawn(11, 200)
    gradient = jax.grad(lambda t: negative_log_likelihood(apply_temperature(logits, t), labels).mean())(1.5)
    steps = [mean_nll(logits, labels, 1 / t) for t in (1.5 + 1e-4, 1.5 - 1e-4)]
    np.testing.assert_allclose(gradient, (steps[0] - steps[1]) / 2e-4, rtol=1e-4)


# Errors

X, Y = drawn(12, 10)
NAN = np.where(np.arange(10)[:, None] == 4, np.float32(np.nan), X)


def endless_same_iterator():
    batches = iter([(X, Y)] * 3)
    return lambda: batches


WRONG_CALLS = {
    "no_batches": (lambda: fit_temperature([]), ValueError, "no batches"),
    "an_iterator": (lambda: fit_temperature(b for b in [(X, Y)]), TypeError, "only once.*list.*function"),
    "an_iterator_of_arrays": (lambda: fit_temperature(iter([(X, Y)])), TypeError, "only once"),
    "the_same_iterator_again": (
        lambda: fit_temperature(endless_same_iterator()),
        ValueError,
        "every pass.*list.*function",
    ),
    "fewer_and_fewer": (lambda: fit_temperature(shrinking()), ValueError, "first pass.*later"),
    "labels_missing": (lambda: fit_temperature(X), TypeError, "labels"),
    "where_of_batches": (lambda: fit_temperature([(X, Y)], where=Y >= 0), TypeError, "where of batches"),
    "not_a_tuple": (lambda: fit_temperature([X]), TypeError, r"\(logits, labels\)"),
    "nan": (lambda: fit_vector_scaling(NAN, Y), ValueError, "batch 0 are not finite.*where"),
    "infinite": (lambda: fit_temperature([(X, Y), (NAN * np.inf, Y)]), ValueError, "batch 1"),
    "nothing_counted": (lambda: fit_temperature(X, Y, where=Y > 5), ValueError, "no voxel"),
    "labels_of_no_class": (lambda: fit_temperature(X, Y - 9), ValueError, "no voxel"),
    "other_classes": (lambda: fit_temperature([(X, Y), (X[..., :2], Y)]), ValueError, "2 classes.*3"),
    "class_masks": (lambda: fit_temperature(X, Y, where=X > 0), ValueError, "one entry per voxel"),
    "shapes": (lambda: fit_temperature(X, Y[:1]), ValueError, "labels"),
    "one_class": (lambda: fit_temperature(X[..., :1], 0 * Y), ValueError, "two classes"),
    "tolerance_nan": (lambda: fit_temperature(X, Y, tolerance=np.nan), ValueError, "tolerance"),
    "tolerance_negative": (lambda: fit_vector_scaling(X, Y, tolerance=-1.0), ValueError, "tolerance"),
    "no_steps": (lambda: fit_temperature(X, Y, max_steps=0), ValueError, "max_steps"),
    "steps_in_a_boolean": (lambda: fit_temperature(X, Y, max_steps=True), TypeError, "max_steps"),
    "temperature_zero": (lambda: apply_temperature(X, 0.0), ValueError, "positive"),
    "temperature_nan": (lambda: apply_temperature(X, np.float32("nan")), ValueError, "positive"),
    "temperature_of_classes": (lambda: apply_temperature(X, np.ones(3, np.float32)), ValueError, "scalar"),
    "params_of_other_classes": (
        lambda: apply_vector_scaling(X, VectorScaling(np.ones(2, np.float32), np.ones(2, np.float32))),
        ValueError,
        r"\(3,\)",
    ),
}


def shrinking():
    batches = [(X, Y)] * 9
    return lambda: [batches.pop() for _ in range(len(batches) // 2)]


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_says_what_came_and_what_is_accepted(name):
    call, error, pattern = WRONG_CALLS[name]
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        call()


def test_too_few_steps_warn():
    logits, labels = drawn(13, 300, lambda x: x / 4)
    with pytest.warns(RuntimeWarning, match="after 1 steps.*max_steps"):
        fit_temperature(logits, labels, max_steps=1)


def test_the_program_of_a_pass_never_calls_the_host():
    from calib_jax import _likelihood, scaling

    sums = functools.partial(_likelihood._batch_sums, scaled=scaling._over_temperature)
    program = str(jax.make_jaxpr(sums)(np.float32(0), X, Y, None))
    assert not re.search("callback", program)

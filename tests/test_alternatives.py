"""The other losses: values and gradients beside naive twins and others' code, masks, extremes, refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calib_jax import alternatives, segmentation_loss

pytestmark = pytest.mark.usefixtures("strict_promotion")

# The twins: one voxel at a time in float64, written from the papers. A target of None is a voxel without class.


def twin_targets(labels, classes, where):
    """The class distribution of each counted voxel with a class, by its index."""
    targets = {}
    for voxel in np.ndindex(where.shape):
        if where[voxel]:
            label = labels[voxel]
            row = np.float64(label) if np.ndim(label) else np.float64([label == c for c in range(classes)])
            if row.any():
                targets[voxel] = row
    return targets


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def over_voxels(loss_of_voxel):
    """The twin of a mean over voxels, from `loss_of_voxel(logits, target, targets, voxel, shape, **options)`."""

    def twin(logits, labels, where, **options):
        targets = twin_targets(labels, logits.shape[-1], where)
        losses = [
            loss_of_voxel(logits[voxel], target, targets, voxel, where.shape, **options)
            for voxel, target in targets.items()
        ]
        return sum(losses) / where.sum()

    return twin


def cross_entropy(logits, target):
    return -(target * log_softmax(logits)).sum()


def twin_focal(logits, target, *_, gamma=2.0):
    log_p = log_softmax(logits)
    return -(target * (1 - np.exp(log_p)) ** gamma * log_p).sum()


def twin_label_smoothing(logits, target, *_, alpha=0.1):
    return cross_entropy(logits, (1 - alpha) * target + alpha / len(target))


def cube(voxel, kernel_size):
    """Each place of the cube around a voxel, and its offset."""
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    for offset in itertools.product(reach, repeat=len(voxel) - 1):
        yield (voxel[0], *np.add(voxel[1:], offset)), np.array(offset)


def twin_svls(logits, target, targets, voxel, shape, sigma=1.0, kernel_size=3):
    weights, places = [], []
    for place, offset in cube(voxel, kernel_size):
        places.append(tuple(int(np.clip(i, 0, size - 1)) for i, size in zip(place, shape, strict=True)))
        weights.append(np.exp(-(offset**2).sum() / (2 * sigma**2)))
    centre = len(weights) // 2
    weights[centre] = sum(weights[:centre] + weights[centre + 1 :])
    known = [(w, targets[place]) for w, place in zip(weights, places, strict=True) if place in targets]
    soft = sum(w * y for w, y in known) / sum(w for w, _ in known)
    return cross_entropy(logits, soft)


def twin_margin(logits, target, *_, margin=10.0, weight=0.1):
    penalty = np.mean([max(0, logits.max() - logit - margin) for logit in logits])
    return cross_entropy(logits, target) + weight * penalty


def twin_neighbor_aware(logits, target, targets, voxel, shape, kernel_size=3, weight=0.1, norm="l1"):
    places = [place for place, _ in cube(voxel, kernel_size)]
    share = sum(targets.get(place, 0 * target) for place in places) / len(places)
    distance = np.abs(share - logits) if norm == "l1" else (share - logits) ** 2
    return cross_entropy(logits, target) + weight * distance.mean()


def twin_dsc_plus_plus(logits, labels, where, gamma=2.0, smooth=5e-6, include_background=True):
    targets = twin_targets(labels, logits.shape[-1], where)
    losses = []
    for b in range(len(logits)):
        voxels = [voxel for voxel in targets if voxel[0] == b]
        for c in range(0 if include_background else 1, logits.shape[-1]) if voxels else ():
            p = np.array([np.exp(log_softmax(logits[voxel]))[c] for voxel in voxels])
            g = np.array([targets[voxel][c] for voxel in voxels])
            hits, misses, false = (
                np.minimum(p, g).sum(),
                (np.maximum(g - p, 0) ** gamma).sum(),
                (np.maximum(p - g, 0) ** gamma).sum(),
            )
            losses.append(1 - 2 * (hits + smooth) / (2 * (hits + smooth) + misses + false))
    return np.mean(losses)


LOSSES = {
    "focal": (alternatives.focal_loss, over_voxels(twin_focal)),
    "label_smoothing": (alternatives.label_smoothing_loss, over_voxels(twin_label_smoothing)),
    "svls": (alternatives.spatially_varying_label_smoothing_loss, over_voxels(twin_svls)),
    "margin": (alternatives.margin_label_smoothing_loss, over_voxels(twin_margin)),
    "neighbor_aware": (alternatives.neighbor_aware_loss, over_voxels(twin_neighbor_aware)),
    "dsc_plus_plus": (alternatives.dsc_plus_plus_loss, twin_dsc_plus_plus),
}
ACTIVE = {"margin": {"margin": 1.0}}  # the default of 10 is out of reach of these logits
SHAPES = {"2d": (2, 4, 3, 3), "3d": (1, 3, 2, 2, 4)}


def sample(shape, form="ids", seed=1):
    """Logits, labels (with voxels of no class) and a mask."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, shape).astype(np.float32)
    where = rng.random(shape[:-1]) < 0.7
    labels = rng.integers(0, shape[-1], shape[:-1])
    if form == "soft":
        labels = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)
    labels[0, 0, 1], labels[0, -1, 0] = (0, 0) if form == "soft" else (-1, shape[-1])
    return logits, labels, where


def one_hot(ids, classes):
    return (np.asarray(ids)[..., None] == np.arange(classes)).astype(np.float32)


@functools.cache
def compiled(kind, options=()):
    loss = functools.partial(LOSSES[kind][0], **dict(options))
    return jax.jit(lambda logits, labels, where: jax.value_and_grad(loss)(logits, labels, where=where))


def value_and_grad(kind, logits, labels, where=None, **options):
    where = np.ones(logits.shape[:-1], bool) if where is None else where
    return compiled(kind, tuple(options.items()))(logits, labels, where)


def differences(function, x, step=1e-6):
    """Central differences of a float64 function."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


def assert_equals_twin(kind, logits, labels, where, **options):
    value, gradient = value_and_grad(kind, logits, labels, where, **options)
    twin = functools.partial(LOSSES[kind][1], labels=labels, where=where, **options)
    exact = logits.astype(np.float64)
    np.testing.assert_allclose(value, twin(exact), rtol=2e-6)
    expected = differences(twin, exact)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 1e-3  # or the comparison would say little


# Beside the twins


@pytest.mark.parametrize("form", ["ids", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_equal_the_twin(kind, shape, form):
    logits, labels, where = sample(SHAPES[shape], form)
    assert_equals_twin(kind, logits, labels, where, **ACTIVE.get(kind, {}))
    assert_equals_twin(kind, logits, labels, np.ones_like(where), **ACTIVE.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("focal", {"gamma": 0.5}),
        ("focal", {"gamma": 3.0}),
        ("label_smoothing", {"alpha": 0.4}),
        ("svls", {"sigma": 0.15}),  # neighbors weigh 2e-10: a sum less its centre would have lost them
        ("svls", {"sigma": 2.0, "kernel_size": 5}),
        ("margin", {"margin": 0.0, "weight": 2.0}),
        ("neighbor_aware", {"norm": "l2", "weight": 0.7}),
        ("neighbor_aware", {"kernel_size": 5}),
        ("dsc_plus_plus", {"gamma": 0.7, "smooth": 0.5}),
        ("dsc_plus_plus", {"gamma": 3.0, "include_background": False}),
    ],
    ids=str,
)
def test_options_equal_the_twin(kind, options):
    assert_equals_twin(kind, *sample(SHAPES["2d"]), **options)


# Beside others' code


def torch_inputs(shape, seed=2):
    """Logits and labels without voxels of no class: arrays, and channel-first tensors of them."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, shape).astype(np.float32)
    labels = rng.integers(0, shape[-1], shape[:-1])
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(logits, -1, 1))).requires_grad_()
    return logits, labels, tensor, torch.from_numpy(labels)


def assert_equals_torch(kind, logits, labels, tensor, expected, **options):
    expected.backward()
    value, gradient = value_and_grad(kind, logits, labels, **options)
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    np.testing.assert_allclose(gradient, np.moveaxis(tensor.grad.numpy(), 1, -1), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_focal_loss_equals_monai(shape, gamma):
    losses = pytest.importorskip("monai.losses")
    logits, labels, tensor, ids = torch_inputs(SHAPES[shape])
    focal = losses.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma)
    expected = focal(tensor, ids[:, None]) * logits.shape[-1]  # its mean is over classes too
    assert_equals_torch("focal", logits, labels, tensor, expected, gamma=gamma)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_label_smoothing_equals_pytorch(shape, alpha):
    torch = pytest.importorskip("torch")
    logits, labels, tensor, ids = torch_inputs(SHAPES[shape])
    expected = torch.nn.CrossEntropyLoss(label_smoothing=alpha)(tensor, ids)
    assert_equals_torch("label_smoothing", logits, labels, tensor, expected, alpha=alpha)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_neighbor_aware_loss_equals_monai(shape, norm):
    losses = pytest.importorskip("monai.losses")
    logits, labels, tensor, ids = torch_inputs(SHAPES[shape])
    loss = losses.NACLLoss(logits.shape[-1], dim=logits.ndim - 2, distance_type=norm)
    assert_equals_torch("neighbor_aware", logits, labels, tensor, loss(tensor, ids), norm=norm)


@pytest.mark.parametrize("shape", SHAPES)
def test_svls_equals_one_convolution(shape):
    """In PyTorch, with the whole kernel of the paper and replicated borders."""
    torch = pytest.importorskip("torch")
    logits, labels, tensor, _ = torch_inputs(SHAPES[shape])
    classes, axes = logits.shape[-1], logits.ndim - 2
    squares = sum(np.ix_(*[np.array([1.0, 0.0, 1.0])] * axes))
    kernel = np.exp(-squares / 2) / np.exp(-squares / 2).sum()
    kernel[(1,) * axes] = 1 - kernel[(1,) * axes]
    kernel = torch.tensor(kernel / kernel.sum()).float().expand(classes, 1, *kernel.shape)
    hot = torch.from_numpy(np.moveaxis(one_hot(labels, classes), -1, 1).copy())
    padded = torch.nn.functional.pad(hot, (1,) * (2 * axes), mode="replicate")
    convolution = torch.nn.functional.conv2d if axes == 2 else torch.nn.functional.conv3d
    targets = convolution(padded, kernel, groups=classes)
    expected = -(targets * tensor.log_softmax(1)).sum(1).mean()
    assert_equals_torch("svls", logits, labels, tensor, expected)


@pytest.mark.parametrize("include_background", [True, False])
def test_dsc_plus_plus_of_gamma_one_is_optax_dice(include_background):
    logits, ids, _ = sample(SHAPES["2d"])
    ids = np.clip(ids, 0, 2)
    options = {"smooth": 0.3, "ignore_background": not include_background}
    expected = optax.losses.dice_loss(logits, one_hot(ids, 3), **options).mean()
    options = {"gamma": 1.0, "smooth": 0.3, "include_background": include_background}
    np.testing.assert_allclose(
        value_and_grad("dsc_plus_plus", logits, ids, **options)[0], expected, rtol=1e-6
    )


CROSS_ENTROPY = [
    ("focal", {"gamma": 0.0}),
    ("label_smoothing", {"alpha": 0.0}),
    ("margin", {"margin": 100.0}),
    ("margin", {"margin": 0.0, "weight": 0.0}),
    ("neighbor_aware", {"weight": 0.0}),
]


@pytest.mark.parametrize(("kind", "options"), CROSS_ENTROPY, ids=str)
def test_without_its_part_a_loss_is_cross_entropy(kind, options):
    logits, ids, _ = sample(SHAPES["2d"])
    expected, gradient = jax.value_and_grad(segmentation_loss)(logits, ids, dice=0.0, ace=0.0)
    actual = value_and_grad(kind, logits, ids, **options)
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)
    np.testing.assert_allclose(actual[1], gradient, atol=1e-7)


def test_svls_leaves_labels_inside_a_class_hard():
    logits, ids, _ = sample(SHAPES["3d"])
    ids = np.full_like(ids, 2)
    expected = segmentation_loss(logits, ids, dice=0.0, ace=0.0)
    np.testing.assert_allclose(value_and_grad("svls", logits, ids)[0], expected, rtol=1e-6)


# Labels and masks


@pytest.mark.parametrize("kind", LOSSES)
def test_one_hot_labels_equal_ids(kind):
    logits, ids, where = sample(SHAPES["2d"])
    expected = value_and_grad(kind, logits, ids, where, **ACTIVE.get(kind, {}))
    for dtype in (np.float32, np.int32, bool):
        hot = one_hot(ids, logits.shape[-1]).astype(dtype)
        actual = value_and_grad(kind, logits, hot, where, **ACTIVE.get(kind, {}))
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(actual[1], expected[1], atol=1e-7)
    small = value_and_grad(
        kind, logits, np.where(ids < 0, 255, ids).astype(np.uint8), where, **ACTIVE.get(kind, {})
    )
    np.testing.assert_array_equal(small[0], expected[0])


@pytest.mark.parametrize("kind", LOSSES)
def test_voxels_without_a_class_count_in_the_mean_alone(kind):
    """Beside the same voxels masked; DSC++ has no mean over voxels."""
    logits, ids, _ = sample(SHAPES["2d"])
    inside = (ids >= 0) & (ids < logits.shape[-1])
    assert 0 < inside.sum() < inside.size
    logits[~inside] = np.nan
    value, gradient = value_and_grad(kind, logits, ids)
    masked, masked_gradient = value_and_grad(kind, logits, ids, inside)
    ratio = 1 if kind == "dsc_plus_plus" else inside.mean()
    np.testing.assert_allclose(value, np.asarray(masked) * ratio, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.asarray(masked_gradient) * ratio, atol=1e-7)


@pytest.mark.parametrize("form", ["ids", "soft"])
@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_under_the_mask_is_touched(kind, form):
    logits, labels, where = sample(SHAPES["2d"], form)
    expected = value_and_grad(kind, logits, labels, where)
    logits[~where] = np.nan
    labels[~where] = np.nan if form == "soft" else 1
    value, gradient = value_and_grad(kind, logits, labels, where)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])
    assert not np.any(gradient[~where])


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mask_equals_a_crop(kind):
    """Of images; of voxels too but in SVLS, whose border repeats voxels where its mask leaves them out."""
    logits, ids, _ = sample((3, 4, 3, 3))
    part = np.index_exp[:2] if kind == "svls" else np.index_exp[:2, :, :2]
    where = np.zeros(ids.shape, bool)
    where[part] = True
    value, gradient = value_and_grad(kind, logits, ids, where)
    cropped, cropped_gradient = value_and_grad(kind, logits[part], ids[part])
    np.testing.assert_allclose(value, cropped, rtol=1e-6)
    np.testing.assert_allclose(gradient[part], cropped_gradient, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mask_that_leaves_nothing_costs_nothing(kind):
    logits, ids, _ = sample(SHAPES["2d"])
    for empty in (value_and_grad(kind, logits, ids, ids == 99), value_and_grad(kind, logits, 0 * ids - 1)):
        np.testing.assert_array_equal(empty[0], 0)
        np.testing.assert_array_equal(empty[1], np.zeros_like(logits))


def test_a_nan_that_counts_is_seen():
    logits, ids, _ = sample(SHAPES["2d"])
    logits[1, 1, 1] = np.nan
    assert [kind for kind in LOSSES if not np.isnan(value_and_grad(kind, logits, ids)[0])] == []


# Extremes


POWERS = [("focal", {"gamma": g}) for g in (0.0, 0.3, 1.0, 2.0)] + [
    ("dsc_plus_plus", {"gamma": g, "smooth": s}) for g in (0.0, 0.3, 1.0, 2.0) for s in (0.0, 5e-6)
]


@pytest.mark.parametrize(("kind", "options"), POWERS + [(kind, {}) for kind in LOSSES], ids=str)
def test_extreme_logits_have_finite_values_and_gradients(kind, options):
    """Probabilities of exactly 0 and 1, right and wrong, and ties of the largest logit."""
    levels = np.float32([-1e4, -90, -20, 0, 20, 90, 1e4])
    logits = np.float32(list(itertools.product(levels, repeat=3))).reshape(1, 49, 7, 3)
    soft = np.random.default_rng(3).dirichlet(np.ones(3), (1, 49, 7)).astype(np.float32)
    for labels in (np.zeros((1, 49, 7), np.int32), np.full((1, 49, 7), 2), soft):
        value, gradient = value_and_grad(kind, logits, labels, **options)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_a_tie_is_no_distance():
    logits, ids, _ = sample(SHAPES["2d"])
    logits = np.zeros_like(logits)
    value, gradient = value_and_grad("margin", logits, ids, margin=0.0, weight=100.0)
    expected = value_and_grad("margin", logits, ids, margin=0.0, weight=0.0)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


def test_logits_at_the_shares_are_not_pushed():
    """By the penalty: what remains is the cross-entropy."""
    logits, ids, _ = sample(SHAPES["2d"])
    logits = np.zeros_like(logits)
    logits[..., 1] = 1
    # Inside, the cube is whole and of class 1; its share is 1 but for rounding, the others' exactly 0.
    inner = np.index_exp[:, 1:-1, 1:-1]
    weighted, plain = (
        value_and_grad("neighbor_aware", logits, np.ones_like(ids), weight=weight)[1]
        for weight in (100.0, 0.0)
    )
    np.testing.assert_array_equal(weighted[inner][..., [0, 2]], plain[inner][..., [0, 2]])
    assert np.abs(weighted - plain).max() > 1e-3  # at the border


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_get_a_float32_loss_and_a_gradient_of_their_dtype(kind, dtype):
    logits, ids, where = sample(SHAPES["2d"])
    half = jnp.asarray(logits, dtype)
    value, gradient = value_and_grad(kind, half, ids, where)
    expected = value_and_grad(kind, np.asarray(half, np.float32), ids, where)
    assert value.dtype == jnp.float32
    assert gradient.dtype == half.dtype
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected[1], rtol=1e-2, atol=1e-6)


# Transformations


@pytest.mark.parametrize("kind", LOSSES)
def test_eager_equals_jit_and_no_mask_a_full_one(kind):
    logits, ids, _ = sample(SHAPES["2d"])
    loss = LOSSES[kind][0]
    assert loss(logits, ids).shape == ()
    np.testing.assert_allclose(loss(logits, ids), value_and_grad(kind, logits, ids)[0], rtol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_vmap_equals_a_loop(kind):
    logits, ids, where = sample(SHAPES["2d"])
    loss = LOSSES[kind][0]
    mapped = jax.jit(jax.vmap(lambda x, y, w: loss(x[None], y[None], where=w[None])))(logits, ids, where)
    looped = [value_and_grad(kind, *(x[b : b + 1] for x in (logits, ids, where)))[0] for b in range(2)]
    np.testing.assert_allclose(mapped, looped, rtol=1e-6)


@pytest.mark.parametrize("kind", ["focal", "label_smoothing", "margin", "dsc_plus_plus"])
def test_single_voxels_need_no_spatial_axis(kind):
    logits, ids, where = sample(SHAPES["2d"])
    flat = value_and_grad(kind, logits.reshape(-1, 3), ids.reshape(-1), where.reshape(-1))[0]
    if kind == "dsc_plus_plus":  # where every voxel is an image of its own
        assert np.isfinite(flat)
    else:
        np.testing.assert_allclose(flat, value_and_grad(kind, logits, ids, where)[0], rtol=1e-6)


def test_a_weight_may_be_traced():
    logits, ids, _ = sample(SHAPES["2d"])
    traced = jax.jit(lambda gamma: alternatives.focal_loss(logits, ids, gamma=gamma))(jnp.float32(2))
    np.testing.assert_allclose(traced, alternatives.focal_loss(logits, ids, gamma=2.0), rtol=1e-6)


# Wrong calls


L, Y, W = sample(SHAPES["2d"])
WRONG_LABELS = {
    "logits_of_integers": (lambda loss: loss(Y, Y), TypeError, ["logits", "floating point"]),
    "logits_of_one_class": (
        lambda loss: loss(L[..., :1], Y),
        ValueError,
        ["logits", "two classes", "(2, 4, 3, 1)"],
    ),
    "labels_of_another_size": (
        lambda loss: loss(L, Y[:, :2]),
        ValueError,
        ["labels", "(2, 2, 3)", "(2, 4, 3)"],
    ),
    "ids_in_floats": (
        lambda loss: loss(L, Y.astype(np.float32)),
        TypeError,
        ["labels", "integers", "float32"],
    ),
    "where_of_integers": (lambda loss: loss(L, Y, where=Y), TypeError, ["where", "boolean"]),
    "where_per_class": (
        lambda loss: loss(L, Y, where=L > 0),
        ValueError,
        ["where", "(2, 4, 3)", "(2, 4, 3, 3)"],
    ),
}
WRONG_OPTIONS = [
    ("focal", {"gamma": -1.0}, ValueError),
    ("focal", {"gamma": np.float32("nan")}, ValueError),
    ("label_smoothing", {"alpha": 1.5}, ValueError),
    ("svls", {"sigma": 0.0}, ValueError),
    ("svls", {"kernel_size": 4}, ValueError),
    ("svls", {"kernel_size": 3.0}, TypeError),
    ("margin", {"margin": -1.0}, ValueError),
    ("neighbor_aware", {"kernel_size": 1}, ValueError),
    ("neighbor_aware", {"norm": "l3"}, ValueError),
    ("dsc_plus_plus", {"gamma": -0.1}, ValueError),
    ("dsc_plus_plus", {"smooth": -1e-5}, ValueError),
]


def assert_refused(call, error, words):
    for attempt in (call, lambda: jax.eval_shape(call)):  # eager and traced
        with pytest.raises(error) as raised:
            attempt()
        missing = [word for word in words if word not in str(raised.value)]
        assert not missing, str(raised.value)


@pytest.mark.parametrize("name", WRONG_LABELS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_wrong_array_is_refused_by_its_name(kind, name):
    call, error, words = WRONG_LABELS[name]
    assert_refused(lambda: call(LOSSES[kind][0]), error, words)


@pytest.mark.parametrize(("kind", "options", "error"), WRONG_OPTIONS, ids=str)
def test_a_wrong_option_is_refused_by_its_name(kind, options, error):
    (name,) = options
    assert_refused(lambda: LOSSES[kind][0](L, Y, **options), error, [name])


@pytest.mark.parametrize("kind", ["svls", "neighbor_aware"])
def test_neighbors_need_a_spatial_axis(kind):
    call = functools.partial(LOSSES[kind][0], L[0, 0], Y[0, 0])
    assert_refused(call, ValueError, ["logits", "spatial axis", "(3, 3)"])

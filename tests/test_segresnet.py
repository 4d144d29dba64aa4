"""SegResNet, plain and deeply supervised, against MONAI's, and what it says to wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_equals_monai, assert_equals_stored, make_segresnet, num_parameters

from train.errors import InputError
from train.losses import nearest, parse_loss
from train.models.segresnet import _between_neighbours, _resized

SMALL = {"spatial_dims": 2, "blocks_down": (1, 1, 1)}
CASES = {
    "plain, 3-D": ("SegResNet", {"spatial_dims": 3, "blocks_down": (1, 1), "blocks_up": (1,)}, {}, (4, 6, 8)),
    "plain, 2-D": (
        "SegResNet",
        {"spatial_dims": 2, "blocks_down": (1, 2, 1), "blocks_up": (2, 1)},
        {},
        (8, 12),
    ),
    "supervised, 3-D": (
        "SegResNetDS",
        {"spatial_dims": 3, "init_filters": 4, "blocks_down": (1, 1, 1), "norm": "instance", "dsdepth": 2},
        {"norm": "affine-instance"},
        (8, 4, 12),
    ),
    "one head, 2-D": (
        "SegResNetDS",
        {**SMALL, "init_filters": 8, "norm": ("group", {"num_groups": 8}), "dsdepth": 1},
        {"norm": "group"},
        (8, 12),
    ),
}


def options_here(name, options):
    """MONAI's options as ours."""
    options = dict(options)
    depth = options.pop("dsdepth", 1)
    return {**options, "deep_supervision": depth} if name == "SegResNetDS" else options


@pytest.mark.parametrize("case", CASES)
def test_equals_monai(case):
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    name, options, differing, sizes = CASES[case]
    torch.manual_seed(0)
    theirs = getattr(nets, name)(in_channels=2, out_channels=3, **options)
    ours = {**options_here(name, options), **differing}
    assert_equals_monai(theirs, lambda: make_segresnet(in_channels=2, out_channels=3, **ours), (2, *sizes, 2))


def test_stored_statistics_equal_monais_batch_norm_in_evaluation():
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.SegResNetDS(2, 4, 2, 3, blocks_down=(1, 1, 1)).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    options = {**SMALL, "init_filters": 4, "norm": "batch", "deep_supervision": 1}
    assert_equals_monai(
        theirs, lambda: make_segresnet(in_channels=2, out_channels=3, **options), (2, 8, 12, 2)
    )


@pytest.mark.parametrize("name", ["segresnet", "segresnet_ds"])
def test_equals_what_monai_gave(name):
    assert_equals_stored(name)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1_176_195),
        ({"init_filters": 32, "deep_supervision": 4, "blocks_down": (1, 2, 2, 4, 4)}, 87_164_684),
    ],
)
def test_number_of_parameters(options, count):
    """As counted in MONAI's."""
    model = jax.eval_shape(lambda: make_segresnet(in_channels=1, out_channels=3, **options))
    assert num_parameters(model) == count


def test_several_logits_only_in_training():
    model = make_segresnet(in_channels=1, out_channels=3, deep_supervision=2, **SMALL)
    x = jax.random.normal(jax.random.key(0), (1, 8, 12, 1))
    finest, coarser = model(x)
    assert finest.shape == (1, 8, 12, 3)
    assert coarser.shape == (1, 4, 6, 3)
    model.eval()
    np.testing.assert_array_equal(model(x), finest)


@pytest.mark.parametrize("soft", [False, True])
def test_loss_is_the_weighted_mean_over_levels(soft):
    rng = np.random.default_rng(0)
    levels = tuple(rng.normal(size=(2, *size, 3)).astype(np.float32) for size in ((12, 8), (6, 4), (3, 2)))
    ids = rng.integers(0, 3, (2, 12, 8))
    labels = np.eye(3, dtype=np.float32)[ids] if soft else ids
    loss = parse_loss("dice+ace")
    # The voxel at the centre of a block of 2 is its second, of 4 its third.
    expected = [
        loss.parts(y, x)
        for y, x in zip(levels, (labels, labels[:, 1::2, 1::2], labels[:, 2::4, 2::4]), strict=False)
    ]
    for name, value in loss.parts(levels, labels).items():
        np.testing.assert_allclose(
            value, sum(w * e[name] for w, e in zip((4 / 7, 2 / 7, 1 / 7), expected, strict=True)), rtol=1e-6
        )


@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_labels_of_a_level_are_pytorchs_nearest_exact(step):
    torch = pytest.importorskip("torch")
    fine = np.arange(48.0, dtype=np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(fine)[None, None], size=48 // step, mode="nearest-exact"
    )
    np.testing.assert_array_equal(nearest(jnp.asarray(fine)[None], (48 // step,))[0], theirs[0, 0])


def test_dropout_after_the_first_convolution():
    model = make_segresnet(in_channels=1, out_channels=3, dropout=0.5, **SMALL)
    x = jnp.ones((1, 8, 8, 1))
    assert bool((model(x) != model(x)).any())
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks_down": (1,)}, "blocks_down is"),
        ({"blocks_up": (1,)}, "blocks_up"),
        ({"deep_supervision": 3}, "deep_supervision is 3: give a number from 0 to 2"),
        ({"init_filters": 4}, "divisor of 4"),
    ],
)
def test_options_that_make_no_network(options, message):
    with pytest.raises((InputError, ValueError), match=message):
        make_segresnet(in_channels=1, out_channels=3, **SMALL | options)


def test_size_that_cannot_be_halved():
    model = make_segresnet(in_channels=1, out_channels=3, **SMALL)
    with pytest.raises(ValueError, match="multiple of 4"):
        jax.eval_shape(model, jnp.zeros((1, 8, 10, 1)))


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (1, 4, 1, 3, 2)])
def test_doubling_between_neighbours_equals_the_resize_of_cpus(shape):
    """The form of GPUs and TPUs, and its gradient."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=_resized(x).shape), jnp.float32)
    values, gradients = zip(
        *(
            jax.value_and_grad(lambda x, f=f: (f(x) * weights).sum())(x)
            for f in (_between_neighbours, _resized)
        ),
        strict=True,
    )
    np.testing.assert_allclose(_between_neighbours(x), _resized(x), atol=1e-6)
    np.testing.assert_allclose(*values, rtol=1e-5)
    np.testing.assert_allclose(*gradients, atol=1e-5)

"""A network's temperature: fitted on the voxels of whole cases, applied before the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import calib_jax
from train.data.phantom import PhantomDataset
from train.inference import VolumePredictor, volume_predictor
from train.step import init_state
from train.temperature import fit_temperature, temper


class Voxelwise(nnx.Module):
    """Logits that depend on no neighbour: windows cannot matter to them."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.array([0.0, 1.0, 2.0, -4.0]))

    def __call__(self, images: jax.Array) -> jax.Array:
        return images[..., :1] * self.scale[...]


def predictor(patch: tuple[int, ...]) -> VolumePredictor:
    return volume_predictor(*init_state(Voxelwise(), optax.sgd(0.1)), patch)


DATA = PhantomDataset(spatial_shape=(112, 16), num_cases=3)
CASES = DATA.case_names


def test_is_that_of_all_voxels_of_all_cases() -> None:
    cases = [DATA.load(i) for i in range(3)]
    logits = jnp.stack([case.image[..., :1] for case in cases]) * predictor((8, 8)).weights[0]["scale"][...]
    expected = calib_jax.fit_temperature(logits, jnp.stack([case.label.astype(np.int32) for case in cases]))
    shape = cases[0].label.shape
    larger = tuple(-(-size // 8) * 8 + 8 for size in shape)  # so that padding must not count
    found = fit_temperature(predictor(larger), DATA, CASES)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(float(found) - 1) > 0.05


def test_windows_each_count_their_voxels() -> None:
    """Without overlap every voxel is counted once, whatever fills up the groups of windows."""
    whole, parts = (
        fit_temperature(VolumePredictor(one.forward, one.weights, one.patch, overlap=0.0), DATA, CASES[:1])
        for one in (predictor(DATA.load(0).label.shape), predictor((16, 16)))
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def test_sigmoids_share_a_temperature() -> None:
    """It is that of the softmax over (0, x) of each region, and divides x."""

    class WithRegions(PhantomDataset):
        regions = {"shell": (1,), "organ": (1, 2, 3), "inside": (2, 3), "core": (3,)}  # noqa: RUF012

    dataset, regions = WithRegions(spatial_shape=(32, 16), num_cases=2), WithRegions.regions
    cases = [dataset.load(i) for i in range(2)]
    patch = cases[0].label.shape
    softmax = predictor(patch)
    predict = volume_predictor(
        softmax.forward.graphdef, init_state(Voxelwise(), optax.sgd(0.1))[1], patch, tuple(regions)
    )
    logits = jnp.stack([case.image[..., :1] for case in cases]) * predict.weights[0]["scale"][...]
    pairs = jnp.stack([jnp.zeros_like(logits), logits], -1)
    members = np.stack([np.stack([np.isin(c.label, ids) for ids in regions.values()], -1) for c in cases])
    expected = calib_jax.fit_temperature(pairs, members.astype(np.int32))
    found = fit_temperature(predict, dataset, dataset.case_names)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(float(found) - 1) > 0.05
    probs = temper(predict, found)(cases[0].image)
    np.testing.assert_allclose(probs, jax.nn.sigmoid(logits[0] / found), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divides_the_logits(temperature: float) -> None:
    predict, image = predictor(DATA.load(0).label.shape), DATA.load(0).image
    probs = temper(predict, jnp.float32(temperature))(image)
    logits = jnp.asarray(image[..., :1]) * predict.weights[0]["scale"][...]
    np.testing.assert_allclose(probs, jax.nn.softmax(logits / temperature), atol=1e-6)
    np.testing.assert_array_equal(probs.argmax(-1), predict(image).argmax(-1))


def test_a_temperature_without_an_optimum_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    predict = predictor(DATA.load(0).label.shape)
    equal = VolumePredictor(predict.forward, jax.tree.map(jnp.zeros_like, predict.weights), predict.patch)
    assert fit_temperature(equal, DATA, CASES[:1]) == 1
    assert capsys.readouterr().out.startswith(
        "note: fitting the temperature, the logits of each counted voxel"
    )

"""Batches: what they hold, and that the stream can be stopped, resumed and sharded without a trace."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest

from train.data.open import open_dataset
from train.data.phantom import PhantomDataset
from train.data.pipeline import CachedCases, train_batches
from train.errors import InputError

PHANTOM = PhantomDataset(spatial_shape=(16, 12), num_cases=10)


def _batches(
    names=PHANTOM.case_names[:7], *, dataset=PHANTOM, patch=(8, 16), batch_size=4, seed=0, **options
):
    return train_batches(dataset, names, patch=patch, batch_size=batch_size, seed=seed, **options)


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


class Counting:
    """A data set that counts how often it is asked to load."""

    def __init__(self, dataset):
        self._dataset, self.loads = dataset, 0

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def __len__(self):
        return len(self._dataset)

    def load(self, index):
        self.loads += 1
        return self._dataset.load(index)


def test_a_batch_is_what_the_contract_says():
    batch = next(_batches())
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 8, 16, 2), "float32"),
        "label": ((4, 8, 16), "int32"),
        "index": ((4,), "int32"),
    }


def test_every_epoch_visits_each_chosen_case_once_in_its_own_order():
    order = np.concatenate([batch["index"] for batch in islice(_batches(), 7)]).reshape(4, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in order)
    assert len({tuple(epoch) for epoch in order}) == 4


def test_crops_differ_between_epochs():
    images = [batch["image"] for batch in islice(_batches(PHANTOM.case_names[:1], batch_size=1), 8)]
    assert len({image.tobytes() for image in images}) > 1


def test_foreground_crops_hold_foreground():
    chosen = {"patch": (4, 3), "batch_size": 20, "foreground_crops": 1.0}
    assert next(_batches(**chosen))["label"].any((1, 2)).all()
    assert not next(_batches(**chosen | {"foreground_crops": 0.0}))["label"].any((1, 2)).all()


def test_the_stream_is_a_function_of_the_seed():
    for one, other in islice(zip(_batches(), _batches(num_threads=3), strict=False), 5):
        _assert_equal(one, other)
    assert not np.array_equal(next(_batches())["image"], next(_batches(seed=1))["image"])


@pytest.mark.parametrize("stop_after", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"num_threads": 3, "prefetch": 1, "foreground_crops": 0.5}])
def test_a_restored_stream_goes_on_bit_for_bit(stop_after, options):
    stream = _batches(**options)
    for _ in range(stop_after):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = list(islice(stream, 4))
    resumed = _batches(**options)
    next(resumed)
    resumed.set_state(state)
    for one, other in zip(expected, islice(resumed, 4), strict=True):
        _assert_equal(one, other)


def test_shards_together_are_the_stream_of_one_process():
    whole = _batches(batch_size=6)
    shards = [_batches(batch_size=2, shard=(index, 3)) for index in range(3)]
    for _ in range(5):
        expected, parts = next(whole), [next(shard) for shard in shards]
        for key in expected:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), expected[key])


def test_cached_cases_are_loaded_once_by_any_number_of_threads():
    dataset = Counting(PHANTOM)
    cases = CachedCases(dataset, PHANTOM.case_names)
    for index in range(len(cases)):
        cases[index]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(cases.__getitem__, list(range(10)) * 5))
    assert dataset.loads == 10
    assert all(
        index == i % 10 and case.name == PHANTOM.case_names[index] for i, (index, case) in enumerate(again)
    )


def test_a_full_cache_loads_again_instead_of_growing():
    dataset = Counting(PHANTOM)
    cases = CachedCases(dataset, PHANTOM.case_names, max_bytes=3 * PHANTOM.load(0).num_bytes)
    for index in list(range(10)) * 2:
        cases[index]
    assert dataset.loads == 10 + 7


def test_bad_input_found_while_prefetching_reaches_the_caller_as_it_is():
    class Broken(Counting):
        def load(self, index):
            raise InputError("scan.nii.gz is truncated")

    with pytest.raises(InputError, match=r"scan.nii.gz is truncated"):
        next(_batches(dataset=Broken(PHANTOM)))


def test_nothing_is_printed():
    program = (
        "from train.data.open import open_dataset\n"
        "from train.data.pipeline import train_batches\n"
        "data = open_dataset('phantom2d')\n"
        "stream = train_batches(data, data.case_names[:3], patch=(32, 32), batch_size=2, seed=0)\n"
        "[next(stream) for _ in range(5)]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_data_sets_are_opened_by_name():
    assert open_dataset("phantom").spatial_dims == 3
    assert open_dataset("phantom2d").spatial_dims == 2
    for spec in ("brain", "msd", "msd:", "phantom:2"):
        with pytest.raises(
            InputError, match=f'data is "{spec}": give "phantom", "phantom2d", or LAYOUT:PATH with'
        ):
            open_dataset(spec)

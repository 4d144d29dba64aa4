"""The input pipeline on Grain: cached cases -> shuffle -> repeat -> patch -> batch.

Element i of the stream is a function of (seed, i) alone. The state of the iterator is therefore its number of
batches: a restored iterator continues with the same batches, bit by bit, also in the middle of an epoch and with
prefetching.
"""

from collections.abc import Sequence

import grain
import numpy as np

from train.data.annotators import soft_label
from train.data.case import Case, Dataset
from train.data.ignore import IGNORE
from train.data.transforms import cut_patch, draw_crop


class CachedCases:
    """A random-access source of (index in the data set, case) that keeps loaded cases in memory.

    When `max_bytes` are in use, no further case is kept and none is dropped. No policy hits more often if each
    epoch visits every case once. Threads may share the source; two threads may load the same case, which is kept
    once.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], *, max_bytes: int = 8 * 2**30):
        self._dataset = dataset
        index_of = {name: index for index, name in enumerate(dataset.case_names)}
        self._indices = [index_of[name] for name in names]
        self._cases: dict[int, Case] = {}
        self._free_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[int, Case]:
        case_index = self._indices[index]
        case = self._cases.get(case_index)
        if case is None:
            case = self._dataset.load(case_index)
            if case.num_bytes <= self._free_bytes:
                self._free_bytes -= case.num_bytes
                case = self._cases.setdefault(case_index, case)
        return case_index, case


def train_batches(
    dataset: Dataset,
    names: Sequence[str],
    *,
    patch: Sequence[int],
    batch_size: int,
    seed: int,
    foreground_crops: float = 0.0,
    random_annotators: bool = False,
    majority: bool = False,
    shard: tuple[int, int] = (0, 1),
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An endless iterator over shuffled batches of patches.

    Every epoch visits each case once, in its own order. A batch may span two epochs.

    Args:
        dataset: where the cases come from.
        names: the cases to train on.
        patch: voxels along each spatial axis.
        batch_size: examples per batch in this process.
        seed: of order and crops.
        foreground_crops: share of the patches that are centred on foreground, see `draw_crop`.
        random_annotators: draw random weights of the annotators for each example, uniform among all weights that
            sum to 1, instead of equal weights.
        majority: take the class ids of the annotators' majority instead of the share of each class.
        shard: (i, n) for the i-th of n equal parts of every batch. The parts in order are the batch of (0, 1)
            with n times the size.
        num_threads: number of threads that prepare batches. The batches do not depend on it.
        prefetch: largest number of batches that each thread prepares ahead.

    Returns:
        Yields `{"image": float32 [batch, *patch, channels], "label": int32 [batch, *patch], "index": int32
        [batch]}`. The index is that of the case in the data set. If the data set keeps all annotators, the label is
        float32 [batch, *patch, classes], without `majority`. Padding beyond a volume is background; in a data set
        with `IGNORE` it is `IGNORE` (zeros for annotators). `get_state()` is a small dictionary for JSON;
        `set_state()` resumes exactly there.
    """
    fill = IGNORE if dataset.has_ignore else 0

    def target(case: Case, crop: tuple[slice, ...], rng: np.random.Generator) -> np.ndarray:
        if case.annotations is None or majority:
            return cut_patch(case.label, crop, patch, fill=fill).astype(np.int32)
        annotations = cut_patch(case.annotations, crop, patch, fill=fill)
        weights = rng.dirichlet(np.ones(annotations.shape[-1])) if random_annotators else None
        return soft_label(annotations, len(dataset.class_names), weights)

    def to_example(element: tuple[int, Case], rng: np.random.Generator) -> dict[str, np.ndarray]:
        index, case = element
        crop = draw_crop(
            case.label, patch, rng, foreground_share=foreground_crops, has_ignore=dataset.has_ignore
        )
        return {
            "image": cut_patch(case.image, crop, patch),
            "label": target(case, crop, rng),
            "index": np.asarray(index, np.int32),
        }

    stream = grain.MapDataset.source(CachedCases(dataset, names)).seed(seed).shuffle().repeat()
    # Example r of this part of batch i is example shard[0] * batch_size + r of the full batch i.
    examples = stream.random_map(to_example)
    first, size = shard[0] * batch_size, shard[1] * batch_size
    rows = [examples[first + row :: size] for row in range(batch_size)]
    batches = grain.MapDataset.mix(rows).batch(batch_size, drop_remainder=True)
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch * num_threads)
    return iter(batches.to_iter_dataset(ahead))

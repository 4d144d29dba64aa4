"""Volume files in, batches of patches out.

Data flows down this list: `open_dataset` -> a `Dataset` of `Case`s (`phantom`, or `volumes` by their `layouts`) ->
`split_cases` -> `train_batches` (host: cache, shuffle, crop) -> `augment` (device, inside the step).

The names here need numpy alone, so that `--help` stays fast. All others are imported from their modules.
"""

from train.data.arrays import ArrayDataset
from train.data.case import Case, Dataset

__all__ = ["ArrayDataset", "Case", "Dataset"]

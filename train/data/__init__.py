"""Volume files in, batches of patches out.

Data flows down this list: `open_dataset` -> a `Dataset` of `Case`s (`phantom`, or `volumes` by their `layouts`) ->
`split_cases` -> `train_batches` (host: cache, shuffle, crop) -> `augment` (device, inside the step).

A name is imported when it is first used, so that `--help` needs none of the packages behind it.
"""
# ruff: noqa: F401

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.arrays import ArrayDataset
    from train.data.augment_config import NO_AUGMENTATION, AugmentConfig
    from train.data.augmentation import augment
    from train.data.cache import CaseStore
    from train.data.case import Case, Dataset, region_ids
    from train.data.geometry import Geometry
    from train.data.ignore import IGNORE, mask_ignored
    from train.data.layouts import LAYOUTS
    from train.data.open import open_dataset, open_layout
    from train.data.phantom import PhantomDataset
    from train.data.pipeline import CachedCases, train_batches
    from train.data.preprocess import z_score_nonzero
    from train.data.protocols import PROTOCOLS
    from train.data.splits import Splits, chosen_splits, read_splits, split_cases, write_splits
    from train.data.transforms import crop_back, cut_patch, draw_crop, pad_to_hold
    from train.data.volumes import VolumeDataset

_NAMES = {
    "arrays": ("ArrayDataset",),
    "augment_config": ("NO_AUGMENTATION", "AugmentConfig"),
    "augmentation": ("augment",),
    "cache": ("CaseStore",),
    "case": ("Case", "Dataset", "region_ids"),
    "geometry": ("Geometry",),
    "ignore": ("IGNORE", "mask_ignored"),
    "layouts": ("LAYOUTS",),
    "open": ("open_dataset", "open_layout"),
    "phantom": ("PhantomDataset",),
    "pipeline": ("CachedCases", "train_batches"),
    "preprocess": ("z_score_nonzero",),
    "protocols": ("PROTOCOLS",),
    "splits": ("Splits", "chosen_splits", "read_splits", "split_cases", "write_splits"),
    "transforms": ("crop_back", "cut_patch", "draw_crop", "pad_to_hold"),
    "volumes": ("VolumeDataset",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

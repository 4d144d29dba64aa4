"""How far predicted probabilities lie from the share of the experts: `python -m benchmarks.expert_share`.

    python -m benchmarks.expert_share majority=runs/majority average=runs/average --out gaps.json

Each folder is a comparison of `python -m train compare` on cases of several annotators, evaluated beside the share
of each class. A name that is given several times joins the images of its folders, such as those of five folds.
Predicted probabilities fall into 20 bins. The gap of a bin is the distance between its mean probability and its
mean share of the experts. The mean absolute gap is taken over the bins of an image, then over images; `pooled` puts
the pixels of all images into one set of bins.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calib_jax
from calib_jax import BinStatistics
from calib_jax.results import ModelResult


def joined(results: Sequence[ModelResult]) -> ModelResult:
    """The networks of one loss as one result, each on images of its own.

    Raises:
        ValueError: if an image occurs twice.
    """
    names = tuple(name for result in results for name in result.case_names)
    stats = jax.tree.map(lambda *parts: np.concatenate(parts), *(result.stats for result in results))
    dice = np.concatenate([result.dice for result in results])
    return ModelResult(results[0].name, names, results[0].class_names, stats, dice)


def gaps(result: ModelResult) -> dict[str, Any]:
    """The gaps of one network, over its first reported class."""
    pooled = result.stats.sum()
    by_image = result.metrics()
    metrics = {name: np.nanmean(values[:, 0]) for name, values in by_image.items()}
    curve = calib_jax.reliability_curve(result.stats)
    return {
        "gap_per_image": metrics["ACE"],
        "gap_weighted_by_pixels": metrics["ECE"],
        "gap_largest_bin": metrics["MCE"],
        "gap_pooled": calib_jax.average_calibration_error(pooled)[0],
        "gap_pooled_weighted_by_pixels": calib_jax.expected_calibration_error(pooled)[0],
        "dice_of_majority": metrics["Dice"],
        "images": len(result.case_names),
        "mean_probability": curve.mean_prob[0],
        "mean_share_of_experts": curve.mean_label[0],
        "gap_of_each_image": by_image["ACE"][:, 0],
    }


def changes(result: ModelResult, baseline: ModelResult) -> dict[str, Any]:
    """The relative changes of two gaps from a baseline, with 95% bootstrap intervals over the images of both.

    Raises:
        SystemExit: if the two were not measured on the same images.
    """
    if result.case_names != baseline.case_names:
        raise SystemExit(
            f"The baseline has other images, or another order: {baseline.case_names} beside {result.case_names}."
        )

    def two_gaps(stats: BinStatistics) -> Any:
        pooled, by_image = map(calib_jax.average_calibration_error, (stats.sum(), stats))
        return jnp.stack([pooled[0], jnp.nanmean(by_image[:, 0])])

    def change(both: tuple[BinStatistics, BinStatistics]) -> Any:
        return two_gaps(both[0]) / two_gaps(both[1]) - 1

    both = result.stats, baseline.stats
    rows = jnp.stack([change(both), *calib_jax.bootstrap_interval(jax.random.key(0), both, change)])
    return dict(zip(("gap_pooled", "gap_per_image"), rows.T, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How far predicted probabilities lie from the share of the experts."
    )
    parser.add_argument("comparisons", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument(
        "--baseline",
        metavar="ROW",
        help="row, such as 'majority dice+ce', from which the others' changes are reported",
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    parts: dict[str, list[ModelResult]] = {}
    for entry in options.comparisons:
        name, _, folder = entry.partition("=")
        files = sorted(Path(folder).glob("*/test.npz")) if folder else []
        if not files:
            parser.error(f"{entry}: give NAME=FOLDER, where FOLDER/LOSS/test.npz are written by `compare`.")
        for file in files:
            parts.setdefault(f"{name} {file.parent.name}", []).append(ModelResult.load(file))
    results = {name: joined(each) for name, each in parts.items()}
    if options.baseline not in {None, *results}:
        parser.error(
            f"--baseline {options.baseline!r} is no row. Choose from {', '.join(map(repr, results))}."
        )
    rows = {name: gaps(result) for name, result in results.items()}
    for name, row in rows.items():
        figures = " ".join(f"{key} {row[key]:.4f}" for key in row if key.startswith(("gap_p", "dice")))
        if options.baseline not in (None, name):
            row["changes"] = changes(results[name], results[options.baseline])
            figures += "; " + ", ".join(
                f"{key} {value:+.0%} [{low:+.0%}, {high:+.0%}]"
                for key, (value, low, high) in row["changes"].items()
            )
        print(f"{name}: {figures}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1, default=lambda x: np.round(x, 6).tolist()) + "\n")


if __name__ == "__main__":
    main()

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
import numpy as np

import calib_jax
from calib_jax import BinStatistics
from calib_jax.results import ModelResult


def gaps(results: Sequence[ModelResult]) -> dict[str, Any]:
    """The gaps of the networks of one loss, each on images of its own, over the first reported class."""
    stats = _stats(results)
    parts = [result.metrics() for result in results]
    by_image = {name: np.concatenate([part[name][:, 0] for part in parts]) for name in parts[0]}
    pooled = stats.sum()
    curve = calib_jax.reliability_curve(stats)
    return {
        "gap_per_image": np.nanmean(by_image["ACE"]),
        "gap_weighted_by_pixels": np.nanmean(by_image["ECE"]),
        "gap_largest_bin": np.nanmean(by_image["MCE"]),
        "gap_pooled": _pooled_gap(stats),
        "gap_pooled_weighted_by_pixels": calib_jax.expected_calibration_error(pooled)[0],
        "dice_of_majority": np.nanmean(by_image["Dice"]),
        "images": len(by_image["ACE"]),
        "mean_probability": curve.mean_prob[0],
        "mean_share_of_experts": curve.mean_label[0],
        "gap_of_each_image": by_image["ACE"],
    }


def changes(results: Sequence[ModelResult], baseline: Sequence[ModelResult]) -> dict[str, Any]:
    """The relative changes of two gaps from a baseline, with 95% bootstrap intervals over the images of both.

    Raises:
        SystemExit: if the two were not measured on the same images.
    """
    images, others = ([name for result in part for name in result.case_names] for part in (results, baseline))
    if images != others:
        raise SystemExit(f"The baseline has other images, or another order: {others} beside {images}.")

    def change(both: tuple[BinStatistics, BinStatistics]) -> dict[str, Any]:
        pooled, by_image = ([gap(stats) for stats in both] for gap in (_pooled_gap, _gap_per_image))
        return {"gap_pooled": pooled[0] / pooled[1] - 1, "gap_per_image": by_image[0] / by_image[1] - 1}

    both = _stats(results), _stats(baseline)
    low, high = calib_jax.bootstrap_interval(jax.random.key(0), both, change)
    return {name: [value, low[name], high[name]] for name, value in change(both).items()}


def _stats(results: Sequence[ModelResult]) -> BinStatistics:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *(result.stats for result in results))


def _pooled_gap(stats: BinStatistics) -> Any:
    return calib_jax.average_calibration_error(stats.sum())[0]


def _gap_per_image(stats: BinStatistics) -> Any:
    return jax.numpy.nanmean(calib_jax.average_calibration_error(stats)[:, 0])


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
    results: dict[str, list[ModelResult]] = {}
    for entry in options.comparisons:
        name, _, folder = entry.partition("=")
        files = sorted(Path(folder).glob("*/test.npz")) if folder else []
        if not files:
            parser.error(f"{entry}: give NAME=FOLDER, where FOLDER/LOSS/test.npz are written by `compare`.")
        for file in files:
            results.setdefault(f"{name} {file.parent.name}", []).append(ModelResult.load(file))
    if options.baseline not in {None, *results}:
        parser.error(
            f"--baseline {options.baseline!r} is no row. Choose from {', '.join(map(repr, results))}."
        )
    rows = {name: gaps(parts) for name, parts in results.items()}
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

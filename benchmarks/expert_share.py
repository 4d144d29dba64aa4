"""How far predicted probabilities lie from the share of the experts: `python -m benchmarks.expert_share`.

    python -m benchmarks.expert_share majority=runs/majority average=runs/average --out gaps.json

Each folder is a comparison of `python -m train compare` on cases of several annotators, evaluated beside the share
of each class. Predicted probabilities fall into 20 bins. The gap of a bin is the distance between its mean
probability and its mean share of the experts. The mean absolute gap is taken over the bins of an image, then over
images; `pooled` puts the pixels of all images into one set of bins.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import calib_jax
from calib_jax.results import ModelResult


def gaps(result: ModelResult) -> dict[str, Any]:
    """The gaps of one network, over its first reported class."""
    pooled = result.stats.sum()
    metrics = {name: np.nanmean(values[:, 0]) for name, values in result.metrics().items()}
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
        "gap_of_each_image": result.metrics()["ACE"][:, 0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How far predicted probabilities lie from the share of the experts."
    )
    parser.add_argument("comparisons", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = {}
    for name, folder in (entry.split("=", 1) for entry in options.comparisons):
        for file in sorted(Path(folder).glob("*/test.npz")):
            rows[f"{name} {file.parent.name}"] = gaps(ModelResult.load(file))
    for name, row in rows.items():
        figures = " ".join(f"{key} {row[key]:.4f}" for key in row if key.startswith(("gap_p", "dice")))
        print(f"{name}: {figures}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1, default=lambda x: np.round(x, 6).tolist()) + "\n")


if __name__ == "__main__":
    main()

"""Numbers and comparisons in words, the same in the terminal and on the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from calib_jax.report.table import CONFIDENCE, Change, ModelRow, Summary
from calib_jax.results import HIGHER_IS_BETTER

MINUS = "\N{MINUS SIGN}"


DEFINITIONS: Final[Mapping[str, str]] = {
    "Dice": "Twice the number of voxels in both label maps, divided by the sum of their sizes: "
    "2 |A ∩ B| / (|A| + |B|). The prediction is the class of the largest probability or, for regions that overlap, "
    "every region above 1/2.",
    "ACE": "Average calibration error. Voxels are sorted into bins by their probability. The gap of a bin is the "
    "difference between its mean probability and the share of its voxels that have the class. ACE is the mean gap "
    "of all bins that are not empty, for one case and class.",
    "ECE": "Expected calibration error: the mean gap over voxels, so that full bins count more. Most voxels are "
    "easy background, and so it is small.",
    "MCE": "Maximum calibration error: the largest gap of a bin that is not empty.",
    "Brier": "Brier score of a class: the mean over voxels of (probability − truth)², where the truth is 1 inside "
    "of the class and 0 outside. It falls with better calibration and with better separation of the classes.",
    "NLL": "Negative log-likelihood: the mean over voxels of −log of the probability that the true class got, in "
    "nats. Classes that exclude each other share one value per case. Regions that overlap have one each.",
    "Over-confidence": "The mean over bins that are not empty of mean probability − observed frequency, with its "
    "sign turned for bins below 1/2. Positive: probabilities are too close to 0 and 1. Negative: they are "
    "too close to 1/2.",
    "Near borders": "Voxels within two voxels of a border between labels, stepping from face to face.",
    "Expected Dice": "Soft Dice confidence (arXiv 2402.10665): 2 Σ p ŷ / (Σ p + Σ ŷ) with the probabilities p and "
    "the predicted mask ŷ. It needs no label.",
    "Expected volume": "The sum of the probabilities of a class, times the volume of a voxel.",
    "Interval": "95% bootstrap over cases: the range of the mean over samples of cases drawn with replacement. "
    "Voxels of one case depend on each other, so cases are drawn and not voxels. Where it is known which cases are "
    "of one subject, subjects are drawn, each with all cases.",
    "p": "Wilcoxon signed-rank test over the cases that both models have, or over the means of their subjects.",
}
_FURTHER: Final = ("Over-confidence", "Near borders", "Expected Dice", "Expected volume", "Interval", "p")


def definitions(rows: Sequence[ModelRow]) -> dict[str, str]:
    """Definition of every number on the page."""
    return {name: text for name, text in DEFINITIONS.items() if name in rows[0].metrics or name in _FURTHER}


def number(value: float) -> str:
    """Three decimals, or `n/a` for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.3f}".replace("-", MINUS)


def direction(metric: str) -> str:
    """Which values of a metric are better, in words."""
    return f"{'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better"


def interval(low: float, high: float) -> str:
    """`[low, high]`, or "" where there is no interval."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{number(low)}, {number(high)}]"


def percent(relative: float) -> str:
    """A relative change without its sign: `61%`, `0.4%` below one percent."""
    if math.isnan(relative):
        return "n/a"
    size = abs(100 * relative)
    return f"{size:.1f}%" if 0.05 <= size < 0.95 else f"{size:.0f}%"


def signed_percent(relative: float) -> str:
    """A relative change with its sign.

    Example:
        >>> signed_percent(-0.612), signed_percent(0.004), signed_percent(0.0001)
        ('−61%', '+0.4%', '0%')
    """
    text = percent(relative)
    return text if text in ("0%", "n/a") else f"{MINUS if relative < 0 else '+'}{text}"


def p_value(p: float) -> str:
    """A p-value with its relation.

    Example:
        >>> p_value(0.00002), p_value(0.0123), p_value(0.34)
        ('p < 0.001', 'p = 0.012', 'p = 0.34')
    """
    if math.isnan(p):
        return "p n/a"
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def change(comparison: Change) -> str:
    """A change from the baseline on one line: `−61%, p < 0.001`."""
    return f"{signed_percent(comparison.relative)}, {p_value(comparison.p_value)}"


def spread(summary: Summary) -> str:
    """Spread over the repeats of a model: `±0.004, 3 repeats`; "" for a model trained once."""
    repeats = len(summary.per_repeat)
    return f"±{number(summary.spread)}, {count(repeats, 'repeat')}" if repeats > 1 else ""


def count(n: int, noun: str) -> str:
    """`1 case`, `2 cases`, `1 class`, `2 classes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def headline(rows: Sequence[ModelRow]) -> str:
    """The comparison in a sentence or two: the best calibrated model (lowest ACE) against the baseline."""
    base, best = base_and_best(rows)
    ace, mce, dice = (best.metrics[name] for name in ("ACE", "MCE", "Dice"))
    if ace.change is None or mce.change is None or dice.change is None:
        return (
            f"“{base.name}” has an ACE of {number(ace.mean)}, an MCE of {number(mce.mean)} and a Dice of "
            f"{number(dice.mean)} over {count(ace.cases, 'case')}."
        )
    first, second = _movement("ACE", ace.change), _movement("MCE", mce.change)
    same = first.split()[0] == second.split()[0] and first.split()[0] != "leaves"
    both = f"{first} and {second.removeprefix(second.split()[0] + ' ')}" if same else f"{first} and {second}"
    text = f"Compared with “{base.name}”, “{best.name}” {both}; Dice {_dice_movement(dice.change)}."
    if ace.change.p_value < 0.05:
        return text
    return (
        f"{text} Over {count(ace.change.pairs, 'paired case')} the change in ACE cannot be told from chance "
        f"({p_value(ace.change.p_value)})."
    )


def base_and_best(rows: Sequence[ModelRow]) -> tuple[ModelRow, ModelRow]:
    """The baseline and the other model with the lowest ACE; the baseline twice if there is no other."""
    base = next(row for row in rows if row.role == "baseline")
    others = [row for row in rows if row.role == "model" and not math.isnan(row.metrics["ACE"].mean)]
    return base, min(others, key=lambda row: row.metrics["ACE"].mean, default=base)


def footnote(rows: Sequence[ModelRow]) -> list[str]:
    """How the numbers of a table were computed, one sentence each."""
    shared = any(x.subjects < x.cases for row in rows for x in row.metrics.values())
    unit = "subjects, each of whom is drawn with all cases" if shared else "cases"
    lines = [
        f"Mean over cases of the mean over classes, with its {CONFIDENCE:.0%} bootstrap interval over {unit}.",
        "A case or class in which nothing was counted is left out.",
    ]
    if any(summary.per_repeat for row in rows for summary in row.metrics.values()):
        lines.append(
            "Of a model trained several times, a case's figure is the mean over these repeats, and ± the standard "
            "deviation over them of the mean over cases."
        )
    if any(row.role == "model" for row in rows):
        base, _ = base_and_best(rows)
        lines.append(
            f"Changes are against “{base.name}”, p from a Wilcoxon signed-rank test over paired "
            f"{'means of subjects' if shared else 'cases'}, not corrected for several comparisons."
        )
    return lines


def _movement(metric: str, comparison: Change) -> str:
    amount = percent(comparison.relative)
    if amount in ("0%", "n/a"):
        return f"leaves {metric} as it was"
    return f"{'raises' if comparison.difference > 0 else 'cuts'} {metric} by {amount}"


def _dice_movement(comparison: Change) -> str:
    if abs(comparison.difference) < 0.0005:
        return "stays the same"
    return f"changes by {'+' if comparison.difference > 0 else ''}{number(comparison.difference)}"

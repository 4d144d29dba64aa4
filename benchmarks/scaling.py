"""Growth of the cost of mL1-ACE per voxel and class with voxels, bins and classes, beside MONAI's."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from benchmarks import loss, timing
from benchmarks.options import Scaling
from train.console import format_table

TARGET = 1.3
"""Largest growth of the cost along an axis that meets the target."""
REFERENCE = "monai"
_SIDES = (loss.OURS, REFERENCE)


def run(options: Scaling) -> None:
    """Measures every axis, prints the growth of the cost and writes the results and their plot."""
    from benchmarks import plots, reference

    reference.at_its_fastest()
    fixed = {
        "voxels": options.fixed_voxels,
        "bins": options.fixed_bins,
        "classes": options.fixed_classes,
    }
    axes = {axis: _measure(options, axis, fixed) for axis in fixed}
    growths, quickest = (
        {
            axis: {side: growth([point["cost"][side][which] for point in points]) for side in _SIDES}
            for axis, points in axes.items()
        }
        for which in ("median", "min")
    )
    print(format_table([_row(axis, point) for axis, points in axes.items() for point in points]))
    for axis, values in growths.items():
        figures = ", ".join(
            f"{side} {value:.2f} ({quickest[axis][side]:.2f} of the quickest)"
            for side, value in values.items()
        )
        print(f"cost per voxel and class grows with {axis} by at most: {figures}; target {TARGET}")
    results = {"unit": "s per voxel and class", "target": TARGET, "fixed": fixed}
    results |= {"growth": growths, "growth_of_quickest": quickest, **axes}
    timing.write_results(options.out, results)
    plots.save(plots.scaling(axes, growths), options.out)


def _measure(options: Scaling, axis: str, fixed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Measures all points of an axis in every round, so that a change of the machine's speed affects all points."""
    points = [_Point(axis, options.least, **{**fixed, axis: value}) for value in getattr(options, axis)]
    programs = {
        (i, side): program for i, point in enumerate(points) for side, program in point.programs.items()
    }
    samples = timing.interleaved(
        programs, warmup=options.warmup, rounds=options.rounds, title=f"against {axis}"
    )
    return [point.results({side: samples[i, side] for side in _SIDES}) for i, point in enumerate(points)]


def growth(costs: Sequence[float]) -> float:
    """Largest ratio of a cost to an earlier one; 1 or less if no cost rises."""
    return max((after / before for before, after in combinations(costs, 2)), default=1.0)


class _Point:
    """A point of an axis: both programs, checked and repeated, and the results from their times."""

    def __init__(self, axis: str, least: int, *, voxels: int, bins: int, classes: int) -> None:
        side = round(voxels ** (1 / 3))
        self.axis = axis
        self.value = {"voxels": side**3, "bins": bins, "classes": classes}[axis]
        self.elements = classes * side**3
        self.repeats = math.ceil(least / self.elements)
        programs, self.errors = _checked_programs((1, classes, side, side, side), bins)
        self.programs = {side: _repeated(program, self.repeats) for side, program in programs.items()}

    def results(self, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        seconds = {side: [s / self.repeats for s in values] for side, values in samples.items()}
        costs = {side: timing.spread([s / self.elements for s in values]) for side, values in seconds.items()}
        return {
            self.axis: self.value,
            "cost": costs,
            "ratio": timing.ratio_spread(seconds, *_SIDES),
            "loss_error": self.errors,
            "seconds": seconds,
        }


def _checked_programs(
    shape: tuple[int, ...], num_bins: int
) -> tuple[dict[str, loss.Program], dict[str, float]]:
    """Both programs, checked to agree. Voxels spread over all bins, so that float32 counters hold their number."""
    from benchmarks import reference

    data = loss.make_data(shape, "uniform")
    theirs = reference.ace_program(reference.ACE_LOSSES[REFERENCE], reference.ace_inputs(*data), num_bins)
    programs = {loss.OURS: loss.our_program(data, num_bins), REFERENCE: theirs}
    return programs, loss.check_agreement(programs, loss.exact_loss(data, num_bins))


def _repeated(program: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            program()

    return run


def _row(axis: str, point: Mapping[str, Any]) -> dict[str, str]:
    cost, ratio = point["cost"], point["ratio"]
    return {
        "": f"{point[axis]} {axis}",
        **{f"{side} ns": f"{1e9 * cost[side]['median']:.2f}" for side in _SIDES},
        f"/ {REFERENCE}": f"{ratio['median']:.2f}",
        "q1": f"{ratio['q1']:.2f}",
        "q3": f"{ratio['q3']:.2f}",
    }

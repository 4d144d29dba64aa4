"""How the cost of mL1-ACE per voxel and class grows with voxels, bins and classes, beside MONAI's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks import loss, timing

TARGET = 1.3
"""What the cost may grow by along an axis."""
REFERENCE = "monai"


@dataclass(frozen=True)
class Scaling:
    """Time of mL1-ACE forward and backward per voxel and class against voxels, bins and classes, beside MONAI's.

    Growth is the largest rise of that cost from one point of an axis to any later one: of the medians, and of the
    quickest samples, which a machine that changes its speed between two points leaves alone.
    """

    voxels: tuple[int, ...] = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
    """Voxels of the image, rounded to a cube."""
    bins: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Bins."""
    classes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Classes."""
    fixed_voxels: int = 1_000_000
    """Voxels where bins or classes vary."""
    fixed_bins: int = 20
    """Bins where voxels or classes vary."""
    fixed_classes: int = 4
    """Classes where voxels or bins vary."""
    least: int = 4_000_000
    """Voxels times classes in a sample: smaller inputs are computed several times in it, or it would be the
    wake-up of threads that is measured."""
    rounds: int = 7
    """Timed rounds; each calls both programs."""
    warmup: int = 1
    """Rounds before these."""
    out: Path = Path("benchmarks/results/scaling.json")
    """Where the results go, as JSON; the plot goes beside it, as PNG."""

    def run(self) -> None:
        from benchmarks import plots, reference

        reference.use_all_cores()
        fixed = {"voxels": self.fixed_voxels, "bins": self.fixed_bins, "classes": self.fixed_classes}
        axes = {axis: self._measure(axis, fixed) for axis in fixed}
        growths, quickest = (
            {
                axis: {who: growth([point["cost"][who][which] for point in points]) for who in _WHO}
                for axis, points in axes.items()
            }
            for which in ("median", "min")
        )
        self._report(axes, growths, quickest, fixed, plots)

    def _report(
        self,
        axes: Mapping[str, Any],
        growths: Mapping[str, Any],
        quickest: Mapping[str, Any],
        fixed: Mapping[str, int],
        plots: Any,
    ) -> None:
        print(timing.format_table([_row(axis, point) for axis, points in axes.items() for point in points]))
        for axis, values in growths.items():
            figures = ", ".join(
                f"{who} {value:.2f} ({quickest[axis][who]:.2f} of the quickest)"
                for who, value in values.items()
            )
            print(f"cost per voxel and class grows with {axis} by at most: {figures}; target {TARGET}")
        results = {"unit": "s per voxel and class", "target": TARGET, "fixed": fixed}
        results |= {"growth": growths, "growth_of_quickest": quickest, **axes}
        timing.write_results(self.out, results)
        print(f"written to {self.out} and {plots.save(plots.scaling(axes, growths), self.out)}")

    def _measure(self, axis: str, fixed: Mapping[str, int]) -> list[dict[str, Any]]:
        """All points of an axis in every round, so that a machine that changes its speed does so for all."""
        points = [_Point(axis, self.least, **{**fixed, axis: value}) for value in getattr(self, axis)]
        programs = {
            (i, who): program for i, point in enumerate(points) for who, program in point.programs.items()
        }
        samples = timing.interleaved(
            programs, warmup=self.warmup, rounds=self.rounds, title=f"against {axis}"
        )
        return [point.results({who: samples[i, who] for who in _WHO}) for i, point in enumerate(points)]


_WHO = (loss.OURS, REFERENCE)


def growth(costs: Sequence[float]) -> float:
    """Largest rise from a cost to a later one; 1 or less where none rises."""
    return max((after / before for before, after in combinations(costs, 2)), default=1.0)


class _Point:
    """A point of an axis: both programs, checked and repeated, and what their times come to."""

    def __init__(self, axis: str, least: int, *, voxels: int, bins: int, classes: int) -> None:
        side = round(voxels ** (1 / 3))
        self.axis = axis
        self.value = {"voxels": side**3, "bins": bins, "classes": classes}[axis]
        self.elements = classes * side**3
        self.repeats = math.ceil(least / self.elements)
        programs, self.errors = _checked_programs((1, classes, side, side, side), bins)
        self.programs = {who: _repeated(program, self.repeats) for who, program in programs.items()}

    def results(self, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        seconds = {who: [s / self.repeats for s in values] for who, values in samples.items()}
        costs = {who: timing.spread([s / self.elements for s in values]) for who, values in seconds.items()}
        return {
            self.axis: self.value,
            "cost": costs,
            "ratio": timing.ratio_spread(seconds, *_WHO),
            "loss_error": self.errors,
            "seconds": seconds,
        }


def _checked_programs(
    shape: tuple[int, ...], num_bins: int
) -> tuple[dict[str, loss.Program], dict[str, float]]:
    """Both programs, which give the same numbers. Voxels are spread over the bins: float32 counters hold them."""
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
        **{f"{who} ns": f"{1e9 * cost[who]['median']:.2f}" for who in _WHO},
        f"/ {REFERENCE}": f"{ratio['median']:.2f}",
        "q1": f"{ratio['q1']:.2f}",
        "q3": f"{ratio['q3']:.2f}",
    }

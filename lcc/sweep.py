"""What an operator sweep in time gave along an axis, and where operators break even.

Source: arXiv:1805.07821, Fig. 1: time of a dense convolution over the time of an operator, against channels,
image size and kernel size. Every operator is timed whole here, its coupling of channels included, and in ONNX
Runtime as lowered for export.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lcc.measure import Conditions
from lcc.specs import Frozen
from lcc.sweep_axes import Axis, Shape
from lcc.timing import Latency, Speedup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Runtime = Literal["torch", "onnx"]


class Point(Frozen):
    """Latencies at one value of what is swept, the dense convolution's first, and the speed-ups over it."""

    value: int
    rounds: int
    latencies: dict[str, Latency]
    speedups: dict[str, Speedup]


class Crossing(Frozen):
    """From how many channels on an operator is faster: `below` the fewest or `above` the most measured."""

    relation: Literal["below", "about", "above"]
    channels: int

    def __str__(self) -> str:
        return f"{self.channels}" if self.relation == "about" else f"{self.relation} {self.channels}"


class BreakEven(Frozen):
    """Where the median speed-up crosses 1, and its 90th (`earliest`) and 10th (`latest`) percentile."""

    median: Crossing
    earliest: Crossing
    latest: Crossing


class Sweep(Frozen):
    """One axis in one runtime; `fixed` holds the numbers that are not swept.

    `break_even`: by operator, where channels are swept. `notes`: what was left out and why, in words.
    """

    axis: Axis
    runtime: Runtime
    fixed: Shape
    conditions: Conditions
    points: tuple[Point, ...]
    break_even: dict[str, BreakEven]
    notes: tuple[str, ...]

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators, in order."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.speedups))


def break_evens(points: Iterable[Point]) -> dict[str, BreakEven]:
    """Return the break-even of every operator of a sweep over channels."""
    by_name: dict[str, dict[int, Speedup]] = {}
    for point in points:
        for name, speedup in point.speedups.items():
            by_name.setdefault(name, {})[point.value] = speedup
    return {
        name: BreakEven(
            median=crossing({channels: speedup.median for channels, speedup in found.items()}),
            earliest=crossing({channels: speedup.p90 for channels, speedup in found.items()}),
            latest=crossing({channels: speedup.p10 for channels, speedup in found.items()}),
        )
        for name, found in by_name.items()
    }


def crossing(ratios: Mapping[int, float]) -> Crossing:
    """Return from how many channels on the speed-up stays at 1 or more.

    `ratios`: speed-up by number of channels. Interpolated linearly in the logarithms of both.
    """
    points = sorted(ratios.items())
    slower = [number for number, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return Crossing(relation="below", channels=points[0][0])
    if slower[-1] == len(points) - 1:
        return Crossing(relation="above", channels=points[-1][0])
    (few, low), (many, high) = points[slower[-1] : slower[-1] + 2]
    share = math.log(low) / (math.log(low) - math.log(high))
    return Crossing(relation="about", channels=round(few * (many / few) ** share))

"""What an operator sweep is: shapes to time along an axis, what came out, and where operators break even.

Source: arXiv:1805.07821, Fig. 1: time of a dense convolution over the time of an operator, against channels,
image size and kernel size. Every operator is timed whole here, its coupling of channels included, and in ONNX
Runtime as lowered for export.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from lcc.errors import RecipeError
from lcc.measure import Conditions
from lcc.specs import ConvSpec, Frozen, Size
from lcc.timing import Latency, Speedup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lcc.methods import Method

Axis = Literal["channels", "size", "kernel"]
Runtime = Literal["torch", "onnx"]

PAPER: dict[Axis, tuple[int, ...]] = {
    "channels": (64, 128, 256, 512, 1024),
    "size": (16, 32, 64, 128, 256),
    "kernel": (3, 5, 7, 9, 11),
}
SECONDS = 180.0


class Shape(Frozen):
    """What is convolved: `channels` in and out, size x size pixels, kernel x kernel taps.

    The defaults are the paper's.
    """

    channels: int = 256
    size: int = 64
    kernel: int = 3

    def at(self, axis: Axis, value: int) -> Shape:
        """Return the shape with one of its numbers changed."""
        return self.model_copy(update={axis: value})

    @property
    def spec(self) -> ConvSpec:
        """The dense convolution, stride 1, that keeps the image size."""
        return ConvSpec(
            in_channels=self.channels,
            out_channels=self.channels,
            kernel_size=(self.kernel, self.kernel),
            padding=(self.kernel // 2, self.kernel // 2),
        )

    @property
    def image(self) -> Size:
        """Height and width."""
        return Size(height=self.size, width=self.size)

    def __str__(self) -> str:
        return f"{self.spec} at {self.image}"


@dataclass(frozen=True)
class SweepOptions:
    """What is swept and with which methods; `fixed` gives the numbers that are not swept.

    `seconds`: the longest time for one point in one runtime. It lowers the number of rounds; what would still
    take longer is left out.
    """

    axes: Mapping[Axis, tuple[int, ...]]
    methods: tuple[Method, ...]
    fixed: Shape = field(default_factory=Shape)
    seconds: float = SECONDS


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


def axes_from_text(texts: Iterable[str]) -> dict[Axis, tuple[int, ...]]:
    """Return the values along each axis named by "channels", "channels=64,128" or "all".

    Raises: RecipeError: no such axis, or no such value.
    """
    axes: dict[Axis, tuple[int, ...]] = {}
    for text in texts:
        if text == "all":
            axes |= PAPER
            continue
        where = f"--sweep {text}"
        name, equals, values = text.partition("=")
        axis = _axis(name, where)
        axes[axis] = _numbers(axis, values, where) if equals else PAPER[axis]
    return axes


def shape_from_text(text: str) -> Shape:
    """Return the shape that "channels=256,size=64,kernel=3" or less of it names.

    Raises: RecipeError: no such axis, or no such value.
    """
    shape, where = Shape(), f"--fixed {text}"
    for part in text.split(","):
        name, _, value = part.partition("=")
        axis = _axis(name, where)
        shape = shape.at(axis, _number(axis, value, where))
    return shape


def _axis(text: str, where: str) -> Axis:
    found: dict[str, Axis] = {axis: axis for axis in get_args(Axis)}
    if text.strip() not in found:
        raise RecipeError(f"{where}: {text.strip()!r} can't be swept; known: {', '.join(found)}")
    return found[text.strip()]


def _numbers(axis: Axis, text: str, where: str) -> tuple[int, ...]:
    return tuple(sorted({_number(axis, part, where) for part in text.split(",")}))


def _number(axis: Axis, text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RecipeError(f"{where}: {text.strip()!r} is no whole number from 1 up; write {axis}=N")
    if axis == "kernel" and int(text) % 2 == 0:
        raise RecipeError(f"{where}: an even kernel changes the image size; give odd ones, such as 3,5,7")
    return int(text)

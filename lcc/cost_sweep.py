"""What operators cost along an axis, dense ones beside them, and how fast that grows. Counted, not timed.

Growth is what a method is chosen for: with the width, a convolution's cost grows by 4 per doubling, that of
an operator which mixes all channels too, and by 2 where each channel sees a fixed number of others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lcc.errors import RecipeError
from lcc.specs import Cost, Frozen
from lcc.sweep_axes import ALONE, Axis, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lcc.methods import Method
    from lcc.specs import ConvSpec, SiteKind, StepSpec
    from lcc.sweep_axes import SweepOptions

Form = Literal["conv", "block"]

DENSE = "dense"
FORMS: dict[Form, SiteKind] = {"conv": "conv", "block": "step"}


class Growth(Frozen):
    """How many times as much for every doubling of what is swept, since the last value that has a cost."""

    params: float
    macs: float


class CostPoint(Frozen):
    """The cost of an operator at one value of what is swept, or in words why there is none."""

    value: int
    cost: Cost | None = None
    per_doubling: Growth | None = None
    why_not: str | None = None


class CostLine(Frozen):
    """One operator along an axis: in place of a convolution, or of a ResNet's basic block of two."""

    operator: str
    form: Form
    points: tuple[CostPoint, ...]

    @property
    def name(self) -> str:
        """Operator and form, as "mgic (block)"."""
        return f"{self.operator} ({self.form})"

    @property
    def counted(self) -> bool:
        """Whether there is a cost at any value."""
        return any(point.cost is not None for point in self.points)

    @property
    def last_growth(self) -> Growth | None:
        """Growth up to the largest value."""
        return next((point.per_doubling for point in reversed(self.points) if point.per_doubling), None)

    def at(self, value: int) -> Cost | None:
        """Return the cost at a value."""
        return next((point.cost for point in self.points if point.value == value), None)


class CostSweep(Frozen):
    """One axis; `fixed` holds the numbers that are not swept. In each form the dense line comes first."""

    axis: Axis
    fixed: Shape
    values: tuple[int, ...]
    lines: tuple[CostLine, ...]

    @property
    def counted(self) -> tuple[CostLine, ...]:
        """The lines that have a cost at any value."""
        return tuple(line for line in self.lines if line.counted)

    def dense(self, form: Form) -> CostLine:
        """Return what every operator of a form is compared with."""
        return next(line for line in self.lines if line.operator == DENSE and line.form == form)

    def gaps(self) -> tuple[str, ...]:
        """Return in a line each what has no cost and why, and at which values where not at all of them."""
        found: dict[str, list[int]] = {}
        for line in self.lines:
            for point in line.points:
                if point.why_not is not None:
                    found.setdefault(f"{line.name}: left out: {point.why_not}", []).append(point.value)
        return tuple(
            text if len(at) == len(self.values) else f"at {self.axis} {', '.join(map(str, at))}: {text}"
            for text, at in found.items()
        )


def count_costs(options: SweepOptions) -> tuple[CostSweep, ...]:
    """Count every method along every axis, in place of a convolution and of a basic block, as far as it goes.

    Kinds of site that a method takes by name only are left out: they are not what it is for.
    Raises: RecipeError: none of the methods can stand in for any of the shapes.
    """
    sweeps = tuple(
        CostSweep(axis=axis, fixed=options.fixed, values=values, lines=_lines(axis, values, options))
        for axis, values in options.axes.items()
    )
    if not any(sweep.counted for sweep in sweeps):
        said = dict.fromkeys(text for sweep in sweeps for text in sweep.gaps())
        raise RecipeError(f"the sweep has nothing to count: {'; '.join(said)}")
    return sweeps


def _lines(axis: Axis, values: tuple[int, ...], options: SweepOptions) -> tuple[CostLine, ...]:
    shapes = {value: options.fixed.at(axis, value) for value in values}
    lines: list[CostLine] = []
    for form, kind in FORMS.items():
        methods = dict.fromkeys(options.methods)
        named = [_line(m, form, shapes) for m in methods if kind in m.kinds - m.by_name_only]
        if any(line.counted for line in named):
            lines.append(_line(None, form, shapes))
        lines += named
    return tuple(lines)


def _line(method: Method | None, form: Form, shapes: Mapping[int, Shape]) -> CostLine:
    """Return what a method costs in a form at all shapes; no method is dense."""
    points = (_point(value, shape, form, method) for value, shape in shapes.items())
    return CostLine(operator=DENSE if method is None else str(method), form=form, points=_grown(points))


def _point(value: int, shape: Shape, form: Form, method: Method | None) -> CostPoint:
    spec: ConvSpec | StepSpec = shape.spec if form == "conv" else shape.block
    if method is None:
        return CostPoint(value=value, cost=spec.cost(shape.image))
    why_not = ALONE if method.shares else method.why_not(spec)
    if why_not is not None:
        return CostPoint(value=value, why_not=why_not)
    return CostPoint(value=value, cost=method.cost(spec, shape.image))


def _grown(points: Iterable[CostPoint]) -> tuple[CostPoint, ...]:
    """Return the points, each with its growth since the last one that has a cost."""
    found: list[CostPoint] = []
    before: CostPoint | None = None
    for point in points:
        growth = None if before is None else _growth(before, point)
        found.append(point.model_copy(update={"per_doubling": growth}))
        before = before if point.cost is None else point
    return tuple(found)


def _growth(before: CostPoint, after: CostPoint) -> Growth | None:
    if before.cost is None or after.cost is None:
        return None
    doublings = math.log2(after.value / before.value)
    return Growth(
        params=(after.cost.params / before.cost.params) ** (1 / doublings),
        macs=(after.cost.macs / before.cost.macs) ** (1 / doublings),
    )

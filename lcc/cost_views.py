"""What operators cost along an axis: as tables, as rows of a CSV, and as a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lcc.cost_sweep import DENSE
from lcc.plots import COLOURS, GREY, MARKERS, save, scale_
from lcc.sweep_axes import LABELS, fixed_in_words
from lcc.tables import BAD, GOOD, QUIET, TIMES, UNKNOWN, Cell, Sheet, change, si

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lcc.cost_sweep import CostLine, CostSweep

Count = Literal["params", "macs"]

COUNTS: dict[Count, str] = {"params": "parameters", "macs": "MACs per image"}
STYLES = {"conv": "-", "block": "--"}
GUIDES = {"linear": 1, "quadratic": 2}
TITLE, LABEL, LINE = 10, 8, 1.3  # points, and how much higher than a letter its line is
PANEL = 3.6  # inches


def cost_sheets(sweeps: Sequence[CostSweep]) -> list[Sheet]:
    """Return for every axis a table of parameters and one of MACs: a row for each operator."""
    return [_sheet(sweep, count) for sweep in sweeps for count in COUNTS]


def _sheet(sweep: CostSweep, count: Count) -> Sheet:
    dearer = False
    rows = []
    for line in sweep.counted:
        cells = [_cell(sweep, line, value, count) for value in sweep.values]
        dearer = dearer or any(cell.style == BAD for cell in cells)
        rows.append((Cell(line.name), *cells, _growth(line, count)))
    held = fixed_in_words(sweep.fixed, {sweep.axis})
    notes = [
        f"conv: in place of one convolution; block: of a basic block of two; {held}",
        f"per doubling of {LABELS[sweep.axis]}: how many times as much, from the first two to the last two",
    ]
    if dearer:
        notes.append("! more than dense, so that `lcc convert` would keep that")
    return Sheet(
        title=COUNTS[count],
        headers=(LABELS[sweep.axis], *map(str, sweep.values), "per doubling"),
        rows=tuple(rows),
        notes=(*notes, *sweep.gaps()),
    )


def _cell(sweep: CostSweep, line: CostLine, value: int, count: Count) -> Cell:
    cost, dense = line.at(value), sweep.dense(line.form).at(value)
    if cost is None or dense is None:
        return Cell(UNKNOWN, QUIET)
    number, before = getattr(cost, count), getattr(dense, count)
    if number > before:
        return Cell(f"{si(number)} !", BAD)
    return Cell(si(number), GOOD if number < before else "")


def _growth(line: CostLine, count: Count) -> Cell:
    """Return the growth where the values begin and where they end."""
    found = [
        f"{getattr(point.per_doubling, count):.2f}{TIMES}" for point in line.points if point.per_doubling
    ]
    if not found:
        return Cell(UNKNOWN, QUIET)
    return Cell(found[0] if len(set(found)) == 1 else change(found[0], found[-1]))


def to_rows(sweeps: Sequence[CostSweep]) -> list[dict[str, object]]:
    """Return a row for every operator at every value; None is not known, and `why_not` says why."""
    return [
        {
            "axis": sweep.axis,
            **dict(sweep.fixed.at(sweep.axis, point.value)),
            "operator": line.operator,
            "form": line.form,
            "params": point.cost and point.cost.params,
            "macs": point.cost and point.cost.macs,
            "params_per_doubling": point.per_doubling and point.per_doubling.params,
            "macs_per_doubling": point.per_doubling and point.per_doubling.macs,
            "why_not": point.why_not,
        }
        for sweep in sweeps
        for line in sweep.lines
        for point in line.points
    ]


class _End(NamedTuple):
    """Where a line ends on the right, and what is written there."""

    value: float
    number: float
    text: str
    colour: str


def write_plot(sweeps: Sequence[CostSweep], path: Path) -> None:
    """Write a plot: a row for each axis with something counted, parameters on the left, MACs on the right.

    All scales are logarithmic, so that a slope is an exponent; each line bears its name and its growth.
    Raises: RecipeError: it can't be written.
    """
    from matplotlib.figure import Figure

    conditions = _conditions(sweeps)
    sweeps = [sweep for sweep in sweeps if sweep.counted]
    looks = _looks(sweeps)
    most = len(GUIDES) + max(len(sweep.counted) for sweep in sweeps)
    height = max(PANEL, most * LABEL * LINE / 72)
    figure = Figure(figsize=(12, 0.6 + (0.5 + height) * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), len(COUNTS), squeeze=False)
    for row, sweep in zip(panels, sweeps, strict=True):
        for panel, count in zip(row, COUNTS, strict=True):
            ends = [*_draw_(panel, sweep, count, looks), *_guide_(panel, sweep, count)]
            _scale_(panel, sweep, count)
            _label_(panel, ends, LABEL * LINE / 72 / height)
    save(figure, path, conditions)


def _looks(sweeps: Sequence[CostSweep]) -> dict[str, dict[str, str]]:
    """Return the colour and the marker of each operator; dense is black."""
    names = dict.fromkeys(line.operator for sweep in sweeps for line in sweep.counted)
    *colours, black = COLOURS
    markers, cross = MARKERS[:-1], MARKERS[-1]
    looks = {DENSE: {"color": black, "marker": cross}}
    for i, name in enumerate(name for name in names if name != DENSE):
        looks[name] = {"color": colours[i % len(colours)], "marker": markers[i % len(markers)]}
    return looks


def _draw_(panel: Any, sweep: CostSweep, count: Count, looks: dict[str, dict[str, str]]) -> list[_End]:
    """Draw every line, broken where there is a gap; return where they end."""
    ends = []
    for line in sweep.counted:
        costs = [line.at(value) for value in sweep.values]
        numbers = [math.nan if cost is None else getattr(cost, count) for cost in costs]
        look = looks[line.operator]
        panel.plot(sweep.values, numbers, markersize=4, linewidth=1.3, linestyle=STYLES[line.form], **look)
        value, number = [at for at in zip(sweep.values, numbers, strict=True) if at[1] > 0][-1]
        growth = line.last_growth
        text = line.name if growth is None else f"{line.name}  {getattr(growth, count):.2f}{TIMES}"
        ends.append(_End(value, number, text, look["color"]))
    return ends


def _guide_(panel: Any, sweep: CostSweep, count: Count) -> list[_End]:
    """Show, from a point below all lines, what linear and quadratic growth are; return where they end."""
    first, last = sweep.values[0], sweep.values[-1]
    if first == last:
        return []
    costs = [line.at(value) for line in sweep.counted for value in sweep.values]
    lowest = 0.6 * min(getattr(cost, count) for cost in costs if cost is not None)
    ends = []
    for name, power in GUIDES.items():
        number = lowest * (last / first) ** power
        panel.plot([first, last], [lowest, number], color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        ends.append(_End(last, number, f"{name}  {2**power:.2f}{TIMES}", GREY))
    return ends


def _scale_(panel: Any, sweep: CostSweep, count: Count) -> None:
    """Give a panel its scales and their names."""
    from matplotlib.ticker import LogLocator

    scale_(panel, sweep.values)
    panel.set_yscale("log", base=10)
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    panel.yaxis.set_major_formatter(lambda number, _: si(number, 1))
    panel.yaxis.minorticks_off()
    panel.tick_params(labelsize=LABEL)
    panel.set_title(COUNTS[count], fontsize=TITLE)
    panel.set_xlabel(LABELS[sweep.axis], fontsize=TITLE)


def _label_(panel: Any, ends: Sequence[_End], apart: float) -> None:
    """Write on the right what each line is; labels lie at least `apart`, in heights of the panel."""
    low, high = (math.log(end) for end in panel.get_ylim())
    rising = sorted(ends, key=lambda end: end.number)
    heights = spread([(math.log(end.number) - low) / (high - low) for end in rising], apart)
    for end, height in zip(rising, heights, strict=True):
        panel.annotate(
            end.text,
            (end.value, end.number),
            xytext=(1.08, height),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL,
            color=end.colour,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Return rising heights from 0 to 1, moved as little as it takes (least squares) to lie `apart`."""
    from scipy.optimize import isotonic_regression

    steps = [number * apart for number in range(len(heights))]
    rising = isotonic_regression([h - step for h, step in zip(heights, steps, strict=True)]).x
    room = max(0.0, 1.0 - steps[-1])
    return [min(max(float(h), 0.0), room) + step for h, step in zip(rising, steps, strict=True)]


def _conditions(sweeps: Sequence[CostSweep]) -> list[str]:
    """Return in lines what the axes don't say."""
    swept = {sweep.axis for sweep in sweeps}
    held = fixed_in_words(sweeps[0].fixed, swept if len(swept) == 1 else ())
    gaps = dict.fromkeys(text for sweep in sweeps for text in sweep.gaps())
    return [
        f"conv: in place of one convolution; block: of a basic block of two; where not swept: {held}",
        f"{TIMES} in a label: how many times as much per doubling of what is swept, at the end of the line",
        *gaps,
    ]

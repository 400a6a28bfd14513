"""Operator sweeps as tables and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lcc.plots import COLOURS, MARKERS, save, scale_
from lcc.sweep_axes import LABELS, fixed_in_words
from lcc.tables import BAD, GOOD, NOISE, QUIET, TIMES, UNKNOWN, Cell, Sheet, ms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lcc.sweep import BreakEven, Point, Runtime, Sweep

RUNTIMES: dict[Runtime, str] = {"torch": "eager torch", "onnx": "ONNX Runtime"}


def sweep_sheets(sweeps: Sequence[Sweep]) -> list[Sheet]:
    """Return a table for every sweep, and one of the break-evens where channels were swept."""
    sheets = [_sweep_sheet(sweep) for sweep in sweeps]
    over_channels = [sweep for sweep in sweeps if sweep.break_even]
    return [*sheets, _break_even_sheet(over_channels)] if over_channels else sheets


def _sweep_sheet(sweep: Sweep) -> Sheet:
    """Return a row for each value and one for its spread, a column for each operator."""
    rows: list[tuple[Cell, ...]] = []
    for point in sweep.points:
        names = sweep.operators
        rows += [
            (Cell(str(point.value)), _dense(point), *(_median(point, name) for name in names)),
            (Cell("  p10 to p90", QUIET), _dense_spread(point), *(_spread(point, name) for name in names)),
        ]
    noisy = any(latency.noisy for point in sweep.points for latency in point.latencies.values())
    return Sheet(
        title=f"speed-up over dense, {RUNTIMES[sweep.runtime]}",
        headers=(LABELS[sweep.axis], "dense ms", *sweep.operators),
        rows=tuple(rows),
        notes=(
            f"time of a dense convolution over an operator's; {fixed_in_words(sweep.fixed, {sweep.axis})}",
            *sweep.notes,
            *((f"~ {NOISE}",) if noisy else ()),
            str(sweep.conditions),
        ),
    )


def _dense(point: Point) -> Cell:
    latency = next(iter(point.latencies.values()))
    return Cell(f"{'~ ' * latency.noisy}{ms(latency.median_ms)}")


def _dense_spread(point: Point) -> Cell:
    latency = next(iter(point.latencies.values()))
    return Cell(f"{ms(latency.p10_ms)} to {ms(latency.p90_ms)}", QUIET)


def _median(point: Point, name: str) -> Cell:
    speedup = point.speedups.get(name)
    if speedup is None:
        return Cell(UNKNOWN, QUIET)
    noisy = "~ " * point.latencies[name].noisy
    return Cell(f"{noisy}{speedup.median:.2f}{TIMES}", GOOD if speedup.median >= 1 else BAD)


def _spread(point: Point, name: str) -> Cell:
    speedup = point.speedups.get(name)
    return Cell("" if speedup is None else f"{speedup.p10:.2f} to {speedup.p90:.2f}{TIMES}", QUIET)


def _break_even_sheet(sweeps: Sequence[Sweep]) -> Sheet:
    names = dict.fromkeys(name for sweep in sweeps for name in sweep.operators)
    return Sheet(
        title="break-even channels",
        headers=("operator", *(RUNTIMES[sweep.runtime] for sweep in sweeps)),
        rows=tuple(
            (Cell(name), *(_break_even(sweep.break_even.get(name)) for sweep in sweeps)) for name in names
        ),
        notes=(
            "from how many channels on an operator is faster than dense, interpolated between those timed;",
            "in brackets where the 90th and the 10th percentile of the speed-up cross 1",
        ),
    )


def _break_even(found: BreakEven | None) -> Cell:
    if found is None:
        return Cell(UNKNOWN, QUIET)
    spread = f" ({found.earliest} to {found.latest})" if found.earliest != found.latest else ""
    return Cell(f"{found.median}{spread}", BAD if found.median.relation == "above" else GOOD)


def write_plot(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write a plot of speed-ups: a row for each runtime, a column for each axis, bands from p10 to p90.

    Raises: RecipeError: it can't be written.
    """
    from matplotlib.figure import Figure

    runtimes = list(dict.fromkeys(sweep.runtime for sweep in sweeps))
    axes = list(dict.fromkeys(sweep.axis for sweep in sweeps))
    names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.operators))
    looks = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    width = 1.5 + 3.3 * len(axes)
    figure = Figure(figsize=(width, 1.4 + 2.8 * len(runtimes)), layout="constrained")
    panels = figure.subplots(len(runtimes), len(axes), squeeze=False, sharey=True, sharex="col")
    lines: dict[str, Any] = {}
    for sweep in sweeps:
        row, column = runtimes.index(sweep.runtime), axes.index(sweep.axis)
        lines |= _draw_(panels[row, column], sweep, looks)
        panels[row, 0].set_ylabel(f"{RUNTIMES[sweep.runtime]}\ndense time / operator time")
        panels[-1, column].set_xlabel(LABELS[sweep.axis])
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside upper center",
        ncols=max(1, min(len(names), int(width / 1.7))),
        frameon=False,
    )
    save(figure, path, _conditions(sweeps))


def _draw_(panel: Any, sweep: Sweep, looks: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Draw a sweep; return its lines by operator."""
    lines = {}
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    for name in sweep.operators:
        at = [(point.value, point.speedups[name]) for point in sweep.points if name in point.speedups]
        values = [value for value, _ in at]
        (lines[name],) = panel.plot(values, [s.median for _, s in at], markersize=4.5, **looks[name])
        low, high = [s.p10 for _, s in at], [s.p90 for _, s in at]
        panel.fill_between(values, low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)
    scale_(panel, [point.value for point in sweep.points])
    panel.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    return lines


def _conditions(sweeps: Sequence[Sweep]) -> list[str]:
    """Return in lines what the axes don't say."""
    swept = {sweep.axis for sweep in sweeps}
    held = fixed_in_words(sweeps[0].fixed, swept if len(swept) == 1 else ())
    lines = [f"where not swept: {held}"]
    lines += dict.fromkeys(_setting(sweep) for sweep in sweeps)
    return [*lines, "median over interleaved rounds; bands from the 10th to the 90th percentile"]


def _setting(sweep: Sweep) -> str:
    """Return the conditions without the size and the rounds, which differ between points."""
    at = sweep.conditions
    return f"{at.runtime} {at.version}, {at.device}, threads: {at.threads}, batch {at.batch}, {at.dtype}"

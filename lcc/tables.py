"""Sheets of text, and the same sheets as rich tables and as Markdown; a report as sheets.

A sheet is made once and shown anywhere, so that a terminal and a README say the same. 100 columns are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lcc.evaluation import Accuracy
    from lcc.measure import LayerLatency
    from lcc.methods import Fit
    from lcc.report import LayerRow, ModelRow, Report
    from lcc.timing import Latency, Speedup

    # How a model fills its value and its change, given the first model; None: it is the first.
    Line = Callable[[ModelRow, ModelRow | None], tuple["Cell", "Cell"]]
    Timed = Callable[[ModelRow], tuple[Latency | None, Speedup | None]]

UNKNOWN = "\N{EM DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"
TIMES = "\N{MULTIPLICATION SIGN}"
GOOD, BAD, QUIET = "green", "bold red", "dim"
NOISE = "the middle half of the runs spreads over more than 10 % of the median"
ABREAST = 3  # models side by side in 100 columns


SHOWN = 4  # of a list of modules


class Cell(NamedTuple):
    """A piece of text, and a rich style where it should be seen."""

    text: str
    style: str = ""


BLANK = Cell("")


class Sheet(NamedTuple):
    """A table of text, and lines of notes below it; `left` numbers the columns that are not numbers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    left: tuple[int, ...] = (0,)

    def side(self, column: int) -> Literal["left", "right"]:
        """Return where the column's text begins, or ends."""
        return "left" if column in self.left else "right"


def to_rich(sheets: Sequence[Sheet]) -> Group:
    """Return the sheets as something rich prints."""
    parts: list[Table | Text] = []
    for sheet in sheets:
        table = Table(
            title=Text(sheet.title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for number, header in enumerate(sheet.headers):
            table.add_column(Text(header), justify=sheet.side(number), overflow="fold", no_wrap=not number)
        for row in sheet.rows:
            table.add_row(*(Text(cell.text, style=cell.style) for cell in row))
        if parts:
            parts.append(Text())
        parts += [table, *(Text(note, style=QUIET) for note in sheet.notes)]
    return Group(*parts)


def to_markdown(sheets: Sequence[Sheet]) -> str:
    """Return the sheets as Markdown."""
    return "\n".join(line for sheet in sheets for line in _markdown(sheet))


def _markdown(sheet: Sheet) -> Iterator[str]:
    if sheet.title:
        yield from (f"### {sheet.title}", "")
    yield _pipes(sheet.headers)
    yield _pipes(["---" if sheet.side(number) == "left" else "---:" for number in range(len(sheet.headers))])
    for row in sheet.rows:
        loud = [f"**{cell.text}**" if cell.style == BAD else cell.text for cell in row]
        yield _pipes(loud)
    yield ""
    for note in sheet.notes:
        yield from (note, "")


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report_sheets(report: Report) -> list[Sheet]:
    """Return a report as sheets: the models, `ABREAST` at a time beside the first; then each one's layers."""
    first, *others = report.models
    groups = [others[i : i + ABREAST - 1] for i in range(0, len(others), ABREAST - 1)] or [[]]
    sheets = [_models_sheet(first, group) for group in groups]
    sheets += [_layers_sheet(model) for model in report.models if model.layers]
    sheets[-1] = sheets[-1]._replace(notes=(*sheets[-1].notes, *_footer(report)))
    return sheets


def _models_sheet(first: ModelRow, others: Sequence[ModelRow]) -> Sheet:
    models = (first, *others)
    rows = []
    for label, cells in _lines(models):
        row = [Cell(label), cells(first, None)[0]]
        for model in others:
            row += cells(model, first)
        rows.append(tuple(row))
    histories = [f"{model.name}: " + "; ".join(model.history) for model in models if model.history]
    missing = [f"{m.name}: {not_counted(m.uncounted)}" for m in models if m.uncounted]
    return Sheet(
        title="",
        headers=("", first.name, *(header for model in others for header in (model.name, ""))),
        rows=tuple(rows),
        notes=(*histories, *missing),
        left=(0, *range(3, 2 + 2 * len(others), 2)),
    )


def _lines(models: Sequence[ModelRow]) -> Iterator[tuple[str, Line]]:
    """Yield the label of each line, and how to fill it."""
    yield "source", _plain_line(lambda m: m.source)
    if any(m.random_weights for m in models):
        yield (
            "weights",
            lambda m, _: (Cell("RANDOM WEIGHTS", BAD) if m.random_weights else Cell("trained"), BLANK),
        )
    yield "parameters", _ratio_line(lambda m: m.params, "{:,}".format, "fewer", "more")
    if any(m.norm_params for m in models):
        yield (
            "  norms left out",
            _ratio_line(lambda m: m.params - m.norm_params, "{:,}".format, "fewer", "more"),
        )
    yield "MACs per image", _ratio_line(lambda m: m.macs, lambda n: si(n, 4), "fewer", "more")
    yield "FLOPs (2 per MAC)", _ratio_line(lambda m: m.flops, lambda n: si(n, 4), "fewer", "more")
    yield "size on disk", _ratio_line(lambda m: m.size_bytes, size, "smaller", "larger")
    yield "top-1", _percent_line(lambda a: a.top1)
    yield "top-5", _percent_line(lambda a: a.top5)
    if any(m.accuracy for m in models):
        yield "  on images", _plain_line(lambda m: None if m.accuracy is None else f"{m.accuracy.images:,}")
        yield "  of", _plain_line(lambda m: m.data)
    yield "torch eager", _time_line(lambda m: (m.torch, m.torch_speedup))
    if any(m.torch for m in models):
        yield "  p10 to p90", _spread_line(lambda m: (m.torch, m.torch_speedup))
    yield "ONNX Runtime", _time_line(lambda m: (m.onnx, m.onnx_speedup))
    if any(m.onnx for m in models):
        yield "  p10 to p90", _spread_line(lambda m: (m.onnx, m.onnx_speedup))
    yield (
        "sites converted",
        _plain_line(
            lambda m: (
                None if m.converted is None or m.kept is None else f"{m.converted} of {m.converted + m.kept}"
            )
        ),
    )


def _layers_sheet(model: ModelRow) -> Sheet:
    columns: list[tuple[str, Callable[[LayerRow], Cell]]] = [
        ("site", lambda row: Cell(row.site)),
        ("shape", lambda row: Cell(str(row.spec).replace("->", ARROW))),
        ("at", lambda row: Cell(str(row.size))),
        ("params", lambda row: Cell(change(si(row.before.params), si(row.after.params)))),
        ("MACs", lambda row: Cell(change(si(row.before.macs), si(row.after.macs)))),
        ("error", lambda row: _error(row.fit)),
    ]
    if any(row.torch for row in model.layers):
        columns.append(("torch ms", lambda row: _layer_time(row.torch)))
    if any(row.onnx for row in model.layers):
        columns.append(("ORT ms", lambda row: _layer_time(row.onnx)))
    notes = [
        "error: of the output, relative, before and after fitting; k: of the kernel, from the weights alone"
    ]
    timed = {
        "eager torch": [row.torch for row in model.layers],
        "ONNX Runtime": [row.onnx for row in model.layers],
    }
    slower = [
        f"{sum(one.slower for one in times if one)} of {len(times)} in {runtime}"
        for runtime, times in timed.items()
        if any(times)
    ]
    if slower:
        notes.append(f"! slower than the dense layer, each timed alone: {', '.join(slower)}")
    notes += _banks(model.layers)
    methods = dict.fromkeys(row.method for row in model.layers)
    return Sheet(
        title=f"{model.name}: layers replaced by {', '.join(methods)}",
        headers=tuple(header for header, _ in columns),
        rows=tuple(tuple(cell(row) for _, cell in columns) for row in model.layers),
        notes=tuple(notes),
        left=(0, 1),
    )


def _banks(layers: tuple[LayerRow, ...]) -> list[str]:
    """Return which layers share what the first of them counts, a line for each bank."""
    banks: dict[str, list[str]] = {}
    for row in layers:
        if row.shares_with is not None:
            banks.setdefault(row.shares_with, []).append(row.site)
    return [f"counted at {first}, shared with: {', '.join(others)}" for first, others in banks.items()]


def _footer(report: Report) -> Iterator[str]:
    yield from (f"latency: {conditions}" for conditions in report.conditions)
    whole = [latency for model in report.models for latency in (model.torch, model.onnx)]
    layers = [pair for model in report.models for row in model.layers for pair in (row.torch, row.onnx)]
    measured = [*whole, *(latency for pair in layers if pair for latency in (pair.before, pair.after))]
    if any(latency is not None and latency.noisy for latency in measured):
        yield f"~ noisy machine: {NOISE}"
    yield from report.notes
    yield f"{report.date}; " + ", ".join(f"{name} {version}" for name, version in report.versions.items())


def si(number: float, digits: int = 3) -> str:
    """Return a count to so many digits, with k, M or G."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{_digits(number / factor, digits)}{unit}"
    return f"{number:.0f}"


def ms(milliseconds: float, digits: int = 3) -> str:
    """Return milliseconds to so many digits."""
    return _digits(milliseconds, digits)


def size(count: int) -> str:
    """Return bytes in kB or MB, of 1000."""
    return f"{_digits(count / 1e6, 4)} MB" if count >= 1e6 else f"{_digits(count / 1e3, 4)} kB"


def change(before: str, after: str) -> str:
    """Return "before -> after"."""
    return f"{before}{ARROW}{after}"


def _digits(number: float, digits: int) -> str:
    whole = len(str(int(number))) if number >= 1 else 0
    return f"{number:.{max(digits - whole, 0)}f}"


def _plain_line(get: Callable[[ModelRow], str | None]) -> Line:
    return lambda model, _: (Cell(get(model) or UNKNOWN), BLANK)


def _ratio_line(
    get: Callable[[ModelRow], int | None], show: Callable[[int], str], less: str, more: str
) -> Line:
    """Return how to show a count, and how many times less or more it is than the first model's."""

    def cells(model: ModelRow, first: ModelRow | None) -> tuple[Cell, Cell]:
        now, before = get(model), None if first is None else get(first)
        value = Cell(UNKNOWN if now is None else show(now))
        if not before or not now or before == now:
            return value, BLANK
        if now < before:
            return value, Cell(f"{before / now:.2f}{TIMES} {less}", GOOD)
        return value, Cell(f"{now / before:.2f}{TIMES} {more}", BAD)

    return cells


def _percent_line(get: Callable[[Accuracy], float | None]) -> Line:
    """Return how to show a share of images, and how many points it is from the first model's."""

    def cells(model: ModelRow, first: ModelRow | None) -> tuple[Cell, Cell]:
        now = None if model.accuracy is None else get(model.accuracy)
        before = None if first is None or first.accuracy is None else get(first.accuracy)
        value = Cell(UNKNOWN if now is None else f"{now:.2f} %")
        return value, BLANK if now is None or before is None else Cell(f"{now - before:+.2f} points")

    return cells


def _time_line(get: Timed) -> Line:
    """Return how to show a latency and how many times faster, or slower, it is."""

    def cells(model: ModelRow, _: ModelRow | None) -> tuple[Cell, Cell]:
        latency, speedup = get(model)
        value = Cell(UNKNOWN if latency is None else f"{'~ ' * latency.noisy}{ms(latency.median_ms)} ms")
        if speedup is None:
            return value, BLANK
        if speedup.median >= 1:
            return value, Cell(f"{speedup.median:.2f}{TIMES} faster", GOOD)
        return value, Cell(f"{1 / speedup.median:.2f}{TIMES} SLOWER", BAD)

    return cells


def _spread_line(get: Timed) -> Line:
    """Return how to show the 10th and 90th percentiles of a latency and of its speed-up."""

    def cells(model: ModelRow, _: ModelRow | None) -> tuple[Cell, Cell]:
        latency, speedup = get(model)
        value = UNKNOWN if latency is None else f"{ms(latency.p10_ms)} to {ms(latency.p90_ms)}"
        ratio = "" if speedup is None else f"{speedup.p10:.2f} to {speedup.p90:.2f}{TIMES}"
        return Cell(value, QUIET), Cell(ratio, QUIET)

    return cells


def _layer_time(latency: LayerLatency | None) -> Cell:
    if latency is None:
        return Cell(UNKNOWN)
    noisy = "~" * (latency.before.noisy or latency.after.noisy)
    text = noisy + change(ms(latency.before.median_ms, 2), ms(latency.after.median_ms, 2))
    return Cell(f"{text} !", BAD) if latency.slower else Cell(text)


def _error(fit: Fit | None) -> Cell:
    if fit is None:
        return Cell(UNKNOWN)
    if fit.relative_error is None:
        return Cell(UNKNOWN if fit.kernel_error is None else f"{fit.kernel_error:.2f} k")
    start = UNKNOWN if fit.start_error is None else f"{fit.start_error:.2f}"
    return Cell(change(start, f"{fit.relative_error:.2f}"))


def not_counted(modules: tuple[str, ...]) -> str:
    """Return in words of which modules the MACs are missing, the first few where there are many."""
    named = [name or "the network itself" for name in modules]
    more = f" and {len(named) - SHOWN} more modules" if len(named) > SHOWN else ""
    return f"MACs of {', '.join(named[:SHOWN])}{more} are not counted"

"""The commands that put networks and operators side by side: `lcc report` and `lcc bench`.

Annotations are not postponed here, since typer reads them.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcc.errors import RecipeError
from lcc.options import AsJson, architecture, either, running, sweeping, taking, timing
from lcc.output import form_of, print_costs, print_report, print_sheets, print_sweeps

if TYPE_CHECKING:
    from lcc.comparison import BenchOptions
    from lcc.output import Form
    from lcc.settings import Settings
    from lcc.sweep_axes import SweepOptions


@taking(settings=running, options=timing, said=architecture)
def report(
    sources: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="lcc directories, or other sources.")
    ],
    settings: "Settings",
    options: "BenchOptions",
    said: dict[str, Any],
    *,
    original: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What they were made from, with its weights.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Measure accuracy on this data set.")] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency.")] = True,
    layers: Annotated[bool, typer.Option(help="Measure every replaced layer, too.")] = True,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
) -> None:
    """Put networks side by side: parameters, MACs, bytes, accuracy, measured latency."""
    from lcc import pipeline

    form = form_of(as_json=as_json, as_csv=as_csv, as_md=as_md)
    parts = tuple(either(source, said) for source in sources)
    first = None
    if original is not None:
        named = either(original, said)
        is_bare_file = Path(original).is_file() and "arch" not in said
        first = pipeline.teacher_part(original, parts[0]) if is_bare_file else named
    timed = replace(options, layers=layers) if latency else None
    print_report(pipeline.report(parts, settings, original=first, text=data, options=timed), form)


@taking(settings=running, options=timing, operators=sweeping, said=architecture)
def bench(
    settings: "Settings",
    options: "BenchOptions",
    operators: "SweepOptions | None",
    said: dict[str, Any],
    *,
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="DIR|ONNX...", help="The first one is the baseline.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --sweep: write a plot, such as sweep.png.")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="With --costs: print CSV.")] = False,
) -> None:
    """Time networks and ONNX files against each other, interleaved; with --sweep, operators."""
    form = form_of(as_json=as_json, as_csv=as_csv)
    if as_csv and (operators is None or not operators.costs):
        raise RecipeError("--csv is for what is counted; add --sweep channels --costs, or take --json")
    if operators is not None:
        if targets or said:
            raise RecipeError("--sweep is about operators, not networks; leave out one or the other")
        if operators.costs:
            _count(operators, options, plot, form)
        else:
            _time(operators, settings, options, plot, form)
        return
    if not targets or plot is not None:
        raise RecipeError("name networks or ONNX files to time; or operators, and a --plot: --sweep all")
    from lcc import comparison
    from lcc.inspection import bench_sheet

    parts = tuple(either(target, said) for target in targets)
    results = comparison.bench(parts, settings, options)
    if as_json:
        typer.echo("[" + ",\n".join(result.model_dump_json(indent=2) for result in results) + "]")
    else:
        print_sheets([bench_sheet(result) for result in results])


def _time(
    operators: "SweepOptions", settings: "Settings", options: "BenchOptions", plot: Path | None, form: "Form"
) -> None:
    """Time operators and print, and draw, how they compare with dense convolutions."""
    from lcc import comparison, plots, sweep_views

    if plot is not None:
        plots.check_plot(plot)
    sweeps = comparison.bench_operators(operators, settings, options)
    print_sweeps(sweeps, as_json=form == "json")
    if plot is not None:
        sweep_views.write_plot(sweeps, plot)


def _count(operators: "SweepOptions", options: "BenchOptions", plot: Path | None, form: "Form") -> None:
    """Print, and draw, what operators cost."""
    from lcc import cost_sweep, cost_views, plots
    from lcc.comparison import BenchOptions

    if options != BenchOptions():
        raise RecipeError("--costs times nothing; leave out --batch, --bench-threads and --rounds")
    if plot is not None:
        plots.check_plot(plot)
    sweeps = cost_sweep.count_costs(operators)
    print_costs(sweeps, form)
    if plot is not None:
        cost_views.write_plot(sweeps, plot)

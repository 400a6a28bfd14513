"""What commands print on stdout: tables on a terminal, JSON, CSV or Markdown where asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from lcc.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.cost_sweep import CostSweep
    from lcc.inspection import Inspection
    from lcc.plan_report import PlanReport
    from lcc.report import Report
    from lcc.sweep import Sweep
    from lcc.tables import Sheet

Form = Literal["table", "json", "csv", "md"]


def form_of(*, as_json: bool = False, as_csv: bool = False, as_md: bool = False) -> Form:
    """Return the form that the flags ask for. Raises: RecipeError: more than one."""
    chosen: list[Form] = [form for form, on in (("json", as_json), ("csv", as_csv), ("md", as_md)) if on]  # type: ignore[misc]  # a literal each
    if len(chosen) > 1:
        raise RecipeError("--json, --csv and --md exclude each other; leave one")
    return chosen[0] if chosen else "table"


def print_report(value: Report, form: Form) -> None:
    """Print a report; CSV is the models, then an empty line and the replaced layers."""
    from lcc import report as reports
    from lcc.tables import report_sheets, to_markdown

    if form == "json":
        typer.echo(reports.to_json(value))
    elif form == "csv":
        layers = reports.layers_to_csv(value)
        typer.echo(reports.to_csv(value) + (f"\n{layers}" if layers else ""), nl=False)
    elif form == "md":
        typer.echo(to_markdown(report_sheets(value)))
    else:
        print_sheets(report_sheets(value))


def print_inspection(value: Inspection, *, as_json: bool) -> None:
    """Print an inspection as a table or as JSON."""
    from lcc.inspection import inspection_sheet

    if as_json:
        typer.echo(value.model_dump_json(indent=2))
    else:
        print_sheets([inspection_sheet(value)])


def print_plan(value: PlanReport, *, as_json: bool) -> None:
    """Print what a planner chose, as tables or as JSON."""
    from lcc.plan_report import plan_sheets

    if as_json:
        typer.echo(value.model_dump_json(indent=2))
    else:
        print_sheets(plan_sheets(value))


def print_sweeps(values: Sequence[Sweep], *, as_json: bool) -> None:
    """Print operator sweeps as tables or as JSON."""
    from lcc.sweep_views import sweep_sheets

    if as_json:
        typer.echo("[" + ",\n".join(value.model_dump_json(indent=2) for value in values) + "]")
    else:
        print_sheets(sweep_sheets(values))


def print_costs(values: Sequence[CostSweep], form: Form) -> None:
    """Print what operators cost as tables, as JSON or as CSV."""
    from lcc.cost_views import cost_sheets, to_rows

    if form == "json":
        typer.echo("[" + ",\n".join(value.model_dump_json(indent=2) for value in values) + "]")
    elif form == "csv":
        from lcc.report import csv_text

        typer.echo(csv_text(to_rows(values)), nl=False)
    else:
        print_sheets(cost_sheets(values))


def print_sheets(sheets: Sequence[Sheet]) -> None:
    """Print tables, as wide as the terminal, or as they are where there is none."""
    from rich.console import Console

    from lcc.tables import to_rich

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    console.print(to_rich(sheets))

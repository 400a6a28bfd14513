"""The `lcc` command: parse, one call into the pipeline, print.

Nothing heavy is imported before a command runs. Annotations are not postponed here, since typer reads them.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcc import __version__
from lcc.convert_command import convert
from lcc.errors import LccError, RecipeError
from lcc.measuring_commands import bench, report
from lcc.options import (
    AsJson,
    Data,
    MethodOption,
    Resume,
    Set,
    Workers,
    running,
    source_part,
    taking,
    writing,
)
from lcc.output import form_of, print_inspection, print_report, print_sheets

if TYPE_CHECKING:
    from lcc.methods import Method
    from lcc.recipe import ModelPart
    from lcc.settings import Settings

app = typer.Typer(
    name="lcc",
    help="Make convolutional networks cheap: convert, fine-tune, measure, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

# click's own, or the copy that newer versions of typer carry
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make convolutional networks cheap: convert, fine-tune, measure, export."""
    if version:
        typer.echo(f"lcc {__version__}")
        raise typer.Exit


@app.command()
def methods(*, as_json: AsJson = False) -> None:
    """List the methods: hyperparameters, formula, paper."""
    from lcc.inspection import methods_sheet
    from lcc.methods import METHODS

    if as_json:
        import json

        typer.echo(json.dumps({name: kind.model_json_schema() for name, kind in METHODS.items()}, indent=2))
    else:
        print_sheets([methods_sheet(METHODS)])


@app.command()
@taking(part=source_part, settings=running)
def inspect(
    part: "ModelPart", settings: "Settings", *, method: MethodOption = "linear_mix", as_json: AsJson = False
) -> None:
    """Show every convolution, what can take it or why not, and what all of it would gain."""
    from lcc import pipeline

    print_inspection(pipeline.inspect(part, _method(method), settings), as_json=as_json)


app.command()(convert)


@app.command()
@taking(part=source_part, base=running, settings=writing)
def finetune(
    part: "ModelPart",
    settings: "Settings",
    *,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: SOURCE, if an lcc directory.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What to distil from; default: the original network.")
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="From random weights; without --teacher, from labels alone."),
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: 10.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: 0.02.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step; default: 128.")] = None,
    val_split: Annotated[float | None, typer.Option(help="Share of train/ held out to evaluate on.")] = None,
    set_: Set = None,
    resume: Resume = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Train a network, distilling from its original, and write an lcc directory."""
    from lcc import pipeline, tuning
    from lcc.recipe_file import finetune_options

    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "val_split": val_split}
    named = {name: value for name, value in given.items() if value is not None}
    if from_scratch:
        part = tuning.untrained(part)
        named |= {} if teacher else {"distill": 0.0}
    options = finetune_options({"data": data, "seed": part.seed, **named}, tuple(set_ or ()))
    report = pipeline.finetune(
        part,
        options,
        settings,
        directory=out,
        teacher=None if teacher is None else pipeline.teacher_part(teacher, part),
        resume=resume,
        workers=workers,
    )
    print_report(report, form_of(as_json=as_json))


@app.command(name="eval")
@taking(part=source_part, settings=running)
def evaluate(
    part: "ModelPart",
    settings: "Settings",
    *,
    data: Data,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 on val/, else test/, of any source or an ONNX file."""
    from lcc import pipeline

    accuracy = pipeline.evaluate(part, data, settings, batch_size=batch_size)
    if as_json:
        typer.echo(accuracy.model_dump_json())
    else:
        top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2f} %"
        typer.echo(f"top-1 {accuracy.top1:.2f} %{top5} on {accuracy.images:,} images of {data}")


app.command()(report)
app.command()(bench)


@app.command()
@taking(part=source_part, base=running, settings=writing)
def export(
    part: "ModelPart",
    settings: "Settings",
    *,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file to write; default: DIR.onnx.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store and compute in float16.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    lowering_tolerance: Annotated[
        float, typer.Option(min=0, help="How far an operator may be from itself, where it is approximated.")
    ] = 1e-3,
    as_json: AsJson = False,
) -> None:
    """Write one ONNX file, checked against torch in ONNX Runtime; a failed check leaves no file."""
    from lcc import pipeline

    if out is None:
        if not Path(part.source).is_dir():
            raise RecipeError("say which file to write: -o model.onnx")
        out = pipeline.onnx_beside(Path(part.source))
    exported = pipeline.export(
        part, out, settings, half=half, opset=opset, lowering_tolerance=lowering_tolerance
    )
    typer.echo(exported.model_dump_json() if as_json else "\n".join(pipeline.exported_lines(exported)))


@app.command()
@taking(base=running, settings=writing)
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    settings: "Settings",
    *,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: the recipe's name without .toml.")
    ] = None,
    set_: Set = None,
    latency: Annotated[bool, typer.Option(help="Measure latency at the end.")] = True,
    resume: Resume = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Do all that a recipe says: load, convert, calibrate, fine-tune, evaluate, export, report."""
    from lcc import recipe_file as recipes
    from lcc import whole_run

    overrides = tuple(set_ or ())
    wanted = recipes.load(recipe, overrides)
    try:
        report = whole_run.run(
            wanted,
            recipes.text_with(recipe, overrides),
            out or Path(recipe.stem),
            settings,
            resume=resume,
            workers=workers,
            options=whole_run.bench_options(wanted) if latency else None,
        )
    except whole_run.NotExportedError as error:
        print_report(error.report, form_of(as_json=as_json))
        raise
    print_report(report, form_of(as_json=as_json))


@app.command()
@taking(settings=running)
def demo(
    settings: "Settings",
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the files go.")] = Path("lcc-demo"),
    as_json: AsJson = False,
) -> None:
    """Do the whole job on bundled data: convert, fine-tune, report, export, check. One or two minutes."""
    from lcc import whole_run

    report = whole_run.demo(out, replace(settings, device="cpu", force=True))
    print_report(report, form_of(as_json=as_json))


def main() -> None:
    """Run the command line; an LccError is one line on stderr and its exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        # On its own, typer takes several lines for a usage error; with no arguments it shows the help.
        code = app(standalone_mode=len(sys.argv) == 1)
        if code == INTERRUPTED:  # what newer versions of typer make of Ctrl-C
            typer.echo("lcc: interrupted", err=True)
        sys.exit(code)
    except USAGE_ERROR as error:
        typer.echo(f"lcc: {error.format_message()} ({_help_for(error)} lists the options)", err=True)
        sys.exit(2)
    except typer.Abort:
        typer.echo("lcc: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except LccError as error:
        if debug:
            raise
        typer.echo(f"lcc: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("lcc: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _help_for(error: Any) -> str:
    """Return the command that shows the options of the one that was used wrongly."""
    return f"`{error.ctx.command_path if error.ctx else 'lcc'} --help`"


def _method(text: str) -> "Method":
    from lcc.method_text import method_from_text

    return method_from_text(text)

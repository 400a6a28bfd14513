"""The `lcc` command: parse, one call into the pipeline, print.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from lcc import __version__
from lcc.errors import LccError, RecipeError
from lcc.options import (
    Arch,
    AsJson,
    Batch,
    BenchThreads,
    ClassNames,
    CropPct,
    Debug,
    Device,
    Force,
    ImageSize,
    Mean,
    MethodOption,
    NumClasses,
    Rounds,
    Seed,
    Set,
    SourceArg,
    Std,
    Threads,
    TrustCode,
    TrustPickle,
    Weights,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.comparison import BenchOptions
    from lcc.methods import Method
    from lcc.plan import Rule
    from lcc.recipe import ModelPart
    from lcc.report import Report
    from lcc.settings import Settings
    from lcc.specs import Frozen
    from lcc.tables import Sheet

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
Form = Literal["table", "json", "csv", "md"]
Options = TypeVar("Options", bound="Frozen")


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
        _print([methods_sheet(METHODS)])


@app.command()
def inspect(
    source: SourceArg,
    *,
    method: MethodOption = "linear_mix",
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    class_names: ClassNames = None,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show every convolution, what can take it or why not, and what all of it would gain."""
    from lcc import pipeline

    del debug
    part = _part(
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, mean=mean,
        std=std, crop_pct=crop_pct, class_names=class_names, seed=seed,
    )  # fmt: skip
    settings = _settings(trust_pickle=trust_pickle, trust_code=trust_code)
    _print_inspection(pipeline.inspect(part, _method(method), settings), as_json=as_json)


@app.command()
def convert(
    source: SourceArg,
    *,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The lcc directory to write.")] = None,
    method: MethodOption = "linear_mix",
    include: Annotated[
        list[str] | None, typer.Option(help="Only sites matching this glob; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No sites matching this glob; repeatable.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="DATA", help="Fit on unlabelled images, such as imagefolder:DIR.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to fit on.")] = 512,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    class_names: ClassNames = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Replace convolutions by low-cost operators and write an lcc directory."""
    from lcc import pipeline
    from lcc.plan import rules_for
    from lcc.recipe import Calibrate

    del debug
    part = _part(
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, mean=mean,
        std=std, crop_pct=crop_pct, class_names=class_names, seed=seed,
    )  # fmt: skip
    settings = _settings(
        device=device, threads=threads, force=force, trust_pickle=trust_pickle, trust_code=trust_code
    )
    rules: tuple[Rule, ...] = rules_for(_method(method), tuple(include or ()), tuple(exclude or ()))
    fit_on = {"data": calibrate, "images": images, "seed": seed}
    calibration = None if calibrate is None else _checked(Calibrate, **fit_on)
    if dry_run:
        inspection = pipeline.plan(part, rules, settings, calibration=calibration)
        _print_inspection(inspection, as_json=as_json)
        return
    if out is None:
        raise RecipeError("say where to put the result: -o DIR (or --dry-run to write nothing)")
    _print_report(
        pipeline.convert(part, out, rules, settings, calibration=calibration), _form(as_json=as_json)
    )


@app.command()
def finetune(
    source: SourceArg,
    *,
    data: Annotated[
        str, typer.Option(help="imagefolder:DIR, idx:DIR, cifar10:DIR, or a timm reader's name.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: SOURCE, if an lcc directory.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What to distil from; default: the original network.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    val_split: Annotated[float | None, typer.Option(help="Share of train/ held out to evaluate on.")] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    class_names: ClassNames = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a network, distilling from its original, and write an lcc directory."""
    from lcc import pipeline, recipe

    del debug
    part = _part(
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, mean=mean,
        std=std, crop_pct=crop_pct, class_names=class_names, seed=seed,
    )  # fmt: skip
    given = {
        "data": data,
        "seed": seed,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "val_split": val_split,
    }
    options = recipe.finetune_options({k: v for k, v in given.items() if v is not None}, tuple(set_ or ()))
    settings = _settings(
        device=device, threads=threads, force=force, trust_pickle=trust_pickle, trust_code=trust_code
    )
    report = pipeline.finetune(
        part,
        options,
        settings,
        directory=out,
        teacher=None if teacher is None else _teacher(teacher, part),
        resume=resume,
        workers=workers,
    )
    _print_report(report, _form(as_json=as_json))


@app.command(name="eval")
def evaluate(
    source: SourceArg,
    *,
    data: Annotated[
        str, typer.Option(help="imagefolder:DIR, idx:DIR, cifar10:DIR, or a timm reader's name.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 256,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    class_names: ClassNames = None,
    device: Device = "auto",
    threads: Threads = None,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure top-1 and top-5 on val/, else test/."""
    from lcc import pipeline

    del debug
    part = _part(
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, mean=mean,
        std=std, crop_pct=crop_pct, class_names=class_names,
    )  # fmt: skip
    settings = _settings(device=device, threads=threads, trust_pickle=trust_pickle, trust_code=trust_code)
    accuracy = pipeline.evaluate(part, data, settings, batch_size=batch_size)
    if as_json:
        typer.echo(accuracy.model_dump_json())
    else:
        top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2f} %"
        typer.echo(f"top-1 {accuracy.top1:.2f} %{top5} on {accuracy.images:,} images of {data}")


@app.command()
def report(
    sources: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="lcc directories, or other sources.")
    ],
    *,
    original: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What they were made from, with its weights.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Measure accuracy on this data set.")] = None,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    latency: Annotated[bool, typer.Option(help="Measure latency.")] = True,
    layers: Annotated[bool, typer.Option(help="Measure every replaced layer, too.")] = True,
    batch: Batch = 1,
    bench_threads: BenchThreads = 1,
    rounds: Rounds = 10,
    device: Device = "auto",
    threads: Threads = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """Put networks side by side: parameters, MACs, bytes, accuracy, measured latency."""
    from lcc import pipeline

    del debug
    form = _form(as_json=as_json, as_csv=as_csv, as_md=as_md)
    settings = _settings(device=device, threads=threads, trust_code=trust_code)
    options = (
        _bench_options(batch=batch, threads=bench_threads, rounds=rounds, layers=layers) if latency else None
    )
    parts = tuple(_either(source, arch, weights, num_classes) for source in sources)
    first = None
    if original is not None:
        named = _either(original, arch, weights, num_classes)
        first = _teacher(original, parts[0]) if Path(original).is_file() and arch is None else named
    _print_report(pipeline.report(parts, settings, original=first, text=data, options=options), form)


@app.command()
def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="DIR|ONNX...", help="The first one is the baseline.")
    ],
    *,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    batch: Batch = 1,
    bench_threads: BenchThreads = 1,
    rounds: Rounds = 15,
    device: Device = "auto",
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time networks and ONNX files against each other, interleaved."""
    from lcc import comparison
    from lcc.inspection import bench_sheet

    del debug
    options = _bench_options(batch=batch, threads=bench_threads, rounds=rounds, layers=False)
    parts = tuple(_either(target, arch, weights, num_classes) for target in targets)
    settings = _settings(device=device, trust_pickle=trust_pickle, trust_code=trust_code)
    results = comparison.bench(parts, settings, options)
    if as_json:
        typer.echo("[" + ",\n".join(result.model_dump_json(indent=2) for result in results) + "]")
    else:
        _print([bench_sheet(result) for result in results])


@app.command()
def export(
    source: SourceArg,
    *,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file to write; default: DIR.onnx."),
    ] = None,
    force: Force = False,
    half: Annotated[bool, typer.Option("--half", help="Store and compute in float16.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    class_names: ClassNames = None,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one ONNX file, checked against torch in ONNX Runtime; a failed check leaves no file."""
    from lcc import pipeline

    del debug
    part = _part(
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, mean=mean,
        std=std, crop_pct=crop_pct, class_names=class_names,
    )  # fmt: skip
    if out is None:
        if not Path(source).is_dir():
            raise RecipeError("say which file to write: -o model.onnx")
        out = pipeline.onnx_beside(Path(source))
    settings = _settings(force=force, trust_pickle=trust_pickle, trust_code=trust_code)
    exported = pipeline.export(part, out, settings, half=half, opset=opset)
    typer.echo(exported.model_dump_json() if as_json else pipeline.exported_line(exported))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    *,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: the recipe's name without .toml.")
    ] = None,
    set_: Set = None,
    latency: Annotated[bool, typer.Option(help="Measure latency at the end.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Do all that a recipe says: load, convert, calibrate, fine-tune, evaluate, export, report."""
    from lcc import pipeline
    from lcc import recipe as recipes

    del debug
    loaded = recipes.load(recipe, tuple(set_ or ()))
    settings = _settings(
        device=device, threads=threads, force=force, trust_pickle=trust_pickle, trust_code=trust_code
    )
    text = recipes.text_with(recipe, tuple(set_ or ()))
    report = pipeline.run(
        loaded,
        text,
        out or Path(recipe.stem),
        settings,
        resume=resume,
        workers=workers,
        options=_bench_options(batch=1, threads=1, rounds=10, layers=bool(loaded.convert))
        if latency
        else None,
    )
    _print_report(report, _form(as_json=as_json))


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the files go.")] = Path("lcc-demo"),
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Do the whole job on bundled data: convert, fine-tune, report, export, check. Two minutes."""
    from lcc import pipeline

    del debug
    report = pipeline.demo(out, _settings(device="cpu", threads=threads, force=True))
    _print_report(report, _form(as_json=as_json))


def main() -> None:
    """Run the command line; an LccError is one line on stderr and its exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        # On its own, typer takes several lines for a usage error; with no arguments it shows the help.
        sys.exit(app(standalone_mode=len(sys.argv) == 1))
    except USAGE_ERROR as error:
        typer.echo(f"lcc: {error.format_message()} ({_help_for(error)} lists the options)", err=True)
        sys.exit(2)
    except typer.Abort:
        typer.echo("lcc: interrupted", err=True)
        sys.exit(130)
    except LccError as error:
        if debug:
            raise
        typer.echo(f"lcc: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("lcc: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _help_for(error: Any) -> str:
    """Return the command that shows the options of the one that was used wrongly."""
    return f"`{error.ctx.command_path if error.ctx else 'lcc'} --help`"


def _part(
    source: str,
    *,
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    class_names: str | None = None,
    **given: Any,
) -> ModelPart:
    from lcc.recipe import ModelPart

    return _checked(
        ModelPart,
        source=source,
        image_size=None if image_size is None else _size(image_size),
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        class_names=None if class_names is None else tuple(map(str.strip, class_names.split(","))),
        **given,
    )


def _checked(kind: type[Options], **given: Any) -> Options:
    """Return options as the value they make. Raises: RecipeError: names the option that is out of bounds."""
    from pydantic import ValidationError

    from lcc.recipe import in_words

    try:
        return kind(**given)
    except ValidationError as error:
        place, _, what = in_words(error, kind).partition(": ")
        raise RecipeError(f"--{place.partition('.')[0].replace('_', '-')}: {what}") from error


def _teacher(teacher: str, student: ModelPart) -> ModelPart:
    """Return the teacher's source; a bare checkpoint file is of the student's architecture."""
    from lcc.pipeline import teacher_part

    return teacher_part(teacher, student)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--image-size {text}: give pixels, such as 224 or 192x256 (height x width)")
    return int(parts[0]), int(parts[-1])


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{option} {text}: give numbers with commas, such as 0.485,0.456,0.406") from error


def _method(text: str) -> Method:
    from lcc.recipe import method_from_text

    return method_from_text(text)


def _settings(**given: Any) -> Settings:
    from lcc.settings import Settings

    return Settings(**given)


def _bench_options(**given: Any) -> BenchOptions:
    from lcc.comparison import BenchOptions

    return BenchOptions(**given)


def _form(*, as_json: bool = False, as_csv: bool = False, as_md: bool = False) -> Form:
    chosen: list[Form] = [form for form, on in (("json", as_json), ("csv", as_csv), ("md", as_md)) if on]  # type: ignore[misc]  # a literal each
    if len(chosen) > 1:
        raise RecipeError("--json, --csv and --md exclude each other; leave one")
    return chosen[0] if chosen else "table"


def _either(source: str, arch: str | None, weights: str | None, num_classes: int | None) -> ModelPart:
    """Return one of several sources; the options are for those that are no lcc directories."""
    if Path(source).is_dir():
        return _part(source)
    return _part(source, arch=arch, weights=weights, num_classes=num_classes)


def _print_report(value: Report, form: Form) -> None:
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
        _print(report_sheets(value))


def _print_inspection(value: Any, *, as_json: bool) -> None:
    from lcc.inspection import inspection_sheet

    if as_json:
        typer.echo(_json(value))
    else:
        _print([inspection_sheet(value)])


def _json(value: Frozen) -> str:
    return value.model_dump_json(indent=2)


def _print(sheets: Sequence[Sheet]) -> None:
    from rich.console import Console

    from lcc.tables import to_rich

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    console.print(to_rich(sheets))

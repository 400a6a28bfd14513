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

SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="torchvision:NAME[@WEIGHTS], timm:NAME, zoo:NAME, py:MODULE:FACTORY, an lcc directory, or a "
        "checkpoint file with --arch",
    ),
]
Arch = Annotated[str | None, typer.Option(help="Architecture of a checkpoint file, such as timm:resnet18.")]
Weights = Annotated[
    str | None,
    typer.Option(help='"default" (the library\'s), "none" (random, seeded), or a checkpoint file.'),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the last layer.")]
ImageSize = Annotated[str | None, typer.Option(metavar="HxW", help="Input size, such as 224 or 192x256.")]
Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help="Mean that is taken off images in [0, 1].")]
Std = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Standard deviation that they are divided by.")
]
CropPct = Annotated[float | None, typer.Option(help="Share of the image kept at evaluation.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Load a pickle, which can run any code.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Import the Python code that an lcc directory names.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an lcc directory that is there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option, in TOML; repeatable."),
]
MethodOption = Annotated[
    str,
    typer.Option("--method", help="A method, with hyperparameters after a colon: linear_mix:group_size=8."),
]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per run when timing.")]
BenchThreads = Annotated[int, typer.Option("--bench-threads", min=1, help="CPU threads when timing.")]
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
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, seed=seed
    )
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
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size,
        mean=mean, std=std, crop_pct=crop_pct, seed=seed,
    )  # fmt: skip
    settings = _settings(
        device=device, threads=threads, force=force, trust_pickle=trust_pickle, trust_code=trust_code
    )
    rules: tuple[Rule, ...] = rules_for(_method(method), tuple(include or ()), tuple(exclude or ()))
    if dry_run:
        _print_inspection(pipeline.plan(part, rules, settings), as_json=as_json)
        return
    if out is None:
        raise RecipeError("say where to put the result: -o DIR (or --dry-run to write nothing)")
    fit_on = {"data": calibrate, "images": images, "seed": seed}
    calibration = None if calibrate is None else _checked(Calibrate, **fit_on)
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
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size, seed=seed
    )
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
        source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size,
        mean=mean, std=std, crop_pct=crop_pct,
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
    data: Annotated[str | None, typer.Option(help="Measure accuracy on this data set.")] = None,
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
    from lcc.recipe import ModelPart

    del debug
    form = _form(as_json=as_json, as_csv=as_csv, as_md=as_md)
    settings = _settings(device=device, threads=threads, trust_code=trust_code)
    options = (
        _bench_options(batch=batch, threads=bench_threads, rounds=rounds, layers=layers) if latency else None
    )
    parts = tuple(ModelPart(source=source) for source in sources)
    _print_report(pipeline.report(parts, settings, text=data, options=options), form)


@app.command()
def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="DIR|ONNX...", help="The first one is the baseline.")
    ],
    *,
    batch: Batch = 1,
    bench_threads: BenchThreads = 1,
    rounds: Rounds = 15,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time networks and ONNX files against each other, interleaved."""
    from lcc import comparison
    from lcc.inspection import bench_sheet

    del debug
    options = _bench_options(batch=batch, threads=bench_threads, rounds=rounds, layers=False)
    results = comparison.bench(tuple(targets), _settings(device=device), options)
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
    half: Annotated[bool, typer.Option("--half", help="Store and compute in float16.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    trust_pickle: TrustPickle = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one ONNX file, checked against torch in ONNX Runtime; a failed check leaves no file."""
    from lcc import pipeline

    del debug
    part = _part(source, arch=arch, weights=weights, num_classes=num_classes, image_size=image_size)
    if out is None:
        if not Path(source).is_dir():
            raise RecipeError("say which file to write: -o model.onnx")
        out = pipeline.onnx_beside(Path(source))
    settings = _settings(trust_pickle=trust_pickle, trust_code=trust_code)
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
        app()
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


def _part(
    source: str, *, image_size: str | None, mean: str | None = None, std: str | None = None, **given: Any
) -> ModelPart:
    from lcc.recipe import ModelPart

    return _checked(
        ModelPart,
        source=source,
        image_size=None if image_size is None else _size(image_size),
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
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


def _print_report(value: Report, form: Form) -> None:
    from lcc import report as reports
    from lcc.tables import report_sheets, to_markdown

    if form == "json":
        typer.echo(reports.to_json(value))
    elif form == "csv":
        typer.echo(reports.to_csv(value), nl=False)
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

"""What commands of `lcc` have in common: options by name, type and help, and groups of them as one value."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lcc.errors import RecipeError

if TYPE_CHECKING:
    from lcc.comparison import BenchOptions
    from lcc.recipe import ModelPart
    from lcc.settings import Settings
    from lcc.sweep_axes import SweepOptions

Options = TypeVar("Options")

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
ImageSize = Annotated[str | None, typer.Option(metavar="HxW", help="Input size, such as 224 or 192x256.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the last layer.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Data = Annotated[str, typer.Option(help="imagefolder:DIR, idx:DIR, cifar10:DIR, or a timm reader's name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option, in TOML; repeatable."),
]
MethodOption = Annotated[
    str,
    typer.Option("--method", help="A method, with hyperparameters after a colon: linear_mix:group_size=8."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load images.")]


def source_part(
    source: SourceArg,
    *,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Mean that is taken off images in [0, 1].")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Standard deviation that they are divided by.")
    ] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the image kept at evaluation.")] = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of the classes, in order.")
    ] = None,
    seed: Seed = 0,
) -> "ModelPart":
    """Return which network is meant."""
    from lcc.recipe import ModelPart

    return checked(
        ModelPart,
        source=source,
        arch=arch,
        weights=weights,
        num_classes=num_classes,
        image_size=None if image_size is None else _size(image_size),
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        crop_pct=crop_pct,
        class_names=None if class_names is None else tuple(map(str.strip, class_names.split(","))),
        seed=seed,
    )


def running(
    *,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickle, which can run any code.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Import the Python code that an lcc directory names.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> "Settings":
    """Return where to run and how much to trust; `main` looks at --debug."""
    from lcc.settings import Settings

    del debug
    return Settings(device=device, threads=threads, trust_pickle=trust_pickle, trust_code=trust_code)


def writing(
    base: "Settings",
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> "Settings":
    """Return the settings of a command that writes."""
    return replace(base, force=force)


def timing(
    *,
    batch: Annotated[int, typer.Option(min=1, help="Images per run when timing.")] = 1,
    bench_threads: Annotated[
        int, typer.Option("--bench-threads", min=1, help="CPU threads when timing.")
    ] = 1,
    rounds: Annotated[int, typer.Option(min=8, help="Interleaved timing rounds of four runs.")] = 15,
) -> "BenchOptions":
    """Return how latency is measured."""
    from lcc.comparison import BenchOptions

    return BenchOptions(batch=batch, threads=bench_threads, rounds=rounds)


def sweeping(
    *,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT[=N,N,...]",
            help="Instead of networks, time operators over channels, size, kernel, or all; repeatable.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="With --sweep: a method, as in convert; repeatable. Default: all of them."),
    ] = None,
    fixed: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT=N,...",
            help="With --sweep: what is not swept; default: channels=256,size=64,kernel=3.",
        ),
    ] = None,
    costs: Annotated[
        bool,
        typer.Option("--costs", help="With --sweep: count parameters and MACs; nothing is timed."),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=1, help="With --sweep: longest time for one shape in one runtime; default: 180."),
    ] = None,
) -> "SweepOptions | None":
    """Return what is swept; None: nothing."""
    if not sweep:
        given = {"--method": method, "--fixed": fixed, "--costs": costs, "--max-seconds": max_seconds}
        for option, value in given.items():
            if value:
                raise RecipeError(f"{option} is about operators; add --sweep channels")
        return None
    if costs and max_seconds is not None:
        raise RecipeError("--costs times nothing; leave out --max-seconds")
    from lcc import sweep_axes as sweeps
    from lcc.method_text import method_from_text
    from lcc.methods import METHODS

    names = method or [name for name, kind in METHODS.items() if costs or "conv" in kind.kinds]
    return sweeps.SweepOptions(
        axes=sweeps.axes_from_text(sweep),
        methods=tuple(method_from_text(name) for name in names),
        fixed=sweeps.Shape() if fixed is None else sweeps.shape_from_text(fixed),
        seconds=sweeps.SECONDS if max_seconds is None else max_seconds,
        costs=costs,
    )


def taking(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command groups of options; it gets each group's value under the group's keyword.

    A group is a function: its parameters are the options, save those that name an earlier group.
    """
    shared = {name: inspect.signature(group).parameters for name, group in groups.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def with_groups(**given: Any) -> None:
            made: dict[str, Any] = {}
            for name, group in groups.items():
                made[name] = group(
                    **{key: made[key] if key in made else given.pop(key) for key in shared[name]}
                )
            command(**{key: value for key, value in made.items() if key in own}, **given)

        own = inspect.signature(command).parameters
        every = {**own, **{key: one for group in shared.values() for key, one in group.items()}}
        options = [one for key, one in every.items() if key not in groups]
        keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in options]
        functools.update_wrapper(with_groups, command, updated=())
        del vars(with_groups)["__wrapped__"]  # typer would look at the command's own signature
        with_groups.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]  # read by inspect
        with_groups.__annotations__ = {one.name: one.annotation for one in keyword}
        return with_groups

    return decorate


# Options that have another name on the command line than in a recipe, where they are lists or stand alone.
NAMES = {"targets": "target", "methods": "method", "threads": "bench-threads"}


def checked(kind: type[Options], **given: Any) -> Options:
    """Return options as the value they make. Raises: RecipeError: names the option that is out of bounds."""
    from pydantic import ValidationError

    from lcc.validation import in_words

    try:
        return kind(**given)
    except ValidationError as error:
        key, _, what = in_words(error, kind).partition(": ")  # type: ignore[arg-type]  # a model
        name = key.partition(".")[0]
        raise RecipeError(f"--{NAMES.get(name, name).replace('_', '-')}: {what}") from error


def architecture(
    *,
    arch: Arch = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
) -> dict[str, Any]:
    """Return what is said of sources that are no lcc directories."""
    given = {"arch": arch, "weights": weights, "num_classes": num_classes, "image_size": image_size}
    return {name: value for name, value in given.items() if value is not None}


def either(source: str, said: dict[str, Any]) -> "ModelPart":
    """Return one of several sources, of which `architecture` says something."""
    return source_part(source, **({} if Path(source).is_dir() else said))


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

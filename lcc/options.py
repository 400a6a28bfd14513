"""The options that commands of `lcc` share: name, type and help, once each."""

from __future__ import annotations

from typing import Annotated

import typer

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
ClassNames = Annotated[str | None, typer.Option(metavar="A,B,...", help="Names of the classes, in order.")]

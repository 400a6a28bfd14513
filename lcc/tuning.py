"""A network and a teacher in, a trained copy and its history out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcc import data, train
from lcc.directory import checkpoints_of
from lcc.errors import RecipeError
from lcc.libraries import names_library
from lcc.manifest import command_line, event_now
from lcc.teachers import in_order_of

if TYPE_CHECKING:
    from lcc.network import Network
    from lcc.recipe import Finetune, ModelPart
    from lcc.settings import Settings
    from lcc.train import TrainResult


def train_network(
    network: Network,
    options: Finetune,
    teacher: Network | None,
    directory: Path,
    settings: Settings,
    *,
    resume: bool,
    origin: str,
    workers: int | None,
) -> tuple[Network, TrainResult]:
    """Return a trained copy of a network, and what the training gave; checkpoints go beside `directory`.

    `origin` says what the network's weights were made from, which has to be the same where `resume` goes on.
    Raises: what `lcc.train.finetune` raises.
    """
    if teacher is None and (options.distill > 0 or options.features > 0):
        settings.say("note: no teacher, so the labels alone are learnt from")
        options = options.model_copy(update={"distill": 0.0, "features": 0.0})
    if teacher is not None and options.features > 0:
        teacher = in_order_of(teacher, network)
    model = copy.deepcopy(network.loaded.model)
    class_names = network.loaded.class_names or data.open_train(options.data).class_names
    result = train.finetune(
        model,
        network.loaded.preprocessing,
        options,
        teacher=teacher.loaded.model if teacher else None,
        teacher_preprocessing=teacher.loaded.preprocessing if teacher else None,
        sites=tuple(network.plan.methods()),
        checkpoint_dir=checkpoints_of(directory),
        resume=resume,
        origin=f"{origin} {network.plan.orders}",
        device=settings.device,
        workers=workers,
        say=settings.say,
    )
    metrics = {"top1": result.accuracy.top1, "images": float(result.accuracy.images)}
    if result.accuracy.top5 is not None:
        metrics["top5"] = result.accuracy.top5
    event = event_now(
        "train",
        command_line(),
        seed=options.seed,
        metrics=metrics,
        details={
            "data": options.data,
            "evaluated_on": result.evaluated_on,
            "options": options.model_dump_json(exclude={"data"}, exclude_defaults=True),
            "teacher": "none"
            if result.teacher is None
            else f"{teacher.name if teacher else ''} ({result.teacher} on {result.teacher.images:,} images)",
            "threads": str(torch.get_num_threads()),
            **({} if result.best_epoch is None else {"best_epoch": str(result.best_epoch)}),
            **({} if result.precision == options.precision else {"precision": result.precision}),
            "top1_by_epoch": " ".join(f"{epoch.accuracy.top1:.2f}" for epoch in result.history),
        },
    )
    trained = network.but(
        loaded=replace(network.loaded, model=model, class_names=class_names),
        history=(*network.history, event),
        size_bytes=None,
    )
    settings.warn_of(trained)
    return trained, result


def untrained(part: ModelPart) -> ModelPart:
    """Return the same network with random weights, to train from scratch.

    Raises: RecipeError: it is a file or a directory, which holds weights, or weights are asked for.
    """
    if not names_library(part.source) and Path(part.source).exists():
        raise RecipeError(
            f"--from-scratch is for a network by name, such as zoo:NAME, and {part.source} holds weights; "
            "convert with --weights none, then finetune with --set distill=0, to train a converted one so"
        )
    if part.weights not in (None, "none"):
        raise RecipeError(f"--from-scratch has no use for --weights {part.weights}; leave one of them out")
    return part.model_copy(update={"weights": "none"})

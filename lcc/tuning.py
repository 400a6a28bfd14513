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
from lcc.inner_channels import inner_pairs, reorder_
from lcc.libraries import names_library
from lcc.manifest import command_line, event_now
from lcc.network import sites_of
from lcc.recipe import Finetune, ModelPart

if TYPE_CHECKING:
    from lcc.network import Network
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
        teacher = _in_order_of(teacher, network)
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
        origin=origin,
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


def _in_order_of(teacher: Network, student: Network) -> Network:
    """Return the teacher with its inner channels in the student's order, so that features can be compared.

    Raises: RecipeError: they can't be put in that order.
    """
    wanted, there = student.plan.orders, teacher.plan.orders
    left = [name for name, order in wanted.items() if there.get(name) != order]
    if not left:
        return teacher
    model = copy.deepcopy(teacher.loaded.model)
    pairs = {pair.first: pair for pair in inner_pairs(model, sites_of(teacher))}
    for name in left:
        if (
            name not in pairs
            or name in there
            or len(wanted[name]) != len(model.get_parameter(f"{name}.weight"))
        ):
            raise RecipeError(
                f"features: conversion reordered the channels of {name}, and the teacher's can't be put into "
                "that order; name the original as the teacher, or set features = 0"
            )
        reorder_(model, pairs[name], torch.tensor(wanted[name]))
    return teacher.but(loaded=replace(teacher.loaded, model=model))


def original_teacher(network: Network, settings: Settings) -> Network:
    """Return the trained original of a converted network, to be its teacher, if the library has it."""
    source = network.loaded.source
    if network.was_trained_first:
        raise RecipeError(
            "the original was trained before it was converted, and is not in this directory; name it, "
            "--teacher DIR, or pass --set distill=0"
        )
    if source.is_random:
        raise RecipeError(
            "the original had random weights and can't teach; name a --teacher, or pass --set distill=0"
        )
    if source.has_new_head:
        raise RecipeError(
            f"the original's last layer was new, for {source.num_classes} classes, and can't teach; name a "
            "--teacher trained on this data, or pass --set distill=0"
        )
    if source.weights != "default":
        file = source.weights.removeprefix("file:")
        raise RecipeError(
            f"distillation learns from the original network: give its weights again, --teacher {file}, "
            "or pass --set distill=0"
        )
    return settings.open(ModelPart(source=source.id, num_classes=source.num_classes), name="original")


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

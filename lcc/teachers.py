"""Networks to learn from: the originals of converted ones, their channels in the order of the student."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcc.errors import RecipeError
from lcc.inner_channels import inner_pairs, reorder_
from lcc.network import sites_of
from lcc.plan import chained
from lcc.recipe import PREPARATION, ModelPart

if TYPE_CHECKING:
    from lcc.data import Preprocessing
    from lcc.network import Network
    from lcc.settings import Settings


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
    part = like(ModelPart(source=source.id, num_classes=source.num_classes), network.loaded.preprocessing)
    return settings.open(part, name="original")


def like(part: ModelPart, preprocessing: Preprocessing, names: tuple[str, ...] = PREPARATION) -> ModelPart:
    """Return a source that wants its images as another network does, in what it does not say itself."""
    if Path(part.source).is_dir():
        return part
    given = {name: getattr(preprocessing, name) for name in names if getattr(part, name) is None}
    return part.model_copy(update=given)


def in_order_of(teacher: Network, student: Network) -> Network:
    """Return the teacher with its inner channels in the student's order, so that features can be compared.

    Raises: RecipeError: they can't be put in that order.
    """
    wanted, there = student.plan.orders, teacher.plan.orders
    apart = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if not apart:
        return teacher
    model = copy.deepcopy(teacher.loaded.model)
    pairs = {pair.first: pair for pair in inner_pairs(model, sites_of(teacher), teacher.example)}
    for name in apart:
        same_width = name in pairs and len(wanted.get(name, ())) == len(model.get_parameter(f"{name}.weight"))
        if name in there or not same_width:
            raise RecipeError(
                f"features: conversion reordered the channels of {name}, and the teacher's can't be put into "
                "that order; name the original as the teacher, or set features = 0"
            )
        reorder_(model, pairs[name], torch.tensor(wanted[name]))
    orders = chained(there, {name: wanted[name] for name in apart})
    plan = teacher.plan.model_copy(update={"orders": orders})
    return teacher.but(loaded=replace(teacher.loaded, model=model), plan=plan)

"""Accuracy of any classifier on batches of images."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcc import progress
from lcc.errors import DataError, LccError, RecipeError, cannot_run
from lcc.memory import is_out_of_memory
from lcc.specs import Frozen
from lcc.two_streams import device_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.batches import Batches
    from lcc.data import Split


class Accuracy(Frozen):
    """Percent of images whose class is the first guess, or among the first five; None up to five classes."""

    top1: float
    top5: float | None
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} %"


def pick_device(name: str = "auto", *, doubles: bool = False) -> torch.device:
    """Return the device by name; "auto" is CUDA, else the CPU; `doubles`: it has to compute in float64.

    Raises: RecipeError: it can't be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if doubles and name.startswith("mps"):
        raise RecipeError(f"device {name!r} has no float64, which weights are fitted in; use --device cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(f"device {name!r} can't be used: {reason}") from error
    return device


@contextmanager
def placed(model: nn.Module, device: torch.device, *, channels_last: bool = False) -> Iterator[None]:
    """Put a model on a device, in a memory format, for a block; then back where it was."""
    home = device_of(model)
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(home)
        if channels_last:
            model.to(memory_format=torch.contiguous_format)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in training or evaluation mode for a block, then every module back in its own."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def evaluate(
    model: nn.Module, batches: Batches, *, device: str = "auto", shown: bool | None = False
) -> Accuracy:
    """Return the accuracy of a classifier; its mode and device are as before afterwards.

    `shown`: a progress bar on stderr; None: only on a terminal.
    Raises: DataError: a damaged image, another number of classes than the model's; RecipeError: the device,
    or its memory; SourceError: a network that can't run on images of this size.
    """
    with placed(model, pick_device(device)):
        return accuracy_on(model, batches, shown=shown)


@torch.no_grad()
def accuracy_on(model: nn.Module, batches: Batches, *, shown: bool | None = False) -> Accuracy:
    """Return the accuracy of a classifier on the device where it is. Raises: as `evaluate`."""
    device = device_of(model)
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    images, classes = 0, 0
    with mode(model, training=False), progress.bar("evaluate", len(batches), shown=shown) as tick:
        for done, (x, y) in enumerate(batches.on(device), 1):
            logits = _answer(model, x)
            check_classes(logits, y, batches.split)
            images, classes = images + len(x), logits.shape[1]
            guesses = logits.topk(min(5, classes), dim=1).indices == y[:, None]
            hits += torch.stack([guesses[:, 0].sum(), guesses.sum()])
            tick(done)
    top1, top5 = (100 * count / images for count in hits.tolist())
    return Accuracy(top1=top1, top5=top5 if classes > 5 else None, images=images)


@torch.no_grad()
def count_outputs(model: nn.Module, batches: Batches, *, called: str = "the model") -> int:
    """Return how many classes a model tells apart. Raises: as `evaluate`."""
    size = batches.preprocessing.image_size
    with mode(model, training=False):
        logits = _answer(
            model, torch.zeros(1, len(batches.preprocessing.mean), *size, device=device_of(model))
        )
    check_classes(logits, torch.zeros(1), batches.split, called=called)
    return int(logits.shape[1])


def _answer(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except LccError:
        raise
    except Exception as error:  # other people's networks raise anything
        if is_out_of_memory(error):
            raise RecipeError(
                f"out of memory with {len(x)} images at once; take fewer: --batch-size {max(1, len(x) // 4)}"
            ) from error
        raise cannot_run((1, *x.shape[1:]), error) from error


def check_classes(logits: object, labels: Tensor, split: Split, *, called: str = "the model") -> None:
    """Refuse outputs (N, classes) that don't fit the data. Raises: DataError."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"{called} is not a classifier: it gives {shape}, not (images, classes)")
    outputs, classes = logits.shape[1], split.num_classes
    if classes is None:
        classes = outputs if int(labels.max()) < outputs else int(labels.max()) + 1
    if outputs != classes and (split.class_names is not None or outputs < classes):
        raise DataError(
            f"{split.text}: has {classes} classes, {called} {outputs}; give data of {outputs}, or a network "
            f"that is loaded with --num-classes {classes}"
        )

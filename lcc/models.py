"""Sources: a name or a checkpoint file in, a network with its preprocessing out, and how to rebuild it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from lcc import libraries, weight_files
from lcc.errors import SourceError
from lcc.libraries import Architecture, Preprocessing
from lcc.specs import Frozen
from lcc.weights import align, best_match, load_into_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.weight_files import Checkpoint

__all__ = ["Loaded", "Preprocessing", "Source", "build", "load"]


class Source(Frozen):
    """Where a network came from: what rebuilds it, without weights, and what to tell people.

    `weights` is "default" (the library's, named in `id`), "none" (random from `seed`), or "file:NAME".
    `num_classes` is None where the architecture's own count is meant.
    """

    id: str
    weights: str = Field(pattern="^(default|none|file:.+)$")
    num_classes: int | None = Field(default=None, ge=1)
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """Whether the weights were never trained, so that accuracy means nothing."""
        return self.weights == "none"

    @property
    def has_new_head(self) -> bool:
        """Whether the last layer is random beside pretrained ones: for another number of classes."""
        return self.num_classes is not None and self.weights == "default"

    def __str__(self) -> str:
        return f"{self.id}, " + (
            f"random weights (seed {self.seed})" if self.is_random else f"{self.weights} weights"
        )


@dataclass(frozen=True)
class Loaded:
    """A network in eval mode, float32, on the CPU; `notes` say what was done to get it."""

    model: nn.Module
    source: Source
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def load(
    source: str,
    *,
    arch: str | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    class_names: tuple[str, ...] | None = None,
    trust_pickle: bool = False,
    trust_code: bool = True,
    seed: int = 0,
) -> Loaded:
    """Return the network that a source means, with its weights, preprocessing and class names.

    `source` is torchvision:NAME[@WEIGHTS], timm:NAME, zoo:NAME, py:MODULE:FACTORY, or a checkpoint file of
    the architecture `arch`. `weights` is "default", "none" or a checkpoint file. What the other options
    leave out comes from the weights' own configuration. Random weights follow from `seed` alone.
    Raises: SourceError: anything that can't be found, read, trusted or made to fit, in one line.
    """
    named = libraries.names_library(source) or not Path(source).exists()
    _refuse_contradictions(source, named=named, arch=arch, weights=weights, num_classes=num_classes)
    notes: list[str] = []
    with seeded(seed):
        if named:
            architecture = libraries.find(source, trust_code=trust_code)
            checkpoint = _given_weights(weights, trust_pickle=trust_pickle)
        else:
            checkpoint = weight_files.read(Path(source), trust_pickle=trust_pickle)
            architecture = _architecture_of(checkpoint, arch, trust_code=trust_code, notes=notes)
        if checkpoint is not None:
            architecture = _as_published(architecture, checkpoint.path)
            model = _filled(architecture, num_classes, checkpoint, notes)
        elif weights == "none":
            model = architecture.build(num_classes)
            notes.append(
                f"the weights are random (seed {seed}): accuracy means nothing until they are trained"
            )
        else:
            architecture = libraries.find(architecture.default_id, trust_code=trust_code)
            model = architecture.pretrained(num_classes)
            notes.extend(_new_head(architecture, num_classes))
    options = {"image_size": image_size, "mean": mean, "std": std, "crop_pct": crop_pct}
    given = {name: value for name, value in options.items() if value is not None}
    preprocessing = adjusted(architecture.preprocessing, given)
    if len(given) < len(options) and (checkpoint is not None or architecture.id.startswith("py:")):
        but = ", but for what is given" if given else ""
        notes.append(
            f"images are prepared as for {architecture.default_id}{but}: {preprocessing}; "
            "--image-size, --mean, --std and --crop-pct change that"
        )
    return Loaded(
        model=model.eval().float(),
        source=Source(
            id=architecture.id,
            weights=f"file:{checkpoint.path.name}" if checkpoint is not None else weights or "default",
            num_classes=None if num_classes == architecture.classes else num_classes,
            seed=seed,
        ),
        preprocessing=preprocessing,
        class_names=_class_names(architecture, num_classes, class_names),
        notes=(*notes, *architecture.remarks),
    )


def build(source: Source, *, trust_code: bool = False) -> nn.Module:
    """Return the network of a source with fresh weights, in eval mode, on the CPU; nothing is downloaded.

    Raises: SourceError: unknown here, pointing elsewhere, or a user's code without `trust_code`.
    """
    with seeded(source.seed):
        return libraries.find(source.id, trust_code=trust_code).build(source.num_classes).eval().float()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make new tensors on the CPU, random ones from `seed`; the caller's generators stay as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _refuse_contradictions(
    source: str, *, named: bool, arch: str | None, weights: str | None, num_classes: int | None
) -> None:
    if named and arch is not None:
        raise SourceError(
            f"--arch {arch} is for checkpoint files, and {source} is none; leave one of them out"
        )
    if not named and weights is not None:
        raise SourceError(f"{source} is itself a checkpoint file; leave out --weights {weights}")
    if num_classes is not None and num_classes < 1:
        raise SourceError(f"--num-classes {num_classes} leaves nothing to tell apart; give 1 or more")


def _given_weights(weights: str | None, *, trust_pickle: bool) -> Checkpoint | None:
    if weights in {None, "default", "none"}:
        return None
    path = Path(str(weights))
    if not path.exists():
        raise SourceError(
            f"--weights {weights}: there is no such file; it takes default, none or a checkpoint file"
        )
    return weight_files.read(path, trust_pickle=trust_pickle)


def _architecture_of(
    checkpoint: Checkpoint, arch: str | None, *, trust_code: bool, notes: list[str]
) -> Architecture:
    """Return what a file is the weights of: as told, else as it says itself. Never guesses."""
    if arch is not None:
        return libraries.find(arch, trust_code=trust_code)
    for source in checkpoint.arch:
        match = best_match(checkpoint, libraries.outlines(source))
        if match is not None and match.fits:
            notes.append(f"{checkpoint.path.name} says it is {source}; --arch SOURCE would overrule it")
            return libraries.find(source)
    says = "does not name its network"
    if checkpoint.arch:
        called = checkpoint.arch[0].partition(":")[2]
        says = f"says its network is {called}, but no {called} known here has its tensors"
    raise SourceError(f"{checkpoint.path} {says}: {_advice(checkpoint, 'add --arch')}")


def _advice(checkpoint: Checkpoint, do: str) -> str:
    """Return in words which network a file seems to be of, and to `do` something with its name."""
    match = best_match(checkpoint, libraries.candidates(checkpoint.path))
    if match is None or (match.share < 0.5 and not match.same_shapes):
        return "no network known here has its tensors; give --arch SOURCE, for your own py:MODULE:FACTORY"
    if match.fits:
        classes = match.comparison.classes
        return f"{do} {match.source}" + (f" --num-classes {classes[0]}" if classes else "")
    strange, missing = match.comparison.unexpected, match.comparison.missing
    if match.same_shapes and strange and missing:
        names = f"{strange[0]}, not {missing[0]}"
        return f"its shapes are those of {match.source}, its names are not ({names}); rename them"
    return (
        f"the closest known is {match.source} ({match.share:.0%} of the tensors agree); give the right --arch"
    )


def _as_published(architecture: Architecture, path: Path) -> Architecture:
    """Return the architecture, naming the library's weights if the file has the name of theirs."""
    if architecture.id == architecture.default_id:
        return architecture
    return libraries.find(architecture.published.get(path.name, architecture.id))


def _filled(
    architecture: Architecture, num_classes: int | None, checkpoint: Checkpoint, notes: list[str]
) -> nn.Module:
    """Return the network with the file's tensors. Raises: SourceError: they don't fit, and how."""
    model = architecture.build(num_classes)
    tensors, actions = align(checkpoint.tensors, model.state_dict())
    comparison = load_into_(model, tensors)
    path, source = checkpoint.path, architecture.id
    if comparison.classes:
        got, want = comparison.classes
        raise SourceError(
            f"{path} has {got} classes and {source} was built for {want}; use --num-classes {got}"
        )
    if not comparison.fits:
        raise SourceError(f"{path} does not fit {source}: {comparison}; {_advice(checkpoint, 'it fits')}")
    done = (*checkpoint.actions, *actions)
    if done:
        notes.append(f"{path.name}: {'; '.join(done)}")
    return model


def _new_head(architecture: Architecture, num_classes: int | None) -> tuple[str, ...]:
    if num_classes is None or num_classes == architecture.classes or architecture.id.startswith("py:"):
        return ()
    return (
        f"the last layer is new, for {num_classes} classes instead of {architecture.classes}: train it first",
    )


def adjusted(preprocessing: Preprocessing, given: dict[str, Any]) -> Preprocessing:
    """Return the preprocessing with what the user gave in it, checked."""
    adjusted = preprocessing.model_copy(update=given)
    if min(adjusted.image_size) < 1:
        raise SourceError(
            f"--image-size {adjusted.image_size} is not a size; give height and width in pixels"
        )
    for name, values in (("mean", adjusted.mean), ("std", adjusted.std)):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise SourceError(f"--{name} {values}: give three numbers, for red, green and blue in [0, 1]")
    if min(adjusted.std) <= 0:
        raise SourceError(f"--std {adjusted.std}: images are divided by it; give numbers above 0")
    if not 0 < adjusted.crop_pct <= 1:
        raise SourceError(
            f"--crop-pct {adjusted.crop_pct}: give the share of the image to keep, above 0 and up to 1"
        )
    return adjusted


def _class_names(
    architecture: Architecture, num_classes: int | None, given: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    count = num_classes or architecture.classes
    if given is None:
        return architecture.class_names if count == architecture.classes else None
    if count is not None and len(given) != count:
        raise SourceError(f"--class-names gives {len(given)} names for {count} classes; give one for each")
    return given

"""Tensors by name beside a network: which they fit, and in words why they don't."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lcc.weight_files import few

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lcc.weight_files import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]

# Branches that only training uses.
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.", "aux_classifier.")
# torchvision's DenseNet files have norm.1 where the network has norm1.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
COUNTER = "num_batches_tracked"


class Comparison(NamedTuple):
    """A file's names and shapes beside a network's; `reshaped` is (name, in the file, in the network).

    `parted`: one tensor with an earlier name in the network, but other numbers in the file.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    parted: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the file can be loaded as it is."""
        return not any(self)

    @property
    def classes(self) -> tuple[int, int] | None:
        """How many classes the file and the network have, if that is all they differ in.

        Only the last layer can change its first dimension without another tensor changing its second.
        """
        pairs = {(got[0], want[0]) for _, got, want in self.reshaped if got and want and got[1:] == want[1:]}
        same_rest = all(got[1:] == want[1:] for _, got, want in self.reshaped)
        if self.missing or self.unexpected or not same_rest or len(pairs) != 1:
            return None
        return pairs.pop()

    def __str__(self) -> str:
        reshaped = [
            f"{name}: {_shape(got)} in the file, {_shape(want)} in the network"
            for name, got, want in self.reshaped
        ]
        listed = {
            "missing": self.missing,
            "not in the network": self.unexpected,
            "of another shape": reshaped,
            "shared in the network, not in the file": self.parted,
        }
        return "; ".join(f"{len(names)} {what} ({few(names)})" for what, names in listed.items() if names)


class Match(NamedTuple):
    """A network whose tensors resemble a file's; `share` of all names agree, shape and all."""

    source: str
    comparison: Comparison
    share: float
    same_shapes: bool

    @property
    def fits(self) -> bool:
        """Whether the file differs in nothing but the class count."""
        return self.comparison.fits or self.comparison.classes is not None


def align(tensors: dict[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under the network's names where only a common first word differs, and what was done.

    Branches that the network was built without, since only training uses them, are left out.
    """
    names = set(wanted)
    actions = []
    first = {name.partition(".")[0] + "." for name in tensors}
    if len(first) == 1 and not names & tensors.keys():
        prefix = first.pop()
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if names & bare.keys():
            tensors = bare
            actions.append(f"dropped the prefix {prefix!r}")
    tensors = {OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}
    extra = {name for name in tensors.keys() - names if name.startswith(AUXILIARY)}
    if extra:
        actions.append("left out the auxiliary classifier, which only training uses")
    return {name: tensor for name, tensor in tensors.items() if name not in extra}, tuple(actions)


def load_into_(model: nn.Module, tensors: dict[str, Tensor]) -> Comparison:
    """Give the model the tensors, in its own dtype, and return how they differ; use it only if they fit."""
    wanted = model.state_dict()
    comparison = compare(shapes(tensors), shapes(wanted))
    if comparison.fits:
        comparison = comparison._replace(parted=_parted(tensors, wanted))
    if comparison.fits:
        # The model's own state dict carries its modules' versions: they take no name for an older one.
        wanted.update(tensors)
        model.load_state_dict(wanted)
    elif not (comparison.reshaped or comparison.parted):
        return _load_older_(model, tensors) or comparison
    return comparison


def _parted(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of tensors that the network holds once, under an earlier name, and the file apart."""
    first: dict[tuple[int, torch.Size], str] = {}
    owners = {
        name: first.setdefault((tensor.data_ptr(), tensor.shape), name)
        for name, tensor in wanted.items()
        if tensor.numel() and name in tensors
    }
    return tuple(
        name
        for name, owner in owners.items()
        if name != owner and not torch.equal(tensors[name], tensors[owner])  # a NaN does not equal itself
    )


def _load_older_(model: nn.Module, tensors: dict[str, Tensor]) -> Comparison | None:
    """Load names of an older release, which modules such as torchvision's MLP translate while loading."""
    try:
        result = model.load_state_dict(tensors, strict=False)
    except (RuntimeError, ValueError):
        return None
    missing = tuple(name for name in result.missing_keys if not name.endswith(COUNTER))
    return Comparison(missing, tuple(result.unexpected_keys))


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compare(got: Shapes, wanted: Shapes) -> Comparison:
    """Return how a file's names and shapes differ from a network's; BatchNorm's counter may be absent."""
    return Comparison(
        missing=tuple(name for name in wanted if name not in got and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in got if name not in wanted),
        reshaped=tuple(
            (name, got[name], wanted[name]) for name in wanted if name in got and got[name] != wanted[name]
        ),
    )


def best_match(checkpoint: Checkpoint, candidates: Iterable[tuple[str, Shapes]]) -> Match | None:
    """Return the first of (source, shapes) that fits but for the class count, else the one most alike."""
    best: Match | None = None
    for source, wanted in candidates:
        match = _match(checkpoint, source, wanted)
        if match.fits:
            return match
        if best is None or (match.same_shapes, match.share) > (best.same_shapes, best.share):
            best = match
    return best


def _match(checkpoint: Checkpoint, source: str, wanted: Shapes) -> Match:
    got = shapes(align(checkpoint.tensors, wanted)[0])
    agreed = sum(got[name] == shape for name, shape in wanted.items() if name in got)
    return Match(
        source=source,
        comparison=compare(got, wanted),
        share=agreed / max(1, len(got.keys() | wanted.keys())),
        same_shapes=_inventory(got) == _inventory(wanted),
    )


def _inventory(named: Shapes) -> list[tuple[int, ...]]:
    return sorted(shape for shape in named.values() if shape)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"

"""Checkpoint files: their tensors, and in words why they don't fit a network. No file runs code unasked."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lcc.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Shapes = Mapping[str, tuple[int, ...]]

# Where training scripts keep the weights, best first: a moving average is what they evaluate.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
# What averaging and profiling (thop) leave among the weights, and branches that only training uses.
BYSTANDERS = ("n_averaged", "total_ops", "total_params")
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.", "aux_classifier.")
# torchvision's DenseNet files have norm.1 where the network has norm1.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# A bag of values, in which the training scripts of timm and torchvision keep their arguments.
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors, the sources its `arch` entry can mean, and what was done to get there."""

    path: Path
    tensors: dict[str, Tensor]
    arch: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()


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
        return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in listed.items() if names)


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


def read(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Return the tensors of a safetensors or PyTorch file, on the CPU, without the wrapping training left.

    `trust_pickle` lets a PyTorch file run code, which one that holds more than tensors needs.
    Raises: SourceError: no such file, damaged, blocked, or without tensors.
    """
    if path.is_dir():
        raise SourceError(
            f"{path} is a directory; give the checkpoint file inside it, or a directory that lcc wrote"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise SourceError(f"there is no file {path}") from error
    except OSError as error:
        raise SourceError(f"{path} can't be read: {error.strerror}") from error
    if head.startswith((b"PK", b"\x80")):
        return _unwrapped(path, _read_pickle(path, trust_pickle=trust_pickle))
    if head[8:9] == b"{" or (head and path.suffix == ".safetensors"):
        return _unwrapped(path, _read_safetensors(path))
    raise SourceError(_impostor(path, head))


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


def _impostor(path: Path, head: bytes) -> str:
    if not head:
        return f"{path} is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is only a Git LFS pointer; fetch the file itself with: git lfs pull"
    if head.lstrip()[:1] == b"<":
        return f"{path} is a web page; download the file itself"
    return f"{path} is neither a safetensors nor a PyTorch file; give a checkpoint"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, *, trust_pickle: bool) -> Any:
    try:
        with path.open("rb") as file:  # by its name, newer torch takes a file for safetensors
            if trust_pickle:
                with code_from_here():
                    return torch.load(file, map_location="cpu", weights_only=False)
            with torch.serialization.safe_globals(HARMLESS):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"{path} needs the code it was saved with ({one_line(error)}); "
            "run lcc where that can be imported, or save model.state_dict() instead"
        ) from error
    except Exception as error:
        blocked = _blocked(path, error)
        if blocked:
            raise SourceError(
                f"{path} holds more than tensors: {_first(blocked)}; save model.state_dict() instead, or, "
                "if you trust its maker to run code on this machine, add --trust-pickle"
            ) from error
        if "TorchScript" in str(error):
            raise SourceError(
                f"{path} is a TorchScript program; save torch.jit.load(PATH).state_dict() instead"
            ) from error
        raise _damaged(path, error) from error


def _blocked(path: Path, error: Exception) -> list[str]:
    """Return the globals that kept a file from loading; of files older than torch 1.6, the first alone."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001  # it reads zip files only, and fails in many ways on anything else
        return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


def _damaged(path: Path, error: Exception) -> SourceError:
    reason = re.sub(r"(?s)^Weights only load failed.*?WeightsUnpickler error: ", "", str(error))
    return SourceError(f"{path} is damaged or no checkpoint ({one_line(reason)}); copy or download it again")


def _unwrapped(path: Path, content: Any) -> Checkpoint:
    arch = _named_arch(content)
    actions: list[str] = []
    while True:
        if isinstance(content, nn.Module):
            actions.append(f"took the weights of the pickled {type(content).__name__}")
            content = content.state_dict()
        key = _wrapper(path, content)
        if key is None:
            break
        average = key in AVERAGES and any(other in content for other in WRAPPERS)
        actions.append(f"took the moving average {key!r}" if average else f"took {key!r}")
        content = content[key]
    tensors = _cleaned(content, actions)
    return Checkpoint(path, tensors, arch, tuple(actions))


def _named_arch(content: Any) -> tuple[str, ...]:
    """Return the sources that the `arch` entry can mean; in PyTorch's ImageNet example, not timm's."""
    arch = content.get("arch") if isinstance(content, Mapping) else None
    if not isinstance(arch, str):
        return ()
    sources = (f"timm:{arch}", f"torchvision:{arch}", f"zoo:{arch}")
    return sources[1:] if "best_acc1" in content or "best_prec1" in content else sources


def _wrapper(path: Path, content: Any) -> str | None:
    """Return the key under which the weights are, None if they are here."""
    if not isinstance(content, Mapping):
        raise SourceError(
            f"{path} holds a {type(content).__name__}, not tensors by name; save model.state_dict() instead"
        )
    for key in (*AVERAGES, *WRAPPERS):
        if _holds_tensors(content.get(key), depth=1):
            return key
    if _holds_tensors(content):
        return None
    inside = [key for key, value in content.items() if isinstance(key, str) and _holds_tensors(value)]
    if len(inside) == 1:
        return inside[0]
    keys = _first(map(str, inside or content))
    raise SourceError(
        f"{path} holds several sets of tensors ({keys}); save the one you mean alone"
        if inside
        else f"{path} holds no tensors by name (it has: {keys or 'nothing'}); save model.state_dict() instead"
    )


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether this is a mapping with tensors in it, or in a mapping in it, or a pickled network."""
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    inside = value.values()
    return any(isinstance(item, Tensor) or (depth > 0 and _holds_tensors(item, depth - 1)) for item in inside)


def _cleaned(content: Mapping[str, Any], actions: list[str]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    tensors = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in BYSTANDERS}
    dropped = content.keys() - tensors.keys()
    if dropped:
        actions.append(f"left out {_first(sorted(dropped))}")
    return _bare(tensors, actions)


def _bare(tensors: dict[str, Tensor], actions: list[str]) -> dict[str, Tensor]:
    """Return the tensors without what torch.compile, anywhere, and DataParallel, in front, add to names."""
    bare = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in tensors.items()}
    if bare.keys() != tensors.keys():
        actions.append("dropped '_orig_mod.' from the names")
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): tensor for name, tensor in bare.items()}
        actions.append("dropped 'module.' from the names")
    return bare


@contextmanager
def code_from_here() -> Iterator[None]:
    """Let modules in the working directory be imported, as `python -m` does; installed commands don't."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def one_line(error: object) -> str:
    """Return an error's own words, shortened to a clause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

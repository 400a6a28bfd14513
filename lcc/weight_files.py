"""Checkpoint files: their tensors, without what training wrapped around them. No file runs code unasked."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lcc.errors import SourceError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Where training scripts keep the weights, best first: a moving average is what they evaluate.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
# What averaging and profiling (thop) leave among the weights.
BYSTANDERS = ("n_averaged", "total_ops", "total_params")
# A bag of values, in which the training scripts of timm and torchvision keep their arguments.
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors, the sources its `arch` entry can mean, and what was done to get there."""

    path: Path
    tensors: dict[str, Tensor]
    arch: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()


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
    if head[8:9] == b"{":  # what comes before is a length, and may start as a pickle does
        return _unwrapped(path, _read_safetensors(path))
    if head.startswith((b"PK", b"\x80")):
        return _unwrapped(path, _read_pickle(path, trust_pickle=trust_pickle))
    if head and path.suffix == ".safetensors":
        return _unwrapped(path, _read_safetensors(path))
    raise SourceError(_impostor(path, head))


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
                f"{path} holds more than tensors: {few(blocked)}; save model.state_dict() instead, or, "
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
    keys = few(map(str, inside or content))
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
        actions.append(f"left out {few(sorted(dropped))}")
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


def few(names: Iterable[str], count: int = 3) -> str:
    """Return the first of some names, in a line."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

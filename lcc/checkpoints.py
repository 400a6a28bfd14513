"""Checkpoints of a training run that survive a kill at any moment.

DIR/step-00000391/state.pt   written in full under another name, synced, then renamed
DIR/latest                   the name of the newest; replaced atomically, and only after it is safe on disk
"""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from lcc.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POINTER = "latest"
STATE = "state.pt"
UNFINISHED = ".new"
KEPT = 2


def write(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Keep `state`, made of tensors and plain values, as the newest checkpoint, and the one before it.

    Raises: TrainingError: the disk is full or can't be written; the checkpoints before are untouched.
    """
    final = directory / f"step-{step:08d}"
    if newest(directory) == final:
        return  # the same step gives the same state
    fresh = directory / f"{final.name}{UNFINISHED}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in (fresh, final):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        with (fresh / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(fresh)
        fresh.rename(final)
        _sync_folder(directory)
        _point_to(directory, final.name)
        _prune(directory, final.name)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise TrainingError(f"{final}: the checkpoint can't be written: {error}") from error


def begin(directory: Path | None, *, resume: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the state to go on from; None: from the start.

    Raises: TrainingError: a new run would mix with an old one's checkpoints; the newest one is damaged.
    """
    checkpoint = None if directory is None else newest(directory)
    if checkpoint is None:
        if resume:
            say(f"note: no checkpoint in {directory}, starting from the beginning")
        return None
    if not resume:
        refuse_leftovers(checkpoint.parent)
    return read(checkpoint)


def refuse_leftovers(directory: Path) -> None:
    """Refuse to mix a new run with an old one's checkpoints. Raises: TrainingError: there are some."""
    if newest(directory) is not None:
        raise TrainingError(f"{directory} has checkpoints of an earlier run: give --resume, or remove it")


def discard(directory: Path) -> None:
    """Remove the checkpoints in a folder; what lcc did not write there stays, and so does the folder then."""
    for checkpoint in directory.glob("step-[0-9]*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name in (POINTER, f"{POINTER}{UNFINISHED}"):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def newest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint; None if there is none."""
    pointer = directory / POINTER
    return directory / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def read(checkpoint: Path) -> dict[str, Any]:
    """Return the state kept in a checkpoint. Raises: TrainingError: it is damaged."""
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).split("\n", 1)[0]
        raise TrainingError(
            f"{path}: damaged checkpoint ({reason}); put the name of another step-* folder into {POINTER}"
        ) from error
    return state


def _point_to(directory: Path, name: str) -> None:
    fresh = directory / f"{POINTER}{UNFINISHED}"
    with fresh.open("w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(directory / POINTER)
    _sync_folder(directory)


def _prune(directory: Path, name: str) -> None:
    found = sorted(path for path in directory.glob("step-*") if path.name <= name)
    cut_off = [path for path in found if path.suffix == UNFINISHED]
    whole = [path for path in found if path.suffix != UNFINISHED]
    for path in (*cut_off, *whole[:-KEPT]):
        shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder can't be opened, and a rename is durable without
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

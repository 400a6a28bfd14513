"""The lcc directory on disk: its files, and how it is replaced whole or not at all.

DIR.new   where the next one is written and synced; then renamed to DIR
DIR.old   where the former one waits in between; removed when the next one is in place
DIR.plan.json, DIR.fits, DIR.checkpoints   what there is of the next one before that

After a kill at any moment DIR is whole, the former or the next one, or it is missing and both lie beside it.
Only files named here are ever removed: whatever else lies in such a directory is the user's.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lcc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "manifest.json"  # written last: a directory that has one is complete
WEIGHTS = "model.safetensors"
PROBE = "probe.safetensors"
RECIPE = "recipe.toml"
FILES = (MANIFEST, WEIGHTS, PROBE, RECIPE)


class Directory:
    """A place for an lcc directory.

    `shown` is the path as the user gave it; `path` the same without links, so that a link stays one.
    """

    def __init__(self, shown: str | Path) -> None:
        self.shown = Path(shown)
        self.path = Path(os.path.realpath(shown))
        self.new = self.path.parent / f"{self.path.name}.new"
        self.old = self.path.parent / f"{self.path.name}.old"

    def check(self, *, force: bool) -> None:
        """Make sure, leaving no trace, that a directory can be written here.

        Raises: ArtifactError: something is there and `force` is off, or it is not ours; no permission.
        """
        with self._writing():
            if os.path.lexists(self.path) and not _is_empty(self.path):
                self._check_present(force=force)
        self.check_writable()

    def check_writable(self) -> None:
        """Make sure, leaving no trace, that what is here can be replaced. Raises: ArtifactError."""
        with self._writing():
            if not self.path.exists() and _is_ours(self.new) and _is_ours(self.old):
                raise ArtifactError(self.what_is_left())
            self._check_neighbours()
            if os.path.ismount(self.path):
                raise ArtifactError(f"{self.shown} is a mount point; choose a directory inside it")
            if self.path.exists() and Path.cwd().is_relative_to(self.path):
                raise ArtifactError(
                    f"{self.shown} can't be replaced from inside; work from its parent folder"
                )
            ancestor = next(parent for parent in self.path.parents if os.path.lexists(parent))
            tempfile.TemporaryFile(dir=ancestor).close()

    def what_is_left(self) -> str:
        """Return what to say where there is no DIR: whether an interrupted save left its neighbours."""
        left = [path.name for path in (self.new, self.old) if _is_ours(path)]
        if not left:
            return f"{self.shown}: there is no such directory"
        either = " or ".join(f"{name}{' (the former one)' if name == self.old.name else ''}" for name in left)
        return f"{self.shown} is missing after an interrupted save; rename {either} to {self.path.name}"

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Give an empty directory to write into. At its end it is here; after an error all is as before.

        What else lies in the one replaced moves along. Raises: ArtifactError: can't be written, disk full.
        """
        self.check_writable()
        replacing = self.path.exists()
        made = [parent for parent in self.path.parents if not parent.exists()]
        try:
            with self._writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _remove(self.new)
                self.new.mkdir()
                yield self.new
                for entry in (*self.new.iterdir(), self.new):
                    _sync(entry)
                self._swap()
        except BaseException:
            if self.path.exists() or not replacing:  # else it and DIR.old are all there is
                with suppress(OSError):
                    _remove(self.new)
                    for parent in made:
                        parent.rmdir()
            raise

    def _swap(self) -> None:
        replacing = self.path.exists()
        try:
            if replacing:
                self.path.rename(self.old)
            self.new.rename(self.path)
        except BaseException:
            if replacing and not self.path.exists():
                self.old.rename(self.path)
            raise
        self._settle(replaced=replacing)

    def _settle(self, *, replaced: bool) -> None:
        """Make the swap durable, move what the user had put there, and remove the former one."""
        try:
            _sync(self.path.parent)
            for entry in _foreign(self.old) if replaced else ():
                entry.rename(self.path / entry.name)
            if replaced:
                _remove(self.old)
        except OSError as error:
            left = f"; remove {self.old}" if replaced else ""
            raise ArtifactError(
                f"{self.shown} is saved, but not all is well: {error.strerror}{left}"
            ) from error

    def _check_present(self, *, force: bool) -> None:
        if not _is_ours(self.path):
            raise ArtifactError(
                f"{self.shown} exists and is not an lcc directory: it is not overwritten; choose another path"
            )
        if not force:
            raise ArtifactError(f"{self.shown} exists; choose another path, or replace it with --force")
        foreign = _foreign(self.path)
        if foreign:
            raise ArtifactError(
                f"{self.shown} holds {foreign[0].name}, which lcc didn't write and would be lost; "
                "move it away, or choose another path"
            )

    def _check_neighbours(self) -> None:
        """Refuse to remove a neighbour that may be the user's: complete, or with more than our files."""
        blocking = [self.old] if self.path.exists() and os.path.lexists(self.old) else []
        unfinished = self.new.is_dir() and not (self.new / MANIFEST).exists() and not _foreign(self.new)
        if os.path.lexists(self.new) and not unfinished:
            blocking.append(self.new)
        if blocking:
            raise ArtifactError(
                f"{blocking[0]} is in the way of saving {self.shown}: yours, or left by an interrupted save; "
                "move or remove it"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one line why something can't be written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ArtifactError(f"{self.shown} can't be written: {reason}; choose another path") from error


def _is_ours(path: Path) -> bool:
    """Whether this is a complete lcc directory, of whatever format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith("lcc/")


def checkpoints_of(directory: Path) -> Path:
    """Return where the checkpoints of an lcc directory go while it is trained: DIR.checkpoints."""
    return directory.parent / f"{directory.name}.checkpoints"


def plan_of(directory: Path) -> Path:
    """Return where a planner's choice is kept while an lcc directory is made: DIR.plan.json."""
    return directory.parent / f"{directory.name}.plan.json"


def fits_of(directory: Path) -> Path:
    """Return where the fits of single sites go while an lcc directory is made: DIR.fits."""
    return directory.parent / f"{directory.name}.fits"


def _foreign(path: Path) -> list[Path]:
    """Return what is not ours in a directory."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.name not in FILES)


def _remove(path: Path) -> None:
    """Remove a directory that holds our files only."""
    if path.exists():
        for name in FILES:
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _sync(path: Path) -> None:
    """Have a file's or directory's content on disk before going on."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a directory can't be opened, and a rename is durable without
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Single files that lcc writes: whole, or not at all, and nothing lost."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lcc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_file(path: Path, *, force: bool = False) -> None:
    """Make sure, before any long work and leaving no trace, that a file can be written there.

    Raises: ArtifactError: it is no file name, it exists (without `force`), or the folder can't be written.
    """
    if path.is_dir() or not path.name:
        raise ArtifactError(f"{path} can't be written: it is a directory; name a file, such as model.onnx")
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists; choose another path, or replace it with --force")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"{path} can't be written: {folder.name} is no folder that you can write to")


@contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which takes its place if all goes well and is gone otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        yield part
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)

"""What was measured, kept on disk: one file for each set of conditions, one line for each measurement.

FOLDER/KIND-HASH.jsonl   first a line that states the conditions in full, then the records
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError

from lcc.errors import ArtifactError
from lcc.hashing import bytes_of
from lcc.specs import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

Record = TypeVar("Record", bound=Frozen)

PLAIN = (bool, int, float, str)


class Store(Generic[Record]):
    """The file of one kind of record under one set of conditions; `folder` None: nothing is read or kept."""

    def __init__(
        self, folder: Path | None, kind: str, conditions: Mapping[str, object], record: type[Record]
    ) -> None:
        self.folder, self.record = folder, record
        self._head = json.dumps({"conditions": conditions}).encode()
        self._name = f"{kind}-{hashlib.sha256(self._head).hexdigest()[:16]}.jsonl"

    def read(self) -> list[Record]:
        """Return what was measured under these conditions; a damaged line counts as not measured.

        Raises: ArtifactError: the folder can't be read.
        """
        if self.folder is None:
            return []
        try:
            lines = (self.folder / self._name).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._refusal("read", error) from error
        ours = lines[lines.index(self._head) + 1 :] if self._head in lines else []
        return [record for line in ours if (record := self._parsed(line)) is not None]

    def keep(self, records: Iterable[Record]) -> None:
        """Append records, in one write of whole lines, since another process may append too.

        Raises: ArtifactError: the folder can't be written.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / self._name).open("ab+", buffering=0) as file:
                file.seek(0)
                *whole, last = file.read().split(b"\n")
                lines = [b""] if last else []  # after a line cut short by a kill
                lines += [] if self._head in whole else [self._head]
                lines += [record.model_dump_json().encode() for record in records]
                file.write(b"".join(line + b"\n" for line in lines))
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refusal("written", error) from error

    def _parsed(self, line: bytes) -> Record | None:
        try:
            return self.record.model_validate_json(line)
        except ValidationError:
            return None

    def _refusal(self, what: str, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.folder}, where measurements are kept, can't be {what} ({error.strerror or error}); "
            "set LCC_CACHE to another folder"
        )


def cache_folder() -> Path:
    """Return where measurements are kept: $LCC_CACHE, else $XDG_CACHE_HOME/lcc, else ~/.cache/lcc."""
    if own := os.environ.get("LCC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcc"


def content_key(model: nn.Module, images: Tensor | None, *descriptions: str) -> str:
    """Return a hash over a network's code, weights, images if they count, and what else is said of it."""
    digest = hashlib.sha256(code_of(model).encode())
    tensors = [*sorted(model.state_dict().items()), *([] if images is None else [("images", images)])]
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    for text in descriptions:
        digest.update(text.encode())
    return digest.hexdigest()


@cache
def own_code() -> str:
    """Return a hash over lcc's source: what is worked out or timed with other code is not what it was."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def code_of(model: nn.Module) -> str:
    """Return the files that a network's classes are in, as far as there are any, and its attributes.

    torch's own classes are left out.
    """
    own = [module for module in model.modules() if _is_foreign(type(module))]
    texts = {}
    for kind in dict.fromkeys(kind for module in own for kind in type(module).__mro__ if _is_foreign(kind)):
        with suppress(OSError, TypeError):  # typed in, or compiled
            file = inspect.getsourcefile(kind) or ""
            texts[file] = Path(file).read_text(encoding="utf-8", errors="replace")
    return f"{''.join(texts.values())}{[_described(dict(sorted(vars(module).items()))) for module in own]}"


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins")


def _described(value: object) -> object:
    """Return what an attribute's value is, as far as it is plain data, and a function's or a type's name."""
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items() if isinstance(key, str | int)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _described(getattr(value, field.name)) for field in fields(value)}
    return getattr(value, "__qualname__", type(value).__name__)

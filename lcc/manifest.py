"""What an lcc directory says about its network: manifest.json as data, read strictly."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from lcc import __version__
from lcc.directory import MANIFEST, Directory
from lcc.errors import ArtifactError
from lcc.methods import Fit
from lcc.models import Preprocessing, Source
from lcc.plan import Plan
from lcc.specs import Frozen
from lcc.validation import in_words

FORMAT = "lcc/1"
PACKAGES = ("torch", "torchvision", "timm")
ABSOLUTE_PATH = re.compile(r"(?<![\w./\\])(?:[A-Za-z]:[\\/]|/(?=[A-Za-z_.]))(?:[^\s'\",;:=\\/]+[\\/])*")

Hashed = Literal["model.safetensors", "probe.safetensors", "recipe.toml"]


def _portable_line(text: str) -> str:
    """Cut absolute paths down to their last part: a manifest tells nothing of the machine it was made on."""
    return ABSOLUTE_PATH.sub("", text)


def _portable_value(text: str) -> str:
    return PurePath(text).name if PurePath(text).is_absolute() else _portable_line(text)


class Event(Frozen):
    """Something that was done to the network; absolute paths are cut down to names.

    `date` is ISO 8601 in UTC; a `seed` of None is not known.
    """

    kind: Literal["convert", "train", "measure"]
    command: Annotated[str, AfterValidator(_portable_line)]
    date: str
    versions: dict[str, str]
    seed: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    details: dict[str, Annotated[str, AfterValidator(_portable_value)]] = Field(default_factory=dict)

    @property
    def changed_weights(self) -> bool:
        """Whether what was measured before it is of other weights."""
        return self.kind != "measure"


class Manifest(Frozen):
    """Everything but the numbers themselves.

    `fits` tells how the operators got their first weights, at conversion. `ties` maps the further names of a
    tensor to the one it is stored under. `hashes` are SHA-256, by file.
    """

    format: Literal["lcc/1"] = "lcc/1"
    source: Source
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    plan: Plan = Field(default_factory=Plan)
    fits: dict[str, Fit] = Field(default_factory=dict)
    history: tuple[Event, ...] = ()
    ties: dict[str, str] = Field(default_factory=dict)
    hashes: dict[Hashed, str] = Field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured of the present weights; metrics older than their last change are left out."""
        found: dict[str, float] = {}
        for event in self.history:
            found = event.metrics if event.changed_weights else {**found, **event.metrics}
        return found


def versions() -> dict[str, str]:
    """Return the versions of what makes a result."""
    packages = {package: metadata.version(package) for package in PACKAGES}
    return {"lcc": __version__, "python": platform.python_version(), **packages}


def command_line() -> str:
    """Return the command that is running, for the history of what it makes."""
    return shlex.join(["lcc", *sys.argv[1:]])


def event_now(
    kind: Literal["convert", "train", "measure"],
    command: str,
    *,
    seed: int | None = None,
    metrics: dict[str, float] | None = None,
    details: dict[str, str] | None = None,
) -> Event:
    """Return the event that happens now, with the versions of what makes it happen."""
    return Event(
        kind=kind,
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        seed=seed,
        metrics=metrics or {},
        details=details or {},
    )


def read(directory: str | Path) -> Manifest:
    """Return the manifest of an lcc directory. Raises: ArtifactError: none, damaged, or of another lcc."""
    root = Path(directory)
    path = root / MANIFEST
    if not root.exists():
        raise ArtifactError(Directory(root).what_is_left())
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{root} is not an lcc directory: there is no {MANIFEST} in it") from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy it again from where it is whole") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form is None:
        raise ArtifactError(f"{root} is not an lcc directory: its {MANIFEST} names no format")
    if form != FORMAT:
        raise ArtifactError(f"{path} has format {form!r}; lcc {__version__} reads {FORMAT!r}: upgrade lcc")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: {in_words(error, Manifest)}; it was edited, or a newer lcc wrote it: upgrade lcc"
        ) from error

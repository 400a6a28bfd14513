"""Fits of single sites that survive a kill, so that a long calibration can go on where it stopped.

DIR/of.txt             what is being fitted: a hash over the original's weights, the plan and the images
DIR/SITE.safetensors   the operator's tensors, its fit as metadata; written under another name, then renamed
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lcc.errors import ArtifactError
from lcc.methods import Fit

if TYPE_CHECKING:
    from pathlib import Path

    from lcc.methods import LowCostOp

KEY = "of.txt"


class FitStore:
    """A folder with one file per fitted site."""

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        """Begin or go on. Raises: ArtifactError: the folder is another conversion's, or not to be resumed."""
        self.folder = folder
        path = folder / KEY
        try:
            if _has_fits(folder):
                if not resume:
                    refuse_leftovers(folder)
                if path.read_text(encoding="utf-8").strip() != key:
                    raise ArtifactError(
                        f"{folder} has fits of another network, plan, set of images or lcc; remove the folder"
                    )
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(key + "\n", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"{folder} can't be written: {error.strerror or error}") from error

    def restore_(self, site: str, operator: LowCostOp) -> Fit | None:
        """Give the operator the weights kept for it and return its fit; None if there are none."""
        path = self._file(site)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                fit = Fit.model_validate_json(file.metadata()["fit"])
            operator.load_state_dict(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} is damaged: remove it, and that site is fitted again") from error
        return fit

    def keep(self, site: str, operator: LowCostOp, fit: Fit) -> None:
        """Write down a fitted site. Raises: ArtifactError: the folder can't be written."""
        path = self._file(site)
        part = path.with_suffix(".part")
        tensors = {name: tensor.contiguous() for name, tensor in operator.state_dict().items()}
        try:
            save_file(tensors, part, metadata={"fit": fit.model_dump_json()})
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} can't be written: {error}") from error

    def _file(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"


def refuse_leftovers(folder: Path) -> None:
    """Refuse to mix new fits with an earlier conversion's. Raises: ArtifactError: there are some."""
    if _has_fits(folder):
        raise ArtifactError(f"{folder} has fits of an earlier conversion: go on with --resume, or remove it")


def _has_fits(folder: Path) -> bool:
    """Whether fits are kept there. Raises: ArtifactError: something else is."""
    if not any(folder.glob("*.safetensors")):
        return False
    if not (folder / KEY).is_file():
        raise ArtifactError(f"{folder} is where fits would be kept, and holds something else; move it")
    return True


def discard(folder: Path) -> None:
    """Remove a folder of fits; what lcc did not write there stays, and so does the folder then."""
    if not (folder / KEY).is_file():
        return
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.part"), folder / KEY):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()

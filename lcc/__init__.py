"""lcc makes convolutional networks cheap: `lcc.load(DIR)` gives the network, `lcc.save(model, DIR)` keeps it.

Importing lcc imports nothing heavy; torch is loaded by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save"]


def load(directory: str | Path, **options: Any) -> nn.Module:
    """Return the network kept in an lcc directory; see `lcc.artifact.load` for the options and errors."""
    from lcc import artifact

    return artifact.load(directory, **options).loaded.model


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a network that `load` gave back into its directory; see `lcc.artifact.save_back`."""
    from lcc import artifact

    artifact.save_back(model, directory)

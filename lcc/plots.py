"""What plots have in common: colours, scales, and the file that is written. matplotlib is optional."""

from __future__ import annotations

import os
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lcc.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Okabe and Ito's colours, which the colour-blind tell apart too; without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "0.35"
SMALL, LETTERS = 6.5, 20  # points, and how many letters of that size fit in an inch


def check_plot(path: Path) -> None:
    """Make sure, before any long work, that a plot can be written there.

    Raises: RecipeError: matplotlib is missing, it knows no such format, or the folder can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise RecipeError("--plot needs matplotlib: pip install matplotlib") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise RecipeError(f"--plot {path}: name a file such as sweep.png; known: {', '.join(known)}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise RecipeError(f"--plot {path}: there is no such folder that you can write to")


def scale_(panel: Any, values: Sequence[int]) -> None:
    """Give a panel logarithmic scales, a tick at each of the values, and a faint grid."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(values, labels=[str(value) for value in values])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.25, linewidth=0.6)


def save(figure: Any, path: Path, notes: Sequence[str]) -> None:
    """Write a figure with notes below it. Raises: RecipeError: it can't be written."""
    width = figure.get_size_inches()[0]
    lines = [part for note in notes for part in wrap(note, int(width * LETTERS))]
    figure.supxlabel("\n".join(lines), fontsize=SMALL, color=GREY)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise RecipeError(f"--plot {path}: can't be written ({error.strerror})") from error

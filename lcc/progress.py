"""Progress on stderr: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REDRAW_SECONDS = 0.25


def say(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def bar(
    title: str, total: int, *, start: int = 0, shown: bool | None = None
) -> Iterator[Callable[..., None]]:
    """Give a function `tick(done, numbers)` that moves the bar; `shown` None: only on a terminal.

    `numbers` is called, for the text beside the bar, only when it is redrawn: it may be slow. The bar is
    redrawn from `tick`, not from a thread of its own, so that processes can start while it is up.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _done, _numbers=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=start, numbers="")
        drawn = 0.0

        def tick(done: int, numbers: Callable[[], str] | None = None) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= REDRAW_SECONDS or done == total:
                progress.update(task, completed=done, numbers="" if numbers is None else numbers())
                progress.refresh()
                drawn = time.monotonic()

        yield tick

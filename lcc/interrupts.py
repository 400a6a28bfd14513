"""Ctrl-C and termination, noted instead of obeyed at once."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stop:
    """Whether a signal asked the run to stop."""

    requested = False


@contextmanager
def signals() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM instead of dying of it; the second does what it did before."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def request(_number: int, _frame: object) -> None:
        stop.requested = True
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()

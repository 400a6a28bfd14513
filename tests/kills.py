"""Runs that are killed: an exception that nothing catches, and a place where it is raised."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from lcc import checkpoints


class KilledError(Exception):
    """Stands for a signal that leaves no time for anything."""


@contextmanager
def killed_after_checkpoint(call=0):
    """Kill what is run in the block as soon as checkpoint number `call` (from 0) is written."""
    real, calls = checkpoints.write, []

    def write(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) > call:
            raise KilledError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "write", write)
        with pytest.raises(KilledError):
            yield

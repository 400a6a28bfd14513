"""How much memory is left, and whether an error says that there is none."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.errors import LccError

CGROUP = Path("/sys/fs/cgroup")  # where Linux states a container's limit (version 2)


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has left; on the CPU, no more than a container's limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(psutil.virtual_memory().available, _left_in_container()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that a device, or the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextmanager
def out_of_memory_as(refusal: LccError) -> Iterator[None]:
    """Raise a refusal that says what takes less, where there is no memory left."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise refusal from error


def _left_in_container() -> float:
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(held["inactive_file"]))  # files that are cached make room
    except (OSError, ValueError, KeyError):  # there is none, or it says "max"
        return math.inf

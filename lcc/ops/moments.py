"""Mean and variance of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of each channel of (N, C, ...), at least in float32, both (C,).

    Several times as fast on a CPU as torch.var_mean. They are taken about a value of the channel's own, so
    that a constant has no variance at all, and a large mean costs no digits.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (-1, 1)).flatten(2)
    about = exact[:1, :, :1]
    apart = exact - about
    mean = apart.mean((0, 2))
    variance = torch.linalg.vecdot(apart, apart).mean(0) / apart.shape[2] - mean.square()
    return variance.clamp_min(0), mean + about[0, :, 0]

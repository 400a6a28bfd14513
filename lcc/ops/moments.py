"""Mean and variance of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of each channel of (N, C, ...), at least in float32, both (C,).

    Twice as fast on a CPU as torch.var_mean. They are taken about a value of the channel's own first, so that
    a constant has no variance at all, and then about the mean.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (-1, 1)).flatten(2)
    about = exact[:1, :, :1]
    apart = exact - about
    mean = apart.mean((0, 2))
    variance = apart.sub_(mean[:, None]).square_().mean((0, 2))
    return variance, mean + about[0, :, 0]


class PooledMoments:
    """Variance and mean of each channel over several tensors (N, C, ...), as of all of them at once."""

    def __init__(self) -> None:
        self.count = 0
        self.variance = self.mean = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Take in one more (Chan, Golub and LeVeque 1979, "Updating formulae", 2.1)."""
        variance, mean = (moment.double() for moment in moments(x))
        count = x.numel() // x.shape[1]
        share = count / (self.count + count)
        apart = mean - self.mean
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * apart.square()
        self.mean = self.mean + share * apart
        self.count += count

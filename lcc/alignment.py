"""Inner channels put into the order in which kernels that are to be one agree best.

The Hungarian method finds the order in which a pair of convolutions agrees best with the kernels that its own
are to be shared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lcc.inner_channels import settle_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lcc.inner_channels import InnerPair

ROUNDS = 50  # over all pairs; networks settle within ten
LEAST_GAIN = 1e-12  # of the agreement there is; less is rounding


class Alignment(NamedTuple):
    """How far kernels are from the mean of their group, before and after every round.

    Relative to the kernels, each of them counted as large as the others: 0 is equal, sqrt(1 - 1 / n) what n
    kernels have that have nothing in common. `orders`: for each convolution of which outputs changed places,
    which of them comes at each place.
    """

    distances: tuple[float, ...]
    orders: dict[str, tuple[int, ...]]


@torch.no_grad()
def align_(model: nn.Module, groups: Sequence[Sequence[str]], pairs: Sequence[InnerPair]) -> Alignment:
    """Reorder inner channels, in place, so that the kernels of every group come close to their mean.

    `groups` name convolutions of one shape that are to share a kernel. A pair at a time takes the order with
    the largest inner product with the kernels of the others (the best one, where its two convolutions are in
    different groups), else with the mean, if that brings the groups closer together; round after round until
    nothing moves. Distances never grow.
    """
    banks = _Banks(model, groups)
    distances = [banks.distance()]
    held = [pair for pair in pairs if banks.hold(pair)]
    orders = settle_(model, held, banks.improve, ROUNDS, lambda: distances.append(banks.distance()))
    return Alignment(tuple(distances), orders)


class _Banks:
    """The kernels of every group, all of norm 1: (C_out, C_in, taps) in float64; and what they add up to."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        self.kernels = {name: _unit(_weight(model, name)) for group in groups for name in group}
        self.number = {name: number for number, group in enumerate(groups) for name in group}
        self.sizes = [len(group) for group in groups]
        self.sums = {
            number: torch.stack([self.kernels[name] for name in group]).sum(0)
            for number, group in enumerate(groups)
        }
        self.total = float(sum(kernel.square().sum() for kernel in self.kernels.values()))

    def hold(self, pair: InnerPair) -> bool:
        """Whether an order of the pair's channels matters to them."""
        return pair.first in self.kernels or pair.second in self.kernels

    def distance(self) -> float:
        """Return how far the kernels are from their means, relative to the kernels."""
        return max(1 - self._agreement(self.sums) / self.total, 0.0) ** 0.5 if self.total else 0.0

    def improve(self, pair: InnerPair) -> Tensor | None:
        """Take on a better order of a pair's channels and return it; None: found none."""
        held = {name: axis for axis, name in enumerate((pair.first, pair.second)) if name in self.kernels}
        present = {self.number[name]: self.sums[self.number[name]] for name in held}
        others = self._plus(present, {name: -self.kernels[name] for name in held})
        least = self._agreement(present) * (1 + LEAST_GAIN)
        for reference in (others, present):
            order = self._best_order(held, reference)
            kernels = {name: self.kernels[name].index_select(axis, order) for name, axis in held.items()}
            sums = self._plus(others, kernels)
            if self._agreement(sums) > least:
                self.sums |= sums
                self.kernels |= kernels
                return order
        return None

    def _agreement(self, sums: Mapping[int, Tensor]) -> float:
        # sum |W - mean|^2 = sum |W|^2 - |sum W|^2 / n, and no order changes |W|
        return sum(float(total.square().sum()) / self.sizes[number] for number, total in sums.items())

    def _plus(self, sums: Mapping[int, Tensor], kernels: Mapping[str, Tensor]) -> dict[int, Tensor]:
        changed = dict(sums)
        for name, kernel in kernels.items():
            changed[self.number[name]] = changed[self.number[name]] + kernel
        return changed

    def _best_order(self, held: Mapping[str, int], sums: Mapping[int, Tensor]) -> Tensor:
        """Return the order with the largest inner product of kernels with means; `held`: name to axis."""
        gains = []
        for name, axis in held.items():
            mean = sums[self.number[name]] / self.sizes[self.number[name]]
            rows = (kernel.transpose(0, axis).flatten(1).float() for kernel in (mean, self.kernels[name]))
            gains.append(next(rows) @ next(rows).T)  # half as long in float32; what comes of it is checked
        _, columns = linear_sum_assignment(torch.stack(gains).sum(0).numpy(), maximize=True)
        return torch.as_tensor(columns)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _unit(weight: Tensor) -> Tensor:
    kernel = weight.detach().to("cpu", torch.float64).flatten(2)
    norm: Tensor = torch.linalg.vector_norm(kernel)
    return kernel / norm.clamp_min(torch.finfo(kernel.dtype).tiny)

"""Least squares of a kernel that several sites share: each site's moments, pooled."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcc.ops.fit import best_ridge, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.ops.fit import Gram, Solution
    from lcc.ops.sampling import SampledGrams


class SharedStatistics:
    """The Gram matrices of one site, its outputs in units of their own where their size is free.

    `units` (C_out,) are the standard deviations of the first outputs seen, else ones.
    """

    def __init__(
        self, grams: SampledGrams[Any], *, free_means: bool, free_size: bool, one_size: bool
    ) -> None:
        self.grams, self.free_means, self.free_size, self.one_size = grams, free_means, free_size, one_size
        self.units: Tensor = torch.empty(0)

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C_in, H, W) inputs and the (N, C_out, H', W') outputs wanted for them."""
        if not len(self.units):
            self.units = self._units(outputs)
        self.grams.add(inputs, outputs / self.units[:, None, None])

    def _units(self, outputs: Tensor) -> Tensor:
        if not self.free_size:
            return outputs.new_ones(outputs.shape[1])
        variances = outputs.var((0, 2, 3), correction=0)
        if self.one_size:
            variances = variances.mean().expand_as(variances)
        return torch.where(variances > 0, variances.sqrt(), 1.0)  # a dead channel has no unit

    def moments(self) -> tuple[Gram[Any], Gram[Any]]:
        """Return those to fit to and those held out, about the site's own means where a BatchNorm follows."""
        train, held_out = self.grams.train, self.grams.held_out
        if train.count == 0 or held_out.count == 0:  # too few images to hold any out
            train = held_out = train + held_out
        return (train.centered(), held_out.centered()) if self.free_means else (train, held_out)


def pooled(seen: Sequence[SharedStatistics], start: Any) -> Solution[Any]:
    """Return the ridge solution for all sites together, towards the weights `start`.

    Sites before a BatchNorm have means of their own; a bias is common to all.
    """
    train, held_out = (reduce(add, parts) for parts in zip(*(entry.moments() for entry in seen), strict=True))
    one_mean = seen[0].grams.centered and not any(entry.free_means for entry in seen)
    return best_ridge(train, held_out, start, centered=one_mean)


def site_error(entry: SharedStatistics, weights: Any, bias: Tensor | None) -> float:
    """Return the relative error of the weights on one site's held-out images.

    With a common `bias` and no BatchNorm behind, what is left of the site's mean counts as an error.
    """
    _, moments = entry.moments()
    squares = entry.units.double().square()
    about_means, errors = moments, moments.squared_error(weights)
    if bias is not None and not entry.free_means:
        about_means = moments.centered()
        left = (moments.intercept(weights).flatten() - bias).square() * moments.count
        errors = about_means.squared_error(weights)
        errors = errors.flatten() + _spread(left, errors.numel())
    return relative_error(_weighted(errors, squares), _weighted(about_means.output_output, squares))


def _weighted(parts: Tensor, squares: Tensor) -> Tensor:
    """Return the total in the outputs' own size; parts that are not by channel have one unit for all."""
    if parts.numel() != squares.numel():
        return parts.sum() * squares[0]
    return (parts.flatten() * squares).sum()


def _spread(by_channel: Tensor, parts: int) -> Tensor:
    """Return what is known by channel as that many parts with the same total."""
    return by_channel if by_channel.numel() == parts else by_channel.sum().expand(parts) / parts

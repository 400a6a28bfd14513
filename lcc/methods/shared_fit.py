"""Least squares of a kernel that several sites share: each site's moments, pooled."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lcc.ops.fit import best_ridge, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.methods.base import LinearOp
    from lcc.ops.fit import Gram
    from lcc.ops.sampling import SampledGrams


class SharedStatistics:
    """The Gram matrices of one site, with outputs brought to the size of the start's where it is free.

    `sizes` (C_out,) says how large the first outputs seen are beside what the kernel, as it is then, makes
    of the inputs: the ratio of standard deviations; ones where the size is not free. `weight` is what the
    site's squared errors count then, so that every site counts alike however large its inputs are.
    """

    def __init__(self, kernel: LinearOp, scale: Tensor | None, *, free_means: bool) -> None:
        self.grams: SampledGrams[Any] = kernel.statistics(free_means=free_means)
        self.kernel, self.scale, self.free_means = kernel, scale, free_means
        self.sizes: Tensor = torch.empty(0)
        self.weight = 1.0

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C_in, H, W) inputs and the (N, C_out, H', W') outputs wanted for them."""
        if not len(self.sizes):
            self._compare(outputs, self.kernel(inputs))
        self.grams.add(inputs, outputs / self.sizes[:, None, None])

    def _compare(self, wanted: Tensor, present: Tensor) -> None:
        self.sizes = wanted.new_ones(wanted.shape[1])
        if not self.free_means and self.scale is None:
            return
        before, after = (y.var((0, 2, 3), correction=0) for y in (present, wanted))
        if self.kernel.one_scale:
            before, after = (variances.mean().expand_as(variances) for variances in (before, after))
        known = (before > 0) & (after > 0)  # a dead channel has no size
        self.sizes = torch.where(known, (after / before).sqrt(), 1.0)
        if self.scale is not None:
            self.sizes = self.sizes.copysign(self.scale)
        self.weight = 1 / float(before.mean()) if known.any() else 1.0

    def moments(self, *, own_mean: bool) -> tuple[Gram[Any], Gram[Any]]:
        """Return those to fit to and those held out; `own_mean`: about the site's own means."""
        train, held_out = self.grams.train, self.grams.held_out
        if train.count == 0 or held_out.count == 0:  # too few images to hold any out
            train = held_out = train + held_out
        return (train.centered(), held_out.centered()) if own_mean else (train, held_out)


class BankFit(NamedTuple):
    """What fits all sites together: weights, a bias (C_out,) or None, and the ridge, None for the start.

    `errors` are each site's relative errors on held-out images, of the start and of weights that have not
    seen them.
    """

    weights: Any
    bias: Tensor | None
    ridge: float | None
    errors: list[tuple[float, float]]


def fit_bank(seen: Sequence[SharedStatistics], start: Any, *, bias: bool) -> BankFit:
    """Return the ridge solution for all sites together, towards the weights `start`.

    A site before a BatchNorm has means of its own; a bias is common to all others.
    """
    mixed = any(entry.free_means for entry in seen)
    parts = [
        [m.weighted(entry.weight) for m in entry.moments(own_mean=entry.free_means or (mixed and bias))]
        for entry in seen
    ]
    train, held_out = (reduce(add, part) for part in zip(*parts, strict=True))
    found = best_ridge(train, held_out, start, centered=bias and not mixed)
    judged = start if found.ridge is None else _solved(train, found.ridge, start, centered=bias and not mixed)
    told = [part for part, entry in zip(parts, seen, strict=True) if not entry.free_means] or parts
    totals = reduce(add, [moments for part in told for moments in part])
    before, between, after = (
        totals.intercept(weights).flatten() if bias else None for weights in (start, judged, found.weights)
    )
    return BankFit(
        weights=found.weights,
        bias=after,
        ridge=found.ridge,
        errors=[(_error(entry, start, before), _error(entry, judged, between)) for entry in seen],
    )


def _solved(train: Gram[Any], ridge: float, start: Any, *, centered: bool) -> Any:
    return (train.centered() if centered else train).solve(ridge, start)


def _error(entry: SharedStatistics, weights: Any, bias: Tensor | None) -> float:
    """Return the relative error of the weights on one site's held-out images.

    With a common `bias` and no BatchNorm behind, what is left of the site's mean counts as an error.
    """
    has_mean = bias is not None and not entry.free_means
    _, moments = entry.moments(own_mean=entry.free_means or has_mean)
    errors, squares = moments.squared_error(weights), entry.sizes.double().square()
    if bias is not None and has_mean:
        left = (moments.intercept(weights).flatten() - bias).square() * moments.count
        errors = errors.flatten() + _spread(left, errors.numel())
    return relative_error(_weighted(errors, squares), _weighted(moments.output_output, squares))


def _weighted(parts: Tensor, squares: Tensor) -> Tensor:
    """Return the total in the outputs' own size; parts that are not by channel have one size for all."""
    if parts.numel() != squares.numel():
        return parts.sum() * squares[0]
    return (parts.flatten() * squares).sum()


def _spread(by_channel: Tensor, parts: int) -> Tensor:
    """Return what is known by channel as that many parts with the same total."""
    return by_channel if by_channel.numel() == parts else by_channel.sum().expand(parts) / parts

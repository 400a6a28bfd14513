"""Least squares from Gram matrices: accumulated batch by batch, solved in float64, no activations kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

HELD_OUT_EVERY = 5  # every fifth image is not fitted to, judges the ridge and gives the reported error
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)

W = TypeVar("W")


class Gram(ABC, Generic[W]):
    """Second moments of a regression with weights of type W. All attributes are sums over samples, but FIXED.

    `count` samples; `output_output` sums to the squared norm of the outputs.
    """

    FIXED: ClassVar[frozenset[str]] = frozenset()
    count: int
    output_output: Tensor

    def __add__(self, other: Self) -> Self:
        total = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(total, name, value if name in self.FIXED else value + getattr(other, name))
        return total

    def weighted(self, factor: float) -> Self:
        """Return the moments of samples that count `factor` times each."""
        result = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(result, name, value if name in self.FIXED else value * factor)
        return result

    @abstractmethod
    def centered(self) -> Self:
        """Return the moments about the means: those of samples with their means taken off."""

    @abstractmethod
    def intercept(self, weights: W) -> Tensor:
        """Return what must be added to the outputs of `weights` to make their means right."""

    @abstractmethod
    def squared_error(self, weights: W) -> Tensor:
        """Return parts whose total is the sum over the samples of |output - prediction|^2."""

    @abstractmethod
    def solve(self, ridge: float, start: W) -> W:
        """Return the weights with the least squared error plus `ridge` times their distance to `start`.

        `ridge` is in units of the mean square of the regressors. Raises: ValueError: NaN or infinity.
        """


class Solution(NamedTuple, Generic[W]):
    """The weights found, and their errors relative to the outputs, on held-out samples.

    `ridge` is None where the start was best. `moments` are those of all samples, not centred.
    """

    weights: W
    ridge: float | None
    start_error: float
    relative_error: float
    moments: Gram[W]


@cache
def _libraries() -> ThreadpoolController:
    """Return what numpy and scipy compute with. Its idle threads spin, which takes torch's cores from it."""
    return ThreadpoolController()


def best_ridge(train: Gram[W], held_out: Gram[W], start: W, *, centered: bool) -> Solution[W]:
    """Return the ridge solution on all samples, with the ridge that has the least error on held-out ones.

    Where none beats the start there, the start is kept. `centered`: means are free.
    """
    both = train + held_out
    if train.count == 0 or held_out.count == 0:  # too few images to hold any out
        train = held_out = both
    everything = both
    if centered:
        train, held_out, everything = train.centered(), held_out.centered(), both.centered()
    start_error = held_out.squared_error(start).sum()
    with _libraries().limit(limits=1, user_api="blas"):
        errors = {ridge: held_out.squared_error(train.solve(ridge, start)).sum() for ridge in RIDGES}
        ridge = min(errors, key=lambda key: float(errors[key]))
        helps = bool(errors[ridge] < start_error)
        weights = everything.solve(ridge, start) if helps else start
    norm = held_out.output_output
    return Solution(
        weights=weights,
        ridge=ridge if helps else None,
        start_error=relative_error(start_error, norm),
        relative_error=relative_error(errors[ridge] if helps else start_error, norm),
        moments=both,
    )


class ArrowWeights(NamedTuple):
    """Weights of an arrow-shaped regression: common (G, q, c), private (G, q, p)."""

    common: Tensor
    private: Tensor


class ArrowGram(Gram[ArrowWeights]):
    """Second moments of a regression in which G groups of outputs share regressors and own others.

    Outputs y (G, q) are explained by c common regressors and by p private ones of their group:
    y[g] = W[g] x_common + V[g] x_private[g]. The normal matrix of a group is an arrow: one shared block,
    so it is factorised once, and the private blocks follow by their Schur complements.
    Products are taken in the dtype of the samples, at least float32, and summed in float64.
    """

    def __init__(self, common: int, private: tuple[int, int], outputs: int, device: torch.device) -> None:
        groups, width = private

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.rounding = zeros()
        self.common_sum, self.private_sum, self.output_sum = (
            zeros(common),
            zeros(groups, width),
            zeros(groups, outputs),
        )
        self.common_common = zeros(common, common)
        self.common_private = zeros(groups, common, width)
        self.private_private = zeros(groups, width, width)
        self.output_common = zeros(groups, outputs, common)
        self.output_private = zeros(groups, outputs, width)
        self.output_output = zeros(groups, outputs)

    def add(self, common: Tensor, private: Tensor, outputs: Tensor) -> None:
        """Take in M samples: common (M, c), private (M, G, p), outputs (M, G, q)."""
        exact = torch.promote_types(common.dtype, torch.float32)
        common, private, outputs = common.to(exact), private.to(exact), outputs.to(exact)
        groups, width = private.shape[1:]
        self.count += len(common)
        self.common_sum += common.sum(0)
        self.private_sum += private.sum(0)
        self.output_sum += outputs.sum(0)
        commons, privates = common.T @ common, torch.einsum("mgp,mgr->gpr", private, private)
        self.common_common += commons
        crossed = common.T @ private.flatten(1)
        self.common_private += crossed.reshape(common.shape[1], groups, width).transpose(0, 1)
        self.private_private += privates
        energy = commons.trace() + privates.diagonal(dim1=1, dim2=2).sum(1).amax()
        self.rounding += torch.finfo(exact).eps * energy
        self.output_common += (outputs.flatten(1).T @ common).reshape(groups, -1, common.shape[1])
        self.output_private += torch.einsum("mgq,mgp->gqp", outputs, private)
        self.output_output += outputs.square().sum(0)

    def centered(self) -> ArrowGram:
        """Return the moments about the means: those of samples with their means taken off."""
        result = object.__new__(ArrowGram)
        vars(result).update(vars(self))
        x, z, y = (total / self.count for total in (self.common_sum, self.private_sum, self.output_sum))
        n = self.count
        result.common_common = self.common_common - n * torch.outer(x, x)
        result.common_private = self.common_private - n * torch.einsum("c,gp->gcp", x, z)
        result.private_private = self.private_private - n * torch.einsum("gp,gr->gpr", z, z)
        result.output_common = self.output_common - n * torch.einsum("gq,c->gqc", y, x)
        result.output_private = self.output_private - n * torch.einsum("gq,gp->gqp", y, z)
        result.output_output = self.output_output - n * y.square()
        return result

    def intercept(self, weights: ArrowWeights) -> Tensor:
        """Return (G, q), what must be added to the outputs of `weights` to make their means right."""
        explained = weights.common @ self.common_sum
        explained = explained + torch.einsum("gqp,gp->gq", weights.private, self.private_sum)
        return (self.output_sum - explained) / self.count

    def squared_error(self, weights: ArrowWeights) -> Tensor:
        """Return (G, q), the sum over the samples of (output - prediction)^2."""
        u, v = weights
        quadratic = torch.einsum("gqc,gqc->gq", u @ self.common_common, u)
        quadratic = quadratic + 2 * torch.einsum("gqp,gqp->gq", u @ self.common_private, v)
        quadratic = quadratic + torch.einsum("gqp,gqp->gq", v @ self.private_private, v)
        linear = torch.einsum("gqc,gqc->gq", self.output_common, u)
        linear = linear + torch.einsum("gqp,gqp->gq", self.output_private, v)
        return (self.output_output - 2 * linear + quadratic).clamp_min(0)

    def solve(self, ridge: float, start: ArrowWeights) -> ArrowWeights:
        """Return the weights with the least squared error plus `ridge` times their distance to `start`.

        `ridge` is in units of the mean square of the common regressors. Large values give `start` back. It is
        never less than what rounding did to the moments: with few samples, or regressors that nearly depend
        on each other, they would not be positive definite.
        """
        # numpy and scipy, not torch: its batched LU gave MKL errors and no result on two threads (2026-11).
        shared, cross, private, wanted_common, wanted_private, start_common, start_private = (
            tensor.cpu().numpy()
            for tensor in (
                self.common_common,
                self.common_private,
                self.private_private,
                self.output_common,
                self.output_private,
                *start,
            )
        )
        groups, common, width = cross.shape
        scale = float(np.diagonal(shared).mean())
        pull = max(ridge * scale, float(self.rounding)) or 1.0  # dead inputs: any pull gives the start back
        wanted_common = wanted_common + pull * start_common
        wanted_private = wanted_private + pull * start_private
        factor = scipy.linalg.cho_factor(shared + pull * np.eye(common))
        # One solve for all groups: A^-1 [B | C^T], then each group's Schur complement.
        columns = np.concatenate(
            [cross.transpose(1, 0, 2).reshape(common, -1), wanted_common.reshape(-1, common).T], axis=1
        )
        solved = scipy.linalg.cho_solve(factor, columns)
        coupling = solved[:, : groups * width].reshape(common, groups, width).transpose(1, 0, 2)
        direct = solved[:, groups * width :].T.reshape(groups, -1, common)
        complement = private + pull * np.eye(width) - cross.transpose(0, 2, 1) @ coupling
        residual = wanted_private - wanted_common @ coupling
        v = np.linalg.solve(complement, residual.transpose(0, 2, 1)).transpose(0, 2, 1)
        u = direct - v @ coupling.transpose(0, 2, 1)
        device = self.common_common.device
        weights = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (u, v))
        return ArrowWeights(*weights)


def relative_error(squared_error: Tensor, squared_norm: Tensor) -> float:
    """Return the square root of the ratio of two sums; 0/0 is 0."""
    error, norm = (float(squares.sum(dtype=torch.float64)) for squares in (squared_error, squared_norm))
    if error == 0:
        return 0.0
    return (error / norm) ** 0.5 if norm > 0 else float("inf")

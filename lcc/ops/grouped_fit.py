"""Least squares of a grouped convolution: every group of outputs sees its own inputs under all taps."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lcc.ops.fit import Gram


class GroupedGram(Gram[Tensor]):
    """Second moments of y[g] = W[g] x[g] in G groups, with p regressors x and q outputs y each.

    Weights are (G, q, p). Products are taken in the dtype of the samples, at least float32, and summed in
    float64.
    """

    def __init__(self, groups: int, regressors: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.rounding = zeros(groups)
        self.regressor_sum = zeros(groups, regressors)
        self.output_sum = zeros(groups, outputs)
        self.regressor_regressor = zeros(groups, regressors, regressors)
        self.output_regressor = zeros(groups, outputs, regressors)
        self.output_output = zeros(groups, outputs)

    def add(self, regressors: Tensor, outputs: Tensor) -> None:
        """Take in M samples: regressors (M, G, p), outputs (M, G, q)."""
        exact = torch.promote_types(regressors.dtype, torch.float32)
        x, y = regressors.to(exact).transpose(0, 1), outputs.to(exact).transpose(0, 1)  # (G, M, p), (G, M, q)
        self.count += x.shape[1]
        self.rounding += torch.finfo(exact).eps * x.square().sum((1, 2))
        self.regressor_sum += x.sum(1)
        self.output_sum += y.sum(1)
        self.regressor_regressor += x.transpose(1, 2) @ x
        self.output_regressor += y.transpose(1, 2) @ x
        self.output_output += y.square().sum(1)

    def centered(self) -> GroupedGram:
        """Return the moments about the means: those of samples with their means taken off."""
        result = object.__new__(GroupedGram)
        vars(result).update(vars(self))
        x, y, n = self.regressor_sum / self.count, self.output_sum / self.count, self.count
        result.regressor_regressor = self.regressor_regressor - n * torch.einsum("gp,gr->gpr", x, x)
        result.output_regressor = self.output_regressor - n * torch.einsum("gq,gp->gqp", y, x)
        result.output_output = self.output_output - n * y.square()
        return result

    def intercept(self, weights: Tensor) -> Tensor:
        """Return (G, q), what must be added to the outputs of `weights` to make their means right."""
        return (self.output_sum - torch.einsum("gqp,gp->gq", weights, self.regressor_sum)) / self.count

    def squared_error(self, weights: Tensor) -> Tensor:
        """Return (G, q), the sum over the samples of (output - prediction)^2."""
        quadratic = torch.einsum("gqp,gqp->gq", weights @ self.regressor_regressor, weights)
        linear = torch.einsum("gqp,gqp->gq", self.output_regressor, weights)
        return (self.output_output - 2 * linear + quadratic).clamp_min(0)

    def solve(self, ridge: float, start: Tensor) -> Tensor:
        """Return the weights with the least squared error plus `ridge` times their distance to `start`.

        `ridge` is in units of the mean square of a group's regressors, and never less than what rounding did
        to the moments. Large values give `start` back. Raises: ValueError: NaN or infinity.
        """
        moments, wanted, pulled_to = (
            tensor.cpu().numpy() for tensor in (self.regressor_regressor, self.output_regressor, start)
        )
        identity = np.eye(moments.shape[1])
        scales = np.maximum(
            ridge * moments.diagonal(axis1=1, axis2=2).mean(axis=1), self.rounding.cpu().numpy()
        )
        found = np.empty_like(wanted)
        for group, scale in enumerate(scales):
            pull = scale or 1.0  # dead inputs: any pull gives the start back
            factor = scipy.linalg.cho_factor(moments[group] + pull * identity)
            found[group] = scipy.linalg.cho_solve(factor, (wanted[group] + pull * pulled_to[group]).T).T
        return torch.from_numpy(found).to(start.device)

"""Least squares for stencils that couple channels circulantly: a small system for each channel frequency."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lcc.ops.fit import Gram


class FrequencyGram(Gram[Tensor]):
    """Second moments of y_i = sum over d and taps t of theta[d, t] x[i + d mod C, t], at any position.

    The orthonormal Fourier transform across channels keeps squared errors and decouples the regression: at
    each of the F = C // 2 + 1 frequencies Y_f = S_f . X_f, with T complex unknowns S_f = conj(fft(theta))_f.
    All frequencies but the constant and, for even C, the highest stand for a conjugate pair and count twice.
    Products are taken in the dtype of the samples, at least float32, and summed in float64. Weights are theta
    (C, T).
    """

    FIXED: ClassVar[frozenset[str]] = frozenset({"channels", "multiplicity"})

    def __init__(self, channels: int, taps: int, device: torch.device) -> None:
        frequencies = channels // 2 + 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.complex128, device=device)

        self.channels = channels
        self.multiplicity = torch.full((frequencies,), 2.0, dtype=torch.float64, device=device)
        self.multiplicity[0] = 1
        if channels % 2 == 0:
            self.multiplicity[-1] = 1
        self.count = 0
        self.rounding = zeros().real
        self.input_sum, self.output_sum = zeros(frequencies, taps), zeros(frequencies)
        self.input_input = zeros(frequencies, taps, taps)
        self.input_output = zeros(frequencies, taps)
        self.output_output = zeros(frequencies).real

    def add(self, patches: Tensor, outputs: Tensor) -> None:
        """Take in M samples: patches (M, C, T), outputs (M, C)."""
        exact = torch.promote_types(patches.dtype, torch.float32)
        x = torch.fft.rfft(patches.to(exact), dim=1, norm="ortho").transpose(0, 1)  # (F, M, T)
        y = torch.fft.rfft(outputs.to(exact), dim=1, norm="ortho").T  # (F, M)
        self.rounding += torch.finfo(exact).eps * _square(x).sum((1, 2)).amax()
        self.count += len(patches)
        self.input_sum += x.sum(1)
        self.output_sum += y.sum(1)
        self.input_input += x.mH @ x
        self.input_output += (x.mH @ y[:, :, None])[:, :, 0]
        self.output_output += self.multiplicity * _square(y).sum(1)

    def centered(self) -> FrequencyGram:
        """Return the moments about the means: those of samples with their means taken off."""
        result = object.__new__(FrequencyGram)
        vars(result).update(vars(self))
        x, y, n = self.input_sum / self.count, self.output_sum / self.count, self.count
        result.input_input = self.input_input - n * x.conj()[:, :, None] * x[:, None, :]
        result.input_output = self.input_output - n * x.conj() * y[:, None]
        result.output_output = self.output_output - n * self.multiplicity * _square(y)
        return result

    def intercept(self, weights: Tensor) -> Tensor:
        """Return (C,), what must be added to the outputs of `weights` to make their means right."""
        missing = self.output_sum - (self._symbol(weights) * self.input_sum).sum(1)
        shift: Tensor = torch.fft.irfft(missing / self.count, n=self.channels, norm="ortho")
        return shift

    def squared_error(self, weights: Tensor) -> Tensor:
        """Return (F,), whose total is the sum over samples and channels of (output - prediction)^2."""
        symbol = self._symbol(weights)
        quadratic = (symbol.conj() * (self.input_input @ symbol[:, :, None])[:, :, 0]).sum(1).real
        linear = (symbol.conj() * self.input_output).sum(1).real
        return (self.output_output + self.multiplicity * (quadratic - 2 * linear)).clamp_min(0)

    def solve(self, ridge: float, start: Tensor) -> Tensor:
        """Return the weights with the least squared error plus `ridge` times their distance to `start`.

        The distance is that of the dense kernels. `ridge` is in units of the mean square of an input, and
        never less than what rounding did to the moments. Raises: ValueError: NaN or infinity in the moments.
        """
        # numpy, not torch: its batched LU gave MKL errors and no result on two threads (2026-11).
        moments, wanted, symbol = (
            tensor.cpu().numpy() for tensor in (self.input_input, self.input_output, self._symbol(start))
        )
        if not (np.isfinite(moments).all() and np.isfinite(wanted).all()):
            raise ValueError("NaN or infinity in the activations")
        energy = np.diagonal(moments, axis1=1, axis2=2).real.mean(1) @ self.multiplicity.cpu().numpy()
        # Dead inputs: any pull gives the start back.
        pull = max(ridge * float(energy) / self.channels, float(self.rounding)) or 1.0
        # Twice the error and twice the distance: the multiplicity of a frequency cancels.
        solved = np.linalg.solve(
            moments + pull * np.eye(moments.shape[1]), (wanted + pull * symbol)[:, :, None]
        )[:, :, 0]
        theta = np.fft.irfft(solved.conj(), n=self.channels, axis=0)
        return torch.from_numpy(theta).to(start.device)

    def _symbol(self, weights: Tensor) -> Tensor:
        """Return the complex stencils of theta (C, T), (F, T); cross-correlation, hence conjugates."""
        symbol: Tensor = torch.fft.rfft(weights, dim=0).conj().resolve_conj()
        return symbol


def _square(z: Tensor) -> Tensor:
    return z.real.square() + z.imag.square()

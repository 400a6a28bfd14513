"""Reaction-diffusion steps with frozen weights, as operations that ONNX Runtime runs and fuses well.

The sums are ordered so that each becomes part of a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.methods.frozen import frozen_conv
from lcc.ops.activations import activate
from lcc.ops.spectral import Green, RealFourier, apply_real_fourier
from lcc.ops.wrap import wrap_pad

if TYPE_CHECKING:
    from lcc.specs import Activation


class Reaction(nn.Module):
    """h relu(N(M y)), h in the affine part of N."""

    def __init__(self, mix: Tensor, norm: nn.BatchNorm2d, step: float) -> None:
        super().__init__()
        self.mix = frozen_conv(mix)
        self.norm = nn.BatchNorm2d(norm.num_features, eps=norm.eps).to(norm.weight)
        self.norm.load_state_dict(norm.state_dict())
        with torch.no_grad():
            self.norm.weight.mul_(step)
            self.norm.bias.mul_(step)
        self.norm.eval()

    def forward(self, y: Tensor) -> Tensor:
        """Return (N, C, H, W) for y (N, C, H, W)."""
        return F.relu(self.norm(self.mix(y)))


class LoweredExplicit(nn.Module):
    """post(-K^T K y + (reaction(y) + y)); `stencil` is K with the root of the step's length in it."""

    def __init__(self, reaction: Reaction, stencil: Tensor, post: Activation | None) -> None:
        super().__init__()
        channels, kh, kw = stencil.shape
        stencil = stencil[:, None]
        self.spread = frozen_conv(stencil, padding=(kh // 2, kw // 2), groups=channels)
        self.gather = frozen_conv(-stencil.flip(2, 3), padding=(kh // 2, kw // 2), groups=channels)
        self.reaction, self.post = reaction, post

    def forward(self, y: Tensor) -> Tensor:
        """Return (N, C, H, W) for y (N, C, H, W)."""
        return activate(self.gather(self.spread(y)) + (self.reaction(y) + y), self.post)


class LoweredImplicit(nn.Module):
    """post(solve(reaction(y) + y))."""

    def __init__(self, reaction: Reaction, solve: nn.Module, post: Activation | None) -> None:
        super().__init__()
        self.reaction, self.solve, self.post = reaction, solve, post

    def forward(self, y: Tensor) -> Tensor:
        """Return (N, C, H, W) for y (N, C, H, W)."""
        return activate(self.solve(self.reaction(y) + y), self.post)


class PeriodicStencil(nn.Module):
    """A depthwise convolution of an image that goes on periodically."""

    def __init__(self, short: Green) -> None:
        super().__init__()
        channels, kh, kw = short.taps.shape
        self.pads = (kh // 2, kh - 1 - kh // 2, kw // 2, kw - 1 - kw // 2)
        self.conv = frozen_conv(short.taps[:, None], groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        y: Tensor = self.conv(wrap_pad(x, self.pads))
        return y


class FourierSolve(nn.Module):
    """The solve by matrices over height and width."""

    def __init__(self, fourier: RealFourier) -> None:
        super().__init__()
        for name, tensor in fourier._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        return apply_real_fourier(x, RealFourier(*(getattr(self, name) for name in RealFourier._fields)))


class LoweredCirculant(nn.Module):
    """post(-K^T K y + (reaction(y) + y)), K^T K by `couplings` in the channel Fourier basis `analysis`.

    Real and imaginary parts are kept apart all the way, as in the lowered circulant convolution.
    """

    def __init__(
        self, reaction: Reaction, analysis: Tensor, couplings: tuple[Coupling, ...], post: Activation | None
    ) -> None:
        super().__init__()
        half = len(analysis) // 2
        self.to_real, self.to_imaginary = (frozen_conv(rows) for rows in analysis.split(half))
        self.couplings = nn.ModuleList(couplings)
        back = -analysis.transpose(0, 1)
        self.from_real, self.from_imaginary = (frozen_conv(part) for part in back.split(half, dim=1))
        self.reaction, self.post = reaction, post

    def forward(self, y: Tensor) -> Tensor:
        """Return (N, C, H, W) for y (N, C, H, W)."""
        real, imaginary = self.to_real(y), self.to_imaginary(y)
        for coupling in self.couplings:
            real, imaginary = coupling(real, imaginary)
        diffused = self.from_real(real) + self.from_imaginary(imaginary)
        return activate(diffused + (self.reaction(y) + y), self.post)


class Coupling(nn.Module):
    """K or K^T in the channel Fourier basis: a complex stencil for each frequency, in real numbers.

    `re` and `im` are (C', kh, kw): see `lcc.ops.circulant`.
    """

    def __init__(self, re: Tensor, im: Tensor, *, periodic: bool) -> None:
        super().__init__()
        half, (top, left) = len(re) // 2, (re.shape[1] // 2, re.shape[2] // 2)
        self.pads = (top, top, left, left) if periodic else (0, 0, 0, 0)
        padding = (0, 0) if periodic else (top, left)
        self.real_to_real, self.imaginary_to_imaginary, self.imaginary_to_real, self.real_to_imaginary = (
            frozen_conv(kernel[:, None], padding=padding, groups=half)
            for stencils in (re, im)
            for kernel in stencils.split(half)
        )

    def forward(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Return both parts, (N, C' / 2, H, W) each, for both parts."""
        real, imaginary = wrap_pad(real, self.pads), wrap_pad(imaginary, self.pads)
        return (
            self.real_to_real(real) + self.imaginary_to_real(imaginary),
            self.imaginary_to_imaginary(imaginary) + self.real_to_imaginary(real),
        )

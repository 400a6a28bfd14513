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
    """post(-K^T K y + (reaction(y) + y)), K^T K by `couplings` in the channel Fourier basis of `analysis`."""

    def __init__(
        self, reaction: Reaction, analysis: Tensor, couplings: tuple[Coupling, ...], post: Activation | None
    ) -> None:
        super().__init__()
        self.analysis = frozen_conv(analysis)
        self.synthesis = frozen_conv(-analysis.transpose(0, 1))
        self.couplings = nn.Sequential(*couplings)
        self.reaction, self.post = reaction, post

    def forward(self, y: Tensor) -> Tensor:
        """Return (N, C, H, W) for y (N, C, H, W)."""
        diffused = self.synthesis(self.couplings(self.analysis(y)))
        return activate(diffused + (self.reaction(y) + y), self.post)


class Coupling(nn.Module):
    """K or K^T in the channel Fourier basis: a complex stencil for each frequency, in real numbers."""

    def __init__(self, re: Tensor, im: Tensor, *, periodic: bool) -> None:
        super().__init__()
        channels, kh, kw = re.shape
        top, left = kh // 2, kw // 2
        self.pads = (top, top, left, left) if periodic else None
        self.middle = channels // 2
        padding = (0, 0) if periodic else (top, left)
        self.along = frozen_conv(re[:, None], padding=padding, groups=channels)
        self.across = frozen_conv(im[:, None], padding=padding, groups=channels)

    def forward(self, z: Tensor) -> Tensor:
        """Return (N, C', H, W) for z (N, C', H, W)."""
        if self.pads is not None:
            z = wrap_pad(z, self.pads)
        swapped = torch.cat([z[:, self.middle :], z[:, : self.half]], dim=1)
        y: Tensor = self.along(z) + self.across(swapped)
        return y

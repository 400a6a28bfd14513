"""Block-circulant coupling across channels, in a real channel Fourier basis where it is nearly depthwise.

The coupling is (K x)_i = sum over d of theta_d * x_(i + d mod C): the dense kernel has W[i, j] =
theta[(j - i) mod C], theta (C, kh, kw), in torch's cross-correlation convention. A Fourier transform across
the channels decouples it into a complex stencil for every frequency. Here it is written in real numbers:
z = D x with D `analysis` (C', C), orthonormal, the channels of z ordered [real parts; imaginary parts].
Multiplying by a complex stencil is then re * z + im * swap(z), two depthwise convolutions, the swap
exchanging the halves: K x = S (re * D x + im * swap(D x)), S = D^T `synthesis`. C' is C for even C, where the
constant and the highest frequency, both real, share the halves' first channels. For odd C it is C + 1: one
channel is zero.

Source: arXiv:1805.07821, eq. (12), in another basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lcc.ops.stencil import periodic_grid


def spectral_channels(channels: int) -> int:
    """Return C', how many real channels the transform of `channels` has: the next even number."""
    return channels + channels % 2


def analysis(channels: int) -> Tensor:
    """Return D (C', C) in float64: orthonormal cosines over the channels, then negative sines."""
    half = spectral_channels(channels) // 2
    # The product is reduced first: large angles lose digits.
    turns = torch.outer(torch.arange(half), torch.arange(channels)) % channels
    angle = turns.double() * (2 * math.pi / channels)
    real, imaginary = angle.cos() * 2**0.5, -angle.sin() * 2**0.5
    real[0] = 1
    if channels % 2 == 0:
        imaginary[0] = 1 - 2 * (torch.arange(channels) % 2)
    return torch.cat([real, imaginary]).div(channels**0.5)


def synthesis(channels: int) -> Tensor:
    """Return S = D^T (C, C') in float64: S D is the identity."""
    return analysis(channels).T.contiguous()


def spectral_stencils(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stencils `re` and `im`, (C', kh, kw) each, for theta (C, kh, kw). Differentiable."""
    with torch.autocast(theta.device.type, enabled=False):
        exact = theta.to(torch.promote_types(theta.dtype, torch.float32))
        # Cross-correlation: the symbol is the conjugate of theta's transform.
        spectrum = torch.fft.rfft(exact, dim=0)
        half = spectral_channels(len(theta)) // 2
        real, minus_imaginary = spectrum.real, spectrum.imag[:half]
        first = real[half:] if len(theta) % 2 == 0 else real[:1]
        re = torch.cat([real[:half], first, real[1:half]])
        im = torch.cat([minus_imaginary, -minus_imaginary])
    return re.to(theta.dtype), im.to(theta.dtype)


def adjoint_stencils(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stencils of K^T for those of K: turned by 180 degrees and conjugated.

    At stride 1 with padding p around x, K^T takes dilation * (kernel - 1) - p around y; for odd kernels that
    keep the size it is the same.
    """
    return re.flip(1, 2), -im.flip(1, 2)


def apply(
    z: Tensor,
    re: Tensor,
    im: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Return D K x (N, C', H', W') for z = D x (N, C', H, W), with zeros outside."""
    half = z.shape[1] // 2
    swapped = torch.cat([z[:, half:], z[:, :half]], dim=1)
    along = F.conv2d(z, re[:, None], None, stride, padding, dilation, groups=2 * half)
    return along + F.conv2d(swapped, im[:, None], None, stride, padding, dilation, groups=2 * half)


def circulant_kernel(theta: Tensor) -> Tensor:
    """Return the dense kernel W (C, C, kh, kw), W[i, j] = theta[(j - i) mod C]. Differentiable."""
    channel = torch.arange(len(theta), device=theta.device)
    kernel: Tensor = theta[(channel[None, :] - channel[:, None]) % len(theta)]
    return kernel


def diagonal_means(kernel: Tensor) -> Tensor:
    """Return the theta (C, kh, kw) whose circulant kernel is closest to `kernel` (C, C, kh, kw)."""
    channel = torch.arange(len(kernel), device=kernel.device)
    return kernel[channel, (channel[:, None] + channel) % len(kernel)].mean(1)


def periodic_circulant(x: Tensor, theta: Tensor) -> Tensor:
    """Return K x (N, C, H, W), periodic in space too, by a Fourier transform over (C, H, W).

    theta (C, kh, kw) with odd kh and kw. The dtype is x's; transforms are in float32 at least.
    Source: arXiv:1805.07821, F3^-1(F3(K e1) . F3(y)) below eq. (12).
    """
    return _filtered(x, theta, gram=False)


def periodic_circulant_gram(x: Tensor, theta: Tensor) -> Tensor:
    """Return K^T K x, likewise: the symbol is |F3(K e1)|^2."""
    return _filtered(x, theta, gram=True)


def circulant_symbol(theta: Tensor, height: int, width: int) -> Tensor:
    """Return F3(K e1) at the frequencies of rfftn, (C, H, W // 2 + 1), complex."""
    # The grid holds taps by their offset, the response to a delta by minus it: hence the conjugate.
    symbol: Tensor = torch.fft.rfftn(periodic_grid(theta, height, width)).conj()
    return symbol


def _filtered(x: Tensor, theta: Tensor, *, gram: bool) -> Tensor:
    dims, size = (1, 2, 3), x.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        exact = torch.promote_types(x.dtype, torch.float32)
        symbol = circulant_symbol(theta.to(exact), *x.shape[2:])
        if gram:
            symbol = (symbol * symbol.conj()).real
        y = torch.fft.irfftn(torch.fft.rfftn(x.to(exact), dim=dims) * symbol, s=size, dim=dims)
    result: Tensor = y.to(x.dtype)
    return result

"""Block-circulant convolutions: every output channel has the same stencils, turned by one channel.

y_i = sum over d of theta_d * x_(i + d mod C). As a dense convolution it would save parameters alone. In a
Fourier basis across the channels it is nearly depthwise, so it runs as a 1x1 convolution with constant
weights, two depthwise ones, and a 1x1 back, all real: exact at any size, stride and padding
(lcc.ops.circulant).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.methods.base import LinearOp, Lowering, Method
from lcc.methods.frozen import frozen_conv
from lcc.ops import circulant
from lcc.ops.frequency_fit import FrequencyGram
from lcc.ops.padding import inner_padding, pad
from lcc.ops.sampling import SampledGrams
from lcc.specs import ConvSpec, Cost, SiteKind, Size

if TYPE_CHECKING:
    from collections.abc import Callable


class Circulant(Method):
    """Configuration of a block-circulant convolution; it has no hyperparameters."""

    formula: ClassVar[str] = (
        "y_i = sum_d K_d x_(i+d mod c); params k^2 c; MACs c'(c n_in + c n + 2 k^2 n), c' = c or c + 1"
    )
    paper: ClassVar[str] = "arXiv:1805.07821 eq. (12)"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"conv"})

    name: Literal["circulant"] = "circulant"

    def why_not(self, spec: ConvSpec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can.

        A small convolution may still cost less than the transforms across channels: `cost` says so.
        """
        if spec.groups != 1:
            return f"already grouped ({spec.groups} groups)"
        if spec.in_channels != spec.out_channels:
            return f"channels change ({spec.in_channels} to {spec.out_channels})"
        if spec.in_channels == 1:
            return "a single channel couples with no other"
        if spec.kernel_size == (1, 1):
            return "a 1x1 kernel costs less than the transforms across channels"
        return None

    def cost(self, spec: ConvSpec, size: Size) -> Cost:
        """Return the exact cost for one image of this size; the stencils' own transform is not counted."""
        channels, (kh, kw) = spec.in_channels, spec.kernel_size
        spectral = circulant.spectral_channels(channels)
        made = spec.out_size(size).pixels
        return Cost(
            params=kh * kw * channels + (channels if spec.bias else 0),
            macs=spectral * (channels * (size.pixels + made) + 2 * kh * kw * made),
        )

    def build(self, spec: ConvSpec) -> CirculantOp:
        """Return the operator with freshly initialised weights."""
        return CirculantOp(self, spec)


class CirculantOp(LinearOp):
    """A convolution with the kernel W[i, j] = theta[(j - i) mod C]; theta is (C, kh, kw)."""

    one_scale = True

    def __init__(self, method: Circulant, spec: ConvSpec) -> None:
        super().__init__(method, spec)
        channels, (kh, kw) = spec.in_channels, spec.kernel_size
        spectral = circulant.spectral_channels(channels)
        fan_in = channels * kh * kw  # every output sees all of theta
        self.theta = nn.Parameter(torch.randn(channels, kh, kw) * (2 / fan_in) ** 0.5)
        self.bias: nn.Parameter | None = None
        if spec.bias:
            self.bias = nn.Parameter((torch.rand(channels) * 2 - 1) * fan_in**-0.5)
        self.register_buffer("analysis", torch.empty(spectral, channels, 1, 1), persistent=False)
        self.register_buffer("synthesis", torch.empty(channels, spectral, 1, 1), persistent=False)
        self.analysis: Tensor
        self.synthesis: Tensor
        self._fill_bases()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H', W') for x (N, C, H, W)."""
        re, im = circulant.spectral_stencils(self.theta)
        z = _pad(F.conv2d(x, self.analysis), self.spec)
        z = circulant.apply(
            z, re, im, stride=self.stride, padding=_padding(self.spec), dilation=self.dilation
        )
        return F.conv2d(z, self.synthesis, self.bias)

    def dense_kernel(self) -> Tensor:
        """Return the equivalent dense kernel, (C, C, kh, kw)."""
        return circulant.circulant_kernel(self.theta)

    @torch.no_grad()
    def set_closest_(self, kernel: Tensor) -> None:
        """Take on the means over the channel diagonals of a dense kernel, (C, C, kh, kw)."""
        self.theta.copy_(circulant.diagonal_means(kernel))

    def statistics(self, *, free_means: bool) -> CirculantStatistics:
        """Return an empty accumulator of the moments at every channel frequency."""
        return CirculantStatistics(self, free_means=free_means)

    def free_weights(self) -> Tensor:
        """Return theta in float64, (C, T)."""
        return self.theta.detach().double().flatten(1)

    @torch.no_grad()
    def set_free_weights_(self, weights: Tensor) -> None:
        """Take on such weights."""
        self.theta.copy_(weights.reshape(self.theta.shape))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor`, (C,) with equal entries: the channels share their weights.

        Raises: ValueError: the entries differ.
        """
        if not bool((factor == factor[0]).all()):
            raise ValueError("a circulant kernel has one scale, the same for every output channel")
        self.theta.mul_(factor[0])
        if self.bias is not None:
            self.bias.mul_(factor)

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of each output channel's equivalent dense kernel, (C,): all the same."""
        norm: Tensor = torch.linalg.vector_norm(self.theta)
        return norm.expand(self.out_channels)

    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return the same arithmetic as plain convolutions with frozen weights; exact at every size."""
        return (Lowering(_LoweredCirculant(self)),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own hook behind to() and cuda()
        self._fill_bases()  # what was rounded to float32 would stay so in float64
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.analysis, self.synthesis = (basis.to(self.theta) for basis in (self.analysis, self.synthesis))
        self._fill_bases()  # the weights may be of another type now

    @torch.no_grad()
    def _fill_bases(self) -> None:
        self.analysis.copy_(circulant.analysis(self.in_channels)[:, :, None, None])
        self.synthesis.copy_(circulant.synthesis(self.in_channels)[:, :, None, None])


class CirculantStatistics(SampledGrams[FrequencyGram]):
    """Moments at every channel frequency of the inputs under the taps, at sampled positions."""

    def __init__(self, op: CirculantOp, *, free_means: bool) -> None:
        kh, kw = op.kernel_size
        device = op.theta.device
        super().__init__(
            op.spec,
            [(i, j) for i in range(kh) for j in range(kw)],
            (
                FrequencyGram(op.in_channels, kh * kw, device),
                FrequencyGram(op.in_channels, kh * kw, device),
            ),
            unknowns=kh * kw,
            centered=free_means or op.spec.bias,
        )

    def take_in(self, gram: FrequencyGram, patches: Tensor, outputs: Tensor) -> None:
        """Add M samples: patches (M, C, T), the inputs under the T taps, and outputs (M, C)."""
        gram.add(patches, outputs)


class _LoweredCirculant(nn.Module):
    """The operator with the halves [real; imaginary] apart all the way.

    No channels are exchanged, so ONNX Runtime keeps one memory layout and fuses the sums; with the swap it
    was slower at 64 channels and 56x56, and no faster anywhere.
    """

    def __init__(self, op: CirculantOp) -> None:
        super().__init__()
        self.spec = op.spec
        half = len(op.analysis) // 2
        stencil_conv = partial(
            frozen_conv, stride=op.stride, padding=_padding(op.spec), dilation=op.dilation, groups=half
        )
        re, im = (stencils[:, None] for stencils in circulant.spectral_stencils(op.theta))
        self.to_real, self.to_imaginary = (frozen_conv(rows) for rows in op.analysis.split(half))
        self.real_to_real, self.imaginary_to_imaginary = (stencil_conv(kernel) for kernel in re.split(half))
        self.imaginary_to_real, self.real_to_imaginary = (stencil_conv(kernel) for kernel in im.split(half))
        from_real, from_imaginary = op.synthesis.split(half, dim=1)
        self.from_real, self.from_imaginary = frozen_conv(from_real, op.bias), frozen_conv(from_imaginary)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H', W') for x (N, C, H, W)."""
        real, imaginary = _pad(self.to_real(x), self.spec), _pad(self.to_imaginary(x), self.spec)
        new_real = self.real_to_real(real) + self.imaginary_to_real(imaginary)
        new_imaginary = self.imaginary_to_imaginary(imaginary) + self.real_to_imaginary(real)
        y: Tensor = self.from_real(new_real) + self.from_imaginary(new_imaginary)
        return y


def _padding(spec: ConvSpec) -> tuple[int, int]:
    """What the convolutions pad by themselves."""
    return inner_padding(spec) or (0, 0)


def _pad(z: Tensor, spec: ConvSpec) -> Tensor:
    """Return z with the padding that the convolutions can't do. It commutes with mixing channels."""
    return z if inner_padding(spec) is not None else pad(z, spec)

"""Convolutions and residual blocks as modules with random weights, built from their descriptions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.convolutions import convolution
from lcc.ops.activations import activate
from lcc.specs import ConvSpec, StepSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.specs import Activation


def dense(spec: ConvSpec | StepSpec) -> nn.Module:
    """Return what a site was before it was replaced, (N, C_in, H, W) -> (N, C_out, H', W'), to time it.

    A block costs what the original costs, though it need not be the same function: its convolutions are put
    in one row in order of call, a normalisation at each while `norm_params` lasts, an activation between.
    """
    if isinstance(spec, ConvSpec):
        return convolution(spec)
    return Transition(spec) if spec.is_transition else ResidualStep(spec)


class ResidualStep(nn.Module):
    """post(x + F(x))."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.post = spec.post
        self.body = nn.Sequential(*_body(spec))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        return activate(x + self.body(x), self.post)


class Transition(nn.Module):
    """post(S(x) + F(x)), or post(F(x)) where the skip has no convolution."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.post = spec.post
        self.body = nn.Sequential(*_body(spec))
        self.shortcut = nn.Sequential(*_shortcut(spec)) if spec.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, ceil(H / stride), ceil(W / stride)) for x (N, C_in, H, W)."""
        y = self.body(x)
        return activate(y if self.shortcut is None else self.shortcut(x) + y, self.post)


def _shortcut(spec: StepSpec) -> Iterator[nn.Module]:
    """Yield S's layers in order: what its convolution leaves of the stride is pooled first."""
    (conv,) = spec.shortcut
    down, across = (whole // own for whole, own in zip(spec.stride, conv.stride, strict=True))
    if (down, across) != (1, 1):
        yield nn.AvgPool2d((down, across), ceil_mode=True, count_include_pad=False)
    yield from (_Fit(conv.in_channels), convolution(conv))
    if spec.norm_params - 2 * sum(_norm_widths(spec)) >= 2 * conv.out_channels:
        yield _norm(spec, conv.out_channels)


def _body(spec: StepSpec) -> Iterator[nn.Module]:
    """Yield F's layers in order."""
    gated = _gated(spec)
    for number, (conv, normed) in enumerate(zip(spec.convs, _norm_widths(spec), strict=True)):
        yield _Fit(conv.in_channels)
        norm = [_norm(spec, normed)] if normed else []
        if spec.pre_norm:
            yield from (*norm, _Activation(spec.activation), convolution(conv))
        else:
            yield from (convolution(conv), *norm)
            if number < len(spec.convs) - 1:
                yield _Activation(spec.activation)
        if number == gated:
            yield _Gate(spec, conv.out_channels)
    yield _Fit(spec.channels)


def _norm_widths(spec: StepSpec) -> list[int]:
    """Return the width of the norm at each of F's convolutions, 0 where `norm_params` has run out."""
    left, widths = spec.norm_params, []
    for conv in spec.convs:
        width = conv.in_channels if spec.pre_norm else conv.out_channels
        widths.append(width if left >= 2 * width else 0)
        left -= 2 * widths[-1]
    return widths


def _norm(spec: StepSpec, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=spec.norm_eps, momentum=spec.norm_momentum)


def _gated(spec: StepSpec) -> int | None:
    """Return after which convolution squeeze-and-excitation comes: the last one of its width."""
    if not spec.squeeze:
        return None
    last = len(spec.convs) - 1
    fitting = [n for n, conv in enumerate(spec.convs) if conv.out_channels == spec.squeeze[0].in_channels]
    return fitting[-1] if fitting else last


class _Activation(nn.Module):
    def __init__(self, name: Activation | None) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, self.name)


class _Gate(nn.Module):
    """Squeeze-and-excitation: x times sigmoid(G(x pooled to one pixel))."""

    def __init__(self, spec: StepSpec, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for conv in spec.squeeze:
            layers += [_Activation(spec.activation)] if layers else []
            layers += [_Fit(conv.in_channels), convolution(conv)]
        self.layers = nn.Sequential(*layers, _Fit(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layers(x.mean((2, 3), keepdim=True)))


class _Fit(nn.Module):
    """The first channels of x, repeated where there are too few: for a convolution on another branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.channels:
            return x
        return x.repeat(1, math.ceil(self.channels / x.shape[1]), 1, 1)[:, : self.channels]

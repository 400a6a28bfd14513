"""Convolutions and residual steps as modules with random weights, built from their descriptions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.ops.activations import activate
from lcc.specs import ConvSpec, StepSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.specs import Activation


def dense(spec: ConvSpec | StepSpec) -> nn.Module:
    """Return what a site was before it was replaced, (N, C_in, H, W) -> (N, C_out, H', W'), to time it.

    A step costs what the original costs, though it need not be the same function: its convolutions are put in
    one row in order of call, a normalisation at each while `norm_params` lasts, an activation between.
    """
    return ResidualStep(spec) if isinstance(spec, StepSpec) else convolution(spec)


def convolution(spec: ConvSpec) -> nn.Conv2d:
    """Return the convolution."""
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
    )


class ResidualStep(nn.Module):
    """post(x + F(x))."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.post = spec.post
        self.body = nn.Sequential(*_body(spec))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        return activate(x + self.body(x), self.post)


def _body(spec: StepSpec) -> Iterator[nn.Module]:
    """Yield F's layers in order."""
    norm_params, gated = spec.norm_params, _gated(spec)
    for number, conv in enumerate(spec.convs):
        yield _Fit(conv.in_channels)
        channels = conv.out_channels
        normed = conv.in_channels if spec.pre_norm else channels
        norm = []
        if norm_params >= 2 * normed:
            norm_params -= 2 * normed
            norm = [nn.BatchNorm2d(normed, eps=spec.norm_eps, momentum=spec.norm_momentum)]
        if spec.pre_norm:
            yield from (*norm, _Activation(spec.activation), convolution(conv))
        else:
            yield from (convolution(conv), *norm)
            if number < len(spec.convs) - 1:
                yield _Activation(spec.activation)
        if number == gated:
            yield _Gate(spec, channels)
    yield _Fit(spec.channels)


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

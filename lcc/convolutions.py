"""A convolution's description made into a module, and read off one."""

from __future__ import annotations

from torch import nn

from lcc.specs import ConvSpec


def convolution(spec: ConvSpec) -> nn.Conv2d:
    """Return the convolution, its weights as torch draws them."""
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


def conv_spec(conv: nn.Conv2d) -> ConvSpec:
    """Return the description of a convolution."""
    return ConvSpec(
        in_channels=int(conv.in_channels),
        out_channels=int(conv.out_channels),
        kernel_size=_pair(conv.kernel_size),
        stride=_pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),  # type: ignore[arg-type]  # pydantic checks
        dilation=_pair(conv.dilation),
        groups=int(conv.groups),
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)  # a host may have computed them with numpy

"""A convolution's padding, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from lcc.specs import ConvSpec


def paddings(spec: ConvSpec) -> tuple[int, int, int, int]:
    """Return the padding in pixels as F.pad takes it: left, right, top, bottom.

    With `same` and an even kernel the right and the bottom may have one more.
    """
    top, left = spec.margin
    if spec.padding != "same":
        return left, left, top, top
    (kh, kw), (dh, dw) = spec.kernel_size, spec.dilation
    return left, dw * (kw - 1) - left, top, dh * (kh - 1) - top


def pad(x: Tensor, spec: ConvSpec) -> Tensor:
    """Return x (N, C, H, W) with what the convolution sees around the image."""
    sides = paddings(spec)
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return F.pad(x, sides, mode=mode) if any(sides) else x


def inner_padding(spec: ConvSpec) -> tuple[int, int] | None:
    """Return (top, left) where a convolution pads by itself: zeros, as many on both sides. Else None."""
    left, right, top, bottom = paddings(spec)
    return (top, left) if spec.padding_mode == "zeros" and (left, top) == (right, bottom) else None

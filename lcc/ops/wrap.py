"""Periodic padding, in the one form that becomes a single ONNX node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def wrap_pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Return x (N, C, H, W) continued periodically by (top, bottom, left, right) pixels.

    At most one period each way: top, bottom <= H and left, right <= W.
    Torch's exporter makes it one node, Pad(mode="wrap"), which ONNX has from opset 19 on.
    """
    top, bottom, left, right = pads
    return F.pad(x, (left, right, top, bottom), mode="circular") if any(pads) else x

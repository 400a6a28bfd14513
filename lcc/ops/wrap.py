"""Periodic padding, in the one form that torch's exporter makes a single ONNX node of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def wrap_pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Return x (N, C, H, W) continued periodically by (top, bottom, left, right) pixels.

    At most one period each way: top, bottom <= H and left, right <= W. The node is Pad(mode="wrap"), which
    ONNX has from opset 19 on; in an exported file it is a convolution where that is faster.
    """
    top, bottom, left, right = pads
    return F.pad(x, (left, right, top, bottom), mode="circular") if any(pads) else x

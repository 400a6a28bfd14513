"""Periodic padding, in the one form that torch's exporter makes a single ONNX node of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def wrap_pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Return x (N, C, H, W) continued periodically by (top, bottom, left, right) pixels.

    Up to one period each way the node is Pad(mode="wrap"), which ONNX has from opset 19 on; in an exported
    file it is a convolution where that is faster. Further out pixels are gathered.
    """
    top, bottom, left, right = pads
    height, width = x.shape[2:]
    if max(top, bottom) > height or max(left, right) > width:
        rows = torch.arange(-top, height + bottom, device=x.device) % height
        columns = torch.arange(-left, width + right, device=x.device) % width
        return x.index_select(2, rows).index_select(3, columns)
    return F.pad(x, (left, right, top, bottom), mode="circular") if any(pads) else x

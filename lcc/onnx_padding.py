"""A rewrite of an exported graph: periodic padding as a depthwise convolution.

ONNX Runtime's Pad(mode="wrap") is slow, and its blocked layout of feature maps has to be left for it and
entered again. A kernel of ones, dilated by the image's size and moved over an image in zeros, sees one pixel
of it at a time, wherever it is: the same numbers, exactly. A lowered implicit step with a 7x7 stencil, alone
and on one thread, took 1.1 to 1.3 times as long as an explicit one so, and 1.3 to 2.1 times with Pad (64
channels at 56x56 to 512 at 7x7, and 16 at 32x32 to 64 at 8x8). Other runtimes know Conv better too, and
opset 18 has it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnxscript import ir

from lcc.onnx_graph import constant, set_constant, there

BLOCK = 4  # channels; where their number is no multiple, ONNX Runtime's depthwise kernels are slow


class _Wrap(NamedTuple):
    """A periodic padding: of how many channels, of what size (H, W), how far before and after."""

    channels: int
    size: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]


def wraps_as_convs(model: ir.Model) -> int:
    """Put a convolution in the place of every periodic padding where that is faster; return how many."""
    wraps = {node: wrap for node in model.graph if (wrap := _read(node)) is not None}
    for node, wrap in wraps.items():
        _replace(node, wrap)
    return len(wraps)


def is_wrap(node: ir.Node) -> bool:
    """Whether a node pads periodically."""
    return (
        node.op_type == "Pad" and "mode" in node.attributes and node.attributes["mode"].as_string() == "wrap"
    )


def _read(node: ir.Node) -> _Wrap | None:
    """Return what a node pads; None if a convolution can't, or would not be faster."""
    if not is_wrap(node) or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    value, pads = there(node.inputs[0]), constant(node.inputs[1])
    if value.dtype != ir.DataType.FLOAT or value.shape is None or pads is None or pads.size != 8:
        return None
    _, *sizes = value.shape
    channels, height, width = (size if isinstance(size, int) else 0 for size in sizes)
    batch, colours, *before, batch_after, colours_after, bottom, right = map(int, pads)
    if channels == 0 or channels % BLOCK or any((batch, colours, batch_after, colours_after)):
        return None
    (top, left), size = before, (height, width)
    if not all(0 <= pad <= length for pad, length in zip((top, left, bottom, right), size * 2, strict=True)):
        return None
    return _Wrap(channels, size, (top, left), (bottom, right))


def _replace(node: ir.Node, wrap: _Wrap) -> None:
    graph, padded = there(node.graph), node.outputs[0]
    moved = [before + after > 0 for before, after in zip(wrap.before, wrap.after, strict=True)]
    kernel = [3 if along else 1 for along in moved]
    around = [length if along else 0 for length, along in zip(wrap.size, moved, strict=True)]
    conv = ir.node(
        "Conv",
        [node.inputs[0], None],
        attributes={
            "group": wrap.channels,
            "kernel_shape": kernel,
            "dilations": [max(length, 1) for length in around],
            "pads": [
                length + pad
                for pads in (wrap.before, wrap.after)
                for length, pad in zip(around, pads, strict=True)
            ],
        },
    )
    result = conv.outputs[0]
    result.shape, result.dtype = padded.shape, there(padded.dtype)
    graph.insert_before(node, conv)
    result.name = f"{padded.name}.conv"
    set_constant(conv, 1, np.ones((wrap.channels, 1, *kernel), np.float32))
    padded.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = padded.name

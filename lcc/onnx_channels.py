"""A rewrite of an exported graph: depthwise convolutions with several outputs per input, as plain ones.

Runtimes have a fast kernel for one output per input and none for several. `multiplier` plain convolutions and
a Concat compute the same channels in another order; that order is carried through what does not mix channels
and absorbed by the weights of what does. If it can't be carried to the end, the graph stays as it was.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from onnxscript import ir

from lcc.onnx_graph import bias_of, constant, groups_of, only_use, set_constant, there, weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Order = NDArray[np.int64]  # at each position, the true number of the channel that is there

# Work on each channel, or each number, alone, if the number of channels stays (checked).
CHANNELWISE = frozenset({
    "Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish",
    "Tanh", "Gelu", "Mish", "Softplus", "Identity", "Cast", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "ReduceMean", "Pad", "Resize",
})  # fmt: skip
FLATTENING = frozenset({"Flatten", "Reshape"})
# Fast kernels take this many channels at a time; 3 colours, split 32-fold, ran 3 times slower than before.
BLOCK = 4
ELEMENTWISE_PAIRS = frozenset({"Add", "Sub", "Mul", "Div"})


class _StuckError(Exception):
    """The order can't be carried on."""


def split_multipliers(model: ir.Model) -> int:
    """Split every depthwise convolution with several outputs per input; return how many."""
    rewrite = _Rewrite()
    try:
        for node in model.graph:
            rewrite.visit(node)
        if any(value in rewrite.orders for value in model.graph.outputs):
            return 0
    except _StuckError:
        return 0
    for edit in rewrite.edits:
        edit()
    model.graph.sort()
    return rewrite.split


class _Rewrite:
    """Walks the graph in order, notes the edits, makes none."""

    def __init__(self) -> None:
        self.orders: dict[ir.Value, Order] = {}
        self.edits: list[Callable[[], None]] = []
        self.split = 0

    def visit(self, node: ir.Node) -> None:
        """Note what the order of the node's inputs means for its weights and its output."""
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Conv":
            self._conv(node, self.orders.get(inputs[0]))
        elif any(value in self.orders for value in inputs):
            order = self._after(node, inputs)
            if order is not None:
                self.orders[node.outputs[0]] = order

    def _after(self, node: ir.Node, inputs: list[ir.Value]) -> Order | None:
        """Return the order of the output; None: the true one."""
        order = next(self.orders[value] for value in inputs if value in self.orders)
        if node.op_type in ELEMENTWISE_PAIRS:
            return self._paired(inputs, order)
        if node.op_type == "Concat":
            return self._joined(node, inputs)
        if inputs[0] not in self.orders:
            raise _StuckError(node.op_type)
        if node.op_type in ("Gemm", "MatMul"):
            self._linear(node, inputs, order)
            return None
        if node.op_type in FLATTENING:
            return _flattened(node, order)
        if node.op_type == "BatchNormalization":
            return self._normalised(node, order)
        if node.op_type in CHANNELWISE and _keeps_channels(node, len(order)):
            return order
        raise _StuckError(node.op_type)

    def _conv(self, node: ir.Node, order: Order | None) -> None:
        kernel, groups = constant(node.inputs[1]), groups_of(node)
        multiplier = kernel.shape[0] // groups if kernel is not None and kernel.shape[1] == 1 < groups else 0
        if multiplier > 1 and groups % BLOCK == 0 and only_use(node.inputs[1]):
            order = np.arange(groups) if order is None else order
            self.orders[node.outputs[0]] = (order * multiplier + np.arange(multiplier)[:, None]).flatten()
            self.edits.append(partial(_split, node, order, multiplier))
            self.split += 1
        elif order is None:
            return
        elif groups == 1:
            self._reindex(node, 1, axis=1, order=order)
        elif multiplier == 1:
            self._reorder_rows(node, order)
            self.orders[node.outputs[0]] = order
        else:
            raise _StuckError("grouped convolution")

    def _demand(self, value: ir.Value, order: Order) -> None:
        """See to it that the value comes in this order, changing the weights that make it if need be."""
        if value in self.orders:
            if not np.array_equal(self.orders[value], order):
                raise _StuckError("two orders meet")
            return
        producer = value.producer()
        if producer is None or not only_use(value):
            raise _StuckError("nothing to reorder")
        if producer.op_type == "Conv" and groups_of(producer) == 1:
            self._reorder_rows(producer, order)
        elif producer.op_type in CHANNELWISE and _keeps_channels(producer, len(order)):
            self._demand(there(producer.inputs[0]), order)
        elif producer.op_type in ELEMENTWISE_PAIRS:
            for term in producer.inputs:
                self._demand(there(term), order)
        else:
            raise _StuckError(producer.op_type)
        self.orders[value] = order

    def _linear(self, node: ir.Node, inputs: list[ir.Value], order: Order) -> None:
        flags = {
            name
            for name in ("transA", "transB")
            if name in node.attributes and node.attributes[name].as_int()
        }
        if "transA" in flags or any(value in self.orders for value in inputs[1:]):
            raise _StuckError(node.op_type)
        self._reindex(node, 1, axis=1 if "transB" in flags else 0, order=order)

    def _paired(self, inputs: list[ir.Value], order: Order) -> Order:
        for value in inputs:
            if not _is_scalar(value):
                self._demand(value, order)
        return order

    def _normalised(self, node: ir.Node, order: Order) -> Order:
        for index in (1, 2, 3, 4):
            self._reindex(node, index, axis=0, order=order)
        return order

    def _joined(self, node: ir.Node, inputs: list[ir.Value]) -> Order:
        if node.attributes["axis"].as_int() != 1:
            raise _StuckError("Concat")
        parts: list[Order] = []
        for value in inputs:
            order = self.orders.get(value, np.arange(_dims(value)[1]))
            parts.append(order + sum(map(len, parts)))
        return np.concatenate(parts)

    def _reorder_rows(self, node: ir.Node, order: Order) -> None:
        self._reindex(node, 1, axis=0, order=order)
        if bias_of(node) is not None:
            self._reindex(node, 2, axis=0, order=order)

    def _reindex(self, node: ir.Node, index: int, *, axis: int, order: Order) -> None:
        array = constant(node.inputs[index])
        if array is None or not only_use(node.inputs[index]) or array.shape[axis] != len(order):
            raise _StuckError("weights that can't be reordered")
        self.edits.append(lambda: set_constant(node, index, np.take(weights(node, index), order, axis=axis)))


def _is_scalar(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and array.size == 1


def _dims(value: ir.Value) -> list[int]:
    """Return the sizes of a value, the batch as 0."""
    _, *sizes = there(value.shape)
    if not all(isinstance(size, int) for size in sizes):
        raise _StuckError("open sizes")
    return [0, *(size for size in sizes if isinstance(size, int))]


def _keeps_channels(node: ir.Node, channels: int) -> bool:
    """Whether axis 1 is the same channels before and after."""
    before, after = _dims(there(node.inputs[0])), _dims(node.outputs[0])
    return len(before) > 1 < len(after) and before[1] == after[1] == channels


def _flattened(node: ir.Node, order: Order) -> Order:
    """Return the order of (N, C * H * W) made from (N, C, H, W)."""
    (_, channels, *pixels), after = _dims(there(node.inputs[0])), _dims(node.outputs[0])
    count = math.prod(pixels)
    if channels != len(order) or after != [0, channels * count]:
        raise _StuckError(node.op_type)
    return (order[:, None] * count + np.arange(count)).flatten()


def _split(node: ir.Node, order: Order, multiplier: int) -> None:
    """Put `multiplier` plain depthwise convolutions and a Concat in the place of one."""
    graph, whole = there(node.graph), node.outputs[0]
    kernel, bias = weights(node, 1), bias_of(node)
    batch, _, *pixels = there(whole.shape)
    parts = []
    for number in range(multiplier):
        part = ir.node("Conv", [node.inputs[0], None], attributes=dict(node.attributes))
        value = part.outputs[0]
        value.name, value.shape = f"{whole.name}.{number}", ir.Shape([batch, len(order), *pixels])
        value.dtype = there(whole.dtype)
        graph.insert_before(node, part)
        rows = order * multiplier + number
        set_constant(part, 1, kernel[rows])
        if bias is not None:
            set_constant(part, 2, bias[rows])
        parts.append(value)
    concat = ir.node("Concat", parts, attributes={"axis": 1})
    joined = concat.outputs[0]
    joined.dtype, joined.shape = there(whole.dtype), whole.shape
    graph.insert_before(node, concat)
    whole.replace_all_uses_with(joined)
    graph.remove(node, safe=True)
    joined.name = whole.name

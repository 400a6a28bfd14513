"""Reading and rewriting an exported graph, so that ONNX Runtime fuses everything it can.

ONNX Runtime's own optimiser folds a BatchNorm into one convolution and adds one residual inside it. A
low-cost operator is a sum of convolutions: its BatchNorm has to go into every term (`onnx_norms`), and its
residual has to come first in the sum. Both keep the function; only rounding changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from onnxscript import ir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]

T = TypeVar("T")


def there(item: T | None) -> T:
    """Return the item; narrows what the graph's library types as optional and the exporter always gives."""
    assert item is not None
    return item


def constant(value: ir.Value | None) -> Array | None:
    """Return the numbers of an initializer; None for what is computed, or not given."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def weights(node: ir.Node, index: int) -> Array:
    """Return the numbers of an input known to be an initializer."""
    return there(constant(node.inputs[index]))


def bias_of(conv: ir.Node) -> Array | None:
    """Return a convolution's bias, if it has one."""
    return constant(conv.inputs[2]) if len(conv.inputs) > 2 else None


def groups_of(conv: ir.Node) -> int:
    """Return how many channel groups a convolution has."""
    return conv.attributes["group"].as_int() if "group" in conv.attributes else 1


def only_use(value: ir.Value | None) -> bool:
    """Whether exactly one node, and no graph output, reads the value."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def conv_of(value: ir.Value | None) -> ir.Node | None:
    """Return the convolution, its kernel known, that makes this value for one reader."""
    node = value.producer() if value is not None and only_use(value) else None
    return (
        node if node is not None and node.op_type == "Conv" and constant(node.inputs[1]) is not None else None
    )


def own_conv(value: ir.Value | None) -> ir.Node | None:
    """Return the convolution that makes this value for one reader, from a kernel that nothing else uses."""
    node = conv_of(value)
    return node if node is not None and only_use(node.inputs[1]) else None


def unused_name(graph: ir.Graph, stem: str) -> str:
    """Return the stem as a name for a new initializer, numbered where it is taken."""
    name, number = stem, 1
    while name in graph.initializers:
        name, number = f"{stem}.{number}", number + 1
    return name


def set_constant(node: ir.Node, index: int, array: Array) -> None:
    """Make `array` the node's input at `index`, under the name of what it replaces where there is one."""
    graph = there(node.graph)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    name = unused_name(graph, f"{node.outputs[0].name}.{index}" if old is None else there(old.name))
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.initializers[name] = value
    node.replace_input_with(index, value)


def sum_terms(value: ir.Value) -> tuple[list[ir.Value], list[ir.Node]]:
    """Return what a sum adds up and the Add nodes that do it, outermost last.

    Additions whose result is read elsewhere, or that broadcast, are terms and not taken apart.
    """
    node = value.producer()
    if node is None or node.op_type != "Add" or value.shape is None:
        return [value], []
    if any(there(term).shape != value.shape for term in node.inputs):
        return [value], []
    terms: list[ir.Value] = []
    adds: list[ir.Node] = []
    for term in map(there, node.inputs):
        inner, nodes = sum_terms(term) if only_use(term) else ([term], [])
        terms += inner
        adds += nodes
    return terms, [*adds, node]


def order_sums(model: ir.Model) -> int:
    """Order every sum so that its convolutions can each add what came before; return how many were changed.

    relu(pw + (dw + residual)): ONNX Runtime runs a convolution, the addition of one finished tensor and an
    activation as one node.
    """
    changed = 0
    inner: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        if node.op_type != "Add" or node in inner:
            continue
        terms, adds = sum_terms(node.outputs[0])
        inner.update(adds)
        sizes = {term: weights(conv, 1).size for term in terms if (conv := _conv_behind(term)) is not None}
        if not sizes or len(terms) < 3:
            continue
        done, *rest = sorted(terms, key=lambda term: sizes.get(term, 0))
        for add, term in zip(adds, rest, strict=True):
            add.replace_input_with(0, term)
            add.replace_input_with(1, done)
            done = add.outputs[0]
        changed += 1
    model.graph.sort()
    return changed


def _conv_behind(value: ir.Value) -> ir.Node | None:
    """Return the convolution that makes this value alone, or with a BatchNorm that ONNX Runtime folds."""
    node = value.producer()
    if node is not None and node.op_type == "BatchNormalization" and only_use(value):
        return conv_of(node.inputs[0])
    return conv_of(value)


def strip(model: ir.Model) -> None:
    """Drop what says nothing: the exporter's notes, with the machine's paths, long names, stated defaults."""
    model.metadata_props.clear()
    model.doc_string = None
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        _forget(graph)
        for number, node in enumerate(graph.all_nodes()):
            _forget(node)
            node.name = f"{node.op_type}_{number}"
            _drop_defaults(node, model.opset_imports)
            for value in node.outputs:
                _forget(value)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _forget(value)


def _forget(item: ir.Graph | ir.Function | ir.Node | ir.Value) -> None:
    item.metadata_props.clear()
    item.doc_string = None


def _drop_defaults(node: ir.Node, opsets: Mapping[str, int]) -> None:
    """Drop the attributes that say what the standard says of a node without them."""
    if not onnx.defs.has(node.op_type, node.domain) or node.domain not in opsets:
        return
    schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    for name, attribute in list(node.attributes.items()):
        default = schema.attributes[name].default_value
        if default.name and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(
            ir.to_proto(attribute)
        ):
            del node.attributes[name]


def to_half(model: ir.Model) -> None:
    """Store and compute in float16; inputs and outputs stay float32, so the file is a drop-in.

    The scales that a Resize takes stay float32, as the standard demands.
    """
    graph = model.graph
    kept = {value for node in graph if node.op_type == "Resize" for value in node.inputs[1:] if value}
    values = [value for node in graph for value in node.outputs] + list(graph.initializers.values())
    for value in values:
        if value.dtype != ir.DataType.FLOAT or value in kept:
            continue
        value.dtype = ir.DataType.FLOAT16
        if value.is_initializer():
            value.const_value = _halved(value.const_value, value.name)
    for node in graph:
        for attribute in list(node.attributes.values()):
            _halve_attribute(node, attribute)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            cast = _cast(value, ir.DataType.FLOAT16, f"{value.name}.half")
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype == ir.DataType.FLOAT16:
            name, value.name = there(value.name), f"{value.name}.half"
            graph.outputs[index] = (cast := _cast(value, ir.DataType.FLOAT, name)).outputs[0]
            graph.append(cast)


def _halve_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
        node.attributes[name] = ir.AttrTensor(name, _halved(attribute.as_tensor(), None))
    if node.op_type == "Cast" and name == "to" and attribute.as_int() == ir.DataType.FLOAT:
        node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)


def _halved(tensor: ir.TensorProtocol | None, name: str | None) -> ir.TensorProtocol:
    return ir.tensor(there(tensor).numpy().astype(np.float16), name=name)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)})
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, to, value.shape
    return node

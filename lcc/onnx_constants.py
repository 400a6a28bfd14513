"""The numbers in an exported graph: every reader has its own while it is rewritten, a file has each once."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from onnxscript import ir

from lcc.onnx_graph import constant, there, unused_name

if TYPE_CHECKING:
    Readers = dict[tuple[str | None, int], str | None]  # initializers, by reader's output and input number


def readers(model: ir.Model) -> Readers:
    """Return which initializer every node reads, to be remembered before the exporter's optimiser runs.

    What one tensor of the network was is one initializer here, however many layers hold it.
    """
    return {
        (use.node.outputs[0].name, use.idx): value.name
        for value in model.graph.initializers.values()
        for use in value.uses()
    }


def separate(model: ir.Model, before: Readers) -> int:
    """Part the initializers that are the same only because they are equal; return how many were added.

    The exporter's optimiser merges small ones, such as the Fourier bases of narrow circulant layers, and a
    BatchNorm goes only into a kernel that nothing else reads. What the network itself shares stays one.
    """
    added = 0
    for value in list(model.graph.initializers.values()):
        parts: dict[str | None, list[tuple[ir.Node, int]]] = {}
        for node, index in value.uses():
            parts.setdefault(before.get((node.outputs[0].name, index), value.name), []).append((node, index))
        for uses in list(parts.values())[1:]:
            name = unused_name(there(model.graph), there(value.name))
            copy = ir.Value(name=name, const_value=value.const_value, shape=value.shape, type=value.type)
            model.graph.initializers[name] = copy
            for node, index in uses:
                node.replace_input_with(index, copy)
            added += 1
    return added


def drop_unused(model: ir.Model) -> None:
    """Drop the initializers that no node reads; ONNX Runtime warns of each."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def share_constants(model: ir.Model) -> int:
    """Keep equal initializers once, such as the Fourier bases of many layers; return how many went."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    shared = 0
    for name, value in list(model.graph.initializers.items()):
        array = there(constant(value))
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        first = kept.setdefault(key, value)
        if first is value or value.is_graph_output():
            continue
        value.replace_all_uses_with(first)
        del model.graph.initializers[name]
        shared += 1
    return shared

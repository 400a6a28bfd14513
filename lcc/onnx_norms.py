"""Rewrites of an exported graph that leave a BatchNorm to be computed only where it can't be avoided.

ONNX Runtime folds a BatchNorm into one convolution, not into a sum of them, and knows nothing of a scale in
between. A kernel that several layers share stays one kernel here: their BatchNorms stay, and take in what
they can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnxscript import ir

from lcc.onnx_graph import (
    bias_of,
    constant,
    conv_of,
    only_use,
    own_conv,
    set_constant,
    sum_terms,
    there,
    weights,
)

if TYPE_CHECKING:
    from lcc.onnx_graph import Array

DEFAULT_EPSILON = 1e-5  # of BatchNormalization, where the node states none
SCALE, BIAS, MEAN, VARIANCE = 1, 2, 3, 4  # its inputs


def fold_scales(model: ir.Model) -> int:
    """Move every scale of channels that only a BatchNorm reads into that BatchNorm; return how many.

    scale (s x - mean) / sd + bias = (s scale) x / sd + (bias - scale mean / sd), also where s is 0.
    """
    folded = 0
    for norm in _norms(model):
        while (found := _scale_before(norm)) is not None:
            product, x, s = found
            affine = _affine(norm)
            _set(norm, SCALE, weights(norm, SCALE) * s)
            _set(norm, BIAS, affine.shift)
            _set(norm, MEAN, np.zeros_like(affine.shift))
            norm.replace_input_with(0, x)
            model.graph.remove(product, safe=True)
            folded += 1
    return folded


def fold_batch_norms(model: ir.Model) -> int:
    """Fold every BatchNorm into the convolutions whose sum it normalises; return how many are gone.

    All kernels are scaled, the shift goes to one of them. A kernel that several nodes share stays shared, and
    gets a BatchNorm of its own in the sum, for ONNX Runtime to fold; one that it has alone stays there.
    """
    folded = 0
    for norm in _norms(model):
        source = there(norm.inputs[0])
        terms = sum_terms(source)[0]
        convs = [conv_of(term) for term in terms]
        shared = [own_conv(term) is None for term in terms]
        if not only_use(source) or any(conv is None for conv in convs) or shared == [True]:
            continue
        factor, shift = _affine(norm)
        for conv, keeps_kernel in zip(map(there, convs), shared, strict=True):
            if keeps_kernel:
                _normalise(conv, norm, shift)
            else:
                _scale_conv(conv, factor, shift)
            shift = np.zeros_like(shift)
        result, normalised = there(source), norm.outputs[0]
        normalised.replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(norm, safe=True)
        result.name = normalised.name  # which may be the network's output
        folded += 1
    return folded


class _Affine(NamedTuple):
    """A BatchNorm as factor * x + shift, float64."""

    factor: Array
    shift: Array


def _affine(norm: ir.Node) -> _Affine:
    scale, bias, mean, variance = (
        weights(norm, index).astype(np.float64) for index in (SCALE, BIAS, MEAN, VARIANCE)
    )
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else DEFAULT_EPSILON
    factor = scale / np.sqrt(variance + epsilon)
    return _Affine(factor, bias - mean * factor)


def _norms(model: ir.Model) -> list[ir.Node]:
    """Return the BatchNorms whose numbers are known."""
    return [
        node
        for node in model.graph
        if node.op_type == "BatchNormalization"
        and all(constant(value) is not None for value in node.inputs[1:])
    ]


def _scale_before(norm: ir.Node) -> tuple[ir.Node, ir.Value, Array] | None:
    """Return the Mul before a BatchNorm, what it scales, and the factors; None if there is no such Mul."""
    product = there(norm.inputs[0]).producer()
    if product is None or product.op_type != "Mul" or not only_use(norm.inputs[0]):
        return None
    whole, channels = product.outputs[0].shape, weights(norm, SCALE).size
    for x, factors in (product.inputs, product.inputs[::-1]):
        s = constant(factors)
        if s is None or whole is None or there(x).shape != whole:
            continue
        by_axis = (1,) * (len(whole) - s.ndim) + s.shape
        if s.size in (1, channels) and by_axis[1] == s.size:
            return product, there(x), np.broadcast_to(s.reshape(-1), channels).astype(np.float64)
    return None


def _set(norm: ir.Node, index: int, array: Array) -> None:
    set_constant(norm, index, array.astype(weights(norm, index).dtype))


def _scale_conv(conv: ir.Node, factor: Array, shift: Array) -> None:
    kernel, bias = weights(conv, 1), bias_of(conv)
    set_constant(conv, 1, (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(kernel.dtype))
    if bias is not None or shift.any():
        moved = shift if bias is None else bias * factor + shift
        set_constant(conv, 2, moved.astype(kernel.dtype))


def _normalise(conv: ir.Node, like: ir.Node, shift: Array) -> None:
    """Put a BatchNorm with this shift behind a convolution, otherwise like another one."""
    term = conv.outputs[0]
    (use,) = term.uses()
    node = ir.node("BatchNormalization", [term, *like.inputs[1:]], attributes=dict(like.attributes))
    y = node.outputs[0]
    y.name, y.shape, y.dtype = f"{term.name}.normal", term.shape, there(term.dtype)
    there(conv.graph).insert_after(conv, node)
    _set(node, BIAS, shift)
    _set(node, MEAN, np.zeros_like(shift))
    use.node.replace_input_with(use.idx, y)

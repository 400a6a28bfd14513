"""Small ONNX graphs for tests, written as text, with random weights."""

import numpy as np
import onnx
from onnxscript import ir

from lcc.onnx_runtime import Session

HEADER = '<ir_version: 10, opset_import: ["" : 20]> g '


def make(text, **initializers):
    """Return the graph of `text`; initializers are arrays or shapes to fill, `var` with positive numbers."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(HEADER + text)
    for name, given in initializers.items():
        array = given if isinstance(given, np.ndarray) else rng.standard_normal(given).astype(np.float32)
        array = np.abs(array) + 0.5 if name == "var" else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def serialised(model):
    return ir.to_proto(model).SerializeToString()


def outputs(model, batch=2):
    data = serialised(model)
    onnx.checker.check_model(data, full_check=True)
    session = Session(data)
    return session.run(session.example(batch))


def op_types(model):
    return [node.op_type for node in model.graph]

"""Small ONNX graphs for tests, written as text, with random weights."""

import numpy as np
import onnx
from onnxscript import ir

from lcc.onnx_runtime import Session

HEADER = '<ir_version: 10, opset_import: ["" : 20]> g '
SUM = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
    spatial = Conv<group=4, pads=[1,1,1,1]>(x, dw)
    pointwise = Conv(x, pw, bias)
    sum = Add(spatial, pointwise)
    y = BatchNormalization<epsilon=0.01>(sum, scale, shift, mean, var)
}"""
SUM_WEIGHTS = {"dw": (4, 1, 3, 3), "pw": (4, 4, 1, 1), "bias": 4, "scale": 4, "shift": 4, "mean": 4, "var": 4}


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

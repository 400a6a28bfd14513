import numpy as np
import pytest
from onnx_graphs import make, op_types, outputs, serialised

from lcc.onnx_channels import split_multipliers
from lcc.onnx_graph import groups_of

# Two outputs per input channel, then everything that an order of channels can meet on its way to the end.
NETWORK = """(float[N,4,8,8] x) => (float[N,3] y) {
    spatial = Conv<group=4, pads=[1,1,1,1], strides=[2,2]>(x, dw, dw_bias)
    pointwise = Conv<strides=[2,2]>(x, pw)
    mixed = Add(spatial, pointwise)
    stem = Relu(mixed)
    deep = Conv<group=8, pads=[1,1,1,1]>(stem, dw2, dw2_bias)
    wide = Conv(stem, pw2, pw2_bias)
    inner = Add(deep, stem)
    block = Add(wide, inner)
    pooled = GlobalAveragePool(block)
    gate = Conv(pooled, squeeze)
    weight = Sigmoid(gate)
    gated = Mul(block, weight)
    again = Conv<group=8, pads=[1,1,1,1], strides=[2,2]>(gated, dw3)
    beside = Conv<strides=[2,2]>(block, mix)
    both = Concat<axis=1>(beside, again)
    normal = BatchNormalization(both, scale, shift, mean, var)
    flat = Flatten(normal)
    y = Gemm<transB=1>(flat, fc, fc_bias)
}"""
WEIGHTS = {
    "dw": (8, 1, 3, 3),
    "dw_bias": 8,
    "pw": (8, 4, 1, 1),
    "dw2": (8, 1, 3, 3),
    "dw2_bias": 8,
    "pw2": (8, 8, 1, 1),
    "pw2_bias": 8,
    "squeeze": (8, 8, 1, 1),
    "dw3": (24, 1, 3, 3),
    "mix": (5, 8, 1, 1),
    **dict.fromkeys(("scale", "shift", "mean", "var"), 29),
    "fc": (3, 29 * 4),
    "fc_bias": 3,
}
SPATIAL = "spatial = Conv<group=4, pads=[1,1,1,1]>(x, dw)"


def test_a_split_convolution_computes_the_same_whatever_its_channels_meet():
    model = make(NETWORK, **WEIGHTS)
    wanted = outputs(model)
    assert split_multipliers(model) == 2
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_after_splitting_every_depthwise_convolution_has_one_output_per_input():
    model = make(NETWORK, **WEIGHTS)
    split_multipliers(model)
    grouped = [node for node in model.graph if node.op_type == "Conv" and groups_of(node) > 1]
    assert [groups_of(node) for node in grouped] == [node.inputs[1].shape[0] for node in grouped]
    assert op_types(model).count("Concat") == 3  # one was there


@pytest.mark.parametrize(
    "end",
    [
        "y = Relu(spatial)",  # the network's output would come in another order
        "y = Conv<group=2>(spatial, mix)",  # groups of channels that the order tears apart
        "more = Relu(x2)  y = Add(spatial, more)",  # a rival order that no weights can change
        "y = Softmax<axis=1>(spatial)",  # not known to keep channels apart
    ],
)
def test_a_graph_in_which_the_order_gets_stuck_is_left_as_it_was(end):
    text = f"(float[N,4,6,6] x, float[N,8,6,6] x2) => (float[N,8,6,6] y) {{ {SPATIAL}  {end} }}"
    model = make(text, dw=(8, 1, 3, 3), mix=(8, 4, 1, 1))
    before = serialised(model)
    assert split_multipliers(model) == 0
    assert serialised(model) == before


def test_a_graph_without_multipliers_is_left_as_it_was():
    model = make(
        f"(float[N,4,6,6] x) => (float[N,4,6,6] y) {{ {SPATIAL}  y = Relu(spatial) }}", dw=(4, 1, 3, 3)
    )
    before = serialised(model)
    assert split_multipliers(model) == 0
    assert serialised(model) == before


def test_a_convolution_of_too_few_channels_for_the_fast_kernels_is_left_as_it_was():
    text = """(float[N,3,6,6] x) => (float[N,9] y) {
        wide = Conv<group=3>(x, dw)
        pooled = GlobalAveragePool(wide)
        flat = Flatten(pooled)
        y = Gemm<transB=1>(flat, fc)
    }"""
    assert split_multipliers(make(text, dw=(9, 1, 3, 3), fc=(9, 9))) == 0

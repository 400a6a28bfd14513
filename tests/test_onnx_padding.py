import numpy as np
import pytest
from onnx_graphs import make, op_types, outputs

from lcc.onnx_padding import wraps_as_convs

WRAP = """(float[N,{channels},5,7] x) => (float[N,C,H,W] y) {{ y = Pad<mode="wrap">(x, pads) }}"""

REFLECT = WRAP.format(channels=8).replace('"wrap"', '"reflect"')


def wrap(pads, channels=8):
    """A graph that pads by (top, left, bottom, right)."""
    top, left, bottom, right = pads
    return make(WRAP.format(channels=channels), pads=np.array([0, 0, top, left, 0, 0, bottom, right]))


@pytest.mark.parametrize("pads", [(1, 2, 3, 4), (0, 3, 0, 1), (2, 0, 0, 0), (5, 7, 5, 7), (0, 0, 0, 7)])
def test_a_convolution_pads_periodically_to_the_last_bit(pads):
    model = wrap(pads)
    wanted = outputs(model)
    assert wraps_as_convs(model) == 1
    assert op_types(model) == ["Conv"]
    np.testing.assert_array_equal(outputs(model), wanted)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(wrap((1, 1, 1, 1), channels=3), id="three channels"),
        pytest.param(wrap((6, 0, 0, 0)), id="more than a period"),
        pytest.param(wrap((-1, 0, 1, 0)), id="cuts off"),
        pytest.param(make(WRAP.format(channels=8), pads=np.array([0, 4, 0, 0, 0, 0, 0, 0])), id="channels"),
        pytest.param(make(REFLECT, pads=np.array([0, 0, 1, 1] * 2)), id="reflects"),
    ],
)
def test_what_a_convolution_can_not_do_or_not_faster_stays(model):
    assert wraps_as_convs(model) == 0
    assert op_types(model) == ["Pad"]


def test_a_padding_inside_a_graph_keeps_what_comes_before_and_after():
    text = """(float[N,4,6,6] x) => (float[N,4,8,8] y, float[N,4,8,8] z) {
        a = Relu(x)
        b = Pad<mode="wrap">(a, pads)
        y = Sigmoid(b)
        z = Neg(b)
    }"""
    model = make(text, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    wanted = outputs(model)
    assert wraps_as_convs(model) == 1
    assert op_types(model) == ["Relu", "Conv", "Sigmoid", "Neg"]
    np.testing.assert_array_equal(outputs(model), wanted)

import numpy as np
import pytest
from onnx_graphs import SUM, SUM_WEIGHTS, make, op_types, outputs

from lcc.onnx_norms import fold_batch_norms, fold_scales

NORM = dict.fromkeys(("scale", "shift", "mean", "var"), 4)
SHARED_SUM = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
    spatial = Conv<group=4, pads=[1,1,1,1]>(x, dw)
    pointwise = Conv(x, pw, bias)
    sum = Add(spatial, pointwise)
    normal = BatchNormalization<epsilon=0.01>(sum, scale, shift, mean, var)
    again = Conv<group=4, pads=[1,1,1,1]>(normal, dw)
    other = Conv(normal, own)
    more = Add(again, other)
    y = BatchNormalization<epsilon=0.1>(more, scale, shift, mean, var)
}"""
SCALED = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
    plain = Conv(x, pw, bias)
    scaled = Mul(plain, s)
    y = BatchNormalization<epsilon=0.01>(scaled, scale, shift, mean, var)
}"""
SCALED_WEIGHTS = {"pw": (4, 4, 1, 1), "bias": 4, **NORM}


def test_a_batch_norm_is_folded_into_every_convolution_of_a_sum():
    model = make(SUM, **SUM_WEIGHTS)
    wanted = outputs(model)
    assert fold_batch_norms(model) == 1
    assert op_types(model) == ["Conv", "Conv", "Add"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5)


def test_a_batch_norm_behind_a_shared_kernel_stays_and_the_kernel_stays_shared():
    text = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a = Conv(x, pw)
        b = BatchNormalization(a, scale, shift, mean, var)
        y = Conv(b, pw)
    }"""
    model = make(text, pw=(4, 4, 1, 1), scale=4, shift=4, mean=4, var=4)
    assert fold_batch_norms(model) == 0
    assert op_types(model) == ["Conv", "BatchNormalization", "Conv"]
    assert len(model.graph.initializers) == 5


def test_a_batch_norm_of_a_sum_with_something_else_than_convolutions_stays():
    model = make(SUM.replace("Conv(x, pw, bias)", "Relu(x)"), **SUM_WEIGHTS)
    assert fold_batch_norms(model) == 0


def test_a_batch_norm_of_a_sum_of_shared_kernels_goes_to_every_one_of_them():
    model = make(SHARED_SUM, dw=(4, 1, 3, 3), pw=(4, 4, 1, 1), own=(4, 4, 1, 1), bias=4, **NORM)
    wanted = outputs(model)
    assert fold_batch_norms(model) == 2
    sources = [n.inputs[0].producer() for n in model.graph if n.op_type == "BatchNormalization"]
    assert [(node.op_type, node.inputs[1].name) for node in sources] == [("Conv", "dw"), ("Conv", "dw")]
    assert len(model.graph.initializers["dw"].uses()) == 2
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (1,), ()])
@pytest.mark.parametrize("order", ["plain, s", "s, plain"])
def test_a_scale_of_channels_disappears_into_the_batch_norm_behind_it(shape, order):
    scales = np.array([-2.0, 0.0, 0.5, 3.0], np.float32)[: int(np.prod(shape))].reshape(shape)
    model = make(SCALED.replace("plain, s", order), s=scales, **SCALED_WEIGHTS)
    wanted = outputs(model)
    assert fold_scales(model) == 1
    assert op_types(model) == ["Conv", "BatchNormalization"]
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5)


def test_several_scales_in_a_row_all_disappear():
    text = SCALED.replace("Mul(plain, s)", "Mul(twice, t)\n").replace(
        "scaled =", "twice = Mul(plain, s)\n scaled ="
    )
    model = make(text, s=(4, 1, 1), t=(1, 4, 1, 1), **SCALED_WEIGHTS)
    wanted = outputs(model)
    assert fold_scales(model) == 2
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_batch_norms_with_the_same_numbers_take_in_scales_of_their_own():
    text = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a = Mul(x, s)
        b = BatchNormalization(a, scale, shift, mean, var)
        c = Mul(b, t)
        y = BatchNormalization(c, scale, shift, mean, var)
    }"""
    model = make(text, s=(4, 1, 1), t=(4, 1, 1), **NORM)
    wanted = outputs(model)
    assert fold_scales(model) == 2
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (SCALED.replace("6,6", "4,4"), (4, 1)),  # per row
        (SCALED.replace("6,6", "4,4"), (1, 1, 1, 4)),  # per column
        (SCALED, (4, 6, 6)),  # per number
        (SCALED.replace("Conv(x, pw, bias)", "Conv(x, one)"), (4, 1, 1)),  # one channel becomes four
        (SCALED.replace("y = B", "z = Relu(scaled)\n n = B"), (4, 1, 1)),  # read twice
        (SCALED.replace("scaled = Mul(plain, s)", "more = Mul(plain, s)\n scaled = Relu(more)"), (4, 1, 1)),
    ],
)
def test_any_other_product_stays(text, shape):
    if "n = B" in text:
        text = text.replace("\n}", "\n    y = Add(n, z)\n}")
    model = make(text, s=shape, one=(1, 4, 1, 1), **SCALED_WEIGHTS)
    before = op_types(model)
    assert fold_scales(model) == 0
    assert op_types(model) == before


def test_a_product_that_is_the_network_s_output_stays():
    text = SCALED.replace("(float[N,4,6,6] y)", "(float[N,4,6,6] y, float[N,4,6,6] scaled)")
    assert fold_scales(make(text, s=(4, 1, 1), **SCALED_WEIGHTS)) == 0

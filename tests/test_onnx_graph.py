import numpy as np
from onnx_graphs import make, op_types, outputs

from lcc.onnx_graph import (
    drop_unused,
    fold_batch_norms,
    groups_of,
    order_sums,
    share_constants,
    sum_terms,
    to_half,
)

SUM = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
    spatial = Conv<group=4, pads=[1,1,1,1]>(x, dw)
    pointwise = Conv(x, pw, bias)
    sum = Add(spatial, pointwise)
    y = BatchNormalization<epsilon=0.01>(sum, scale, shift, mean, var)
}"""
SUM_WEIGHTS = {"dw": (4, 1, 3, 3), "pw": (4, 4, 1, 1), "bias": 4, "scale": 4, "shift": 4, "mean": 4, "var": 4}
RESIDUAL = """(float[N,16,6,6] x) => (float[N,16,6,6] y) {
    spatial = Conv<group=16, pads=[1,1,1,1]>(x, dw)
    pointwise = Conv(x, pw)
    sum = Add(pointwise, spatial)
    total = Add(sum, x)
    y = Relu(total)
}"""
RESIDUAL_WEIGHTS = {"dw": (16, 1, 3, 3), "pw": (16, 16, 1, 1)}


def test_a_batch_norm_is_folded_into_every_convolution_of_a_sum():
    model = make(SUM, **SUM_WEIGHTS)
    wanted = outputs(model)
    assert fold_batch_norms(model) == 1
    assert op_types(model) == ["Conv", "Conv", "Add"]
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


def test_a_residual_comes_first_in_a_sum_so_that_every_addition_finishes_a_convolution():
    model = make(RESIDUAL, **RESIDUAL_WEIGHTS)
    wanted = outputs(model)
    assert order_sums(model) == 1
    adds = [node for node in model.graph if node.op_type == "Add"]
    finished = [groups_of(add.inputs[0].producer()) for add in adds]
    assert finished == [16, 1]  # the depthwise one, then the pointwise one
    assert adds[0].inputs[1] is model.graph.inputs[0]
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5)


def test_a_convolution_comes_last_in_a_sum_so_that_the_activation_finishes_it_too():
    text = """(float[N,16,6,6] x) => (float[N,16,6,6] y) {
        spatial = Conv<group=16, pads=[1,1,1,1]>(x, dw)
        reaction = Sigmoid(x)
        sum = Add(spatial, x)
        total = Add(sum, reaction)
        y = Relu(total)
    }"""
    model = make(text, dw=(16, 1, 3, 3))
    wanted = outputs(model)
    assert order_sums(model) == 1
    first, last = (node for node in model.graph if node.op_type == "Add")
    assert {value.name for value in first.inputs} == {"x", "reaction"}
    assert last.inputs[0].name == "spatial"
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5)


def test_a_sum_that_is_read_twice_is_not_taken_apart():
    text = RESIDUAL.replace("y = Relu(total)", "more = Relu(sum)\n y = Add(total, more)")
    assert order_sums(make(text, **RESIDUAL_WEIGHTS)) == 0


def test_an_addition_that_broadcasts_is_a_term_of_its_own():
    text = """(float[N,4,6,6] x, float[N,4,1,1] c) => (float[N,4,6,6] y) { a = Relu(x)  y = Add(a, c) }"""
    terms, adds = sum_terms(make(text).graph.outputs[0])
    assert [term.name for term in terms] == ["y"]
    assert adds == []


def test_unused_initializers_are_dropped():
    model = make(RESIDUAL, **RESIDUAL_WEIGHTS, spare=3)
    drop_unused(model)
    assert set(model.graph.initializers) == {"dw", "pw"}


def test_half_precision_keeps_float32_inputs_and_outputs():
    model = make(SUM, **SUM_WEIGHTS)
    wanted = outputs(model)
    to_half(model)
    assert {str(value.dtype) for value in model.graph.initializers.values()} == {"FLOAT16"}
    (got,) = outputs(model)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted[0], rtol=0, atol=0.01 * np.abs(wanted).max())


def test_half_precision_leaves_the_scales_of_a_resize_alone():
    text = """(float[N,4,6,6] x) => (float[N,4,12,12] y) { y = Resize<mode="nearest">(x, , scales) }"""
    model = make(text, scales=np.array([1, 1, 2, 2], np.float32))
    to_half(model)
    assert outputs(model)[0].shape == (2, 4, 12, 12)


def test_equal_constants_are_kept_once_and_others_are_not_touched():
    text = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a = Conv(x, first)
        b = Conv(a, second)
        y = Conv(b, other)
    }"""
    kernel = np.random.default_rng(1).standard_normal((4, 4, 1, 1)).astype(np.float32)
    model = make(text, first=kernel, second=kernel.copy(), other=kernel + 1)
    wanted = outputs(model)
    assert share_constants(model) == 1
    assert sorted(model.graph.initializers) == ["first", "other"]
    np.testing.assert_array_equal(outputs(model), wanted)

import numpy as np
from onnx_graphs import SUM, SUM_WEIGHTS, make, outputs

from lcc.onnx_graph import groups_of, order_sums, strip, sum_terms, to_half

RESIDUAL = """(float[N,16,6,6] x) => (float[N,16,6,6] y) {
    spatial = Conv<group=16, pads=[1,1,1,1]>(x, dw)
    pointwise = Conv(x, pw)
    sum = Add(pointwise, spatial)
    total = Add(sum, x)
    y = Relu(total)
}"""
RESIDUAL_WEIGHTS = {"dw": (16, 1, 3, 3), "pw": (16, 16, 1, 1)}


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


def test_a_sum_of_shared_kernels_is_ordered_and_they_stay_shared():
    text = """(float[N,16,6,6] x) => (float[N,16,6,6] y) {
        first = Conv<group=16, pads=[1,1,1,1]>(x, dw)
        second = Conv(x, pw)
        half = Add(second, first)
        whole = Add(half, x)
        third = Conv<group=16, pads=[1,1,1,1]>(whole, dw)
        fourth = Conv(whole, pw)
        normal = BatchNormalization(fourth, scale, shift, mean, var)
        more = Add(normal, third)
        y = Add(more, whole)
    }"""
    model = make(text, **RESIDUAL_WEIGHTS, **dict.fromkeys(("scale", "shift", "mean", "var"), 16))
    wanted = outputs(model)
    assert order_sums(model) == 2
    adds = [node for node in model.graph if node.op_type == "Add"]
    assert [add.inputs[0].producer().op_type for add in adds] == [
        "Conv",
        "Conv",
        "Conv",
        "BatchNormalization",
    ]
    assert len(model.graph.initializers["dw"].uses()) == len(model.graph.initializers["pw"].uses()) == 2
    np.testing.assert_allclose(outputs(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_names_and_attributes_that_say_nothing_are_dropped_and_the_others_stay():
    text = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a = Conv<group=1, auto_pad="NOTSET", pads=[1,1,1,1]>(x, kernel)
        b = Conv<group=4>(a, pw)
        c = BatchNormalization<epsilon=0.01, momentum=0.9>(b, scale, shift, mean, var)
        y = LeakyRelu<alpha=0.2>(c)
    }"""
    vectors = dict.fromkeys(("scale", "shift", "mean", "var"), 4)
    model = make(text, kernel=(4, 4, 3, 3), pw=(4, 1, 1, 1), **vectors)
    wanted = outputs(model)
    for node in model.graph:
        node.name = "a_long_name_of_the_exporter_" + node.op_type
    strip(model)
    assert [set(node.attributes) for node in model.graph] == [{"pads"}, {"group"}, {"epsilon"}, {"alpha"}]
    assert [node.name for node in model.graph] == ["Conv_0", "Conv_1", "BatchNormalization_2", "LeakyRelu_3"]
    np.testing.assert_array_equal(outputs(model), wanted)

import numpy as np
from onnx_graphs import make, outputs

from lcc.onnx_constants import drop_unused, readers, separate, share_constants

THREE = """(float[N,4,6,6] x) => (float[N,4,6,6] y) {
    a = Conv(x, first)
    b = Conv(a, second)
    c = Conv(b, second)
    y = Conv(c, third)
}"""


def test_unused_initializers_are_dropped():
    model = make(THREE, **dict.fromkeys(("first", "second", "third"), (4, 4, 1, 1)), spare=3)
    drop_unused(model)
    assert set(model.graph.initializers) == {"first", "second", "third"}


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


def test_what_was_merged_for_being_equal_comes_apart_and_what_was_one_stays_one():
    kernel = np.random.default_rng(1).standard_normal((4, 4, 1, 1)).astype(np.float32) / 4
    model = make(THREE, first=kernel, second=kernel.copy(), third=kernel + 1)
    before, wanted = readers(model), outputs(model)
    assert share_constants(model) == 1
    assert separate(model, before) == 1
    a, b, c, y = model.graph
    assert b.inputs[1] is c.inputs[1]
    assert len({node.inputs[1].name for node in (a, b, y)}) == 3
    np.testing.assert_array_equal(outputs(model), wanted)


def test_a_constant_of_which_nothing_was_remembered_stays_as_it_is():
    kernel = np.ones((4, 4, 1, 1), np.float32)
    model = make(THREE, **dict.fromkeys(("first", "second", "third"), kernel))
    share_constants(model)
    assert separate(model, {}) == 0
    assert len(model.graph.initializers) == 1

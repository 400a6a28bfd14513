import pytest
import torch
from onnx_graphs import make, serialised

from lcc.errors import RecipeError, SourceError
from lcc.onnx_runtime import Session

RELU = "(float[N,3,4,5] input) => (float[N,3,4,5] output) { output = Relu(input) }"


def test_examples_have_the_shape_the_model_states_and_the_batch_asked_for():
    session = Session(serialised(make(RELU)))
    assert {name: array.shape for name, array in session.example(7).items()} == {"input": (7, 3, 4, 5)}
    assert session.precision == "float32"


def test_a_fixed_batch_is_refused_in_words():
    session = Session(serialised(make(RELU.replace("N", "2"))))
    with pytest.raises(SourceError, match="fixed batch of 2"):
        session.example(1)


def test_an_open_image_size_is_refused_in_words():
    session = Session(serialised(make(RELU.replace("4,5", "H,W"))))
    with pytest.raises(SourceError, match="open sizes"):
        session.example(1)


def test_a_file_that_is_no_model_is_one_line_that_names_it(tmp_path, capfd):
    path = tmp_path / "holiday.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(SourceError, match=r"holiday\.onnx") as caught:
        Session(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_no_fallback(capfd):
    with pytest.raises(RecipeError, match="--device cpu"):
        Session(serialised(make(RELU)), device="cuda")
    assert capfd.readouterr() == ("", "")


def test_a_model_that_can_not_run_is_one_line():
    frozen = """(float[N,3,4,5] input) => (float[M,60] output) {
        shape = Constant<value_ints = [1, 60]>()
        output = Reshape(input, shape)
    }"""
    session = Session(serialised(make(frozen)))
    session.run(session.example(1))
    with pytest.raises(SourceError, match="can't run the model") as caught:
        session.run(session.example(2))
    assert "\n" not in str(caught.value)


def test_a_model_of_a_single_number_is_refused_in_words():
    session = Session(serialised(make("(float input) => (float output) { output = Relu(input) }")))
    with pytest.raises(SourceError, match="single number"):
        session.example(1)

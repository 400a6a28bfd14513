"""`lcc eval` of an ONNX file: the accuracy is the file's, on images prepared as the file says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import one_line
from onnx_graphs import make, serialised
from small_data import Form, idx_data, image_folder

from lcc import pipeline
from lcc.errors import DataError, RecipeError, SourceError
from lcc.models import Preprocessing
from lcc.recipe import ModelPart
from lcc.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

FORM = Form(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
NEAREST = """(float[N,3,8,8] x) => (float[N,K] y) {
    pooled = GlobalAveragePool(x)
    colours = Flatten(pooled)
    y = Gemm(colours, scales, shifts)
}"""


def nearest(path, *, text=NEAREST, stated=FORM, classes=3, dtype=np.float32):
    """Write a file that finds each class of `idx_data` by its brightness, on images prepared as in FORM."""
    centres = ((np.arange(classes) * 60 + 30) / 255 - 0.5) / 0.2
    model = make(
        text,
        scales=np.tile(2 * centres / 3, (3, 1)).astype(dtype),
        shifts=(-(centres**2)).astype(dtype),
    )
    if stated is not None:
        model.metadata_props["lcc.preprocessing"] = json.dumps(vars(stated))
    path.write_bytes(serialised(model))
    return str(path)


def evaluated(source, data, *, said=None, batch_size=5, **given):
    settings = Settings(say=(said if said is not None else []).append, **given.pop("settings", {}))
    return pipeline.evaluate(ModelPart(source=source, **given), data, settings, batch_size=batch_size)


def test_images_are_prepared_as_the_file_says(tmp_path, data):
    said = []
    accuracy = evaluated(nearest(tmp_path / "net.onnx"), data, said=said)
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (100, None, 12)
    assert said == []


def test_what_is_given_goes_before_what_the_file_says(tmp_path, data):
    """Not normalised, every image is as bright as the last class."""
    accuracy = evaluated(nearest(tmp_path / "net.onnx"), data, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert accuracy.top1 == pytest.approx(100 / 3)


def test_top_5_is_counted_too(tmp_path):
    data = idx_data(tmp_path / "data", test=32, classes=8)
    accuracy = evaluated(nearest(tmp_path / "net.onnx", classes=8), data, mean=(0.4,) * 3)
    assert accuracy.top1 < accuracy.top5


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_a_fixed_batch_is_kept_to_and_every_image_counts_once(tmp_path, data, batch):
    source = nearest(tmp_path / "net.onnx", text=NEAREST.replace("N", str(batch)))
    accuracy = evaluated(source, data, batch_size=4)
    assert (accuracy.top1, accuracy.images) == (100, 12)


def test_a_file_in_float16_is_given_float16(tmp_path, data):
    text = NEAREST.replace("float", "float16")
    assert evaluated(nearest(tmp_path / "net.onnx", text=text, dtype=np.float16), data).top1 == 100


def test_of_a_file_that_says_nothing_what_is_taken_is_told(tmp_path, data):
    source, said = nearest(tmp_path / "net.onnx", stated=None), []
    evaluated(source, data, said=said)
    taken = str(Preprocessing(image_size=(8, 8)))
    words = f"does not say how its images are prepared; taken: {taken}; --mean, --std and --crop-pct change"
    assert said == [f"note: {source} {words} that"]
    said.clear()
    given = {"mean": FORM.mean, "std": FORM.std, "crop_pct": 1.0}
    assert evaluated(source, data, said=said, **given).top1 == 100
    assert said == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"arch": "timm:resnet18"}, RecipeError, r"net\.onnx is a whole network; leave out --arch"),
        ({"weights": "none"}, RecipeError, "leave out --weights"),
        ({"num_classes": 3}, RecipeError, "leave out --num-classes"),
        ({"image_size": (16, 8)}, SourceError, r"takes 8x8 images; leave out --image-size"),
        ({"std": (0.2, 0.2, 5e-324), "mean": (0.1, 0.2, float("inf"))}, SourceError, "--mean"),
        ({"settings": {"device": "mps"}}, RecipeError, "--device mps: ONNX files are run on cpu or cuda"),
    ],
)
def test_options_that_can_not_be_meant_are_refused(tmp_path, data, given, error, words):
    with pytest.raises(error, match=words):
        evaluated(nearest(tmp_path / "net.onnx"), data, **given)


def test_files_that_take_no_rgb_images_are_refused(tmp_path, data):
    for shape in ("N,1,8,8", "N,3", "N,8,8", "N,2,3,8,8"):
        path = tmp_path / "net.onnx"
        path.write_bytes(serialised(make(f"(float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}")))
        with pytest.raises(SourceError, match=r"net\.onnx takes x \(1, .*, not RGB images"):
            evaluated(str(path), data)


def test_a_file_that_is_no_classifier_is_refused(tmp_path, data):
    path = tmp_path / "net.onnx"
    path.write_bytes(serialised(make("(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }")))
    with pytest.raises(DataError, match="not a classifier"):
        evaluated(str(path), data)


def test_a_file_for_other_classes_is_refused(tmp_path, data):
    with pytest.raises(DataError, match="has 3 classes, the model 2; give data of 2, or"):
        evaluated(nearest(tmp_path / "net.onnx", classes=2), data)


def test_damaged_metadata_are_refused_in_words(tmp_path, data):
    form = Form(mean="grey")
    with pytest.raises(SourceError, match=r"its lcc\.preprocessing is damaged; export it again"):
        evaluated(nearest(tmp_path / "net.onnx", stated=form), data)


@pytest.mark.parametrize("half", [False, True])
def test_an_exported_file_is_as_accurate_as_its_network(lcc_run, tmp_path, half):
    data = idx_data(tmp_path / "data", train=96, test=48, classes=4)
    trained = ("finetune", "zoo:cifar_resnet20", "--from-scratch", "--num-classes", 4, "--data", data)
    small = ("--image-size", 8, "--batch-size", 16, "--epochs", 2, "--device", "cpu")
    assert lcc_run(*trained, *small, "-o", tmp_path / "net")[0] == 0
    file = tmp_path / "net.onnx"
    assert lcc_run("export", tmp_path / "net", "-o", file, *(["--half"] if half else []))[0] == 0
    of_network, of_file = (
        json.loads(lcc_run("eval", source, "--data", data, "--device", "cpu", "--json")[1])
        for source in (tmp_path / "net", file)
    )
    assert of_file == pytest.approx(of_network, abs=5 if half else 0)
    assert of_file["top1"] > 30


def test_images_that_may_have_been_trained_on_are_told_of(tmp_path):
    said, text = [], image_folder(tmp_path / "data", {"": {"a": 2, "b": 2, "c": 2}})
    assert evaluated(nearest(tmp_path / "net.onnx"), text, said=said).images == 6
    assert said == [
        f"note: {text} has neither val/ nor test/: all of its images count, with any that were trained on"
    ]
    other = image_folder(tmp_path / "parts", {"val": {"a": 2, "b": 2, "c": 2}})
    evaluated(nearest(tmp_path / "net.onnx"), other, said=said)
    assert len(said) == 1


def test_a_file_that_is_not_there_is_one_line(lcc_run, data):
    code, _, err = lcc_run("eval", "nowhere.onnx", "--data", data)
    assert code == 2
    assert "nowhere.onnx is not there; `lcc export` makes one" in one_line(err)

"""Accuracies: which guesses count, and that evaluating a network leaves it as it was."""

from __future__ import annotations

import pytest
import torch
from small_data import Form, idx_data, tiny_network
from torch import nn

from lcc.batches import eval_batches
from lcc.data import open_eval
from lcc.errors import DataError, RecipeError, SourceError
from lcc.evaluation import count_outputs, evaluate, pick_device

pytestmark = pytest.mark.usefixtures("one_thread")


def test_apples_gpu_is_used_where_it_is_asked_for_and_not_for_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", doubles=True) == pick_device() == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"device 'mps:0' has no float64, .* use --device cpu"):
        pick_device("mps:0", doubles=True)


class _Fixed(nn.Module):
    """Ranks the classes 0, 1, 2, ... for every image."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return -torch.arange(self.classes).float().expand(len(x), -1)


def test_top_1_and_top_5_count_the_right_guesses(tmp_path):
    text = idx_data(tmp_path, test=40, classes=8)
    accuracy = evaluate(_Fixed(8), eval_batches(open_eval(text), Form(), batch_size=7), device="cpu")
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (100 / 8, 500 / 8, 40)


def test_top_5_is_not_told_for_five_classes(tmp_path):
    text = idx_data(tmp_path, test=40, classes=5)
    assert evaluate(_Fixed(5), eval_batches(open_eval(text), Form()), device="cpu").top5 is None


class _Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            AssertionError("Wrong height"),
            SourceError,
            r"run on a 1x3x8x8 .*Wrong height.* --image-size",
        ),
        (
            RuntimeError("[enforce fail] can't allocate memory"),
            RecipeError,
            "7 images .*--batch-size 1$",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), RecipeError, "out of memory with 7 images at once"),
        (DataError("mine"), DataError, "^mine$"),
    ],
)
def test_a_network_that_can_not_run_is_refused_in_words(data, error, kind, words):
    batches = eval_batches(open_eval(data), Form(), batch_size=7)
    with pytest.raises(kind, match=words):
        evaluate(_Failing(error), batches, device="cpu")
    with pytest.raises(kind):
        count_outputs(_Failing(error), batches)


def test_evaluation_leaves_every_module_in_its_own_mode(data):
    model = tiny_network().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, eval_batches(open_eval(data), Form()), device="cpu")
    assert [module.training for module in model.modules()] == before

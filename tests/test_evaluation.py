"""Accuracies: which guesses count, and that evaluating a network leaves it as it was."""

from __future__ import annotations

import pytest
import torch
from small_data import Form, idx_data, tiny_network
from torch import nn

from lcc.batches import eval_batches
from lcc.data import open_eval
from lcc.errors import RecipeError
from lcc.evaluation import evaluate, pick_device

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


def test_evaluation_leaves_every_module_in_its_own_mode(data):
    model = tiny_network().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, eval_batches(open_eval(data), Form()), device="cpu")
    assert [module.training for module in model.modules()] == before

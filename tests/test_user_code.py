"""Networks from a user's own code."""

from __future__ import annotations

import sys

import pytest
import torch
from small_sources import assert_same, refusal
from torch import nn

from lcc import models
from lcc.errors import SourceError
from lcc.models import Preprocessing, Source


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    name = "lcc_test_user_code"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=5):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, num_classes))\n"
        "def broken():\n    raise ValueError('no such\\nluck')\n"
        "def text():\n    return 'net'\n"
    )
    monkeypatch.chdir(tmp_path)
    yield f"py:{name}"
    sys.modules.pop(name, None)


def test_a_users_factory_in_the_working_directory_gives_a_network(user_code):
    path = list(sys.path)
    loaded = models.load(f"{user_code}:make", num_classes=3)
    assert loaded.source == Source(id=f"{user_code}:make", weights="default", num_classes=3)
    assert loaded.model[2].out_features == 3
    assert loaded.preprocessing == Preprocessing()
    assert "images are prepared as for py:" in loaded.notes[0]
    assert sys.path == path


def test_a_users_code_takes_weights_from_a_file(user_code, tmp_path):
    state = models.load(f"{user_code}:make", weights="none", seed=9).model.state_dict()
    torch.save(state, tmp_path / "own.pth")
    assert_same(models.load(f"{user_code}:make", weights=str(tmp_path / "own.pth")).model.state_dict(), state)
    assert_same(models.load(str(tmp_path / "own.pth"), arch=f"{user_code}:make").model.state_dict(), state)


def test_a_users_code_is_built_again_only_with_trust(user_code):
    source = Source(id=f"{user_code}:make", weights="none")
    with pytest.raises(SourceError, match="--trust-code"):
        models.build(source)
    assert user_code.removeprefix("py:") not in sys.modules
    assert isinstance(models.build(source, trust_code=True), nn.Sequential)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("broken", "failed: ValueError: no such luck; --debug shows where"),
        ("missing", "failed: AttributeError: module 'lcc_test_user_code' has no attribute 'missing'"),
        ("text", "gave a str; it must return a torch.nn.Module"),
    ],
)
def test_a_users_code_that_fails_is_one_line(user_code, factory, words):
    assert words in refusal(f"{user_code}:{factory}")


def test_a_module_that_is_not_there_says_where_to_run():
    assert "No module named 'lcc_no_such_module'; run lcc in the directory that holds it" in refusal(
        "py:lcc_no_such_module:make"
    )

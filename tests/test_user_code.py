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

CODE = """
import threading
import torch
from torch import nn

def make(num_classes=5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, num_classes))

def broken():
    raise ValueError("no such\\nluck")

def text():
    return "net"

def compiled():
    return torch.compile(nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3)), nn.ReLU()))

def compiled_twice():
    part = torch.compile(nn.Conv2d(3, 3, 3))
    return nn.Sequential(part, part)

def compiled_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.compile()
    return net

def script():
    return nn.Sequential(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)))

def locked():
    net = make()
    net.lock = threading.Lock()
    return net

def stubborn():
    net = make()
    net.train = None
    return net

class Extra(nn.Linear):
    def get_extra_state(self):
        return {}

def extra():
    return nn.Sequential(Extra(3, 4))
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    name = "lcc_test_user_code"
    (tmp_path / f"{name}.py").write_text(CODE)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("broken", "failed: ValueError: no such luck; --debug shows where"),
        ("missing", "failed: AttributeError: module 'lcc_test_user_code' has no attribute 'missing'"),
        ("text", "gave a str; it must return a torch.nn.Module"),
        (
            "script",
            "0 of py:lcc_test_user_code:script is TorchScript, which can't be changed; give the Python",
        ),
        (
            "locked",
            "lcc works on copies in eval mode, and py:lcc_test_user_code:locked can't be had so: TypeEr",
        ),
        ("stubborn", "stubborn can't be had so: TypeError: 'NoneType' object is not callable"),
        (
            "extra",
            "0._extra_state in its state_dict is a dict, and lcc stores tensors alone; keep it elsewhere",
        ),
    ],
)
def test_a_users_code_that_fails_is_one_line(user_code, factory, words):
    assert words in refusal(f"{user_code}:{factory}")


@pytest.mark.parametrize("factory", ["compiled", "compiled_in_place"])
def test_a_compiled_network_is_taken_as_it_was_before(user_code, factory):
    model = models.load(f"{user_code}:{factory}").model
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))  # which a compiled one may not run
    model(torch.zeros(1, 3, 8, 8))
    assert seen == [1]


def test_a_compiled_part_that_comes_twice_stays_one(user_code):
    first, second = models.load(f"{user_code}:compiled_twice").model
    assert type(first) is nn.Conv2d
    assert first is second


def test_a_module_that_is_not_there_says_where_to_run():
    assert "No module named 'lcc_no_such_module'; run lcc in the directory that holds it" in refusal(
        "py:lcc_no_such_module:make"
    )

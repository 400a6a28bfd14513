"""What is inside checkpoint files, and which are refused."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from small_sources import assert_same, few_layers

from lcc import weight_files
from lcc.errors import SourceError


def other() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in few_layers().state_dict().items()}


def saved(path, content):
    torch.save(content, path)
    return path


def refusal(path, **options) -> str:
    with pytest.raises(SourceError) as caught:
        weight_files.read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_safetensors_file_of_which_the_length_reads_as_a_pickle_is_none(tmp_path, start):
    path, wanted = tmp_path / "weights.bin", few_layers().state_dict()
    for padding in range(0, 20_000, 8):
        save_file(wanted, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[:2].startswith(start):
            break
    assert path.read_bytes().startswith(start)
    assert_same(weight_files.read(path).tensors, wanted)


STATE = few_layers().state_dict()
WRAPPED = {
    "bare": (STATE, None),
    "state_dict": (
        {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}},
        "took 'state_dict'",
    ),
    "model": ({"model": STATE}, "took 'model'"),
    "net, as in the popular CIFAR scripts": ({"net": STATE, "acc": 93.0}, "took 'net'"),
    "timm's moving average": (
        {"state_dict": other(), "state_dict_ema": STATE},
        "took the moving average 'state_dict_ema'",
    ),
    "an absent moving average": ({"state_dict": STATE, "state_dict_ema": None}, "took 'state_dict'"),
    "torchvision's moving average": (
        {
            "model": other(),
            "model_ema": {"n_averaged": torch.tensor(9), **{f"module.{k}": v for k, v in STATE.items()}},
        },
        "took the moving average 'model_ema'; left out n_averaged; dropped 'module.' from the names",
    ),
    "wrappers in wrappers": ({"model": {"state_dict": STATE}}, "took 'model'; took 'state_dict'"),
    "an unknown key that holds the only tensors": ({"student": STATE, "epoch": 1}, "took 'student'"),
    "DataParallel": ({f"module.{k}": v for k, v in STATE.items()}, "dropped 'module.' from the names"),
    "compile": ({f"_orig_mod.{k}": v for k, v in STATE.items()}, "dropped '_orig_mod.' from the names"),
    "both": (
        {f"module._orig_mod.{k}": v for k, v in STATE.items()},
        "dropped '_orig_mod.' from the names; dropped 'module.' from the names",
    ),
    "compiled parts": (
        {k.replace("1.", "1._orig_mod."): v for k, v in STATE.items()},
        "dropped '_orig_mod.' from the names",
    ),
    "a profiler's traces": (
        STATE | {"0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        "left out 0.total_ops, total_params",
    ),
    "numbers beside the tensors": (STATE | {"step": 3}, "left out step"),
    "timm's arguments": ({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, "took 'state_dict'"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_the_weights_are_found_and_what_was_done_is_said(case, tmp_path):
    content, said = WRAPPED[case]
    checkpoint = weight_files.read(saved(tmp_path / "x.pth", content))
    assert_same(checkpoint.tensors, STATE)
    assert "; ".join(checkpoint.actions) == (said or "")


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    content = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert weight_files.read(saved(tmp_path / "x.pth", content)).tensors.keys() == {"module.a", "b"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_are_read_whatever_the_file_is_called(name, tmp_path):
    save_file(STATE, tmp_path / name)
    assert_same(weight_files.read(tmp_path / name).tensors, STATE)


@pytest.mark.parametrize("name", ["x.pt", "x.th", "model_best.pth.tar", "x.safetensors"])
def test_pytorch_files_are_read_whatever_the_file_is_called(name, tmp_path):
    assert_same(weight_files.read(saved(tmp_path / name, STATE)).tensors, STATE)


def test_files_from_before_torch_1_6_are_read(tmp_path):
    torch.save(STATE, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(weight_files.read(tmp_path / "x.pth").tensors, STATE)


@pytest.mark.parametrize(
    ("content", "sources"),
    [
        ({"arch": "resnet18"}, ("timm:resnet18", "torchvision:resnet18", "zoo:resnet18")),
        ({"arch": "resnet18", "best_acc1": 70.0}, ("torchvision:resnet18", "zoo:resnet18")),
        ({"arch": 3}, ()),
        ({}, ()),
    ],
)
def test_an_arch_entry_is_read_as_the_library_that_writes_it_means_it(content, sources, tmp_path):
    assert weight_files.read(saved(tmp_path / "x.pth", content | {"state_dict": STATE})).arch == sources


# --- files that can't be used


class Sentinel:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_runs_no_code(tmp_path):
    ran = tmp_path / "ran"
    text = refusal(saved(tmp_path / "x.pth", {"state_dict": STATE, "evil": Sentinel(ran)}))
    assert not ran.exists()
    assert "io.open" in text
    assert "--trust-pickle" in text


@pytest.mark.parametrize("zipped", [True, False])
def test_blocked_globals_are_named(zipped, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": STATE, "f": Fraction(1, 2)}, path, _use_new_zipfile_serialization=zipped)
    assert "fractions.Fraction" in refusal(path)


def test_trust_pickle_lets_a_blocked_file_through(tmp_path):
    path = saved(tmp_path / "x.pth", {"state_dict": STATE, "f": Fraction(1, 2)})
    assert_same(weight_files.read(path, trust_pickle=True).tensors, STATE)


def test_a_pickled_network_gives_its_weights_once_trusted(tmp_path):
    path = saved(tmp_path / "x.pt", {"model": few_layers(), "epoch": 1})
    assert "torch.nn.modules" in refusal(path)
    checkpoint = weight_files.read(path, trust_pickle=True)
    assert_same(checkpoint.tensors, STATE)
    assert checkpoint.actions == ("took 'model'", "took the weights of the pickled Sequential")


def test_a_trusted_file_may_need_code_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lcc_test_wild_code.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import lcc_test_wild_code

    path = saved(tmp_path / "x.pt", lcc_test_wild_code.Net(2, 2))
    monkeypatch.undo()
    monkeypatch.delitem(__import__("sys").modules, "lcc_test_wild_code")
    assert "No module named 'lcc_test_wild_code'" in refusal(path, trust_pickle=True)
    monkeypatch.chdir(tmp_path)
    assert weight_files.read(path, trust_pickle=True).tensors.keys() == {"weight", "bias"}


def truncated(path, source):
    data = source.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file(STATE, tmp_path / "whole.safetensors")
    assert "damaged" in refusal(truncated(tmp_path / "cut.safetensors", tmp_path / "whole.safetensors"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pytorch_file_is_refused(zipped, tmp_path):
    torch.save(STATE, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    assert "damaged" in refusal(truncated(tmp_path / "cut.pth", tmp_path / "whole.pth"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"# Weights\n\nSee below.", "neither a safetensors nor a PyTorch file"),
        (b"\x80\x02}q\x00.", "damaged or no checkpoint"),
        (b"\x80\x02K\x01.", "damaged or no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(content, words, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_missing_file_is_named(tmp_path):
    assert "there is no file" in refusal(tmp_path / "x.pth")


def test_a_directory_is_no_checkpoint(tmp_path):
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 1, "config": {"lr": 0.1}}, r"holds no tensors by name \(it has: epoch, config\)"),
        ({}, r"holds no tensors by name \(it has: nothing\)"),
        ({1: STATE}, r"holds no tensors by name \(it has: 1\)"),
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({"student": STATE, "teacher": STATE}, r"several sets of tensors \(student, teacher\)"),
    ],
)
def test_a_file_without_one_set_of_tensors_says_what_it_has(content, words, tmp_path):
    assert re.search(words, refusal(saved(tmp_path / "x.pth", content)))

from __future__ import annotations

import argparse
import re
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from small_sources import assert_same
from torch import nn

from lcc import weights
from lcc.errors import SourceError


def network(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes))


def other() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in network().state_dict().items()}


def saved(path, content):
    torch.save(content, path)
    return path


def refusal(path, **options) -> str:
    with pytest.raises(SourceError) as caught:
        weights.read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


# --- what is inside a file

STATE = network().state_dict()
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
    checkpoint = weights.read(saved(tmp_path / "x.pth", content))
    assert_same(checkpoint.tensors, STATE)
    assert "; ".join(checkpoint.actions) == (said or "")


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    content = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert weights.read(saved(tmp_path / "x.pth", content)).tensors.keys() == {"module.a", "b"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_are_read_whatever_the_file_is_called(name, tmp_path):
    save_file(STATE, tmp_path / name)
    assert_same(weights.read(tmp_path / name).tensors, STATE)


@pytest.mark.parametrize("name", ["x.pt", "x.th", "model_best.pth.tar", "x.safetensors"])
def test_pytorch_files_are_read_whatever_the_file_is_called(name, tmp_path):
    assert_same(weights.read(saved(tmp_path / name, STATE)).tensors, STATE)


def test_files_from_before_torch_1_6_are_read(tmp_path):
    torch.save(STATE, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(weights.read(tmp_path / "x.pth").tensors, STATE)


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
    assert weights.read(saved(tmp_path / "x.pth", content | {"state_dict": STATE})).arch == sources


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
    assert_same(weights.read(path, trust_pickle=True).tensors, STATE)


def test_a_pickled_network_gives_its_weights_once_trusted(tmp_path):
    path = saved(tmp_path / "x.pt", {"model": network(), "epoch": 1})
    assert "torch.nn.modules" in refusal(path)
    checkpoint = weights.read(path, trust_pickle=True)
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
    assert weights.read(path, trust_pickle=True).tensors.keys() == {"weight", "bias"}


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


# --- whether a file fits a network


def test_a_common_first_word_is_dropped_where_that_makes_names_agree():
    tensors, actions = weights.align({f"model.{k}": v for k, v in STATE.items()}, STATE)
    assert_same(tensors, STATE)
    assert actions == ("dropped the prefix 'model.'",)


def test_a_common_first_word_that_the_network_has_too_stays():
    wanted = {f"model.{name}": tensor for name, tensor in STATE.items()}
    tensors, actions = weights.align(wanted, wanted)
    assert tensors.keys() == wanted.keys()
    assert actions == ()


def test_branches_for_training_are_left_out_unless_the_network_has_them():
    tensors = STATE | {"aux1.fc.weight": torch.zeros(2, 2)}
    without, actions = weights.align(tensors, STATE)
    assert without.keys() == STATE.keys()
    assert actions == ("left out the auxiliary classifier, which only training uses",)
    assert weights.align(tensors, tensors)[0].keys() == tensors.keys()


def test_names_of_torchvisions_densenet_files_are_brought_up_to_date():
    tensors, _ = weights.align({"features.denseblock1.denselayer1.norm.1.weight": torch.zeros(1)}, ())
    assert tensors.keys() == {"features.denseblock1.denselayer1.norm1.weight"}


def test_another_class_count_is_recognised_as_such():
    comparison = weights.compare(weights.shapes(network(10).state_dict()), weights.shapes(STATE))
    assert comparison.classes == (10, 4)
    assert not comparison.fits


def test_another_width_is_not_taken_for_a_class_count():
    wider = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 4)
    ).state_dict()
    assert weights.compare(weights.shapes(wider), weights.shapes(STATE)).classes is None


def test_a_missing_batchnorm_counter_is_no_misfit():
    old = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}
    model = nn.Sequential(*network())
    assert weights.load_into_(model, old).fits
    assert_same(model.state_dict(), STATE)


def test_a_tensor_with_nan_in_it_fits():
    diverged = {name: tensor * float("nan") for name, tensor in STATE.items() if tensor.is_floating_point()}
    assert weights.load_into_(nn.Sequential(*network()), STATE | diverged).fits


def test_misfits_are_listed_in_words_with_count_and_first_names():
    got = {"a": (1,), "c": (2, 3)} | {f"x{i}": () for i in range(5)}
    comparison = weights.compare(got, {"a": (1,), "b": (4,), "c": (2, 4)})
    assert str(comparison) == (
        "1 missing (b); 5 not in the network (x0, x1, x2, ...); "
        "1 of another shape (c: 2x3 in the file, 2x4 in the network)"
    )


def test_half_precision_is_loaded_in_the_networks_own():
    model = network()
    weights.load_into_(
        model,
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in STATE.items()},
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model[0].weight, STATE["0.weight"], rtol=1e-3, atol=1e-3)


class Versioned(nn.Linear):
    """Refuses tensors that come without its version, as torchvision's MNASNet does; knows its older name."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            if prefix + "matrix" not in state_dict:
                raise ValueError("version should be 2")
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "matrix")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_todays_names_are_not_taken_for_an_older_release():
    assert weights.load_into_(Versioned(2, 2, bias=False), {"weight": torch.ones(2, 2)}).fits


def test_names_that_the_modules_translate_fit():
    model = Versioned(2, 2, bias=False)
    assert weights.load_into_(model, {"matrix": torch.ones(2, 2)}).fits
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_names_that_the_modules_refuse_are_listed():
    comparison = weights.load_into_(Versioned(2, 2, bias=False), {"other": torch.ones(2, 2)})
    assert comparison == weights.Comparison(("weight",), ("other",))


def checkpoint(tensors, tmp_path):
    return weights.Checkpoint(tmp_path / "x.pth", dict(tensors))


def test_the_first_that_fits_ends_the_search(tmp_path):
    def candidates():
        yield "narrow", {"0.weight": (1,)}
        yield "right", weights.shapes(network(10).state_dict())
        raise AssertionError("searched on")

    match = weights.best_match(checkpoint(STATE, tmp_path), candidates())
    assert match is not None
    assert (match.source, match.fits, match.comparison.classes) == ("right", True, (4, 10))


def test_without_a_fit_the_most_alike_is_given_with_its_share(tmp_path):
    wanted = weights.shapes(STATE)
    half = {name: shape for name, shape in wanted.items() if name.startswith(("0", "3"))}
    match = weights.best_match(checkpoint(STATE, tmp_path), [("none", {"z": (9,)}), ("some", half)])
    assert match is not None
    assert (match.source, match.fits, match.share) == ("some", False, len(half) / len(wanted))


def test_the_same_shapes_under_other_names_are_noticed(tmp_path):
    renamed = {f"body.{name}": tensor for name, tensor in STATE.items()} | {"x": torch.zeros(())}
    wanted = weights.shapes({name.replace("0.", "stem."): tensor for name, tensor in STATE.items()})
    match = weights.best_match(checkpoint(renamed, tmp_path), [("one", {"z": (9,)}), ("same", wanted)])
    assert match is not None
    assert (match.source, match.fits, match.same_shapes) == ("same", False, True)


def test_nothing_to_compare_with_gives_no_match(tmp_path):
    assert weights.best_match(checkpoint(STATE, tmp_path), []) is None

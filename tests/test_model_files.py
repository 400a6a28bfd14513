"""Networks from checkpoint files: which network a file fits, and what it says of itself."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_sources import TINY, assert_same, refusal
from torchvision import models as vision

from lcc import libraries, models
from lcc.models import Source
from lcc.zoo import ZOO


@pytest.fixture
def tiny_file(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "tiny.th"
    state = ZOO["cifar_resnet20"]().state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 91.7}, path)
    return path


@pytest.mark.parametrize("as_weights", [True, False])
def test_a_file_gives_its_weights_to_the_architecture(as_weights, tiny_file, no_network):
    loaded = (
        models.load(TINY, weights=str(tiny_file)) if as_weights else models.load(str(tiny_file), arch=TINY)
    )
    assert_same(
        loaded.model.state_dict(),
        {k.removeprefix("module."): v for k, v in torch.load(tiny_file)["state_dict"].items()},
    )
    assert loaded.source == Source(id=TINY, weights="file:tiny.th")
    assert not loaded.source.is_random
    how = "--image-size, --mean, --std and --crop-pct change that"
    assert loaded.notes == (
        "tiny.th: took 'state_dict'; dropped 'module.' from the names",
        f"images are prepared as for {TINY}: {libraries.CIFAR}; {how}",
    )


def test_how_images_are_prepared_is_said_with_what_was_given(tiny_file):
    loaded = models.load(TINY, weights=str(tiny_file), image_size=(28, 28))
    assert loaded.preprocessing.image_size == (28, 28)
    assert f"as for {TINY}, but for what is given: {loaded.preprocessing};" in loaded.notes[1]


def test_a_file_with_another_class_count_points_at_the_option(tiny_file):
    assert refusal(TINY, weights=str(tiny_file), num_classes=7) == (
        f"{tiny_file} has 10 classes and {TINY} was built for 7; use --num-classes 10"
    )


def test_a_file_of_another_network_is_refused_with_the_one_it_fits(tiny_file):
    text = refusal("zoo:cifar_resnet32", weights=str(tiny_file))
    assert f"{tiny_file} does not fit zoo:cifar_resnet32: 60 missing (layer1.3.conv1.weight, " in text
    assert text.endswith("; it fits zoo:cifar_resnet20")


def test_a_file_that_names_no_network_gets_a_suggestion_and_no_guess(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ZOO["cifar_resnet32"](num_classes=7).state_dict(), path)
    want = f"{path} does not name its network: add --arch zoo:cifar_resnet32 --num-classes 7"
    assert refusal(str(path)) == want


def zoo_only(path):
    return libraries.outlines(*(f"zoo:{name}" for name in ZOO))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "linear.bias"},
            "the closest known is zoo:cifar_resnet20 (99% of",
        ),
        (
            lambda s: {k.replace("conv", "c"): v for k, v in s.items()},
            "are those of zoo:cifar_resnet20, its names are not (c1.weight, not conv1.weight)",
        ),
        (lambda s: {"x": torch.zeros(3)}, "no network known here has its tensors; give --arch"),
    ],
)
def test_what_comes_close_is_described(change, words, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "candidates", zoo_only)
    torch.save(change(ZOO["cifar_resnet20"]().state_dict()), tmp_path / "x.pth")
    assert words in refusal(str(tmp_path / "x.pth"))


def test_torchvision_networks_are_recognised_by_their_tensors(tmp_path):
    torch.save(vision.resnet18(num_classes=3).state_dict(), tmp_path / "mine.pth")
    assert refusal(str(tmp_path / "mine.pth")).endswith(": add --arch torchvision:resnet18 --num-classes 3")


def test_timm_networks_are_recognised_where_the_path_mentions_them(tmp_path):
    folder = tmp_path / "mobilenetv3_small_050.lamb_in1k"
    folder.mkdir()
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), folder / "model.safetensors")
    assert refusal(str(folder / "model.safetensors")).endswith(
        ": add --arch timm:mobilenetv3_small_050.lamb_in1k"
    )


def test_every_torchvision_classifier_is_a_candidate(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(libraries, "outlines", lambda *sources: seen.extend(sources) or iter(()))
    assert list(libraries.candidates(tmp_path / "vgg11-8a719046.pth")) == []
    found = [source for source in seen if source.startswith("torchvision:")]
    assert found[:2] == ["torchvision:vgg11", "torchvision:resnet101"]
    assert set(found) == {f"torchvision:{name}" for name in vision.list_models(vision)}
    assert "timm:vgg11" in seen


@pytest.mark.parametrize(
    ("extra", "source"),
    [({"version": 2}, "timm:resnet18"), ({"best_acc1": 70.0}, "torchvision:resnet18")],
    ids=["timm", "PyTorch's ImageNet example"],
)
def test_a_file_that_names_its_network_needs_no_arch(extra, source, tmp_path):
    torch.save(
        {"arch": "resnet18", "state_dict": vision.resnet18().state_dict()} | extra, tmp_path / "x.pth.tar"
    )
    loaded = models.load(str(tmp_path / "x.pth.tar"))
    assert loaded.source.id == source
    assert loaded.notes[0] == f"x.pth.tar says it is {source}; --arch SOURCE would overrule it"


@pytest.mark.parametrize("arch", ["resnet", "resnet50", "hf-hub:timm/resnet18"])
def test_a_file_that_names_what_it_is_not_is_refused(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "candidates", zoo_only)
    torch.save({"arch": arch, "state_dict": ZOO["cifar_resnet20"]().state_dict()}, tmp_path / "x.pth")
    text = refusal(str(tmp_path / "x.pth"))
    assert f"says its network is {arch}, but" in text
    assert text.endswith("add --arch zoo:cifar_resnet20")


def test_a_file_named_as_torchvision_publishes_it_has_that_ones_classes_and_preprocessing(tmp_path):
    path = tmp_path / "resnet50-0676ba61.pth"
    torch.save(vision.resnet50().state_dict(), path)
    loaded = models.load("torchvision:resnet50", weights=str(path))
    assert loaded.source == Source(id="torchvision:resnet50@IMAGENET1K_V1", weights=f"file:{path.name}")
    assert loaded.preprocessing.crop_pct == 224 / 256
    assert loaded.class_names is not None
    spelled_out = models.load("torchvision:resnet50@IMAGENET1K_V2", weights=str(path))
    assert spelled_out.source.id == "torchvision:resnet50@IMAGENET1K_V2"


def test_a_blocked_file_goes_through_with_trust(tmp_path):
    torch.save(ZOO["cifar_resnet20"](), tmp_path / "x.pt")
    assert "--trust-pickle" in refusal(str(tmp_path / "x.pt"), arch=TINY)
    loaded = models.load(str(tmp_path / "x.pt"), arch=TINY, trust_pickle=True)
    assert loaded.notes[0] == "x.pt: took the weights of the pickled CifarResNet"


def test_options_that_contradict_the_source_are_refused(tiny_file):
    assert "--arch zoo:cifar_resnet20 is for checkpoint files" in refusal(TINY, arch=TINY, weights="none")
    assert "is itself a checkpoint file; leave out --weights none" in refusal(
        str(tiny_file), arch=TINY, weights="none"
    )


def test_weights_that_are_no_file_say_what_the_option_takes():
    assert "takes default, none or a checkpoint file" in refusal(TINY, weights="defualt")

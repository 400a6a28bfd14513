"""Networks of the libraries by name, with random weights or those that the libraries publish."""

from __future__ import annotations

import urllib.error

import pytest
import timm
import timm.models._builder
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError
from small_sources import TINY, assert_same, refusal
from torchvision import models as vision

from lcc import libraries, models
from lcc.errors import SourceError
from lcc.models import Preprocessing, Source

# Names

SOURCES = [
    "torchvision:resnet18",
    "torchvision:resnet50@IMAGENET1K_V1",
    "torchvision:googlenet",
    "torchvision:googlenet@IMAGENET1K_V1",
    "torchvision:fcn_resnet50",
    "torchvision:raft_small",
    "timm:resnet10t",
    "timm:mobilenetv3_small_050.lamb_in1k",
    TINY,
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_library_gives_a_network_that_build_gives_again(source, no_network):
    loaded = models.load(source, weights="none")
    again = models.build(Source.model_validate_json(loaded.source.model_dump_json()))
    assert_same(again.state_dict(), loaded.model.state_dict())
    assert not again.training
    assert not loaded.model.training


def test_num_classes_reaches_the_network_and_the_source():
    for source in ("torchvision:mobilenet_v3_small", "timm:resnet10t", TINY):
        loaded = models.load(source, weights="none", num_classes=7)
        assert loaded.source.num_classes == 7
        size = loaded.preprocessing.image_size
        assert loaded.model(torch.zeros(1, 3, *size)).shape == (1, 7)
        assert models.build(loaded.source)(torch.zeros(1, 3, *size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:resnt18", "did you mean torchvision:resnet18 or"),
        ("timm:mobilenetv3_smal_050", "did you mean timm:mobilenetv3_small_050"),
        ("zoo:cifar_resnet21", "did you mean zoo:cifar_resnet"),
        ("timm:cifar_resnet20", "did you mean zoo:cifar_resnet20?"),
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("torchvison:resnet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("nothing/like/it.pth", "neither a network nor a file: give torchvision:NAME"),
        ("zoo:", "zoo has no network called"),
        (
            "torchvision:resnet50@IMAGENET",
            "has no weights called IMAGENET; it has IMAGENET1K_V1, IMAGENET1K_V2",
        ),
        ("timm:resnet18.nope", "has no weights called nope; it has resnet18.a1_in1k"),
        ("timm:convnext_tiny_in22ft1k", "use timm:convnext_tiny.fb_in22k_ft_in1k"),
        ("torchvision:fasterrcnn_resnet50_fpn", "is a detection network"),
        ("torchvision:quantized_resnet18", "use torchvision:resnet18"),
        ("py:module", "is not py:MODULE:FACTORY"),
    ],
)
def test_an_unknown_name_is_refused_with_what_comes_close(source, words):
    assert words in refusal(source, weights="none")


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:x", "timm/resnet18"]
)
def test_timm_names_that_point_elsewhere_are_refused(name, no_network):
    assert "points outside timm" in refusal(f"timm:{name}")
    with pytest.raises(SourceError, match="points outside timm"):
        models.build(Source(id=f"timm:{name}", weights="default"))


def test_a_class_count_that_a_network_does_not_take_is_refused():
    assert "can't be built with {'num_classes': 3}" in refusal(
        "torchvision:raft_small", weights="none", num_classes=3
    )


def test_no_classes_at_all_are_refused():
    assert "--num-classes 0" in refusal(TINY, weights="none", num_classes=0)


# Random weights


def test_random_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    one = models.load(TINY, weights="none", seed=3).model.state_dict()
    torch.manual_seed(6)
    assert_same(models.load(TINY, weights="none", seed=3).model.state_dict(), one)
    assert not torch.equal(models.load(TINY, weights="none", seed=4).model.conv1.weight, one["conv1.weight"])


def test_loading_and_building_leave_the_callers_generator_alone():
    before = torch.random.get_rng_state()
    loaded = models.load(TINY, weights="none", seed=3)
    models.build(loaded.source)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_networks_are_float32_on_the_cpu_whatever_the_callers_defaults(monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            network = models.build(Source(id=TINY, weights="none"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.float32, "cpu")}


def test_random_weights_are_said_to_be_random():
    loaded = models.load(TINY, weights="none", seed=3)
    assert loaded.source.is_random
    assert loaded.notes == ("the weights are random (seed 3): accuracy means nothing until they are trained",)
    assert str(loaded.source) == f"{TINY}, random weights (seed 3)"


# The libraries' weights


@pytest.fixture
def torchvision_hub(monkeypatch):
    """A torchvision hub that gives every network its own random weights; returns what it was asked for."""
    asked = []

    def give(url, *args, **kwargs):
        asked.append(url)
        return donors[url.split("/")[-1].split("-")[0]].state_dict()

    torch.manual_seed(7)
    donors = {
        "resnet18": vision.resnet18(),
        "googlenet": vision.googlenet(init_weights=False),
    }
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", give)
    return donors, asked


def test_default_weights_are_named_in_the_source(torchvision_hub):
    donors, asked = torchvision_hub
    loaded = models.load("torchvision:resnet18")
    assert loaded.source == Source(id="torchvision:resnet18@IMAGENET1K_V1", weights="default")
    assert asked == [vision.ResNet18_Weights.IMAGENET1K_V1.url]
    assert_same(loaded.model.state_dict(), donors["resnet18"].state_dict())
    assert loaded.class_names is not None
    assert (len(loaded.class_names), loaded.class_names[0]) == (1000, "tench")
    assert loaded.notes == ()


def test_another_class_count_keeps_all_but_the_last_layer(torchvision_hub):
    donors, _ = torchvision_hub
    loaded = models.load("torchvision:resnet18", num_classes=3)
    want, got = donors["resnet18"].state_dict(), loaded.model.state_dict()
    assert {name for name in want if not torch.equal(got[name], want[name])} == {"fc.weight", "fc.bias"}
    assert loaded.class_names is None
    assert loaded.notes == ("the last layer is new, for 3 classes instead of 1000: train it first",)


def test_googlenet_scales_its_input_as_its_weights_need_and_has_no_training_branches(torchvision_hub):
    loaded = models.load("torchvision:googlenet")
    assert loaded.model.transform_input
    assert not any(name.startswith("aux") for name in loaded.model.state_dict())
    assert models.build(loaded.source).transform_input
    assert not models.load("torchvision:googlenet", weights="none").model.transform_input


def test_timm_weights_come_from_timm(monkeypatch):
    torch.manual_seed(7)
    donor = timm.create_model("resnet10t").state_dict()
    asked = []
    monkeypatch.setattr(
        timm.models._builder,
        "load_state_dict_from_hf",
        lambda where, *a, **k: asked.append(where) or dict(donor),
    )
    loaded = models.load("timm:resnet10t")
    assert asked == ["timm/resnet10t.c3_in1k"]
    assert loaded.source == Source(id="timm:resnet10t.c3_in1k", weights="default")
    assert_same(loaded.model.state_dict(), donor)
    assert loaded.class_names is not None
    assert loaded.class_names[0] == "tench, Tinca tinca"
    fewer = models.load("timm:resnet10t", num_classes=3)
    assert fewer.model.fc.out_features == 3
    assert torch.equal(fewer.model.conv1[0].weight, donor["conv1.0.weight"])
    assert "3 classes instead of 1000" in fewer.notes[0]


@pytest.mark.zoo
def test_every_torchvision_classifier_is_built_with_the_parameters_its_weights_have():
    checked = 0
    for name in vision.list_models(vision):
        for member in vision.get_model_weights(name):
            with init_empty_weights():
                network = libraries.find(f"torchvision:{name}@{member.name}").build(None)
            count = sum(parameter.numel() for parameter in network.parameters())
            if name not in libraries.PORTED:  # published with the branches for training
                assert count == member.meta["num_params"], (name, member)
            checked += 1
    assert checked > 80


class HubError(Exception):
    """What a client library raises that derives from nothing known here."""


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route\nto host"),
        LocalEntryNotFoundError("offline"),
        HubError(),
        TimeoutError(),
        RuntimeError("invalid hash value"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("source", "downloader", "place"),
    [
        (
            "torchvision:resnet18",
            "torchvision.models._api.load_state_dict_from_url",
            vision.ResNet18_Weights.DEFAULT.url,
        ),
        (
            "timm:resnet10t",
            "timm.models._builder.load_state_dict_from_hf",
            "https://huggingface.co/timm/resnet10t.c3_in1k",
        ),
    ],
)
def test_a_hub_out_of_reach_is_one_line_with_the_ways_out(source, downloader, place, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(downloader, fail)
    text = refusal(source)
    assert all(
        words in text for words in (source, place, type(error).__name__, "--weights PATH", "--weights none")
    )


UNTRAINED = next(name for name in timm.list_models() if not timm.models.get_pretrained_cfg(name).has_weights)


@pytest.mark.parametrize("source", [TINY, f"timm:{UNTRAINED}"])
def test_a_network_without_trained_weights_says_what_to_do(source, no_network):
    text = refusal(source)
    assert "--weights PATH" in text
    assert "--weights none" in text
    assert refusal(source, weights="default") == text


# Values


@pytest.mark.parametrize("weights", ["random", "file:", ""])
def test_a_source_with_unknown_weights_is_no_source(weights):
    with pytest.raises(ValidationError):
        Source(id=TINY, weights=weights)


def test_values_are_the_same_after_a_trip_through_json():
    source = Source(id=TINY, weights="file:x y.th", num_classes=3, seed=2)
    preprocessing = libraries.find("timm:resnet18").preprocessing
    assert Source.model_validate_json(source.model_dump_json()) == source
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing

from __future__ import annotations

import socket
import sys
import urllib.error

import pytest
import timm
import timm.models._builder
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torchvision import models as vision

from lcc import libraries, models
from lcc.errors import SourceError
from lcc.models import Preprocessing, Source
from lcc.zoo import ZOO

TINY = "zoo:cifar_resnet20"


def refusal(source, **options) -> str:
    with pytest.raises(SourceError) as caught:
        models.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def tiny_file(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "tiny.th"
    state = ZOO["cifar_resnet20"]().state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 91.7}, path)
    return path


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


# --- names

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


# --- random weights


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


# --- the libraries' weights


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


# --- preprocessing and class names


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "resnet18", "tf_efficientnet_b0.in1k", "mobilenetv3_large_100"]
)
def test_timm_preprocessing_is_what_timm_resolves(name):
    want = timm.data.resolve_data_config({}, model=timm.create_model(name))
    got = libraries.find(f"timm:{name}").preprocessing
    assert (got.mean, got.std, got.crop_pct, got.interpolation) == tuple(
        want[k] for k in ("mean", "std", "crop_pct", "interpolation")
    )
    assert (3, *got.image_size) == want["input_size"]


def test_torchvision_preprocessing_gives_the_resize_and_crop_of_every_classifiers_transform():
    checked = 0
    for name in vision.list_models(vision):
        for member in vision.get_model_weights(name):
            got = libraries.find(f"torchvision:{name}@{member.name}").preprocessing
            want = member.transforms()
            assert [got.image_size[0]] == want.crop_size
            assert [int(got.image_size[0] / got.crop_pct)] == want.resize_size
            assert (list(got.mean), list(got.std)) == (list(want.mean), list(want.std))
            assert got.interpolation == want.interpolation.value
            checked += 1
    assert checked > 80


def test_a_name_without_weights_is_prepared_for_as_the_default_weights_are():
    plain, named = (libraries.find(f"torchvision:resnet50{tag}") for tag in ("", "@IMAGENET1K_V2"))
    assert plain.preprocessing == named.preprocessing
    assert plain.class_names is None
    assert named.class_names is not None


def test_the_zoos_networks_see_cifar_as_their_checkpoints_were_trained():
    assert models.load(TINY, weights="none").preprocessing == Preprocessing(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), image_size=(32, 32), crop_pct=1.0
    )


def test_options_overrule_the_preprocessing():
    loaded = models.load(
        TINY, weights="none", image_size=(64, 48), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_pct=0.9
    )
    assert loaded.preprocessing == Preprocessing(
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=(64, 48), crop_pct=0.9, interpolation="bilinear"
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"image_size": (0, 32)}, "--image-size"),
        ({"mean": (0.5,)}, "--mean"),
        ({"mean": (0.5, 0.5, float("nan"))}, "--mean"),
        ({"std": (1.0, 1.0, 0.0)}, "--std"),
        ({"crop_pct": 1.1}, "--crop-pct"),
        ({"crop_pct": 0.0}, "--crop-pct"),
        ({"class_names": ("a", "b")}, "--class-names gives 2 names for 10 classes"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, words):
    assert words in refusal(TINY, weights="none", **option)


def test_class_names_can_be_given():
    names = tuple("abcdefghij")
    assert models.load(TINY, weights="none", class_names=names).class_names == names
    assert models.load(TINY, weights="none").class_names is None


def test_another_crop_mode_of_timms_is_mentioned():
    loaded = models.load("timm:dm_nfnet_f0.dm_in1k", weights="none")
    assert loaded.notes[-1] == "timm evaluates these weights in crop mode 'squash'; lcc crops the centre"


# --- checkpoint files


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


# --- a user's own code


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


# --- the values


@pytest.mark.parametrize("weights", ["random", "file:", ""])
def test_a_source_with_unknown_weights_is_no_source(weights):
    with pytest.raises(ValidationError):
        Source(id=TINY, weights=weights)


def test_a_preprocessing_reads_as_one_clause():
    assert str(libraries.CIFAR) == "32x32 bilinear, crop 1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"


def test_values_are_the_same_after_a_trip_through_json():
    source = Source(id=TINY, weights="file:x y.th", num_classes=3, seed=2)
    preprocessing = libraries.find("timm:resnet18").preprocessing
    assert Source.model_validate_json(source.model_dump_json()) == source
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing


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

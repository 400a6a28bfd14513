"""How a network's images are prepared, and what its classes are called."""

from __future__ import annotations

import pytest
import timm
from small_sources import TINY, refusal
from torchvision import models as vision

from lcc import libraries, models
from lcc.models import Preprocessing


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


def test_a_preprocessing_reads_as_one_clause():
    assert str(libraries.CIFAR) == "32x32 bilinear, crop 1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"


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

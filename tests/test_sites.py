"""Finding convolutions in hosts that make it hard, and leaving the hosts alone."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from found_sites import convs_of, norms_of, obstacle_of, sites_of
from hosts import (
    GEOMETRIES,
    CalledTwice,
    Chain,
    PreActivation,
    Raises,
    ReadsWeight,
    Tied,
    TiedAutoencoder,
    TinyResNet,
    TwoParents,
    assert_same,
    conv3,
    convert_all_,
    photos,
    seeded,
    state_of,
)
from torch import nn
from torch.nn import functional as F

from lcc.convolutions import conv_spec
from lcc.errors import SourceError
from lcc.specs import Size
from lcc.surgery import find_sites

HOSTS = (TinyResNet, PreActivation, TwoParents, CalledTwice, Tied, TiedAutoencoder, ReadsWeight)


@contextmanager
def left_as_it_was(model):
    def surroundings():
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002  # what hosts draw from
        return torch.get_rng_state().tolist(), legacy, random.getstate(), torch.is_grad_enabled()

    before, around = state_of(model), surroundings()
    yield
    assert_same(before, state_of(model))
    assert surroundings() == around


# Which sites there are


def test_sites_come_in_order_of_first_call_and_those_never_called_last():
    model = nn.Module()
    model.idle, model.second, model.first = conv3(3), conv3(3), conv3(3)
    model.forward = lambda x: model.second(model.first(model.second(model.first(x))))
    assert list(sites_of(model.double())) == ["first", "second", "idle"]


def test_every_convolution_of_a_residual_network_is_a_site():
    model = seeded(TinyResNet)
    convs = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs_of(model).keys() == convs


def test_a_network_without_convolutions_has_no_sites():
    assert find_sites(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2)) == ()


def test_the_size_is_that_of_the_input_height_first():
    model = nn.Sequential(nn.AvgPool2d(2), conv3(3)).double()
    assert sites_of(model, photos(1)[:, :, :10])["1"].sizes == (Size(height=5, width=6),)


def test_a_convolution_called_twice_has_the_sizes_of_both_calls():
    sizes = sites_of(seeded(CalledTwice))["conv"].sizes
    assert sizes == (Size(height=12, width=12), Size(height=6, width=6))


def test_a_convolution_under_two_parents_is_one_site_with_another_name():
    (site,) = sites_of(seeded(TwoParents)).values()
    assert (site.name, site.aliases) == ("left.0", ("right.1",))


def test_a_convolution_under_two_parents_has_the_sizes_of_both_calls():
    (site,) = sites_of(seeded(TwoParents)).values()
    assert site.sizes == (Size(height=12, width=12), Size(height=6, width=6))


def test_a_converted_site_is_listed_without_its_inner_convolutions():
    model = seeded(TinyResNet)
    before = sites_of(model)
    convert_all_(model)
    assert sites_of(model).keys() == before.keys()


def test_a_converted_site_says_that_it_is_converted():
    model = seeded(TinyResNet)
    convert_all_(model)
    assert obstacle_of(model, "layer1.conv1") == "converted already"


def test_a_converted_site_keeps_its_description():
    model = seeded(TinyResNet)
    before = convs_of(model)
    convert_all_(model)
    after = convs_of(model)
    assert all(after[name].spec == site.spec for name, site in before.items())


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_a_convolution_rebuilt_from_its_description_computes_the_same(options):
    conv = nn.Conv2d(6, 6, **options).double()
    fields = conv_spec(conv).model_dump()
    rebuilt = nn.Conv2d(**fields).double()
    rebuilt.load_state_dict(conv.state_dict())
    x = photos(2, channels=6)
    assert torch.equal(rebuilt(x), conv(x))


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_the_stated_output_size_is_the_real_one(options):
    conv, x = nn.Conv2d(6, 6, **options).double(), photos(1, channels=6)[:, :, :11]
    (site,) = sites_of(nn.Sequential(conv), x).values()
    height, width = conv(x).shape[2:]
    assert site.spec.out_size(site.sizes[0]) == Size(height=height, width=width)


def test_sizes_that_a_host_computed_with_numpy_are_taken():
    conv = nn.Conv2d(np.int64(3), np.int64(3), np.int64(3), padding=np.int64(1)).double()
    assert sites_of(nn.Sequential(conv))["0"].spec.in_channels == 3


# Finding changes nothing


@pytest.mark.parametrize("host", HOSTS)
def test_finding_sites_leaves_the_network_as_it_was(host):
    model = seeded(host)
    with left_as_it_was(model):
        find_sites(model, photos(1))


def mixed_modes(model):
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0


def frozen_parts(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 2 == 0


def channels_last(model):
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("arrange", [mixed_modes, frozen_parts, channels_last, nn.Module.train])
def test_finding_sites_keeps_flags_and_memory_format(arrange):
    model = seeded(TinyResNet)
    arrange(model)
    with left_as_it_was(model):
        find_sites(model, photos(1))


def test_finding_sites_leaves_a_network_that_draws_random_numbers_as_it_was():
    model = seeded(Chain, lambda _x, y: F.dropout(y))
    with left_as_it_was(model):
        find_sites(model, photos(1))


def test_failing_to_run_leaves_the_network_as_it_was():
    model = seeded(TinyResNet).train()
    with left_as_it_was(model), pytest.raises(SourceError):
        find_sites(model, photos(1, channels=4))


def test_finding_sites_leaves_the_example_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), conv3(3)).double()
    x = photos(1)
    before = x.clone()
    find_sites(model, x)
    assert torch.equal(x, before)


def test_finding_sites_keeps_hooks_of_the_host_and_lets_them_run():
    model, seen = seeded(TinyResNet), []
    model.layer1.register_forward_hook(lambda *_: seen.append("layer1"))
    with left_as_it_was(model):
        find_sites(model, photos(1))
    assert seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finding_sites_works_in_other_floats(dtype):
    assert norms_of(seeded(TinyResNet).to(dtype), photos(1).to(dtype)) == norms_of(seeded(TinyResNet))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("sizes do not match\nmore about it"),
        AssertionError("Input size (32*32) doesn't match model (224*224)."),
        ValueError("too small"),
        TypeError("forward() missing 1 required positional argument: 'mask'"),
        IndexError("out of range"),
        KeyError("image"),
        AttributeError("no such thing"),
        ZeroDivisionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_network_that_can_not_run_on_the_example_is_one_line(error):
    with pytest.raises(SourceError, match="can't run on a 1x3x12x12 input") as caught:
        find_sites(Raises(error).double(), photos(1))
    assert "\n" not in str(caught.value)


OUTPUTS = {
    "list": lambda _x, y, z: [y, [z]],
    "dict": lambda _x, y, z: {"a": y, "b": (z, None)},
    "number": lambda _x, _y, z: float(z.sum()),
    "nothing": lambda *_: None,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_network_may_return_anything(kind):
    assert "conv" in sites_of(seeded(Chain, lambda _x, y: y, OUTPUTS[kind]))


def test_a_detection_network_can_be_searched():
    backbone = nn.Sequential(conv3(3, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), conv3(8))
    backbone.out_channels = 8
    anchors = torchvision.models.detection.rpn.AnchorGenerator(((16,),), ((1.0,),))
    model = torchvision.models.detection.FasterRCNN(
        backbone, num_classes=2, rpn_anchor_generator=anchors, min_size=64, max_size=64
    )
    assert {"backbone.0", "backbone.3"} < sites_of(model, torch.rand(1, 3, 64, 64)).keys()

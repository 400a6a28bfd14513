"""The BatchNorm that alone consumes the output of a convolution, if there is one."""

from __future__ import annotations

import pytest
import torch
import torchvision
from found_sites import norms_of
from hosts import CalledTwice, Chain, PreActivation, TinyResNet, conv3, seeded
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d


def test_each_convolution_of_a_residual_network_has_its_own_norm():
    assert norms_of(seeded(TinyResNet)) == {
        "stem": "bn",
        "layer1.conv1": "layer1.bn1",
        "layer1.conv2": "layer1.bn2",
        "down": "down_bn",
        "layer2.conv1": "layer2.bn1",
        "layer2.conv2": "layer2.bn2",
    }


def test_each_convolution_of_torchvision_resnet18_has_a_norm():
    model = torchvision.models.resnet18()
    norms = norms_of(model, torch.randn(1, 3, 64, 64))
    assert len(norms) == 20
    assert norms == {
        name: name.replace("downsample.0", "downsample.1").replace("conv", "bn") for name in norms
    }


def test_an_output_on_the_identity_path_has_no_norm():
    assert norms_of(seeded(PreActivation)) == {"stem": None, "conv1": "bn2", "conv2": None}


def test_a_norm_with_an_activation_in_it_is_one():
    assert norms_of(seeded(Chain, lambda _x, y: y, norm=BatchNormAct2d(3))) == {"conv": "norm"}


def test_one_norm_after_both_calls_is_the_norm():
    assert norms_of(seeded(CalledTwice)) == {"conv": "norms.0"}


def test_another_norm_after_each_call_is_none():
    assert norms_of(seeded(CalledTwice, norms=2)) == {"conv": None}


def test_a_norm_behind_an_identity_is_found():
    assert norms_of(seeded(Chain, lambda _x, y: nn.Identity()(y))) == {"conv": "norm"}


def test_a_norm_shared_by_two_convolutions_belongs_to_neither():
    model = nn.ModuleDict({"a": conv3(3), "b": conv3(3), "norm": nn.BatchNorm2d(3)}).double()
    model.forward = lambda x: model.norm(model.a(x)) + model.norm(model.b(x))
    assert norms_of(model) == {"a": None, "b": None}


def test_a_norm_that_also_sees_something_else_is_none():
    model = nn.ModuleDict({"conv": conv3(3), "norm": nn.BatchNorm2d(3)}).double()
    model.forward = lambda x: model.norm(model.conv(x)) + model.norm(x)
    assert norms_of(model) == {"conv": None}


def add_in_place(x, y):
    y += x
    return y


BETWEEN = {
    "activation": lambda _x, y: F.relu(y),
    "activation in place": lambda _x, y: F.relu_(y),
    "leaky activation in place": lambda _x, y: F.leaky_relu_(y),
    "addition": lambda x, y: x + y,
    "addition in place": add_in_place,
    "scaling in place": lambda _x, y: y.mul_(3),
    "pooling": lambda _x, y: F.max_pool2d(y, 2),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_a_norm_behind_something_else_is_none(kind):
    assert norms_of(seeded(Chain, BETWEEN[kind])) == {"conv": None}


AFTER = {
    "identity path": lambda _x, y, z: y + z,
    "second output": lambda _x, y, z: (z, y),
    "output in a dict": lambda _x, y, z: {"features": [y], "scores": z},
    "only its sign": lambda _x, y, z: z * (y > 0),
    "only its direction": lambda _x, y, z: [z, F.normalize(y)],
    "only its largest channel": lambda _x, y, z: (z, y.argmax(1)),
}


@pytest.mark.parametrize("kind", AFTER)
def test_an_output_that_is_also_used_elsewhere_has_no_norm(kind):
    assert norms_of(seeded(Chain, lambda _x, y: y, AFTER[kind])) == {"conv": None}


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d(3), nn.GroupNorm(3, 3), nn.InstanceNorm2d(3)], ids=str)
def test_a_layer_that_can_not_absorb_scale_and_mean_on_its_own_is_no_norm(norm):
    assert norms_of(seeded(Chain, lambda _x, y: y, norm=norm)) == {"conv": None}


def test_a_network_that_draws_random_numbers_still_shows_its_norms():
    noisy = seeded(Chain, lambda _x, y: y, lambda _x, _y, z: F.dropout(z, 0.5))
    assert norms_of(noisy) == {"conv": "norm"}


def test_a_network_that_changes_its_input_still_shows_its_norms():
    model = seeded(Chain, lambda _x, y: y)
    inner = model.forward
    model.forward = lambda x: inner(x.mul_(2))
    assert norms_of(model) == {"conv": "norm"}


def test_outputs_of_varying_length_give_no_norm_and_no_error():
    lengths = iter(range(1, 9))
    model = seeded(Chain, lambda _x, y: y, lambda _x, _y, z: [z] * next(lengths))
    assert norms_of(model) == {"conv": None}


def test_outputs_with_varying_keys_give_no_norm_and_no_error():
    names = iter("abcdefgh")
    model = seeded(Chain, lambda _x, y: y, lambda _x, _y, z: {next(names): z})
    assert norms_of(model) == {"conv": None}


def test_outputs_that_are_not_numbers_give_no_norm_and_no_error():
    assert norms_of(seeded(Chain, lambda _x, y: y, lambda _x, _y, z: z / 0 * 0)) == {"conv": None}

"""Convolutions that can't be replaced, and why."""

from __future__ import annotations

import pytest
import torch
import torchvision
from found_sites import obstacle_of, sites_of
from hosts import CutLate, CutUp, ReadsWeight, Tied, TiedAutoencoder, conv3, seeded
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import prune

from lcc.counts import count_macs
from lcc.surgery import find_sites


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


ODD = {
    "OwnConv": OwnConv,
    "Conv2dSame": Conv2dSame,
    "StdConv2d": StdConv2d,
    "ScaledStdConv2d": ScaledStdConv2d,
    "ParametrizedConv2d": lambda *a, **k: nn.utils.parametrizations.weight_norm(nn.Conv2d(*a, **k)),
}


@pytest.mark.parametrize("name", ODD)
def test_a_subclass_that_may_compute_something_else_is_refused_by_name(name):
    model = nn.Sequential(ODD[name](3, 3, 3, padding=1)).double()
    assert name in obstacle_of(model, "0")


HOOKS = {
    "forward": lambda conv: conv.register_forward_hook(lambda *_: None),
    "forward before": lambda conv: conv.register_forward_pre_hook(lambda *_: None),
    "backward": lambda conv: conv.register_full_backward_hook(lambda *_: None),
    "backward before": lambda conv: conv.register_full_backward_pre_hook(lambda *_: None),
    "old spectral norm": nn.utils.spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 2),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_convolution_with_hooks_is_refused(kind):
    conv = conv3(3)
    HOOKS[kind](conv)
    assert "hooks" in obstacle_of(nn.Sequential(conv).double(), "0")


def test_a_convolution_whose_forward_was_replaced_is_refused():
    conv = conv3(3).double()
    conv.forward = lambda x: x * 2
    assert "hooks" in obstacle_of(nn.Sequential(conv), "0")


def test_a_convolution_never_called_is_refused():
    model = nn.ModuleDict({"conv": conv3(3)})
    model.forward = lambda x: x
    assert "never called" in obstacle_of(model)


def test_a_convolution_whose_weight_the_host_reads_is_refused():
    assert "never called" in obstacle_of(seeded(ReadsWeight), "read")


def test_the_other_convolution_of_a_host_that_reads_weights_is_not_refused():
    assert obstacle_of(seeded(ReadsWeight), "called") is None


def test_a_conv_whose_weight_its_host_reads_is_refused():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Conv2d(4, 4, 3, padding=1)
            self.called = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.called(self.read(x.to(self.read.weight.dtype)))

    host = Host()
    read, called = find_sites(host, torch.zeros(1, 4, 8, 8))
    assert "reads its weight" in read.obstacle
    assert called.obstacle is None
    assert type(host.read) is type(host.called) is nn.Conv2d
    assert not {"read_by_host", "runs"} & (vars(host.read).keys() | vars(host.called).keys())


def test_auxiliary_heads_that_eval_mode_skips_are_refused():
    model = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    sites = sites_of(model, torch.zeros(1, 3, 64, 64))
    assert {name for name, site in sites.items() if site.obstacle} == {"aux1.conv.conv", "aux2.conv.conv"}


def test_two_convolutions_with_one_weight_are_refused_each_naming_the_other():
    sites = sites_of(seeded(Tied))
    assert [sites[name].obstacle.split()[-1] for name in "ab"] == ["b", "a"]


def test_a_convolution_beside_two_tied_ones_is_not_refused():
    assert obstacle_of(seeded(Tied), "c") is None


def test_a_convolution_whose_weight_a_transposed_one_uses_is_refused():
    assert obstacle_of(seeded(TiedAutoencoder), "encode").endswith("decode")


def test_two_convolutions_with_one_bias_are_refused():
    first, second = conv3(3, bias=True), conv3(3, bias=True)
    second.bias = first.bias
    model = nn.Sequential(first, second).double()
    assert [site.obstacle.split()[-1] for site in sites_of(model).values()] == ["1", "0"]


def test_a_convolution_called_by_keyword_is_refused():
    model = nn.ModuleDict({"conv": conv3(3)}).double()
    model.forward = lambda x: model.conv(input=x)
    assert "keyword" in obstacle_of(model)


@pytest.mark.parametrize(
    ("host", "free"), [(CutUp, set()), (CutLate, {"stem", "layer1.conv1", "layer1.conv2"})]
)
def test_what_is_given_parts_of_images_is_refused_and_counted_for_each_part(host, free):
    model, example = seeded(host), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    sites = find_sites(model, example)
    convs = [site for site in sites if site.kind == "conv"]
    assert {site.name for site in convs if site.obstacle is None} == free
    assert all("one map for each image" in site.obstacle for site in convs if site.name not in free)
    assert all("one map for each image" in obstacle_of(model, name) for name in ("layer2",))
    macs = count_macs(model, example).by_module
    assert {site.name: site.cost().macs for site in convs} == {site.name: macs[site.name] for site in convs}

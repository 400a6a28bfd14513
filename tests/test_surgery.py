"""Replacing convolutions in hosts that make it hard; plans that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hosts import (
    GEOMETRIES,
    CalledTwice,
    PreActivation,
    ReadsAttributes,
    TinyResNet,
    TwoParents,
    assert_same,
    conv3,
    convert_all_,
    converts,
    count_params,
    photos,
    seeded,
    state_of,
)
from timm.layers import StdConv2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc.convolutions import conv_spec
from lcc.errors import RecipeError
from lcc.methods import LowCostOp
from lcc.methods.linear_mix import LinearMix
from lcc.plan import make_plan, rules_for
from lcc.surgery import check_reached, find_sites, replace_


def test_replacing_returns_the_originals_by_name():
    model = seeded(TinyResNet)
    wanted = {name: model.get_submodule(name) for name in ("layer1.conv1", "layer2.conv2")}
    assert replace_(model, converts(*wanted)) == wanted


def test_replacing_leaves_the_originals_alone():
    model = seeded(TinyResNet)
    before = model.layer1.conv1.weight.clone()
    originals = replace_(model, converts("layer1.conv1"))
    assert torch.equal(originals["layer1.conv1"].weight, before)


def test_only_the_sites_of_the_plan_are_replaced():
    model = seeded(TinyResNet)
    before = dict(model.named_modules())
    replace_(model, converts("layer1.conv1"))
    changed = [name for name, m in before.items() if model.get_submodule(name) is not m]
    assert changed == ["layer1.conv1"]


def test_the_operator_is_where_the_convolution_was():
    model = seeded(TinyResNet)
    replace_(model, converts("layer1.conv1"))
    assert isinstance(model.layer1.conv1, LowCostOp)


def test_modules_keep_their_order():
    model = seeded(TinyResNet)
    before = [name for name, _ in model.named_modules()]
    replace_(model, converts("layer1.conv1"))
    after = [name for name, _ in model.named_modules() if not name.startswith("layer1.conv1.")]
    assert after == before


def test_a_convolution_under_two_parents_becomes_one_operator():
    model = seeded(TwoParents)
    replace_(model, converts("left.0"))
    assert isinstance(model.left[0], LowCostOp)
    assert model.left[0] is model.right[1]


def test_a_convolution_under_two_names_of_one_parent_becomes_one_operator():
    model = nn.Module()
    model.a = model.b = conv3(3)
    replace_(model, converts("a"))
    assert isinstance(model.a, LowCostOp)
    assert model.a is model.b


def test_a_shared_convolution_can_be_replaced_by_its_other_name():
    model = seeded(TwoParents)
    replace_(model, converts("right.1"))
    assert isinstance(model.left[0], LowCostOp)


def test_parameters_of_a_shared_operator_count_once():
    model = seeded(TwoParents)
    convert_all_(model)
    assert count_params(model) == 3 * 9 + 9 + 3


@torch.no_grad()
@pytest.mark.parametrize("host", [TinyResNet, PreActivation, TwoParents, CalledTwice])
def test_the_host_computes_what_it_would_with_the_equivalent_kernels(host):
    model = seeded(host)
    reference, x = copy.deepcopy(model), photos(2)
    for name in convert_all_(model):
        operator, conv = model.get_submodule(name), reference.get_submodule(name)
        conv.weight.copy_(operator.dense_kernel())
        if conv.bias is not None:
            conv.bias.copy_(operator.bias)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-10)


ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
CONVERTIBLE = [
    options for options in GEOMETRIES if LinearMix().why_not(conv_spec(nn.Conv2d(6, 6, **options))) is None
]


def test_most_geometries_can_be_converted():
    assert len(CONVERTIBLE) == 6


@pytest.mark.parametrize("options", CONVERTIBLE, ids=str)
def test_the_operator_carries_the_attributes_of_the_convolution(options):
    model = nn.ModuleDict({"conv": nn.Conv2d(6, 6, **options)})
    conv = model.conv
    replace_(model, converts("conv"))
    assert all(getattr(model.conv, name) == getattr(conv, name) for name in (*ATTRIBUTES, "padding_mode"))
    assert (model.conv.bias is None) == (conv.bias is None)


@pytest.mark.parametrize("options", CONVERTIBLE, ids=str)
def test_the_operator_gives_the_shape_of_the_convolution(options):
    model, x = nn.Sequential(nn.Conv2d(6, 6, **options)).double(), photos(2, channels=6)[:, :, :11]
    wanted = model(x).shape
    replace_(model, converts("0"))
    assert model(x).shape == wanted


@pytest.mark.parametrize("options", [o for o in CONVERTIBLE if not isinstance(o["padding"], str)], ids=str)
def test_a_host_that_computes_with_the_attributes_runs(options):
    model, x = ReadsAttributes(nn.Conv2d(6, 6, **options)).double(), photos(2, channels=6)
    wanted = model(x).shape
    replace_(model, converts("conv"))
    assert model(x).shape == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_operator_takes_over_the_dtype(dtype):
    model = seeded(TinyResNet).to(dtype)
    replace_(model, converts("layer1.conv1"))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_operator_takes_over_the_device():
    model = TinyResNet().to("meta")
    replace_(model, converts("layer1.conv1"))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("stencil", ["square", "cross", "horizontal"])
def test_the_operator_takes_over_the_memory_format(stencil):
    model = seeded(TinyResNet).to(memory_format=torch.channels_last)
    replace_(model, converts("layer1.conv1", method=LinearMix(group_size=2, stencil=stencil)))
    x = photos(2, channels=4).contiguous(memory_format=torch.channels_last)
    assert model.layer1.conv1(x).is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in model.layer1.conv1.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_takes_over_the_mode_of_the_convolution_alone(training):
    model = seeded(TinyResNet).train(not training)
    model.layer1.conv1.train(training)
    replace_(model, converts("layer1.conv1", "layer1.conv2"))
    assert {m.training for m in model.layer1.conv1.modules()} == {training}
    assert {m.training for m in model.layer1.conv2.modules()} == {not training}


@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, True), (False, True), (True, False)])
def test_the_operator_takes_over_requires_grad(weight, bias):
    model = nn.ModuleDict({"conv": conv3(4, bias=True)})
    model.conv.weight.requires_grad, model.conv.bias.requires_grad = weight, bias
    replace_(model, converts("conv"))
    flags = {name: p.requires_grad for name, p in model.conv.named_parameters()}
    assert {flag for name, flag in flags.items() if "weight" in name} == {weight}
    assert {flag for name, flag in flags.items() if "bias" in name} == {bias}


def torchvision_frozen():
    return TinyResNet(norm=FrozenBatchNorm2d)


def frozen_by_hand():
    model = TinyResNet().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(requires_grad=False)
    return model


@pytest.mark.parametrize("host", [torchvision_frozen, frozen_by_hand])
def test_replacing_beside_frozen_norms_leaves_them_as_they_were(host):
    model = host().double()
    frozen = [(m, state_of(m)) for m in model.modules() if "BatchNorm" in type(m).__name__]
    convert_all_(model)
    assert len(frozen) == 6
    for norm, before in frozen:
        assert_same(before, state_of(norm))


# Plans that do not fit


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (converts("layer9.conv1"), "'layer9.conv1', but this network has no module there"),
        (converts("layer1.bn1"), "'layer1.bn1', but this network has a BatchNorm2d there"),
        (converts("stem"), "channels change"),
        (converts("layer1.conv1", method=LinearMix(group_size=3)), "group_size 3"),
    ],
    ids=["unknown", "not a convolution", "wrong shape", "wrong group size"],
)
def test_a_plan_that_does_not_fit_is_an_error_that_says_why(plan, text):
    with pytest.raises(RecipeError, match=text):
        replace_(seeded(TinyResNet), plan)


def test_a_plan_can_not_be_followed_twice():
    model = seeded(TinyResNet)
    replace_(model, converts("layer1.conv1"))
    with pytest.raises(RecipeError, match="has a LinearMixOp there"):
        replace_(model, converts("layer1.conv1"))


def test_a_plan_that_fails_half_way_changes_nothing():
    model = seeded(TinyResNet)
    before = state_of(model)
    with pytest.raises(RecipeError):
        replace_(model, converts("layer1.conv1", "layer9.conv1"))
    assert_same(before, state_of(model))


def test_an_odd_subclass_can_not_be_replaced():
    with pytest.raises(RecipeError, match="has a StdConv2d there"):
        replace_(nn.Sequential(StdConv2d(3, 3, 3)), converts("0"))


# Published totals


@pytest.mark.parametrize(
    ("name", "sites", "params"),
    [("resnet18", 13, 3_327_400), ("resnet34", 29, 4_490_536), ("resnet50", 16, 15_531_240)],
)
def test_parameter_totals_are_the_known_ones(name, sites, params):
    model = getattr(torchvision.models, name)(weights=None)
    assert len(convert_all_(model, torch.randn(1, 3, 64, 64))) == sites
    assert count_params(model) == params


def test_the_stride_1_sites_of_resnet50_give_the_known_total():
    model = torchvision.models.resnet50(weights=None)
    sites = find_sites(model, torch.randn(1, 3, 64, 64))
    stride_1 = tuple(s for s in sites if s.kind == "conv" and s.spec.stride == (1, 1))
    plan = make_plan(stride_1, rules_for(LinearMix()))
    assert len(replace_(model, plan)) == 13
    assert count_params(model) == 18_275_688


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv3(4), conv3(4)
        self.both = [self.first, self.second]  # which no surgery sees

    def forward(self, x):
        for layer in self.both:
            x = layer(x)
        return x


class ByType(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = conv3(4)

    def forward(self, x):
        return self.layer(x) if isinstance(self.layer, nn.Conv2d) else x


@pytest.mark.parametrize(("host", "site"), [(InAList, "first"), (ByType, "layer")])
def test_a_host_that_goes_round_what_was_replaced_is_refused(host, site):
    model, example = seeded(host), torch.zeros(1, 4, 6, 6, dtype=torch.float64)
    sites = find_sites(model, example)
    replace_(model, make_plan(sites, rules_for(LinearMix())))
    with pytest.raises(RecipeError, match=f"{site} was replaced and is not called .*--exclude {site}"):
        check_reached(model, sites, example)


def test_a_host_that_calls_what_was_replaced_passes():
    model, example = seeded(TinyResNet), photos(1)
    sites = find_sites(model, example)
    replace_(model, make_plan(sites, rules_for(LinearMix())))
    check_reached(model, [site for site in sites if site.name.startswith("layer1.conv")], example)

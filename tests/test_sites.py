"""Finding convolutions in hosts that make it hard, and leaving the hosts alone."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
import torchvision
from hosts import (
    GEOMETRIES,
    Block,
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
    converts,
    photos,
    seeded,
    state_of,
)
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc.convolutions import conv_spec
from lcc.counts import count_macs
from lcc.errors import SourceError
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.specs import Cost, Size
from lcc.surgery import find_sites, replace_
from lcc.zoo import ZOO

HOSTS = (TinyResNet, PreActivation, TwoParents, CalledTwice, Tied, TiedAutoencoder, ReadsWeight)


def sites_of(model, x=None):
    """Return the sites of a network by name."""
    return {site.name: site for site in find_sites(model, photos(1) if x is None else x)}


def convs_of(model, x=None):
    return {name: site for name, site in sites_of(model, x).items() if site.kind == "conv"}


def norms_of(model, x=None):
    return {name: site.norm for name, site in convs_of(model, x).items()}


def obstacle_of(model, name="conv"):
    return sites_of(model)[name].obstacle


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


# Residual steps among them


def steps_of(model, x=None):
    return {name: site for name, site in sites_of(model, x).items() if site.kind == "step"}


def step_obstacle(model, name="block"):
    return steps_of(model.double().eval(), photos(1, channels=4))[name].obstacle


class Holds(nn.Module):
    """A block, and what its host does with it."""

    def __init__(self, run=lambda m, x: m.block(x), block=None):
        super().__init__()
        self.block = Block(4) if block is None else block
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def test_a_step_comes_before_what_is_inside_it():
    assert list(sites_of(seeded(TinyResNet))) == [
        "stem",
        "layer1",
        "layer1.conv1",
        "layer1.conv2",
        "down",
        "layer2",
        "layer2.conv1",
        "layer2.conv2",
    ]


def test_a_step_has_the_sizes_of_its_inputs_and_no_norm():
    step = steps_of(seeded(TinyResNet))["layer2"]
    assert (step.sizes, step.norm, step.obstacle) == ((Size(height=6, width=6),), None, None)


def test_a_step_costs_what_its_block_does():
    model = seeded(TinyResNet)
    counted = count_macs(model.layer1, torch.zeros(1, 4, 12, 12).double())
    params = sum(p.numel() for p in model.layer1.parameters())
    assert steps_of(model)["layer1"].cost() == Cost(params=params, macs=counted.macs)


def test_a_block_under_two_parents_is_one_step_with_the_sizes_of_both_calls():
    shared = Block(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)}).double().eval()
    model.forward = lambda x: model.b(F.avg_pool2d(model.a(x), 2))
    (step,) = steps_of(model, photos(1, channels=4)).values()
    assert (step.name, step.aliases, step.obstacle) == ("a.0", ("b.0",), None)
    assert step.sizes == (Size(height=12, width=12), Size(height=6, width=6))


def test_a_converted_step_is_listed_as_one_without_what_was_inside():
    model = seeded(TinyResNet)
    replace_(model, converts("layer1", method=RdExplicit()))
    sites = sites_of(model)
    assert [name for name in sites if name.startswith("layer1")] == ["layer1"]
    assert (sites["layer1"].kind, sites["layer1"].obstacle) == ("step", "converted already")


def test_a_step_with_a_converted_convolution_in_it_is_refused():
    model = seeded(TinyResNet)
    replace_(model, converts("layer1.conv1"))
    obstacles = {name: site.obstacle for name, site in steps_of(model).items()}
    assert obstacles == {"layer1": "holds an operator that is converted already", "layer2": None}


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv3(4)

    def forward(self, x):
        x += self.conv(x)
        return x


class Scaled(Block):
    def forward(self, x, scale=None):
        return super().forward(x if scale is None else x * scale)


STEP_OBSTACLES = {
    "never called": Holds(lambda m, x: x),
    "as a keyword": Holds(lambda m, x: m.block(x=x)),
    "something else than one": Holds(lambda m, x: m.block(x, 2.0), Scaled(4)),
    "called from outside": Holds(lambda m, x: m.block(x) + m.block.conv1(x)),
    "in place": Holds(lambda m, x: m.block(x.clone()), AddsInPlace()),
    "is read from outside": Holds(lambda m, x: m.block(x) * m.block.conv1.weight.mean()),
    "its skip is no identity": Holds(block=torchvision.models.resnet.BasicBlock(
        4, 4, downsample=nn.Sequential(conv3(4)))),
}  # fmt: skip


@pytest.mark.parametrize("words", STEP_OBSTACLES)
def test_a_step_that_can_not_be_replaced_says_why(words):
    assert words in step_obstacle(STEP_OBSTACLES[words])


def test_a_step_that_shares_a_parameter_with_a_layer_outside_is_refused():
    host = Holds(lambda m, x: m.other(m.block(x)))
    host.other = conv3(4)
    host.other.weight = host.block.conv2.weight
    assert step_obstacle(host) == "shares a parameter with other"


def test_a_step_that_shares_a_layer_with_another_is_refused():
    host = Holds(lambda m, x: m.second(m.block(x)))
    host.second = Block(4)
    host.second.conv1 = host.block.conv1
    assert step_obstacle(host) == "shares a parameter with second.conv1"


def test_two_parameters_tied_inside_a_step_do_not_keep_the_next_one():
    host = Holds(lambda m, x: m.second(m.block(x)))
    host.second = Block(4)
    host.block.conv2.weight = host.block.conv1.weight
    assert step_obstacle(host, "second") is None


def test_a_step_inside_a_step_is_listed_behind_it():
    outer = Holds(lambda m, x: x + m.block(x))
    model = nn.Sequential(outer).double().eval()
    assert list(steps_of(model, photos(1, channels=4))) == ["0", "0.block"]


# Stage-changing blocks among them


def changing(stride=2, channels=8):
    """Two blocks of torchvision, the second of which changes width and size by a projection."""
    projection = nn.Sequential(nn.Conv2d(4, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    block = torchvision.models.resnet.BasicBlock
    return nn.Sequential(conv3(3, 4), block(4, 4), block(4, channels, stride, projection)).double().eval()


def test_a_stage_changing_block_comes_before_what_is_inside_it():
    kinds = {name: site.kind for name, site in sites_of(changing()).items()}
    assert list(kinds)[3:] == ["1.conv2", "2", "2.conv1", "2.conv2", "2.downsample.0"]
    assert (kinds["1"], kinds["2"], kinds["2.conv1"]) == ("step", "transition", "conv")


def test_a_stage_changing_block_has_the_sizes_of_its_inputs_and_costs_what_it_does():
    model = changing()
    site = sites_of(model)["2"]
    counted = count_macs(model[2], torch.zeros(1, 4, 12, 12).double())
    params = sum(p.numel() for p in model[2].parameters())
    assert (site.sizes, site.obstacle) == ((Size(height=12, width=12),), None)
    assert site.cost() == Cost(params=params, macs=counted.macs)


def test_methods_of_other_kinds_say_that_they_do_not_take_a_stage_changing_block():
    site = sites_of(changing())["2"]
    assert site.why_not(LinearMix()) == "linear_mix takes convolutions, and this is a stage-changing block"
    words = "takes convolutions and residual steps, and this is a stage-changing block"
    assert site.why_not(RdExplicit()) == f"rd_explicit {words}"


def test_a_stage_changing_block_that_gives_another_size_than_its_strides_say_is_refused():
    model = changing()
    model[2].conv1 = nn.Conv2d(4, 8, 2, 2, bias=False).double()
    model[2].downsample[0] = nn.Conv2d(4, 8, 2, 2, bias=False).double()
    assert sites_of(model)["2"].obstacle is None
    odd = sites_of(model, photos(1, size=11))["2"].obstacle
    assert odd == "gives another shape than its strides say"


STAGES = {
    "torchvision resnet18": (torchvision.models.resnet18, [16, 8, 4]),
    "torchvision resnet50": (torchvision.models.resnet50, [16, 16, 8, 4]),
    "timm resnet50": (lambda: timm.create_model("resnet50"), [16, 16, 8, 4]),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, [32, 32, 16, 8, 4, 4, 2]),
    "torchvision mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, [32, 16, 8, 4, 4]),
    "timm mobilenetv3_large_100": (
        lambda: timm.create_model("mobilenetv3_large_100"),
        [32, 16, 8, 4, 4],
    ),
    "torchvision efficientnet_b0": (torchvision.models.efficientnet_b0, [32, 32, 16, 8, 4, 4, 2]),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), [32, 16, 8, 4, 4, 2]),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_stage_changing_blocks_of_a_network_cost_what_they_do(name):
    factory, sizes = STAGES[name]
    model, x = factory().eval(), torch.zeros(1, 3, 64, 64)
    found = [site for site in sites_of(model, x).values() if site.kind == "transition"]
    assert [site.sizes for site in found] == [(Size(height=size, width=size),) for size in sizes]
    assert {site.obstacle for site in found} == {None}
    macs = count_macs(model, x).by_module
    for site in found:
        inside = sum(count for name, count in macs.items() if name.startswith(f"{site.name}."))
        assert site.cost().macs == inside


# What can't be replaced, and why


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


# The skip paths of residual blocks


def projections(*stages):
    return [f"layer{stage}.0.downsample.0" for stage in stages]


SHORTCUTS = {
    "torchvision resnet18": (torchvision.models.resnet18, projections(2, 3, 4)),
    "torchvision resnet50": (torchvision.models.resnet50, projections(1, 2, 3, 4)),
    "timm resnet18": (lambda: timm.create_model("resnet18"), projections(2, 3, 4)),
    "timm resnet50": (lambda: timm.create_model("resnet50"), projections(1, 2, 3, 4)),
    "timm resnet26d": (
        lambda: timm.create_model("resnet26d"),
        [f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4)],
    ),
    "timm resnetv2_18": (
        lambda: timm.create_model("resnetv2_18"),
        [f"stages.{stage}.blocks.0.downsample.conv" for stage in (1, 2, 3)],
    ),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, []),
    "zoo cifar_resnet20": (ZOO["cifar_resnet20"], []),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_convolutions_on_a_skip_path_are_marked(name):
    factory, wanted = SHORTCUTS[name]
    sites = sites_of(factory().eval(), torch.randn(1, 3, 64, 64))
    assert [name for name, site in sites.items() if site.shortcut] == wanted


# The BatchNorm that alone consumes an output


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

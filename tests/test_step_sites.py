"""Finding residual steps, stage-changing blocks and their skip paths among the sites of a network."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from found_sites import sites_of
from hosts import Block, TinyResNet, conv3, converts, photos, seeded
from torch import nn
from torch.nn import functional as F

from lcc.counts import count_macs
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.specs import Cost, Size
from lcc.surgery import replace_
from lcc.zoo import ZOO

# Residual steps


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


# Stage-changing blocks


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

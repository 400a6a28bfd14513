"""Stage-changing blocks: which modules are some, what they are made of, what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from adding_blocks import SIZE, Adds, Attention, Lambda, two_convs
from hosts import assert_same, conv3, seeded, state_of
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F

from lcc.counts import count_macs
from lcc.residuals import blocks_among, residual_step
from lcc.specs import ConvSpec, Size, StepSpec


def down(stride=2, channels=6, *, conv=1, **options):
    return nn.Sequential(
        nn.Conv2d(4, channels, conv, stride, bias=False, **options), nn.BatchNorm2d(channels)
    )


def strided(channels=6, stride=2):
    first = nn.Sequential(conv3(4, channels, stride), nn.BatchNorm2d(channels), nn.ReLU())
    return nn.Sequential(*first, conv3(channels), nn.BatchNorm2d(channels))


def projected(s, branch=None):
    """relu(S(x) + F(x))."""
    return Adds(lambda m, x, y: F.relu(m.s(x) + y), branch=branch or strided(), s=s)


def spec_of(kernel, c_in, c_out, stride=1, **options):
    return ConvSpec(
        in_channels=c_in,
        out_channels=c_out,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        **options,
    )


CHANGING = StepSpec(
    channels=6,
    in_channels=4,
    stride=(2, 2),
    convs=(spec_of(3, 4, 6, 2), spec_of(3, 6, 6)),
    shortcut=(spec_of(1, 4, 6, 2),),
    norm_params=36,
    post="relu",
)


def test_a_block_with_a_projection_is_described():
    assert residual_step(projected(down()).eval()) == (CHANGING, None)


def test_a_bottleneck_with_a_projection_and_a_squeeze_is_described():
    spec = residual_step(timm.create_model("seresnet50").layer2[0]).spec
    assert (spec.channels_in, spec.channels, spec.stride) == (256, 512, (2, 2))
    assert spec.convs == (spec_of(1, 256, 128), spec_of(3, 128, 128, 2), spec_of(1, 128, 512))
    assert spec.squeeze == (spec_of(1, 512, 32, bias=True), spec_of(1, 32, 512, bias=True))
    assert spec.shortcut == (spec_of(1, 256, 512, 2),)
    assert spec.norm_params == 2 * (128 + 128 + 512 + 512)


PROJECTIONS = {
    "pooled first": nn.Sequential(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), down(1)),
    "without a norm": nn.Conv2d(4, 6, 1, 2),
    "of option A": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))),
    "of a larger kernel": down(conv=3, padding=1),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("size", [Size(height=8, width=6), SIZE], ids=str)
def test_a_projection_counts_what_it_costs(name, size):
    block = projected(PROJECTIONS[name]).eval()
    spec, obstacle = residual_step(block)
    counted = count_macs(block, torch.zeros(1, 4, size.height, size.width))
    params = sum(p.numel() for p in block.parameters())
    assert (obstacle, spec.in_channels, spec.channels, spec.stride) == (None, 4, 6, (2, 2))
    assert (spec.cost(size).macs, spec.params) == (counted.macs, params)


@pytest.mark.parametrize(("channels", "stride"), [(6, 1), (4, 2)], ids=["wider", "smaller"])
def test_either_another_width_or_a_stride_changes_the_stage(channels, stride):
    spec, obstacle = residual_step(projected(down(stride, channels), strided(channels, stride)).eval())
    assert (obstacle, spec.is_transition) == (None, True)
    assert (spec.channels_in, spec.channels, spec.stride) == (4, channels, (stride, stride))


def test_a_projection_that_changes_nothing_is_no_transition():
    spec, obstacle = residual_step(projected(down(1, 4), strided(4, 1)).eval())
    assert (obstacle, spec.is_transition) == ("its skip is no identity: Conv2d, BatchNorm2d", False)


class Beside2(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.s = conv3(4, 3, 2), conv3(4, 3, 2), down()

    def forward(self, x):
        return F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.s(x))


class FromInside(nn.Module):
    """Its skip starts behind a convolution that changes the stage."""

    def __init__(self):
        super().__init__()
        self.down, self.body = down(), two_convs(6)

    def forward(self, x):
        x = self.down(x)
        return F.relu(x + self.body(x))


UNDESCRIBED = {
    "pools inside": (
        projected(down(), nn.Sequential(conv3(4, 6), nn.AvgPool2d(2), conv3(6))),
        "its skip is no identity: Conv2d, BatchNorm2d; something else than its convolutions changes the size",
    ),
    "pools at the end": (
        projected(down(), nn.Sequential(conv3(4, 6), conv3(6), nn.AvgPool2d(2))),
        "gives another size than its strides say",
    ),
    "not in a row": (Beside2(), "its convolutions do not follow one another"),
    "other convolution": (
        projected(down(), nn.Sequential(StdConv2d(4, 6, 3, 2, padding=1), conv3(6))),
        "no identity: Conv2d, BatchNorm2d; holds a StdConv2d",
    ),
    "skip from inside": (FromInside(), "its skip starts inside it, behind other layers"),
    "attention": (projected(down(), nn.Sequential(Attention(), strided())), "attention in it (Attention)"),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_a_stage_changing_block_that_can_not_be_described_says_why_and_what_it_changes(name):
    block, words = UNDESCRIBED[name]
    spec, obstacle = residual_step(block.eval())
    assert words in obstacle
    assert (spec.channels_in, spec.channels, spec.stride) == (4, 6, (2, 2))


class Optional(nn.Module):
    """Adds its input where it can, as inverted residuals do."""

    def __init__(self, channels, stride, act=None):
        super().__init__()
        self.branch = strided(channels, stride)
        self.adds, self.act = (channels, stride) == (4, 1), act

    def forward(self, x):
        y = x + self.branch(x) if self.adds else self.branch(x)
        return y if self.act is None else self.act(y)


class Other(Optional):
    """The same by another name."""


def test_a_block_without_a_sum_is_one_where_its_class_is_a_step():
    step, bare, other = Optional(4, 1), Optional(6, 2), Other(6, 2)
    found = blocks_among([module.eval() for module in (step, bare, other)])
    wanted = CHANGING.model_copy(update={"shortcut": (), "norm_params": 24, "post": None})
    assert found == {step: residual_step(step), bare: (wanted, None)}


def test_a_block_without_a_sum_that_changes_no_stage_is_none():
    plain = Optional(4, 1)
    plain.adds = False
    assert plain not in blocks_among([Optional(4, 1).eval(), plain.eval()])


def test_the_activation_at_the_end_of_a_block_without_a_sum_is_told():
    bare = Optional(6, 2, nn.SiLU())
    spec, _ = blocks_among([Optional(4, 1).eval(), bare.eval()])[bare]
    assert (spec.activation, spec.post) == ("relu", "silu")


def test_an_inverted_residual_with_a_stride_is_described():
    network = torchvision.models.mobilenet_v3_small()
    block = network.features[4]
    spec, obstacle = blocks_among(network.modules())[block]
    assert obstacle is None
    assert (spec.channels_in, spec.channels, spec.stride, spec.post) == (24, 40, (2, 2), None)
    assert spec.convs == (
        spec_of(1, 24, 96),
        spec_of(5, 96, 96, 2, groups=96),
        spec_of(1, 96, 40),
    )
    assert spec.squeeze == (spec_of(1, 96, 24, bias=True), spec_of(1, 24, 96, bias=True))
    assert (spec.activation, spec.norm_eps, spec.norm_momentum) == ("hardswish", 1e-3, 0.01)
    assert str(spec) == "transition 24->40 /2: 1x1 96, 5x5 96 depthwise, 1x1 40, squeeze 24"
    assert spec.params == sum(p.numel() for p in block.parameters())


def test_looking_leaves_a_stage_changing_block_as_it_was():
    step, block = Optional(4, 1), seeded(Optional, 6, 2).train()
    before, random = state_of(block), torch.get_rng_state()
    assert block in blocks_among([step, block])
    assert_same(before, state_of(block))
    assert torch.equal(random, torch.get_rng_state())

"""Telling residual blocks from their code: which modules are some, what they are made of, what is refused."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import timm
import torch
import torchvision
from hosts import Block, assert_same, conv3, seeded, state_of
from timm.layers import BatchNormAct2d, DropPath, GELUTanh, StdConv2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation, StochasticDepth
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc.counts import count_macs
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.residuals import blocks_among, residual_step
from lcc.skips import shortcut_convs
from lcc.specs import Activation, ConvSpec, Size, StepSpec
from lcc.zoo import ZOO

SIZE = Size(height=9, width=7)
CONV = ConvSpec(in_channels=4, out_channels=4, kernel_size=(3, 3), padding=(1, 1))


class Adds(nn.Module):
    """A block whose sum is the test's: `add` gets the block, x and F(x)."""

    def __init__(self, add=lambda _, x, y: x + y, branch=None, **children):
        super().__init__()
        self.branch = two_convs() if branch is None else branch
        self.add = add
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.add(self, x, self.branch(x))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def two_convs(channels=4, norm=nn.BatchNorm2d):
    return nn.Sequential(conv3(channels), norm(channels), nn.ReLU(), conv3(channels), norm(channels))


def in_place(_, x, y):
    y += x
    return y


def blocks_of(model):
    """Return every residual or stage-changing block of a network by name, with its module."""
    names = {module: name for name, module in model.named_modules() if name}
    return {names[module]: (step, module) for module, step in blocks_among(names).items()}


def obstacle_of(block):
    return residual_step(block.double().eval()).obstacle


# Which sums are one


SUMS = {
    "x + y": lambda _, x, y: x + y,
    "y + x": lambda _, x, y: y + x,
    "y += x": in_place,
    "x.add(y)": lambda _, x, y: x.add(y),
    "y.add_(x)": lambda _, x, y: y.add_(x),
    "torch.add": lambda _, x, y: torch.add(x, y),
    "nn.Identity": lambda m, x, y: m.skip(x) + y,
    "empty nn.Sequential": lambda m, x, y: y + m.empty(x),
    "nested": lambda m, x, y: y + m.nested(x),
    "a lambda in a module": lambda m, x, y: y + m.named(x),
    "timm's stochastic depth": lambda m, x, y: x + m.drop(y),
    "torchvision's stochastic depth": lambda m, x, y: x + m.depth(y),
    "Identity behind the sum": lambda m, x, y: m.skip(x + y),
    "a scaled branch": lambda _, x, y: x + 0.2 * y,
}
CHILDREN = {
    "skip": nn.Identity(),
    "empty": nn.Sequential(),
    "nested": nn.Sequential(nn.Identity(), nn.Sequential()),
    "named": Lambda(lambda x: x),
    "drop": DropPath(0.2),
    "depth": StochasticDepth(0.2, "row"),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_block_that_adds_its_input_is_a_step(name):
    step = residual_step(Adds(SUMS[name], **CHILDREN).eval())
    assert step.obstacle is None
    assert step.spec.convs == (CONV, CONV)


def test_a_sum_of_three_with_the_input_among_them_is_a_step():
    block = Adds(lambda m, x, y: (y + x) + m.other(x), other=nn.Sequential(conv3(4)))
    step = residual_step(block.eval())
    assert step.obstacle is None
    assert len(step.spec.convs) == 3


def test_training_mode_makes_no_difference():
    block = Adds(SUMS["timm's stochastic depth"], **CHILDREN)
    assert residual_step(block.train()) == residual_step(block.eval())


FOLLOWED = {
    "relu": (nn.ReLU(inplace=True), F.relu, torch.relu_),
    "relu6": (nn.ReLU6(), F.relu6),
    "leaky_relu": (nn.LeakyReLU(), F.leaky_relu),
    "silu": (nn.SiLU(), lambda x: x * torch.sigmoid(x)),
    "hardswish": (nn.Hardswish(), lambda x: x * F.relu6(x + 3) / 6),
    "gelu": (nn.GELU(), F.gelu),
}


@pytest.mark.parametrize(("name", "number"), [(n, i) for n in FOLLOWED for i in range(len(FOLLOWED[n]))])
def test_the_activation_behind_the_sum_is_known_by_what_it_computes(name, number):
    act = FOLLOWED[name][number]
    block = Adds(lambda m, x, y: m.act(x + y), act=act if isinstance(act, nn.Module) else Lambda(act))
    step = residual_step(block.eval())
    assert (step.obstacle, step.spec.post, step.spec.activation) == (None, name, "relu")


@pytest.mark.parametrize("act", [F.relu, torch.relu, lambda y: y.relu_(), lambda y: F.relu(y, inplace=True)])
def test_a_function_behind_the_sum_is_an_activation_too(act):
    step = residual_step(Adds(lambda _, x, y: act(x + y)).eval())
    assert (step.obstacle, step.spec.post) == (None, "relu")


def test_every_activation_there_is_a_name_for_is_known():
    assert set(FOLLOWED) == set(get_args(Activation))


OTHERWISE = {
    "sigmoid": nn.Sigmoid(),
    "another slope": nn.LeakyReLU(0.2),
    "approximate gelu": GELUTanh(),
    "slopes of its own": nn.PReLU(),
    "a norm": nn.BatchNorm2d(4),
    "pooling": nn.MaxPool2d(2),
    "a convolution": conv3(4),
    "two activations": nn.Sequential(nn.ReLU(), nn.SiLU()),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_behind_the_sum_is_refused(name):
    block = Adds(lambda m, x, y: m.after(x + y), after=OTHERWISE[name])
    assert f"followed by {type(OTHERWISE[name]).__name__}" in obstacle_of(block)


# What is no residual block at all


NONE = {
    "two branches": Adds(lambda m, x, y: m.other(x) + y, other=nn.Sequential(conv3(4), conv3(4))),
    "a product": Adds(lambda _, x, y: x * y),
    "a concatenation": Adds(lambda _, x, y: torch.cat([x, y], 1)),
    "a constant": Adds(lambda _, x, y: y + 1),
    "its double": Adds(lambda _, x, y: x + x, branch=conv3(4)),
    "a difference": Adds(lambda _, x, y: x - y),
    "weighted": Adds(lambda _, x, y: torch.add(x, y, alpha=2)),
    "in a row": nn.Sequential(Block(4), Block(4)),
    "squeeze-and-excitation": SqueezeExcitation(4, 2),
    "a layer": conv3(4),
}


@pytest.mark.parametrize("name", NONE)
def test_a_module_that_does_not_add_its_input_is_not_listed(name):
    assert residual_step(NONE[name].double().eval()) is None


def test_a_module_that_takes_two_inputs_is_not_listed():
    class Two(Block):
        def forward(self, x, skip):
            return super().forward(x) + skip

    assert residual_step(Two(4)) is None


def test_an_input_with_a_default_is_left_at_it():
    class Optional(Block):
        def forward(self, x, scale=None, flag=False):
            return super().forward(x if scale is None and not flag else x * scale)

    assert residual_step(Optional(4).eval()).obstacle is None


# What is refused, in words


class FakeSkip(nn.Module):
    """Its first operation changes what the skip will add."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), conv3(4)

    def forward(self, x):
        y = self.conv(self.relu(x))
        return x + y


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv3(4))

    def forward(self, x):
        x += self.conv(x)
        return x


class OwnScale(Block):
    def __init__(self):
        super().__init__(4)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.conv1(x)


def hooked():
    block = Block(4)
    block.conv1.register_forward_hook(lambda *_: None)
    return block


def replaced_forward():
    block = Block(4)
    block.forward = lambda x: x
    return block


def half_converted():
    block = Block(4)
    block.conv2 = LinearMix().build(CONV)
    return block


class Twice(Block):
    def forward(self, x):
        return x + self.conv1(self.conv1(x))


class TwoSums(Block):
    def forward(self, x):
        x = x + self.conv1(x)
        return x + self.conv2(x)


class UsesBoth(Block):
    def forward(self, x):
        y = x + self.conv1(x)
        return y * y.mean()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        return (torch.softmax(q.transpose(1, 2) @ k, 2) @ v.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Mixer(Attention):
    """Attention by another name."""


class PixelMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mlp = conv3(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mlp(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


HOURGLASS = nn.Sequential(conv3(4, 4, 2), nn.ReLU(), nn.Upsample(scale_factor=2), conv3(4))
REFUSED = {
    "skip with weights": (Adds(lambda m, x, y: m.s(x) + y, s=nn.Conv2d(4, 4, 1)), "no identity: Conv2d"),
    "skip with a norm": (Adds(lambda m, x, y: m.s(x) + y, s=nn.BatchNorm2d(4)), "no identity: BatchNorm2d"),
    "skip with dropout": (Adds(lambda m, x, y: m.s(x) + y, s=nn.Dropout()), "no identity: Dropout"),
    "skip with stochastic depth": (Adds(lambda m, x, y: m.s(x) + y, s=DropPath(0.1)), "identity: DropPath"),
    "skip that is sliced": (Adds(lambda _, x, y: x[:, :, ::1] + y), "no identity: getitem"),
    "skip from behind a layer": (
        Adds(lambda m, _, y: y + m.o(y), o=nn.Sequential(conv3(4), conv3(4)), branch=conv3(4)),
        "its skip starts inside it",
    ),
    "faked": (FakeSkip(), "changed in place before the sum"),
    "in place": (AddsInPlace(), "changes its input in place"),
    "always random": (Adds(lambda _, x, y: x + F.dropout(y)), "tracing it does not show"),
    "two sums": (TwoSums(4), "several residual sums"),
    "sum used twice": (UsesBoth(4), "followed by mul"),
    "two outputs": (Adds(lambda _, x, y: (x + y, y)), "followed by several outputs"),
    "hooks": (hooked(), "hooks"),
    "other forward": (replaced_forward(), "hooks"),
    "converted": (half_converted(), "converted already"),
    "called twice": (Twice(4), "conv1 more than once"),
    "unused": (Adds(unused=conv3(4)), "do not use"),
    "parameter": (OwnScale(), "a parameter (gamma)"),
    "other layer": (Adds(branch=nn.Sequential(conv3(4), nn.PReLU())), "PReLU"),
    "other convolution": (Adds(branch=StdConv2d(4, 4, 3, padding=1)), "StdConv2d"),
    "transposed": (Adds(branch=nn.ConvTranspose2d(4, 4, 3, padding=1)), "ConvTranspose2d"),
    "attention": (Adds(branch=Attention()), "attention in it (Attention)"),
    "attention by another name": (Adds(branch=Mixer()), "multiplies feature maps"),
    "layer norm": (Adds(branch=nn.Sequential(nn.LayerNorm([4, 9, 7]), conv3(4))), "layer norm"),
    "linear mixing": (PixelMlp(), "linear mixing"),
    "several resolutions": (Adds(branch=HOURGLASS), "several resolutions"),
    "nothing to it": (Adds(branch=nn.Sequential(nn.ReLU(), nn.Sigmoid())), "no convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_residual_block_that_can_not_be_taken_says_why(name):
    block, words = REFUSED[name]
    assert words in obstacle_of(block)


def test_a_refused_block_still_says_how_wide_it_is():
    assert residual_step(hooked()).spec.channels == 4


# Which convolutions are on the skip


def one():
    return nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


SKIPS = {
    "a projection": (Adds(lambda m, x, y: m.s(x) + y, s=one()), ["s.1"]),
    "the other way round": (Adds(lambda m, x, y: F.relu(y + m.s(x)), s=one()), ["s.1"]),
    "an activation without a name": (Adds(lambda m, x, y: m.a(y + m.s(x)), s=one(), a=nn.PReLU()), ["s.1"]),
    "the rest of a network": (
        Adds(lambda m, x, y: m.fc((m.s(x) + y).mean((2, 3))), s=one(), fc=nn.Linear(4, 2)), ["s.1"]),
    "behind a layer of both": (
        Adds(lambda m, _, y: m.s(y) + m.t(y), s=one(), t=two_convs(), branch=nn.ReLU()), ["s.1"]),
    "an identity": (Block(4), []),
    "no convolution": (Adds(lambda m, x, y: m.s(x) + y, s=nn.AvgPool2d(1)), []),
    "as many on both sides": (Adds(lambda m, x, y: m.s(x) + y, s=two_convs()), []),
    "no sum": (two_convs(), []),
    "two inputs": (Adds(lambda m, x, y: (m.s(x), y), s=one()), []),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPS)
def test_the_convolutions_on_the_skip_are_told(name):
    block, wanted = SKIPS[name]
    names = {module: name for name, module in block.named_modules()}
    assert [names[conv] for conv in shortcut_convs(block.eval())] == wanted


# What a step is made of


def test_a_basic_block_is_described():
    assert residual_step(Block(4)).spec == StepSpec(
        channels=4, convs=(CONV, CONV), norm_params=16, activation="relu", post="relu"
    )


def test_a_bottleneck_of_torchvision_is_described():
    block = torchvision.models.resnet.Bottleneck(32, 8, norm_layer=lambda c: nn.BatchNorm2d(c, 1e-3, 0.2))
    spec = residual_step(block).spec
    assert [(c.kernel_size, c.in_channels, c.out_channels) for c in spec.convs] == [
        ((1, 1), 32, 8),
        ((3, 3), 8, 8),
        ((1, 1), 8, 32),
    ]
    assert (spec.norm_params, spec.norm_eps, spec.norm_momentum) == (2 * (8 + 8 + 32), 1e-3, 0.2)
    assert (spec.post, spec.pre_norm, spec.in_a_row, spec.squeeze) == ("relu", False, True, ())


def test_an_inverted_residual_with_squeeze_and_excitation_is_described():
    block = torchvision.models.mobilenet_v3_small().features[5]  # 40 -> 240 -> 40, squeezed to 64
    spec = residual_step(block).spec
    assert (spec.channels, spec.kernel_size, spec.activation, spec.post) == (40, (5, 5), "hardswish", None)
    assert [(c.in_channels, c.out_channels, c.groups) for c in spec.convs] == [
        (40, 240, 1),
        (240, 240, 240),
        (240, 40, 1),
    ]
    assert [(c.in_channels, c.out_channels, c.bias) for c in spec.squeeze] == [
        (240, 64, True),
        (64, 240, True),
    ]


def test_a_squeeze_of_linear_layers_counts_as_1x1():
    class Squeezed(Block):
        def __init__(self):
            super().__init__(4)
            self.fc = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)
            )

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(x + y * torch.sigmoid(self.fc(y))[:, :, None, None])

    spec = residual_step(Squeezed()).spec
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in spec.squeeze] == [
        (4, 2, (1, 1)),
        (2, 4, (1, 1)),
    ]


def test_pre_activation_is_told():
    branch = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv3(4), nn.BatchNorm2d(4), nn.ReLU(), conv3(4))
    spec = residual_step(Adds(branch=branch)).spec
    assert (spec.pre_norm, spec.post, spec.activation) == (True, None, "relu")


def test_an_activation_inside_a_norm_of_timm_is_told():
    branch = nn.Sequential(conv3(4), BatchNormAct2d(4, act_layer=nn.SiLU))
    assert residual_step(Adds(branch=branch)).spec.activation == "silu"


def test_a_block_without_activation_says_so():
    assert residual_step(Adds(lambda _, x, y: F.relu(x + y), branch=conv3(4))).spec.activation is None


@pytest.mark.parametrize(
    "drop", [DropPath(0.25), StochasticDepth(0.25, "batch")], ids=["timm", "torchvision"]
)
def test_the_rate_of_stochastic_depth_is_told(drop):
    assert residual_step(Adds(lambda m, x, y: x + m.drop(y), drop=drop)).spec.drop_path == 0.25


class Beside(Block):
    def forward(self, x):
        return x + self.conv1(x) + self.conv2(x)


class Dense(Block):
    def forward(self, x):
        y = self.conv1(x)
        return x + (y + self.conv2(y))


@pytest.mark.parametrize(("host", "row"), [(Block, True), (Beside, False), (Dense, False)])
def test_whether_convolutions_follow_each_other_is_told(host, row):
    block = host(4)
    if host is not Block:
        del block.bn1, block.bn2
    step = residual_step(block)
    assert (step.obstacle, step.spec.in_a_row) == (None, row)


def test_a_first_convolution_of_half_the_channels_does_not_hide_the_width():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.whole = conv3(2), conv3(4)

        def forward(self, x):
            return x + self.whole(torch.cat([self.part(x[:, :2]), x[:, 2:]], 1))

    assert residual_step(Partial()).spec.channels == 4


def test_a_step_inside_a_step_leaves_the_outer_one_one():
    step = residual_step(Adds(branch=nn.Sequential(Block(4), conv3(4))))
    assert (step.obstacle, len(step.spec.convs), step.spec.in_a_row) == (None, 3, False)


def test_a_step_survives_json():
    spec = residual_step(torchvision.models.mobilenet_v3_small().features[5]).spec
    assert StepSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_step_says_what_it_is_in_few_words():
    block = torchvision.models.mobilenet_v3_small().features[5]
    assert str(residual_step(block).spec) == "step 40: 1x1 240, 5x5 240 depthwise, 1x1 40, squeeze 64"


# Stage-changing blocks


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


def test_the_stage_changing_blocks_of_networks_are_the_ones():
    def names(model):
        blocks = blocks_of(model.eval()).items()
        return [name for name, (step, _) in blocks if step.spec.is_transition and step.obstacle is None]

    firsts = [f"layer{stage}.0" for stage in (1, 2, 3, 4)]
    assert names(torchvision.models.resnet18()) == names(timm.create_model("resnet18")) == firsts[1:]
    assert names(torchvision.models.resnet50()) == names(timm.create_model("resnet50")) == firsts
    assert names(ZOO["cifar_resnet20"]()) == ["layer2.0", "layer3.0"]
    runs = [f"features.{number}" for number in (1, 2, 4, 7, 11, 14, 17)]
    assert names(torchvision.models.mobilenet_v2()) == runs
    assert names(timm.create_model("mobilenetv3_large_100")) == [f"blocks.{i}.0" for i in range(1, 6)]


def test_looking_leaves_a_stage_changing_block_as_it_was():
    step, block = Optional(4, 1), seeded(Optional, 6, 2).train()
    before, random = state_of(block), torch.get_rng_state()
    assert block in blocks_among([step, block])
    assert_same(before, state_of(block))
    assert torch.equal(random, torch.get_rng_state())


# Looking changes nothing


@pytest.mark.parametrize("training", [False, True])
def test_looking_leaves_a_block_as_it_was(training):
    block = seeded(Block, 4).train(training)
    before, random = state_of(block), torch.get_rng_state()
    residual_step(block)
    assert_same(before, state_of(block))
    assert torch.equal(random, torch.get_rng_state())


def test_looking_leaves_what_a_block_remembers():
    class Remembers(Block):
        last = None

        def forward(self, x):
            self.last = self.conv1(x) + torch.ones(4, 1, 1)
            return x + self.last

    block = Remembers(4)
    keys = set(vars(block))
    residual_step(block)
    assert (set(vars(block)), block.last) == (keys, None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_step_is_the_same_on_any_device_and_in_any_float(device, dtype):
    assert residual_step(Block(4).to(device, dtype)) == residual_step(Block(4))


# Whole networks: how many blocks have an identity skip, how many change the stage, how many there are in all


def tv(name):
    return lambda: torchvision.models.get_model(name, weights=None)


def of_timm(name):
    return lambda: timm.create_model(name)


NETWORKS = {
    # Two blocks a stage, the first of stages 2 to 4 with a projection.
    "torchvision resnet18": (tv("resnet18"), 5, 3, 8),
    "timm resnet18": (of_timm("resnet18"), 5, 3, 8),
    "timm resnetv2_18": (of_timm("resnetv2_18"), 5, 3, 8),
    # 3, 4, 6 and 3 blocks, the first of each with a projection; pooled first in resnet50d.
    "torchvision resnet50": (tv("resnet50"), 12, 4, 16),
    "timm resnet50": (of_timm("resnet50"), 12, 4, 16),
    "timm resnet50d": (of_timm("resnet50d"), 12, 4, 16),
    # 1, 3, 6, 6.
    "timm regnety_004": (of_timm("regnety_004"), 12, 4, 16),
    # Inverted residuals in runs of 1, 2, 3, 4, 3, 3, 1: all but the first of each.
    "torchvision mobilenet_v2": (tv("mobilenet_v2"), 10, 7, 17),
    # Of eleven and fifteen, those with stride 1 and as many channels as before.
    "torchvision mobilenet_v3_small": (tv("mobilenet_v3_small"), 6, 5, 11),
    "torchvision mobilenet_v3_large": (tv("mobilenet_v3_large"), 10, 5, 15),
    # The first block of the small one is of a class of its own.
    "timm mobilenetv3_small_100": (of_timm("mobilenetv3_small_100"), 6, 4, 10),
    "timm mobilenetv3_large_100": (of_timm("mobilenetv3_large_100"), 10, 5, 15),
    # 1, 2, 2, 3, 3, 4, 1; timm's first is of a class of its own.
    "torchvision efficientnet_b0": (tv("efficientnet_b0"), 9, 7, 16),
    "timm efficientnet_b0": (of_timm("efficientnet_b0"), 9, 6, 15),
    # Strided ones pad as their input's size demands.
    "timm tf_efficientnet_b0": (of_timm("tf_efficientnet_b0"), 9, 2, 15),
    # Three blocks a stage, the first of two stages with option A's subsampling.
    "zoo cifar_resnet20": (ZOO["cifar_resnet20"], 7, 2, 9),
    # 2 and 3 inverted residuals, the first of each with a projection, then 7 blocks of attention.
    "timm coatnet_0_224": (of_timm("coatnet_0_224"), 3, 2, 12),
    "timm vit_tiny_patch16_224": (of_timm("vit_tiny_patch16_224"), 0, 0, 12),
    "torchvision densenet121": (tv("densenet121"), 0, 0, 0),
    # Each of 32 layers has its depthwise convolution in a residual.
    "timm convmixer_768_32": (of_timm("convmixer_768_32"), 32, 0, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_of_a_network_are_as_many_as_its_paper_says_and_cost_what_they_do(name):
    factory, steps, transitions, listed = NETWORKS[name]
    blocks = blocks_of(factory().eval())
    taken = [(step.spec, block) for step, block in blocks.values() if step.obstacle is None]
    changing = sum(spec.is_transition for spec, _ in taken)
    assert (len(taken) - changing, changing, len(blocks)) == (steps, transitions, listed)
    size = Size(height=10, width=6) if "coatnet" in name else SIZE  # it can't pool an odd map
    for spec, block in taken:
        x = torch.zeros(1, spec.channels_in, size.height, size.width)
        counted, out = count_macs(block, x), spec.out_size(size)
        assert tuple(block(x).shape) == (1, spec.channels, out.height, out.width)
        assert spec.cost(size).macs == counted.macs
        assert spec.params == sum(p.numel() for p in block.parameters())
        assert not counted.uncounted


def test_the_identity_blocks_of_resnet18_are_the_ones():
    blocks = blocks_of(torchvision.models.resnet18())
    names = {name for name, (step, _) in blocks.items() if not step.spec.is_transition}
    assert names == {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "coatnet_0_224", "swin_tiny_patch4_window7_224"])
def test_attention_is_refused_in_words(name):
    refused = [s.obstacle for s, _ in blocks_of(timm.create_model(name)).values() if s.obstacle is not None]
    assert sum("attention in it" in words for words in refused) >= 7


class CifarBlock(nn.Module):
    """As the common CIFAR repositories write it: an empty Sequential as the skip, added in place."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = conv3(channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3(channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def test_a_cifar_block_is_described_as_any_basic_block():
    assert residual_step(CifarBlock(4)) == residual_step(Block(4))


def test_frozen_norms_store_nothing():
    spec = residual_step(Block(4, norm=FrozenBatchNorm2d)).spec
    assert (spec.norm_params, spec.params) == (0, 2 * 9 * 16)


@pytest.mark.parametrize(("norm", "kept"), [(nn.BatchNorm2d, True), (partial(nn.GroupNorm, 2), False)])
def test_a_block_says_whether_its_norms_are_batch_norms(norm, kept):
    step = residual_step(Adds(branch=two_convs(64, norm)).double().eval())
    assert step.spec.batch_norms == kept
    refusal = Mgic(group_size=8, coarsest=8).why_not(step.spec)
    assert (refusal is None) == kept
    assert kept or "no BatchNorms" in refusal

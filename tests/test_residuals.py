"""Telling residual blocks from their code: which modules are some, what is refused, what is on the skip."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from adding_blocks import CONV, Adds, Attention, Lambda, two_convs
from hosts import Block, assert_same, conv3, seeded, state_of
from timm.layers import DropPath, GELUTanh, StdConv2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation, StochasticDepth

from lcc.methods.linear_mix import LinearMix
from lcc.residuals import residual_step
from lcc.skips import shortcut_convs
from lcc.specs import Activation


def in_place(_, x, y):
    y += x
    return y


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

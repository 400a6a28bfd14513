"""What a residual block is said to be made of: its convolutions, norms, activations and squeeze."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from adding_blocks import CONV, Adds, two_convs
from hosts import Block, conv3
from timm.layers import BatchNormAct2d, DropPath
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc.methods.mgic import Mgic
from lcc.residuals import residual_step
from lcc.specs import StepSpec


def test_a_basic_block_is_described():
    assert residual_step(Block(4)).spec == StepSpec(
        channels=4, convs=(CONV, CONV), norm_params=16, activation="relu", post="relu"
    )


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


class ConvBatchNorm(nn.Module):
    """Is called as a norm is, and is none."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = conv3(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x))


class NamedBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = ConvBatchNorm(channels), ConvBatchNorm(channels)

    def forward(self, x):
        return F.relu(x + self.second(F.relu(self.first(x))))


def test_a_convolution_with_its_norm_is_no_norm_whatever_its_name():
    assert residual_step(NamedBlock(4)).spec == residual_step(Block(4)).spec


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


def test_only_batch_norms_are_said_to_be_batch_norms():
    block = CifarBlock(4)
    assert residual_step(block).spec.batch_norms
    block.bn1, block.bn2 = (nn.InstanceNorm2d(4, affine=True) for _ in range(2))
    assert not residual_step(block).spec.batch_norms

"""Which channels may come in any order: found where they are, and nowhere else."""

import types

import pytest
import torch
import torchvision
from hosts import Block, CalledTwice, Tied, TinyResNet, conv3, photos, seeded
from torch import nn
from torch.nn import functional as F

from lcc.inner_channels import InnerPair, inner_pairs
from lcc.surgery import find_sites


def pairs_of(model, size=32, channels=3):
    example = photos(1, size, channels)
    return inner_pairs(model, find_sites(model, example), example)


def test_the_pairs_of_basic_blocks_are_found_in_every_stage_the_first_block_included():
    pairs = pairs_of(torchvision.models.resnet18().double(), 64)
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert pairs == tuple(InnerPair(f"{b}.conv1", f"{b}.bn1", f"{b}.conv2") for b in blocks)


def test_a_bottleneck_has_two_pairs():
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]).double()
    assert pairs_of(model, 64)[:2] == (
        InnerPair("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"),
        InnerPair("layer1.0.conv2", "layer1.0.bn2", "layer1.0.conv3"),
    )


class Untraceable(nn.Module):
    """A network whose own code depends on its input, around a block whose code does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = conv3(3, 4), Block(4)

    def forward(self, x):
        return self.block(self.stem(x)) if x.sum() > 1e9 or len(x) else x


def test_the_pairs_inside_an_untraceable_network_are_found_block_by_block():
    assert pairs_of(Untraceable().double(), 8) == (InnerPair("block.conv1", "block.bn1", "block.conv2"),)


class Between(nn.Module):
    """conv, anything, conv."""

    def __init__(self, between, groups=(1, 1), read=None):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1, groups=groups[0])
        self.between = between
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=groups[1])
        self.read = read

    def forward(self, x):
        y = self.between(self.a(x))
        z = self.b(y)
        return z if self.read is None else self.read(y, z)


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.Identity(), nn.GELU(), nn.Sequential(nn.InstanceNorm2d(4), nn.Hardswish())]
)
def test_channels_are_free_between_convolutions_behind_what_works_on_each_alone(between):
    assert [pair[::2] for pair in pairs_of(Between(between).double(), 8, 4)] == [("a", "b")]


def hooked():
    relu = nn.ReLU()
    relu.register_forward_hook(lambda _m, _i, output: output * 1)
    return relu


@pytest.mark.parametrize(
    "model",
    [
        Between(nn.GroupNorm(2, 4)),
        Between(nn.PReLU(4)),
        Between(nn.Softmax(1)),
        Between(nn.ChannelShuffle(2)),
        Between(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))),
        Between(hooked()),
        Between(nn.ReLU(), groups=(2, 1)),
        Between(nn.ReLU(), groups=(1, 4)),
        Between(nn.ReLU(), read=lambda y, z: y + z),
        Between(nn.ReLU(), read=lambda y, z: (z, y)),
        CalledTwice(4),
        Tied(4),
    ],
)
def test_channels_that_something_else_depends_on_are_not_free(model):
    assert pairs_of(model.double(), 8, 4) == ()


def test_a_norm_of_two_convolutions_or_with_a_parameter_of_another_norm_is_left_alone():
    model = nn.Sequential(Block(4), Block(4)).double()
    model[1].bn1.weight = model[0].bn1.weight
    assert pairs_of(model, 8, 4) == ()


def test_finding_pairs_leaves_the_model_as_it_was():
    model = seeded(TinyResNet).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(pairs_of(model, 12)) == 2
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class ByHand(nn.Module):
    """Calls the layers of an nn.Sequential one by one, reads one in the middle, and can't be traced."""

    def __init__(self, norm):
        super().__init__()
        layers = [layer for _ in range(4) for layer in (conv3(4, bias=True), norm(4), nn.ReLU())]
        self.features, self.tap = nn.Sequential(*layers), 5

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError(x)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number == self.tap:
                middle = x
        return x + middle


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_what_a_host_reads_by_going_round_a_forward_is_not_free(norm):
    pairs = pairs_of(seeded(ByHand, norm), 8, 4)
    assert [pair[::2] for pair in pairs] == [("features.0", "features.3"), ("features.6", "features.9")]


class Remembers(nn.Module):
    """A block that keeps what is between its convolutions, for its host."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv3(4), conv3(4)

    def forward(self, x):
        self.middle = F.relu(self.a(x))
        return self.b(self.middle)


class Reads(nn.Module):
    """Reads what its block keeps, and can't be traced."""

    def __init__(self):
        super().__init__()
        self.block = Remembers()

    def forward(self, x):
        return self.block(x) + self.block.middle if len(x) else x


def test_what_a_host_reads_from_an_attribute_is_not_free():
    assert pairs_of(seeded(Remembers), 8, 4) == (InnerPair("a", None, "b"),)
    assert pairs_of(seeded(Reads), 8, 4) == ()


class InFloat32(Block):
    """Insists on a type."""

    def forward(self, x):
        return super().forward(x.float())


class Named(Block):
    """Returns what is no tensor."""

    def forward(self, x):
        return types.SimpleNamespace(out=super().forward(x))


@pytest.mark.parametrize("host", [InFloat32, Named])
def test_channels_of_a_network_that_can_not_be_tried_are_not_free(host):
    model, example = host(4).eval(), photos(1, 8, 4).float()
    sites = find_sites(Block(4).eval(), example)
    assert inner_pairs(Block(4).eval(), sites, example) == (InnerPair("conv1", "bn1", "conv2"),)
    assert inner_pairs(model, sites, example) == ()


class WithAuxiliary(nn.Module):
    """Returns what is between its convolutions as well, in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv3(4), conv3(4)

    def forward(self, x):
        middle = F.relu(self.a(x))
        return (self.b(middle), middle) if self.training else self.b(middle)


def test_what_is_read_in_training_alone_is_not_free():
    assert pairs_of(seeded(WithAuxiliary), 8, 4) == ()


def nested(hooked):
    stage = nn.Sequential(conv3(4), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(nn.Sequential(stage, conv3(4)), nn.ReLU())
    model.get_submodule(hooked).register_forward_hook(lambda _m, _i, _o: None)
    return model.double()


def test_what_a_hook_around_one_of_the_layers_sees_is_not_free():
    assert pairs_of(nested("0.0"), 8, 4) == ()
    assert pairs_of(nested("0"), 8, 4) == (InnerPair("0.0.0", "0.0.1", "0.1"),)


def test_a_buffer_of_another_size_keeps_a_convolution_as_it_is():
    model = seeded(lambda: nn.Sequential(Block(4), Block(4)))
    model[0].conv1.register_buffer("seen", torch.zeros(1))
    model[1].conv1.register_buffer("steps", torch.tensor(0))
    assert pairs_of(model, 8, 4) == (InnerPair("1.conv1", "1.bn1", "1.conv2"),)


def test_a_network_that_refuses_to_be_trained_is_left_alone():
    class InferenceOnly(TinyResNet):
        def train(self, mode=True):
            if mode:
                raise RuntimeError("for inference alone")
            return super().train(mode)

    assert pairs_of(seeded(TinyResNet), 8)
    assert pairs_of(seeded(InferenceOnly), 8) == ()

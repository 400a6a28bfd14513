import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from hosts import Block, CalledTwice, Tied, TinyResNet, conv3, photos, seeded
from torch import nn
from torch.nn import functional as F

from lcc.alignment import align_
from lcc.inner_channels import InnerPair, inner_pairs
from lcc.surgery import find_sites
from lcc.zoo import ZOO


def pairs_of(model, size=32, channels=3):
    return inner_pairs(model, find_sites(model, photos(1, size, channels)))


def stages(model):
    """Return groups of the convolutions that have a stage, a shape and a stride in common."""
    groups = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and "downsample" not in name and name.startswith("layer"):
            groups.setdefault((name.split(".")[0], m.weight.shape, m.stride), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def shuffle_(model, pair, order):
    """Put inner channels into another order, written out with numpy."""
    modules = dict(model.named_modules())
    first, norm, second = (modules[name] for name in pair)
    for tensor in (first.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = torch.from_numpy(tensor.detach().numpy()[order].copy())
    second.weight.data = torch.from_numpy(second.weight.detach().numpy()[:, order].copy())


def distance(model, names):
    """Return how far kernels of norm 1 are from their mean, relative to them."""
    modules = dict(model.named_modules())
    kernels = np.stack([modules[name].weight.detach().numpy() for name in names])
    kernels /= np.sqrt((kernels**2).sum(axis=(1, 2, 3, 4), keepdims=True))
    return math.sqrt(((kernels - kernels.mean(0)) ** 2).sum() / len(kernels))


class Alike(nn.Module):
    """Blocks with the same weights."""

    def __init__(self, channels=6, blocks=3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        for block in self.blocks:
            block.load_state_dict(self.blocks[0].state_dict())

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (ZOO["cifar_resnet20"], 32),
        (torchvision.models.resnet18, 64),
        (lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 2, 1, 1]), 64),
    ],
)
def test_a_network_computes_the_same_after_its_inner_channels_were_aligned(make, size):
    model = seeded(make)
    images = photos(2, size)
    pairs = pairs_of(model, size)
    with torch.no_grad():
        before = model(images)
        small = [group for group in stages(model) if model.get_parameter(f"{group[0]}.weight").numel() < 2e5]
        found = align_(model, small, pairs)
        after = model(images)
    assert len(found.orders) >= 3
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


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


def test_blocks_that_differ_only_in_the_order_of_their_inner_channels_become_equal():
    model = seeded(Alike)
    for block in model.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
    pairs = pairs_of(model, 8, 6)
    rng = np.random.default_rng(0)
    for pair in pairs[1:]:
        shuffle_(model, pair, rng.permutation(6))
    groups = [[f"blocks.{b}.conv{c}" for b in range(3)] for c in (1, 2)]
    found = align_(model, groups, pairs)
    assert found.distances[0] > 0.1
    assert found.distances[-1] < 1e-7
    for group in groups:
        assert distance(model, group) < 1e-7


@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_the_kernels_and_never_grow(seed):
    model = seeded(lambda: nn.Sequential(*(Block(8) for _ in range(4))), seed=seed)
    pairs = pairs_of(model, 8, 8)
    group = [f"{block}.conv{conv}" for block in range(4) for conv in (1, 2)]
    before = distance(model, group)
    found = align_(model, [group], pairs)
    assert found.distances[0] == pytest.approx(before, rel=1e-12)
    assert found.distances[-1] == pytest.approx(distance(model, group), rel=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(found.distances[:-1]))
    assert len(found.distances) > 2


def test_a_pair_of_which_each_convolution_is_in_its_own_group_takes_the_best_of_all_orders():
    model = seeded(lambda: nn.Sequential(*(Block(4) for _ in range(2))))
    groups = [["0.conv1", "1.conv1"], ["0.conv2", "1.conv2"]]
    (first, second), orders = pairs_of(model, 8, 4), list(itertools.permutations(range(4)))
    distances = []
    for order in orders:
        other = seeded(lambda: nn.Sequential(*(Block(4) for _ in range(2))))
        shuffle_(other, second, list(order))
        distances.append(math.hypot(*(distance(other, group) for group in groups)) / math.sqrt(2))
    found = align_(model, groups, [second])
    assert found.distances[-1] == pytest.approx(min(distances), rel=1e-9)
    assert first != second


def test_equal_kernels_stay_where_they_are():
    model = seeded(Alike)
    for block in model.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = align_(model, [[f"blocks.{b}.conv1" for b in range(3)]], pairs_of(model, 8, 6))
    assert found == ((found.distances[0],), {})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_kernel_of_zeros_is_no_obstacle():
    model = seeded(lambda: nn.Sequential(Block(4), Block(4)))
    with torch.no_grad():
        model[1].conv2.weight.zero_()
        wanted = model(photos(1, 8, 4))
        found = align_(model, [["0.conv1", "0.conv2", "1.conv1", "1.conv2"]], pairs_of(model, 8, 4))
        assert all(map(math.isfinite, found.distances))
        torch.testing.assert_close(model(photos(1, 8, 4)), wanted, rtol=0, atol=1e-10)


def test_a_first_convolution_outside_every_group_follows_the_second():
    channels = 5
    model = seeded(lambda: nn.Sequential(Block(channels), Block(channels)))
    pairs = pairs_of(model, 8, channels)
    with torch.no_grad():
        model[1].conv2.weight.copy_(model[0].conv2.weight)
        shuffle_(model, pairs[1], [3, 0, 4, 1, 2])
        images = photos(1, 8, channels)
        wanted = F.relu(model(images))
        found = align_(model, [["0.conv2", "1.conv2"]], pairs)
        assert found.distances[-1] < 1e-7
        torch.testing.assert_close(F.relu(model(images)), wanted, rtol=0, atol=1e-10)

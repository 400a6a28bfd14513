import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from hosts import Block, photos, seeded
from test_inner_channels import pairs_of
from torch import nn
from torch.nn import functional as F

from lcc.alignment import align_
from lcc.zoo import ZOO


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

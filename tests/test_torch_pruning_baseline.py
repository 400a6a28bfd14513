"""The rival of recipes/torch_pruning_baseline.py: what it leaves of a network must fit together."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hosts import photos, seeded

from lcc.counts import count_macs
from lcc.zoo import CifarResNet

RECIPES = Path(__file__).parents[1] / "recipes"
EXAMPLE = photos(1, size=32).float()


@pytest.fixture(scope="module")
def pruned():
    return runpy.run_path(str(RECIPES / "torch_pruning_baseline.py"))["pruned"]


@torch.no_grad()
def without(stage, channels):
    """A network in which some channels of what a stage's blocks add to are nothing, and of no weight."""
    model = seeded(CifarResNet, 3).float()
    blocks = model.get_submodule(f"layer{stage}")
    writers = [(block.conv2, block.bn2) for block in blocks]
    readers = [*blocks, model.get_submodule(f"layer{stage + 1}")[0]]
    for conv, norm in [(model.conv1, model.bn1), *writers] if stage == 1 else writers:
        for tensor in (conv.weight, norm.weight, norm.bias):
            tensor[channels] = 0
    for block in readers if stage == 1 else readers[1:]:
        block.conv1.weight[:, channels] = 0
    return model


@pytest.mark.parametrize(
    ("stage", "channels", "ratio", "widths"),
    [(1, [3, 7], 1.05, (14, 32, 64)), (2, [1, 6, 30], 1.025, (16, 29, 64))],
)
def test_without_channels_that_are_nothing_the_outputs_are_the_same(pruned, stage, channels, ratio, widths):
    model = without(stage, channels)
    smaller = pruned(model, EXAMPLE, ratio, isomorphic=False, steps=400)
    assert tuple(smaller.get_submodule(f"layer{n}")[-1].conv2.out_channels for n in (1, 2, 3)) == widths
    images = photos(3, size=32).float()
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-4)
    assert ratio <= count_macs(model, EXAMPLE).macs / count_macs(smaller, EXAMPLE).macs < ratio + 0.05


def test_every_width_of_a_stage_is_left_some_of_its_channels(pruned):
    model = seeded(CifarResNet, 3).float()
    smaller = pruned(model, EXAMPLE, 2.6)
    assert count_macs(model, EXAMPLE).macs / count_macs(smaller, EXAMPLE).macs >= 2.6
    for stage, width in enumerate((16, 32, 64), 1):
        kept = smaller.get_submodule(f"layer{stage}")[-1].conv2.out_channels
        assert width / 2 < kept < width
    assert smaller(photos(2, size=32).float()).shape == (2, 10)

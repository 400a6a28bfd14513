"""Residual and stage-changing blocks of whole networks: as many as the papers say, at the costs counted."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from adding_blocks import SIZE

from lcc.counts import count_macs
from lcc.residuals import blocks_among
from lcc.specs import Size
from lcc.zoo import ZOO


def blocks_of(model):
    """Return every residual or stage-changing block of a network by name, with its module."""
    names = {module: name for name, module in model.named_modules() if name}
    return {names[module]: (step, module) for module, step in blocks_among(names).items()}


def tv(name):
    return lambda: torchvision.models.get_model(name, weights=None)


def of_timm(name):
    return lambda: timm.create_model(name)


# How many blocks have an identity skip, how many change the stage, how many there are in all.
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "coatnet_0_224", "swin_tiny_patch4_window7_224"])
def test_attention_is_refused_in_words(name):
    refused = [s.obstacle for s, _ in blocks_of(timm.create_model(name)).values() if s.obstacle is not None]
    assert sum("attention in it" in words for words in refused) >= 7

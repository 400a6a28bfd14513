"""Small networks, what sources are refused with, and tensors compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcc import models
from lcc.errors import SourceError

TINY = "zoo:cifar_resnet20"


def few_layers(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes))


def refusal(source, **options) -> str:
    with pytest.raises(SourceError) as caught:
        models.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name

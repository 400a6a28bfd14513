"""A small network by the name of its source, what sources are refused with, and tensors compared."""

from __future__ import annotations

import pytest
import torch

from lcc import models
from lcc.errors import SourceError

TINY = "zoo:cifar_resnet20"


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

"""Convolutions of one shape, and the bank of tied operators that a method makes of them."""

from __future__ import annotations

import torch
from torch import nn

from lcc.specs import ConvSpec


def bank(method, convs):
    """Return the tied operators of a bank, and what the method makes of these convolutions' weights."""
    spec = spec_of(convs[0])
    operators = [method.build(spec).double() for _ in convs]
    method.tie_(operators)
    return operators, method.project_bank_(operators, convs)


def spec_of(conv):
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return ConvSpec(**{key: getattr(conv, key) for key in keys}, bias=conv.bias is not None)


def convolutions(count=3, seed=0, **options):
    torch.manual_seed(seed)
    options = {"kernel_size": 3, "padding": 1, **options}
    return [nn.Conv2d(4, 4, **options).double() for _ in range(count)]

"""Blocks with a sum that a test chooses, and what to build them from."""

from __future__ import annotations

import torch
from hosts import conv3
from torch import nn

from lcc.specs import ConvSpec, Size

SIZE = Size(height=9, width=7)
CONV = ConvSpec(in_channels=4, out_channels=4, kernel_size=(3, 3), padding=(1, 1))


class Adds(nn.Module):
    """A block whose sum is the test's: `add` gets the block, x and F(x)."""

    def __init__(self, add=lambda _, x, y: x + y, branch=None, **children):
        super().__init__()
        self.branch = two_convs() if branch is None else branch
        self.add = add
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.add(self, x, self.branch(x))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def two_convs(channels=4, norm=nn.BatchNorm2d):
    return nn.Sequential(conv3(channels), norm(channels), nn.ReLU(), conv3(channels), norm(channels))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        return (torch.softmax(q.transpose(1, 2) @ k, 2) @ v.transpose(1, 2)).transpose(1, 2).reshape(x.shape)

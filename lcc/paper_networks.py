"""The networks of the first paper: three sizes, each with several kinds of step. Trained from scratch.

Source: arXiv:1805.07821, section 4. Its text leaves some things open; they are settled here so:
- the layout is the only one whose parameter counts, BatchNorm's left out, are those of Table 2: every block,
  the last one too, ends with a connecting layer, the opening convolution has no bias, the classifier has one;
- BatchNorm is affine; convolutions pad with zeros, save those that an FFT computes, which are periodic;
- the length h of a step, only said to be small enough, is 1. Where K is circulant, its taps add up over c
  channels: were they the parameters, Adam's first step would move each of 9 c by the learning rate, and h
  max|k^|^2 by up to h (9 c lr)^2: at h = 1 and 0.1 the loss did not fall. The parameters being the taps
  times the root of c, it is 81 c lr^2 at h = 1: 2.07 at C's 256 channels and the paper's lr, 0.01, just past
  the explicit step's bound of 2, and less for fewer. The implicit step has no cap here;
- convolutions start as He draws weights (arXiv:1502.01852). In a residual step N comes before the second
  one, so what the step adds has unit variance whatever came in: variance grows by one a step, over four
  steps, until the connecting layer's N sets it to one again. No smaller start is needed. LinearMix and the
  reaction-diffusion steps start as their methods do, the classifier as torch's default does: near zero.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.specs import ConvSpec, StepSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from lcc.methods import Method

    Make = Callable[[int], nn.Module]  # of a channel count

STEPS_PER_BLOCK = 4
WIDTHS = {"a": (32, 64, 128), "b": (48, 96, 192), "c": (32, 64, 128, 256)}


class ResidualStep(nn.Module):
    """x + K2 relu(N(K1 x)), (N, C, H, W) -> (N, C, H, W). Source: equations (1) and (3)."""

    def __init__(self, channels: int, make: Make) -> None:
        super().__init__()
        self.conv1 = make(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = make(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next state."""
        y: Tensor = x + self.conv2(self.relu(self.norm(self.conv1(x))))
        return y


class MobileNetStep(nn.Module):
    """relu(N(M relu(N(K_dw x)))), without a skip, (N, C, H, W) -> (N, C, H, W). Source: equation (13)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the next state."""
        x = self.relu(self.norm1(self.conv1(x)))
        y: Tensor = self.relu(self.norm2(self.conv2(x)))
        return y


class Connect(nn.Module):
    """N([x; K_dw x]), (N, C, H, W) -> (N, 2 C, H, W). Source: section 4, "connecting" layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, groups=channels)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return twice the channels."""
        y: Tensor = self.norm(torch.cat([x, self.conv(x)], dim=1))
        return y


class PaperNetwork(nn.Module):
    """One block of four steps for each width: (N, 3, H, W) -> (N, num_classes).

    Pooling halves H and W after every block, and an odd row or column is left out; 2 ** blocks pixels
    are the least. `make_step` gives a step for a channel count; each width is twice the one before.
    """

    def __init__(self, widths: tuple[int, ...], make_step: Make, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = _conv(3, widths[0], 5)
        self.norm = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(*(_block(width, make_step) for width in widths))
        self.linear = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.blocks(self.relu(self.norm(self.conv(x))))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def _block(channels: int, make_step: Make) -> nn.Sequential:
    steps = ((f"step{number}", make_step(channels)) for number in range(1, STEPS_PER_BLOCK + 1))
    return nn.Sequential(OrderedDict([*steps, ("connect", Connect(channels)), ("pool", nn.AvgPool2d(2))]))


def _conv(in_channels: int, out_channels: int, kernel: int, *, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def _dense(channels: int) -> nn.Module:
    return _conv(channels, channels, 3)


def _linear_mix(channels: int) -> nn.Module:
    return LinearMix().build(_spec(channels))


def _diffusing(channels: int, method: Method) -> nn.Module:
    return method.build(StepSpec(channels=channels, convs=(_spec(channels),) * 2))


def _circulant(channels: int) -> nn.Module:
    return _diffusing(channels, RdCirculant(boundary="periodic"))


def _spec(channels: int) -> ConvSpec:
    return ConvSpec(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=(1, 1))


STEPS: dict[str, Make] = {
    "resnet": partial(ResidualStep, make=_dense),
    "mobilenet": MobileNetStep,
    "linear_mix": partial(ResidualStep, make=_linear_mix),
    "rd_explicit": partial(_diffusing, method=RdExplicit()),
    "rd_implicit": partial(_diffusing, method=RdImplicit(stiffness=math.inf)),
    "rd_circulant": _circulant,
}

PAPER_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"lowcost_{size}_{step}": partial(PaperNetwork, widths, make)
    for size, widths in WIDTHS.items()
    for step, make in STEPS.items()
}

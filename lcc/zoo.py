"""ZOO: networks of the papers that no library has, with parameter counts as published."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from lcc.mgic_networks import MGIC_NETWORKS
from lcc.paper_networks import PAPER_NETWORKS
from lcc.sharing_networks import SHARING_NETWORKS

if TYPE_CHECKING:
    from collections.abc import Callable


class Subsample(nn.Module):
    """The shortcut called option A: every second pixel, and zeros for the channels that are new.

    (N, C, H, W) -> (N, C + 2 * margin, ceil(H / 2), ceil(W / 2)); no parameters.
    Source: arXiv:1512.03385, section 4.2.
    """

    def __init__(self, margin: int) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller, wider x, its channels in the middle."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.margin, self.margin))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))), (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        grows = channels != in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=2 if grows else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = Subsample((channels - in_channels) // 2) if grows else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        total: Tensor = self.relu(out + self.shortcut(x))
        return total


class CifarResNet(nn.Module):
    """The ResNet of 6 * blocks + 2 layers for 32x32 images: (N, 3, H, W) -> (N, num_classes).

    Its tensors have the names and shapes of github.com/akamaster/pytorch_resnet_cifar10's checkpoints.
    Source: arXiv:1512.03385, section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{6 * blocks + 2}": partial(CifarResNet, blocks) for blocks in (3, 5, 7, 9, 18)},
    **PAPER_NETWORKS,
    **SHARING_NETWORKS,
    **MGIC_NETWORKS,
}

# What is not in it is for CIFAR: 10 classes, 32x32 pixels.
OF_IMAGENET = frozenset(MGIC_NETWORKS)

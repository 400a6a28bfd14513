"""The networks of the kernel-sharing paper, dense and shared: ConvMixer and SE-ResNets for CIFAR.

Layers that share hold one Parameter object, for the weight and, where there is one, for the bias; what reads
`parameters()` sees it once. BatchNorm, squeeze-and-excitation, shortcuts and the first convolution of a
stage, whose shape no other has, are private. Source: arXiv:2210.14151; layouts as in its released code, so
that parameters number the same to the last digit.

Starts: every kernel is drawn as He draws them (arXiv:1502.01852), fan in, biases are zero; a shared kernel is
drawn once. The released ConvMixer starts from torch's default instead, whose standard deviation is smaller by
the root of six. Linear layers start as torch's default does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

STAGES = (1, 2, 3)
SE_RESNET_WIDTHS = (64, 128, 256)
SE_RESNET_BLOCKS = (2, 3, 4, 6, 8, 10)
SQUEEZE = 16  # channels for each one that squeeze-and-excitation keeps


class SpatialMix(nn.Module):
    """x + bn(gelu(depthwise(x))), (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = _conv(channels, channels, kernel, groups=channels, bias=True)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its neighbourhoods in it."""
        y: Tensor = x + self.bn(self.act(self.depthwise(x)))
        return y


class ConvMixerBlock(nn.Module):
    """y = x + bn1(gelu(depthwise(x))), then bn2(gelu(pointwise(y))); (N, C, H, W) -> (N, C, H, W).

    Source: arXiv:2201.09792, section 2.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.mix = SpatialMix(channels, kernel)
        self.pointwise = _conv(channels, channels, 1, bias=True)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.bn(self.act(self.pointwise(self.mix(x))))
        return y


class ConvMixer(nn.Module):
    """ConvMixer-`channels`/`depth`: (N, 3, H, W) -> (N, num_classes).

    `shared`: one depthwise and one pointwise convolution, weight and bias, for all blocks.
    Source: arXiv:2201.09792; shared, arXiv:2210.14151.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        kernel: int = 9,
        patch: int = 1,
        num_classes: int = 10,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = _conv(3, channels, patch, stride=patch, padding=0, bias=True)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(channels)
        blocks = [ConvMixerBlock(channels, kernel) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        if shared:
            tie_(block.mix.depthwise for block in blocks)
            tie_(block.pointwise for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.blocks(self.bn(self.act(self.conv(x))))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


class SqueezeExcite(nn.Module):
    """x times sigmoid(excite(relu(squeeze(mean of x)))), (N, C, H, W) -> (N, C, H, W).

    Source: arXiv:1709.01507, section 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // SQUEEZE, bias=False)
        self.relu = nn.ReLU()
        self.excite = nn.Linear(channels // SQUEEZE, channels, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return x, its channels weighed."""
        weights = self.gate(self.excite(self.relu(self.squeeze(x.mean(dim=(2, 3))))))
        y: Tensor = x * weights[:, :, None, None]
        return y


class SeBasicBlock(nn.Module):
    """relu(shortcut(x) + se(bn2(conv2(relu(bn1(conv1(x))))))), (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, channels, 1, stride=stride), nn.BatchNorm2d(channels)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        total: Tensor = self.relu(out + self.shortcut(x))
        return total


class SeResNet(nn.Module):
    """The SE-ResNet d_`blocks` for 32x32 images: (N, 3, H, W) -> (N, num_classes).

    `shared_stages` (of 1, 2, 3): those whose 3x3 convolutions, the first one's aside, are one kernel.
    Source: arXiv:2210.14151.
    """

    def __init__(self, blocks: int, *, num_classes: int = 10, shared_stages: Collection[int] = ()) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = _conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        widths = (16, *SE_RESNET_WIDTHS)
        self.layer1, self.layer2, self.layer3 = (
            _stage(widths[stage - 1], widths[stage], blocks, shared=stage in shared_stages)
            for stage in STAGES
        )
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def tie_(convs: Iterable[nn.Conv2d]) -> None:
    """Let all convolutions hold the first one's weight and bias: the Parameter objects themselves."""
    first, *others = convs
    for conv in others:
        conv.weight, conv.bias = first.weight, first.bias


def _stage(in_channels: int, channels: int, blocks: int, *, shared: bool) -> nn.Sequential:
    first = SeBasicBlock(in_channels, channels, stride=1 if channels == SE_RESNET_WIDTHS[0] else 2)
    rest = [SeBasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)]
    if shared:
        tie_([first.conv2, *(conv for block in rest for conv in (block.conv1, block.conv2))])
    return nn.Sequential(first, *rest)


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=bias
    )
    nn.init.kaiming_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


SHARED_STAGES = {"": (), "_shared": STAGES, "_shared_23": (2, 3)}

SHARING_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convmixer_256_16": partial(ConvMixer, 256, 16),
    "convmixer_256_16_shared": partial(ConvMixer, 256, 16, shared=True),
    **{
        f"se_resnet_d{blocks}{suffix}": partial(SeResNet, blocks, shared_stages=stages)
        for blocks in SE_RESNET_BLOCKS
        for suffix, stages in SHARED_STAGES.items()
    },
}

"""The networks of multigrid in channels, as released: resnetMG and MobileNetV3-MG, trained from scratch.

Source: arXiv:2011.09128 and its released code: resnetMG's parameters number the same to the last digit,
MobileNetV3-MG's to the digits known of it. Every block of the host is one multigrid cycle, an MGIC block with
the quirks of that code; where the host changes width or size, an opening convolution comes before it.

Left open by that, settled by the counts: a MobileNetV3-MG's expansion is of the channels that come in, as in
MobileNetV3, and its squeeze-and-excitation has biases. Not settled by them: the stem has a BatchNorm and a
hard swish, as MobileNetV3's. The released stem is a 1x1 convolution without a stride; with "stride2" in the
name it is MobileNetV3's own, 3x3 with stride 2, which leaves a quarter of the MACs.

Starts: convolutions, R and P too, as He draws them (arXiv:1502.01852), fan out, biases zero, as both of the
released networks do. The classifier of MobileNetV3-MG is drawn with a standard deviation of 0.01, that of
resnetMG as torch draws it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from lcc.methods.mgic import Mgic
from lcc.specs import ConvSpec, StepSpec

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTHS = (64, 128, 256, 512)
EXPANSION = 4  # of a bottleneck's width
SQUEEZE = (
    4  # channels for each one that squeeze-and-excitation keeps; lcc.methods rounds as the released code
)
FEATURES = 1280


class Row(NamedTuple):
    """A block of MobileNetV3: `expansion` inner channels for one that comes in, `channels` go out."""

    kernel: int
    expansion: float
    channels: int
    squeezes: bool
    hard_swish: bool
    stride: int


MOBILE_ROWS = (
    Row(3, 1, 16, squeezes=False, hard_swish=False, stride=1),
    Row(3, 4, 24, squeezes=False, hard_swish=False, stride=2),
    Row(3, 3, 24, squeezes=False, hard_swish=False, stride=1),
    Row(5, 3, 40, squeezes=True, hard_swish=False, stride=2),
    *[Row(5, 3, 40, squeezes=True, hard_swish=False, stride=1)] * 2,
    Row(3, 6, 80, squeezes=False, hard_swish=True, stride=2),
    Row(3, 2.5, 80, squeezes=False, hard_swish=True, stride=1),
    *[Row(3, 2.3, 80, squeezes=False, hard_swish=True, stride=1)] * 2,
    *[Row(3, 6, 112, squeezes=True, hard_swish=True, stride=1)] * 2,
    Row(5, 6, 160, squeezes=True, hard_swish=True, stride=2),
    *[Row(5, 6, 160, squeezes=True, hard_swish=True, stride=1)] * 2,
)


class ResNetMg(nn.Module):
    """A ResNet of multigrid cycles: (N, 3, H, W) -> (N, num_classes), for images of 224x224.

    `depths` blocks for each of `widths`, basic ones, or with `bottleneck` such of four times the width;
    `group_size` and `coarsest` as in `lcc.methods.mgic`.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        group_size: int,
        coarsest: int,
        *,
        widths: tuple[int, ...] = WIDTHS,
        bottleneck: bool = False,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        method = _released(group_size, coarsest)
        self.conv = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, channels = [], widths[0]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            specs = []
            for block in range(depth):
                stride = 2 if number and not block else 1
                specs.append((_bottleneck if bottleneck else _basic)(channels, width, stride))
                channels = specs[-1].channels
            stages.append(nn.Sequential(*map(method.build, specs)))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, num_classes)
        _start_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.stages(self.pool(self.relu(self.bn(self.conv(x)))))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


class MobileNetV3Mg(nn.Module):
    """MobileNetV3-Large of multigrid cycles: (N, 3, H, W) -> (N, num_classes), for images of 224x224.

    `stem_stride` 1 is the released 1x1 stem, 2 MobileNetV3's own of 3x3.
    """

    def __init__(
        self, group_size: int, coarsest: int, *, stem_stride: int = 1, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        method = _released(group_size, coarsest)
        channels, side = 16, 2 * stem_stride - 1
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, side, stride=stem_stride, padding=side // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardswish(),
        )
        blocks = []
        for row in MOBILE_ROWS:
            blocks.append(method.build(_inverted(channels, row)))
            channels = row.channels
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.features = nn.Conv2d(channels, FEATURES, 1)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(FEATURES, num_classes)
        _start_(self)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores; of each feature, the largest in the map counts."""
        x = self.relu(self.bn(self.conv(self.blocks(self.stem(x)))))
        scores: Tensor = self.linear(self.relu(self.features(x)).amax(dim=(2, 3)))
        return scores


def _released(group_size: int, coarsest: int) -> Mgic:
    return Mgic(group_size=group_size, coarsest=coarsest, transitions=True, as_released=True)


def _basic(in_channels: int, channels: int, stride: int) -> StepSpec:
    """Return two 3x3 convolutions."""
    return _block(in_channels, stride, (3, channels), (3, channels))


def _bottleneck(in_channels: int, width: int, stride: int) -> StepSpec:
    """Return 1x1, 3x3 and 1x1 convolutions; the stride, at the 3x3, becomes the opening's."""
    return _block(in_channels, stride, (1, width), (3, width), (1, EXPANSION * width), strided=1)


def _block(in_channels: int, stride: int, *convs: tuple[int, int], strided: int = 0) -> StepSpec:
    """Return a ResNet's block of (kernel, channels)."""
    entering = (in_channels, *(channels for _, channels in convs))
    channels = convs[-1][1]
    return StepSpec(
        channels=channels,
        in_channels=in_channels,
        stride=(stride, stride),
        convs=tuple(
            _conv(wide, narrow, kernel, stride=stride if number == strided else 1)
            for number, (wide, (kernel, narrow)) in enumerate(zip(entering, convs, strict=False))
        ),
        norm_params=2 * sum(entering[1:]),
        post="relu",
    )


def _inverted(in_channels: int, row: Row) -> StepSpec:
    """Return a MobileNetV3's block; without an expansion there is no convolution for it."""
    inner = int(row.expansion * in_channels)
    convs: tuple[ConvSpec, ...] = (
        _conv(in_channels, inner, 1),
        _conv(inner, inner, row.kernel, stride=row.stride, groups=inner),
        _conv(inner, row.channels, 1),
    )
    if inner == row.channels:
        convs = convs[1:]
    few = inner // SQUEEZE
    return StepSpec(
        channels=row.channels,
        in_channels=in_channels,
        stride=(row.stride, row.stride),
        convs=convs,
        squeeze=(_conv(inner, few, 1, bias=True), _conv(few, inner, 1, bias=True)) if row.squeezes else (),
        norm_params=2 * sum(conv.out_channels for conv in convs),
        activation="hardswish" if row.hard_swish else "relu",
    )


def _conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> ConvSpec:
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        bias=bias,
    )


def _start_(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


SIZES = ((16, 16), (32, 32), (64, 64))  # group size, coarsest


def _named(stem: str, group_size: int, coarsest: int) -> str:
    return f"{stem}_{group_size}" + (f"_{coarsest}" if coarsest != group_size else "")


MGIC_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{_named("resnet_mg18", *size): partial(ResNetMg, (2, 2, 2, 2), *size) for size in SIZES},
    **{_named("resnet_mg34", *size): partial(ResNetMg, (3, 4, 6, 3), *size) for size in SIZES},
    **{
        _named("resnet_mg50", *size): partial(ResNetMg, (3, 4, 6, 3), *size, bottleneck=True)
        for size in (*SIZES, (32, 64))
    },
    **{
        _named(f"mobilenet_v3_mg{suffix}", *size): partial(MobileNetV3Mg, *size, stem_stride=stride)
        for suffix, stride in (("", 1), ("_stride2", 2))
        for size in SIZES
    },
}

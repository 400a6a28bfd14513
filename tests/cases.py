"""What the contract suite runs every method on: a new method is a new entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from reference import linear_mix_reference

from lcc.methods.linear_mix import LinearMix
from lcc.specs import ConvSpec, Size

if TYPE_CHECKING:
    from lcc.methods import Method

SIZE = Size(height=9, width=7)


class Case(NamedTuple):
    method: Method
    spec: ConvSpec

    def __str__(self) -> str:
        return f"{self.method} on {self.spec}".replace(" ", "-")


def conv(channels, kernel=(3, 3), out=None, **options) -> ConvSpec:
    return ConvSpec(in_channels=channels, out_channels=out or channels, kernel_size=kernel, **options)


# The padded 3x3 convolution of a ResNet, and everything that makes one different.
SHAPES = (
    conv(4, padding=(1, 1)),
    conv(4, padding=(1, 1), bias=True),
    conv(4, padding=(1, 1), stride=(2, 2)),
    conv(4, padding=(2, 2), dilation=(2, 2), bias=True),
    conv(4, padding=(0, 0), stride=(2, 1)),
    conv(4, padding=(3, 2), kernel=(3, 5)),
    conv(4, padding="same", kernel=(5, 3), bias=True),
    conv(4, padding="valid"),
    conv(4, padding=(1, 1), padding_mode="reflect", bias=True),
    conv(4, padding=(2, 1), padding_mode="circular", stride=(1, 2)),
    conv(4, padding=(1, 1), padding_mode="replicate"),
)

CASES: dict[str, tuple[Case, ...]] = {
    "linear_mix": (
        *(Case(LinearMix(), spec) for spec in SHAPES),
        *(Case(LinearMix(group_size=2, stencil="cross"), spec) for spec in SHAPES),
        *(Case(LinearMix(stencil="horizontal"), spec) for spec in SHAPES[:6]),
        *(Case(LinearMix(group_size=4, stencil="vertical"), spec) for spec in SHAPES[:6]),
        Case(LinearMix(change_channels=True), conv(3, out=6, padding=(1, 1), stride=(2, 2))),
        Case(LinearMix(group_size=2, change_channels=True), conv(6, out=3, padding=(1, 1), bias=True)),
    ),
}
ORACLES = {"linear_mix": linear_mix_reference}
# Closed forms: linear in the input and in the weights, so that a projection exists.
LINEAR = {"linear_mix"}
EVERY = [case for cases in CASES.values() for case in cases]

"""Multigrid in channels: grouped convolutions at nested widths, dense only at the coarsest.

Parameters and multiply-accumulates grow linearly with the width, where a convolution's grow with its square.
Source: arXiv:2011.09128; the conv form is the idea of arXiv:2006.06799.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Literal, Self

from pydantic import Field

from lcc.methods.base import LowCostOp, Method, Spec
from lcc.methods.mgic_block import MgicBlock
from lcc.methods.mgic_conv import MgicConv
from lcc.methods.mgic_design import Design, design, why_no_design
from lcc.ops.multigrid import Level, levels, why_no_levels
from lcc.specs import ConvSpec, Cost, SiteKind, Size, StepSpec


class Mgic(Method):
    """Configuration of multigrid in channels.

    The groups of a level are the most, up to its width / `group_size`, that divide every width involved.
    """

    formula: ClassVar[str] = (
        "R_l, P_l: 1x1, half the channels per level; block: z_l = B_l(x_l + N(P_l(z_{l+1} - R_l x_l))); "
        "conv: K_l(I + P_l(A_{l+1} - I)R_l); params and MACs linear in c"
    )
    paper: ClassVar[str] = "arXiv:2011.09128"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"conv", "step", "transition"})
    fits_slowly: ClassVar[bool] = True

    name: Literal["mgic"] = "mgic"
    group_size: int = Field(default=32, ge=1, description="channels in a group, about (s_g)")
    coarsest: int = Field(
        default=32, ge=2, description="the coarsest level is the first half of the width below this (s_c)"
    )
    form: Literal["both", "block", "conv"] = Field(
        default="both", description="replace residual steps, single convolutions, or both"
    )
    transitions: bool = Field(default=False, description="replace stage-changing blocks too")
    change_channels: bool = Field(
        default=False, description="conv form: let the finest level change the width"
    )
    as_released: bool = Field(
        default=False,
        description="block form: the released second skip, BatchNorm after R, rounded squeezes, early relu",
    )

    @property
    def takes(self) -> frozenset[SiteKind]:
        """The kinds of sites that `form` and `transitions` are about."""
        found: set[SiteKind] = set()
        if self.form != "block":
            found.add("conv")
        if self.form != "conv":
            found |= {"step", "transition"} if self.transitions else {"step"}
        return frozenset(found)

    @classmethod
    def family(cls, spec: Spec) -> tuple[Self, ...]:
        """Return the configurations that a planner tries."""
        is_conv = isinstance(spec, ConvSpec)
        changes = is_conv and spec.in_channels != spec.out_channels
        passes = not is_conv and spec.is_transition
        return tuple(
            cls(group_size=size, coarsest=coarsest, change_channels=changes, transitions=passes)
            for size, coarsest in product((8, 16, 32), (16, 64))
        )

    def why_not(self, spec: Spec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""
        if isinstance(spec, ConvSpec):
            if self.form == "block":
                return 'form = "block" leaves single convolutions alone'
            return self._why_not_conv(spec)
        if self.form == "conv":
            return 'form = "conv" leaves whole blocks alone'
        if spec.is_transition and not self.transitions:
            return "changes the stage, and only transitions = true replaces what does"
        return why_no_design(spec, self.coarsest)

    def cost(self, spec: Spec, size: Size) -> Cost:
        """Return the exact cost of the operator for one image of this size; normalisations cost no MACs."""
        return self._conv_cost(spec, size) if isinstance(spec, ConvSpec) else self.design(spec).cost(size)

    def build(self, spec: Spec) -> LowCostOp:
        """Return the operator with freshly initialised weights."""
        return MgicConv(self, spec) if isinstance(spec, ConvSpec) else MgicBlock(self, spec)

    def design(self, spec: StepSpec) -> Design:
        """Return what the block form is made of."""
        return design(spec, self.group_size, self.coarsest, as_released=self.as_released)

    def conv_levels(self, spec: ConvSpec) -> tuple[Level, ...]:
        """Return the levels of the conv form."""
        return levels(spec.in_channels, self.group_size, self.coarsest, first=(spec.out_channels,))

    def _why_not_conv(self, spec: ConvSpec) -> str | None:
        kh, kw = spec.kernel_size
        if spec.groups != 1:
            return f"already grouped ({spec.groups} groups)"
        if spec.in_channels != spec.out_channels and not self.change_channels:
            return (
                f"channels change ({spec.in_channels} to {spec.out_channels}), and change_channels is false"
            )
        if kh % 2 == 0 or kw % 2 == 0:
            return f"even kernel {kh}x{kw}, and the levels below the finest keep the size"
        return why_no_levels(spec.in_channels, self.coarsest)

    def _conv_cost(self, spec: ConvSpec, size: Size) -> Cost:
        """Return the cost: the finest K at the output's pixels, all else at the input's."""
        taps = spec.kernel_size[0] * spec.kernel_size[1]
        finest, *coarser = self.conv_levels(spec)
        first = taps * finest.width // finest.groups * spec.out_channels
        inner = sum(taps * level.width**2 // level.groups for level in coarser)
        inner += sum(level.width**2 // level.groups for level in (finest, *coarser[:-1]))  # R and P
        return Cost(
            params=first + inner + (spec.out_channels if spec.bias else 0),
            macs=first * spec.out_size(size).pixels + inner * size.pixels,
        )

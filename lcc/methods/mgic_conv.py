"""The conv form of multigrid in channels: a convolution as one cycle through levels of half the channels.

A_L = K_L, dense; A_l = K_l (I + P_l (A_{l+1} - I) R_l), K_l grouped; A_0 stands in for the convolution. Only
K_0 has its stride, its padding and its bias, and may change the width: the levels below keep the size. What
is composed reaches k - 1 pixels further with every level, so no k x k kernel equals it.
Source: the idea of arXiv:2006.06799, made linear; where it starts from and how it is fitted is ours.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.convolutions import convolution
from lcc.methods.base import Fit, Lowering, Scalable, as_conv
from lcc.methods.mgic_conv_fit import ConvActivations, fit_
from lcc.ops.fit import relative_error

if TYPE_CHECKING:
    from lcc.methods.base import Statistics
    from lcc.methods.mgic import Mgic
    from lcc.specs import ConvSpec, Size


class MgicConv(Scalable):
    """One linear cycle: `restrict` R_l and `prolong` P_l (1x1, grouped as K_l), `kernels` K_0 to K_L.

    Where every K is the identity, so is the operator, whatever R and P are.
    """

    spec: ConvSpec

    def __init__(self, method: Mgic, spec: ConvSpec) -> None:
        super().__init__(method, spec)
        levels = method.conv_levels(spec)
        # Padding in numbers, also `same`: fvcore counts no convolution that pads by a word.
        same = spec.model_copy(update={"padding": "same"}).margin
        finest = spec.model_copy(update={"groups": levels[0].groups, "padding": spec.margin})
        self.level_specs = (
            finest,
            *(
                finest.model_copy(
                    update={
                        "in_channels": level.width,
                        "out_channels": level.width,
                        "groups": level.groups,
                        "stride": (1, 1),
                        "padding": same,
                        "bias": False,
                    }
                )
                for level in levels[1:]
            ),
        )
        self.kernels = nn.ModuleList(convolution(level) for level in self.level_specs)
        self.restrict, self.prolong = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(levels):
            self.restrict.append(nn.Conv2d(fine.width, coarse.width, 1, groups=fine.groups, bias=False))
            self.prolong.append(nn.Conv2d(coarse.width, fine.width, 1, groups=fine.groups, bias=False))
        self._average_pairs_()
        self._draw_kernels_()

    @property
    def finest(self) -> nn.Conv2d:
        """K_0."""
        return as_conv(self.kernels[0])

    @property
    def bias(self) -> Tensor | None:
        """The bias, as a convolution would have it."""
        return self.finest.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        return self._coupled(x, 0)

    def _coupled(self, x: Tensor, level: int) -> Tensor:
        """Return A_l x for x (N, n_l, H, W)."""
        y: Tensor = self.kernels[level](self.seen(x, level))
        return y

    def seen(self, x: Tensor, level: int) -> Tensor:
        """Return what K_l sees, (I + P_l (A_{l+1} - I) R_l) x, for x (N, n_l, H, W)."""
        if level == len(self.restrict):
            return x
        coarse = self.restrict[level](x)
        u: Tensor = x + self.prolong[level](self._coupled(coarse, level + 1) - coarse)
        return u

    @torch.no_grad()
    def project_(self, original: nn.Module) -> Fit:
        """Take on what lies inside K_0's groups of the kernel, and the bias; no coupling between groups yet.

        The coarser K are the identity, so A_0 = K_0: given that, no K_0 is closer to the kernel. R averages
        pairs of channels, and P repeats them. The kernel's own aggregates as coarser K would be worse than
        zero at the 16 equal-channel 3x3 convolutions of a CIFAR ResNet-20 (mean error 1.05 instead of 0.79,
        group_size 8), since levels multiply: what R and P let through would be convolved L + 1 times.
        """
        conv = as_conv(original)
        kernel = conv.weight.detach()
        self._average_pairs_()
        for coarser, spec in zip(self.kernels[1:], self.level_specs[1:], strict=True):
            nn.init.dirac_(as_conv(coarser).weight, spec.groups)
        outside, blocks = kernel.clone(), []
        rows, columns = (len(kernel) // self.finest.groups, self.finest.weight.shape[1])
        for group in range(self.finest.groups):
            inside = (slice(group * rows, (group + 1) * rows), slice(group * columns, (group + 1) * columns))
            blocks.append(kernel[inside])
            outside[inside] = 0
        self.finest.weight.copy_(torch.cat(blocks))
        if self.bias is not None and conv.bias is not None:
            self.bias.copy_(conv.bias)
        return Fit(how="weights", kernel_error=relative_error(outside.square(), kernel.square()))

    def statistics(self, *, free_means: bool) -> ConvActivations:
        """Return an empty record of inputs and outputs."""
        return ConvActivations(free_means=free_means)

    @torch.no_grad()
    def fit_(self, statistics: Statistics) -> Fit:
        """Regress K, R and P onto the recorded outputs, then solve for K_0; errors are of held-out images."""
        if not isinstance(statistics, ConvActivations):
            raise TypeError("these statistics were made by another kind of operator")
        return fit_(self, statistics)

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor` (C_out,), by way of K_0 and the bias."""
        self.finest.weight.mul_(factor[:, None, None, None])
        if self.bias is not None:
            self.bias.mul_(factor)

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of every output channel's kernel in K_0, (C_out,)."""
        norms: Tensor = torch.linalg.vector_norm(self.finest.weight, dim=(1, 2, 3))
        return norms

    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return itself: plain convolutions and sums."""
        return (Lowering(copy.deepcopy(self)),)

    @torch.no_grad()
    def _average_pairs_(self) -> None:
        """Let R average pairs of neighbouring channels, and P repeat them; pairs never straddle groups."""
        for restrict, prolong in zip(self.restrict, self.prolong, strict=True):
            down, up = as_conv(restrict).weight, as_conv(prolong).weight
            pairs = torch.eye(up.shape[1], dtype=up.dtype, device=up.device).repeat_interleave(2, dim=1)
            groups = len(down) // len(pairs)
            down.copy_(pairs.repeat(groups, 1)[:, :, None, None] / 2)
            up.copy_(pairs.T.repeat(groups, 1)[:, :, None, None])

    @torch.no_grad()
    def _draw_kernels_(self) -> None:
        """Draw K_0 as for a ReLU (Kaiming), the others so that white noise keeps its variance."""
        for coarser in self.kernels[1:]:
            nn.init.kaiming_normal_(as_conv(coarser).weight, nonlinearity="linear")
        nn.init.kaiming_normal_(self.finest.weight, nonlinearity="relu")

"""LinearMix and its Lean relatives: a cheap spatial convolution plus a 1x1 convolution over all channels.

y = K x + M x, K grouped (depthwise by default) with a square or sparser stencil, M pointwise. It is a dense
convolution whose kernel is zero wherever a tap is neither at the centre nor inside a channel group.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.methods.base import LinearOp, Lowering, Method
from lcc.ops.fit import ArrowGram, ArrowWeights
from lcc.ops.padding import pad
from lcc.ops.sampling import SampledGrams
from lcc.specs import ConvSpec, Cost, SiteKind, Size

Stencil = Literal["square", "cross", "horizontal", "vertical"]


class LinearMix(Method):
    """Configuration of a LinearMix convolution."""

    formula: ClassVar[str] = "y = K_dw x + M x; params k^2 c g + c^2; MACs the same per output pixel"
    paper: ClassVar[str] = "arXiv:1805.07821 eq. (7); LeanConvNets arXiv:1910.13157"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"conv"})

    name: Literal["linear_mix"] = "linear_mix"
    group_size: int = Field(default=1, ge=1, description="input channels per group of the spatial part")
    stencil: Stencil = Field(default="square", description="taps of the spatial part")
    change_channels: bool = Field(default=False, description="also take convs that change the channel count")

    @classmethod
    def family(cls, spec: ConvSpec) -> tuple[Self, ...]:
        """Return the configurations that a planner tries: what lies between them is hardly better."""
        powers = range(max(1, (spec.in_channels - 1).bit_length()))  # a group of all channels would be dense
        sizes: dict[Stencil, tuple[int, ...]] = {
            "square": tuple(2**power for power in powers),
            "cross": (4, 16),
            "horizontal": (8, 32),
            "vertical": (8, 32),
        }
        changes = spec.in_channels != spec.out_channels
        return tuple(
            cls(group_size=size, stencil=stencil, change_channels=changes)
            for stencil, found in sizes.items()
            for size in found
        )

    def why_not(self, spec: ConvSpec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""
        kh, kw = spec.kernel_size
        if (kh, kw) == (1, 1):
            return "already pointwise (1x1)"
        if spec.groups != 1:
            return f"already grouped ({spec.groups} groups)"
        if kh % 2 == 0 or kw % 2 == 0:
            return f"even kernel {kh}x{kw} has no centre tap"
        if (self.stencil == "horizontal" and kw == 1) or (self.stencil == "vertical" and kh == 1):
            return f"a {self.stencil} stencil of a {kh}x{kw} kernel is its centre alone"
        if spec.in_channels != spec.out_channels and not self.change_channels:
            return f"channels change ({spec.in_channels} to {spec.out_channels}) and change_channels is off"
        groups, rest = divmod(spec.in_channels, self.group_size)
        if rest:
            return f"group_size {self.group_size} does not divide {spec.in_channels} input channels"
        if spec.out_channels % groups:
            return f"{groups} groups do not divide {spec.out_channels} output channels"
        return None

    def cost(self, spec: ConvSpec, size: Size) -> Cost:
        """Return the exact cost of the operator for one image of this size."""
        kh, kw = spec.kernel_size
        per_tap = spec.out_channels * self.group_size
        pointwise = spec.out_channels * spec.in_channels
        taps = {"square": kh * kw, "cross": kh + kw - 1, "horizontal": kw, "vertical": kh}[self.stencil]
        # A cross is stored as its taps and run as a square kernel with empty corners.
        taps_run = kh * kw if self.stencil == "cross" else taps
        bias = spec.out_channels if spec.bias else 0
        return Cost(
            params=per_tap * taps + pointwise + bias,
            macs=(per_tap * taps_run + pointwise) * spec.out_size(size).pixels,
        )

    def build(self, spec: ConvSpec) -> LinearMixOp:
        """Return the operator with freshly initialised weights."""
        return LinearMixOp(self, spec)

    def kept_pairs(self, spec: ConvSpec) -> Tensor:
        """Return which channels are in one group, bool (C_out, C_in)."""
        groups = spec.in_channels // self.group_size
        outputs = torch.arange(spec.out_channels) // (spec.out_channels // groups)
        return outputs[:, None] == torch.arange(spec.in_channels) // self.group_size


class CrossConv2d(nn.Conv2d):
    """A grouped convolution whose kernel is a cross: the full row and column through the centre.

    `weight` is (C_out, C_in / G, kh + kw - 1): the row, then the column without its centre.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kh, kw = self.kernel_size
        row = [kh // 2 * kw + j for j in range(kw)]
        column = [i * kw + kw // 2 for i in range(kh) if i != kh // 2]
        self.register_buffer("taps", torch.tensor(row + column), persistent=False)
        self.taps: Tensor
        self.weight = nn.Parameter(self.weight.detach().flatten(2)[:, :, self.taps].clone())

    def kernel(self) -> Tensor:
        """Return the kernel with its empty corners, (C_out, C_in / G, kh, kw)."""
        kh, kw = self.kernel_size
        empty = self.weight.new_zeros(*self.weight.shape[:2], kh * kw)
        filled = empty.index_copy(2, self.taps, self.weight)
        return filled.reshape(*self.weight.shape[:2], kh, kw)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x with the cross."""
        y: Tensor = self._conv_forward(x, self.kernel(), self.bias)
        return y


class LinearMixOp(LinearOp):
    """K x + M x as two convolutions: `spatial` (grouped) and `pointwise` (1x1, carries the bias)."""

    def __init__(self, method: LinearMix, spec: ConvSpec) -> None:
        super().__init__(method, spec)
        self.stencil = method.stencil
        self.channel_groups = spec.in_channels // method.group_size
        kh, kw = spec.kernel_size
        if method.stencil == "horizontal":
            kh = 1
        if method.stencil == "vertical":
            kw = 1
        kind = CrossConv2d if method.stencil == "cross" else nn.Conv2d
        self.spatial = kind(
            spec.in_channels,
            spec.out_channels,
            (kh, kw),
            stride=spec.stride,
            dilation=spec.dilation,
            padding=self._branch_padding((kh, kw)),
            groups=self.channel_groups,
            bias=False,
        )
        self.pointwise = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            1,
            stride=spec.stride,
            padding=self._branch_padding((1, 1)),
            bias=spec.bias,
        )
        # Two branches are summed: each gets half the variance.
        for branch in (self.spatial, self.pointwise):
            fan_in = branch.weight[0].numel()
            nn.init.normal_(branch.weight, std=fan_in**-0.5)
        self.spatial_crop = self._branch_crop((kh, kw))
        self.pointwise_crop = self._branch_crop((1, 1))

    @property
    def bias(self) -> Tensor | None:
        """The bias, as a convolution would have it."""
        return self.pointwise.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        if self.padding_mode != "zeros":
            x = pad(x, self.spec)
        y: Tensor = self.pointwise(_crop(x, self.pointwise_crop)) + self.spatial(_crop(x, self.spatial_crop))
        return y

    def dense_kernel(self) -> Tensor:
        """Return the equivalent dense kernel, (C_out, C_in, kh, kw)."""
        kernel = self._square_kernel()
        dense = kernel.new_zeros(self.out_channels, self.in_channels, *self.kernel_size)
        rows, columns = self._group_index(dense.device)
        dense[rows, columns] = kernel
        dense[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2] += self.pointwise.weight[:, :, 0, 0]
        return dense

    @torch.no_grad()
    def set_closest_(self, kernel: Tensor) -> None:
        """Take on the mask of a dense kernel (C_out, C_in, kh, kw): what of it the operator has (eq. 7)."""
        self._set_pointwise(kernel[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2])
        rows, columns = self._group_index(kernel.device)
        self._set_square_kernel(kernel[rows, columns])

    def statistics(self, *, free_means: bool) -> LinearMixStatistics:
        """Return an empty accumulator of the Gram matrices of this operator's regressors."""
        return LinearMixStatistics(self, free_means=free_means)

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor` (C_out,), by way of the weights."""
        for branch in (self.spatial, self.pointwise):
            branch.weight.mul_(factor.reshape(-1, *[1] * (branch.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.mul_(factor)

    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return two plain convolutions and a sum; a cross becomes a square kernel with empty corners."""
        lowered = copy.deepcopy(self)
        if isinstance(self.spatial, CrossConv2d):
            lowered.spatial = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                stride=self.stride,
                dilation=self.dilation,
                padding=self._branch_padding(self.kernel_size),
                groups=self.channel_groups,
                bias=False,
            )
            lowered.spatial.weight = nn.Parameter(self.spatial.kernel().detach())
        return (Lowering(lowered),)

    def _branch_margin(self, kernel: tuple[int, int]) -> tuple[int, int]:
        """How far a centred branch kernel reaches beyond the image; negative: it stays inside."""
        margin = self.spec.margin if self.padding_mode == "zeros" else (0, 0)
        top, left = (
            p - d * (k - b) // 2
            for p, d, k, b in zip(margin, self.dilation, self.kernel_size, kernel, strict=True)
        )
        return top, left

    def _branch_padding(self, kernel: tuple[int, int]) -> tuple[int, int]:
        top, left = self._branch_margin(kernel)
        return max(top, 0), max(left, 0)

    def _branch_crop(self, kernel: tuple[int, int]) -> tuple[int, int]:
        top, left = self._branch_margin(kernel)
        return max(-top, 0), max(-left, 0)

    def _group_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (C_out, 1) and columns (C_out, C_in / G) of the dense kernel that lie inside a group."""
        per_group_in = self.in_channels // self.channel_groups
        per_group_out = self.out_channels // self.channel_groups
        rows = torch.arange(self.out_channels, device=device)
        first = rows // per_group_out * per_group_in
        return rows[:, None], first[:, None] + torch.arange(per_group_in, device=device)

    def _square_kernel(self) -> Tensor:
        """The spatial kernel on the full support, (C_out, C_in / G, kh, kw)."""
        if isinstance(self.spatial, CrossConv2d):
            return self.spatial.kernel()
        (kh, kw), (bh, bw) = self.kernel_size, self.spatial.kernel_size
        return F.pad(self.spatial.weight, ((kw - bw) // 2,) * 2 + ((kh - bh) // 2,) * 2)

    def _set_square_kernel(self, kernel: Tensor) -> None:
        """Set the spatial kernel from the full support; taps off the stencil are dropped."""
        kh, kw = self.kernel_size
        if isinstance(self.spatial, CrossConv2d):
            self.spatial.weight.copy_(kernel.flatten(2)[:, :, self.spatial.taps])
        elif self.stencil == "horizontal":
            self.spatial.weight.copy_(kernel[:, :, kh // 2 : kh // 2 + 1])
        elif self.stencil == "vertical":
            self.spatial.weight.copy_(kernel[:, :, :, kw // 2 : kw // 2 + 1])
        else:
            self.spatial.weight.copy_(kernel)

    def _set_pointwise(self, matrix: Tensor) -> None:
        """Set M (C_out, C_in) outside the groups; inside, the spatial centre taps hold it."""
        matrix = matrix.clone()
        rows, columns = self._group_index(matrix.device)
        matrix[rows, columns] = 0
        self.pointwise.weight.copy_(matrix[:, :, None, None])

    def off_centre_taps(self) -> list[tuple[int, int]]:
        """(row, column) of the stencil's taps within the kernel, the centre left out."""
        kh, kw = self.kernel_size
        centre = (kh // 2, kw // 2)
        return [
            (i, j)
            for i in range(kh)
            for j in range(kw)
            if (i, j) != centre
            and (
                self.stencil == "square"
                or (i == centre[0] and self.stencil in ("cross", "horizontal"))
                or (j == centre[1] and self.stencil in ("cross", "vertical"))
            )
        ]

    def free_weights(self) -> ArrowWeights:
        """The non-redundant weights: all centre taps as common, the others as private, in float64."""
        dense = self.dense_kernel().double()
        taps = self.off_centre_taps()
        rows, columns = self._group_index(dense.device)
        inside = dense[rows, columns][:, :, [i for i, _ in taps], [j for _, j in taps]]  # (C_out, C_in/G, T)
        centre = dense[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2]
        shape = (self.channel_groups, self.out_channels // self.channel_groups, -1)
        return ArrowWeights(common=centre.reshape(shape), private=inside.reshape(shape))

    @torch.no_grad()
    def set_free_weights_(self, weights: ArrowWeights) -> None:
        """Take on such weights."""
        taps = self.off_centre_taps()
        centre = weights.common.flatten(0, 1)
        rows, columns = self._group_index(centre.device)
        kernel = centre.new_zeros(*columns.shape, *self.kernel_size)
        private = weights.private.reshape(*columns.shape, len(taps))
        kernel[:, :, [i for i, _ in taps], [j for _, j in taps]] = private
        kernel[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2] = centre[rows, columns]
        self._set_square_kernel(kernel.to(self.pointwise.weight.dtype))
        self._set_pointwise(centre.to(self.pointwise.weight.dtype))


class LinearMixStatistics(SampledGrams[ArrowGram]):
    """Gram matrices of all channels' centre taps and each group's other taps, at sampled positions.

    Regressors are the input under each tap: the centre ones are common to all outputs, the others private
    to a channel group.
    """

    def __init__(self, op: LinearMixOp, *, free_means: bool) -> None:
        self.groups = op.channel_groups
        around = op.off_centre_taps()
        private = (self.groups, len(around) * op.in_channels // self.groups)
        per_group_out = op.out_channels // self.groups
        device = op.pointwise.weight.device
        kh, kw = op.kernel_size
        super().__init__(
            op.spec,
            [(kh // 2, kw // 2), *around],
            (
                ArrowGram(op.in_channels, private, per_group_out, device),
                ArrowGram(op.in_channels, private, per_group_out, device),
            ),
            unknowns=op.in_channels + private[1],
            centered=free_means or op.spec.bias,
        )

    def take_in(self, gram: ArrowGram, patches: Tensor, outputs: Tensor) -> None:
        """Add M samples: patches (M, C_in, T), the inputs under the T taps, and outputs (M, C_out)."""
        around = patches[:, :, 1:].unflatten(1, (self.groups, -1)).flatten(2)
        gram.add(patches[:, :, 0], around, outputs.unflatten(1, (self.groups, -1)))


def _crop(x: Tensor, margin: tuple[int, int]) -> Tensor:
    top, left = margin
    return x if margin == (0, 0) else x[:, :, top : x.shape[2] - top, left : x.shape[3] - left]

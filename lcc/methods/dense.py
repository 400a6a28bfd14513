"""A convolution as it was, as an operator: what a bank shares where it shares dense kernels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.methods.base import LinearOp, Lowering
from lcc.ops.grouped_fit import GroupedGram
from lcc.ops.padding import inner_padding, pad
from lcc.ops.sampling import SampledGrams

if TYPE_CHECKING:
    from lcc.methods.base import Method
    from lcc.specs import ConvSpec, Size


class DenseConv(LinearOp):
    """K x + b with a kernel (C_out, C_in / G, kh, kw); any groups, stride, dilation and padding."""

    spec: ConvSpec

    def __init__(self, method: Method, spec: ConvSpec) -> None:
        super().__init__(method, spec)
        shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        padding = inner_padding(self.spec)
        if padding is None:
            x, padding = pad(x, self.spec), (0, 0)
        return F.conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def dense_kernel(self) -> Tensor:
        """Return the kernel, (C_out, C_in / G, kh, kw)."""
        return self.weight

    @torch.no_grad()
    def set_closest_(self, kernel: Tensor) -> None:
        """Take on a kernel, (C_out, C_in / G, kh, kw)."""
        self.weight.copy_(kernel)

    def statistics(self, *, free_means: bool) -> DenseStatistics:
        """Return an empty accumulator of the Gram matrices of every group's inputs under all taps."""
        return DenseStatistics(self, free_means=free_means)

    def free_weights(self) -> Tensor:
        """Return the kernel in float64, (G, q, p)."""
        rows = self.weight.detach().double().flatten(1)
        return rows.reshape(self.groups, -1, rows.shape[1])

    @torch.no_grad()
    def set_free_weights_(self, weights: Tensor) -> None:
        """Take on such weights."""
        self.weight.copy_(weights.reshape(self.weight.shape))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor` (C_out,), by way of the weights."""
        self.weight.mul_(factor[:, None, None, None])
        if self.bias is not None:
            self.bias.mul_(factor)

    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return itself: a convolution."""
        return (Lowering(copy.deepcopy(self)),)


class DenseStatistics(SampledGrams[GroupedGram]):
    """Gram matrices of what every group of outputs sees under all taps, at sampled positions."""

    def __init__(self, op: DenseConv, *, free_means: bool) -> None:
        spec, (kh, kw) = op.spec, op.kernel_size
        self.groups = spec.groups
        shape = (spec.groups, spec.in_channels // spec.groups * kh * kw, spec.out_channels // spec.groups)
        device = op.weight.device
        super().__init__(
            spec,
            [(i, j) for i in range(kh) for j in range(kw)],
            (GroupedGram(*shape, device), GroupedGram(*shape, device)),
            unknowns=shape[1],
            centered=free_means or spec.bias,
        )

    def take_in(self, gram: GroupedGram, patches: Tensor, outputs: Tensor) -> None:
        """Add M samples: patches (M, C_in, T), the inputs under the T taps, and outputs (M, C_out)."""
        gram.add(patches.unflatten(1, (self.groups, -1)).flatten(2), outputs.unflatten(1, (self.groups, -1)))

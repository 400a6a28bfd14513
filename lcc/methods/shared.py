"""Kernels shared between isomorphic convolutions: one bank of weights for a set of sites.

Every site of a bank runs the same convolution, or the same operator of another method; what follows it, such
as its BatchNorm, stays its own. MACs are unchanged; stored and trained numbers shrink.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lcc.methods.base import AnyMethod, Fit, LinearOp, Lowering, Method, as_conv
from lcc.methods.dense import DenseConv
from lcc.methods.shared_fit import SharedStatistics, fit_bank
from lcc.ops.fit import relative_error
from lcc.specs import ConvSpec, Cost, SiteKind, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.methods.base import LowCostOp, Statistics


class Shared(Method):
    """Configuration of a bank: isomorphic convolutions of a stage that share their weights."""

    formula: ClassVar[str] = "y_l = s_l (K x_l + b), one K and b for n sites; MACs as before"
    paper: ClassVar[str] = "arXiv:2210.14151"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"conv"})
    shares: ClassVar[bool] = True

    name: Literal["shared"] = "shared"
    kernels: int = Field(default=1, ge=1, description="kernels for each set of isomorphic convolutions")
    scale: bool = Field(
        default=False, description="a scale of their own for the output channels of every site"
    )
    align: bool = Field(default=True, description="first order inner channels so that kernels agree more")
    method: AnyMethod | None = Field(
        default=None, description="the method whose operator is shared; none: dense"
    )

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if self.method is None:
            return self
        one = ConvSpec(in_channels=64, out_channels=64, kernel_size=(3, 3), padding=(1, 1))
        inner = None if self.method.shares or self.method.why_not(one) else self.method.build(one)
        if not isinstance(inner, LinearOp):
            raise ValueError(
                f"method: {self.method.name} has no closed form on convolutions, so it can't be shared"
            )
        if self.scale and inner.one_scale:
            raise ValueError(f"scale: {self.method.name} has one scale for all channels; leave scale out")
        return self

    def runs_as_dense(self, *, folded: bool) -> bool:
        """Whether nothing but where the weights are kept differs from dense convolutions."""
        return self.method is None and (folded or not self.scale)

    @classmethod
    def family(cls, spec: ConvSpec) -> tuple[Self, ...]:  # noqa: ARG003  # the same for all
        """Return the configurations that a planner tries; it does not look at the order of inner channels."""
        return (cls(align=False), cls(align=False, scale=True))

    def why_not(self, spec: ConvSpec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""
        return None if self.method is None else self.method.why_not(spec)

    def cost(self, spec: ConvSpec, size: Size) -> Cost:
        """Return the exact cost of one site with the whole kernel; a scale costs parameters and no MACs."""
        kernel = spec.cost(size) if self.method is None else self.method.cost(spec, size)
        return kernel + Cost(params=spec.out_channels if self.scale else 0, macs=0)

    def shared_params(self, spec: ConvSpec) -> int:
        """Return how many of the parameters in `cost` all operators of a bank have in common."""
        any_size = Size(height=64, width=64)
        return self.cost(spec, any_size).params - (spec.out_channels if self.scale else 0)

    def build(self, spec: ConvSpec) -> SharedOp:
        """Return the operator of one site; its weights are its own until `tie_`."""
        return SharedOp(self, spec)

    def tie_(self, operators: Sequence[LowCostOp]) -> None:
        """Let all operators hold the first one's kernel."""
        first, *others = (_shared(op).kernel for op in operators)
        for kernel in others:
            for name, parameter in first.named_parameters():
                owner, _, key = name.rpartition(".")
                setattr(kernel.get_submodule(owner), key, parameter)

    @torch.no_grad()
    def project_bank_(self, operators: Sequence[LowCostOp], originals: Sequence[nn.Module]) -> list[Fit]:
        """Take on the kernel closest to all of them: their mean, or the one with the closest multiples."""
        ops, convs = [_shared(op) for op in operators], [as_conv(original) for original in originals]
        kernels = torch.stack([conv.weight.detach() for conv in convs])
        scales, kernel = closest_multiples(kernels) if self.scale else (None, kernels.mean(0))
        ops[0].kernel.set_closest_(kernel)
        biases = [conv.bias for conv in convs if conv.bias is not None]
        if ops[0].bias is not None and biases:
            wanted = torch.stack(biases)
            sizes = torch.ones_like(wanted) if scales is None else scales
            ops[0].bias.copy_((sizes * wanted).sum(0) / sizes.square().sum(0))
        for number, op in enumerate(ops):
            if op.scale is not None and scales is not None:
                op.scale.copy_(scales[number])
        return [
            Fit(how="weights", kernel_error=_distance(op.dense_kernel(), conv.weight))
            for op, conv in zip(ops, convs, strict=True)
        ]

    @torch.no_grad()
    def fit_bank_(self, operators: Sequence[LowCostOp], statistics: Sequence[Statistics]) -> list[Fit]:
        """Take on the weights with the least summed error over all sites, on each one's own activations.

        Where a BatchNorm follows, or there are scales, the size of every output channel is free: what is
        wanted there is brought to the size that the present kernel gives. The ridge pulls towards it.
        """
        ops = [_shared(op) for op in operators]
        seen = [entry for entry in statistics if isinstance(entry, SharedStatistics)]
        if len(seen) < len(ops):
            raise TypeError("these statistics were made by another kind of operator")
        kernel, bias = ops[0].kernel, ops[0].bias
        found = fit_bank(seen, kernel.free_weights(), bias=bias is not None)
        kernel.set_free_weights_(found.weights)
        if bias is not None and found.bias is not None:
            bias.copy_(found.bias)
        for op, entry in zip(ops, seen, strict=True):
            if op.scale is not None:
                op.scale.copy_(entry.sizes)
        return [
            Fit(
                how="data",
                start_error=before,
                relative_error=after,
                ridge=found.ridge,
                samples=entry.grams.train.count + entry.grams.held_out.count,
            )
            for entry, (before, after) in zip(seen, found.errors, strict=True)
        ]


class SharedOp(LinearOp):
    """s * (K x + b): `kernel` holds K and b of the bank, `scale` (C_out,) or None is the site's own."""

    def __init__(self, method: Shared, spec: ConvSpec) -> None:
        super().__init__(method, spec)
        kernel = DenseConv(method, spec) if method.method is None else method.method.build(spec)
        assert isinstance(kernel, LinearOp)
        self.kernel = kernel
        self.one_scale = kernel.one_scale
        self.scale = nn.Parameter(torch.ones(spec.out_channels)) if method.scale else None

    @property
    def bias(self) -> Tensor | None:
        """The bank's bias, before the scale."""
        bias: Tensor | None = getattr(self.kernel, "bias", None)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        y: Tensor = self.kernel(x)
        return y if self.scale is None else y * self.scale[:, None, None]

    def dense_kernel(self) -> Tensor:
        """Return the equivalent kernel of the convolution it replaces, (C_out, C_in / G, kh, kw)."""
        kernel = self.kernel.dense_kernel()
        return kernel if self.scale is None else kernel * _per_row(self.scale)

    @torch.no_grad()
    def set_closest_(self, kernel: Tensor) -> None:
        """Take on the closest weights, with scales of one."""
        self.kernel.set_closest_(kernel)
        if self.scale is not None:
            self.scale.fill_(1)

    def statistics(self, *, free_means: bool) -> SharedStatistics:
        """Return an empty accumulator of the Gram matrices of the kernel's regressors."""
        return SharedStatistics(self.kernel, self.scale, free_means=free_means)

    def free_weights(self) -> Any:
        """Return the kernel's, without the scale."""
        return self.kernel.free_weights()

    def set_free_weights_(self, weights: Any) -> None:
        """Set the kernel's."""
        self.kernel.set_free_weights_(weights)

    def fit_(self, statistics: Statistics) -> Fit:
        """As a bank of one."""
        (fit,) = self.method.fit_bank_([self], [statistics])
        return fit

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of each output channel's equivalent dense kernel, (C_out,)."""
        norms = self.kernel.weight_norms()
        return norms if self.scale is None else norms * self.scale.abs()

    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor` (C_out,), by way of the kernel, so for the whole bank."""
        self.kernel.scale_(factor)

    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:
        """Return the kernel's lowerings with the scale after them; a BatchNorm behind takes it in."""
        if self.scale is None:
            return self.kernel.lowerings(size, tolerance)
        scale = self.scale.detach().clone()
        return tuple(
            lowering._replace(module=_Scaled(lowering.module, scale))
            for lowering in self.kernel.lowerings(size, tolerance)
        )


class _Scaled(nn.Module):
    """A lowered kernel, then one factor for each channel."""

    def __init__(self, kernel: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("scale", scale[:, None, None])
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        y: Tensor = self.kernel(x) * self.scale
        return y


def closest_multiples(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales s (L, C_out) and a kernel K with the least sum of |W_l - s_l K|^2 over L kernels W.

    `kernels` is (L, C_out, ...), K (C_out, ...); for every output channel the best approximation of rank
    one. The scales of a channel are one on average, in absolute value.
    """
    rows = kernels.flatten(2).transpose(0, 1).double()  # (C_out, L, p)
    _, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    scales = vectors[:, :, -1]
    scales = scales * torch.where(scales.sum(1, keepdim=True) < 0, -1.0, 1.0)
    kernel = torch.einsum("ol,olp->op", scales, rows)
    size = scales.abs().mean(1, keepdim=True)
    kernel = (kernel * size).reshape(kernels.shape[1:])
    return (scales / size).T.to(kernels), kernel.to(kernels)


def _shared(op: LowCostOp) -> SharedOp:
    if not isinstance(op, SharedOp):
        raise TypeError(f"a {type(op).__name__} shares nothing")
    return op


def _per_row(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]


def _distance(got: Tensor, wanted: Tensor) -> float:
    return relative_error((got - wanted).square(), wanted.square())

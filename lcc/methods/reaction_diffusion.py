"""Reaction-diffusion steps: explicit, implicit, and explicit with stencils that couple channels circulantly.

K is a stencil, M pointwise, N a BatchNorm, h the step's length:
explicit y + h (-K^T K y + relu(N(M y))), implicit (I + h K^T K)^-1 (y + h relu(N(M y))).
Source: arXiv:1805.07821, eqs. (9), (11) and (12).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lcc.methods.base import Lowering
from lcc.methods.diffusion_step import ReactionDiffusion, ReactionDiffusionOp
from lcc.methods.lowered_steps import (
    Coupling,
    FourierSolve,
    LoweredCirculant,
    LoweredExplicit,
    LoweredImplicit,
    PeriodicStencil,
)
from lcc.ops import circulant
from lcc.ops.activations import activate
from lcc.ops.spectral import green, laid_out_as, real_fourier, solve_periodic
from lcc.ops.stencil import depthwise, depthwise_adjoint, gain, grid, slack
from lcc.specs import Size, fft_macs

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from lcc.methods.base import Spec

STABLE = 2.0  # forward Euler on y' = -K^T K y is stable up to h max|k^|^2 = 2
FAR = 1e3  # a tap that is past any cap in use


class RdExplicit(ReactionDiffusion):
    """Configuration of an explicit reaction-diffusion step."""

    formula: ClassVar[str] = (
        "y + h(-K_dw^T K_dw y + relu(N(M y))); params k^2 c + c^2; MACs n (2 k^2 c + c^2)"
    )

    name: Literal["rd_explicit"] = "rd_explicit"

    def diffusion_macs(self, channels: int, kernel: tuple[int, int], size: Size) -> int:
        """Return the multiply-accumulates of K and K^T."""
        return 2 * kernel[0] * kernel[1] * channels * size.pixels

    def build(self, spec: Spec) -> RdExplicitOp:
        """Return the operator with freshly initialised weights."""
        return RdExplicitOp(self, spec)


class RdExplicitOp(ReactionDiffusionOp):
    """y + h (-K^T K y + relu(N(M y))), zeros outside the image, K depthwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        diffused = depthwise_adjoint(depthwise(x, self.stencil), self.stencil)
        return activate(x + self.step * (self.reaction(x) - diffused), self.post)

    def amplification(self, stencil: Tensor | None = None) -> Tensor:
        """Return h max|k^|^2 over channels and frequencies."""
        return self.step * gain(self.stencil if stencil is None else stencil).amax()

    @torch.no_grad()
    def restrain_(self) -> None:
        """Shrink the stencils that leave the stable region back into it."""
        bound = STABLE / slack(*self.stencil.shape[1:]) / self.step
        excess = (gain(self.stencil) / bound).clamp_min(1).sqrt()
        self.stencil.div_(excess.to(self.stencil)[:, None, None])

    @torch.no_grad()
    def warning(self) -> str | None:
        """Say so where the step is past its bound of stability."""
        return _past_the_bound(float(self.amplification()))

    @torch.no_grad()
    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return two depthwise convolutions and a 1x1 one, the step's length in their weights."""
        root = float(self.step) ** 0.5
        return (Lowering(LoweredExplicit(self.lowered_reaction(), root * self.stencil.detach(), self.post)),)


class RdImplicit(ReactionDiffusion):
    """Configuration of an implicit reaction-diffusion step."""

    formula: ClassVar[str] = (
        "(I + h K_dw^T K_dw)^-1 (y + h relu(N(M y))); params k^2 c + c^2; MACs n c^2 + 2 c rfft(n)"
    )

    name: Literal["rd_implicit"] = "rd_implicit"
    stiffness: float = Field(
        default=0.3,
        gt=0,
        description="cap on h max|k^|^2: the smaller, the shorter the stencil that solves; inf: no cap",
    )

    def diffusion_macs(self, channels: int, kernel: tuple[int, int], size: Size) -> int:  # noqa: ARG002
        """Return the multiply-accumulates of one real FFT of each channel, and one back."""
        return 2 * channels * fft_macs(size.pixels, real=True)

    def build(self, spec: Spec) -> RdImplicitOp:
        """Return the operator with freshly initialised weights."""
        return RdImplicitOp(self, spec)


class RdImplicitOp(ReactionDiffusionOp):
    """(I + h K^T K)^-1 (y + h relu(N(M y))), periodic in space, K depthwise; its norm is at most 1.

    The stencil is used shrunk where h (sum|taps|)^2, which bounds h max|k^|^2, is past the cap.
    """

    def __init__(self, method: RdImplicit, spec: Spec) -> None:
        self.stiffness = method.stiffness
        super().__init__(method, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        rhs = x + self.step * self.reaction(x)
        return activate(solve_periodic(rhs, self.capped_stencil(), self.step), self.post)

    def capped_stencil(self) -> Tensor:
        """Return the stencil in use, (C, kh, kw)."""
        if math.isinf(self.stiffness):
            return self.stencil
        bound = self.step * self.stencil.abs().sum((1, 2), keepdim=True).square()
        return self.stencil * (self.stiffness / bound.clamp_min(self.stiffness)).sqrt()

    def amplification(self, stencil: Tensor | None = None) -> Tensor:
        """Return h max|k^|^2 over channels and frequencies."""
        return self.step * gain(self.capped_stencil() if stencil is None else stencil).amax()

    @torch.no_grad()
    def restrain_(self) -> None:
        """Keep the stencil where it has a gradient: not far past the cap."""
        self.stencil.copy_(self.capped_stencil())

    @torch.no_grad()
    def at_its_slowest_(self) -> None:
        """Let the stencil reach the cap with its outermost taps alone: what solves is the longest then."""
        self.stencil.zero_()
        self.stencil[:, (0, -1), (0, -1)] = FAR

    @torch.no_grad()
    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:
        """Return the solve as a periodic stencil to `tolerance`, and as exact real matrices."""
        stencil, step = self.capped_stencil().detach(), float(self.step)
        short = green(stencil, step, size.height, size.width, tolerance)
        exact = real_fourier(stencil, step, size.height, size.width)
        kh, kw = short.taps.shape[1:]
        return (
            Lowering(
                LoweredImplicit(self.lowered_reaction(), PeriodicStencil(short), self.post),
                f"solves by a periodic {kh}x{kw} stencil, relative error {short.relative_error:.0e}",
                short.relative_error,
            ),
            Lowering(
                LoweredImplicit(self.lowered_reaction(), FourierSolve(exact), self.post),
                f"solves by real Fourier matrices for {size}",
            ),
        )


class RdCirculant(ReactionDiffusion):
    """Configuration of an explicit step whose stencils couple the channels circulantly."""

    formula: ClassVar[str] = (
        "y + h(-K_circ^T K_circ y + relu(N(M y))); params k^2 c + c^2; "
        "MACs n (c^2 + 2 c c' + 4 k^2 c'), periodic: n c^2 + 2 rfft(c n)"
    )

    name: Literal["rd_circulant"] = "rd_circulant"
    boundary: Literal["zeros", "periodic"] = Field(
        default="zeros", description="outside the image; periodic is the paper's, by FFT"
    )

    def diffusion_macs(self, channels: int, kernel: tuple[int, int], size: Size) -> int:
        """Return the multiply-accumulates of the transforms and of K and K^T between them."""
        if self.boundary == "periodic":
            return 2 * fft_macs(channels * size.pixels, real=True)
        spectral = circulant.spectral_channels(channels)
        return (2 * channels * spectral + 4 * kernel[0] * kernel[1] * spectral) * size.pixels

    def build(self, spec: Spec) -> RdCirculantOp:
        """Return the operator with freshly initialised weights."""
        return RdCirculantOp(self, spec)


class RdCirculantOp(ReactionDiffusionOp):
    """y + h (-K^T K y + relu(N(M y))), K block-circulant: channel i sees channel i + d under `taps` d.

    The parameter is the taps times the root of C: C times as many add up as in a depthwise stencil, and so
    steps of a learning rate that suits the one change K^T K as much in the other.
    """

    def __init__(self, method: RdCirculant, spec: Spec) -> None:
        super().__init__(method, spec)
        self.periodic = method.boundary == "periodic"
        self.analysis: Tensor
        self._set_basis()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        return activate(x + self.step * (self.reaction(x) - self.diffused(x)), self.post)

    @property
    def taps(self) -> Tensor:
        """The stencils of K, (C, kh, kw)."""
        root: float = self.channels**0.5
        return self.stencil / root

    def diffused(self, x: Tensor) -> Tensor:
        """Return K^T K x."""
        if self.periodic:
            return laid_out_as(x, circulant.periodic_circulant_gram(x, self.taps))
        z = F.conv2d(x, self.analysis)
        for stencils in self._stencils():
            z = circulant.apply(z, *stencils, padding=_same(stencils[0]))
        return F.conv2d(z, self.analysis.transpose(0, 1))

    def amplification(self, stencil: Tensor | None = None) -> Tensor:
        """Return h max|k^|^2 over channel and spatial frequencies."""
        taps = (self.stencil if stencil is None else stencil).detach() / self.channels**0.5
        points = grid(*taps.shape[1:])
        symbol = circulant.circulant_symbol(taps.double(), points, points)
        return self.step * symbol.abs().square().amax()

    @torch.no_grad()
    def restrain_(self) -> None:
        """Shrink the stencils back into the stable region, all alike, where one leaves it."""
        bound = STABLE / slack(*self.stencil.shape[1:])
        self.stencil.div_((self.amplification() / bound).clamp_min(1).sqrt().to(self.stencil))

    @torch.no_grad()
    def warning(self) -> str | None:
        """Say so where the step is past its bound of stability."""
        return _past_the_bound(float(self.amplification()))

    @torch.no_grad()
    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return 1x1 convolutions into and out of the channel Fourier basis, depthwise ones between."""
        root = float(self.step) ** 0.5
        couplings = tuple(
            Coupling(*(root * part.detach() for part in stencils), periodic=self.periodic)
            for stencils in self._stencils()
        )
        return (Lowering(LoweredCirculant(self.lowered_reaction(), self.analysis, couplings, self.post)),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own hook behind to() and cuda()
        self._set_basis()  # not converted: a basis rounded to float32 would stay so in float64
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_basis()  # the weights may be of another type now

    def _set_basis(self) -> None:
        basis = circulant.analysis(self.channels).to(self.stencil)[:, :, None, None]
        self.register_buffer("analysis", basis, persistent=False)

    def _stencils(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        there = circulant.spectral_stencils(self.taps)
        return there, circulant.adjoint_stencils(*there)


def _same(stencil: Tensor) -> tuple[int, int]:
    """Return the padding that keeps the size."""
    return stencil.shape[1] // 2, stencil.shape[2] // 2


def _past_the_bound(amplification: float) -> str | None:
    if amplification <= STABLE * 1.001:
        return None
    return (
        f"h max|k^|^2 is {amplification:.2f}, past the bound of {STABLE:g}: its diffusion amplifies what it "
        "should smooth; a smaller step, or rd_implicit, is stable"
    )

"""What reaction-diffusion steps share: the reaction relu(N(M y)), the length h, and how weights are found.

A step replaces a whole residual step post(x + F(x)) and changes the function: no exact projection exists, so
its weights come from a regression onto the original's outputs. Source: arXiv:1805.07821, eqs. (8) to (12).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.methods.base import Fit, LowCostOp, Method, Spec
from lcc.methods.lowered_steps import Reaction
from lcc.ops.regression import Activations, error_of, estimate_norm_, regress_
from lcc.specs import ConvSpec, Cost, SiteKind, Size, StepSpec

if TYPE_CHECKING:
    from lcc.methods.base import Statistics

REACTION_START = 1e-2
START_GAIN = 0.05  # h max|k^|^2 of a start's stencil, about: small, but not zero, where K^T K has no gradient


class ReactionDiffusion(Method):
    """What the three steps have in common.

    h scales K by its root and N's affine part: any h gives the same family, so 1 loses nothing. It makes y
    and the reaction count alike, as in a residual step.
    """

    paper: ClassVar[str] = "arXiv:1805.07821 eqs. (8)-(12)"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"step", "conv"})
    by_name_only: ClassVar[frozenset[SiteKind]] = frozenset({"conv"})
    fits_slowly: ClassVar[bool] = True

    step: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="h, the length of the step in time"
    )
    learn_step: bool = Field(default=False, description="train h too, as a positive number")
    kernel_size: int | None = Field(
        default=None, ge=3, description="of K; default: the original's, at least 3"
    )

    def why_not(self, spec: Spec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            return f"kernel_size {self.kernel_size} is even, so K has no centre tap"
        if self.kernel_size is None and any(k % 2 == 0 for k in self.stencil_size(spec)):
            kh, kw = spec.kernel_size
            return f"even kernel {kh}x{kw} has no centre tap; kernel_size = 3 gives K its own"
        return _why_no_step(spec) if isinstance(spec, ConvSpec) else None

    def stencil_size(self, spec: Spec) -> tuple[int, int]:
        """Return (kh, kw) of K."""
        if self.kernel_size is not None:
            return (self.kernel_size, self.kernel_size)
        kh, kw = spec.kernel_size
        return (max(kh, 3), max(kw, 3))

    def cost(self, spec: Spec, size: Size) -> Cost:
        """Return the exact cost of the operator for one image of this size; normalisations cost no MACs."""
        channels = channels_of(spec)
        kh, kw = self.stencil_size(spec)
        reaction = channels * channels
        return Cost(
            params=kh * kw * channels + reaction + 2 * channels + self.learn_step,
            macs=reaction * size.pixels + self.diffusion_macs(channels, (kh, kw), size),
        )

    @abstractmethod
    def diffusion_macs(self, channels: int, kernel: tuple[int, int], size: Size) -> int:
        """Return the multiply-accumulates of the diffusion for one image."""


def channels_of(spec: Spec) -> int:
    """Return how many channels go in and out."""
    return int(spec.channels if isinstance(spec, StepSpec) else spec.in_channels)


def _why_no_step(spec: ConvSpec) -> str | None:
    """Return in words why a step can't stand in for a convolution: it keeps the shape of its input."""
    if spec.in_channels != spec.out_channels:
        return f"channels change ({spec.in_channels} to {spec.out_channels}), and a step keeps them"
    if spec.stride != (1, 1):
        return f"stride {spec.stride[0]}x{spec.stride[1]}, and a step keeps the size"
    if spec.groups != 1:
        return f"already grouped ({spec.groups} groups)"
    if spec.bias:
        return "has a bias, for which a step has no place"
    probe = Size(height=2 * max(spec.kernel_size) + 1, width=2 * max(spec.kernel_size) + 1)
    if spec.out_size(probe) != probe:
        return "its padding changes the size, and a step keeps it"
    if spec.dilation != (1, 1):
        return f"dilated by {spec.dilation[0]}x{spec.dilation[1]}, and K is not"
    if spec.padding_mode != "zeros":
        return f"padded by {spec.padding_mode}, and a step has its own boundary"
    return None


class ReactionDiffusionOp(LowCostOp):
    """h, the reaction N(M y) and what follows the sum; a subclass has the stencil and says how to diffuse.

    Stochastic depth of the original is not carried over: the step has no branch of its own to drop.
    """

    def __init__(self, method: ReactionDiffusion, spec: Spec) -> None:
        super().__init__(method, spec)
        self.channels = channels = channels_of(spec)
        kh, kw = method.stencil_size(spec)
        of_step = isinstance(spec, StepSpec)
        self.post = spec.post if of_step else None
        self.stencil = nn.Parameter(torch.empty(channels, kh, kw))
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, **_norm_options(spec)) if of_step else nn.BatchNorm2d(channels)
        if method.learn_step:
            self.log_step = nn.Parameter(torch.tensor(method.step).log())
        else:
            self.fixed_step = method.step
        nn.init.kaiming_normal_(self.mix.weight)
        nn.init.normal_(self.stencil)
        self._diffuse_little_()

    @property
    def bias(self) -> None:
        """A step has no bias; hosts ask."""
        return

    @property
    def step(self) -> Tensor | float:
        """The step's length h."""
        return self.log_step.exp() if "log_step" in self._parameters else self.fixed_step

    def reaction(self, y: Tensor) -> Tensor:
        """Return relu(N(M y))."""
        return F.relu(self.norm(self.mix(y)))

    @torch.no_grad()
    def lowered_reaction(self) -> Reaction:
        """Return h relu(N(M y)) with frozen weights."""
        return Reaction(self.mix.weight.detach(), self.norm, float(self.step))

    @torch.no_grad()
    def _diffuse_little_(self) -> None:
        """Scale the stencil so that h max|k^|^2 is START_GAIN."""
        self.stencil.mul_((START_GAIN / self.amplification(self.stencil)).sqrt().to(self.stencil))

    @abstractmethod
    def amplification(self, stencil: Tensor | None = None) -> Tensor:
        """Return h max|k^|^2, the largest eigenvalue of h K^T K; of `stencil`, or of the one in use."""

    @torch.no_grad()
    def project_(self, original: nn.Module) -> Fit:  # noqa: ARG002  # nothing in its weights says what relu did
        """Take on the stated start: the identity up to a little diffusion, the reaction all but off.

        N gives REACTION_START everywhere: at zero, relu lets no gradient through. The error is not known.
        """
        self._diffuse_little_()
        nn.init.zeros_(self.norm.weight)
        nn.init.constant_(self.norm.bias, REACTION_START)
        self.norm.reset_running_stats()
        return Fit(how="weights")

    def statistics(self, *, free_means: bool) -> Activations:  # noqa: ARG002  # a step is never before a norm
        """Return an empty record of inputs and outputs."""
        return Activations()

    @torch.no_grad()
    def fit_(self, statistics: Statistics) -> Fit:
        """Regress onto the recorded outputs from a linear start; errors are of held-out images."""
        if not isinstance(statistics, Activations):
            raise TypeError("these statistics were made by another kind of operator")
        fitted, held_out = statistics.split()
        start_error = error_of(self, held_out)
        found = [(start_error, self._weights())]
        self._start_(fitted)
        found.append((error_of(self, held_out), self._weights()))
        unit = self._output_size(fitted)
        regress_(
            self, fitted, after_step=self.restrain_, units={self.norm.weight: unit, self.norm.bias: unit}
        )
        estimate_norm_(self, self.norm, fitted)
        found.append((error_of(self, held_out), self._weights()))
        error, weights = min(found, key=lambda pair: pair[0])  # what training did not improve on is kept
        self.load_state_dict(weights)
        return Fit(how="data", start_error=start_error, relative_error=error, samples=statistics.positions)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def _output_size(self, samples: list[tuple[Tensor, Tensor]]) -> float:
        """Return the root mean square of the wanted outputs, over h: the size of N's affine part."""
        squares = sum(float(y.double().square().sum()) for _, y in samples)
        return (squares / sum(y.numel() for _, y in samples)) ** 0.5 / float(self.step) or 1.0

    def restrain_(self) -> None:
        """Bring the parameters back to where the step is stable."""

    def _start_(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        """Let M predict what the original adds, by least squares, and N leave it as it is."""
        x = torch.cat([x.movedim(1, -1).flatten(0, -2) for x, _ in samples])
        added = torch.cat([(y - x).movedim(1, -1).flatten(0, -2) for x, y in samples])
        x, mean = x - x.mean(0), added.mean(0)
        moments = x.T @ x
        ridge = 1e-2 * moments.diagonal().mean() + torch.finfo(moments.dtype).tiny
        matrix = torch.linalg.solve(
            moments + ridge * torch.eye(len(moments)).to(moments), x.T @ (added - mean)
        ).T
        self.mix.weight.copy_(matrix[:, :, None, None])
        self.norm.weight.copy_((x @ matrix.T).std(0, correction=0) / self.step)
        self.norm.bias.copy_(mean / self.step)
        estimate_norm_(self, self.norm, samples)


def _norm_options(spec: StepSpec) -> dict[str, Any]:
    return {"eps": spec.norm_eps, "momentum": spec.norm_momentum}

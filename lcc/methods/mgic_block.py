"""The block form of multigrid in channels: the host's block at every width, in one cycle of corrections.

z_L = B_L(x_L) with x_{l+1} = R_l x_l, then z_l = B_l(x_l + N_l(P_l(z_{l+1} - x_{l+1}))) up to the finest; a
stage-changing block has an opening convolution before that. Differs from the released code, unless
`as_released` asks for its quirks: one skip per block, no BatchNorm after R, squeezes halved with the width.
Source: arXiv:2011.09128.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.convolutions import convolution
from lcc.methods.base import Fit, LowCostOp, Lowering
from lcc.methods.mgic_start import start_
from lcc.ops.activations import activate
from lcc.ops.regression import Activations, error_of, estimate_norm_, regress_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.methods.base import Statistics
    from lcc.methods.mgic import Mgic
    from lcc.methods.mgic_design import Design, Gate
    from lcc.ops.regression import Samples
    from lcc.specs import Activation, Size, StepSpec

# How fast the regression moves kernels, in units of their size: at a step of the demo's ResNet-20 (layer2.1,
# group_size 8) 1, 4, 8 and 16 end with errors of 0.26, 0.21, 0.20 and 0.19.
KERNEL_PACE = 8.0


class MgicBlock(LowCostOp):
    """One multigrid cycle in place of a residual step or a stage-changing block.

    Fresh weights are drawn as the released networks draw theirs (R and P too). Stochastic depth of the
    original is not carried over.
    """

    spec: StepSpec

    def __init__(self, method: Mgic, spec: StepSpec) -> None:
        super().__init__(method, spec)
        self.design = method.design(spec)
        self.cycle = Cycle(self.design, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        y: Tensor = self.cycle(x)
        return y

    @torch.no_grad()
    def project_(self, original: nn.Module) -> Fit:
        """Take on the stated start of `lcc.methods.mgic_start`; its error is not known."""
        start_(self.cycle, self.spec, original)
        return Fit(how="weights")

    def statistics(self, *, free_means: bool) -> Activations:  # noqa: ARG002  # a block is never before a norm
        """Return an empty record of inputs and outputs."""
        return Activations()

    @torch.no_grad()
    def fit_(self, statistics: Statistics) -> Fit:
        """Regress onto the recorded outputs from the start; errors are of held-out images."""
        if not isinstance(statistics, Activations):
            raise TypeError("these statistics were made by another kind of operator")
        fitted, held_out = statistics.split()
        start_error = error_of(self, held_out)
        start = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self._settle_(fitted, keep_function=True)
        regress_(self, fitted, after_step=_nothing, units=self._units(fitted))
        self._settle_(fitted, keep_function=False)
        error = error_of(self, held_out)
        if not error < start_error:  # nor where training went astray
            error = start_error
            self.load_state_dict(start)
        return Fit(how="data", start_error=start_error, relative_error=error, samples=statistics.positions)

    def _settle_(self, samples: list[Samples], *, keep_function: bool) -> None:
        """Give every BatchNorm, in order of call, the statistics of its inputs.

        `keep_function`: its affine part makes up for that, so that training starts from the same function.
        """
        for norm in self.cycle.norms():
            before = _scale_and_shift(norm)
            estimate_norm_(self, norm, samples)
            if keep_function:
                scale, shift = before
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())
                norm.bias.copy_(shift + scale * norm.running_mean)

    def _units(self, samples: list[Samples]) -> dict[nn.Parameter, float]:
        """Return the parameters' sizes: the outputs' in a norm that gives such, else the present ones.

        Those of convolutions count `KERNEL_PACE` times.
        """
        squares = sum(float(y.double().square().sum()) for _, y in samples)
        output = (squares / sum(y.numel() for _, y in samples)) ** 0.5 or 1.0
        units = {p: float(p.double().square().mean()) ** 0.5 or 1.0 for p in self.parameters()}
        units |= {p: KERNEL_PACE * unit for p, unit in units.items() if p.ndim == 4}
        for norm in self.cycle.outer_norms():
            units[norm.weight] = units[norm.bias] = output
        return units

    @torch.no_grad()
    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:  # noqa: ARG002  # always exact
        """Return the cycle itself, of convolutions that ONNX Runtime fuses with their norms."""
        frozen = copy.deepcopy(self.cycle).requires_grad_(requires_grad=False)
        return (Lowering(frozen.eval()),)


class Cycle(nn.Module):
    """The opening, if there is one, and one cycle through the levels."""

    def __init__(self, design: Design, spec: StepSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.opening = None if design.opening is None else convolution(design.opening)
        self.opening_norm = _norm(spec.channels, spec) if design.opens_normed else None
        self.finest = _from_level(design, 0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""
        if self.opening is not None:
            x = self.opening(x)
        if self.opening_norm is not None:
            x = activate(self.opening_norm(x), self.activation)
        y: Tensor = self.finest(x)
        return y

    def levels(self) -> Iterator[Level]:
        """Yield every level but the coarsest, the finest first."""
        level: Level | Block = self.finest
        while isinstance(level, Level):
            yield level
            level = level.coarser

    @property
    def coarsest(self) -> Block:
        """The block at the coarsest level."""
        *_, last = self.levels()
        assert isinstance(last.coarser, Block)
        return last.coarser

    def blocks(self) -> Iterator[Block]:
        """Yield the block of every level, the finest first."""
        yield from (level.block for level in self.levels())
        yield self.coarsest

    def norms(self) -> Iterator[nn.BatchNorm2d]:
        """Yield every BatchNorm in order of call."""
        if self.opening_norm is not None:
            yield self.opening_norm
        yield from self.finest.norms_in_order()

    def outer_norms(self) -> Iterator[nn.BatchNorm2d]:
        """Yield those whose results are measured as the block's inputs and outputs are."""
        inner = {norm for block in self.blocks() for norm in block.norms[:-1]}
        yield from (norm for norm in self.norms() if norm not in inner)


class Level(nn.Module):
    """z = B(x + N(P(z' - R x))), z' what the coarser levels make of R x."""

    def __init__(self, design: Design, depth: int) -> None:
        super().__init__()
        step, down, up = design.levels[depth]
        assert down is not None
        assert up is not None
        self.down, self.up = convolution(down), convolution(up)
        self.down_norm = _norm(down.out_channels, step) if design.norms_down else None
        self.coarser = _from_level(design, depth + 1)
        self.up_norm = _norm(up.out_channels, step)
        self.block = Block(step, design)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        coarse = self.down(x)
        if self.down_norm is not None:
            coarse = self.down_norm(coarse)
        correction = self.coarser(coarse) - coarse
        z: Tensor = self.block(x + self.up_norm(self.up(correction)))
        return z

    def norms_in_order(self) -> Iterator[nn.BatchNorm2d]:
        """Yield every BatchNorm in order of call."""
        if self.down_norm is not None:
            yield self.down_norm
        yield from self.coarser.norms_in_order()
        yield self.up_norm
        yield from self.block.norms_in_order()


class Block(nn.Module):
    """post(u + F(u)), F of convolutions with a BatchNorm each and an activation between."""

    def __init__(self, step: StepSpec, design: Design, *, clips: bool = False) -> None:
        super().__init__()
        self.activation, self.post = step.activation, step.post
        self.gated, self.gates_first = design.gated, design.gates_first
        self.clips, self.skips_twice = clips or design.skips_twice, design.skips_twice
        self.convs = nn.ModuleList(convolution(conv) for conv in step.convs)
        self.norms = nn.ModuleList(_norm(conv.out_channels, step) for conv in step.convs)
        self.gate = SqueezeAndExcitation(step, design.gate) if step.squeeze else None

    def forward(self, u: Tensor) -> Tensor:
        """Return (N, C, H, W) for u (N, C, H, W)."""
        y = u
        last = len(self.convs) - 1
        for number, (conv, norm) in enumerate(self.layers()):
            y = norm(conv(y))
            gate = self.gate if number == self.gated else None
            if gate is not None and self.gates_first:
                y = gate(y)
            if number < last:
                y = activate(y, self.activation)
            if gate is not None and not self.gates_first:
                y = gate(y)
        if self.skips_twice:
            y = F.relu(y + u)
        elif self.clips:
            y = F.relu(y)
        return activate(u + y, self.post)

    def norms_in_order(self) -> Iterator[nn.BatchNorm2d]:
        """Yield every BatchNorm in order of call."""
        yield from (norm for _, norm in self.layers())

    def layers(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Yield every convolution with its BatchNorm, in order of call."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            yield conv, norm


class SqueezeAndExcitation(nn.Module):
    """x times gate(G relu(H(mean of x))), or silu where the block's own activation is that."""

    def __init__(self, step: StepSpec, gate: Gate) -> None:
        super().__init__()
        self.squeeze, self.excite = (convolution(conv) for conv in step.squeeze)
        self.activation: Activation = "silu" if step.activation == "silu" else "relu"
        self.gate = F.hardsigmoid if gate == "hardsigmoid" else torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) for x (N, C, H, W)."""
        y = activate(self.squeeze(x.mean((2, 3), keepdim=True)), self.activation)
        return x * self.gate(self.excite(y))


def _from_level(design: Design, depth: int) -> Level | Block:
    if depth < len(design.levels) - 1:
        return Level(design, depth)
    return Block(design.levels[depth].step, design, clips=design.clips_coarsest)


def _norm(channels: int, spec: StepSpec) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=spec.norm_eps, momentum=spec.norm_momentum)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (a, b) with which a norm in eval mode gives a x + b."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - scale * norm.running_mean


def _nothing() -> None:
    """Do nothing after a step of the regression: every weight is allowed."""

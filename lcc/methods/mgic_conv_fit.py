"""How the conv form of multigrid in channels is fitted to recorded activations.

It is linear in each of its weights, but not in all together: all are trained at once from the start, and then
K_0 is solved for, given the others. Solving for K_L to K_0 in turn, R and P being averages, was worse at each
of the 16 equal-channel 3x3 convolutions of a CIFAR-10 ResNet-20 (group_size 8, coarsest 8, 256 images, every
fifth held out: mean relative error 0.53 instead of 0.36; the start has 0.79), and so was training from there
(0.44 instead of 0.37 at three of them, before the last step). Training K alone gave 0.46 there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.methods.base import Fit
from lcc.methods.dense import DenseConv
from lcc.ops.fit import relative_error
from lcc.ops.regression import Activations, regress_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lcc.methods.mgic_conv import MgicConv
    from lcc.ops.regression import Samples

PACE = 10.0  # of the training, in what `regress_` takes for numbers of size 1; 4 and 20 were no better
CHUNK = 32  # images, where no gradient is taken


class ConvActivations(Activations):
    """Inputs and wanted outputs of a convolution; `free_means`: a BatchNorm follows, their means are free."""

    def __init__(self, *, free_means: bool) -> None:
        super().__init__()
        self.free_means = free_means

    def by_size(self) -> Iterator[list[Samples]]:
        """Yield the calls on every size, images in order."""
        yield from self._calls.values()


@torch.no_grad()
def fit_(op: MgicConv, statistics: ConvActivations) -> Fit:
    """Take on what has the least error on held-out images: the start, the start but for K_0, or all new.

    Errors are about the channels' means where a BatchNorm or a bias makes them free.
    """
    centered = statistics.free_means or op.spec.bias
    fitted, held_out = statistics.split()
    start = _weights(op)
    found = [(_error(op, held_out, centered=centered), start)]
    _solve_finest_(op, statistics, free_means=centered)
    found.append((_error(op, held_out, centered=centered), _weights(op)))
    op.load_state_dict(start)
    _train_(op, fitted, centered=centered)
    _solve_finest_(op, statistics, free_means=centered)
    found.append((_error(op, held_out, centered=centered), _weights(op)))
    error, weights = min(found, key=lambda pair: pair[0])
    op.load_state_dict(weights)
    samples = sum(y.numel() // y.shape[1] for calls in statistics.by_size() for _, y in calls)
    return Fit(how="data", start_error=found[0][0], relative_error=error, samples=samples)


class _Shifted(nn.Module):
    """The operator and a number added to every channel: the mean, which a bias or a BatchNorm sets anyway."""

    def __init__(self, op: MgicConv, shift: Tensor) -> None:
        super().__init__()
        self.op, self.shift = op, nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x) + self.shift[:, None, None]
        return y


def _train_(op: MgicConv, samples: list[Samples], *, centered: bool) -> None:
    """Train K, R and P, each at a pace relative to its size; a shift stands in for means that are free."""
    units = {p: PACE * (float(p.double().square().mean()) ** 0.5 or 1.0) for p in op.parameters()}
    units |= {p: 0.0 for p in op.parameters() if p is op.bias}
    if not centered:
        regress_(op, samples, after_step=_nothing, units=units)
        return
    residual = _Moments(op, samples)
    shifted = _Shifted(op, -residual.mean_error.to(op.finest.weight))
    units[shifted.shift] = residual.spread or 1.0
    regress_(shifted, samples, after_step=_nothing, units=units)


def _solve_finest_(op: MgicConv, statistics: ConvActivations, *, free_means: bool) -> None:
    """Solve for K_0 and the bias by ridge least squares, all else given."""
    solver = DenseConv(op.method, op.level_specs[0]).to(op.finest.weight)
    solver.load_state_dict(op.finest.state_dict())
    seen = solver.statistics(free_means=free_means)
    for calls in statistics.by_size():
        seen.images = 0  # so that it holds out the images that the record does
        for x, y in calls:
            seen.add(torch.cat([op.seen(part, 0) for part in x.split(CHUNK)]), y)
    solver.fit_(seen)
    op.finest.load_state_dict(solver.state_dict())


class _Moments:
    """What the operator's errors add up to, (C_out,) each: mean, squares, squares about the channels' means.

    `norms` are those of the wanted outputs, and `spread` is their standard deviation over all channels.
    """

    def __init__(self, op: MgicConv, samples: list[Samples]) -> None:
        sums = torch.zeros(4, op.out_channels, dtype=torch.float64, device=op.finest.weight.device)
        count = 0
        for inputs, outputs in samples:
            for x, y in zip(inputs.split(CHUNK), outputs.split(CHUNK), strict=True):
                wanted, lost = y.double(), op(x).double() - y
                parts = (lost, lost.square(), wanted, wanted.square())
                sums += torch.stack([part.sum((0, 2, 3)) for part in parts])
                count += y.numel() // y.shape[1]
        self.mean_error = sums[0] / count
        self.squares, self.norms = sums[1], sums[3]
        self.squares_about_means = (sums[1] - sums[0].square() / count).clamp_min(0)
        self.norms_about_means = (sums[3] - sums[2].square() / count).clamp_min(0)
        self.spread = float(self.norms_about_means.sum() / count / op.out_channels) ** 0.5


def _error(op: MgicConv, samples: list[Samples], *, centered: bool) -> float:
    """Return |op(x) - y| / |y|, about the channels' means if `centered`."""
    found = _Moments(op, samples)
    if centered:
        return relative_error(found.squares_about_means, found.norms_about_means)
    return relative_error(found.squares, found.norms)


def _weights(op: MgicConv) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in op.state_dict().items()}


def _nothing() -> None:
    """Nothing is to be done after a step: every weight is allowed."""

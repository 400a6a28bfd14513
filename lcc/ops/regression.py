"""Regression of a module onto recorded activations: for operators that are not linear in their parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.ops.fit import HELD_OUT_EVERY, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Samples = tuple[Tensor, Tensor]  # inputs and wanted outputs, (N, C, H, W) each

MAX_NUMBERS = 2**27  # kept of the inputs, and of the outputs; later images are left out
STEPS = 300
POSITIONS = 32_768  # in the batch of a step
LEARNING_RATE = 5e-3
CHUNK = 32  # images, where no gradient is taken


class Activations:
    """Inputs and wanted outputs of a site, as many images as fit; calls on several sizes are kept apart."""

    def __init__(self) -> None:
        self._calls: dict[torch.Size, list[Samples]] = {}
        self._kept = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C, H, W) inputs and outputs."""
        room = (MAX_NUMBERS - self._kept) // inputs[0].numel()
        if room == 0:
            return
        x, y = inputs[:room].detach().clone(), outputs[:room].detach().clone()
        self._kept += x.numel()
        self._calls.setdefault(inputs.shape[2:], []).append((x, y))

    @property
    def positions(self) -> int:
        """How many pixels were taken in, over all images."""
        return sum(x.numel() // x.shape[1] for calls in self._calls.values() for x, _ in calls)

    def split(self) -> tuple[list[Samples], list[Samples]]:
        """Return what to fit to and what to judge by, one entry per size; the same if images are few.

        Raises: ValueError: there are numbers that are not finite.
        """
        fitted, held_out = [], []
        for calls in self._calls.values():
            x, y = (torch.cat(part) for part in zip(*calls, strict=True))
            if not bool(x.isfinite().all() and y.isfinite().all()):
                raise ValueError("activations are not finite")
            chosen = torch.arange(1, len(x) + 1, device=x.device) % HELD_OUT_EVERY == 0
            fitted.append((x[~chosen], y[~chosen]))
            held_out.append((x[chosen], y[chosen]))
        if any(len(x) == 0 for x, _ in held_out):
            both = [
                (torch.cat([a, c]), torch.cat([b, d]))
                for (a, b), (c, d) in zip(fitted, held_out, strict=True)
            ]
            return both, both
        return fitted, held_out


def regress_(
    module: nn.Module,
    samples: list[Samples],
    *,
    after_step: Callable[[], None],
    units: Mapping[nn.Parameter, float] | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> None:
    """Fit the module's parameters to the samples by Adam on the squared error.

    BatchNorms use the batch's statistics meanwhile. `after_step` brings parameters back to where they may
    be. `units` are the sizes of parameters that are measured in those of the outputs, others being plain
    numbers: the result then does not depend on the scale. The module is left in eval mode.
    """
    scale = float(sum(y.double().square().sum() for _, y in samples)) / sum(y.numel() for _, y in samples)
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True).train()
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": LEARNING_RATE * (units or {}).get(p, 1.0)} for p in module.parameters()],
        eps=1e-30,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with torch.enable_grad():
        for x, y in _batches(samples, steps, seed):
            optimizer.zero_grad()
            (F.mse_loss(module(x), y) / (scale or 1.0)).backward()
            optimizer.step()
            schedule.step()
            after_step()
    for parameter, wanted in gradients:
        parameter.requires_grad_(wanted).grad = None
    module.eval()


@torch.no_grad()
def estimate_norm_(module: nn.Module, norm: nn.BatchNorm2d, samples: list[Samples]) -> None:
    """Give the module's one BatchNorm the statistics of all inputs; the module is left in eval mode."""
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None
    assert running_var is not None
    total, squares, count = (torch.zeros_like(running_mean, dtype=torch.float64) for _ in range(3))

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double()
        total.add_(values.sum((0, 2, 3)))
        squares.add_(values.square().sum((0, 2, 3)))
        count.add_(values.numel() // values.shape[1])

    module.eval()
    handle = norm.register_forward_pre_hook(see)
    for x, _ in _chunks(samples):
        module(x)
    handle.remove()
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0) * count / (count - 1).clamp_min(1)
    running_mean.copy_(mean)
    running_var.copy_(variance)


@torch.no_grad()
def error_of(module: nn.Module, samples: list[Samples]) -> float:
    """Return |module(x) - y| / |y| over all samples, in eval mode."""
    module.eval()
    errors, norms = [], []
    for x, y in _chunks(samples):
        errors.append((module(x) - y).double().square().sum())
        norms.append(y.double().square().sum())
    return relative_error(torch.stack(errors), torch.stack(norms))


def _batches(samples: list[Samples], steps: int, seed: int) -> Iterator[Samples]:
    """Yield seeded random batches, the sizes in turn."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x, y = samples[step % len(samples)]
        count = max(4, POSITIONS // (x.shape[2] * x.shape[3]))
        chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        if len(chosen) * y.shape[2] * y.shape[3] == 1:
            chosen = chosen.repeat(2)  # a BatchNorm wants two values
        yield x[chosen], y[chosen]


def _chunks(samples: list[Samples]) -> Iterator[Samples]:
    for x, y in samples:
        yield from zip(x.split(CHUNK), y.split(CHUNK), strict=True)

"""Running a network on [original; converted] in one batch, and how many images fit in memory so.

A BatchNorm for which the halves differ keeps its statistics for the first and takes on others for the second.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.memory import free_memory
from lcc.ops.moments import moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lcc.methods import LowCostOp

# Peak memory over the estimate of `_bytes_of_an_image` (measured: resnet18 1.10, resnet50 1.42,
# vgg11_bn 0.88), and the share of free memory that it may take.
MARGIN = 1.45
MEMORY_SHARE = 0.8
# A channel that was dead and is not: it is shrunk, by so much at most, as if it still were.
DEAD, STRETCH = 1e-20, 1e-12


def run_two_streams(
    model: nn.Module, forwards: dict[LowCostOp, Callable[[Tensor], Tensor]], parts: tuple[Tensor, ...]
) -> None:
    """Send every part through as [original; converted]; set the BatchNorms for which the halves differ.

    Those inside an operator are its own affair: it sees one half only.
    """
    inside = {module for operator in forwards for module in operator.modules()}
    streams: list[_TwoStreamNorm] = []
    with ExitStack() as stack:
        for operator, forward in forwards.items():
            stack.enter_context(forward_as(operator, forward))
        for norm in [m for m in model.modules() if isinstance(m, _BatchNorm) and m not in inside]:
            if norm.running_mean is None:
                stack.enter_context(forward_as(norm, partial(_each_half, norm)))
            else:
                streams.append(_TwoStreamNorm(norm))
                stack.enter_context(forward_as(norm, streams[-1]))
        for part in parts:
            for stream in streams:
                stream.images = len(part)
            model(torch.cat([part, part]).to(device_of(model)))


class _TwoStreamNorm:
    """A BatchNorm that keeps its statistics for the first half and takes on those of the second.

    Not the images' own: augmentation, and the share of images seen, set the original's apart from them. What
    takes the first half's mean and variance to the second's takes the original's statistics along, so that a
    converted layer that computes the same changes nothing.
    Moments of several calls are averaged, each call weighted by its images. Both halves go through the
    module's own forward: a subclass may do more than normalise (timm's has the activation in it).
    Where a host cuts images into parts, the halves may lie anywhere: all go by the original's statistics.
    """

    images = 0  # in one half of what the network is given

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.running = norm, (norm.running_mean, norm.running_var)
        self.original = self.converted = tuple(tensor.clone() for tensor in self.running)
        self.moments: tuple[Tensor, ...] = ()  # variance and mean of the first half, then of the second
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return both halves normalised, the second one by statistics of its own if it differs."""
        if len(x) != 2 * self.images:
            return self._forward(x, self.original)
        original_half, converted_half = x.chunk(2)
        wanted = self._forward(original_half, self.original)
        if torch.equal(original_half, converted_half):
            self._set(self.converted)
            return torch.cat([wanted, wanted])
        self._take_in(original_half, converted_half)
        return torch.cat([wanted, self._forward(converted_half, self.converted)])

    def _take_in(self, original_half: Tensor, converted_half: Tensor) -> None:
        seen = (*moments(original_half), *moments(converted_half))
        self.count += len(original_half)
        share = len(original_half) / self.count
        self.moments = tuple(a.lerp(b, share) for a, b in zip(self.moments or seen, seen, strict=True))
        exact = torch.promote_types(self.original[0].dtype, torch.float32)
        mean, var, old_var, old_mean, new_var, new_mean = (
            moment.to(exact) for moment in (*self.original, *self.moments)
        )
        eps, largest = self.norm.eps, torch.finfo(self.original[0].dtype).max
        both_dead = (old_var == 0) & (new_var == 0)
        squared = torch.where(both_dead, 1, new_var / old_var.clamp_min(DEAD)).clamp_max(1 / STRETCH)
        self.converted = (
            new_mean + squared.sqrt() * (mean - old_mean),
            (squared * (var + eps) - eps).clamp(0, largest),
        )

    def _forward(self, x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        self._set(statistics)
        return type(self.norm).forward(self.norm, x)

    def _set(self, statistics: tuple[Tensor, ...]) -> None:
        for tensor, value in zip(self.running, statistics, strict=True):
            tensor.copy_(value)


def _each_half(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Run a BatchNorm without running statistics, whose result depends on all it is given at once."""
    return torch.cat([type(norm).forward(norm, half) for half in x.chunk(2)])


@contextmanager
def forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the module compute `forward` for a while."""
    replaced = {key: value for key, value in vars(module).items() if key == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(replaced)


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Let the module compute what its class says for a while, within `forward_as`."""
    replaced = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            vars(module)["forward"] = replaced


def images_at_once(model: nn.Module, images: Tensor) -> int:
    """Return how many images can go through in two streams, judged by one image and the free memory."""
    device = device_of(model)
    needed = 2 * MARGIN * _bytes_of_an_image(model, images[:1].to(device))
    return max(1, int(free_memory(device) * MEMORY_SHARE / needed))


def _bytes_of_an_image(model: nn.Module, image: Tensor) -> int:
    """Return the most bytes that outputs hold at one time, and one output more, where halves are joined."""
    owners: set[int] = set()
    live = peak = image.numel() * image.element_size()

    def forget(owner: int, size: int) -> None:
        nonlocal live
        owners.discard(owner)
        live -= size

    def on_forward(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
        nonlocal live, peak
        if not isinstance(output, Tensor):
            return
        owner, size = output.data_ptr(), output.numel() * output.element_size()
        if owner not in owners:  # else a module that works in place
            owners.add(owner)
            live += size
            weakref.finalize(output, forget, owner, size)
        peak = max(peak, live + size)

    handles = [m.register_forward_hook(on_forward) for m in model.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return peak


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters are; the CPU if there are none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device

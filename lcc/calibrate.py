"""Weights for operators from unlabelled images: one pass, two streams, and BatchNorm statistics on the way.

The images go through the network twice in one batch, `[original; converted]`. Layers that stay treat both
halves alike. A site sends the first half through its dense original, fits its operator to (second half's
input -> first half's output) at that moment, and sends the second half on through the fitted operator. A
BatchNorm behind a converted site takes on the statistics of the second half. So every site is fitted to the
inputs that it will really see, in call order, without tracing a graph.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.methods import Fit, LowCostOp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lcc.methods import Statistics
    from lcc.plan import Site

# Live activations at any moment, as a multiple of the largest input plus output of one module (measured on
# ResNets: 1.6 to 2.1), and the share of free memory that they may take.
LIVE_FACTOR = 2.5
MEMORY_SHARE = 0.7


class Calibration(NamedTuple):
    """The fit of every site; `chunks` > 1: the images did not fit in memory at once.

    In chunks a site's inputs come from the original network instead of the converted prefix.
    """

    fits: dict[str, Fit]
    chunks: int


def project_(model: nn.Module, originals: dict[str, nn.Conv2d]) -> dict[str, Fit]:
    """Give every operator the weights closest to its original's, without data; return the fits."""
    return {name: _operator(model, name).project_(conv) for name, conv in originals.items()}


def calibrate_(
    model: nn.Module,
    originals: dict[str, nn.Conv2d],
    sites: tuple[Site, ...],
    images: Tensor,
    *,
    on_site: Callable[[str, Fit], None] | None = None,
) -> Calibration:
    """Fit every operator to its original on images (N, C, H, W), and re-estimate BatchNorms behind them.

    The model is left in eval mode. `on_site` is called with each new fit.
    """
    model.eval()
    project_(model, originals)
    norms = {site.name: site.norm for site in sites}
    streams = [
        _Stream(_operator(model, name), conv, name, norm=norms.get(name), on_site=on_site)
        for name, conv in originals.items()
    ]
    chunk = _images_at_once(model, images)
    with torch.no_grad():
        if len(images) <= chunk:
            _in_one_batch(model, streams, images)
        else:
            _in_chunks(model, streams, images, chunk)
    return Calibration(
        fits={stream.name: stream.fit for stream in streams if stream.fit is not None},
        chunks=-(-len(images) // chunk),
    )


class _Stream:
    """One site during calibration: its operator, its dense original, and what was seen so far."""

    def __init__(
        self,
        operator: LowCostOp,
        original: nn.Conv2d,
        name: str,
        *,
        norm: str | None,
        on_site: Callable[[str, Fit], None] | None,
    ) -> None:
        self.operator, self.original, self.name = operator, original, name
        self.has_norm = norm is not None
        self.start = {key: value.clone() for key, value in operator.state_dict().items()}
        self.start_norms = operator.weight_norms()
        self.statistics: Statistics = operator.statistics(free_means=self.has_norm)
        self.fit: Fit | None = None
        self.on_site = on_site

    def watch(self, x: Tensor) -> Tensor:
        """Run the original and remember what it did."""
        y: Tensor = self.original(x)
        self.statistics.add(x, y)
        return y

    def both(self, x: Tensor) -> Tensor:
        """Run [original; converted], fitting the operator in between. A second call fits to both calls."""
        original_half, converted_half = x.chunk(2)
        wanted: Tensor = self.original(original_half)
        self.statistics.add(converted_half, wanted)
        self.solve()
        return torch.cat([wanted, type(self.operator).forward(self.operator, converted_half)])

    def solve(self) -> None:
        """Fit the operator; where a BatchNorm follows, bring each channel back to the start's norm.

        Least squares returns weights of several times the start's norm. Behind a BatchNorm the function
        does not depend on it, but the effective learning rate of fine-tuning does.
        """
        self.operator.load_state_dict(self.start)
        self.fit = self.operator.fit_(self.statistics)
        if self.has_norm:
            norms = self.operator.weight_norms()
            self.operator.scale_(torch.where(norms > 0, self.start_norms / norms.clamp_min(1e-30), 1.0))
        if self.on_site is not None:
            self.on_site(self.name, self.fit)


def _in_one_batch(model: nn.Module, streams: list[_Stream], images: Tensor) -> None:
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(_forward_as(stream.operator, stream.both))
        for norm in _norms(model):
            stack.enter_context(_forward_as(norm, _TwoStreamNorm(norm)))
        model(torch.cat([images, images]).to(_device(model)))


def _in_chunks(model: nn.Module, streams: list[_Stream], images: Tensor, chunk: int) -> None:
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(_forward_as(stream.operator, stream.watch))
        for part in images.split(chunk):
            model(part.to(_device(model)))
    for stream in streams:
        stream.solve()
    reestimate_norms_(model, images, chunk)


class _TwoStreamNorm:
    """A BatchNorm that keeps its statistics for the first half and takes on those of the second."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.seen: list[tuple[Tensor, Tensor]] = []
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def __call__(self, x: Tensor) -> Tensor:
        """Return both halves normalised, the second one by its own statistics if it differs."""
        original_half, converted_half = x.chunk(2)
        wanted = self._normalise(original_half, self.mean, self.var)
        if torch.equal(original_half, converted_half):
            return torch.cat([wanted, wanted])
        dims = [d for d in range(x.ndim) if d != 1]
        self.seen.append((converted_half.mean(dims), converted_half.var(dims)))
        mean = torch.stack([mean for mean, _ in self.seen]).mean(0)
        var = torch.stack([var for _, var in self.seen]).mean(0)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(var)
        return torch.cat([wanted, self._normalise(converted_half, mean, var)])

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, training=False, eps=self.norm.eps)


@torch.no_grad()
def reestimate_norms_(model: nn.Module, images: Tensor, chunk: int) -> None:
    """Set the running statistics of every BatchNorm that the images show to differ, by one pass in chunks."""
    norms = _norms(model)
    modes = {norm: (norm.training, norm.momentum) for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # cumulative average
    try:
        for part in images.split(chunk):
            model(part.to(_device(model)))
    finally:
        for norm, (training, momentum) in modes.items():
            norm.training, norm.momentum = training, momentum


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the module compute `forward` for a while."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


def _images_at_once(model: nn.Module, images: Tensor) -> int:
    """Return how many images can go through in two streams, judged by one image and the free memory."""
    largest = 0

    def on_forward(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    handles = [m.register_forward_hook(on_forward) for m in model.modules() if not list(m.children())]
    device = _device(model)
    try:
        with torch.no_grad():
            model(images[:1].to(device))
    finally:
        for handle in handles:
            handle.remove()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, int(free * MEMORY_SHARE / (2 * LIVE_FACTOR * max(largest, 1))))


def _operator(model: nn.Module, name: str) -> LowCostOp:
    module = model.get_submodule(name)
    if not isinstance(module, LowCostOp):
        raise TypeError(f"{name} was not replaced")
    return module


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Weights for operators from unlabelled images: one pass, two streams, and BatchNorm statistics on the way.

The images go through the network twice in one batch, `[original; converted]`. Layers that stay treat both
halves alike. A site sends the first half through its dense original, fits its operator to (second half's
input -> first half's output) at that moment, and sends the second half on through the fitted operator. A
BatchNorm behind a converted site takes on the statistics of the second half. So every site is fitted to the
inputs that it will really see, in call order, without tracing a graph.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.errors import DataError
from lcc.methods import Fit, LinearOp, LowCostOp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lcc.methods import Statistics
    from lcc.plan import Site

# Peak memory over the estimate of `_bytes_of_an_image` (measured: resnet18 1.10, resnet50 1.42,
# vgg11_bn 0.88), and the share of free memory that it may take.
MARGIN = 1.45
MEMORY_SHARE = 0.8


class Store(Protocol):
    """Where fits are kept while others are made, so that an interrupted calibration can go on."""

    def restore_(self, site: str, operator: LowCostOp) -> Fit | None:
        """Give the operator the weights kept for it and return its fit; None if there are none."""

    def keep(self, site: str, operator: LowCostOp, fit: Fit) -> None:
        """Write down a fitted site."""


class Calibration(NamedTuple):
    """The fit of every site; `chunks` > 1: the images did not fit in memory at once.

    In chunks a site's inputs come from the original network instead of the converted prefix, and BatchNorm
    statistics are averages over the chunks. A site that the images never reach keeps its projection.
    """

    fits: dict[str, Fit]
    chunks: int


def project_(model: nn.Module, originals: dict[str, nn.Module]) -> dict[str, Fit]:
    """Give every operator the weights closest to its original's, without data; return the fits."""
    return {name: _operator(model, name).project_(conv) for name, conv in originals.items()}


def calibrate_(
    model: nn.Module,
    originals: dict[str, nn.Module],
    sites: tuple[Site, ...],
    images: Tensor,
    *,
    on_site: Callable[[str, Fit], None] | None = None,
    store: Store | None = None,
) -> Calibration:
    """Fit every operator to its original on images (N, C, H, W), and re-estimate BatchNorms behind them.

    The model is left in eval mode. `on_site` is called with each new fit. What `store` has is not fitted
    again.
    """
    model.eval()
    for original in originals.values():
        original.eval()
    projected = project_(model, originals)
    by_name = {site.name: site for site in sites}
    streams = [
        _Stream(_operator(model, name), original, by_name[name], on_site=on_site, store=store)
        for name, original in originals.items()
    ]
    chunk = _images_at_once(model, images)
    with torch.no_grad():
        if len(images) <= chunk:
            _in_one_batch(model, streams, images)
        else:
            _in_chunks(model, streams, images, chunk)
    return Calibration(
        fits={stream.name: stream.fit or projected[stream.name] for stream in streams},
        chunks=-(-len(images) // chunk),
    )


class _Stream:
    """One site during calibration: its operator, its dense original, and what was seen so far."""

    def __init__(
        self,
        operator: LowCostOp,
        original: nn.Module,
        site: Site,
        *,
        on_site: Callable[[str, Fit], None] | None,
        store: Store | None,
    ) -> None:
        self.operator, self.original, self.name = operator, original, site.name
        self.has_norm = site.norm is not None
        self.start = {key: value.clone() for key, value in operator.state_dict().items()}
        self.statistics: Statistics = operator.statistics(free_means=self.has_norm)
        self.was_called = False
        self.fit: Fit | None = None
        self.solved, self.calls = 0, len(site.sizes)
        self.in_chunks = False
        self.on_site, self.store = on_site, store

    def watch(self, x: Tensor) -> Tensor:
        """Run the original and remember what it did."""
        y: Tensor = self.original(x)
        self.statistics.add(x, y)
        self.was_called = True
        return y

    def both(self, x: Tensor) -> Tensor:
        """Run [original; converted], fitting the operator in between. A second call fits to both calls."""
        original_half, converted_half = x.chunk(2)
        wanted: Tensor = self.original(original_half)
        self.statistics.add(converted_half, wanted)
        self.solve()
        return torch.cat([wanted, type(self.operator).forward(self.operator, converted_half)])

    def fitted(self, x: Tensor) -> Tensor:
        """Run [original; converted] with the operator as it is."""
        original_half, converted_half = x.chunk(2)
        wanted: Tensor = self.original(original_half)
        return torch.cat([wanted, type(self.operator).forward(self.operator, converted_half)])

    def solve(self) -> None:
        """Fit the operator; where a BatchNorm follows, bring each channel back to the start's norm.

        Least squares returns weights of several times the start's norm. Behind a BatchNorm the function
        does not depend on it, but the effective learning rate of fine-tuning does.
        """
        self.solved += 1
        kept_as = f"{self.name}@{'all' if self.in_chunks else self.solved}"  # their inputs differ
        self.operator.load_state_dict(self.start)
        self.fit = self.store.restore_(kept_as, self.operator) if self.store else None
        if self.fit is None:
            self.fit = self._fitted_anew()
            if self.store is not None:
                self.store.keep(kept_as, self.operator, self.fit)
        if self.in_chunks or self.solved == self.calls:  # no more will come: let go of what was seen
            self.statistics = self.operator.statistics(free_means=self.has_norm)
        if self.on_site is not None:
            self.on_site(self.name, self.fit)

    def _fitted_anew(self) -> Fit:
        linear = self.operator if self.has_norm and isinstance(self.operator, LinearOp) else None
        start_norms = None if linear is None else linear.weight_norms()
        try:
            with _own_forward(self.operator):
                fit = self.operator.fit_(self.statistics)
        except ValueError as error:  # scipy's word for NaN and infinity
            raise DataError(
                f"the activations at {self.name} are no finite numbers on these images; look at --mean and "
                "--std, and at the weights"
            ) from error
        if linear is not None and start_norms is not None:
            norms = linear.weight_norms()
            linear.scale_(torch.where(norms > 0, start_norms / norms.clamp_min(1e-30), 1.0))
        return fit


def _in_one_batch(model: nn.Module, streams: list[_Stream], images: Tensor) -> None:
    _run_two_streams(model, {stream.operator: stream.both for stream in streams}, (images,))


def _in_chunks(model: nn.Module, streams: list[_Stream], images: Tensor, chunk: int) -> None:
    with ExitStack() as stack:
        for stream in streams:
            stream.in_chunks = True
            stack.enter_context(_forward_as(stream.operator, stream.watch))
        for part in images.split(chunk):
            model(part.to(_device(model)))
    for stream in streams:
        if stream.was_called:
            stream.solve()
    _run_two_streams(model, {stream.operator: stream.fitted for stream in streams}, images.split(chunk))


def _run_two_streams(
    model: nn.Module, forwards: dict[LowCostOp, Callable[[Tensor], Tensor]], parts: tuple[Tensor, ...]
) -> None:
    """Send every part through as [original; converted]; set the BatchNorms for which the halves differ.

    Those inside an operator are its own affair: it sees one half only.
    """
    inside = {module for operator in forwards for module in operator.modules()}
    with ExitStack() as stack:
        for operator, forward in forwards.items():
            stack.enter_context(_forward_as(operator, forward))
        for norm in [m for m in model.modules() if isinstance(m, _BatchNorm) and m not in inside]:
            running = norm.running_mean is not None
            stack.enter_context(
                _forward_as(norm, _TwoStreamNorm(norm) if running else partial(_each_half, norm))
            )
        for part in parts:
            model(torch.cat([part, part]).to(_device(model)))


class _TwoStreamNorm:
    """A BatchNorm that keeps its statistics for the first half and takes on those of the second.

    Statistics of several calls are averaged, each call weighted by its images. Both halves go through the
    module's own forward: a subclass may do more than normalise (timm's has the activation in it).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.running = norm, (norm.running_mean, norm.running_var)
        self.original = self.converted = tuple(tensor.clone() for tensor in self.running)
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return both halves normalised, the second one by its own statistics if it differs."""
        original_half, converted_half = x.chunk(2)
        wanted = self._forward(original_half, self.original)
        if torch.equal(original_half, converted_half):
            self._set(self.converted)
            return torch.cat([wanted, wanted])
        self._take_in(converted_half)
        return torch.cat([wanted, self._forward(converted_half, self.converted)])

    def _take_in(self, x: Tensor) -> None:
        dims = [d for d in range(x.ndim) if d != 1]
        values = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, dims, correction=min(1, values - 1))
        seen = (mean, var)
        self.count += len(x)
        share = len(x) / self.count
        self.converted = tuple(a.lerp(b.to(a), share) for a, b in zip(self.converted, seen, strict=True))

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
def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the module compute `forward` for a while."""
    replaced = {key: value for key, value in vars(module).items() if key == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(replaced)


@contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """Let the module compute what its class says for a while, within `_forward_as`."""
    replaced = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            vars(module)["forward"] = replaced


def _images_at_once(model: nn.Module, images: Tensor) -> int:
    """Return how many images can go through in two streams, judged by one image and the free memory."""
    device = _device(model)
    needed = 2 * MARGIN * _bytes_of_an_image(model, images[:1].to(device))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, int(free * MEMORY_SHARE / needed))


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


def _operator(model: nn.Module, name: str) -> LowCostOp:
    module = model.get_submodule(name)
    if not isinstance(module, LowCostOp):
        raise TypeError(f"{name} was not replaced")
    return module


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

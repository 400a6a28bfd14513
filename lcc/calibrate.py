"""Weights for operators from unlabelled images: one pass, two streams, and BatchNorm statistics on the way.

The images go through the network twice in one batch, `[original; converted]`. Layers that stay treat both
halves alike. A site sends the first half through its dense original, fits its operator to (second half's
input -> first half's output) at that moment, and sends the second half on through the fitted operator. A
BatchNorm behind a converted site takes on the statistics of the second half. So every site is fitted to the
inputs that it will really see, in call order, without tracing a graph.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lcc.errors import DataError
from lcc.methods import Fit, LowCostOp, Scalable
from lcc.two_streams import device_of, forward_as, images_at_once, own_forward, run_two_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lcc.methods import Statistics
    from lcc.plan import Site


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
    fits: dict[str, Fit] = {}
    for names in _banks(model, originals):
        operators = [_operator(model, name) for name in names]
        method = operators[0].method
        fits |= dict(
            zip(names, method.project_bank_(operators, [originals[name] for name in names]), strict=True)
        )
    return {name: fits[name] for name in originals}


def _banks(model: nn.Module, originals: dict[str, nn.Module]) -> list[list[str]]:
    """Return the names of the operators, those that hold a tensor in common together."""
    banks: dict[object, list[str]] = {}
    owners: dict[int, str] = {}
    for name in originals:
        tensors = [id(parameter) for parameter in _operator(model, name).parameters()]
        owner = next((owners[tensor] for tensor in tensors if tensor in owners), name)
        owners |= dict.fromkeys(tensors, owner)
        banks.setdefault(owner, []).append(name)
    return list(banks.values())


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

    A bank, whose sites have weights in common, is fitted first, to the inputs of the original network. The
    model is left in eval mode. `on_site` is called with each new fit. What `store` has is not fitted again.
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
    banks = [
        [stream for stream in streams if stream.name in names]
        for names in _banks(model, originals)
        if _operator(model, names[0]).method.shares
    ]
    chunk = images_at_once(model, images)
    with torch.no_grad():
        _fit_banks_(model, banks, streams, images, chunk)
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
        self._statistics: Statistics | None = None
        self.was_called = False
        self.fit: Fit | None = None
        self.solved, self.calls = 0, len(site.sizes)
        self.in_chunks = self.in_bank = False
        self.on_site, self.store = on_site, store

    @property
    def statistics(self) -> Statistics:
        """What was seen so far; large, and so only there while it is needed."""
        if self._statistics is None:
            self._statistics = self.operator.statistics(free_means=self.has_norm)
        return self._statistics

    def settle(self, fit: Fit) -> None:
        """Take the fit of its bank as its own, and let go of what was seen."""
        self.fit = fit
        self._statistics = None
        if self.on_site is not None:
            self.on_site(self.name, fit)

    def watch(self, x: Tensor) -> Tensor:
        """Run the original and remember what it did."""
        y: Tensor = self.original(x)
        self.statistics.add(x, y)
        self.was_called = True
        return y

    def pass_by(self, x: Tensor) -> Tensor:
        """Run the original."""
        y: Tensor = self.original(x)
        return y

    def both(self, x: Tensor) -> Tensor:
        """Run [original; converted], fitting the operator in between. A second call fits to both calls."""
        if self.in_bank:
            return self.fitted(x)
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
            self._statistics = None
        if self.on_site is not None:
            self.on_site(self.name, self.fit)

    def _fitted_anew(self) -> Fit:
        keeping = _norms_kept(self.operator if self.has_norm else None)
        with keeping, finite_activations(self.name), own_forward(self.operator):
            return self.operator.fit_(self.statistics)


@contextmanager
def _norms_kept(operator: LowCostOp | None) -> Iterator[None]:
    """Bring each output channel back to the norm that its kernel had before, if it is known."""
    if not isinstance(operator, Scalable):
        yield
        return
    before = operator.weight_norms()
    yield
    norms = operator.weight_norms()
    operator.scale_(torch.where(norms > 0, before / norms.clamp_min(1e-30), 1.0))


@contextmanager
def finite_activations(name: str) -> Iterator[None]:
    """Say in words what a least-squares solver finds wrong with its numbers. Raises: DataError."""
    try:
        yield
    except ValueError as error:  # scipy's word for NaN and infinity
        raise DataError(
            f"the activations at {name} are no finite numbers on these images; look at --mean and --std, and "
            "at the weights"
        ) from error


def _fit_banks_(
    model: nn.Module, banks: list[list[_Stream]], streams: list[_Stream], images: Tensor, chunk: int
) -> None:
    """Fit every bank to what its sites see and give in the original network, and leave it so.

    Fitting again to what they see behind fitted banks gained little (ResNet-20, all stages: 17.2 to 20.1 %),
    and lost it all when done twice.
    """
    for bank in banks:  # one in a pass, since what is seen of a wide one is large
        with ExitStack() as stack:
            for stream in streams:
                forward = stream.watch if stream in bank else stream.pass_by
                stack.enter_context(forward_as(stream.operator, forward))
            for part in images.split(chunk):
                model(part.to(device_of(model)))
        called = [stream for stream in bank if stream.was_called]
        if called:
            _fit_bank_(called)
        for stream in bank:
            stream.in_bank = True


def _fit_bank_(called: list[_Stream]) -> None:
    """Fit a bank to those of its sites that the images reach; what they have in common all others have."""
    operators, method = [stream.operator for stream in called], called[0].operator.method
    kept = _norms_kept(operators[0] if all(stream.has_norm for stream in called) else None)
    with kept, finite_activations(called[0].name):
        fits = method.fit_bank_(operators, [stream.statistics for stream in called])
    for stream, fit in zip(called, fits, strict=True):
        stream.settle(fit)


def _in_one_batch(model: nn.Module, streams: list[_Stream], images: Tensor) -> None:
    run_two_streams(model, {stream.operator: stream.both for stream in streams}, (images,))


def _in_chunks(model: nn.Module, streams: list[_Stream], images: Tensor, chunk: int) -> None:
    with ExitStack() as stack:
        for stream in streams:
            stream.in_chunks = True
            forward = stream.pass_by if stream.in_bank else stream.watch
            stack.enter_context(forward_as(stream.operator, forward))
        for part in images.split(chunk):
            model(part.to(device_of(model)))
    for stream in streams:
        if stream.was_called and not stream.in_bank:
            stream.solve()
    run_two_streams(model, {stream.operator: stream.fitted for stream in streams}, images.split(chunk))


def _operator(model: nn.Module, name: str) -> LowCostOp:
    module = model.get_submodule(name)
    if not isinstance(module, LowCostOp):
        raise TypeError(f"{name} was not replaced")
    return module

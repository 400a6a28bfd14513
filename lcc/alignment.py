"""Inner channels put into the order in which kernels that are to be one agree best.

In conv, norm, activation, conv, where nothing else reads what is in between, the channels in between may come
in any order: the rows of the first kernel, what the norm stores and the columns of the second move together,
and the network's function stays. The Hungarian method finds the order in which a pair of convolutions agrees
best with the kernels that its own are to be shared with.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.anatomy import has_hooks
from lcc.specs import ConvSpec
from lcc.tracing import activation_of, activation_within, is_identity, is_leaf, is_norm, trace, undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import fx

    from lcc.plan import Site

ROUNDS = 50  # over all pairs; networks settle within ten
LEAST_GAIN = 1e-12  # of the agreement there is; less is rounding


class InnerPair(NamedTuple):
    """The names of two convolutions and of the norm, if any, between them; the channels there are free."""

    first: str
    norm: str | None
    second: str


class Alignment(NamedTuple):
    """How far kernels are from the mean of their group, before and after every round.

    Relative to the kernels, each of them counted as large as the others: 0 is equal, sqrt(1 - 1 / n) what n
    kernels have that have nothing in common. `moved` says in how many pairs channels changed places.
    """

    distances: tuple[float, ...]
    moved: int


def inner_pairs(model: nn.Module, sites: Sequence[Site]) -> tuple[InnerPair, ...]:
    """Return the pairs of convolutions, each called once, between which channels may come in any order.

    `sites`: what `find_sites` says of the model, which is left as it was. Found by tracing the model, or
    those of its modules that can be traced.
    """
    free = {model.get_submodule(site.name): site for site in sites if _is_free(site)}
    names = {module: name for name, module in model.named_modules()}
    held = Counter(id(tensor) for module in model.modules() for tensor in _own(module))
    found: list[InnerPair] = []
    with undisturbed(model):
        for first, norm, second in _chains(model):
            if first not in free or second not in free or first is second:
                continue
            if norm is None or _can_be_reordered(norm, free[first], names[norm], held):
                between = None if norm is None else names[norm]
                found.append(InnerPair(free[first].name, between, free[second].name))
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def align_(model: nn.Module, groups: Sequence[Sequence[str]], pairs: Sequence[InnerPair]) -> Alignment:
    """Reorder inner channels, in place, so that the kernels of every group come close to their mean.

    `groups` name convolutions of one shape that are to share a kernel. A pair at a time takes the order with
    the largest inner product with the kernels of the others (the best one, where its two convolutions are in
    different groups), else with the mean, if that brings the groups closer together; round after round until
    nothing moves. Distances never grow.
    """
    banks = _Banks(model, groups)
    distances = [banks.distance()]
    orders = {pair: torch.arange(len(_weight(model, pair.first))) for pair in pairs if banks.hold(pair)}
    for _ in range(ROUNDS):
        better = {pair: order for pair in orders if (order := banks.improve(pair)) is not None}
        orders |= {pair: orders[pair][order] for pair, order in better.items()}
        if not better:
            break
        distances.append(banks.distance())
    for pair, order in orders.items():
        _reorder_(model, pair, order)
    moved = sum(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    return Alignment(tuple(distances), moved)


class _Banks:
    """The kernels of every group, all of norm 1: (C_out, C_in, taps) in float64; and what they add up to."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        self.kernels = {name: _unit(_weight(model, name)) for group in groups for name in group}
        self.number = {name: number for number, group in enumerate(groups) for name in group}
        self.sizes = [len(group) for group in groups]
        self.sums = {
            number: torch.stack([self.kernels[name] for name in group]).sum(0)
            for number, group in enumerate(groups)
        }
        self.total = float(sum(kernel.square().sum() for kernel in self.kernels.values()))

    def hold(self, pair: InnerPair) -> bool:
        """Whether an order of the pair's channels matters to them."""
        return pair.first in self.kernels or pair.second in self.kernels

    def distance(self) -> float:
        """Return how far the kernels are from their means, relative to the kernels."""
        return max(1 - self._agreement(self.sums) / self.total, 0.0) ** 0.5 if self.total else 0.0

    def improve(self, pair: InnerPair) -> Tensor | None:
        """Take on a better order of a pair's channels and return it; None: found none."""
        held = {name: axis for axis, name in enumerate((pair.first, pair.second)) if name in self.kernels}
        present = {self.number[name]: self.sums[self.number[name]] for name in held}
        others = self._plus(present, {name: -self.kernels[name] for name in held})
        least = self._agreement(present) * (1 + LEAST_GAIN)
        for reference in (others, present):
            order = self._best_order(held, reference)
            kernels = {name: self.kernels[name].index_select(axis, order) for name, axis in held.items()}
            sums = self._plus(others, kernels)
            if self._agreement(sums) > least:
                self.sums |= sums
                self.kernels |= kernels
                return order
        return None

    def _agreement(self, sums: Mapping[int, Tensor]) -> float:
        # sum |W - mean|^2 = sum |W|^2 - |sum W|^2 / n, and no order changes |W|
        return sum(float(total.square().sum()) / self.sizes[number] for number, total in sums.items())

    def _plus(self, sums: Mapping[int, Tensor], kernels: Mapping[str, Tensor]) -> dict[int, Tensor]:
        changed = dict(sums)
        for name, kernel in kernels.items():
            changed[self.number[name]] = changed[self.number[name]] + kernel
        return changed

    def _best_order(self, held: Mapping[str, int], sums: Mapping[int, Tensor]) -> Tensor:
        """Return the order with the largest inner product of kernels with means; `held`: name to axis."""
        gains = []
        for name, axis in held.items():
            mean = sums[self.number[name]] / self.sizes[self.number[name]]
            rows = (kernel.transpose(0, axis).flatten(1).float() for kernel in (mean, self.kernels[name]))
            gains.append(next(rows) @ next(rows).T)  # half as long in float32; what comes of it is checked
        _, columns = linear_sum_assignment(torch.stack(gains).sum(0).numpy(), maximize=True)
        return torch.as_tensor(columns)


def _is_free(site: Site) -> bool:
    """Whether a site is a convolution of all channels, called once, and nothing else reads its weights."""
    dense = isinstance(site.spec, ConvSpec) and site.spec.groups == 1
    return dense and site.obstacle is None and len(site.sizes) == 1


def _chains(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None, nn.Module]]:
    """Yield (conv, norm, conv) wherever a convolution feeds only another, by way of elementwise layers."""
    if is_leaf(module):
        return
    graph = trace(module, deep=True)
    if graph is None:
        for child in module.children():
            yield from _chains(child)
        return
    modules = dict(module.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module" and type(modules[str(node.target)]) is nn.Conv2d:
            norm, second = _after(node, modules)
            if second is not None:
                yield modules[str(node.target)], norm, second


def _after(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the norm and the convolution that a node's value goes to, and nothing else reads."""
    norm: nn.Module | None = None
    while len(node.users) == 1:
        (node,) = node.users
        layer = modules[str(node.target)] if node.op == "call_module" else None
        if layer is not None and has_hooks(layer):  # they may read what is in between
            break
        if type(layer) is nn.Conv2d:
            return norm, layer
        if layer is not None and is_norm(layer) and norm is None:
            norm = layer
        elif activation_of(node, modules) is None and (layer is None or not is_identity(layer)):
            break
    return None, None


def _can_be_reordered(norm: nn.Module, conv: Site, name: str, held: Counter[int]) -> bool:
    """Whether a norm works on each channel alone, and for nothing but this convolution."""
    if isinstance(norm, nn.GroupNorm) or (isinstance(norm, _BatchNorm) and conv.norm != name):
        return False
    if any(activation_within(norm) is None and not is_identity(inner) for inner in norm.children()):
        return False
    channels = conv.spec.out_channels if isinstance(conv.spec, ConvSpec) else 0
    return all(held[id(tensor)] == 1 and tensor.shape in ((), (channels,)) for tensor in _own(norm))


def _reorder_(model: nn.Module, pair: InnerPair, order: Tensor) -> None:
    first = model.get_submodule(pair.first)
    norm = [] if pair.norm is None else [model.get_submodule(pair.norm)]
    for tensor in chain(*(_own(layer) for layer in (first, *norm))):
        if tensor.ndim > 0:
            tensor.copy_(tensor.index_select(0, order.to(tensor.device)))
    weight = _weight(model, pair.second)
    weight.copy_(weight.index_select(1, order.to(weight.device)))


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module itself stores."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _unit(weight: Tensor) -> Tensor:
    kernel = weight.detach().to("cpu", torch.float64).flatten(2)
    norm: Tensor = torch.linalg.vector_norm(kernel)
    return kernel / norm.clamp_min(torch.finfo(kernel.dtype).tiny)

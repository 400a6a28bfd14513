"""Channels between two convolutions that may come in any order, and what puts them into another.

In conv, norm, activation, conv, where nothing else reads what is in between, the rows of the first kernel,
what the norm stores and the columns of the second move together, and the network's function stays.
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.anatomy import has_hooks, has_own_hooks
from lcc.errors import SourceError
from lcc.specs import ConvSpec
from lcc.tracing import activation_of, activation_within, is_identity, is_leaf, is_norm, trace, undisturbed
from lcc.trials import largest, run_once, same_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import fx

    from lcc.plan import Site

ROUNDING = 1e-9  # of the largest output, in float64


class InnerPair(NamedTuple):
    """The names of two convolutions and of the norm, if any, between them; the channels there are free."""

    first: str
    norm: str | None
    second: str


def inner_pairs(model: nn.Module, sites: Sequence[Site], example: Tensor) -> tuple[InnerPair, ...]:
    """Return the pairs of convolutions, each called once, between which channels may come in any order.

    `sites`: what `find_sites` says of the model, which is left as it was. Found by tracing the model, or
    those of its modules that can be traced, in eval and in training mode; and tried: channels of a copy in
    float64 change places, and it has to give the same for `example` (N, C, H, W).
    """
    free = {model.get_submodule(site.name): site for site in sites if _is_free(model, site)}
    names = {module: name for name, module in model.named_modules()}
    held = Counter(id(tensor) for module in model.modules() for tensor in _own(module))
    found = []
    with undisturbed(model):
        in_eval = list(_chains(model))
        try:
            model.train()
        except Exception:  # noqa: BLE001  # a network made for inference alone may refuse
            return ()
        in_training = set(_chains(model))
        for first, norm, second in dict.fromkeys(in_eval):
            always = (first, norm, second) in in_training
            if not always or first not in free or second not in free or first is second:
                continue
            if norm is None or _can_be_reordered(norm, free[first], names[norm], held):
                between = None if norm is None else names[norm]
                found.append(InnerPair(free[first].name, between, free[second].name))
    unseen = [pair for pair in found if not _is_looked_into(model, pair)]
    return tuple(_tried(model, unseen, example))


def _tried(model: nn.Module, pairs: list[InnerPair], example: Tensor) -> list[InnerPair]:
    """Return the pairs of which the channels can change places, and the model computes the same.

    None of a model that can't be tried: its code may insist on float32, or return what can't be compared.
    """
    if not pairs:
        return []
    exact, images = copy.deepcopy(model).double(), example.double()

    def stays(chosen: list[InnerPair]) -> bool:
        trial = copy.deepcopy(exact)
        for pair in chosen:
            reorder_(trial, pair, torch.arange(_width(trial, pair)).roll(1))
        return same_outputs(run_once(trial, images), wanted, tolerance=ROUNDING)

    try:
        wanted = run_once(exact, images)
        return largest(pairs, stays)
    except SourceError:
        return []


def _is_looked_into(model: nn.Module, pair: InnerPair) -> bool:
    """Whether hooks of a module around some of a pair's layers, and not all, may see what is in between."""
    layers = [name for name in pair if name is not None]
    for outer, module in model.named_modules():
        inside = sum(name.startswith(f"{outer}.") for name in layers)
        if 0 < inside < len(layers) and has_own_hooks(module):
            return True
    return False


def settle_(
    model: nn.Module,
    pairs: Iterable[InnerPair],
    better: Callable[[InnerPair], Tensor | None],
    rounds: int,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, tuple[int, ...]]:
    """Reorder, in place, as `better` says of one pair at a time, round after round until it has none.

    Return for each convolution of which outputs changed places which of them comes at each place.
    """
    places = {pair: torch.arange(_width(model, pair)) for pair in pairs}
    orders = dict(places)
    for _ in range(rounds):
        found = {pair: order for pair in places if (order := better(pair)) is not None}
        orders |= {pair: orders[pair][order] for pair, order in found.items()}
        if not found:
            break
        after_round()
    moved = {pair: order for pair, order in orders.items() if not torch.equal(order, places[pair])}
    for pair, order in moved.items():
        reorder_(model, pair, order)
    return {pair.first: tuple(order.tolist()) for pair, order in moved.items()}


def _width(model: nn.Module, pair: InnerPair) -> int:
    return len(model.get_parameter(f"{pair.first}.weight"))


@torch.no_grad()
def reorder_(model: nn.Module, pair: InnerPair, order: Tensor) -> None:
    """Put at each place between the pair's convolutions the channel that `order` (C,) names."""
    first = model.get_submodule(pair.first)
    norm = [] if pair.norm is None else [model.get_submodule(pair.norm)]
    for tensor in chain(*(_own(layer) for layer in (first, *norm))):
        if tensor.ndim > 0:
            tensor.copy_(tensor.index_select(0, order.to(tensor.device)))
    weight = model.get_parameter(f"{pair.second}.weight")
    weight.copy_(weight.index_select(1, order.to(weight.device)))


def _is_free(model: nn.Module, site: Site) -> bool:
    """Whether a site is a convolution of all channels, called once, and nothing else reads its weights."""
    spec = site.spec
    if not isinstance(spec, ConvSpec) or spec.groups > 1 or site.obstacle is not None or len(site.sizes) != 1:
        return False
    own = list(_own(model.get_submodule(site.name)))  # a user's buffers, too
    return all(tensor.ndim == 0 or len(tensor) == spec.out_channels for tensor in own)


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


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module itself stores."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)

"""Channels between two convolutions that may come in any order, and what puts them into another.

In conv, norm, activation, conv, where nothing else reads what is in between, the rows of the first kernel,
what the norm stores and the columns of the second move together, and the network's function stays.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.anatomy import has_hooks
from lcc.specs import ConvSpec
from lcc.tracing import activation_of, activation_within, is_identity, is_leaf, is_norm, trace, undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

    from lcc.plan import Site


class InnerPair(NamedTuple):
    """The names of two convolutions and of the norm, if any, between them; the channels there are free."""

    first: str
    norm: str | None
    second: str


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
def reorder_(model: nn.Module, pair: InnerPair, order: Tensor) -> None:
    """Put at each place between the pair's convolutions the channel that `order` (C,) names."""
    first = model.get_submodule(pair.first)
    norm = [] if pair.norm is None else [model.get_submodule(pair.norm)]
    for tensor in chain(*(_own(layer) for layer in (first, *norm))):
        if tensor.ndim > 0:
            tensor.copy_(tensor.index_select(0, order.to(tensor.device)))
    weight = model.get_parameter(f"{pair.second}.weight")
    weight.copy_(weight.index_select(1, order.to(weight.device)))


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


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module itself stores."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)

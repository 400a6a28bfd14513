"""What a residual step post(x + F(x)), or its stage-changing relative post(S(x) + F(x)), is made of.

A trace down to the layers shows them; run on the meta device, it tells the sizes inside.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.convolutions import conv_spec
from lcc.methods import LowCostOp
from lcc.shapes import SIDE, shapes_inside, size_in
from lcc.specs import Activation, ConvSpec, StepSpec
from lcc.tracing import (
    activation_of,
    activation_within,
    called,
    drop_rate,
    is_leaf,
    is_norm,
    source,
    the_input,
    the_output,
    trace,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from lcc.shapes import Shapes

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # no public view
# Products of two feature maps, and products with weights that no layer holds.
PRODUCTS = {
    operator.matmul, torch.matmul, torch.bmm, torch.einsum, torch.softmax, F.softmax,
    F.scaled_dot_product_attention, F.conv2d, F.linear, "matmul", "bmm", "softmax",
}  # fmt: skip


class NotAStepError(Exception):
    """The module can't be described as a residual step; says why in words."""


class _Roles(NamedTuple):
    """The layers that mix channels, by where they are: on F's path, on the pooled map, on the skip."""

    inside: list[fx.Node]
    squeeze: list[fx.Node]
    beside: list[fx.Node]


def anatomy(
    module: nn.Module, post: Activation | None, shortcut: Collection[nn.Module] | None = None
) -> StepSpec:
    """Return what a step is made of; with `shortcut`, a block that may change width and size.

    `shortcut` holds the convolutions of its skip: none where the skip has no parameters, or there is no sum.
    Raises: NotAStepError.
    """
    _refuse_by_name(module)
    graph = trace(module, deep=True)
    if graph is None:
        raise NotAStepError("its layers can't be told by tracing it")
    modules = dict(module.named_modules(remove_duplicate=False))
    layers = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    _refuse_by_use(module, graph, layers)
    x, end = _ends(graph)
    shapes = shapes_inside(module, graph, layers, as_given=shortcut is None)
    if shapes is None:
        raise NotAStepError(f"can't run on its own on an input of {SIDE}x{SIDE}, or gives another shape")
    roles = _roles(graph, modules, shapes, shortcut)
    norms = [layer for layer in layers if is_norm(layer)]
    activations = [a for node in graph.nodes if (a := _activation(node, modules))]
    if post is None and shortcut is not None:
        post = _activation(source(end, modules), modules)
    convs = tuple(_spec(modules[str(node.target)]) for node in roles.inside)
    spec = StepSpec(
        channels=shapes[end][1],
        in_channels=None if shapes[x][1] == shapes[end][1] else shapes[x][1],
        stride=(prod(conv.stride[0] for conv in convs), prod(conv.stride[1] for conv in convs)),
        convs=convs,
        squeeze=tuple(_spec(modules[str(node.target)]) for node in roles.squeeze),
        shortcut=tuple(_spec(modules[str(node.target)]) for node in roles.beside),
        in_a_row=_in_a_row(graph, roles),
        norm_params=sum(p.numel() for norm in norms for p in norm.parameters()),
        batch_norms=all(isinstance(norm, _BatchNorm) or "BatchNorm" in type(norm).__name__ for norm in norms),
        activation=next(iter(activations[:-1] if post else activations), None),
        post=post,
        pre_norm=is_norm(next(layer for layer in layers if isinstance(layer, nn.Conv2d) or is_norm(layer))),
        norm_eps=float(getattr(norms[0], "eps", 1e-5)) if norms else 1e-5,
        norm_momentum=getattr(norms[0], "momentum", 0.1) if norms else 0.1,
        drop_path=max((drop_rate(layer) for layer in module.modules()), default=0.0),
    )
    if spec.params != sum(p.numel() for p in module.parameters()):
        raise NotAStepError("holds parameters that its layers do not use")
    if shortcut is not None:
        _refuse_by_size(spec, roles, shapes, x, end)
    return spec


def has_hooks(module: nn.Module) -> bool:
    """Whether the module, or one inside it, carries what a replacement would lose."""
    return any(map(has_own_hooks, module.modules()))


def has_own_hooks(module: nn.Module) -> bool:
    """Whether the module itself carries hooks, or a forward of its own."""
    return "forward" in vars(module) or any(vars(module)[hooks] for hooks in HOOKS)


def _refuse_by_name(module: nn.Module) -> None:
    """Refuse what can be told from the kinds of modules inside."""
    if has_hooks(module):
        raise NotAStepError("carries hooks that a replacement would lose")
    if any(isinstance(inner, LowCostOp) for inner in module.modules()):
        raise NotAStepError("holds an operator that is converted already")
    for inner in module.modules():
        name = type(inner).__name__
        if "LayerNorm" in name or "RMSNorm" in name:
            raise NotAStepError(f"layer norm in it ({name})")
    for inner in module.modules():
        owned = next((name for name, _ in inner.named_parameters(recurse=False)), None)
        if owned is None or type(inner) in (nn.Conv2d, nn.Linear) or is_norm(inner):
            continue
        if inner is module or not is_leaf(inner):
            raise NotAStepError(f"holds a parameter ({owned}) that belongs to no layer")
        raise NotAStepError(f"holds a {type(inner).__name__}, for which a step has no word")


def _refuse_by_use(module: nn.Module, graph: fx.Graph, layers: list[nn.Module]) -> None:
    """Refuse what only the order of calls tells."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in PRODUCTS:
            raise NotAStepError(f"multiplies feature maps with each other ({called(node, {})})")
    holders = [layer for layer in layers if next(layer.parameters(), None) is not None]
    if len(set(holders)) < len(holders):
        twice = next(layer for layer in holders if holders.count(layer) > 1)
        name = next(name for name, inner in module.named_modules() if inner is twice)
        raise NotAStepError(f"calls {name} more than once")
    if not any(isinstance(layer, nn.Conv2d | nn.Linear) for layer in layers):
        raise NotAStepError("no convolution in it")


def _refuse_by_size(spec: StepSpec, roles: _Roles, shapes: Shapes, x: fx.Node, end: fx.Node) -> None:
    """Refuse a block whose description would not tell the size of every map in it."""
    if not spec.in_a_row:
        raise NotAStepError("its convolutions do not follow one another")
    size = size_in(shapes[x])
    for node, conv in zip(roles.inside, spec.convs, strict=True):
        if size_in(shapes[node.all_input_nodes[0]]) != size:
            raise NotAStepError("something else than its convolutions changes the size of the map")
        size = conv.out_size(size)
    if {size, *(size_in(shapes[node]) for node in (*roles.beside, end))} != {
        spec.out_size(size_in(shapes[x]))
    }:
        raise NotAStepError("gives another size than its strides say")


def _ends(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """Return the input and the output. Raises: NotAStepError: there are several."""
    x, end = the_input(graph), the_output(graph)
    if x is None or end is None:
        raise NotAStepError("its layers can't be told by tracing it")
    return x, end


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module" and is_norm(modules[str(node.target)]):
        return activation_within(modules[str(node.target)])
    return activation_of(node, modules)


def _roles(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    shapes: Shapes,
    shortcut: Collection[nn.Module] | None,
) -> _Roles:
    """Return where the convolutions and linear layers are. Raises: NotAStepError: it can't be told."""
    found = _Roles([], [], [])
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if shortcut is not None and layer in shortcut:
            found.beside.append(node)
        elif _sees_one_pixel(layer, shapes, node, resizes=shortcut is not None):
            found.squeeze.append(node)
        else:
            found.inside.append(node)
    if not found.inside:
        raise NotAStepError("no convolution of the whole map in it")
    return found


def _sees_one_pixel(layer: nn.Module, shapes: Shapes, node: fx.Node, *, resizes: bool) -> bool:
    """Whether a layer sees a map pooled to one pixel, not the whole. Raises: NotAStepError: neither."""
    before, after = shapes[node.all_input_nodes[0]], shapes[node]
    if isinstance(layer, nn.Linear):
        if len(before) != 2:
            raise NotAStepError("linear mixing of the channels of every pixel in it (Linear)")
        return True
    if before[2:] == after[2:] and after[2:] in ((SIDE, SIDE), (1, 1)):
        return after[2:] == (1, 1)
    if resizes:
        return False
    raise NotAStepError("works at several resolutions inside")


def _in_a_row(graph: fx.Graph, roles: _Roles) -> bool:
    """Whether each convolution sees what the one before it gave, alone, and the end that of the last.

    The skip may give the end the input, or what it makes of that.
    """
    x, end = _ends(graph)
    stops = {x, *roles.inside, *roles.beside}

    def nearest(node: fx.Node) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            new = {earlier for earlier in waiting.pop().all_input_nodes if earlier not in seen}
            seen |= new
            waiting += new - stops
        return seen & stops

    row = all(nearest(node) == {earlier} for earlier, node in pairwise((x, *roles.inside)))
    row = row and all(nearest(node) == {x} for node in roles.beside)
    last = {end} if end in stops else nearest(end)
    return row and last - {x} == {roles.inside[-1], *roles.beside}


def _spec(layer: nn.Module) -> ConvSpec:
    """Return the description of a convolution, or of a linear layer as one of one pixel."""
    if isinstance(layer, nn.Conv2d):
        return conv_spec(layer)
    assert isinstance(layer, nn.Linear)
    return ConvSpec(
        in_channels=layer.in_features,
        out_channels=layer.out_features,
        kernel_size=(1, 1),
        bias=layer.bias is not None,
    )

"""The sum that ends a block: what its own code adds up, what comes after, which side is the skip.

A module's own code is traced with every child as one node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

from torch import fx, nn

from lcc.specs import Activation
from lcc.tracing import (
    activation_of,
    called,
    is_leaf,
    is_sum,
    source,
    the_input,
    the_output,
    trace,
    undisturbed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Modules = dict[str, nn.Module]


class Around(NamedTuple):
    """What is around F in a block's own code.

    `skip` is the node of an identity skip, `post` the activation after the sum. `shortcut` holds the
    convolutions of a skip that is a projection; None: it is none. `obstacle` says in words why this is no
    residual step.
    """

    graph: fx.Graph
    skip: fx.Node | None = None
    post: Activation | None = None
    shortcut: tuple[nn.Conv2d, ...] | None = None
    obstacle: str | None = None


def around_body(module: nn.Module) -> Around | None:
    """Return what the module's own code does around F; None if it adds nothing to its input."""
    graph = trace(module)
    x = None if graph is None else the_input(graph)
    if graph is None or x is None:
        return None
    modules = dict(module.named_modules(remove_duplicate=False))
    sums = [node for node in graph.nodes if is_sum(node) and not _in_longer_sum(node)]
    residual = [node for node in sums if _adds_to(node, x, modules)]
    last, post, after = _before_end(graph, modules)
    if not residual:
        sides = None if last is None else _sides(last, x, modules)
        if sides is None:
            return None
        convs = _convs(sides.skip, modules)
        return Around(graph, post=post, shortcut=convs, obstacle=_projection(sides, modules))
    if len(residual) > 1 or last is not residual[0]:
        again = [node for node in sums if node is not residual[0] and residual[0] in _before(node)]
        if len(residual) > 1 or again:
            return Around(graph, obstacle="several residual sums in it, one after the other")
        known = ", ".join(get_args(Activation))
        words = f"its sum is followed by {after or 'more'}, and only one of {known} may be"
        return Around(graph, obstacle=words)
    skip = next(term for term in _terms(last) if source(term, modules) is x)
    return Around(graph, skip, post)


def shortcut_convs(module: nn.Module) -> tuple[nn.Conv2d, ...]:
    """Return the convolutions on the skip path of the residual block that a module is; none if it is none.

    The module is left as it was. Whatever may come after the block's last sum.
    """
    if is_leaf(module) or type(module).forward is nn.Sequential.forward:
        return ()
    with undisturbed(module):
        graph = trace(module)
        x = None if graph is None else the_input(graph)
        end = None if graph is None else _last_sum(graph)
        if x is None or end is None:
            return ()
        modules = dict(module.named_modules(remove_duplicate=False))
        sides = _sides(end, x, modules)
        return () if sides is None else _convs(sides.skip, modules)


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what a sum of sums adds up."""
    for term in node.args:
        assert isinstance(term, fx.Node)
        if is_sum(term) and _in_longer_sum(term):
            yield from _terms(term)
        else:
            yield term


def _in_longer_sum(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and is_sum(users[0])


def _adds_to(node: fx.Node, x: fx.Node, modules: Modules) -> bool:
    """Whether a sum is x, once and as it is, plus what is made of it."""
    terms = list(_terms(node))
    skips = [term for term in terms if source(term, modules) is x]
    return len(skips) == 1 and any(x in _before(term) for term in terms if term is not skips[0])


def _before(node: fx.Node) -> set[fx.Node]:
    """Return all nodes that a node's value is made of."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for earlier in waiting.pop().all_input_nodes:
            if earlier not in seen:
                seen.add(earlier)
                waiting.append(earlier)
    return seen


def _before_end(graph: fx.Graph, modules: Modules) -> tuple[fx.Node | None, Activation | None, str]:
    """Return the sum that ends the forward, the activation behind it, and in words what else is behind it."""
    node, post = the_output(graph), None
    if node is None:
        return None, None, "several outputs"
    while not is_sum(node):
        if source(node, modules) is not node:
            node = source(node, modules)
            continue
        activation = activation_of(node, modules) if post is None else None
        if activation is None or len(node.users) > 1:
            return None, None, called(node, modules)
        post, node = activation, node.all_input_nodes[0]
    if len(node.users) > 1:
        return None, None, "several paths"
    return node, post, ""


def _last_sum(graph: fx.Graph) -> fx.Node | None:
    """Return the sum that the output is made of, alone and by whatever means; None if there is none."""
    node = the_output(graph)
    while node is not None and not is_sum(node):
        earlier = node.all_input_nodes
        node = earlier[0] if len(earlier) == 1 else None
    return node


class _Sides(NamedTuple):
    """The nodes of a block's skip, and of its F, without those that are in both."""

    skip: list[fx.Node]
    body: list[fx.Node]


def _sides(node: fx.Node, x: fx.Node, modules: Modules) -> _Sides | None:
    """Return the two sides of a sum of two that are made of x: the skip is the one with fewer convolutions.

    None if it is no such sum, or the skip is not a single convolution at most.
    """
    terms = list(_terms(node))
    behind = [_before(term) | {term} for term in terms]
    if len(terms) != 2 or not all(x in nodes for nodes in behind):
        return None
    sides = [
        [n for n in node.graph.nodes if n in nodes and n not in other]
        for nodes, other in zip(behind, behind[::-1], strict=True)
    ]
    (few, skip), (many, body) = sorted((len(_convs(side, modules)), i) for i, side in enumerate(sides))
    return None if few > 1 or few == many else _Sides(sides[skip], sides[body])


def _convs(side: list[fx.Node], modules: Modules) -> tuple[nn.Conv2d, ...]:
    """Return the convolutions in the modules that some nodes call."""
    inner = (module for child in _children(side, modules) for module in child.modules())
    return tuple(module for module in inner if isinstance(module, nn.Conv2d))


def _children(side: list[fx.Node], modules: Modules) -> list[nn.Module]:
    """Return the modules that some nodes call."""
    return [modules[str(node.target)] for node in side if node.op == "call_module"]


def _projection(sides: _Sides, modules: Modules) -> str:
    """Return in words what a skip is that is no identity."""
    own = [called(n, modules) for n in sides.skip if n.op in ("call_function", "call_method")]
    names = [*(name for child in _children(sides.skip, modules) for name in _layers(child)), *own]
    if not names:
        return "its skip starts inside it, behind other layers"
    return f"its skip is no identity: {', '.join(dict.fromkeys(names))}"


def _layers(module: nn.Module) -> Iterator[str]:
    """Yield the types of the layers in a module."""
    if not is_leaf(module):
        for child in module.children():
            yield from _layers(child)
    elif not isinstance(module, nn.Identity):
        yield type(module).__name__

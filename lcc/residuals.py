"""Residual steps: modules whose forward is post(x + F(x)) with an identity skip.

Each module is looked at alone: its own code, traced with every child as one node, shows the sum and what
comes before and after it. `anatomy` says what F is made of. Last, the trace is run: what it adds must be the
module's input, bit for bit, and what comes out what the module gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, fx, nn

from lcc.anatomy import NotAStepError, anatomy, conv_spec, width
from lcc.specs import Activation, StepSpec
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


SIDE = 6  # of the input on which a trace is checked


class Step(NamedTuple):
    """A residual block: what it is made of, and in words why nothing can take it; None if something may."""

    spec: StepSpec
    obstacle: str | None = None


class _Around(NamedTuple):
    """What is around F: the node of the skip, the activation after the sum, what is wrong with the form."""

    skip: fx.Node | None = None
    post: Activation | None = None
    obstacle: str | None = None


def residual_step(module: nn.Module) -> Step | None:
    """Return the residual step that a module is, judged by its code; None if it adds nothing to its input.

    The module is left as it was. What it is really called with is not known here.
    """
    if not list(module.children()) or is_leaf(module):
        return None
    if type(module).forward is nn.Sequential.forward:  # quicker than tracing it
        return None
    with undisturbed(module):
        around = _around(module)
        if around is None:
            return None
        obstacle = _attention(module) or around.obstacle
        if obstacle is None:
            try:
                spec = anatomy(module, around.post)
                _check(module, around.skip, spec.channels)
            except NotAStepError as error:
                obstacle = str(error)
            else:
                return Step(spec)
        convs = tuple(conv_spec(m) for m in module.modules() if type(m) is nn.Conv2d)
        return Step(StepSpec(channels=width(module.modules()), convs=convs, post=around.post), obstacle)


def shortcut_convs(module: nn.Module) -> tuple[nn.Conv2d, ...]:
    """Return the convolutions on the skip path of the residual block that a module is; none if it is none.

    The module is left as it was. Whatever may come after the block's last sum.
    """
    if is_leaf(module) or type(module).forward is nn.Sequential.forward:
        return ()
    with undisturbed(module):
        graph = trace(module)
        x = None if graph is None else the_input(graph)
        if graph is None or x is None:
            return ()
        end = _last_sum(graph)
        modules = dict(module.named_modules(remove_duplicate=False))
        sides = None if end is None else _sides(end, x, modules)
        if sides is None:
            return ()
        found = (inner for child in _children(sides.skip, modules) for inner in child.modules())
        return tuple(inner for inner in found if isinstance(inner, nn.Conv2d))


def _attention(module: nn.Module) -> str | None:
    names = (type(inner).__name__ for inner in module.modules())
    found = next((name for name in names if "attention" in name.lower() or name.endswith("Attn")), None)
    return None if found is None else f"attention in it ({found})"


def _around(module: nn.Module) -> _Around | None:
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
        words = None if last is None or after else _projection(last, x, modules)
        return None if words is None else _Around(post=post, obstacle=words)
    if len(residual) > 1 or last is not residual[0]:
        again = [node for node in sums if node is not residual[0] and residual[0] in _before(node)]
        if len(residual) > 1 or again:
            return _Around(obstacle="several residual sums in it, one after the other")
        known = ", ".join(get_args(Activation))
        return _Around(obstacle=f"its sum is followed by {after or 'more'}, and only one of {known} may be")
    skip = next(term for term in _terms(last) if source(term, modules) is x)
    return _Around(skip, post)


def _check(module: nn.Module, skip: fx.Node | None, channels: int) -> None:
    """Run the trace. Raises: NotAStepError: its skip is not what came in, or its result not the module's."""
    first = next(module.parameters())
    if skip is None or first.is_meta:
        return
    x = torch.linspace(-2, 2, channels * SIDE * SIDE).reshape(1, channels, SIDE, SIDE).to(first)
    given = x.clone()
    run = _Watching(module, skip, x)
    try:
        got, wanted = run.run(x.clone()), module(given)
    except Exception as error:
        raise NotAStepError(f"can't run on its own on an input of {SIDE}x{SIDE}") from error
    if not run.skips_input:
        raise NotAStepError("its skip is no identity: the input is changed in place before the sum")
    if not torch.equal(given, x):
        raise NotAStepError("changes its input in place")
    if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise NotAStepError("does something that tracing it does not show")


class _Watching(fx.Interpreter):
    """Runs a trace, and looks at the value of the skip where it is added."""

    def __init__(self, module: nn.Module, skip: fx.Node, x: Tensor) -> None:
        super().__init__(module, graph=skip.graph)
        self.skip, self.x = skip, x
        self.skips_input = False

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        if is_sum(n) and self.skip in n.args:
            self.skips_input = torch.equal(self.env[self.skip], self.x)
        return super().run_node(n)


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


def _adds_to(node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]) -> bool:
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


def _before_end(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, Activation | None, str]:
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


def _sides(node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]) -> _Sides | None:
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
    (few, skip), (many, body) = sorted(
        (sum(isinstance(m, nn.Conv2d) for child in _children(side, modules) for m in child.modules()), number)
        for number, side in enumerate(sides)
    )
    return None if few > 1 or few == many else _Sides(sides[skip], sides[body])


def _children(side: list[fx.Node], modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Return the modules that some nodes call."""
    return [modules[str(node.target)] for node in side if node.op == "call_module"]


def _projection(node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return what a block's skip is, if the last sum adds F(x) and something else made of x."""
    sides = _sides(node, x, modules)
    if sides is None:
        return None
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

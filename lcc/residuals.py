"""Residual steps, modules whose forward is post(x + F(x)), and their stage-changing relatives.

A relative is post(S(x) + F(x)), or F(x) alone where other modules of its class are steps. Each module is
looked at alone: `skips` says what its own code adds up, `anatomy` what F is made of. Last, the trace is run:
what it adds must be the module's input, bit for bit, if the skip is an identity, and what comes out what the
module gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lcc.anatomy import NotAStepError, anatomy
from lcc.convolutions import conv_spec
from lcc.shapes import shapes_inside, width
from lcc.skips import Around, around_body
from lcc.specs import StepSpec
from lcc.tracing import is_leaf, is_sum, the_input, the_output, trace, undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterable


SIDE = 6  # of the input on which a trace is checked


class Step(NamedTuple):
    """A residual block: what it is made of, and in words why nothing can take it; None if something may."""

    spec: StepSpec
    obstacle: str | None = None


def blocks_among(modules: Iterable[nn.Module]) -> dict[nn.Module, Step]:
    """Return the residual steps and stage-changing blocks among the modules, which are left as they were.

    Without a sum, only relatives of a step are some: blocks of the same class.
    """
    candidates = list(modules)
    found = {module: step for module in candidates if (step := residual_step(module)) is not None}
    classes = {
        type(module)
        for module, step in found.items()
        if step.obstacle is None and not step.spec.is_transition
    }
    for module in candidates:
        bare = bare_block(module) if type(module) in classes and module not in found else None
        if bare is not None:
            found[module] = bare
    return found


def residual_step(module: nn.Module) -> Step | None:
    """Return the residual step, or the stage-changing block with a sum, that a module is by its code.

    None if it adds up nothing that is made of its input. The module is left as it was. What it is really
    called with is not known here.
    """
    if _is_no_block(module):
        return None
    with undisturbed(module):
        around = around_body(module)
        return None if around is None else _described(module, around)


def bare_block(module: nn.Module) -> Step | None:
    """Return the stage-changing block F(x), without a sum, that a module is; None if it changes nothing."""
    if _is_no_block(module):
        return None
    with undisturbed(module):
        graph = trace(module)
        if graph is None or the_input(graph) is None or the_output(graph) is None:
            return None
        found = _described(module, Around(graph, shortcut=()))
        return found if found.spec.is_transition else None


def _is_no_block(module: nn.Module) -> bool:
    # the second is quicker than tracing it
    return is_leaf(module) or type(module).forward is nn.Sequential.forward


def _described(module: nn.Module, around: Around) -> Step:
    attention = _attention(module)
    if attention is not None:
        return Step(_as_far_as_seen(module, around), attention)
    identity = around.shortcut is None
    if identity and around.obstacle is not None:
        return Step(_as_far_as_seen(module, around), around.obstacle)
    try:
        spec = anatomy(module, around.post, around.shortcut)
        _check(module, around, spec.channels_in)
    except NotAStepError as error:
        seen = _as_far_as_seen(module, around)
        if around.obstacle is None:
            return Step(seen, str(error))
        return Step(seen, f"{around.obstacle}; {error}" if seen.is_transition else around.obstacle)
    if identity or spec.is_transition:
        return Step(spec)
    return Step(_as_far_as_seen(module, around), around.obstacle)


def _as_far_as_seen(module: nn.Module, around: Around) -> StepSpec:
    """Return a description from the layers alone, for a block that has none."""
    convs = tuple(conv_spec(m) for m in module.modules() if type(m) is nn.Conv2d)
    spec = StepSpec(channels=width(module.modules()), convs=convs, post=around.post)
    if around.shortcut is None:
        return spec
    layers = [*around.shortcut, *module.modules(), *around.shortcut]
    ends = {"in_channels": width(layers), "channels": width(layers[::-1], side="out")}
    shapes = shapes_inside(module, around.graph, layers, as_given=False)
    x, end = the_input(around.graph), the_output(around.graph)
    if shapes is None or x is None or end is None:
        return spec.model_copy(update=ends)
    (_, channels_in, *size_in), (_, channels, *size) = shapes[x], shapes[end]
    stride = tuple(max(before // after, 1) for before, after in zip(size_in, size, strict=True))
    return spec.model_copy(update={"in_channels": channels_in, "channels": channels, "stride": stride})


def _attention(module: nn.Module) -> str | None:
    names = (type(inner).__name__ for inner in module.modules())
    found = next((name for name in names if "attention" in name.lower() or name.endswith("Attn")), None)
    return None if found is None else f"attention in it ({found})"


def _check(module: nn.Module, around: Around, channels: int) -> None:
    """Run the trace. Raises: NotAStepError: its skip is not what came in, or its result not the module's."""
    first = next(module.parameters())
    if first.is_meta:
        return
    x = torch.linspace(-2, 2, channels * SIDE * SIDE).reshape(1, channels, SIDE, SIDE).to(first)
    given = x.clone()
    run = _Watching(module, around, x)
    try:
        got, wanted = run.run(x.clone()), module(given)
    except Exception as error:
        raise NotAStepError(f"can't run on its own on an input of {SIDE}x{SIDE}") from error
    if around.skip is not None and not run.skips_input:
        raise NotAStepError("its skip is no identity: the input is changed in place before the sum")
    if not torch.equal(given, x):
        raise NotAStepError("changes its input in place")
    if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise NotAStepError("does something that tracing it does not show")


class _Watching(fx.Interpreter):
    """Runs a trace, and looks at the value of an identity skip where it is added."""

    def __init__(self, module: nn.Module, around: Around, x: Tensor) -> None:
        super().__init__(module, graph=around.graph)
        self.skip, self.x = around.skip, x
        self.skips_input = False

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        if self.skip is not None and is_sum(n) and self.skip in n.args:
            self.skips_input = torch.equal(self.env[self.skip], self.x)
        return super().run_node(n)

"""What a module's own code does with its input, told by torch.fx from that module alone."""

from __future__ import annotations

import inspect
import operator
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from lcc.methods import LowCostOp
from lcc.ops.activations import ACTIVATIONS
from lcc.specs import Activation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
# Stochastic depth: the attribute that holds its rate, by class name (torchvision's and timm's).
DROP_RATES = {"DropPath": "drop_prob", "StochasticDepth": "p"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own flag is put back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """For tracing: as `evaluating`, and attributes and random state are put back too."""
    attributes = {inner: dict(vars(inner)) for inner in module.modules()}
    try:
        with evaluating(module), torch.random.fork_rng(devices=[]):
            yield
    finally:  # the tracer keeps constant tensors there, a forward whatever it likes to remember
        for inner, before in attributes.items():
            vars(inner).clear()
            vars(inner).update(before)


class _Tracer(fx.Tracer):
    """Stops at every child, or (`deep`) at every layer; the stock tracer stumbles over some of those."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.deep = deep

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # torch's names
        """Whether the module is one node of the graph."""
        return not self.deep or is_leaf(m)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer: it computes something itself, and is no arrangement of others."""
    if not list(module.children()) or isinstance(module, LowCostOp):
        return True
    torchs = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return torchs or is_norm(module)  # timm's norms have their activation as a child


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises with statistics or groups; frozen ones derive from nothing."""
    if isinstance(module, _NormBase | nn.GroupNorm):
        return True
    named = "BatchNorm" in type(module).__name__
    return named and not any(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())


def trace(module: nn.Module, *, deep: bool = False) -> fx.Graph | None:
    """Return the graph of the module's forward for one input, others at their defaults; None: untraceable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
            defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
            return _Tracer(deep=deep).trace(module, concrete_args=defaults)
    except Exception:  # noqa: BLE001  # any code may be in a forward; what can't be traced is no step
        return None


def the_input(graph: fx.Graph) -> fx.Node | None:
    """Return the one input that has to be given; None if there are several."""
    required = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
    return required[0] if len(required) == 1 else None


def the_output(graph: fx.Graph) -> fx.Node | None:
    """Return what is returned, if it is one value."""
    returned = next(iter(reversed(graph.nodes))).args[0]
    return returned if isinstance(returned, fx.Node) else None


def is_sum(node: fx.Node) -> bool:
    """Whether the node is a plain sum of two values."""
    plain = node.op in ("call_function", "call_method") and node.target in SUMS and not node.kwargs
    return plain and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def source(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Return the node whose value this one passes on, behind modules that do nothing."""
    while node.op == "call_module" and is_identity(modules[str(node.target)]):
        node = node.all_input_nodes[0]
    return node


def is_identity(module: nn.Module) -> bool:
    """Whether the module gives its input back: nn.Identity, an empty nn.Sequential, a lambda in a module."""
    if drop_rate(module) or next(module.parameters(), None) is not None:
        return False
    graph = trace(module)
    if graph is None:
        return False
    x, end = the_input(graph), the_output(graph)
    return x is not None and end is not None and source(end, dict(module.named_modules())) is x


def called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return what a node calls, by name."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    return str(getattr(node.target, "__name__", node.target))


def drop_rate(module: nn.Module) -> float:
    """Return the share of images for which stochastic depth leaves the module out; 0 where it is none."""
    return float(getattr(module, DROP_RATES.get(type(module).__name__, ""), None) or 0)


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """Return the activation that a node is, known by what it computes; None if it is none of them."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        return _known(modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return None

    def call(x: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: x)
        function = node.target if callable(node.target) else getattr(x, node.target)
        return function(*args, **kwargs) if callable(node.target) else function(*args[1:], **kwargs)

    return _known(call)


def activation_within(module: nn.Module) -> Activation | None:
    """Return the activation that a normalisation of timm applies to its result."""
    inner = getattr(module, "act", None)
    return _known(inner) if isinstance(inner, nn.Module) else None


def _known(call: Callable[[Tensor], Any]) -> Activation | None:
    if isinstance(call, nn.Module) and next(call.parameters(), None) is not None:
        return None
    x = torch.linspace(-9, 9, 361, dtype=torch.float64).reshape(1, 1, 19, 19)
    try:
        got = call(x.clone())
    except Exception:  # noqa: BLE001  # whatever it is, it is no activation
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape or got.dtype != x.dtype:
        return None
    return next(
        (
            name
            for name in get_args(Activation)
            if torch.allclose(got, ACTIVATIONS[name](x), rtol=0, atol=1e-9)
        ),
        None,
    )

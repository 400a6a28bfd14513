"""What the F of a residual step post(x + F(x)) is made of.

A trace down to the layers shows them; run on the meta device, it tells the sizes inside.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from lcc.methods import LowCostOp
from lcc.specs import Activation, ConvSpec, StepSpec
from lcc.tracing import (
    activation_of,
    activation_within,
    called,
    drop_rate,
    is_leaf,
    is_norm,
    the_input,
    the_output,
    trace,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # no public view
# Products of two feature maps, and products with weights that no layer holds.
PRODUCTS = {
    operator.matmul, torch.matmul, torch.bmm, torch.einsum, torch.softmax, F.softmax,
    F.scaled_dot_product_attention, F.conv2d, F.linear, "matmul", "bmm", "softmax",
}  # fmt: skip
SIDE = 56  # of the input on which sizes inside are looked at: divisible by windows of 7 and 8


class NotAStepError(Exception):
    """The module can't be described as a residual step; says why in words."""


def anatomy(module: nn.Module, post: Activation | None) -> StepSpec:
    """Return what F is made of. Raises: NotAStepError."""
    _refuse_by_name(module)
    graph = trace(module, deep=True)
    if graph is None:
        raise NotAStepError("its layers can't be told by tracing it")
    modules = dict(module.named_modules(remove_duplicate=False))
    calls = [n for n in graph.nodes if n.op == "call_module"]
    layers = [modules[str(node.target)] for node in calls]
    _refuse_by_use(module, graph, layers)
    convs = [node for node in calls if isinstance(modules[str(node.target)], nn.Conv2d | nn.Linear)]
    if not convs:
        raise NotAStepError("no convolution in it")
    channels, sizes = _sizes(module, graph, layers)
    inside = [node for node in convs if not _sees_one_pixel(modules[str(node.target)], sizes, node)]
    if not inside:
        raise NotAStepError("no convolution of the whole map in it")
    norms = [layer for layer in layers if is_norm(layer)]
    activations = [a for node in graph.nodes if (a := _activation(node, modules))]
    spec = StepSpec(
        channels=channels,
        convs=tuple(_spec(modules[str(node.target)]) for node in inside),
        squeeze=tuple(_spec(modules[str(node.target)]) for node in convs if node not in inside),
        in_a_row=_in_a_row(graph, inside),
        norm_params=sum(p.numel() for norm in norms for p in norm.parameters()),
        activation=next(iter(activations[:-1] if post else activations), None),
        post=post,
        pre_norm=is_norm(next(layer for layer in layers if isinstance(layer, nn.Conv2d) or is_norm(layer))),
        norm_eps=float(getattr(norms[0], "eps", 1e-5)) if norms else 1e-5,
        norm_momentum=getattr(norms[0], "momentum", 0.1) if norms else 0.1,
        drop_path=max((drop_rate(layer) for layer in module.modules()), default=0.0),
    )
    if spec.params != sum(p.numel() for p in module.parameters()):
        raise NotAStepError("holds parameters that its layers do not use")
    return spec


def conv_spec(conv: nn.Conv2d) -> ConvSpec:
    """Return the description of a convolution."""
    return ConvSpec(
        in_channels=int(conv.in_channels),
        out_channels=int(conv.out_channels),
        kernel_size=_pair(conv.kernel_size),
        stride=_pair(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),  # type: ignore[arg-type]  # pydantic checks
        dilation=_pair(conv.dilation),
        groups=int(conv.groups),
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether the module, or one inside it, carries what a replacement would lose."""
    return any(
        "forward" in vars(inner) or any(vars(inner)[hooks] for hooks in HOOKS) for inner in module.modules()
    )


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


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module" and is_norm(modules[str(node.target)]):
        return activation_within(modules[str(node.target)])
    return activation_of(node, modules)


def _sees_one_pixel(layer: nn.Module, sizes: dict[fx.Node, tuple[int, ...]], node: fx.Node) -> bool:
    """Whether a layer sees a map pooled to one pixel, not the whole. Raises: NotAStepError: neither."""
    before, after = sizes[node.all_input_nodes[0]], sizes[node]
    if isinstance(layer, nn.Linear):
        if len(before) != 2:
            raise NotAStepError("linear mixing of the channels of every pixel in it (Linear)")
        return True
    if before[2:] == after[2:] and after[2:] in ((SIDE, SIDE), (1, 1)):
        return after[2:] == (1, 1)
    raise NotAStepError("works at several resolutions inside")


def _in_a_row(graph: fx.Graph, convs: list[fx.Node]) -> bool:
    """Whether each convolution sees what the one before it gave, alone, and the sum that of the last."""
    x, end = the_input(graph), the_output(graph)
    assert x is not None
    assert end is not None
    stops = {x, *convs}

    def nearest(node: fx.Node) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            new = {earlier for earlier in waiting.pop().all_input_nodes if earlier not in seen}
            seen |= new
            waiting += new - stops
        return seen & stops

    row = all(nearest(node) == {earlier} for earlier, node in pairwise((x, *convs)))
    return row and nearest(end) == {x, convs[-1]}


class _Sizes(nn.Module):
    """Runs a graph of a module, and notes the shape of every value."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.module, self.graph = module, graph
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def forward(self, x: Tensor) -> None:
        outer = self

        class Noting(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    outer.shapes[n] = tuple(value.shape)
                return value

        Noting(self.module, graph=self.graph).run(x)


def _sizes(
    module: nn.Module, graph: fx.Graph, layers: list[nn.Module]
) -> tuple[int, dict[fx.Node, tuple[int, ...]]]:
    """Return how many channels come in, and the shape of every value for an input of SIDE x SIDE.

    Raises: NotAStepError: it can't run so.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {f"module.{name}": torch.empty_like(t, device="meta") for name, t in tensors.items()}
    dtype, end = next(module.parameters()).dtype, the_output(graph)
    # The first layer may see only a part of the input, the last give only a part of what is added to it.
    for channels in dict.fromkeys((width(layers), width(layers[::-1], side="out"))):
        runner = _Sizes(module, graph)
        x = torch.empty(1, channels, SIDE, SIDE, dtype=dtype, device="meta")
        try:
            functional_call(runner, state, (x,))
        except Exception:  # noqa: BLE001, S112  # what it does with such an input is its own affair
            continue
        if end is not None and runner.shapes[end] == tuple(x.shape):
            return channels, runner.shapes
    raise NotAStepError(f"can't run on its own on an input of {SIDE}x{SIDE}, or gives another shape")


def width(layers: Iterable[nn.Module], *, side: Literal["in", "out"] = "in") -> int:
    """Return how many channels the first of the layers takes or gives; 0 if none tells."""
    names = (f"{side}_channels", f"{side}_features", "num_features", "num_channels", "normalized_shape")
    for layer in layers:
        for name in names:
            value = getattr(layer, name, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                return value
    return 0


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


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)  # a host may have computed them with numpy

"""The shapes inside a module, told by running its trace on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from lcc.specs import Size
from lcc.tracing import the_output

if TYPE_CHECKING:
    from collections.abc import Iterable

    Shapes = dict[fx.Node, tuple[int, ...]]

SIDE = 56  # of the input: divisible by windows of 7 and 8


def shapes_inside(
    module: nn.Module, graph: fx.Graph, layers: list[nn.Module], *, as_given: bool
) -> Shapes | None:
    """Return the shape of every value in a graph of the module for an input of SIDE x SIDE pixels.

    `as_given`: what comes out has the shape of what comes in. None: it can't run so.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {f"module.{name}": torch.empty_like(t, device="meta") for name, t in tensors.items()}
    dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
    end = the_output(graph)
    # The first layer may see only a part of the input, the last give only a part of what is added to it.
    for channels in dict.fromkeys((width(layers), width(layers[::-1], side="out"))):
        runner = _Noting(module, graph)
        x = torch.empty(1, channels, SIDE, SIDE, dtype=dtype, device="meta")
        try:
            functional_call(runner, state, (x,))
        except Exception:  # noqa: BLE001, S112  # what it does with such an input is its own affair
            continue
        shape = () if end is None else runner.shapes.get(end, ())
        if len(shape) == x.ndim and (shape == tuple(x.shape) or not as_given):
            return runner.shapes
    return None


def size_in(shape: tuple[int, ...]) -> Size:
    """Return height and width in the shape (N, C, H, W) of a feature map."""
    return Size(height=shape[2], width=shape[3])


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


class _Noting(nn.Module):
    """Runs a graph of a module, and notes the shape of every value."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.module, self.graph = module, graph
        self.shapes: Shapes = {}

    def forward(self, x: Tensor) -> None:
        outer = self

        class Noting(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    outer.shapes[n] = tuple(value.shape)
                return value

        Noting(self.module, graph=self.graph).run(x)

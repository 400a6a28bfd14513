"""Which way an operator goes into an ONNX file: of those accurate enough, the fastest by measurement."""

from __future__ import annotations

import math
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcc.methods import LowCostOp, Lowering
from lcc.onnx_export import INPUT, layer_file
from lcc.onnx_runtime import Session
from lcc.specs import ConvSpec, Size, StepSpec
from lcc.timing import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Timer = Callable[[Sequence[nn.Module], Tensor], Sequence[float]]
    Timed = dict[Any, int]  # which of its candidates won, by all that their speed depends on

TOLERANCE = 1e-3  # how far an operator's lowering may be from the operator itself


def choose(
    op: LowCostOp,
    size: Size,
    *,
    tolerance: float = TOLERANCE,
    timed: Timed | None = None,
    timer: Timer | None = None,
) -> Lowering:
    """Return the fastest lowering for inputs of this size whose relative error is within the tolerance.

    Where none is, the one with the least error, and `how` says so. Rivals are timed alone, batch 1, one
    thread. `timed` remembers who won, so that operators alike are timed once.
    `timer` gives the time of every module on an example; default: `milliseconds`.
    """
    candidates = op.lowerings(size, tolerance)
    close = [lowering for lowering in candidates if lowering.relative_error <= tolerance]  # NaN is not
    if not close:
        best = min(candidates, key=_error)
        how = best.how or f"relative error {best.relative_error:.0e}"
        return best._replace(how=f"{how}, past the tolerance of {tolerance:.0e}")
    if len(close) == 1:
        return close[0]
    modules = [lowering.module for lowering in close]
    timed = {} if timed is None else timed
    key = (type(op), op.spec, size, tuple(_shape(module) for module in modules))
    if key not in timed:
        times = (timer or milliseconds)(modules, example_for(op.spec, size))
        timed[key] = min(range(len(times)), key=times.__getitem__)
    return close[timed[key]]


def lower_(
    network: nn.Module,
    sizes: Mapping[nn.Module, Sequence[Size]],
    *,
    tolerance: float = TOLERANCE,
    timer: Timer | None = None,
) -> dict[str, tuple[Lowering, ...]]:
    """Replace, in place, every operator by its lowering for the input sizes it is called with.

    What operators hold in common their lowerings do too. Returns what was chosen by the operator's name: one
    for each size.
    """
    timed: Timed = {}
    chosen: dict[str, tuple[Lowering, ...]] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, op in _operators(network):
        if op in sizes and op not in replacements:
            found = {
                size: choose(op, size, tolerance=tolerance, timed=timed, timer=timer) for size in sizes[op]
            }
            replacements[op] = _for_all({size: lowering.module for size, lowering in found.items()})
            chosen[name] = tuple(found.values())
    _keep_ties_(replacements)
    for name, op in _operators(network):
        if op in replacements:
            network.set_submodule(name, replacements[op])
    return chosen


def _keep_ties_(lowered: Mapping[nn.Module, nn.Module]) -> None:
    """Let lowerings of operators that have parameters in common hold each equal parameter of theirs once.

    A BatchNorm is folded into a kernel that one layer has alone, and must not be where others have it too.
    """
    first_with: dict[nn.Parameter, nn.Module] = {}
    for op, module in lowered.items():
        own = list(op.parameters())
        first = next((first_with[parameter] for parameter in own if parameter in first_with), module)
        first_with |= dict.fromkeys(own, first)
        theirs = dict(first.named_parameters())
        for name, parameter in list(module.named_parameters()):
            if name in theirs and torch.equal(theirs[name], parameter):
                owner, _, key = name.rpartition(".")
                setattr(module.get_submodule(owner), key, theirs[name])


def _operators(module: nn.Module, prefix: str = "") -> list[tuple[str, LowCostOp]]:
    """Return every (name, operator), shared ones under each name; what is inside one is a part of it."""
    found: list[tuple[str, LowCostOp]] = []
    for key, child in module._modules.items():  # noqa: SLF001  # named_children drops duplicates
        if isinstance(child, LowCostOp):
            found.append((prefix + key, child))
        elif child is not None:
            found += _operators(child, f"{prefix}{key}.")
    return found


@torch.no_grad()
def milliseconds(modules: Sequence[nn.Module], example: Tensor) -> list[float]:
    """Return the median time of each module on `example` (N, C, H, W) in ONNX Runtime, one thread."""
    sessions = [Session(layer_file(module, example)) for module in modules]
    calls = {
        str(number): partial(session.run, {INPUT: example.numpy()}) for number, session in enumerate(sessions)
    }
    latencies, _ = interleave(calls)
    return [latencies[name].median_ms for name in calls]


def example_for(spec: ConvSpec | StepSpec, size: Size, batch: int = 1) -> Tensor:
    """Return normally distributed numbers of the shape that a site takes, (batch, C, H, W)."""
    channels = spec.channels_in if isinstance(spec, StepSpec) else spec.in_channels
    return torch.randn(batch, channels, size.height, size.width)


class _BySize(nn.Module):
    """An operator lowered for each of the sizes that it is called with."""

    def __init__(self, modules: Mapping[Size, nn.Module]) -> None:
        super().__init__()
        self.by_size = nn.ModuleDict({str(size): module for size, module in modules.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W) of a size that there is a module for."""
        height, width = x.shape[2:]
        y: Tensor = self.by_size[f"{height}x{width}"](x)
        return y


def _for_all(modules: Mapping[Size, nn.Module]) -> nn.Module:
    """Return one module for all sizes: where all are the same the first, so that weights are kept once."""
    first, *others = modules.values()
    return first if all(_same(first, other) for other in others) else _BySize(modules)


def _same(a: nn.Module, b: nn.Module) -> bool:
    if _shape(a) != _shape(b):
        return False
    return all(torch.equal(x, y) for x, y in zip(_tensors(a).values(), _tensors(b).values(), strict=True))


def _shape(module: nn.Module) -> tuple[object, ...]:
    """Return all that the speed of a module depends on: its layers and the shapes of its numbers."""
    return str(module), tuple((name, tensor.shape) for name, tensor in _tensors(module).items())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _error(lowering: Lowering) -> float:
    return math.inf if math.isnan(lowering.relative_error) else lowering.relative_error

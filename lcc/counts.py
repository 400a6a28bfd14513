"""How many numbers a network stores and how many multiply-accumulates it runs: exact integers.

One MAC is one multiplication and one addition; FLOPs are two per MAC. Biases, norms, activations, pooling,
sums and elementwise products of tensors (complex ones too) cost none, by convention. One complex FFT of N
points is round(2.5 N log2 N) MACs, one from or to real numbers half of it. Transforms of weights cost none:
for frozen weights they are made once, not for each image.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lcc.errors import cannot_run
from lcc.methods import LowCostOp
from lcc.specs import Frozen, Size, fft_macs
from lcc.tracing import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable


# Parameters, but no multiply-accumulates by convention.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FREE = (*NORMS, nn.PReLU)
# Ops that fvcore counts and this convention does not.
FREE_OPS = (
    "batch_norm",
    "group_norm",
    "layer_norm",
    "instance_norm",
    "adaptive_avg_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
)
# Fourier transforms, none of which fvcore knows: from real numbers, to real numbers, complex.
FROM_REAL_FFTS = ("fft_rfft", "fft_rfft2", "fft_rfftn", "fft_ihfft")
TO_REAL_FFTS = ("fft_irfft", "fft_irfft2", "fft_irfftn", "fft_hfft")
COMPLEX_FFTS = ("fft_fft", "fft_fft2", "fft_fftn", "fft_ifft", "fft_ifft2", "fft_ifftn")
# What takes a tensor's shape or type, not its numbers.
BLIND_OPS = ("aten::size", "aten::new_zeros", "aten::new_ones", "aten::zeros_like", "aten::ones_like")


class MacCount(Frozen):
    """Multiply-accumulates of one image.

    `by_module` says where. `uncounted` maps modules that ran and hold parameters of their own, but whose MACs
    are not known, to their type. `never_called` lists modules with parameters that did not run as modules: if
    the host uses their weights itself, those MACs are missing. So are products without parameters, such as
    attention.
    """

    macs: int
    by_module: dict[str, int]
    uncounted: dict[str, str]
    never_called: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules of which MACs are not counted, or may not be."""
        return (*self.uncounted, *self.never_called)

    @property
    def flops(self) -> int:
        """Two per MAC."""
        return 2 * self.macs


class FvcoreCount(Frozen):
    """What fvcore counts for one image, norms and pooling left out; `unsupported`: ops it does not know."""

    macs: int
    unsupported: dict[str, int]


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, shared ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def count_params(model: nn.Module) -> int:
    """Return how many parameters there are, each shared tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> MacCount:
    """Count by running the model on the first image of `example` (N, C, H, W) in eval mode.

    Low-cost operators are counted by their method's formula, everything else by what it is made of.
    Raises: SourceError: the model can't run on the example.
    """
    macs: dict[str, int] = {}
    uncounted: dict[str, str] = {}
    called: set[nn.Module] = set()
    known = {name: module for name, module in model.named_modules() if isinstance(module, LowCostOp)}
    inside = {inner for operator in known.values() for inner in operator.modules()}
    parts = {inner for operator in known.values() for inner in operator.modules() if inner is not operator}
    operators = {name: operator for name, operator in known.items() if operator not in parts}

    def note(name: str, rule: Callable[[Any, Tensor, Tensor], int] | None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            called.add(module)
            if rule is not None:
                x = next(iter((*inputs, *named.values())))
                macs[name] = macs.get(name, 0) + rule(module, x, output)
            elif not isinstance(module, FREE):
                uncounted[name] = type(module).__name__

        return hook

    holders = {name: module for name, module in model.named_modules() if _holds_parameters(module)}
    handles = []
    for name, operator in operators.items():
        handles.append(operator.register_forward_hook(note(name, _by_formula), with_kwargs=True))
    for name, module in holders.items():
        if module not in inside:
            handles.append(module.register_forward_hook(note(name, _rule(module)), with_kwargs=True))
    try:
        with evaluating(model):
            model(example[:1])
    except Exception as error:  # the network's own
        raise cannot_run(example[:1].shape, error) from error
    finally:
        for handle in handles:
            handle.remove()
    skipped = [name for name, module in holders.items() if module not in called and module not in inside]
    return MacCount(macs=sum(macs.values()), by_module=macs, uncounted=uncounted, never_called=tuple(skipped))


def fvcore_macs(model: nn.Module, example: Tensor) -> FvcoreCount:
    """Return fvcore's count for the first image of `example`, as a cross-check of `count_macs`."""
    with warnings.catch_warnings():
        # fvcore decorates a function with torch.jit.script when it is imported (0.1.5, seen 2026-11).
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
        from fvcore.nn import FlopCountAnalysis
    with warnings.catch_warnings(), evaluating(model):
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.trace")  # it counts by tracing
        analysis = FlopCountAnalysis(model, example[:1])
        # A handle of None would not do: fvcore looks for its own handle first.
        analysis.set_op_handle(**{f"aten::{op}": lambda *_: 0 for op in FREE_OPS})
        analysis.set_op_handle(
            **{f"aten::{op}": _fft_handle(op) for op in (*FROM_REAL_FFTS, *TO_REAL_FFTS, *COMPLEX_FFTS)}
        )
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return FvcoreCount(macs=int(analysis.total()), unsupported=dict(analysis.unsupported_ops()))


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _rule(module: nn.Module) -> Callable[[Any, Tensor, Tensor], int] | None:
    """Return how to count the module's MACs from (module, input, output); None: free, or not known."""
    if isinstance(module, _ConvTransposeNd):
        return lambda m, x, _: x.numel() * (m.out_channels // m.groups) * math.prod(m.kernel_size)
    if isinstance(module, _ConvNd):
        return lambda m, _, y: y.numel() * (m.in_channels // m.groups) * math.prod(m.kernel_size)
    if isinstance(module, nn.Linear):
        return lambda m, _, y: y.numel() * m.in_features
    return None


def _by_formula(op: LowCostOp, x: Tensor, _: Tensor) -> int:
    maps = math.prod(x.shape[:-3])  # of one image, if its host cuts it into parts
    return maps * op.method.cost(op.spec, Size(height=x.shape[-2], width=x.shape[-1])).macs


def _fft_handle(op: str) -> Callable[[list[Any], list[Any]], int]:
    """Return how to count a transform from its arguments and results in the traced graph."""

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        x, lengths, dim = inputs[:3]
        if not _sees_the_image(x):
            return 0
        given, shape = list(x.type().sizes()), list(outputs[0].type().sizes())
        dims = _integers(dim)
        if dims is None:
            dims = list(range(len(shape)))[-len(_integers(lengths) or shape) :]
        if op in FROM_REAL_FFTS:  # the result has half of the frequencies
            stated = (_integers(lengths) or [None])[-1]
            shape[dims[-1]] = given[dims[-1]] if stated is None else stated
        points = math.prod(shape[d] for d in dims)
        transforms: int = math.prod(shape) // points
        return transforms * fft_macs(points, real=op not in COMPLEX_FFTS)

    return handle


def _integers(value: Any) -> list[Any] | None:
    """Return an argument of a traced op as a list; None: it was not given. Entries not constant are None."""
    if value.node().kind() == "prim::ListConstruct":
        return [entry.toIValue() for entry in value.node().inputs()]
    constant = value.toIValue()
    if constant is None or isinstance(constant, list):
        return constant
    return [constant]


def _sees_the_image(value: Any) -> bool:
    """Whether a value in a traced graph comes from the network's input, not from its weights alone."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if value.unique() in seen:
            continue
        seen.add(value.unique())
        if value.node().kind() == "prim::Param":
            if value.offset() == 0:  # the graph's first input; parameters and buffers follow
                return True
        elif value.node().kind() not in BLIND_OPS:
            pending.extend(value.node().inputs())
    return False


def count_norm_params(model: nn.Module) -> int:
    """Return how many of the parameters are BatchNorm's and other norms', which papers often leave out."""
    norms = (module for module in model.modules() if isinstance(module, NORMS))
    return sum(p.numel() for p in {p for norm in norms for p in norm.parameters(recurse=False)})

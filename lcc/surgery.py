"""Sites in a module tree, and their replacement: the only module that walks or edits one.

Replacing keeps every shape, so no graph is traced: a module is found by name and swapped in its parent.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.errors import RecipeError, SourceError
from lcc.methods import LowCostOp
from lcc.plan import Plan, Site
from lcc.specs import ConvSpec, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

ODD_SUBCLASSES = {
    "Conv2dSame": "pads as its input's size demands",
    "Conv2dSameExport": "pads as its input's size demands",
    "StdConv2d": "standardises its weights in every call",
    "StdConv2dSame": "standardises its weights in every call",
    "ScaledStdConv2d": "standardises its weights in every call",
    "ScaledStdConv2dSame": "standardises its weights in every call",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # no public view
# Exact in floating point, so that a function it does not change keeps every bit. Negative, so that
# a reader that ignores the scale of its input (a ReLU's sign, an argmax, a normalisation) shows up.
PROBE_FACTOR = -2.0


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


def find_sites(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Return every convolution of the model, in order of first call, those never called last.

    `example` is (N, C, H, W); the model runs on it a few times in eval mode and is left as it was.
    Raises: SourceError: the model can't run on the example.
    """
    convs: dict[nn.Conv2d | LowCostOp, list[str]] = {}
    for name, module in _outside_operators(model):
        if isinstance(module, nn.Conv2d | LowCostOp):
            convs.setdefault(module, []).append(name)
    calls = _record_calls(model, list(convs), example)
    norms = _sole_norms(model, calls, example)
    tied = _tied_parameters(model, list(convs))
    order = sorted(convs, key=lambda conv: calls[conv].first)
    return tuple(
        Site(
            name=convs[conv][0],
            spec=conv.spec if isinstance(conv, LowCostOp) else conv_spec(conv),
            sizes=tuple(calls[conv].sizes),
            aliases=tuple(convs[conv][1:]),
            norm=norms.get(conv),
            obstacle=_obstacle(conv, calls[conv], tied_to=tied.get(conv)),
        )
        for conv in order
    )


def replace_(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Replace, in place, every site of the plan by a freshly initialised operator; return the originals.

    A convolution registered under two parents becomes one operator under both. The operator takes over
    dtype, device, memory format, train/eval mode and requires_grad.
    Raises: RecipeError: the plan names a site that this model does not have, or can't be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    originals: dict[str, nn.Module] = {}
    replacements: dict[nn.Module, LowCostOp] = {}
    for site, method in plan.methods().items():
        conv = modules.get(site)
        if type(conv) is not nn.Conv2d:
            what = "no module" if conv is None else f"a {type(conv).__name__}"
            raise RecipeError(
                f"the plan converts {site!r}, but this network has {what} there; make a new plan"
            )
        spec = conv_spec(conv)
        reason = method.why_not(spec)
        if reason is not None:
            raise RecipeError(f"the plan converts {site!r} by {method}, which can't take it: {reason}")
        operator = method.build(spec)
        _match(operator, conv)
        originals[site] = conv
        replacements[conv] = operator
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # noqa: SLF001  # the documented container has no setter
            if child in replacements:
                parent._modules[key] = replacements[child]  # noqa: SLF001
    return originals


class _Calls:
    """What one forward pass showed of a convolution."""

    def __init__(self) -> None:
        self.first = float("inf")
        self.sizes: list[Size] = []
        self.by_keyword = False
        self.weight_read = False
        self.norm: _BatchNorm | None = None
        self.fed_norm = 0


def _outside_operators(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every (name, module), shared ones under each name, without looking inside operators."""
    for key, child in module._modules.items():  # noqa: SLF001  # named_children drops duplicates
        if child is None:
            continue
        name = f"{prefix}{key}"
        yield name, child
        if not isinstance(child, LowCostOp):
            yield from _outside_operators(child, f"{name}.")


def _record_calls(model: nn.Module, convs: list[nn.Module], example: Tensor) -> dict[nn.Module, _Calls]:
    calls = {conv: _Calls() for conv in convs}
    # The tensor is kept, so that its id stays its own; its version tells of changes in place.
    produced: dict[int, tuple[nn.Module, Tensor, int]] = {}
    step = 0

    def on_conv(
        conv: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        nonlocal step
        step += 1
        record = calls[conv]
        record.first = min(record.first, step)
        record.by_keyword = record.by_keyword or not inputs
        height, width = (*inputs, *named.values())[0].shape[-2:]
        record.sizes.append(Size(height=height, width=width))
        produced[id(output)] = (conv, output, output._version)  # noqa: SLF001  # its only name

    def on_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = produced.get(id(inputs[0])) if inputs else None
        if found is None:
            return
        conv, output, version = found
        if output._version == version and isinstance(norm, _BatchNorm):  # noqa: SLF001
            record = calls[conv]
            if record.norm in (None, norm):
                record.norm = norm
                record.fed_norm += 1

    handles = [conv.register_forward_hook(on_conv, with_kwargs=True) for conv in convs]
    handles += [m.register_forward_pre_hook(on_norm) for m in model.modules() if isinstance(m, _BatchNorm)]
    with _weights_watched([conv for conv in convs if type(conv) is nn.Conv2d]) as read_by_host:
        _run(model, example, handles)
    for conv in read_by_host:
        calls[conv].weight_read = True
    return calls


class _Watched(nn.Conv2d):
    """A convolution, for the length of one pass, that notes when its host reads its weight itself."""

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Run, and read the weight unnoticed."""
        vars(self)["runs"] = True
        try:
            return super().forward(*inputs, **named)
        finally:
            del vars(self)["runs"]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "runs" not in vars(self) and "read_by_host" in vars(self):
            vars(self)["read_by_host"].add(self)
        return super().__getattr__(name)


@contextmanager
def _weights_watched(convs: list[nn.Module]) -> Iterator[set[nn.Module]]:
    """Give the set into which every convolution goes whose weight is read from outside it."""
    read_by_host: set[nn.Module] = set()
    for conv in convs:
        vars(conv)["read_by_host"] = read_by_host
        conv.__class__ = _Watched
    try:
        yield read_by_host
    finally:
        for conv in convs:
            conv.__class__ = nn.Conv2d
            del vars(conv)["read_by_host"]


def _sole_norms(model: nn.Module, calls: dict[nn.Module, _Calls], example: Tensor) -> dict[nn.Module, str]:
    """Return the BatchNorm that alone consumes a convolution's output, where there is one.

    Scaling the output by a power of two, and back again before the BatchNorm, changes no bit of the result
    exactly if nothing else reads it.
    """
    names = {module: name for name, module in model.named_modules()}
    fed = [r.norm for r in calls.values() if r.norm is not None]
    candidates = {
        conv: record.norm
        for conv, record in calls.items()
        if record.norm is not None and record.fed_norm == len(record.sizes) and fed.count(record.norm) == 1
    }
    if not candidates:
        return {}
    wanted = _run(model, example, [])

    def unchanged(chosen: dict[nn.Module, _BatchNorm]) -> bool:
        handles = [
            conv.register_forward_hook(lambda _m, _i, output: output * PROBE_FACTOR) for conv in chosen
        ]
        handles += [
            norm.register_forward_pre_hook(lambda _m, inputs: (inputs[0] / PROBE_FACTOR, *inputs[1:]))
            for norm in chosen.values()
        ]
        return _same(_run(model, example, handles), wanted)

    def sole(chosen: list[tuple[nn.Module, _BatchNorm]]) -> list[tuple[nn.Module, _BatchNorm]]:
        if unchanged(dict(chosen)):
            return chosen
        middle = len(chosen) // 2
        return sole(chosen[:middle]) + sole(chosen[middle:]) if middle else []

    return {conv: names[norm] for conv, norm in sole(list(candidates.items()))}


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs, tensors or nested containers of them, agree in every bit."""
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _run(model: nn.Module, example: Tensor, handles: list[Any]) -> Any:
    """Return the model's output in eval mode; the hooks are removed, modes and random state put back."""
    devices = [example.device] if example.is_cuda else []
    with _as_it_was(model), torch.random.fork_rng(devices=devices):
        try:
            return model.eval()(example.clone())  # a first layer in place must not change the next run
        except Exception as error:
            shape = "x".join(str(n) for n in example.shape)
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(
                f"the network can't run on a {shape} input ({first_line}); give it another --image-size"
            ) from error
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put every module's train/eval flag back at the end; no gradients inside."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _tied_parameters(model: nn.Module, convs: list[nn.Module]) -> dict[nn.Module, str]:
    """Return, for convs that share a parameter with another module, the other's name."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return {
        conv: name
        for conv in convs
        for parameter in conv.parameters(recurse=False)
        for name, module in owners[id(parameter)]
        if module is not conv
    }


def _obstacle(conv: nn.Module, calls: _Calls, *, tied_to: str | None) -> str | None:
    """Return in words why nothing can replace the module; None if something may."""
    kind = type(conv).__name__
    if isinstance(conv, LowCostOp):
        return "converted already"
    if type(conv) is not nn.Conv2d:
        return f"a {kind}, which {ODD_SUBCLASSES.get(kind, 'computes something else than nn.Conv2d')}"
    if not calls.sizes:
        return "never called in a forward pass (its host may read its weights itself)"
    if tied_to is not None:
        return f"shares a parameter with {tied_to}"
    if any(vars(conv)[hooks] for hooks in HOOKS) or "forward" in vars(conv):
        return "carries hooks that a replacement would lose"
    if calls.weight_read:
        return "its host reads its weight itself, and a replacement has no such one"
    if calls.by_keyword:
        return "called with its input as a keyword, which a replacement does not take"
    return None


def _match(operator: LowCostOp, conv: nn.Conv2d) -> None:
    """Give the operator the dtype, device, memory format, mode and requires_grad of the convolution."""
    weight = conv.weight
    operator.to(device=weight.device, dtype=weight.dtype)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        operator.to(memory_format=torch.channels_last)
    operator.train(conv.training)
    operator.requires_grad_(weight.requires_grad)
    bias = getattr(operator, "bias", None)
    if bias is not None and conv.bias is not None:
        bias.requires_grad_(conv.bias.requires_grad)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)  # a host may have computed them with numpy

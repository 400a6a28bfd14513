"""What forward passes show of convolutions and residual blocks: when, on what, and who else looks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcc.specs import Size, StepSpec
from lcc.trials import largest, run_once, same_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Exact in floating point, so that a function it does not change keeps every bit. Negative, so that
# a reader that ignores the scale of its input (a ReLU's sign, an argmax, a normalisation) shows up.
PROBE_FACTOR = -2.0


class Calls:
    """What one forward pass showed of a layer or a residual block.

    `first` orders them by their first call; infinite: never called. `shapes` are those of the inputs, in a
    network that was given `batch` images. `norm` is the BatchNorm that a layer's output was fed to,
    `fed_norm` times. `oddity` says in words what a block does, or is asked to do, that a replacement would
    not.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first = float("inf")
        self.shapes: list[tuple[int, ...]] = []
        self.by_keyword = False
        self.weight_read = False
        self.norm: _BatchNorm | None = None
        self.fed_norm = 0
        self.oddity: str | None = None

    @property
    def other_batch(self) -> bool:
        """Whether it was given another number of maps than the network was given images."""
        return any(len(shape) != 4 or shape[0] != self.batch for shape in self.shapes)


def record_calls(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Mapping[nn.Module, StepSpec], example: Tensor
) -> dict[nn.Module, Calls]:
    """Run the model once in eval mode; return what that showed of every layer and residual block.

    `blocks` come with what they are said to be.
    Raises: SourceError: the model can't run on the example.
    """
    recorder = _Recorder(layers, blocks, len(example))
    with _weights_watched([layer for layer in layers if type(layer) is nn.Conv2d]) as read_by_host:
        run_once(model, example, recorder.hooks(model))
    for conv in read_by_host:
        recorder.calls[conv].weight_read = True
    return recorder.calls


class _Recorder:
    """The hooks of a recorded pass, and what they found."""

    def __init__(self, layers: Sequence[nn.Module], blocks: Mapping[nn.Module, StepSpec], batch: int) -> None:
        self.layers, self.blocks = layers, blocks
        self.calls = {module: Calls(batch) for module in (*layers, *blocks)}
        self.holders: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in layers}
        for block in blocks:
            for inner in block.modules():
                if inner in self.holders:
                    self.holders[inner].append(block)
        # The tensor is kept, so that its id stays its own; its version tells of changes in place.
        self.produced: dict[int, tuple[nn.Module, Tensor, int]] = {}
        self.running: list[tuple[nn.Module, int]] = []  # blocks, and the version of what they were given
        self.count = 0

    def hooks(self, model: nn.Module) -> list[Any]:
        """Return the handles of hooks on everything of interest."""
        handles = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(self.on_entry, with_kwargs=True))
            handles.append(layer.register_forward_hook(self.on_layer))
        for block in self.blocks:
            handles.append(block.register_forward_pre_hook(self.on_entry, with_kwargs=True))
            handles.append(block.register_forward_pre_hook(self.on_block_entry, with_kwargs=True))
            handles.append(block.register_forward_hook(self.on_block, with_kwargs=True))
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        return [*handles, *(norm.register_forward_pre_hook(self.on_norm) for norm in norms)]

    def on_entry(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.count += 1
        record = self.calls[module]
        record.first = min(record.first, self.count)
        record.by_keyword = record.by_keyword or not inputs
        x = next(iter((*inputs, *named.values())), None)
        record.shapes.append(tuple(x.shape) if isinstance(x, Tensor) else ())

    def on_layer(self, layer: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self.produced[id(output)] = (layer, output, output._version)  # noqa: SLF001  # its only name
        for block in self.holders[layer]:
            if all(running is not block for running, _ in self.running):
                self.calls[block].oddity = "layers inside it are also called from outside it"

    def on_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = self.produced.get(id(inputs[0])) if inputs else None
        if found is None:
            return
        layer, output, version = found
        if output._version == version and isinstance(norm, _BatchNorm):  # noqa: SLF001
            record = self.calls[layer]
            if record.norm in (None, norm):
                record.norm = norm
                record.fed_norm += 1

    def on_block_entry(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(iter((*inputs, *named.values())), None)
        self.running.append((block, x._version if isinstance(x, Tensor) else 0))  # noqa: SLF001

    def on_block(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        _, version = self.running.pop()
        x, *more = (*inputs, *named.values())
        record = self.calls[block]
        if more or not isinstance(x, Tensor) or x.ndim != 4:
            record.oddity = "called with something else than one (N, C, H, W) tensor"
        elif not isinstance(output, Tensor) or tuple(output.shape) != _given(self.blocks[block], x):
            changes = self.blocks[block].is_transition
            record.oddity = f"gives another shape than {'its strides say' if changes else 'it takes'}"
        elif x._version != version:  # noqa: SLF001
            record.oddity = "changes its input in place"


def _given(spec: StepSpec, x: Tensor) -> tuple[int, ...]:
    """Return the shape of what a block gives for x (N, C, H, W), if it is as described."""
    if not spec.is_transition:
        return tuple(x.shape)
    size = spec.out_size(Size(height=x.shape[2], width=x.shape[3]))
    return (len(x), spec.channels, size.height, size.width)


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


def sole_norms(model: nn.Module, calls: dict[nn.Module, Calls], example: Tensor) -> dict[nn.Module, str]:
    """Return the BatchNorm that alone consumes a convolution's output, where there is one.

    Scaling the output by a power of two, and back again before the BatchNorm, changes no bit of the result
    exactly if nothing else reads it.
    """
    names = {module: name for name, module in model.named_modules()}
    fed = [r.norm for r in calls.values() if r.norm is not None]
    candidates = {
        conv: record.norm
        for conv, record in calls.items()
        if record.norm is not None and record.fed_norm == len(record.shapes) and fed.count(record.norm) == 1
    }
    if not candidates:
        return {}
    wanted = run_once(model, example)

    def unchanged(chosen: list[tuple[nn.Module, _BatchNorm]]) -> bool:
        handles = [
            conv.register_forward_hook(lambda _m, _i, output: output * PROBE_FACTOR) for conv, _ in chosen
        ]
        handles += [
            norm.register_forward_pre_hook(lambda _m, inputs: (inputs[0] / PROBE_FACTOR, *inputs[1:]))
            for _, norm in chosen
        ]
        return same_outputs(run_once(model, example, handles), wanted)

    return {conv: names[norm] for conv, norm in largest(list(candidates.items()), unchanged)}

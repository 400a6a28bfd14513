"""Latency of networks, ONNX files and single layers, with the conditions under which it was measured.

Inputs and the weights of dense layers are random: the time does not depend on them.
"""

from __future__ import annotations

import copy
import platform
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime
import torch
from torch import Tensor, nn

from lcc.blocks import dense
from lcc.errors import RecipeError
from lcc.lowering import choose, example_for
from lcc.onnx_export import layer_file
from lcc.onnx_runtime import Device, Session
from lcc.specs import ConvSpec, Frozen, Size, StepSpec
from lcc.timing import ROUNDS, RUNS, Latency, Speedup, interleave, seconds_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lcc.methods import LowCostOp, Method
    from lcc.onnx_runtime import Array
    from lcc.plan import Site
    from lcc.timing import Call


CPUINFO, BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")  # on Linux


class Conditions(Frozen):
    """Under what a latency was measured."""

    runtime: str
    version: str
    device: str
    threads: int
    batch: int
    image_size: str
    dtype: str
    rounds: int
    runs_per_round: int = RUNS

    def __str__(self) -> str:
        return (
            f"{self.runtime} {self.version}, {self.device}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"batch {self.batch}, {self.image_size}, {self.dtype}, "
            f"{self.rounds} interleaved rounds of {self.runs_per_round} runs"
        )


class Bench(Frozen):
    """Latencies by name, and the speed-up of each over the first, which has none."""

    conditions: Conditions
    latencies: dict[str, Latency]
    speedups: dict[str, Speedup]


class LayerLatency(Frozen):
    """A dense convolution and the operator in its place, timed alone; `slower`: the operator loses."""

    before: Latency
    after: Latency
    speedup: Speedup
    slower: bool


class LayerBench(Frozen):
    """Latencies of the replaced layers, by site."""

    conditions: Conditions
    layers: dict[str, LayerLatency]


def bench_torch(
    models: Mapping[str, nn.Module],
    example: Tensor | Mapping[str, Tensor],
    *,
    threads: int = 1,
    device: Device = "cpu",
    rounds: int = ROUNDS,
) -> Bench:
    """Time copies of models in eager torch, eval mode; the first is the baseline.

    `example` (N, C, H, W) is what they see, all the same or each its own.
    Raises: RecipeError: the device can't be had, or too few rounds.
    """
    check_device(device)
    examples = dict.fromkeys(models, example) if isinstance(example, Tensor) else example
    copies = {name: copy.deepcopy(model).to(device).eval() for name, model in models.items()}
    calls = {name: _torch_call(model, examples[name].to(device)) for name, model in copies.items()}
    with _torch_threads(threads), torch.inference_mode():
        latencies, speedups = interleave(calls, rounds=rounds, wait=_wait(device))
    conditions = Conditions(
        runtime="torch eager (NCHW)",
        version=torch.__version__,
        device=device_name(device),
        threads=threads,
        batch=len(next(iter(examples.values()))),
        image_size=_sizes(x.shape for x in examples.values()),
        dtype=" / ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in examples.values())),
        rounds=rounds,
    )
    return Bench(conditions=conditions, latencies=latencies, speedups=speedups)


def bench_onnx(
    files: Mapping[str, Path | bytes],
    *,
    batch: int = 1,
    threads: int = 1,
    device: Device = "cpu",
    rounds: int = ROUNDS,
) -> Bench:
    """Time ONNX files in ONNX Runtime, inputs and outputs in main memory; the first is the baseline.

    Raises: SourceError: a file that can't be run so. RecipeError: the device can't be had, or too few rounds.
    """
    sessions = {name: Session(file, threads=threads, device=device) for name, file in files.items()}
    inputs = {name: session.example(batch) for name, session in sessions.items()}
    calls = {name: _onnx_call(session, inputs[name]) for name, session in sessions.items()}
    latencies, speedups = interleave(calls, rounds=rounds)
    conditions = Conditions(
        runtime="ONNX Runtime",
        version=onnxruntime.__version__,
        device=device_name(device),
        threads=threads,
        batch=batch,
        image_size=_sizes(x.shape for feed in inputs.values() for x in feed.values()),
        dtype=" / ".join(dict.fromkeys(session.precision for session in sessions.values())),
        rounds=rounds,
    )
    return Bench(conditions=conditions, latencies=latencies, speedups=speedups)


def bench_layers(
    sites: Iterable[Site],
    operators: Mapping[str, LowCostOp],
    *,
    onnx: bool,
    batch: int = 1,
    threads: int = 1,
    device: Device = "cpu",
    rounds: int = ROUNDS,
) -> LayerBench:
    """Time the operators of sites, by the sites' names, against the dense convolutions, each alone.

    At the input size of the site's first call, in ONNX Runtime (`onnx`, through the same export
    as a whole network) or eager torch. Sites alike in shape, size and method are timed once, with the first
    one's weights. Alone, a layer has nothing to fuse with and pays for its own memory layout, so the sum is
    not the network's time.
    """
    timed: dict[tuple[ConvSpec | StepSpec, Size, Method], LayerLatency] = {}
    layers: dict[str, LayerLatency] = {}
    conditions = None
    for site in sites:
        if site.name not in operators or not site.sizes:
            continue
        operator = operators[site.name]
        key = (site.spec, site.sizes[0], operator.method)
        if key not in timed:
            bench = _bench_pair(
                site.spec,
                site.sizes[0],
                operator,
                onnx=onnx,
                batch=batch,
                threads=threads,
                device=device,
                rounds=rounds,
            )
            slower = _is_slower(bench)
            timed[key] = LayerLatency(**bench.latencies, speedup=bench.speedups["after"], slower=slower)
            conditions = bench.conditions
        layers[site.name] = timed[key]
    if conditions is None:
        raise RecipeError("the plan converts no site that runs, so there is no layer to time")
    return LayerBench(
        conditions=conditions.model_copy(update={"image_size": "each layer's own size"}), layers=layers
    )


def _sizes(shapes: Iterable[Sequence[int]]) -> str:
    return ", ".join(dict.fromkeys("x".join(map(str, shape[-2:])) for shape in shapes))


def one_run(model: nn.Module, example: Tensor, *, threads: int = 1, device: Device = "cpu") -> float:
    """Return the seconds of one run in eager torch, the lesser of two: to plan by, no result."""
    on_device, ready = example.to(device), copy.deepcopy(model).to(device).eval()
    with _torch_threads(threads), torch.inference_mode():
        ready(on_device)
        return min(seconds_of(_torch_call(ready, on_device), _wait(device)) for _ in range(2))


def check_device(device: Device) -> None:
    """Raise RecipeError if torch can't have the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("torch finds no CUDA device; use --device cpu")


def device_name(device: Device) -> str:
    """Return what the processor or the GPU calls itself."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return cpu_name(CPUINFO, BOARD) or platform.processor() or platform.machine()


def cpu_name(cpuinfo: Path, board: Path) -> str:
    """Return the processor's name; where it has none, as on ARM, the board's and the numbers of its cores."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    for key, value in known:
        if key == "model name":
            return value
    boards = [board.read_text().strip("\0\n")] if board.exists() else []
    cores = dict.fromkeys(f"{key} {value}" for key, value in known if key in ("CPU implementer", "CPU part"))
    return ", ".join((*boards, *cores))


def _bench_pair(
    spec: ConvSpec | StepSpec,
    size: Size,
    operator: LowCostOp,
    *,
    onnx: bool,
    batch: int,
    threads: int,
    device: Device,
    rounds: int,
) -> Bench:
    example = example_for(spec, size, batch)
    before, after = dense(spec), copy.deepcopy(operator).cpu().eval()
    if not onnx:
        pair = {"before": before, "after": after}
        return bench_torch(pair, example, threads=threads, device=device, rounds=rounds)
    pair = {"before": before, "after": choose(after, size).module}
    files = {name: layer_file(module, example) for name, module in pair.items()}
    return bench_onnx(files, batch=batch, threads=threads, device=device, rounds=rounds)


def _torch_call(model: nn.Module, example: Tensor) -> Call:
    return lambda: model(example)


def _onnx_call(session: Session, inputs: dict[str, Array]) -> Call:
    return lambda: session.run(inputs)


def _wait(device: Device) -> Call:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_slower(bench: Bench) -> bool:
    """Whether an operator loses, by the ratios of runs side by side and by the medians of each alone."""
    before, after = (bench.latencies[name].median_ms for name in ("before", "after"))
    return bench.speedups["after"].median < 1 and after > before

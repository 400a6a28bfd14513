"""Times the operators of a sweep against the dense convolution of the same shape, in turns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lcc import progress
from lcc.convolutions import convolution
from lcc.errors import CheckFailedError, RecipeError
from lcc.lowering import choose
from lcc.measure import Bench, bench_onnx, bench_torch, check_device, one_run
from lcc.memory import free_memory
from lcc.methods import LowCostOp
from lcc.onnx_export import INPUT, layer_file
from lcc.onnx_runtime import Session
from lcc.sweep import Point, Runtime, Sweep, break_evens
from lcc.sweep_axes import ALONE
from lcc.timing import MIN_RUNS, RUNS, seconds_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.methods import Method
    from lcc.onnx_runtime import Device
    from lcc.sweep_axes import Axis, Shape, SweepOptions

DENSE = "dense"
RUNTIMES: dict[Runtime, str] = {"torch": "in eager torch", "onnx": "in ONNX Runtime"}
MIN_ROUNDS = math.ceil(MIN_RUNS / RUNS)
TRIALS = 3
WARM_UP_RUNS = 8  # about what a warm-up takes
# Feature maps (spectra and temporaries included) and dense kernels alive at one time, and the share of free
# memory that they may take: generous, to keep a machine from swapping.
MAPS, KERNELS, SHARE = 12, 8, 0.8


class Remark(NamedTuple):
    """What is to be said of an operator (None: of a whole point), in one runtime (None: in all)."""

    operator: str | None
    text: str
    runtime: Runtime | None = None


class Measured(NamedTuple):
    """What one shape gave."""

    benches: dict[Runtime, Bench]
    remarks: list[Remark]


def sweep_operators(
    options: SweepOptions, *, batch: int = 1, threads: int = 1, device: Device = "cpu", rounds: int = 15
) -> tuple[Sweep, ...]:
    """Time every operator against the dense convolution of its shape, all in turns, along every axis.

    Weights are random: times do not depend on them, save where they decide how an operator is lowered.
    Returns a sweep for each axis in each runtime.
    Raises: RecipeError: the device can't be had, too few rounds, or nothing that could be timed.
    """
    check_device(device)
    bench = _PointBench(options, batch, threads, device, rounds, _obstacle(device))
    rows = {axis: [options.fixed.at(axis, n) for n in values] for axis, values in options.axes.items()}
    shapes = list(dict.fromkeys(shape for row in rows.values() for shape in row))
    measured: dict[Shape, Measured] = {}
    with progress.bar("timing operators", len(shapes)) as tick:
        for done, shape in enumerate(shapes):
            tick(done, shape.__str__)
            measured[shape] = bench.measure(shape)
        tick(len(shapes))
    sweeps = [
        sweep
        for axis, row in rows.items()
        for sweep in _along(axis, options.fixed, {getattr(shape, axis): measured[shape] for shape in row})
    ]
    if not sweeps:
        said = dict.fromkeys(_words(remark) for one in measured.values() for remark in one.remarks)
        raise RecipeError(f"the sweep has nothing to time: {'; '.join(said) or 'name a --method'}")
    return tuple(sweeps)


@dataclass(frozen=True)
class _PointBench:
    """How every point is measured; `obstacle`: why not in ONNX Runtime."""

    options: SweepOptions
    batch: int
    threads: int
    device: Device
    rounds: int
    obstacle: str | None

    def measure(self, shape: Shape) -> Measured:
        """Time what can be timed at this shape."""
        rivals, remarks = _rivals(shape, self.options.methods)
        if len(rivals) == 1:
            return Measured({}, remarks)
        if too_large := _too_large(shape, self.batch, self.device):
            return Measured({}, [*remarks, Remark(None, too_large)])
        try:
            return self._timed(shape, rivals, remarks)
        except torch.OutOfMemoryError:
            return Measured({}, [*remarks, Remark(None, "left out: the GPU ran out of memory")])

    def _timed(self, shape: Shape, rivals: dict[str, nn.Module], remarks: list[Remark]) -> Measured:
        example = torch.randn(self.batch, shape.channels, shape.size, shape.size)
        times = {
            name: one_run(model, example, threads=self.threads, device=self.device)
            for name, model in rivals.items()
        }
        rounds, slow = affordable(times, self.options.seconds, self.rounds)
        remarks = [*remarks, *slow]
        if rounds == 0:
            return Measured({}, remarks)
        if rounds < self.rounds:
            remarks.append(Remark(None, f"{rounds} rounds, to stay under {self.options.seconds:g} s"))
        for remark in slow:
            rivals.pop(str(remark.operator))
        benches: dict[Runtime, Bench] = {
            "torch": bench_torch(rivals, example, threads=self.threads, device=self.device, rounds=rounds)
        }
        if self.obstacle is not None:
            return Measured(benches, [*remarks, Remark(None, self.obstacle, "onnx")])
        files, said = _files(rivals, shape, example)
        if len(files) > 1:
            benches["onnx"] = bench_onnx(
                files, batch=self.batch, threads=self.threads, device=self.device, rounds=rounds
            )
        if self.device == "cuda":
            said.append(Remark(None, "times include copies from and to main memory", "onnx"))
        return Measured(benches, [*remarks, *said])


def affordable(times: dict[str, float], seconds: float, rounds: int) -> tuple[int, list[Remark]]:
    """Return how many rounds fit into so many seconds, and what is left out for it, the slowest first.

    `times`: seconds of one run of every rival, the dense convolution first. 0 rounds: nothing fits.
    """
    dense, *operators = times
    kept = sorted(operators, key=times.__getitem__)
    left_out: list[Remark] = []
    while True:
        run = times[dense] + sum(times[name] for name in kept)
        fitting = int((seconds / run - WARM_UP_RUNS) / (RUNS + 1))
        if fitting >= min(MIN_ROUNDS, rounds):
            return min(fitting, rounds), left_out
        needed = run * ((RUNS + 1) * MIN_ROUNDS + WARM_UP_RUNS)
        too_long = f"would take about {needed:.0f} s, more than the {seconds:g} s of a point"
        if len(kept) == 1:
            return 0, [Remark(None, f"left out: with {kept[0]} alone it {too_long}")]
        left_out.append(Remark(kept.pop(), f"left out: with it the point {too_long}"))


def _rivals(shape: Shape, methods: Sequence[Method]) -> tuple[dict[str, nn.Module], list[Remark]]:
    """Return the dense convolution and every operator that can stand in for it, and why others can't."""
    spec = shape.spec
    rivals: dict[str, nn.Module] = {DENSE: convolution(spec)}
    remarks = []
    for method in methods:
        if method.shares:
            why: str | None = ALONE
        else:
            why = method.why_not(spec) if "conv" in method.kinds else "it stands in for no convolution"
        if why is not None:
            remarks.append(Remark(str(method), f"left out: {why}"))
            continue
        rivals[str(method)] = with_random_weights_(method.build(spec).eval())
    return rivals, remarks


@torch.no_grad()
def with_random_weights_(operator: LowCostOp) -> LowCostOp:
    """Return the operator with seeded normal weights.

    Weights may decide how long a lowered operator is, and those of a start may be unlike any after training.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in operator.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return operator


def _files(
    rivals: dict[str, nn.Module], shape: Shape, example: torch.Tensor
) -> tuple[dict[str, bytes], list[Remark]]:
    """Return every rival, lowered, as an ONNX file, and how it was lowered or why it can't be."""
    files, remarks = {}, []
    for name, rival in rivals.items():
        if not isinstance(rival, LowCostOp):
            files[name] = layer_file(rival, example)
            continue
        try:
            lowering = choose(rival, shape.image, timer=_trial)
            files[name] = layer_file(lowering.module, example)
        except CheckFailedError as error:
            remarks.append(Remark(name, f"left out: {error}", "onnx"))
            continue
        if lowering.how:
            remarks.append(Remark(name, lowering.how, "onnx"))
    return files, remarks


def _trial(modules: Sequence[nn.Module], example: torch.Tensor) -> list[float]:
    """Return the seconds of each module in ONNX Runtime, the least of a few: enough to choose by."""
    times = []
    for module in modules:
        run = partial(Session(layer_file(module, example)).run, {INPUT: example.numpy()})
        run()
        times.append(min(seconds_of(run, lambda: None) for _ in range(TRIALS)))
    return times


def _too_large(shape: Shape, batch: int, device: Device) -> str | None:
    needed = 4 * (MAPS * batch * shape.channels * shape.image.pixels + KERNELS * shape.spec.weights)
    free = free_memory(torch.device(device))
    if needed <= SHARE * free:
        return None
    return f"left out: may take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def _obstacle(device: Device) -> str | None:
    """Return why ONNX Runtime can't be timed on this device."""
    if device == "cpu":
        return None
    try:
        Session(layer_file(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), device=device)
    except RecipeError as error:
        return f"not timed: {error}"
    return None


def _along(axis: Axis, fixed: Shape, measured: dict[int, Measured]) -> list[Sweep]:
    """Return what was measured along an axis, by value: a sweep for each runtime."""
    runtimes = [runtime for runtime in RUNTIMES if any(runtime in one.benches for one in measured.values())]
    sweeps = []
    for runtime in runtimes:
        benches = {value: one.benches[runtime] for value, one in measured.items() if runtime in one.benches}
        points = tuple(_point(value, bench) for value, bench in benches.items())
        sizes = dict.fromkeys(bench.conditions.image_size for bench in benches.values())
        common = {
            "rounds": max(point.rounds for point in points),
            "image_size": ", ".join(sizes),
        }
        first = next(iter(benches.values()))
        sweeps.append(
            Sweep(
                axis=axis,
                runtime=runtime,
                fixed=fixed,
                conditions=first.conditions.model_copy(update=common),
                points=points,
                break_even=break_evens(points) if axis == "channels" else {},
                notes=_notes(axis, runtime, measured, missing=set(RUNTIMES) - set(runtimes)),
            )
        )
    return sweeps


def _point(value: int, bench: Bench) -> Point:
    return Point(
        value=value, rounds=bench.conditions.rounds, latencies=bench.latencies, speedups=bench.speedups
    )


def _notes(
    axis: Axis, runtime: Runtime, measured: dict[int, Measured], missing: set[Runtime]
) -> tuple[str, ...]:
    """Return in a line each what is to be said, and at which values where not at all of them.

    What concerns a `missing` runtime, for which there is no sweep, is said in every other one.
    """
    values: dict[str, list[int]] = {}
    for value, one in measured.items():
        for remark in one.remarks:
            if remark.runtime in (None, runtime):
                values.setdefault(_words(remark), []).append(value)
            elif remark.runtime in missing:
                values.setdefault(f"{RUNTIMES[remark.runtime]}: {_words(remark)}", []).append(value)
    return tuple(
        text if len(at) == len(measured) else f"at {axis} {', '.join(map(str, at))}: {text}"
        for text, at in values.items()
    )


def _words(remark: Remark) -> str:
    return remark.text if remark.operator is None else f"{remark.operator}: {remark.text}"

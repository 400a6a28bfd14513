"""How long convolutions and the operators that could replace them take here, each alone; kept on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime
import torch

from lcc import progress
from lcc.blocks import dense
from lcc.errors import CheckFailedError, SourceError
from lcc.lowering import choose, example_for
from lcc.measure import bench_onnx, bench_torch, check_device, device_name
from lcc.measurements import Store, own_code
from lcc.methods import AnyMethod, LowCostOp, Method
from lcc.onnx_export import layer_file
from lcc.onnx_runtime import Device, Session
from lcc.operator_timing import DENSE, with_random_weights_
from lcc.specs import ConvSpec, Frozen, Size, StepSpec
from lcc.sweep import Runtime
from lcc.timing import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from lcc.measure import Bench


class Timing(Frozen):
    """How to measure. `rounds` is no condition: what is kept counts, however many rounds it had."""

    runtime: Runtime = "onnx"
    device: Device = "cpu"
    batch: int = 1
    threads: int = 1
    rounds: int = ROUNDS


class Place(Frozen):
    """Where an operator stands: what it replaces, and the size of its input."""

    spec: ConvSpec | StepSpec
    size: Size

    def __str__(self) -> str:
        return f"{self.spec}, {self.size}"


class Timed(Frozen):
    """What a rival takes; `ratio`: over its dense convolution (itself 1), the median over rounds."""

    median_ms: float
    iqr_ms: float
    noisy: bool
    ratio: float


LatencyTable = dict[Place, dict[Method | None, Timed]]  # None: the dense convolution


def measure_latencies(
    wanted: Mapping[Place, Sequence[Method]], timing: Timing, *, cache: Path | None
) -> LatencyTable:
    """Time, at every place, the dense convolution and every method's operator, all in turns in one run.

    `wanted`: methods that can take the place. Weights are random. What the folder `cache` holds is not timed
    again, what is timed is added place by place; None: nothing is read or kept. A `median_ms` is the `ratio`
    times the dense one's: what was timed later at a place is on the scale of its first run. What can't be
    exported has no entry (`reasons` says why); where the dense one can't, the place is empty.
    Raises: RecipeError: the device can't be had, or too few rounds. ArtifactError: the cache can't be used.
    """
    store = _store(cache, timing)
    records = _first_of_each(store.read())
    todo = _todo(wanted, records)
    if todo:
        store.keep(())  # that the folder can't be written is said before the first measurement
        with progress.bar("timing operators", len(todo)) as tick:
            for done, (place, rivals) in enumerate(todo.items()):
                tick(done, place.__str__)
                new = _measured(place, rivals, timing)
                store.keep(new)
                records |= {(place, record.method): record for record in new}
            tick(len(todo))
    return {
        place: _on_one_scale([records[place, rival] for rival in _rivals(methods)])
        for place, methods in wanted.items()
    }


def missing(wanted: Mapping[Place, Sequence[Method]], timing: Timing, *, cache: Path | None) -> int:
    """Return how many rivals, dense convolutions included, have not been measured yet."""
    return sum(map(len, _todo(wanted, _first_of_each(_store(cache, timing).read())).values()))


def reasons(timing: Timing, *, cache: Path | None) -> dict[tuple[Place, Method | None], str]:
    """Return in words why rivals that were tried under these conditions have no entry in the table."""
    records = _first_of_each(_store(cache, timing).read())
    return {key: record.outcome for key, record in records.items() if isinstance(record.outcome, str)}


def conditions_of(timing: Timing) -> dict[str, object]:
    """Return all that a time depends on, besides what is timed.

    Raises: RecipeError: the device can't be had.
    """
    check_device(timing.device)
    return {
        "runtime": timing.runtime,
        "version": onnxruntime.__version__ if timing.runtime == "onnx" else torch.__version__,
        "device": device_name(timing.device),
        "threads": timing.threads,
        "batch": timing.batch,
        "torch": torch.__version__,
        "lcc": own_code(),
    }


class _Record(Frozen):
    """A rival as measured, or in words why it could not be."""

    place: Place
    method: AnyMethod | None
    outcome: Timed | str


Records = dict[tuple[Place, Method | None], _Record]


def _store(cache: Path | None, timing: Timing) -> Store[_Record]:
    return Store(cache, "latency", conditions_of(timing), _Record)


def _first_of_each(records: Sequence[_Record]) -> Records:
    """Return records by place and rival; of several, as of two processes at once, the first."""
    return {(record.place, record.method): record for record in reversed(records)}


def _rivals(methods: Sequence[Method]) -> list[Method | None]:
    return [None, *dict.fromkeys(methods)]


def _todo(wanted: Mapping[Place, Sequence[Method]], records: Records) -> dict[Place, list[Method | None]]:
    """Return the rivals that are not measured yet, of the places that have any."""
    return {
        place: rivals
        for place, methods in wanted.items()
        if (rivals := [rival for rival in _rivals(methods) if (place, rival) not in records])
    }


def _on_one_scale(records: Sequence[_Record]) -> dict[Method | None, Timed]:
    """Return the times at one place by way of their ratios to the dense one, whose record is the first."""
    base, found = records[0].outcome, {}
    for record in records:
        if isinstance(base, Timed) and isinstance(timed := record.outcome, Timed):
            median = timed.ratio * base.median_ms
            spread = timed.iqr_ms * (median / timed.median_ms)
            found[record.method] = timed.model_copy(update={"median_ms": median, "iqr_ms": spread})
    return found


def _measured(place: Place, rivals: Sequence[Method | None], timing: Timing) -> list[_Record]:
    """Time rivals beside the dense convolution, which is recorded only if it is one of them."""
    with torch.random.fork_rng(devices=[]):  # what is drawn later must not depend on what was kept
        models = {DENSE: dense(place.spec)}
        for method in filter(None, rivals):
            operator = with_random_weights_(method.build(place.spec).eval())
            operator.at_its_slowest_()
            models[str(method)] = operator
        found = _timed(models, place, timing)
    return [_Record(place=place, method=one, outcome=found[str(one or DENSE)]) for one in rivals]


def _timed(models: Mapping[str, nn.Module], place: Place, timing: Timing) -> dict[str, Timed | str]:
    """Time models, the dense convolution first, or say why they can't be."""
    example = example_for(place.spec, place.size, timing.batch)
    threads, device, rounds = timing.threads, timing.device, timing.rounds
    if timing.runtime == "torch":
        return _from_bench(bench_torch(models, example, threads=threads, device=device, rounds=rounds))
    files: dict[str, bytes] = {}
    why: dict[str, Timed | str] = {}
    for name, model in models.items():
        try:
            lowered = choose(model, place.size).module if isinstance(model, LowCostOp) else model
            file = layer_file(lowered, example)
            Session(file, threads=threads, device=device)  # else its failure would end the others' run
            files[name] = file
        except (CheckFailedError, SourceError) as error:
            why[name] = str(error)
    if DENSE in why:
        return dict.fromkeys(models, f"the dense convolution can't be timed: {why[DENSE]}")
    bench = bench_onnx(files, batch=timing.batch, threads=threads, device=device, rounds=rounds)
    return _from_bench(bench) | why


def _from_bench(bench: Bench) -> dict[str, Timed | str]:
    ratios = {name: 1 / speedup.median for name, speedup in bench.speedups.items()}
    return {
        name: Timed(median_ms=one.median_ms, iqr_ms=one.iqr_ms, noisy=one.noisy, ratio=ratios.get(name, 1.0))
        for name, one in bench.latencies.items()
    }

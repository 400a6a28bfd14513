"""Networks side by side: their rows become a report, with latencies measured in one interleaved run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lcc.batches import eval_batches
from lcc.counts import count_macs, fvcore_macs
from lcc.errors import CheckFailedError, RecipeError
from lcc.evaluation import Accuracy, evaluate
from lcc.export import to_onnx
from lcc.manifest import versions
from lcc.measure import Bench, bench_layers, bench_onnx, bench_torch
from lcc.methods import LowCostOp
from lcc.operator_timing import sweep_operators
from lcc.plan import Site
from lcc.report import ModelRow, Report
from lcc.specs import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lcc.data import Split
    from lcc.measure import Conditions
    from lcc.network import Network
    from lcc.recipe import ModelPart
    from lcc.report import LayerRow
    from lcc.settings import Settings
    from lcc.sweep import Sweep
    from lcc.sweep_axes import SweepOptions


EVAL_BATCH = 256


@dataclass(frozen=True)
class BenchOptions:
    """How latency is measured; `layers`: every replaced layer too."""

    batch: int = 1
    threads: int = 1
    rounds: int = 15
    torch: bool = True
    onnx: bool = True
    layers: bool = True


def known_accuracy(network: Network) -> tuple[Accuracy | None, str | None]:
    """Return what the history says of the present weights' accuracy, and on what data."""
    for event in reversed(network.history):
        if "top1" in event.metrics:
            metrics = event.metrics
            found = Accuracy(
                top1=metrics["top1"], top5=metrics.get("top5"), images=int(metrics.get("images", 0))
            )
            return found, on_data(event.details.get("data", ""), event.details.get("evaluated_on", ""))
        if event.changed_weights:
            break
    return None, None


def measured_accuracy(
    network: Network,
    split: Split,
    settings: Settings,
    *,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
) -> Accuracy:
    """Return the accuracy of a network on some images."""
    form = network.loaded.preprocessing
    batches = eval_batches(split, form, batch_size=batch_size, workers=workers)
    return evaluate(network.loaded.model, batches, device=settings.device, shown=None)


def on_data(text: str, part: str) -> str:
    """Return in words what an accuracy was measured on; of a path only the last part."""
    scheme, colon, place = text.partition(":")
    short = f"{scheme}:{Path(place).name}" if colon else text
    return f"{short}, {part}" if part else short


def bench(parts: tuple[ModelPart, ...], settings: Settings, options: BenchOptions) -> tuple[Bench, ...]:
    """Time lcc directories, sources and ONNX files against each other, the first being the baseline."""
    settings.check_bench_device()
    names = [part.source for part in parts]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"{again} is named twice; to see the noise, compare it with a copy of it")
    files = {part.source: Path(part.source) for part in parts if part.source.endswith(".onnx")}
    networks = {part.source: settings.open(part) for part in parts if part.source not in files}
    for target, path in files.items():
        if not path.is_file():
            raise RecipeError(f"{target} is not there; `lcc export` makes one")
    results = []
    if networks and not files and options.torch:
        results.append(_bench_torch(networks, options, settings))
    if options.onnx:
        ordered = {name: files.get(name) or exported(networks[name]) for name in names}
        results.append(_bench_onnx(ordered, options, settings))
    return tuple(results)


def exported(network: Network) -> bytes:
    """Return a network as the ONNX file that `to_onnx` writes. Raises: as it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        to_onnx(network.loaded, path, network.plan)
        return path.read_bytes()


def bench_operators(sweep: SweepOptions, settings: Settings, options: BenchOptions) -> tuple[Sweep, ...]:
    """Time single operators against dense convolutions over a range of shapes."""
    settings.check_bench_device()
    return sweep_operators(
        sweep,
        batch=options.batch,
        threads=options.threads,
        device=settings.bench_device,
        rounds=options.rounds,
    )


def plain_report(rows: tuple[ModelRow, ...]) -> Report:
    """Return a report of the rows as they are."""
    return Report(models=rows, versions=versions(), date=datetime.now(UTC).isoformat(timespec="seconds"))


def timed_report(
    rows: tuple[ModelRow, ...],
    networks: tuple[Network, ...],
    options: BenchOptions | None,
    settings: Settings,
    *,
    untimed: str | None = None,
) -> Report:
    """Return a report of the rows with latencies measured as `options` say.

    Where ONNX Runtime can't have a network, a note says so. `untimed` names a row whose latency is that of
    another one, since both compute the same way.
    """
    if options is None:
        return plain_report(rows)
    # by number, since two may have one name
    keyed = {str(n): network for n, network in enumerate(networks) if network.name != untimed}
    benches: dict[str, Bench] = {}
    notes: tuple[str, ...] = ()
    if options.torch:
        benches["torch"] = _bench_torch(keyed, options, settings)
    if options.onnx:
        try:
            files = {key: exported(network) for key, network in keyed.items()}
            benches["onnx"] = _bench_onnx(files, options, settings)
        except (CheckFailedError, RecipeError) as error:  # what else was found out is worth having
            notes = (f"not timed in ONNX Runtime: {error}",)
            options = replace(options, onnx=False)
    conditions = [bench.conditions for bench in benches.values()]
    timed = []
    for number, (row, network) in enumerate(zip(rows, networks, strict=True)):
        update: dict[str, object] = {}
        for runtime, bench in benches.items():
            if (key := str(number)) in keyed:
                update |= {
                    runtime: bench.latencies[key],
                    f"{runtime}_speedup": bench.speedups.get(key),
                }
        if options.layers and row.layers:
            update["layers"], of_layers = _layer_times(row, network, options, settings)
            conditions += of_layers
        timed.append(row.model_copy(update=update))
    report = plain_report(tuple(timed))
    return report.model_copy(update={"conditions": tuple(conditions), "notes": notes})


def cross_checks(networks: list[Network]) -> tuple[str, ...]:
    """Return in lines how the MACs compare with what fvcore counts."""
    lines = []
    for network in networks:
        ours = count_macs(network.loaded.model, network.example).macs
        theirs = fvcore_macs(network.loaded.model, network.example).macs
        agrees = "as lcc does" if ours == theirs else f"where lcc counts {ours:,}"
        lines.append(f"{network.name}: fvcore counts {theirs:,} MACs, {agrees}")
    return tuple(lines)


def _layer_times(
    row: ModelRow, network: Network, options: BenchOptions, settings: Settings
) -> tuple[tuple[LayerRow, ...], list[Conditions]]:
    sites = tuple(
        Site(
            name=layer.site,
            kind=kind_of(layer.spec),
            spec=layer.spec,
            sizes=(layer.size,),
        )
        for layer in row.layers
    )
    found = {site.name: network.loaded.model.get_submodule(site.name) for site in sites}
    operators = {name: operator for name, operator in found.items() if isinstance(operator, LowCostOp)}
    layers = row.layers
    conditions: list[Conditions] = []
    for wanted, onnx, key in ((options.torch, False, "torch"), (options.onnx, True, "onnx")):
        if wanted:
            timed = bench_layers(
                sites,
                operators,
                onnx=onnx,
                batch=options.batch,
                threads=options.threads,
                device=settings.bench_device,
                rounds=options.rounds,
            )
            conditions.append(timed.conditions)
            layers = tuple(layer.model_copy(update={key: timed.layers[layer.site]}) for layer in layers)
    return layers, conditions


def _bench_torch(networks: dict[str, Network], options: BenchOptions, settings: Settings) -> Bench:
    return bench_torch(
        {name: network.loaded.model for name, network in networks.items()},
        {name: network.example.repeat(options.batch, 1, 1, 1) for name, network in networks.items()},
        threads=options.threads,
        device=settings.bench_device,
        rounds=options.rounds,
    )


def _bench_onnx(files: Mapping[str, Path | bytes], options: BenchOptions, settings: Settings) -> Bench:
    return bench_onnx(
        files,
        batch=options.batch,
        threads=options.threads,
        device=settings.bench_device,
        rounds=options.rounds,
    )

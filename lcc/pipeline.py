"""The public functions, one for each command: values in, values out; notes go to `say`."""

from __future__ import annotations

import copy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcc import artifact, calibrate, data, progress, surgery, train
from lcc.batches import eval_batches
from lcc.directory import WEIGHTS
from lcc.errors import RecipeError
from lcc.evaluation import Accuracy, pick_device
from lcc.evaluation import evaluate as measure_accuracy
from lcc.export import Exported, to_onnx
from lcc.inspection import Inspection, inspection
from lcc.manifest import event_now
from lcc.measure import Bench, bench_layers, bench_onnx, bench_torch
from lcc.network import Network, open_network, original_of, sites_of
from lcc.plan import Plan, Rule, Site, make_plan
from lcc.recipe import Calibrate, Finetune, ModelPart, Recipe
from lcc.report import ModelRow, Report
from lcc.specs import Cost

if TYPE_CHECKING:
    from lcc.methods import Method
    from lcc.train import TrainResult

Say = Callable[[str], None]
CALIBRATION_SEED_NOTE = "images prepared as for evaluation, no labels used"


@dataclass(frozen=True)
class Settings:
    """What every command takes: where to run, how much to trust, and where notes go."""

    device: str = "auto"
    threads: int | None = None
    trust_pickle: bool = False
    trust_code: bool = False
    force: bool = False
    say: Say = progress.say

    def open(self, part: ModelPart, *, name: str | None = None) -> Network:
        """Return a network and tell its notes."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        network = open_network(part, trust_pickle=self.trust_pickle, trust_code=self.trust_code, name=name)
        for note in network.loaded.notes:
            self.say(f"note: {note}")
        return network


def inspect(part: ModelPart, method: Method, settings: Settings) -> Inspection:
    """Return every convolution of a network, and what `method` could do for it."""
    network = settings.open(part)
    return _inspection(network, sites_of(network), method)


def plan(part: ModelPart, rules: tuple[Rule, ...], settings: Settings) -> Inspection:
    """Return what `convert` with these rules would do. Raises: as `convert`, short of writing."""
    network = settings.open(part)
    sites = sites_of(network)
    decided = make_plan(sites, rules)
    return _inspection(network, sites, decided.groups[0].method, decided)


def convert(
    part: ModelPart,
    directory: Path,
    rules: tuple[Rule, ...],
    settings: Settings,
    *,
    calibration: Calibrate | None = None,
) -> Report:
    """Convert a network into an lcc directory; return what that changed.

    Raises: NothingToConvertError: no site; RecipeError: an idle rule; ArtifactError: the target.
    """
    artifact.check_target(directory, force=settings.force)
    original = settings.open(part, name="original")
    sites, converted = _converted(original, rules, calibration, settings)
    _save(converted, directory, settings)
    converted = converted.but(name=directory.name)
    return _report((original.row(), converted.row(sites=sites)))


def finetune(
    part: ModelPart,
    options: Finetune,
    settings: Settings,
    *,
    directory: Path | None = None,
    teacher: ModelPart | None = None,
    resume: bool = False,
    workers: int | None = None,
) -> Report:
    """Train a network and write it to an lcc directory (default: the one it came from)."""
    if directory is None:
        if not Path(part.source).is_dir():
            raise RecipeError(
                f"{part.source} is not an lcc directory, so say where to put the result: -o DIR"
            )
        directory = Path(part.source)
        settings = Settings(**{**vars(settings), "force": True})
    artifact.check_target(directory, force=settings.force)
    network = settings.open(part)
    before = original_of(network, trust_code=settings.trust_code) if network.plan.groups else None
    master = settings.open(teacher) if teacher is not None else None
    if master is None and network.plan.groups and options.distill > 0:
        master = _original_with_weights(network, settings)
    trained, result = _finetuned(
        network, options, master, directory, settings, resume=resume, workers=workers
    )
    _save(trained, directory, settings)
    shutil.rmtree(_checkpoints(directory), ignore_errors=True)
    row = trained.but(name=directory.name).row(accuracy=result.accuracy, data=options.data)
    return _report((before.row(), row) if before is not None else (row,))


def teacher_part(teacher: str, student: ModelPart) -> ModelPart:
    """Return the source that a --teacher means; a checkpoint file is of the student's architecture."""
    if not Path(teacher).is_file():
        return ModelPart(source=teacher)
    path = Path(student.source)
    if path.is_dir():
        source = artifact.read(path).source
        return ModelPart(source=teacher, arch=source.id, num_classes=source.num_classes)
    return ModelPart(source=teacher, arch=student.arch or student.source, num_classes=student.num_classes)


def evaluate(part: ModelPart, text: str, settings: Settings, *, batch_size: int = 256) -> Accuracy:
    """Return the accuracy of a network on val/, else test/, of a data set."""
    return _accuracy(settings.open(part), text, settings, batch_size=batch_size)


def export(
    part: ModelPart, path: Path, settings: Settings, *, half: bool = False, opset: int = 20
) -> Exported:
    """Write a network as one checked ONNX file."""
    network = settings.open(part)
    return to_onnx(network.loaded, path, network.plan, half=half, opset=opset)


@dataclass(frozen=True)
class BenchOptions:
    """How latency is measured; `layers`: every replaced layer too."""

    batch: int = 1
    threads: int = 1
    rounds: int = 15
    torch: bool = True
    onnx: bool = True
    layers: bool = True


def report(
    parts: tuple[ModelPart, ...],
    settings: Settings,
    *,
    text: str | None = None,
    options: BenchOptions | None = None,
) -> Report:
    """Return networks side by side, after the original of the first one where that was converted.

    `text`: a data set to measure accuracy on; without it, what their histories say. `options` None: no
    latencies.
    """
    networks = [settings.open(part) for part in parts]
    if networks[0].plan.groups and all(network.plan.groups for network in networks):
        networks.insert(0, original_of(networks[0], trust_code=settings.trust_code))
    rows = []
    for network in networks:
        is_original = network.name == "original"
        accuracy, source = None, None
        if text is not None and not is_original:
            accuracy, source = _accuracy(network, text, settings), text
        elif not is_original:
            accuracy, source = _known_accuracy(network)
        sites = sites_of(original_of(network, trust_code=settings.trust_code)) if network.plan.groups else ()
        row = network.row(accuracy=accuracy, data=source, sites=sites)
        if is_original:
            row = row.model_copy(update={"random_weights": False})
        rows.append(row)
    return _timed(tuple(rows), tuple(networks), options, settings)


def bench(targets: tuple[str, ...], settings: Settings, options: BenchOptions) -> tuple[Bench, ...]:
    """Time lcc directories, sources and ONNX files against each other, the first being the baseline."""
    files = {target: Path(target) for target in targets if target.endswith(".onnx")}
    networks = {target: settings.open(ModelPart(source=target)) for target in targets if target not in files}
    for target, path in files.items():
        if not path.is_file():
            raise RecipeError(f"{target} is not there; `lcc export` makes one")
    results = []
    if networks and not files and options.torch:
        results.append(_bench_torch(networks, options, settings))
    if options.onnx:
        with tempfile.TemporaryDirectory() as folder:
            exported = {
                t: _exported(n, Path(folder) / f"{i}.onnx") for i, (t, n) in enumerate(networks.items())
            }
            ordered = {target: files.get(target) or exported[target] for target in targets}
            results.append(_bench_onnx(ordered, options, settings))
    return tuple(results)


def run(
    recipe: Recipe,
    text: str,
    directory: Path,
    settings: Settings,
    *,
    resume: bool = False,
    options: BenchOptions | None = None,
    workers: int | None = None,
) -> Report:
    """Do all that a recipe says, in order, and report it; `text` is the recipe as given."""
    artifact.check_target(directory, force=settings.force)
    original = settings.open(recipe.model, name="original")
    where = recipe.eval.data if recipe.eval else recipe.finetune.data if recipe.finetune else None
    accuracy = None
    if where is not None and not original.loaded.source.is_random:
        accuracy = _accuracy(original, where, settings)
        settings.say(f"original: {accuracy}")
    rows = [original.row(accuracy=accuracy, data=where)]
    networks = [original]
    sites: tuple[Site, ...] = ()
    network = original
    if recipe.convert:
        sites, network = _converted(original, recipe.convert, recipe.calibrate, settings)
        network = network.but(name="converted")
        if where is not None:
            accuracy = _accuracy(network, where, settings)
            settings.say(f"converted: {accuracy}")
    if recipe.finetune is not None:
        master = settings.open(recipe.teacher, name="teacher") if recipe.teacher else None
        if master is None and recipe.convert and not original.loaded.source.is_random:
            master = original
        converted = network
        network, result = _finetuned(
            network, recipe.finetune, master, directory, settings, resume=resume, workers=workers
        )
        if recipe.convert:
            rows.append(converted.row(accuracy=accuracy, data=where))
            networks.append(converted)
        network = network.but(name="fine-tuned")
        accuracy, where = result.accuracy, recipe.finetune.data
    _save(network, directory, settings, recipe=text)
    shutil.rmtree(_checkpoints(directory), ignore_errors=True)
    network = network.but(size_bytes=(directory / WEIGHTS).stat().st_size)
    rows.append(network.row(accuracy=accuracy, data=where, sites=sites))
    networks.append(network)
    notes: tuple[str, ...] = ()
    if recipe.export is not None:
        exported = to_onnx(
            network.loaded,
            onnx_beside(directory),
            network.plan,
            half=recipe.export.half,
            opset=recipe.export.opset,
        )
        notes = (exported_line(exported),)
    timed = _timed(tuple(rows), tuple(networks), options, settings)
    return timed.model_copy(update={"notes": (*timed.notes, *notes)})


def onnx_beside(directory: Path) -> Path:
    """Return where the ONNX file of an lcc directory goes: DIR.onnx."""
    return directory.parent / f"{directory.name}.onnx"


def exported_line(exported: Exported) -> str:
    """Return in words what was exported and how well it agrees."""
    worst = max(entry.relative_error for entry in exported.parity)
    batches = " and ".join(str(entry.batch) for entry in exported.parity)
    return (
        f"{exported.path}: {exported.size_bytes / 1e6:.2f} MB, opset {exported.opset}, checked in ONNX "
        f"Runtime at batch {batches}: differs from torch by at most {worst:.0e} of the largest output"
    )


def _inspection(
    network: Network, sites: tuple[Site, ...], method: Method, decided: Plan | None = None
) -> Inspection:
    row = network.row()
    return inspection(
        str(network.loaded.source),
        random_weights=row.random_weights,
        image_size=network.loaded.preprocessing.image_size,
        total=Cost(params=row.params, macs=row.macs),
        sites=sites,
        method=method,
        plan=decided,
        uncounted=row.uncounted,
    )


def _converted(
    original: Network, rules: tuple[Rule, ...], calibration: Calibrate | None, settings: Settings
) -> tuple[tuple[Site, ...], Network]:
    """Return the sites of a network, and a converted copy of it."""
    sites = sites_of(original)
    decided = make_plan(sites, rules)
    model = copy.deepcopy(original.loaded.model)
    originals = surgery.replace_(model, decided)
    details = {"weights": "closest to the original's, from weights alone"}
    if calibration is None:
        fits = calibrate.project_(model, originals)
    else:
        images = data.images(
            calibration.data, original.loaded.preprocessing, calibration.images, calibration.seed
        )
        device = pick_device(settings.device)
        model.to(device)
        for conv in originals.values():
            conv.to(device)
        with progress.bar("calibrate", len(originals)) as tick:
            done: list[str] = []

            def on_site(name: str, _fit: object) -> None:
                done.append(name)
                tick(len(done), lambda: name)

            result = calibrate.calibrate_(model, originals, sites, images, on_site=on_site)
        model.cpu()
        fits = result.fits
        details["weights"] = (
            f"least squares on {len(images)} images of {calibration.data}, {CALIBRATION_SEED_NOTE}"
        )
        if result.chunks > 1:
            details["inputs"] = (
                f"from the unconverted prefix: {len(images)} images do not fit in memory at once"
            )
            settings.say(f"note: fitted in {result.chunks} chunks, inputs {details['inputs']}")
    event = event_now(
        _command_line(),
        seed=calibration.seed if calibration else None,
        details=details,
    )
    return sites, original.but(
        loaded=replace(original.loaded, model=model),
        plan=_merged(original.plan, decided),
        fits={**original.fits, **fits},
        history=(*original.history, event),
        size_bytes=None,
    )


def _merged(before: Plan, now: Plan) -> Plan:
    """Return the plan that does both, where `now` converts more of a network that `before` made."""
    done = before.methods()
    return Plan(
        groups=(*before.groups, *now.groups),
        kept=tuple(entry for entry in now.kept if entry.site not in done),
    )


def _finetuned(
    network: Network,
    options: Finetune,
    teacher: Network | None,
    directory: Path,
    settings: Settings,
    *,
    resume: bool,
    workers: int | None,
) -> tuple[Network, TrainResult]:
    if teacher is None and options.distill > 0:
        settings.say("note: no teacher, so the labels alone are learnt from")
        options = options.model_copy(update={"distill": 0.0})
    model = copy.deepcopy(network.loaded.model)
    result = train.finetune(
        model,
        network.loaded.preprocessing,
        options,
        teacher=teacher.loaded.model if teacher else None,
        teacher_preprocessing=teacher.loaded.preprocessing if teacher else None,
        checkpoint_dir=_checkpoints(directory),
        resume=resume,
        device=settings.device,
        workers=workers,
        say=settings.say,
    )
    metrics = {"top1": result.accuracy.top1, "images": float(result.accuracy.images)}
    if result.accuracy.top5 is not None:
        metrics["top5"] = result.accuracy.top5
    event = event_now(
        _command_line(),
        seed=options.seed,
        metrics=metrics,
        details={
            "data": options.data,
            "evaluated_on": result.evaluated_on,
            "options": options.model_dump_json(exclude={"data"}, exclude_defaults=True),
            "teacher": "none"
            if result.teacher is None
            else f"{teacher.name if teacher else ''} ({result.teacher})",
            "threads": str(torch.get_num_threads()),
            "top1_by_epoch": " ".join(f"{epoch.accuracy.top1:.2f}" for epoch in result.history),
        },
    )
    return network.but(
        loaded=replace(network.loaded, model=model), history=(*network.history, event), size_bytes=None
    ), result


def _original_with_weights(network: Network, settings: Settings) -> Network:
    """Return the trained original of a converted network, to be its teacher, if the library has it."""
    source = network.loaded.source
    if source.is_random:
        raise RecipeError(
            "the original had random weights and can't teach; name a --teacher, or pass --set distill=0"
        )
    if source.weights != "default":
        file = source.weights.removeprefix("file:")
        raise RecipeError(
            f"distillation learns from the original network: give its weights again, --teacher {file}, "
            "or pass --set distill=0"
        )
    return settings.open(ModelPart(source=source.id, num_classes=source.num_classes), name="original")


def _accuracy(network: Network, text: str, settings: Settings, *, batch_size: int = 256) -> Accuracy:
    split = data.open_eval(text)
    batches = eval_batches(split, network.loaded.preprocessing, batch_size=batch_size)
    return measure_accuracy(network.loaded.model, batches, device=settings.device, shown=None)


def _known_accuracy(network: Network) -> tuple[Accuracy | None, str | None]:
    """Return what the history says of the present weights' accuracy, and on what data."""
    for event in reversed(network.history):
        if "top1" in event.metrics:
            metrics = event.metrics
            found = Accuracy(
                top1=metrics["top1"], top5=metrics.get("top5"), images=int(metrics.get("images", 0))
            )
            return found, event.details.get("data")
        if event.changed_weights:
            break
    return None, None


def _save(network: Network, directory: Path, settings: Settings, *, recipe: str | None = None) -> None:
    artifact.save(
        network.loaded,
        directory,
        plan=network.plan,
        fits=network.fits,
        history=network.history,
        recipe=recipe,
        force=settings.force,
    )


def _checkpoints(directory: Path) -> Path:
    return directory.parent / f"{directory.name}.checkpoints"


def _command_line() -> str:
    return shlex.join(["lcc", *sys.argv[1:]])


def _report(rows: tuple[ModelRow, ...]) -> Report:
    versions = event_now("report").versions
    return Report(models=rows, versions=versions, date=datetime.now(UTC).isoformat(timespec="seconds"))


def _timed(
    rows: tuple[ModelRow, ...],
    networks: tuple[Network, ...],
    options: BenchOptions | None,
    settings: Settings,
) -> Report:
    """Return a report of the rows with latencies measured as `options` say."""
    if options is None:
        return _report(rows)
    conditions = []
    named = {row.name: network for row, network in zip(rows, networks, strict=True)}
    updates: list[dict[str, object]] = [{} for _ in rows]
    if options.torch:
        bench = _bench_torch(named, options, settings)
        conditions.append(bench.conditions)
        for update, row in zip(updates, rows, strict=True):
            update |= {"torch": bench.latencies[row.name], "torch_speedup": bench.speedups.get(row.name)}
    if options.onnx:
        with tempfile.TemporaryDirectory() as folder:
            files = {
                name: _exported(n, Path(folder) / f"{i}.onnx") for i, (name, n) in enumerate(named.items())
            }
            bench = _bench_onnx(files, options, settings)
        conditions.append(bench.conditions)
        for update, row in zip(updates, rows, strict=True):
            update |= {"onnx": bench.latencies[row.name], "onnx_speedup": bench.speedups.get(row.name)}
    if options.layers:
        for update, row, network in zip(updates, rows, networks, strict=True):
            if row.layers:
                update["layers"], layer_conditions = _layer_times(row, network, options)
                conditions += layer_conditions
    timed = tuple(row.model_copy(update=update) for row, update in zip(rows, updates, strict=True))
    return _report(timed).model_copy(update={"conditions": tuple(conditions)})


def _layer_times(row: ModelRow, network: Network, options: BenchOptions) -> tuple[object, list[object]]:
    sites = tuple(Site(name=layer.site, spec=layer.spec, sizes=(layer.size,)) for layer in row.layers)
    layers, conditions = row.layers, []
    for wanted, onnx, key in ((options.torch, False, "torch"), (options.onnx, True, "onnx")):
        if wanted:
            timed = bench_layers(
                sites,
                network.plan,
                onnx=onnx,
                batch=options.batch,
                threads=options.threads,
                rounds=options.rounds,
            )
            conditions.append(timed.conditions)
            layers = tuple(layer.model_copy(update={key: timed.layers[layer.site]}) for layer in layers)
    return layers, conditions


def _bench_torch(networks: dict[str, Network], options: BenchOptions, settings: Settings) -> Bench:
    example = next(iter(networks.values())).example.expand(options.batch, -1, -1, -1).contiguous()
    return bench_torch(
        {name: network.loaded.model for name, network in networks.items()},
        example,
        threads=options.threads,
        device=_bench_device(settings),
        rounds=options.rounds,
    )


def _bench_onnx(files: dict[str, Path], options: BenchOptions, settings: Settings) -> Bench:
    return bench_onnx(
        files,
        batch=options.batch,
        threads=options.threads,
        device=_bench_device(settings),
        rounds=options.rounds,
    )


def _bench_device(settings: Settings) -> str:
    """Latency is measured on the CPU unless a GPU is asked for by name."""
    return "cuda" if settings.device.startswith("cuda") else "cpu"


def _exported(network: Network, path: Path) -> Path:
    to_onnx(network.loaded, path, network.plan)
    return path

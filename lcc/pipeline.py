"""The public functions, one for each command: values in, values out; notes go to `say`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcc import artifact, checkpoints, data, decision, fit_store
from lcc.comparison import (
    EVAL_BATCH,
    BenchOptions,
    cross_checks,
    known_accuracy,
    measured_accuracy,
    on_data,
    plain_report,
    timed_report,
)
from lcc.conversion import convert_network, planned
from lcc.directory import WEIGHTS, checkpoints_of, fits_of, plan_of
from lcc.errors import RecipeError
from lcc.export import Exported, to_onnx
from lcc.hashing import hash_of_weights
from lcc.inspection import Inspection, inspection
from lcc.lowering import TOLERANCE as LOWERING_TOLERANCE
from lcc.network import Network, original_of, sites_of
from lcc.onnx_accuracy import accuracy_of_file
from lcc.planning import plan_within
from lcc.recipe import Budget, Calibrate, Finetune, ModelPart
from lcc.specs import Cost
from lcc.teachers import like, original_teacher
from lcc.tuning import train_network
from lcc.written_files import check_file

if TYPE_CHECKING:
    from lcc.data import Split
    from lcc.evaluation import Accuracy
    from lcc.methods import Method
    from lcc.plan import Plan, Rule, Site
    from lcc.planning import Planned
    from lcc.report import Report
    from lcc.settings import Settings


def inspect(part: ModelPart, method: Method, settings: Settings) -> Inspection:
    """Return every convolution and residual step of a network, and what `method` could do for it."""
    network = settings.open(part)
    return _inspection(network, sites_of(network), method)


def plan(
    part: ModelPart, rules: tuple[Rule, ...], settings: Settings, *, calibration: Calibrate | None = None
) -> Inspection:
    """Return what `convert` with these rules would do. Raises: as `convert`, short of writing."""
    if calibration is not None:
        data.enough_images(calibration.data, calibration.images)
    network = settings.open(part)
    sites, _, decided = planned(network, rules, settings)
    return _inspection(network, sites, decided.groups[0].method, decided)


def budget(
    part: ModelPart,
    wanted: Budget,
    calibration: Calibrate,
    settings: Settings,
    *,
    save_plan: Path | None = None,
    check_errors: bool = False,
) -> Planned:
    """Return the rules that keep a network within a budget with the least harm, and why these.

    `check_errors`: find out, too, how good the predictions are that the choice rests on.
    Raises: as `lcc.planning.plan_within`; ArtifactError: `save_plan`, where the rules are to go.
    """
    decision.check(save_plan, force=settings.force)
    original = open_first(part, settings)
    planned = plan_within(original, wanted, calibration, settings, check_errors=check_errors)
    decision.save(planned, save_plan, settings)
    return planned


def convert(
    part: ModelPart,
    directory: Path,
    wanted: tuple[Rule, ...] | Budget,
    settings: Settings,
    *,
    calibration: Calibrate | None = None,
    resume: bool = False,
    save_plan: Path | None = None,
) -> Report:
    """Convert a network into an lcc directory, by rules or within a budget; return what that changed.

    Raises: NothingToConvertError: no site; RecipeError: an idle rule, a budget that can't be met, or one
    without images; ArtifactError: the target.
    """
    artifact.check_target(directory, force=settings.force)
    going_on = resume and plan_of(directory).exists()  # and `save_plan` may be its plan, or that edited
    decision.check(save_plan, force=settings.force or going_on, directory=directory)
    fits = fits_of(directory)
    if not resume:
        fit_store.refuse_leftovers(fits)
    original = open_first(part, settings)
    rules = decision.decided(
        original, wanted, calibration, directory, settings, resume=resume, save_plan=save_plan
    )
    sites, converted = convert_network(original, rules, calibration, settings, fits=fits, resume=resume)
    converted = saved(converted, directory, settings).but(name=directory.name)
    fit_store.discard(fits)
    decision.discard(directory)
    settings.say(f"wrote {directory}; next: lcc finetune {directory} --data DATA")
    return plain_report((original.row(), converted.row(sites=sites)))


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
    """Train a network and write it to an lcc directory (default: the one it came from).

    Raises: what `lcc.train.finetune` raises; ArtifactError: the target; RecipeError: no target, no teacher.
    """
    if directory is None:
        if not Path(part.source).is_dir():
            raise RecipeError(
                f"{part.source} is not an lcc directory, so say where to put the result: -o DIR"
            )
        directory = Path(part.source)
        settings = replace(settings, force=True)
    artifact.check_target(directory, force=settings.force)
    network = settings.open(part)
    before = original_of(network, trust_code=settings.trust_code) if network.plan.groups else None
    master = None
    if teacher is not None:
        master = settings.open(like(teacher, network.loaded.preprocessing, ("image_size",)))
    if master is None and network.plan.groups and (options.distill > 0 or options.features > 0):
        master = original_teacher(network, settings)
    _, split = data.open_parts(options.data, val_split=options.val_split, seed=options.seed)
    start = None
    if not network.is_random:
        start = measured_accuracy(
            network, split, settings, batch_size=2 * options.batch_size, workers=workers
        )
    if start is not None:
        settings.say(f"before fine-tuning: {start}")
    trained, result = train_network(
        network,
        options,
        master,
        directory,
        settings,
        resume=resume,
        origin=hash_of_weights(network.loaded.model),
        workers=workers,
    )
    trained = saved(trained, directory, settings)
    checkpoints.discard(checkpoints_of(directory))
    if start is not None and result.accuracy.top1 < start.top1:
        settings.say(
            f"warning: fine-tuning made it worse, {result.accuracy} from {start}: try a lower --lr than "
            f"{options.lr:g}, or more --epochs"
        )
    settings.say(f"wrote {directory}; next: lcc report {directory}, lcc export {directory}")
    measured_on = on_data(options.data, result.evaluated_on)
    rows = [] if before is None else [before.row()]
    if start is not None:
        rows.append(network.but(name="before").row(accuracy=start, data=measured_on))
    trained = trained.but(name="trained" if start is None else "fine-tuned")
    return plain_report((*rows, trained.row(accuracy=result.accuracy, data=measured_on)))


def teacher_part(teacher: str, student: ModelPart) -> ModelPart:
    """Return the source that a --teacher means; a checkpoint file is of the student's architecture."""
    if not Path(teacher).is_file():
        return ModelPart(source=teacher)
    path = Path(student.source)
    if path.is_dir():
        manifest = artifact.read(path)
        source = manifest.source
        part = ModelPart(source=teacher, arch=source.id, num_classes=source.num_classes)
        return like(part, manifest.preprocessing)
    return student.model_copy(
        update={"source": teacher, "arch": student.arch or student.source, "weights": None}
    )


def evaluate(part: ModelPart, text: str, settings: Settings, *, batch_size: int = EVAL_BATCH) -> Accuracy:
    """Return the accuracy of a network, or an ONNX file, on val/, else test/, of a data set."""
    if part.source.endswith(".onnx"):
        return accuracy_of_file(part, _judges(text, settings), settings, batch_size=batch_size)
    network = settings.open(part)
    return measured_accuracy(network, _judges(text, settings), settings, batch_size=batch_size)


def export(
    part: ModelPart,
    path: Path,
    settings: Settings,
    *,
    half: bool = False,
    opset: int = 20,
    lowering_tolerance: float = LOWERING_TOLERANCE,
) -> Exported:
    """Write a network as one checked ONNX file."""
    check_file(path, force=settings.force)
    network = settings.open(part)
    return to_onnx(
        network.loaded, path, network.plan, half=half, opset=opset, lowering_tolerance=lowering_tolerance
    )


def report(
    parts: tuple[ModelPart, ...],
    settings: Settings,
    *,
    original: ModelPart | None = None,
    text: str | None = None,
    options: BenchOptions | None = None,
) -> Report:
    """Return networks side by side, after `original`, or the architecture that the first was converted from.

    The original sees images as the first network does, unless it says itself how.
    `text`: a data set to measure accuracy on; without it, what their histories say. `options` None: no
    latencies.
    """
    if options is not None:
        settings.check_bench_device()
    networks = _told_apart([(settings.open(part), part.source) for part in parts])
    if original is not None:
        same = like(original, networks[0].loaded.preprocessing)
        networks.insert(0, settings.open(same, name="original"))
    split = None if text is None else _judges(text, settings)
    rows = []
    for network in networks:
        if split is None:
            accuracy, measured_on = known_accuracy(network)
        else:
            accuracy, measured_on = (
                measured_accuracy(network, split, settings),
                on_data(split.text, split.name),
            )
        sites = sites_of(original_of(network, trust_code=settings.trust_code)) if network.plan.groups else ()
        rows.append(network.row(accuracy=accuracy, data=measured_on, sites=sites))
    if original is None and all(network.plan.groups for network in networks):
        networks.insert(0, original_of(networks[0], trust_code=settings.trust_code))
        rows.insert(0, networks[0].row())
    timed = timed_report(tuple(rows), tuple(networks), options, settings)
    return timed.model_copy(update={"notes": (*timed.notes, *cross_checks(networks))})


def onnx_beside(directory: Path) -> Path:
    """Return where the ONNX file of an lcc directory goes: DIR.onnx."""
    return directory.parent / f"{directory.name}.onnx"


def exported_lines(exported: Exported) -> tuple[str, ...]:
    """Return in words what was exported and how well it agrees; then a line for each operator lowered."""
    worst = max(entry.relative_error for entry in exported.parity)
    batches = " and ".join(str(entry.batch) for entry in exported.parity)
    approximated = exported.lowering_error is not None
    compared = "the lowered network in torch" if approximated else "torch"
    line = (
        f"{exported.path}: {exported.size_bytes / 1e6:.2f} MB, opset {exported.opset}, checked in ONNX "
        f"Runtime at batch {batches}: differs from {compared} by at most {worst:.0e} of the largest output"
    )
    if approximated:
        line += f", and that from the exact network by {exported.lowering_error:.0e}"
    return (line, *(f"{site}: {how}" for site, how in exported.lowered.items()))


def _judges(text: str, settings: Settings) -> Split:
    """Return the images that accuracy is measured on; says where they may be those trained on."""
    split = data.open_eval(text)
    if split.name == data.ALL:
        settings.say(
            f"note: {text} has neither val/ nor test/: all of its images count, with any that were trained on"
        )
    return split


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
        done=network.plan.methods(),
        uncounted=row.uncounted,
    )


def open_first(part: ModelPart, settings: Settings) -> Network:
    """Return what a conversion starts from, by the name it has in reports."""
    network = settings.open(part, name="original")
    return network.but(name="before") if network.plan.groups else network


def _told_apart(named: list[tuple[Network, str]]) -> list[Network]:
    """Return the networks, by their whole sources where names alone don't tell them apart."""
    names = ["original", *(network.name for network, _ in named)]
    return [
        network.but(name=source) if names.count(network.name) > 1 else network for network, source in named
    ]


def saved(network: Network, directory: Path, settings: Settings, *, recipe: str | None = None) -> Network:
    """Write an lcc directory; return the network with the size of its weights there."""
    artifact.save(
        network.loaded,
        directory,
        plan=network.plan,
        fits=network.fits,
        history=network.history,
        recipe=recipe,
        force=settings.force,
    )
    return network.but(size_bytes=(directory / WEIGHTS).stat().st_size)

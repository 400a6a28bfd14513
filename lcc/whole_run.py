"""All that a recipe says, in order, every stage measured; and the demo, a recipe on bundled data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lcc import artifact, checkpoints, data, decision, fit_store, progressive
from lcc import recipe_file as recipes
from lcc.comparison import EVAL_BATCH, BenchOptions, measured_accuracy, on_data, timed_report
from lcc.conversion import convert_network
from lcc.directory import MANIFEST, checkpoints_of, fits_of
from lcc.errors import ArtifactError, CheckFailedError, LccError
from lcc.export import to_onnx
from lcc.hashing import hash_of_weights
from lcc.pipeline import exported_lines, onnx_beside, open_first, saved
from lcc.tables import report_sheets, to_markdown
from lcc.tuning import train_network
from lcc.written_files import check_file

if TYPE_CHECKING:
    from lcc.data import Split
    from lcc.evaluation import Accuracy
    from lcc.network import Network
    from lcc.plan import Rule, Site
    from lcc.recipe import Export, Recipe
    from lcc.report import ModelRow, Report
    from lcc.settings import Settings

DEMO = Path(__file__).parent / "demo"


class NotExportedError(CheckFailedError):
    """All was done but the export; `report` is what the run would have given."""

    def __init__(self, error: LccError, report: Report) -> None:
        super().__init__(str(error))
        self.report = report


def run(
    recipe: Recipe,
    text: str,
    directory: Path,
    settings: Settings,
    *,
    resume: bool = False,
    workers: int | None = None,
    options: BenchOptions | None = None,
) -> Report:
    """Do all that a recipe says, in order, and report every stage; `text` is the recipe as given.

    The result is the lcc directory, and DIR.onnx where the recipe exports.
    Raises: what the stages raise; NotExportedError, at the end: the export failed.
    """
    if options is not None:
        settings.check_bench_device()
    if resume and not settings.force and (directory / MANIFEST).exists():
        raise ArtifactError(
            f"{directory} is finished, and there is nothing to resume; --force would do it all again"
        )
    artifact.check_target(directory, force=settings.force)
    if recipe.export is not None:
        check_file(onnx_beside(directory), force=settings.force)
    if not resume:
        _refuse_leftovers(recipe, directory)
    rows = _Rows(recipe, settings, workers)
    original = open_first(recipe.model, settings)
    teacher = None if recipe.finetune is None else _recipe_teacher(recipe, original, settings)
    rules = decision.decided(original, recipe.decision, recipe.calibrate, directory, settings, resume=resume)
    origin = _origin(recipe, original, rules)
    rows.add(original)
    network = original
    sites: tuple[Site, ...] = ()
    if rules:
        sites, network = _converted(
            original,
            rules,
            teacher,
            recipe,
            directory,
            settings,
            resume=resume,
            origin=origin,
            workers=workers,
        )
        rows.add(network, sites)
    accuracy = None
    if recipe.finetune is not None:
        network, result = train_network(
            network,
            recipe.finetune,
            teacher,
            directory,
            settings,
            resume=resume,
            origin=origin,
            workers=workers,
        )
        network = network.but(name="fine-tuned")
        accuracy = None if recipe.eval else result.accuracy
    network = saved(network, directory, settings, recipe=text)
    _discard_leftovers(recipe, directory)
    settings.say(f"wrote {directory}")
    if recipe.finetune is not None:
        rows.add(network, sites, accuracy=accuracy)
    else:
        rows.lines[-1] = rows.lines[-1].model_copy(update={"size_bytes": network.size_bytes})
    notes, failed = _exported(network, recipe.export, directory)
    untimed = "converted" if recipe.finetune is not None else None
    report = timed_report(tuple(rows.lines), tuple(rows.networks), options, settings, untimed=untimed)
    report = report.model_copy(update={"notes": (*report.notes, *notes)})
    if failed is not None:
        raise NotExportedError(failed, report) from failed
    return report


def _converted(
    original: Network,
    rules: tuple[Rule, ...],
    teacher: Network | None,
    recipe: Recipe,
    directory: Path,
    settings: Settings,
    *,
    resume: bool,
    origin: str,
    workers: int | None,
) -> tuple[tuple[Site, ...], Network]:
    """Return the decided sites, and the network converted at once or, where a recipe says so, in stages."""
    if recipe.progressive is None or recipe.finetune is None:
        sites, network = convert_network(
            original, rules, recipe.calibrate, settings, fits=fits_of(directory), resume=resume
        )
    else:
        sites, network = progressive.convert_in_stages(
            original,
            rules,
            teacher,
            recipe.progressive,
            recipe.finetune,
            recipe.calibrate,
            directory,
            settings,
            resume=resume,
            origin=origin,
            workers=workers,
        )
    return sites, network.but(name="converted")


def _origin(recipe: Recipe, original: Network, rules: tuple[Rule, ...]) -> str:
    """Return what the weights that are trained are made from: not them, since their last bits may differ."""
    seen = None if recipe.calibrate is None else recipe.calibrate.model_dump_json(exclude={"data"})
    decided = [rule.model_dump_json(exclude={"reason"}) for rule in rules]
    return f"{hash_of_weights(original.loaded.model)} {decided} {seen} {recipe.progressive}"


def _refuse_leftovers(recipe: Recipe, directory: Path) -> None:
    """Refuse, before any long work, what an earlier run left. Raises: TrainingError, ArtifactError."""
    fit_store.refuse_leftovers(fits_of(directory))
    if recipe.progressive is not None:
        progressive.refuse_leftovers(recipe.progressive, directory)
    if recipe.finetune is not None:
        checkpoints.refuse_leftovers(checkpoints_of(directory))


def _discard_leftovers(recipe: Recipe, directory: Path) -> None:
    """Remove what only a resumed run would need."""
    decision.discard(directory)
    fit_store.discard(fits_of(directory))
    if recipe.progressive is not None:
        progressive.discard_stages(recipe.progressive, directory)
    if recipe.finetune is not None:
        checkpoints.discard(checkpoints_of(directory))


def _exported(
    network: Network, chosen: Export | None, directory: Path
) -> tuple[tuple[str, ...], LccError | None]:
    """Export where a recipe says so; return notes on it, and what went wrong: no reason to lose a report."""
    if chosen is None:
        return (), None
    try:
        made = to_onnx(network.loaded, onnx_beside(directory), network.plan, **chosen.model_dump())
    except LccError as error:
        return (f"not exported: {error}",), error
    return exported_lines(made), None


class _Rows:
    """The networks of a run, each with its line of the report; only the last one keeps its layers."""

    def __init__(self, recipe: Recipe, settings: Settings, workers: int | None) -> None:
        self.split = _evaluated_on(recipe)
        self.workers = workers
        usual = EVAL_BATCH if recipe.finetune is None else 2 * recipe.finetune.batch_size
        self.batch_size = usual if recipe.eval is None else recipe.eval.batch_size
        self.settings = settings
        self.networks: list[Network] = []
        self.lines: list[ModelRow] = []

    def add(
        self, network: Network, sites: tuple[Site, ...] = (), *, accuracy: Accuracy | None = None
    ) -> None:
        """Take in a network, and measure its accuracy where that is not given and weights are not random."""
        if accuracy is None and self.split is not None and not network.is_random:
            accuracy = measured_accuracy(
                network, self.split, self.settings, batch_size=self.batch_size, workers=self.workers
            )
            self.settings.say(f"{network.name}: {accuracy}")
        self.lines = [row.model_copy(update={"layers": ()}) for row in self.lines]
        measured_on = None
        if self.split is not None and accuracy is not None:
            measured_on = on_data(self.split.text, self.split.name)
        self.lines.append(network.row(accuracy=accuracy, data=measured_on, sites=sites))
        self.networks.append(network)


def _recipe_teacher(recipe: Recipe, original: Network, settings: Settings) -> Network | None:
    """Return what a recipe distils from: what it names, else what it converts, unless that is untrained."""
    if recipe.teacher is not None:
        return settings.open(recipe.teacher, name="teacher")
    able = not (original.is_random or original.has_new_head)
    return original if able and (recipe.convert or recipe.budget) else None


def _evaluated_on(recipe: Recipe) -> Split | None:
    """Return the images on which every stage of a recipe is measured: the same for all."""
    tune = recipe.finetune
    held_out = None
    if tune is not None:
        _, held_out = data.open_parts(tune.data, val_split=tune.val_split, seed=tune.seed)
    return held_out if recipe.eval is None else data.open_eval(recipe.eval.data)


def bench_options(recipe: Recipe) -> BenchOptions:
    """Return how latency is measured at the end: as the planner measured it, where there was one."""
    planned = recipe.budget
    return BenchOptions() if planned is None else BenchOptions(batch=planned.batch, threads=planned.threads)


def demo(directory: Path, settings: Settings) -> Report:
    """Do the whole job on the bundled data; DIR/model, DIR/model.onnx and DIR/report.md are its results."""
    recipe_file = DEMO / "recipe.toml"
    recipe = recipes.load(
        recipe_file,
        (
            f"model.source={json.dumps(str(DEMO / 'resnet20.safetensors'))}",
            *(f"{part}.data={json.dumps(f'idx:{DEMO}')}" for part in ("calibrate", "finetune")),
        ),
    )
    target = directory / "model"
    artifact.check_target(target, force=True)
    checkpoints.discard(checkpoints_of(target))
    fit_store.discard(fits_of(target))
    text = recipe_file.read_text(encoding="utf-8")
    result = run(recipe, text, target, settings, options=BenchOptions())
    (directory / "report.md").write_text(to_markdown(report_sheets(result)), encoding="utf-8")
    return result

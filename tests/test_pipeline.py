"""What the stages of a run hand on: accuracies on the same images, names, sizes, and what was trained."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from small_data import idx_data, image_folder

from lcc import checkpoints, comparison, conversion, decision, pipeline, teachers, whole_run
from lcc.comparison import BenchOptions
from lcc.directory import checkpoints_of, fits_of
from lcc.errors import ArtifactError, CheckFailedError, DataError, RecipeError, SourceError, TrainingError
from lcc.export import Exported, Parity
from lcc.fit_store import FitStore
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.network import sites_of
from lcc.ops import regression
from lcc.plan import Rule
from lcc.recipe import Calibrate, Evaluate, Export, Finetune, ModelPart, Recipe
from lcc.settings import Settings
from lcc.tables import report_sheets, to_markdown

NET = ModelPart(source="zoo:cifar_resnet20", weights="none", image_size=(8, 8), num_classes=3)
RULES = (Rule(match=("layer3.2.*",), method=LinearMix()),)
SETTINGS = Settings(device="cpu", threads=1, say=lambda _: None)

pytestmark = pytest.mark.usefixtures("same_threads")


def run(folder, **parts):
    return whole_run.run(Recipe(lcc=1, **parts), "", folder, SETTINGS)


def tune(data, **options):
    return Finetune(data=data, epochs=1, batch_size=8, lr=0.01, distill=0.0, **options)


def trained(folder, data):
    run(folder, model=NET, finetune=tune(data))
    return ModelPart(source=str(folder))


def test_a_finished_run_says_that_nothing_is_left_to_resume(tmp_path, data):
    trained(tmp_path / "out", data)
    recipe = Recipe(lcc=1, model=NET, finetune=tune(data))
    with pytest.raises(ArtifactError, match="out is finished, and there is nothing to resume"):
        whole_run.run(recipe, "", tmp_path / "out", SETTINGS, resume=True)


def test_what_an_earlier_run_left_and_a_missing_teacher_are_told_before_any_work(tmp_path, data, monkeypatch):
    monkeypatch.setattr(decision, "decided", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(SourceError, match="nowhere"):
        run(tmp_path / "out", model=NET, teacher=ModelPart(source="nowhere"), finetune=tune(data))
    checkpoints.write(checkpoints_of(tmp_path / "out"), 1, {})
    with pytest.raises(TrainingError, match=r"out\.checkpoints has checkpoints of an earlier run"):
        run(tmp_path / "out", model=NET, finetune=tune(data))
    FitStore(fits_of(tmp_path / "more"), "", resume=False)
    (fits_of(tmp_path / "more") / "stem.safetensors").touch()
    with pytest.raises(ArtifactError, match=r"has fits of an earlier conversion: go on with --resume"):
        run(tmp_path / "more", model=NET, convert=RULES)
    monkeypatch.setattr(decision, "decided", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ArtifactError, match=r"has fits of an earlier conversion: go on with --resume"):
        pipeline.convert(NET, tmp_path / "more", RULES, SETTINGS)


def test_every_stage_is_measured_on_the_images_that_the_recipe_names(tmp_path, data):
    dense = trained(tmp_path / "dense", data)
    other = idx_data(tmp_path / "other", test=9)
    report = run(tmp_path / "out", model=dense, convert=RULES, finetune=tune(data), eval=Evaluate(data=other))
    assert [(row.accuracy.images, row.data) for row in report.models] == [(9, "idx:other, test")] * 3


def test_every_stage_is_measured_on_the_share_that_is_held_out(tmp_path, data):
    dense = trained(tmp_path / "dense", data)
    report = run(tmp_path / "out", model=dense, convert=RULES, finetune=tune(data, val_split=0.25))
    assert [row.accuracy.images for row in report.models] == [12] * 3  # of 48 to train on


def test_random_weights_stay_random_when_a_recipe_converts_them(tmp_path, data):
    report = run(tmp_path / "out", model=NET, convert=RULES, calibrate=Calibrate(data=data, images=8))
    assert [row.random_weights for row in report.models] == [True, True]
    assert report.models[1].size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_dry_run_takes_the_images_that_convert_takes(tmp_path):
    text = image_folder(tmp_path, {"": {"": 8}})
    assert pipeline.plan(NET, RULES, SETTINGS, calibration=Calibrate(data=text, images=8)).rows
    with pytest.raises(DataError, match="has 8 training images, 9 were asked for"):
        pipeline.plan(NET, RULES, SETTINGS, calibration=Calibrate(data=text, images=9))


def test_a_dry_run_shows_the_banks_that_are_made(tmp_path):
    rules = (Rule(match=("layer[12].*",), method=Shared(kernels=3)),)
    shown = pipeline.plan(NET, rules, SETTINGS)
    report = pipeline.convert(NET, tmp_path / "small", rules, SETTINGS)
    assert shown.after.params == report.models[1].params
    assert shown.after.macs == report.models[1].macs
    assert sum(row.after is not None for row in shown.rows) == report.models[1].converted


def test_weights_that_lcc_trained_are_not_random(tmp_path, data):
    dense = trained(tmp_path / "dense", data)
    report = pipeline.convert(dense, tmp_path / "small", RULES, SETTINGS)
    assert [row.random_weights for row in report.models] == [False, False]


def test_a_run_without_training_leaves_what_lies_beside_it(tmp_path):
    beside = tmp_path / "out.checkpoints"
    beside.mkdir()
    (beside / "mine").touch()
    run(tmp_path / "out", model=NET, convert=RULES)
    assert (beside / "mine").exists()


def test_the_library_is_not_taken_for_an_original_that_was_trained_first(tmp_path, data):
    dense = trained(tmp_path / "dense", data)
    pipeline.convert(dense, tmp_path / "small", RULES, SETTINGS)
    with pytest.raises(RecipeError, match="trained before it was converted"):
        pipeline.finetune(ModelPart(source=str(tmp_path / "small")), Finetune(data=data), SETTINGS)


def test_networks_of_one_name_are_told_apart_and_timed_apart(tmp_path):
    for folder in ("a", "original"):
        pipeline.convert(NET, tmp_path / folder / "model", RULES, SETTINGS)
    pipeline.convert(NET, tmp_path / "original" / "original", RULES, SETTINGS)
    parts = [tmp_path / "a" / "model", tmp_path / "original" / "model", tmp_path / "original" / "original"]
    options = BenchOptions(rounds=8, onnx=False, layers=False)
    report = pipeline.report(tuple(ModelPart(source=str(p)) for p in parts), SETTINGS, options=options)
    assert [row.name for row in report.models] == ["original", *map(str, parts)]
    assert len({row.torch.median_ms for row in report.models}) == 4


def test_the_original_sees_images_as_what_was_made_from_it_does(tmp_path):
    pipeline.convert(NET, tmp_path / "small", RULES, SETTINGS)
    small = ModelPart(source=str(tmp_path / "small"))
    plain = NET.model_copy(update={"image_size": None})
    report = pipeline.report((small,), SETTINGS, original=plain)
    side_by_side = pipeline.report((NET, small), SETTINGS)
    assert [row.macs for row in report.models] == [row.macs for row in side_by_side.models]
    larger = NET.model_copy(update={"image_size": (16, 16)})  # which is said, and so kept
    assert pipeline.report((small,), SETTINGS, original=larger).models[0].macs > report.models[0].macs


def test_an_original_that_was_converted_itself_is_what_others_are_compared_with(tmp_path):
    pipeline.convert(NET, tmp_path / "small", RULES, SETTINGS)
    small = ModelPart(source=str(tmp_path / "small"))
    again = (Rule(match=("layer2.*",), method=LinearMix()),)
    pipeline.convert(small, tmp_path / "more", again, SETTINGS)
    report = pipeline.report((ModelPart(source=str(tmp_path / "more")),), SETTINGS, original=small)
    assert [row.name for row in report.models] == ["original", "more"]
    assert report.models[0].params == SETTINGS.open(small).row().params


def test_a_teachers_file_sees_images_as_the_student_does(tmp_path):
    file = tmp_path / "teacher.safetensors"
    file.touch()
    student = NET.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    pipeline.convert(student, tmp_path / "small", RULES, SETTINGS)
    for pupil in (student, ModelPart(source=str(tmp_path / "small"))):
        teacher = pipeline.teacher_part(str(file), pupil)
        assert (teacher.source, teacher.arch, teacher.weights) == (str(file), NET.source, None)
        assert (teacher.image_size, teacher.mean, teacher.num_classes) == ((8, 8), (0.1, 0.2, 0.3), 3)


def test_originals_and_teachers_by_name_see_images_as_the_student_does(tmp_path, data, monkeypatch):
    student = NET.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    pipeline.convert(student, tmp_path / "small", RULES, SETTINGS)
    network = SETTINGS.open(ModelPart(source=str(tmp_path / "small")))
    source = network.loaded.source.model_copy(update={"weights": "default", "num_classes": None})
    monkeypatch.setattr(Settings, "open", lambda _, part, name=None: part)
    part = teachers.original_teacher(network.but(loaded=replace(network.loaded, source=source)), SETTINGS)
    assert (part.source, part.image_size, part.mean) == (NET.source, (8, 8), (0.1, 0.2, 0.3))
    monkeypatch.undo()
    opened = []
    monkeypatch.setattr(pipeline, "train_network", lambda *given, **_: opened.append(given[2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.finetune(
            ModelPart(source=str(tmp_path / "small")),
            tune(data),
            SETTINGS,
            teacher=ModelPart(source=NET.source, weights="none", num_classes=3),
        )
    assert opened[0].loaded.preprocessing.image_size == (8, 8)
    assert opened[0].loaded.preprocessing.mean != (0.1, 0.2, 0.3)


def test_what_is_evaluated_around_training_is_loaded_as_for_training(tmp_path, data, monkeypatch):
    seen, load = [], comparison.eval_batches

    def loading(*given, **options):
        seen.append((options["batch_size"], options["workers"]))
        return load(*given, **options)

    trained(tmp_path / "dense", data)
    monkeypatch.setattr(comparison, "eval_batches", loading)
    dense = ModelPart(source=str(tmp_path / "dense"))
    pipeline.finetune(dense, tune(data), SETTINGS, workers=0)
    recipe = Recipe(lcc=1, model=dense, convert=RULES, finetune=tune(data))
    whole_run.run(recipe, "", tmp_path / "out", SETTINGS, workers=0)
    assert seen == [(16, 0)] * 3


def test_a_fit_without_memory_says_what_takes_less(tmp_path, data, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conversion.calibrate, "calibrate_", full)
    calibration = Calibrate(data=data, images=16)
    with pytest.raises(RecipeError, match=r"out of memory while .* to 16 images; take fewer: --images 4 \("):
        pipeline.convert(NET, tmp_path / "out", RULES, SETTINGS, calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_as_large_as_its_weights(tmp_path):
    network = SETTINGS.open(NET)
    state = network.loaded.model.state_dict()
    torch.save({"state_dict": state, "optimizer": torch.zeros(10**6)}, tmp_path / "net.pth")
    part = ModelPart(source=str(tmp_path / "net.pth"), arch=NET.source, num_classes=3)
    assert SETTINGS.open(part).size_bytes == sum(tensor.nbytes for tensor in state.values())
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    size = SETTINGS.open(part.model_copy(update={"source": str(tmp_path / "half.safetensors")})).size_bytes
    assert size == (tmp_path / "half.safetensors").stat().st_size


def test_networks_of_several_sizes_are_timed_each_at_its_own():
    larger = NET.model_copy(update={"image_size": (64, 64)})
    options = BenchOptions(rounds=8, onnx=False, layers=False)
    report = pipeline.report((NET, larger), SETTINGS, options=options)
    assert report.conditions[0].image_size == "8x8, 64x64"
    assert report.models[1].torch_speedup.median < 1


def test_a_network_that_onnx_can_not_have_is_reported_all_the_same(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise CheckFailedError("no such operator")

    pipeline.convert(NET, tmp_path / "small", RULES, SETTINGS)
    monkeypatch.setattr(comparison, "to_onnx", refuse)
    small = ModelPart(source=str(tmp_path / "small"))
    report = pipeline.report((small,), SETTINGS, options=BenchOptions(rounds=8))
    assert report.notes[0] == "not timed in ONNX Runtime: no such operator"
    assert [row.onnx for row in report.models] == [None, None]
    assert all(row.torch for row in report.models)
    assert all(layer.torch for layer in report.models[1].layers)
    assert to_markdown(report_sheets(report))


def test_the_shares_of_a_converted_network_add_up(tmp_path):
    pipeline.convert(NET, tmp_path / "small", RULES, SETTINGS)
    part = ModelPart(source=str(tmp_path / "small"))
    value = pipeline.inspect(part, LinearMix(), SETTINGS)
    linear = 64 * 3
    convs = [row for row in value.rows if row.site.kind == "conv"]
    assert sum(row.before.macs for row in convs) + linear == value.before.macs
    assert len(sites_of(SETTINGS.open(part))) == len(value.rows)


def test_what_is_converted_further_is_not_called_the_original(tmp_path):
    pipeline.convert(NET, tmp_path / "small", RULES, SETTINGS)
    again = (Rule(match=("layer2.*",), method=LinearMix()),)
    report = pipeline.convert(ModelPart(source=str(tmp_path / "small")), tmp_path / "more", again, SETTINGS)
    assert [row.name for row in report.models] == ["before", "more"]


def test_a_device_on_which_no_latency_is_measured_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(decision, "decided", lambda *_, **__: pytest.fail("worked"))
    recipe, settings = Recipe(lcc=1, model=NET, convert=RULES), replace(SETTINGS, device="cuda:1")
    with pytest.raises(RecipeError, match="--device cuda:1: latency is measured on cpu or cuda"):
        whole_run.run(recipe, "", tmp_path / "out", settings, options=BenchOptions())


def test_a_run_exports_into_a_folder_that_is_not_there_yet(tmp_path):
    report = run(tmp_path / "new" / "out", model=NET, convert=RULES, export=Export())
    assert (tmp_path / "new" / "out.onnx").is_file()
    assert "checked in ONNX Runtime" in report.notes[-1]


@pytest.mark.parametrize("kind", [CheckFailedError, RecipeError, ArtifactError])
def test_a_run_whose_export_fails_still_reports_and_keeps_the_network(tmp_path, lcc_run, monkeypatch, kind):
    def failing(*_, **__):
        raise kind("differs too much")

    monkeypatch.setattr(whole_run, "to_onnx", failing)
    (tmp_path / "recipe.toml").write_text(
        f'lcc = 1\n[model]\nsource = "{NET.source}"\nweights = "none"\nimage_size = [8, 8]\n'
        '[[convert]]\nmatch = "layer3.2.*"\nmethod = { name = "linear_mix" }\n[export]\n'
    )
    code, out, err = lcc_run("run", tmp_path / "recipe.toml", "-o", tmp_path / "out", "--no-latency")
    assert code == 3
    assert err.splitlines()[-1] == "lcc: differs too much"
    assert re.search(r"converted .*not exported: differs too much", out, re.DOTALL)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_keeps_most_of_the_accuracy_and_leaves_its_files(tmp_path):
    report = whole_run.demo(tmp_path / "demo", SETTINGS)
    original, converted, tuned = report.models
    assert original.accuracy.top1 > 90
    assert tuned.accuracy.top1 > max(converted.accuracy.top1, original.accuracy.top1 - 8)
    assert tuned.macs < original.macs / 4
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"model", "model.onnx", "report.md"}


def test_what_was_exported_says_apart_what_lowering_and_what_onnx_runtime_changed():
    exported = Exported(
        path="model.onnx",
        size_bytes=1_500_000,
        opset=20,
        half=False,
        tolerance=1e-4,
        parity=tuple(Parity(batch=n, relative_error=n * 1e-6, top1_agreement=1.0) for n in (1, 3)),
        lowered={"layer1.0": "a 7x7 stencil"},
        lowering_error=2e-4,
    )
    line, *sites = pipeline.exported_lines(exported)
    assert "from the lowered network in torch by at most 3e-06" in line
    assert line.endswith("and that from the exact network by 2e-04")
    assert sites == ["layer1.0: a 7x7 stencil"]
    exact = exported.model_copy(update={"lowered": {}, "lowering_error": None})
    assert pipeline.exported_lines(exact) == (
        line.replace("the lowered network in ", "").partition(", and")[0],
    )


def test_a_regression_that_could_not_keep_all_images_says_so(tmp_path, data, monkeypatch):
    notes = []
    monkeypatch.setattr(regression, "MAX_NUMBERS", 3 * 64 * 2 * 2)  # three images of layer3
    monkeypatch.setattr(regression, "STEPS", 1)
    rules = (Rule(match=("layer3.2",), method=RdExplicit()),)
    seen = Calibrate(data=data, images=6)
    pipeline.convert(NET, tmp_path / "small", rules, replace(SETTINGS, say=notes.append), calibration=seen)
    assert any("fitted to fewer than the 6 images" in note and "layer3.2 to 3" in note for note in notes)


def test_a_network_that_is_named_twice_is_not_timed_as_one():
    with pytest.raises(RecipeError, match="is named twice"):
        comparison.bench((NET, NET), SETTINGS, BenchOptions(rounds=8))


def test_where_latency_is_not_measured_is_told_before_a_report(monkeypatch):
    monkeypatch.setattr(Settings, "open", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(RecipeError, match="latency is measured on cpu or cuda"):
        pipeline.report((NET,), replace(SETTINGS, device="mps"), options=BenchOptions())

"""Budgets in recipes and in the commands' pipeline: what is run, written and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kills import killed_after_checkpoint
from planning_setting import (
    SETTINGS,
    few_images,  # noqa: F401  # the fixture `data`
    network,
)

from lcc import decision, pipeline, whole_run
from lcc import recipe_file as recipes
from lcc.comparison import BenchOptions
from lcc.errors import ArtifactError, RecipeError
from lcc.methods.linear_mix import LinearMix
from lcc.models import Preprocessing
from lcc.plan import Rule
from lcc.recipe import Budget, Calibrate, Finetune, ModelPart, Recipe

pytestmark = pytest.mark.usefixtures("same_threads")

PART = ModelPart(source="py:hosts:TinyResNet", weights="none", image_size=(8, 8), crop_pct=1.0)


def test_a_recipe_with_a_budget_runs(tmp_path, data):
    recipe = Recipe(
        lcc=1, model=PART, budget=Budget(targets=("macs=70%",)), calibrate=Calibrate(data=data, images=16)
    )
    before, after = whole_run.run(recipe, "", tmp_path / "out", SETTINGS).models
    assert after.macs <= 0.7 * before.macs
    assert SETTINGS.open(ModelPart(source=str(tmp_path / "out"))).plan.groups
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_resumed_goes_on_with_its_plan(tmp_path, data, monkeypatch):
    recipe = Recipe(
        lcc=1,
        model=PART,
        budget=Budget(targets=("macs=70%",)),
        calibrate=Calibrate(data=data, images=16),
        finetune=Finetune(data=data, epochs=2, batch_size=12, distill=0.0),
    )
    with killed_after_checkpoint():
        whole_run.run(recipe, "", tmp_path / "out", SETTINGS)
    monkeypatch.setattr(decision, "plan_within", lambda *_: pytest.fail("planned anew"))
    whole_run.run(recipe, "", tmp_path / "out", SETTINGS, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_plan_is_kept_for_what_it_was_made_for_alone(tmp_path, data, monkeypatch):
    calibration, out, file = Calibrate(data=data, images=16), tmp_path / "out", tmp_path / "plan.toml"

    def decided(original=None, images=calibration, resume=True, **budget):
        wanted = Budget(**{"targets": ("macs=70%",), "methods": ("linear_mix",), **budget})
        return decision.decided(
            original or network(), wanted, images, out, SETTINGS, resume=resume, save_plan=file
        )

    rules = decided(resume=False)
    file.write_text("edited")
    monkeypatch.setattr(decision, "plan_within", lambda *_: 1 / 0)
    assert decided(images=calibration.model_copy(update={"data": "idx:moved"})) == rules
    assert file.read_text() == "edited"
    file.unlink()
    assert decided() == rules == recipes.rules_from(file)
    with pytest.raises(ZeroDivisionError):
        decided(resume=False)
    for change in (
        {"targets": ("macs=71%",)},
        {"images": calibration.model_copy(update={"images": 15})},
        {"original": network(seed=1)},
    ):
        with pytest.raises(RecipeError, match=r"can't resume: .*out\.plan\.json is a plan for other weights"):
            decided(**change)
    image_size = Preprocessing(image_size=(9, 9), crop_pct=1.0)
    loaded = replace(network().loaded, preprocessing=image_size)
    with pytest.raises(RecipeError, match="can't resume"):
        decided(original=network().but(loaded=loaded))
    assert decided() == rules


def test_a_file_of_the_users_is_neither_overwritten_nor_removed(tmp_path, data, monkeypatch):
    budget, calibration = Budget(targets=("macs=70%",)), Calibrate(data=data, images=16)
    mine, out = tmp_path / "out.plan.json", tmp_path / "out"
    with pytest.raises(
        ArtifactError, match=r"is where lcc keeps the plan for .*out meanwhile; name another file"
    ):
        pipeline.convert(PART, out, budget, SETTINGS, calibration=calibration, save_plan=mine)
    mine.write_text("mine")
    monkeypatch.setattr(decision, "plan_within", lambda *_: pytest.fail("planned"))
    with pytest.raises(ArtifactError, match="is no plan of this lcc and would be overwritten"):
        pipeline.convert(PART, out, budget, SETTINGS, calibration=calibration)
    pipeline.convert(PART, out, (Rule(match=("*",), method=LinearMix()),), SETTINGS)
    assert mine.read_text() == "mine"


def test_a_run_measures_at_its_end_as_its_planner_did(data):
    recipe = Recipe(lcc=1, model=PART, finetune=Finetune(data=data))
    assert whole_run.bench_options(recipe) == BenchOptions()
    budget = Budget(targets=("latency=-10%",), threads=3, batch=4)
    recipe = Recipe(lcc=1, model=PART, budget=budget, calibrate=Calibrate(data=data))
    assert whole_run.bench_options(recipe) == BenchOptions(batch=4, threads=3)


def test_a_budget_that_cannot_be_met_is_refused_before_a_recipe_measures_anything(
    tmp_path, data, monkeypatch
):
    monkeypatch.setattr(whole_run._Rows, "add", lambda *_: pytest.fail("measured"))
    recipe = Recipe(
        lcc=1, model=PART, budget=Budget(targets=("macs=1%",)), calibrate=Calibrate(data=data, images=16)
    )
    with pytest.raises(RecipeError, match="the floor is"):
        whole_run.run(recipe, "", tmp_path / "out", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_conversion_within_a_budget_is_that_by_the_plan_that_it_writes(tmp_path, data):
    budget, calibration = Budget(targets=("params=60%",)), Calibrate(data=data, images=16)
    plan = tmp_path / "plan.toml"
    by_target, by_plan = (tmp_path / name for name in ("by_target", "by_plan"))
    pipeline.convert(PART, by_target, budget, SETTINGS, calibration=calibration, save_plan=plan)
    pipeline.convert(PART, by_plan, recipes.rules_from(plan), SETTINGS, calibration=calibration)
    states = [
        SETTINGS.open(ModelPart(source=str(path))).loaded.model.state_dict() for path in (by_target, by_plan)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_budget_without_images_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="needs images"):
        pipeline.convert(PART, tmp_path / "out", Budget(targets=("macs=70%",)), SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plan", ["out/plan.toml", "out"])
def test_a_plan_in_place_of_the_directory_that_is_made_is_refused_before_the_work(tmp_path, plan):
    out = tmp_path / "out"
    if plan != "out":
        out.mkdir()
    with pytest.raises(ArtifactError, match="put it beside"):
        pipeline.convert(
            PART,
            out,
            Budget(targets=("macs=70%",)),
            replace(SETTINGS, force=True),
            calibration=Calibrate(data="idx:nowhere"),
            save_plan=tmp_path / plan,
        )


@pytest.mark.parametrize("place", ["plan.toml", "nowhere/plan.toml", "."])
def test_where_a_plan_cannot_be_written_is_said_before_the_work(tmp_path, place):
    (tmp_path / "plan.toml").write_text("mine")
    budget, calibration = Budget(targets=("macs=70%",)), Calibrate(data="idx:nowhere")
    with pytest.raises(ArtifactError, match=r"with --force|can't be written"):
        pipeline.budget(PART, budget, calibration, SETTINGS, save_plan=tmp_path / place)
    assert (tmp_path / "plan.toml").read_text() == "mine"


MODEL = 'lcc = 1\n[model]\nsource = "zoo:cifar_resnet20"\nweights = "none"\n'
WITHIN = '[budget]\ntargets = ["macs=50%"]\n'
IMAGES = '[calibrate]\ndata = "idx:x"\n'
BY_HAND = '[[convert]]\nmatch = "*"\nmethod = { name = "linear_mix" }\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MODEL + WITHIN + IMAGES + BY_HAND, "both decide"),
        (MODEL + WITHIN, r"\[budget\] needs \[calibrate\]"),
        (MODEL + IMAGES + "[budget]\n", "targets"),
        (MODEL + IMAGES + "[budget]\ntargets = []\n", "targets"),
        (MODEL + IMAGES + WITHIN.replace("macs", "speed"), "budget.targets: .*'speed' is none of"),
        (MODEL + IMAGES + WITHIN.replace("50%", "150%"), "budget.targets: .*150% of what it costs now"),
        (MODEL + IMAGES + WITHIN + 'methods = ["linear_mx"]', "budget.methods: .*linear_mx"),
        (MODEL + IMAGES + WITHIN + "target = 3", "budget.target: .*did you mean 'targets'"),
    ],
)
def test_a_recipe_with_a_budget_that_makes_no_sense_is_refused(tmp_path, text, words):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        recipes.load(path)
    path.write_text(MODEL + WITHIN + IMAGES)
    assert recipes.load(path).budget == Budget(targets=("macs=50%",))

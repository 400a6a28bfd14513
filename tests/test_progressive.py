"""Conversion in stages: what each converts, that a stop in between costs nothing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from kills import killed_after_checkpoint
from small_data import idx_data

from lcc import whole_run
from lcc.errors import RecipeError, TrainingError
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.network import sites_of
from lcc.plan import Rule, make_plan
from lcc.progressive import parts_of
from lcc.recipe import Budget, Calibrate, Finetune, ModelPart, Progressive, Recipe
from lcc.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

PART = ModelPart(source="py:hosts:TinyResNet", weights="none", image_size=(8, 8), crop_pct=1.0)
SETTINGS = Settings(device="cpu", threads=1, trust_code=True, say=lambda _: None)
EVERYWHERE = (Rule(match=("*",), method=LinearMix()),)
STEPS = (Rule(match=("*",), method=RdExplicit()),)
SITES = ["layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return idx_data(tmp_path_factory.mktemp("data"), train=48)


def recipe_of(data, rules=EVERYWHERE, images=16, model=PART, **options):
    return Recipe(
        lcc=1,
        model=model,
        convert=rules,
        calibrate=Calibrate(data=data, images=images),
        progressive=Progressive(**options),
        finetune=Finetune(data=data, epochs=2, batch_size=16, distill=0.0),
    )


def run(data, place, *, resume=False, said=None, **options):
    settings = Settings(device="cpu", threads=1, trust_code=True, say=([] if said is None else said).append)
    whole_run.run(recipe_of(data, **options), "as given", place, settings, resume=resume)
    return settings.open(ModelPart(source=str(place)))


# What is converted when


def plan_of(*rules):
    sites = sites_of(SETTINGS.open(PART))
    return make_plan(sites, rules), sites


@pytest.mark.parametrize(("count", "sizes"), [(2, [2, 2]), (3, [1, 2, 1]), (4, [1] * 4), (9, [1] * 4)])
def test_every_site_is_in_one_stage_from_the_input_to_the_output(count, sizes):
    plan, sites = plan_of(Rule(match=("layer2.conv1",), method=Circulant()), *EVERYWHERE)
    parts = parts_of(plan, sites, count)
    converted = [[(name, rule.method) for rule in rules[:-1] for name in rule.match] for rules in parts]
    assert [len(part) for part in converted] == sizes
    assert [name for part in converted for name, _ in part] == SITES
    assert dict(pair for part in converted for pair in part) == plan.methods()
    assert all((rules[-1].match, rules[-1].method) == (("*",), None) for rules in parts)


# A run


@pytest.mark.parametrize("rules", [EVERYWHERE, STEPS], ids=["convolutions", "steps"])
def test_a_run_in_stages_ends_with_the_plan_of_one_at_once(tmp_path, data, rules):
    said = []
    got = run(data, tmp_path / "out", said=said, rules=rules, stages=2)
    assert got.plan == plan_of(*rules)[0]
    assert [event.kind for event in got.history] == ["convert", "train", "convert", "train"]
    between, last = (event.details for event in got.history if event.kind == "train")
    assert [len(details["top1_by_epoch"].split()) for details in (between, last)] == [1, 2]
    assert '"schedule":"constant"' in between["options"]
    assert "schedule" not in last["options"]
    count = len(got.plan.methods())
    assert any(f"out.stage1: {count // 2} of {count} sites" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_converted_network_is_converted_further(tmp_path, data):
    first = run(data, tmp_path / "first", rules=(Rule(match=("layer1.*",), method=Circulant()),), stages=2)
    said = []
    recipe = recipe_of(data).model_copy(update={"model": ModelPart(source=str(tmp_path / "first"))})
    settings = Settings(device="cpu", threads=1, trust_code=True, say=said.append)
    whole_run.run(recipe, "", tmp_path / "out", settings)
    got = settings.open(ModelPart(source=str(tmp_path / "out")))
    methods = got.plan.methods()
    assert {name: type(method) for name, method in methods.items()} == dict.fromkeys(
        SITES[:2], Circulant
    ) | dict.fromkeys(SITES[2:], LinearMix)
    assert first.plan.groups == got.plan.groups[: len(first.plan.groups)]
    assert any("out.stage1: 1 of 2 sites" in line for line in said)
    assert got.plan.orders.keys() == {"layer2.conv1"}  # for both of its stages at once
    assert sum("channel groups hold" in line for line in said) == 1


def test_there_are_no_more_stages_than_sites(tmp_path, data):
    said = []
    got = run(data, tmp_path / "out", said=said, rules=STEPS, stages=5)
    assert [event.kind for event in got.history].count("train") == 2
    assert "note: there are 2 sites to convert, so as many stages" in said


@pytest.mark.parametrize("call", range(4))  # there is a checkpoint after each epoch, and one epoch in a stage
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, data, monkeypatch, call):
    wanted = run(data, tmp_path / "whole", stages=3).loaded.model.state_dict()
    place = tmp_path / "out"
    with killed_after_checkpoint(call):
        run(data, place, stages=3)
    assert not place.exists()
    got = run(data, place, resume=True, stages=3)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in got.loaded.model.state_dict().items())
    assert [event.kind for event in got.history] == ["convert", "train"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# What is refused


def test_a_host_that_goes_round_what_would_be_replaced_is_refused_before_any_stage(tmp_path, data):
    held = PART.model_copy(update={"source": "py:hosts:HeldTwice"})
    with pytest.raises(RecipeError, match=r"held was replaced and is not called .*--exclude held"):
        run(data, tmp_path / "out", model=held, stages=3)
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_left_is_neither_lost_nor_taken_for_another(tmp_path, data, monkeypatch):
    place, other = tmp_path / "out", idx_data(tmp_path / "data", train=64)
    with killed_after_checkpoint(1):
        run(data, place, stages=3)
    with pytest.raises(TrainingError, match=r"out\.stage1\.checkpoints has checkpoints of an earlier run"):
        run(data, place, stages=3)
    with pytest.raises(TrainingError, match="can't resume: the training data now and in"):
        run(other, place, resume=True, stages=3)
    with pytest.raises(TrainingError, match="can't resume: the start weights' origin now and in"):
        run(data, place, resume=True, stages=3, images=12)
    assert (tmp_path / "out.stage1.checkpoints").exists()


SHARED = {
    "a rule": {"convert": (Rule(match=("layer1.*",), method=Shared()), *EVERYWHERE)},
    "a budget": {"convert": (), "budget": Budget(targets=("params=50%",), methods=("linear_mix", "shared"))},
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_kernels_are_refused(data, case):
    parts = dict(recipe_of(data)) | SHARED[case]
    with pytest.raises(ValueError, match=r"\[progressive\]: shared fits all sites of a kernel at once"):
        Recipe(**parts)


def test_a_budget_in_stages_shares_no_kernels_unasked(data):
    budget = Budget(targets=("params=50%",))
    at_once = Recipe(**dict(recipe_of(data)) | {"convert": (), "budget": budget, "progressive": None})
    in_stages = at_once.model_copy(update={"progressive": Progressive()})
    assert at_once.decision == budget
    assert in_stages.decision == budget.model_copy(update={"methods": ("linear_mix", "circulant")})


@pytest.mark.parametrize("missing", ["finetune", "convert"])
def test_stages_without_something_to_do_are_refused(data, missing):
    parts = recipe_of(data).model_dump(exclude={missing, "calibrate"})
    with pytest.raises(ValueError, match=r"\[progressive\] needs something to convert, and \[finetune\]"):
        Recipe.model_validate(parts)

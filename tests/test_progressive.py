"""Conversion in stages: what each converts, that a stop in between costs nothing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from small_data import idx_data

from lcc import progressive, whole_run
from lcc.errors import ArtifactError, InterruptedRunError, RecipeError
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.network import sites_of
from lcc.plan import Rule, make_plan
from lcc.progressive import parts_of
from lcc.recipe import Calibrate, Finetune, ModelPart, Progressive, Recipe
from lcc.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

PART = ModelPart(source="py:hosts:TinyResNet", weights="none", image_size=(8, 8), crop_pct=1.0)
SETTINGS = Settings(device="cpu", threads=1, trust_code=True, say=lambda _: None)
EVERYWHERE = (Rule(match=("*",), method=LinearMix()),)
SITES = ["layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return idx_data(tmp_path_factory.mktemp("data"), train=48)


def recipe_of(data, **options):
    return Recipe(
        lcc=1,
        model=PART,
        convert=EVERYWHERE,
        calibrate=Calibrate(data=data, images=16),
        progressive=Progressive(**options),
        finetune=Finetune(data=data, epochs=2, batch_size=16, distill=0.0),
    )


def run(data, place, *, text="as given", resume=False, said=None, **options):
    settings = Settings(device="cpu", threads=1, trust_code=True, say=([] if said is None else said).append)
    whole_run.run(recipe_of(data, **options), text, place, settings, resume=resume)
    return settings.open(ModelPart(source=str(place)))


def stopped(monkeypatch, data, place, *, after, **options):
    """Run until the training number `after` (from 0), and stop before it."""
    real, calls = progressive.train_network, []

    def train(*arguments, **named):
        if len(calls) == after:
            raise InterruptedRunError("stopped")
        calls.append(arguments)
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(progressive, "train_network", train)
        with pytest.raises(InterruptedRunError):
            run(data, place, **options)


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


def test_what_shares_a_kernel_is_converted_at_once():
    plan, sites = plan_of(
        Rule(match=("layer1.*",), method=Shared()), Rule(match=("layer2.*",), method=LinearMix())
    )
    first, second = parts_of(plan, sites, 2)
    assert {rule.match for rule in first[:-1]} == {("layer1.conv1", "layer1.conv2"), ("layer2.conv1",)}
    assert [rule.match for rule in second[:-1]] == [("layer2.conv2",)]


# A run


def test_a_run_in_stages_ends_with_the_plan_of_one_at_once(tmp_path, data):
    said = []
    got = run(data, tmp_path / "out", said=said, stages=2)
    plan, _ = plan_of(*EVERYWHERE)
    assert got.plan.methods() == plan.methods()
    assert got.plan.kept == plan.kept
    assert [event.kind for event in got.history] == ["convert", "train", "convert", "train"]
    lengths = [len(e.details["top1_by_epoch"].split()) for e in got.history if e.kind == "train"]
    assert lengths == [1, 2]
    assert any("out.stage1: 2 sites converted" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_was_stopped_in_between_ends_with_the_same_weights(tmp_path, data, monkeypatch, after):
    wanted = run(data, tmp_path / "whole", stages=3).loaded.model.state_dict()
    place = tmp_path / "out"
    stopped(monkeypatch, data, place, after=after, stages=3)
    assert (tmp_path / "out.stage1").exists() == (after > 0)
    got = run(data, place, resume=True, stages=3).loaded.model.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in got.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# What is refused


def test_what_an_earlier_run_left_is_neither_lost_nor_taken_for_another(tmp_path, data, monkeypatch):
    place = tmp_path / "out"
    stopped(monkeypatch, data, place, after=1, stages=3)
    with pytest.raises(ArtifactError, match=r"out\.stage1 exists"):
        run(data, place, stages=3)
    with pytest.raises(RecipeError, match=r"out\.stage1 is of another recipe; remove it"):
        run(data, place, text="another", resume=True, stages=3)
    assert (tmp_path / "out.stage1").exists()


@pytest.mark.parametrize("missing", ["finetune", "convert"])
def test_stages_without_something_to_do_are_refused(data, missing):
    parts = recipe_of(data).model_dump(exclude={missing, "calibrate"})
    with pytest.raises(ValueError, match=r"\[progressive\] needs something to convert, and \[finetune\]"):
        Recipe.model_validate(parts)

"""What recipes/against_torch_pruning.py trains: every row on the recipe's own terms."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path

import pytest

from lcc.recipe_file import load

RECIPES = Path(__file__).parents[1] / "recipes"
BUDGET = RECIPES / "cifar10-resnet20-budget.toml"
SCRIPT = runpy.run_path(str(RECIPES / "against_torch_pruning.py"))
FOLDER = Path("runs") / "resnet20-seed2"


def words(row):
    given = Namespace(epochs=10, threads=1)
    return SCRIPT["command"](row, FOLDER, 20, 2, given)


def recipe(row):
    found = words(row)
    file = next(word for word in found if word.endswith(".toml"))
    return load(file, tuple(word.removeprefix("--set=") for word in found if word.startswith("--set=")))


def test_the_first_budget_is_the_recipe_s():
    assert recipe("lcc-2.1").budget == load(BUDGET).budget


@pytest.mark.parametrize("row", ["dense", "lcc-2.1", "lcc-2.6", "pruned-2.6"])
def test_every_row_trains_alike(row):
    own, others = recipe(row).finetune, load(BUDGET).finetune
    distill = 0.0 if row == "dense" else others.distill
    assert own == others.model_copy(update={"seed": 2, "distill": distill})


@pytest.mark.parametrize(("row", "rank"), [("pruned-2.6", "isomorphic"), ("global-2.6", "global")])
def test_torch_pruning_ranks_as_the_row_says(row, rank):
    found = words(row)
    assert found[found.index("--rank") + 1] == rank


def test_a_row_that_was_begun_on_other_terms_is_refused(tmp_path, monkeypatch):
    given, ran = Namespace(out=tmp_path, epochs=10, threads=1), []

    class Done:
        returncode = 0

    def run(command, **_):
        ran.append(command)
        (tmp_path / "resnet20-seed0" / "pruned-2.6.json").write_text("{}")
        return Done

    monkeypatch.setattr(SCRIPT["subprocess"], "run", run)
    for _ in range(2):
        SCRIPT["train"](["pruned-2.6"], 20, 0, given)
    assert len(ran) == 1
    given.epochs = 1
    with pytest.raises(SystemExit, match=r"pruned-2\.6\.terms\.json: begun on other terms"):
        SCRIPT["train"](["pruned-2.6"], 20, 0, given)


@pytest.mark.parametrize("row", ["lcc-2.1", "lcc-2.6", "pruned-2.6"])
def test_the_dense_network_of_the_seed_is_what_is_made_smaller_and_what_teaches(row):
    assert recipe(row).model.source == str(FOLDER / "dense")
    assert row.startswith("pruned") or recipe(row).teacher.source == str(FOLDER / "dense")


def test_the_dense_network_trained_for_as_long_is_taught_by_itself():
    found = words("again")
    assert found[:3] == ["lcc", "finetune", str(FOLDER / "dense")]
    assert f"--teacher={FOLDER / 'dense'}" in found
    others = load(BUDGET).finetune
    assert f"--data={others.data}" in found
    for key in ("lr", "distill"):
        assert f"--set={key}={getattr(others, key)}" in found

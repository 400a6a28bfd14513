"""What is said of a plan within a budget: as rules, in words and as tables."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace

import pytest
import torch
from hosts import TinyResNet, seeded
from planning_setting import (
    few_images,  # noqa: F401  # the fixture `data`
    network,
    planned,
)
from torch import nn
from torch.nn import functional as F

from lcc import recipe_file as recipes
from lcc.network import sites_of
from lcc.plan import make_plan
from lcc.plan_report import _inline, plan_line, plan_sheets, rules_text

pytestmark = pytest.mark.usefixtures("same_threads")


def test_what_stays_dense_does_so_for_the_target(data):
    rules, _ = planned(data, "macs=80%", "params=90%")
    *chosen, last = rules
    assert all(rule.reason is None for rule in chosen)
    assert last.match == ("*",)
    assert (last.method, last.reason) == (None, "left as it is by the plan for macs=80% and params=90%")
    plan = make_plan(sites_of(network()), rules)
    reasons = {kept.site: kept.reason for kept in plan.kept}
    assert last.reason in reasons.values()
    assert "stem" in reasons


@pytest.mark.parametrize("targets", [("macs=60%",), ("params=55%",)], ids=" ".join)
def test_a_plan_written_down_and_read_again_is_the_same(tmp_path, data, targets):
    rules, report = planned(data, *targets)
    path = tmp_path / "plan.toml"
    path.write_text(rules_text(rules, report))
    assert recipes.rules_from(path) == rules
    sites = sites_of(network())
    assert make_plan(sites, recipes.rules_from(path)) == make_plan(sites, rules)


def test_a_plan_written_down_says_what_each_site_costs_in_error(data):
    rules, report = planned(data, "macs=70%")
    text = rules_text(rules, report)
    assert f"predicted error {report.error:.3g}" in text.splitlines()[0]
    for part in report.parts:
        assert all(f'"{name}",  # error {part.error:.2g}' in text for name in part.sites)


def test_hyperparameters_are_written_as_toml_has_them():
    method = {"name": "rd_implicit", "stiffness": math.inf, "step": 0.5}
    assert tomllib.loads(f"method = {_inline(method)}") == {"method": method}


def test_the_report_in_words_and_as_tables_has_the_target_and_the_cost(data):
    report = planned(data, "macs=70%")[1]
    assert plan_line(report).startswith("planned for macs=70%: ")
    chosen, frontier = plan_sheets(report)
    assert len(chosen.rows) == len(report.parts)
    assert len(frontier.rows) == len(report.frontier)
    assert "forward passes" in chosen.notes[-1]


def test_of_two_targets_of_one_quantity_the_tighter_is_the_limit(data):
    one, both = (planned(data, *targets)[1] for targets in (("macs=70%",), ("macs=70%", "macs=90%")))
    assert (both.limits, both.then) == (one.limits, one.then)


def test_the_frontier_says_what_it_keeps_of_other_targets(data):
    sheet = plan_sheets(planned(data, "macs=60%", "params=80%")[1])[1]
    assert sheet.headers == ("macs, of now", "macs", "params", "predicted error")
    shares = [float(row[2].text.rstrip("%")) for row in sheet.rows]
    assert max(shares) <= 80
    assert len({tuple(cell.text for cell in row) for row in sheet.rows}) == len(sheet.rows)


def test_a_choice_that_changes_no_output_is_said_to_be_any(data):
    silent = seeded(TinyResNet).float()
    torch.nn.init.zeros_(silent.head.weight)
    original = network()
    original = original.but(loaded=replace(original.loaded, model=silent))
    notes = plan_sheets(planned(data, "macs=80%", original=original)[1])[0].notes
    assert any("the outputs do not depend on these sites" in note for note in notes)


def test_a_plan_says_which_macs_are_not_in_it(data):
    class Functional(TinyResNet):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.ones(4, 4, 3, 3) / 36)

        def forward(self, x):
            return super().forward(x + F.conv2d(x, self.own[:3, :3], padding=1))

    original = network()
    original = original.but(loaded=replace(original.loaded, model=seeded(Functional).float()))
    notes = plan_sheets(planned(data, "macs=80%", original=original)[1])[0].notes
    assert "MACs of the network itself are not counted" in notes
    assert not any("not counted" in note for note in plan_sheets(planned(data, "macs=80%")[1])[0].notes)


@pytest.mark.parametrize(
    ("drop", "words"), [(0.25, "0.25 points lost right"), (-0.25, "0.25 points gained right")]
)
def test_what_is_gained_is_not_said_to_be_lost(data, drop, words):
    report = planned(data, "macs=80%")[1].model_copy(update={"drop": drop})
    assert any(note.startswith(words) for note in plan_sheets(report)[0].notes)

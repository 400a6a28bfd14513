"""Plans within a budget: what they promise, against the networks converted; what is said and refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hosts import HeldTwice, seeded
from planning_setting import (
    FORM,
    SETTINGS,
    converted,
    costs,
    counted_passes,  # noqa: F401  # the fixture `passes`
    few_images,  # noqa: F401  # the fixture `data`
    network,
    planned,
)
from small_data import image_folder

from lcc import data as datasets
from lcc import evaluation, plan_tables, planning
from lcc.batches import eval_batches
from lcc.budget import parse_target
from lcc.errors import DataError, InfeasibleError, NothingToConvertError, RecipeError
from lcc.manifest import event_now
from lcc.methods import METHODS
from lcc.network import sites_of
from lcc.plan import make_plan
from lcc.plan_report import plan_sheets

pytestmark = pytest.mark.usefixtures("same_threads")


# What a plan promises

SHARES = [("macs=70%",), ("macs=-45%",), ("params=60%",), ("size=75%",), ("params=70%", "macs=60%")]


@pytest.mark.parametrize("targets", SHARES, ids=" ".join)
def test_the_converted_network_costs_what_the_plan_says_and_no_more_than_the_target(tmp_path, data, targets):
    rules, report = planned(data, *targets)
    assert report.now == costs(network())
    assert report.then == costs(converted(rules, data, tmp_path))
    for target in map(parse_target, targets):
        assert report.then[target.quantity] <= target.of(report.now)
    assert report.error == pytest.approx(sum(part.error for part in report.parts))


def test_an_amount_is_kept_too(tmp_path, data):
    rules, report = planned(data, "params=1.5k")
    assert costs(converted(rules, data, tmp_path))["params"] == report.then["params"] <= 1500


def test_a_step_has_the_parameters_and_macs_that_the_plan_says(tmp_path, data):
    rules, report = planned(data, "macs=75%", methods=("rd_explicit",), include=("layer1",))
    got = costs(converted(rules, data, tmp_path))
    assert [part.sites for part in report.parts] == [("layer1",)]
    assert (got["params"], got["macs"]) == (report.then["params"], report.then["macs"])


def test_the_parts_say_what_becomes_of_each_site(data):
    rules, report = planned(data, "params=60%", "macs=80%")
    sites = {site.name: site for site in sites_of(network())}
    for quantity in ("params", "macs"):
        saved = sum(part.saved[quantity] for part in report.parts)
        assert report.now[quantity] - report.then[quantity] == saved
        assert saved == sum(
            getattr(part.before, quantity) - getattr(part.after, quantity) for part in report.parts
        )
    for part in report.parts:
        assert part.before.macs == sum(sites[name].cost().macs for name in part.sites)
        assert part.relative_error >= 0
        assert part.alone is None
    chosen = {name: part.method for part in report.parts for name in part.sites}
    assert make_plan(tuple(sites.values()), rules).methods() == chosen


def test_a_smaller_budget_costs_no_less_error(data):
    errors = [planned(data, f"macs={share}%")[1].error for share in (90, 75, 60)]
    assert errors == sorted(errors)


def test_the_frontier_goes_from_the_floor_to_the_network_as_it_is(data):
    report = planned(data, "macs=70%")[1]
    frontier = [(point.costs["macs"], point.error) for point in report.frontier]
    assert frontier == sorted(frontier, key=lambda point: (point[0], -point[1]))
    assert frontier[-1][1] == 0
    assert frontier[0][0] <= report.then["macs"] <= report.now["macs"]


def test_the_chosen_methods_are_among_those_named(data):
    report = planned(data, "macs=80%", methods=("circulant", "linear_mix:group_size=2"))[1]
    assert {str(part.method) for part in report.parts} <= {"circulant", "linear_mix:group_size=2"}
    named = planned(data, "macs=80%", methods=("linear_mix",), exclude=("layer2.*",), include=("*.conv?",))
    assert {name for part in named.report.parts for name in part.sites} <= {"layer1.conv1", "layer1.conv2"}


@pytest.mark.parametrize("percent", [60, 80])
def test_capacity_keeps_more_parameters_than_the_least_error_does(data, percent):
    reports = {keep: planned(data, f"macs={percent}%", keep=keep).report for keep in ("outputs", "capacity")}
    assert reports["capacity"].then["params"] > 1.2 * reports["outputs"].then["params"]
    assert reports["capacity"].error > reports["outputs"].error
    assert re.match(r"[\d.]+% of the macs, [\d.]+% of the params, error", reports["capacity"].dearer)
    assert re.match(r"[\d.]+% of the macs, error", reports["outputs"].dearer)
    assert all(report.then["macs"] <= percent / 100 * report.now["macs"] for report in reports.values())


def test_the_frontier_is_of_errors_whatever_is_kept(data):
    of_outputs, of_capacity = (
        planned(data, "macs=60%", keep=keep).report.frontier for keep in ("outputs", "capacity")
    )
    assert of_capacity == of_outputs
    assert [point.error for point in of_capacity] == sorted((p.error for p in of_capacity), reverse=True)


def test_what_may_be_lost_is_not_asked_of_random_weights(data):
    loaded = network().loaded
    for fresh in ({"weights": "none"}, {"num_classes": 3}):
        source = loaded.source.model_copy(update=fresh)
        random = network().but(loaded=replace(loaded, source=source))
        with pytest.raises(RecipeError, match="--max-drop needs a trained network"):
            planned(data, max_drop=1, data=data, original=random)


def test_a_refusal_names_what_was_not_tried_and_would_save_some(data):
    words = r"; not tried, since fitted by training: rd_explicit, .*add --method linear_mix .*rd_explicit"
    with pytest.raises(InfeasibleError, match=words) as first:
        planned(data, "macs=1%")
    hinted = re.findall(r"--method (\w+)", str(first.value))
    with pytest.raises(InfeasibleError, match="the floor is"):  # what is hinted at is taken
        planned(data, "macs=1%", methods=tuple(hinted))
    with pytest.raises(InfeasibleError) as refusal:
        planned(data, "macs=1%", methods=("linear_mix",))
    assert "not tried" not in str(refusal.value)
    with pytest.raises(InfeasibleError) as refusal:
        planned(data, "macs=1%", include=("down",))
    assert "not tried" not in str(refusal.value)


def test_that_nothing_can_be_saved_is_said_of_the_sites_that_are_left(data):
    with pytest.raises(RecipeError, match=r"any of its 1 sites that --include and --exclude leave \(1 x "):
        planned(data, "macs=80%", include=("stem",), methods=("linear_mix",))


@pytest.mark.parametrize("method", ["shared:kernels=2,align=false", "shared:scale=true"])
def test_banks_that_would_change_after_they_are_priced_are_refused(data, method):
    with pytest.raises(RecipeError, match=r"shared:.*: a planner prices banks of one kernel"):
        planned(data, "params=80%", methods=(method,))


def test_too_few_images_are_told_before_anything_is_timed(data, monkeypatch):
    monkeypatch.setattr(plan_tables, "Clock", lambda *_: pytest.fail("timed"))
    with pytest.raises(DataError, match="has 24 training images, 25 were asked for"):
        planned(data, "latency=80%", images=25)


def test_without_names_only_what_is_fitted_in_closed_form_is_tried(data, passes):
    planned(data, "macs=80%")
    ((_, _, options, _),) = passes
    tried = {type(method) for method, _ in options}
    assert tried <= {kind for kind in METHODS.values() if not kind.fits_slowly}
    assert len(tried) > 1


# As little as keeps the accuracy


def points_lost(monkeypatch, lost):
    """Stand for converting and measuring: `lost` says how many points a choice of so many MACs loses."""
    tried = []

    def measured(*arguments):
        found = arguments[-1]
        tried.append(found)
        return lost(found.costs["macs"])

    monkeypatch.setattr(planning, "_points_lost", measured)
    return tried


def test_of_what_loses_few_enough_points_the_cheapest_is_chosen(data, monkeypatch):
    macs = costs(network())["macs"]
    tried = points_lost(monkeypatch, lambda kept: 20 * (1 - kept / macs))
    report = planned(data, max_drop=5, data=data).report
    assert report.drop <= 5
    assert report.drop == pytest.approx(20 * (1 - report.then["macs"] / macs))
    cheaper = [found for found in tried if found.costs["macs"] < report.then["macs"]]
    assert cheaper
    assert all(20 * (1 - found.costs["macs"] / macs) > 5 for found in cheaper)
    assert 0.75 * macs <= report.then["macs"] <= 0.8 * macs


def test_a_plan_says_what_was_done_to_its_network_before(data):
    done = [event_now("train", "lcc finetune"), event_now("measure", "lcc report"), event_now("convert", "")]
    report = planned(data, "macs=80%", original=network().but(history=tuple(done))).report
    assert report.source == f"{network().loaded.source}, fine-tuned, converted"
    assert plan_sheets(report)[0].title.startswith(f"{report.source}: ")


def test_a_drop_of_just_as_much_is_allowed(data, monkeypatch):
    points_lost(monkeypatch, lambda _: 5 + 1e-14)
    assert planned(data, max_drop=5, data=data).report.drop == pytest.approx(5)


def test_where_all_may_be_lost_the_cheapest_there_is_is_chosen(data, monkeypatch):
    tried = points_lost(monkeypatch, lambda _: 3.0)
    then = planned(data, max_drop=5, data=data).report.then
    with pytest.raises(RecipeError, match=f"the floor is {then['macs'] / costs(network())['macs']:.1%}"):
        planned(data, "macs=1%")
    assert len(tried) == 1


def test_no_choice_is_converted_twice_and_the_refusal_names_the_one_that_lost_least(data, monkeypatch):
    macs = costs(network())["macs"]
    tried = points_lost(monkeypatch, lambda kept: 20 - 10 * kept / macs)
    with pytest.raises(RecipeError, match="satisfiable: no") as refused:
        planned(data, max_drop=5, data=data, methods=("linear_mix",), include=("layer1.conv?",))
    choices = [tuple((option.method, option.sites) for option in found.taken) for found in tried]
    assert 1 < len(choices) == len(set(choices))
    share = max(found.costs["macs"] for found in tried) / macs
    assert f"no; {share:.1%} of the macs loses {20 - 10 * share:.2f} points" in str(refused.value)


def test_what_is_made_small_is_what_was_asked_for(data, monkeypatch):
    points_lost(monkeypatch, lambda _: 0.0)
    by_params, by_macs = (
        planned(data, max_drop=1, data=data, minimise=quantity).report.then for quantity in ("params", "macs")
    )
    assert by_params["params"] < by_macs["params"]
    assert by_macs["macs"] < by_params["macs"]


def test_a_drop_that_cannot_be_kept_is_refused_with_the_least_that_is_lost(data, monkeypatch):
    points_lost(monkeypatch, lambda _: 7.5)
    with pytest.raises(
        RecipeError, match=r"satisfiable: no; 9\d\.\d% of the macs loses 7\.50 points already"
    ):
        planned(data, max_drop=5, data=data)


def test_the_points_that_a_plan_says_are_lost_are_those_of_the_converted_network(tmp_path, data):
    rules, report = planned(data, max_drop=40, data=data)
    judges = datasets.open_eval(data)
    before, after = (
        evaluation.evaluate(one.loaded.model, eval_batches(judges, FORM, workers=0), device="cpu").top1
        for one in (network(), converted(rules, data, tmp_path))
    )
    assert report.drop == pytest.approx(before - after)
    assert report.drop <= 40


def test_that_test_images_choose_is_said(data, monkeypatch):
    points_lost(monkeypatch, lambda _: 0.0)
    said = []
    planned(data, max_drop=5, data=data, settings=replace(SETTINGS, say=said.append))
    assert [text for text in said if "has no val part, so its test images choose what is converted" in text]


def test_that_images_which_were_fitted_to_judge_is_said(tmp_path, data, monkeypatch):
    points_lost(monkeypatch, lambda _: 0.0)
    loose, said = image_folder(tmp_path, {"": {"0": 8, "1": 8, "2": 8}}), []
    for calibration in (loose, data):
        planned(
            calibration,
            max_drop=5,
            data=loose,
            settings=replace(SETTINGS, say=said.append),
            original=network(),
        )
    (note,) = [text for text in said if "among those that judge" in text]
    assert note.startswith(f"note: {loose} has neither a val nor a test part")


def test_labelled_images_that_are_not_there_are_said_before_any_work(data, passes):
    with pytest.raises(DataError, match="nowhere"):
        planned(data, max_drop=1, data="idx:nowhere")
    assert passes == []


# What is refused


def test_what_cannot_be_reached_is_refused_before_any_image_is_opened():
    with pytest.raises(RecipeError, match=r"satisfiable: no; the floor is \d+\.\d% of the macs .* is 1.0%"):
        planned("idx:nowhere", "macs=1%")


def test_what_a_host_goes_round_is_left_as_it_is_and_told(data):
    original, said = network(), []
    original = original.but(loaded=replace(original.loaded, model=seeded(HeldTwice).float()))
    settings = replace(SETTINGS, say=said.append)
    report = planned(data, "macs=80%", original=original, settings=settings)[1]
    assert not any("held" in part.sites for part in report.parts)
    assert [text for text in said if text.startswith("note: held stays dense: the network's code")]


def test_a_target_already_met_is_nothing_to_convert_and_needs_no_image():
    with pytest.raises(NothingToConvertError, match=r"has its targets already \(.*k MACs\)"):
        planned("idx:nowhere", "macs=1G")


def test_images_that_are_not_there_are_said(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        planned(f"idx:{tmp_path}/nowhere", "macs=70%")


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(which):
    with pytest.raises(RecipeError, match=r"no site matches 'nothing.'"):
        planned("idx:nowhere", "macs=90%", **{which: ("nothing*",)})


def test_targets_that_exclude_each_other_are_refused_before_any_image_is_opened():
    floors = [
        float(re.search(r"floor is (\d+\.\d)%", str(refused(quantity)))[1]) for quantity in ("macs", "params")
    ]
    both = [f"{name}={least + 0.1:.1f}%" for name, least in zip(("macs", "params"), floors, strict=True)]
    with pytest.raises(RecipeError, match=r"satisfiable: no; each target alone is, but not .* at once"):
        planned("idx:nowhere", *both)


def refused(quantity):
    with pytest.raises(RecipeError) as caught:
        planned("idx:nowhere", f"{quantity}=1%")
    return caught.value


def test_a_target_that_is_met_already_stands_in_no_ones_way(data):
    report = planned(data, "macs=1G", "params=90%", methods=("shared",)).report
    assert report.then["params"] <= 0.9 * report.now["params"]


@pytest.mark.parametrize("layer", ["stem", "head"])
def test_activations_that_are_no_numbers_are_a_finding_about_the_images(data, layer):
    broken = network()
    broken.loaded.model.get_submodule(layer).weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="no finite numbers"):
        planned(data, "macs=70%", original=broken)

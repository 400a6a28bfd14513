"""Plans within a budget: what they promise, against the networks converted; what is refused; what is kept."""

from __future__ import annotations

import re

import pytest
import torch
from hosts import TinyResNet, seeded
from small_data import idx_data

from lcc import data as datasets
from lcc import error_table, evaluation, pipeline, planning, whole_latency, whole_run
from lcc import recipe as recipes
from lcc.batches import eval_batches
from lcc.budget import parse_target
from lcc.conversion import convert_network
from lcc.counts import count_macs, count_params
from lcc.errors import ArtifactError, DataError, NothingToConvertError, RecipeError
from lcc.latency_table import Timed
from lcc.measure import Conditions
from lcc.methods import METHODS
from lcc.methods.circulant import Circulant
from lcc.models import Loaded, Preprocessing, Source
from lcc.network import Network, sites_of
from lcc.plan import make_plan
from lcc.plan_report import plan_line, plan_sheets, rules_text
from lcc.planning import plan_within
from lcc.recipe import Budget, Calibrate, ModelPart, Recipe
from lcc.settings import Settings
from lcc.whole_latency import Clock, Whole

SETTINGS = Settings(device="cpu", threads=1, trust_code=True, say=lambda _: None)
FORM = Preprocessing(image_size=(8, 8), crop_pct=1.0)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return idx_data(tmp_path_factory.mktemp("data"), train=24)


@pytest.fixture
def passes(monkeypatch):
    """Count how often errors are found out."""
    made, real = [], error_table.damages
    monkeypatch.setattr(error_table, "damages", lambda *a, **k: made.append(a) or real(*a, **k))
    return made


def network(seed=0):
    model = seeded(TinyResNet, seed=seed).float()
    source = Source(id="py:hosts:TinyResNet", weights="default")
    return Network(name="tiny", loaded=Loaded(model=model, source=source, preprocessing=FORM))


def planned(data, /, *targets, original=None, images=16, settings=SETTINGS, **options):
    budget = Budget(targets=targets, **options)
    return plan_within(original or network(), budget, Calibrate(data=data, images=images), settings)


def stored_bytes(model):
    names = set(model.state_dict())
    kept = [buffer for name, buffer in model.named_buffers() if name in names]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *kept))


def costs(one):
    """Count what a network costs, shared parameters once."""
    model = one.loaded.model
    return {
        "params": count_params(model),
        "macs": count_macs(model, one.example).macs,
        "size": stored_bytes(model),
    }


def converted(rules, data, folder):
    calibration = Calibrate(data=data, images=16)
    return convert_network(network(), rules, calibration, SETTINGS, fits=folder / "fits")[1]


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
        assert part.ms is None
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
    assert {str(part.method) for part in report.parts} <= {"circulant", "linear_mix(group_size=2)"}
    named = planned(data, "macs=80%", methods=("linear_mix",), exclude=("layer2.*",), include=("*.conv?",))
    assert {name for part in named.report.parts for name in part.sites} <= {"layer1.conv1", "layer1.conv2"}


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


def test_labelled_images_that_are_not_there_are_said_before_any_work(data, passes):
    with pytest.raises(DataError, match="nowhere"):
        planned(data, max_drop=1, data="idx:nowhere")
    assert passes == []


# What is said of it


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


def test_the_report_in_words_and_as_tables_has_the_target_and_the_cost(data):
    report = planned(data, "macs=70%")[1]
    assert plan_line(report).startswith("planned for macs=70%: ")
    chosen, frontier = plan_sheets(report)
    assert len(chosen.rows) == len(report.parts)
    assert len(frontier.rows) == len(report.frontier)
    assert "forward passes" in chosen.notes[-1]


# What is refused


def test_what_cannot_be_reached_is_refused_before_any_image_is_opened():
    with pytest.raises(RecipeError, match=r"satisfiable: no; the floor is \d+\.\d% of the macs .* is 1.0%"):
        planned("idx:nowhere", "macs=1%")


def test_two_targets_that_exclude_each_other_are_refused(data):
    with pytest.raises(RecipeError, match="satisfiable: no; the floor"):
        planned(data, "macs=40%", "params=10%")


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


def test_activations_that_are_no_numbers_are_a_finding_about_the_images(data):
    broken = network()
    broken.loaded.model.stem.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="no finite numbers"):
        planned(data, "macs=70%", original=broken)


# What is kept on disk


def test_a_second_run_finds_nothing_out_again(data, passes, monkeypatch):
    first = planned(data, "macs=70%")
    monkeypatch.setattr(error_table, "damages", None)
    monkeypatch.setattr(error_table.data, "images", None)
    second = planned(data, "macs=70%")
    assert second.rules == first.rules
    assert second.report.cost.endswith("kept from an earlier run")
    assert second.report.model_copy(update={"cost": first.report.cost}) == first.report
    planned(data, "macs=60%")
    assert len(passes) == 1


def test_another_target_finds_out_what_it_has_in_addition(data, passes):
    planned(data, "macs=70%", methods=("linear_mix",))
    planned(data, "params=70%", methods=("linear_mix", "circulant", "shared"))
    before, after = (set(call[2]) for call in passes)
    assert after
    assert not before & after


@pytest.mark.parametrize("change", ["weight", "statistics", "images", "seed", "data", "preprocessing"])
def test_what_errors_depend_on_is_found_out_anew(tmp_path, data, passes, change):
    options = {"methods": ("circulant",)}
    budget, calibration = Budget(targets=("macs=80%",), **options), Calibrate(data=data, images=16)
    plan_within(network(), budget, calibration, SETTINGS)
    other = network()
    if change == "weight":
        other.loaded.model.head.bias.data[0] += 1e-3
    elif change == "statistics":
        other.loaded.model.bn.running_var[0] += 1e-3
    elif change == "preprocessing":
        form = FORM.model_copy(update={"std": (0.3, 0.3, 0.3)})
        loaded = Loaded(model=other.loaded.model, source=other.loaded.source, preprocessing=form)
        other = other.but(loaded=loaded)
    elif change == "data":
        calibration = Calibrate(data=idx_data(tmp_path / "other", train=30), images=16)
    else:
        calibration = calibration.model_copy(update={change: 15})
    plan_within(other, budget, calibration, SETTINGS)
    assert len(passes) == 2


def test_planning_leaves_the_network_and_the_random_numbers_alone(data):
    original = network()
    before = {key: value.clone() for key, value in original.loaded.model.state_dict().items()}
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    planned(data, "macs=70%", original=original)
    assert torch.equal(torch.rand(3), wanted)
    after = original.loaded.model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_predicted_errors_are_set_beside_true_ones(data):
    budget = Budget(targets=("macs=70%",), methods=("linear_mix",))
    report = plan_within(
        network(), budget, Calibrate(data=data, images=12), SETTINGS, check_errors=True
    ).report
    count, rank = re.fullmatch(
        r"predicted errors of (\d+) options .* on 12 other .* (-?\d\.\d+)", report.checked
    ).groups()
    assert int(count) >= len(report.parts)
    assert 0.5 < float(rank) <= 1


def test_too_few_images_to_check_errors_on_are_said_first(data):
    budget = Budget(targets=("macs=70%",))
    with pytest.raises(DataError, match=r"errors are checked on as many more .* give --images \d+"):
        plan_within(network(), budget, Calibrate(data=data, images=10**6), SETTINGS, check_errors=True)


# Latency

SLOW = Circulant()
NOW_MS = 10.0
CONDITIONS = Conditions(
    runtime="a stand-in",
    version="1",
    device="no device",
    threads=1,
    batch=1,
    image_size="8x8",
    dtype="float32",
    rounds=1,
)


class Machine:
    """Stands for a device: an operator takes its MACs in milliseconds, a circulant one ten times as long.

    Whole networks save `together` of what their layers save alone.
    """

    def __init__(self):
        self.timed = []
        self.together = lambda saved: saved / 2

    def ms(self, spec, size, method):
        if method is None:
            return spec.cost(size).macs / 1e4
        return method.cost(spec, size).macs / 1e4 * (10 if method == SLOW else 1)

    def measure_latencies(self, wanted, timing, *, cache):
        table = {}
        for place, methods in wanted.items():
            dense = self.ms(place.spec, place.size, None)
            times = {m: self.ms(place.spec, place.size, m) for m in (None, *methods)}
            table[place] = {
                m: Timed(median_ms=ms, iqr_ms=0.0, noisy=False, ratio=ms / dense) for m, ms in times.items()
            }
        return table

    def time_network(self, rules):
        self.timed.append(rules)
        sites = sites_of(network())
        methods = make_plan(sites, rules).methods() if rules else {}
        saved = sum(
            self.ms(site.spec, size, None) - self.ms(site.spec, size, methods[site.name])
            for site in sites
            if site.name in methods
            for size in site.sizes
        )
        after = NOW_MS - self.together(saved)
        return Whole(rules=rules, before_ms=NOW_MS, ratio=after / NOW_MS, noisy=False, conditions=CONDITIONS)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(whole_latency, "measure_latencies", machine.measure_latencies)
    monkeypatch.setattr(Clock, "_timed", machine.time_network)
    return machine


def test_a_latency_is_predicted_from_layers_and_put_right_by_a_whole_network(data, machine):
    rules, report = planned(data, "latency=9ms")
    assert report.now["latency"] == NOW_MS
    fastest, chosen = report.compared
    assert chosen.predicted_ms == pytest.approx(chosen.measured_ms)
    assert chosen.measured_ms == pytest.approx(report.then["latency"])
    assert report.then["latency"] <= 9
    assert fastest.measured_ms < chosen.measured_ms
    assert NOW_MS - chosen.by_parts_ms == pytest.approx(2 * (NOW_MS - chosen.measured_ms))
    assert machine.timed[-1] == rules[:-1]


def test_what_is_slower_is_never_chosen(data, machine):
    report = planned(data, "latency=9.5ms", "params=55%")[1]  # which a circulant one has least of
    assert report.parts
    for part in report.parts:
        if part.ms is None:
            assert part.before.macs == part.after.macs  # a shared kernel: the same layers run
            continue
        before, after = part.ms
        assert after < before
        assert part.method != SLOW
    with pytest.raises(RecipeError, match=r"the floor is 100\.0% of the latency"):
        planned(data, "latency=99%", methods=("circulant",))


def test_a_target_of_two_kinds_is_kept_in_both(tmp_path, data, machine):
    rules, report = planned(data, "latency=9ms", "params=80%")
    assert report.then["latency"] <= 9
    assert costs(converted(rules, data, tmp_path))["params"] == report.then["params"]
    assert report.then["params"] <= 0.8 * report.now["params"]


def test_after_a_miss_the_choice_is_made_anew(data, machine):
    machine.together = lambda saved: saved - saved**2 / 6  # the more is saved, the less it is worth
    rules, report = planned(data, "latency=9ms", methods=("linear_mix",))
    _, first, *_, last = report.compared
    assert len(report.compared) > 2
    assert abs(first.predicted_ms / first.measured_ms - 1) > 0.02
    assert abs(last.predicted_ms / last.measured_ms - 1) <= 0.02
    assert last.predicted_ms <= 9 * (1 + 1e-6)
    assert machine.timed[-1] == rules[:-1]


def test_of_several_networks_that_were_timed_the_chosen_one_comes_last(data, machine):
    factors = iter([0.5, 0.62, 0.4, 0.5, 0.5, 0.5])
    machine.together = lambda saved: saved * next(factors)
    rules, report = planned(data, "latency=8.7ms", methods=("linear_mix",))
    assert len(report.compared) >= 3
    assert report.compared[-1].measured_ms == report.then["latency"]
    assert report.then["latency"] <= 8.7 * 1.02
    assert rules[:-1] in machine.timed


def test_a_network_that_conversion_makes_slower_is_refused(data, machine):
    machine.together = lambda saved: -saved / 10
    with pytest.raises(RecipeError, match=r"the floor is 100\.0% of the latency"):
        planned(data, "latency=9ms")
    assert len(machine.timed) == 1


def test_a_network_that_was_timed_is_not_timed_again(data, machine):
    first = planned(data, "latency=9ms").report
    count = len(machine.timed)
    assert planned(data, "latency=9ms").report.then == first.then
    assert len(machine.timed) == count
    planned(data, "latency=9ms", threads=2)
    assert len(machine.timed) > count


def test_a_latency_that_cannot_be_reached_is_refused_with_the_floor(data, machine):
    with pytest.raises(
        RecipeError, match=r"satisfiable: no; the floor is \d+\.\d% of the latency .* ms a run"
    ):
        planned(data, "latency=10%")
    assert len(machine.timed) == 1


def test_a_latency_that_is_there_already_is_nothing_to_convert(data, machine):
    with pytest.raises(NothingToConvertError, match="10 ms a run"):
        planned(data, "latency=11ms")


def test_counted_targets_that_cannot_be_reached_are_refused_before_anything_is_timed(data, machine):
    with pytest.raises(RecipeError, match="the floor"):
        planned(data, "latency=90%", "macs=1%")
    assert machine.timed == []


# Through the pipeline

PART = ModelPart(source="py:hosts:TinyResNet", weights="none", image_size=(8, 8), crop_pct=1.0)


def test_a_recipe_with_a_budget_runs(tmp_path, data):
    recipe = Recipe(
        lcc=1, model=PART, budget=Budget(targets=("macs=70%",)), calibrate=Calibrate(data=data, images=16)
    )
    before, after = whole_run.run(recipe, "", tmp_path / "out", SETTINGS).models
    assert after.macs <= 0.7 * before.macs
    assert SETTINGS.open(ModelPart(source=str(tmp_path / "out"))).plan.groups


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


@pytest.mark.parametrize("place", ["plan.toml", "nowhere/plan.toml", "."])
def test_where_a_plan_cannot_be_written_is_said_before_the_work(tmp_path, place):
    (tmp_path / "plan.toml").write_text("mine")
    budget, calibration = Budget(targets=("macs=70%",)), Calibrate(data="idx:nowhere")
    with pytest.raises(ArtifactError, match=r"exists; --force|can't be written"):
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


def test_capacity_keeps_as_many_parameters_as_the_budget_allows(data):
    reports = {keep: planned(data, "macs=60%", keep=keep).report for keep in ("outputs", "capacity")}
    assert reports["capacity"].then["params"] >= reports["outputs"].then["params"]
    assert reports["capacity"].error >= reports["outputs"].error
    assert all(report.then["macs"] <= 0.6 * report.now["macs"] for report in reports.values())

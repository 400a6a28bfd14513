"""Rules, and the plan that they make of a list of sites."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError

from lcc.errors import NothingToConvertError, RecipeError
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.plan import DENSE_BY_RULE, NO_RULE, Group, Kept, Plan, Rule, Site, make_plan, rules_for
from lcc.specs import ConvSpec, Cost, Size, StepSpec

DEPTHWISE, GROUPED = LinearMix(), LinearMix(group_size=4)


def site(name, channels=16, out=None, kernel=(3, 3), sizes=((8, 8),), **options):
    fields = {key: options.pop(key) for key in ("aliases", "norm", "obstacle", "shortcut") if key in options}
    return Site(
        name=name,
        spec=ConvSpec(in_channels=channels, out_channels=out or channels, kernel_size=kernel, **options),
        sizes=tuple(Size(height=height, width=width) for height, width in sizes),
        **fields,
    )


SITES = (
    site("stem", 3, 16),
    site("layer1.0.conv1"),
    site("layer1.0.conv2"),
    site("layer1.1.conv1"),
    site("layer2.0.conv1", 16, 32),
    site("layer2.0.conv2", 32),
    site("head", 32, kernel=(1, 1)),
)


def rule(*match, method=None):
    return Rule(match=match, method=method)


def converted(plan):
    return {name: str(method) for name, method in plan.methods().items()}


def reasons(plan):
    return {kept.site: kept.reason for kept in plan.kept}


# Which rule decides


def test_a_star_takes_all_that_the_method_can_take():
    plan = make_plan(SITES, rules_for(DEPTHWISE))
    assert list(plan.methods()) == ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv2"]


def test_the_first_rule_that_matches_decides():
    plan = make_plan(SITES, (rule("layer1.0.*", method=GROUPED), rule("*", method=DEPTHWISE)))
    assert converted(plan) == {
        "layer1.0.conv1": "linear_mix(group_size=4)",
        "layer1.0.conv2": "linear_mix(group_size=4)",
        "layer1.1.conv1": "linear_mix",
        "layer2.0.conv2": "linear_mix",
    }


def test_a_later_rule_changes_nothing_that_an_earlier_one_decided():
    plan = make_plan(SITES, (rule("layer1.*", method=DEPTHWISE), rule("*", method=GROUPED)))
    assert plan.methods()["layer1.0.conv1"] == DEPTHWISE


def test_a_rule_without_a_method_keeps_its_sites_dense():
    plan = make_plan(SITES, (rule("layer1.*"), rule("*", method=DEPTHWISE)))
    assert list(plan.methods()) == ["layer2.0.conv2"]


def test_a_site_kept_by_a_rule_says_so():
    plan = make_plan(SITES, (rule("layer1.*"), rule("*", method=DEPTHWISE)))
    assert reasons(plan)["layer1.0.conv1"] == DENSE_BY_RULE


def test_a_site_that_no_rule_names_says_so():
    plan = make_plan(SITES, (rule("layer1.*", method=DEPTHWISE),))
    assert reasons(plan)["layer2.0.conv2"] == NO_RULE


def test_a_first_rule_that_its_method_can_not_follow_still_decides():
    sites = (site("a", 16), site("b", 18))
    plan = make_plan(sites, (rule("*", method=GROUPED), rule("b", method=DEPTHWISE)))
    assert reasons(plan) == {"b": "group_size 4 does not divide 18 input channels"}


def test_every_site_is_converted_or_kept_once():
    plan = make_plan(SITES, (rule("layer1.0.*"), rule("layer?.*", method=DEPTHWISE)))
    names = [*plan.methods(), *reasons(plan)]
    assert sorted(names) == sorted(s.name for s in SITES)


def test_rules_with_equal_methods_make_one_group():
    plan = make_plan(
        SITES, (rule("layer2.*", method=LinearMix()), rule("layer1.*", method=LinearMix(group_size=1)))
    )
    assert len(plan.groups) == 1


def test_sites_of_a_group_are_in_call_order():
    plan = make_plan(SITES, (rule("layer2.*", "layer1.*", method=DEPTHWISE),))
    assert plan.groups[0].sites == ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv2")


# Globs


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("layer1.*", {"layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"}),
        ("*.conv2", {"layer1.0.conv2", "layer2.0.conv2"}),
        ("layer[12].0.conv?", {"layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"}),
        ("layer[!1].*", {"layer2.0.conv1", "layer2.0.conv2"}),
        ("stem", {"stem"}),
        ("tem", set()),
        ("Stem", set()),
        ("layer1", set()),
        ("layer1.0.conv1.*", set()),
    ],
)
def test_a_glob_matches_whole_names_and_sees_capitals(glob, names):
    assert {s.name for s in SITES if rule(glob).matches(s)} == names


def test_a_rule_matches_if_any_of_its_patterns_does():
    assert rule("nothing", "st*").matches(SITES[0])


def test_a_pattern_may_mean_the_other_name_of_a_shared_convolution():
    shared = site("left.0", aliases=("right.1",))
    assert make_plan((shared,), (rule("right.*", method=DEPTHWISE),)).groups[0].sites == ("left.0",)


def test_a_dot_is_a_dot():
    assert not rule("layer1.0.conv1").matches(site("layer1x0xconv1"))


# Patterns that match nothing


@pytest.mark.parametrize("patterns", [("layer9.*",), ("layer1.*", "layer9.*"), ("layer1.0.conv9",)])
def test_a_pattern_that_matches_no_site_is_an_error_that_names_it(patterns):
    with pytest.raises(RecipeError, match=re.escape(f"no site matches {patterns[-1]!r}")):
        make_plan(SITES, (rule(*patterns, method=DEPTHWISE),))


def test_an_idle_pattern_of_a_dense_rule_is_an_error_too():
    with pytest.raises(RecipeError, match="'layer9"):
        make_plan(SITES, (rule("layer9.*"), rule("*", method=DEPTHWISE)))


def test_an_idle_pattern_error_says_where_to_find_names():
    with pytest.raises(RecipeError, match="`lcc inspect` lists the 7 names"):
        make_plan(SITES, (rule("layer9.*", method=DEPTHWISE),))


def test_a_pattern_whose_sites_an_earlier_rule_took_is_not_idle():
    rules = (rule("layer1.*", method=DEPTHWISE), rule("layer1.0.*", method=GROUPED))
    assert len(make_plan(SITES, rules).methods()) == 3


# Names that are spelled out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stem", "channels change (3 to 16)"),
        ("head", "already pointwise (1x1)"),
        ("fixed", "tied to another"),
    ],
)
def test_a_spelled_out_name_that_can_not_be_taken_is_an_error_that_says_why(name, reason):
    sites = (*SITES, site("fixed", obstacle="tied to another"))
    with pytest.raises(RecipeError, match=re.escape(f"{name} can't be converted by linear_mix: {reason}")):
        make_plan(sites, (rule("layer1.*", name, method=DEPTHWISE),))


def test_a_spelled_out_alias_that_can_not_be_taken_is_an_error():
    shared = site("left", aliases=("right",), obstacle="tied to another")
    with pytest.raises(RecipeError, match="tied to another"):
        make_plan((shared, *SITES), (rule("right", method=DEPTHWISE),))


def test_a_spelled_out_name_is_an_error_even_beside_a_glob_that_matches_it():
    with pytest.raises(RecipeError, match="stem"):
        make_plan(SITES, (rule("*", "stem", method=DEPTHWISE),))


def test_a_spelled_out_name_that_an_earlier_rule_keeps_is_no_error():
    plan = make_plan(SITES, (rule("stem"), rule("stem", "layer1.*", method=DEPTHWISE)))
    assert reasons(plan)["stem"] == DENSE_BY_RULE


def test_a_spelled_out_name_without_a_method_is_no_error():
    assert "head" in reasons(make_plan(SITES, (rule("head"), rule("*", method=DEPTHWISE))))


def test_a_glob_skips_what_can_not_be_taken_and_says_why():
    plan = make_plan(SITES, (rule("ste?", "layer1.*", method=DEPTHWISE),))
    assert reasons(plan)["stem"].startswith("channels change (3 to 16)")


# Include and exclude


def test_include_and_exclude_take_the_one_and_leave_the_other():
    plan = make_plan(SITES, rules_for(DEPTHWISE, include=("layer1.*",), exclude=("*.conv2",)))
    assert list(plan.methods()) == ["layer1.0.conv1", "layer1.1.conv1"]


def test_exclude_alone_leaves_the_rest_to_the_method():
    plan = make_plan(SITES, rules_for(DEPTHWISE, exclude=("layer1.*",)))
    assert list(plan.methods()) == ["layer2.0.conv2"]


def test_an_excluded_site_says_that_a_rule_keeps_it():
    plan = make_plan(SITES, rules_for(DEPTHWISE, exclude=("layer1.0.*",)))
    assert reasons(plan)["layer1.0.conv1"] == DENSE_BY_RULE


def test_an_excluded_site_that_could_not_be_taken_anyway_gives_that_reason():
    fixed = site("fixed", obstacle="tied to another")
    plan = make_plan((*SITES, fixed), rules_for(DEPTHWISE, exclude=("fixed",)))
    assert reasons(plan)["fixed"] == "tied to another"


def test_an_exclude_that_matches_nothing_is_an_error():
    with pytest.raises(RecipeError, match="'layer9"):
        make_plan(SITES, rules_for(DEPTHWISE, exclude=("layer9.*",)))


# Costs


def test_the_cost_of_a_site_counts_parameters_once_and_every_call():
    twice = site("twice", sizes=((8, 8), (4, 4)), padding=(1, 1), bias=True)
    assert twice.cost() == Cost(params=9 * 16 * 16 + 16, macs=9 * 16 * 16 * (64 + 16))


def test_the_cost_of_a_converted_site_counts_parameters_once_and_every_call():
    twice = site("twice", sizes=((8, 8), (4, 4)), padding=(1, 1), bias=True)
    each = 9 * 16 + 16 * 16
    assert twice.cost_with(DEPTHWISE) == Cost(params=each + 16, macs=each * (64 + 16))


def test_the_cost_of_a_site_never_called_is_its_parameters():
    assert site("idle", sizes=(), obstacle="never called").cost() == Cost(params=9 * 16 * 16, macs=0)


def test_a_method_that_would_need_more_is_refused_with_the_two_numbers():
    reason = site("narrow", 1, padding=(1, 1)).why_not(DEPTHWISE)
    assert reason == f"would not be cheaper: {(9 + 1) * 64:,} MACs instead of {9 * 64:,}"


def test_a_method_that_would_store_as_much_is_refused_with_the_two_numbers():
    # One group of all channels: the same kernel, and the pointwise part on top.
    reason = site("whole", 4, padding=(1, 1)).why_not(GROUPED)
    assert reason == f"would not be cheaper: {(9 + 1) * 16 * 64:,} MACs instead of {9 * 16 * 64:,}"


def test_a_method_that_takes_less_memory_but_more_work_is_refused_by_its_work():
    # A cross is stored as 5 taps and run as 9.
    cross = LinearMix(group_size=8, stencil="cross")
    reason = site("a", 8, sizes=((3, 3),)).why_not(cross)
    assert reason == f"would not be cheaper: {(9 + 1) * 64:,} MACs instead of {9 * 64:,}"


def test_a_method_that_runs_as_much_but_stores_more_is_refused_by_its_parameters():
    empty = site("a", 1, sizes=((2, 2),))  # no output pixel: no work to save
    assert empty.why_not(DEPTHWISE) == "would not be cheaper: 10 parameters instead of 9"


def test_a_glob_skips_a_site_that_would_not_be_cheaper():
    plan = make_plan((site("narrow", 1), site("wide", 16)), rules_for(DEPTHWISE))
    assert reasons(plan)["narrow"].startswith("would not be cheaper")


def test_an_obstacle_is_named_before_anything_about_the_method():
    assert site("a", 16, 32, obstacle="never called", sizes=()).why_not(DEPTHWISE) == "never called"


# Steps, and sites inside each other


RD, RD_7 = RdExplicit(), RdExplicit(kernel_size=7)


def step(name, channels=16, sizes=((8, 8),), **options):
    conv = ConvSpec(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=(1, 1))
    return Site(
        name=name,
        kind="step",
        spec=StepSpec(channels=channels, convs=(conv, conv), norm_params=4 * channels),
        sizes=tuple(Size(height=height, width=width) for height, width in sizes),
        **options,
    )


NESTED = (
    site("stem", 3, 16),
    step("a"),
    site("a.conv1"),
    site("a.conv2", kernel=(1, 1)),
    step("b"),
    site("b.conv1"),
)


def plan_of(*rules, sites=NESTED):
    plan = make_plan(sites, rules)
    assert sorted([*plan.methods(), *reasons(plan)]) == sorted(s.name for s in sites)
    return plan


def test_a_step_is_taken_and_what_is_inside_goes_with_it():
    plan = plan_of(rule("*", method=RD))
    assert list(plan.methods()) == ["a", "b"]
    assert reasons(plan) == {
        "stem": "rd_explicit takes a convolution only where a rule spells its name out",
        "a.conv1": "inside a, which rd_explicit replaces",
        "a.conv2": "inside a, which rd_explicit replaces",
        "b.conv1": "inside b, which rd_explicit replaces",
    }


def test_a_method_for_convolutions_leaves_steps_and_says_so():
    plan = plan_of(rule("*", method=DEPTHWISE))
    assert list(plan.methods()) == ["a.conv1", "b.conv1"]
    assert reasons(plan)["a"] == "linear_mix takes convolutions, and this is a residual step"


def test_what_is_kept_says_of_which_kind_it_is():
    kinds = {kept.site: kept.kind for kept in plan_of(rule("*", method=DEPTHWISE)).kept}
    assert kinds == {"stem": "conv", "a": "step", "a.conv2": "conv", "b": "step"}


def test_a_convolution_is_taken_by_name_where_the_method_wants_a_name():
    sites = (site("a", padding=(1, 1)), site("b", padding=(1, 1)))
    plan = plan_of(rule("?", "b", method=RD), sites=sites)
    assert list(plan.methods()) == ["b"]
    assert "only where a rule spells its name out" in reasons(plan)["a"]


def test_an_alias_spelled_out_is_a_name():
    plan = plan_of(rule("other", method=RD), sites=(site("a", padding=(1, 1), aliases=("other",)),))
    assert list(plan.methods()) == ["a"]


def test_a_step_spelled_out_for_a_method_of_convolutions_is_an_error():
    with pytest.raises(
        RecipeError, match="a can't be converted by linear_mix: linear_mix takes convolutions"
    ):
        make_plan(NESTED, (rule("a", "*", method=DEPTHWISE),))


def test_a_rule_passes_over_kinds_that_its_method_does_not_take():
    plan = plan_of(rule("a*", method=DEPTHWISE), rule("*", method=RD))
    assert list(plan.methods()) == ["a.conv1", "b"]


def test_a_rule_passes_over_convolutions_that_it_does_not_spell_out():
    plan = plan_of(rule("*", method=RD), rule("*", method=DEPTHWISE), sites=(*NESTED, site("last")))
    assert converted(plan) == {"a": "rd_explicit", "b": "rd_explicit", "last": "linear_mix"}


@pytest.mark.parametrize("form", ["block", "conv"])
def test_a_rule_passes_over_kinds_that_its_method_is_set_not_to_take(form):
    mgic = Mgic(form=form, group_size=8, coarsest=8)
    other = DEPTHWISE if form == "block" else RD
    sites = (*NESTED, site("last", 64, padding=(1, 1)))
    plan = plan_of(rule("*", method=mgic), rule("*", method=other), sites=sites)
    assert ("last" if form == "block" else "b") in {
        name for name, method in plan.methods().items() if method == other
    }


def test_a_step_whose_convolutions_an_earlier_rule_converts_is_kept():
    plan = plan_of(rule("*", method=DEPTHWISE), rule("*", method=RD), sites=(*NESTED, step("c")))
    assert list(plan.methods()) == ["a.conv1", "b.conv1", "c"]
    assert reasons(plan)["a"] == "holds a.conv1, which an earlier rule converts"


def test_a_step_in_which_an_earlier_rule_could_convert_nothing_is_taken():
    sites = (step("a"), site("a.conv", kernel=(1, 1)))
    plan = plan_of(rule("*", method=DEPTHWISE), rule("*", method=RD), sites=sites)
    assert list(plan.methods()) == ["a"]


def test_a_step_in_which_an_earlier_rule_keeps_something_dense_is_kept():
    plan = plan_of(rule("a.conv2"), rule("*", method=RD))
    assert list(plan.methods()) == ["b"]
    assert reasons(plan)["a"] == "holds a.conv2, which an earlier rule keeps dense"
    assert reasons(plan)["a.conv2"] == DENSE_BY_RULE


def test_a_later_rule_that_keeps_something_inside_a_step_dense_comes_too_late():
    plan = plan_of(rule("?", method=RD), rule("a.conv2"))
    assert reasons(plan)["a.conv2"] == "inside a, which rd_explicit replaces"


def test_a_step_kept_dense_leaves_its_convolutions_to_others():
    plan = plan_of(rule("a"), rule("*", method=DEPTHWISE))
    assert "a.conv1" in plan.methods()


def test_a_convolution_spelled_out_before_its_step_is_taken_and_the_step_kept():
    plan = plan_of(rule("a.conv1", method=DEPTHWISE), rule("*", method=RD))
    assert converted(plan) == {"a.conv1": "linear_mix", "b": "rd_explicit"}


def test_a_convolution_spelled_out_behind_its_step_is_an_error():
    with pytest.raises(
        RecipeError, match=r"a\.conv1 can't be converted by linear_mix: inside a, which rd_expl"
    ):
        make_plan(NESTED, (rule("*", method=RD), rule("a.conv1", method=DEPTHWISE)))


def test_a_step_spelled_out_behind_what_is_inside_it_is_an_error():
    with pytest.raises(
        RecipeError, match=r"a can't be converted by rd_explicit: holds a\.conv1, which an earlier"
    ):
        make_plan(NESTED, (rule("a.*", method=DEPTHWISE), rule("a", method=RD)))


def test_a_step_and_a_convolution_in_it_spelled_out_by_one_rule_is_an_error():
    sites = (step("a"), site("a.conv", padding=(1, 1)))
    with pytest.raises(RecipeError, match=r"a\.conv can't be converted by rd_explicit: inside a"):
        make_plan(sites, (rule("a", "a.conv", method=RD),))


def test_of_a_step_in_a_step_the_outer_one_is_taken():
    sites = (step("a"), step("a.b"), site("a.b.conv"))
    plan = plan_of(rule("*", method=RD), sites=sites)
    assert list(plan.methods()) == ["a"]
    assert reasons(plan)["a.b"] == "inside a, which rd_explicit replaces"


def test_of_a_step_in_a_step_the_one_of_the_earlier_rule_is_taken():
    sites = (step("a"), step("a.b"), site("a.b.conv"))
    plan = plan_of(rule("*.b", method=RD_7), rule("*", method=RD), sites=sites)
    assert list(plan.methods()) == ["a.b"]
    assert reasons(plan)["a"] == "holds a.b, which an earlier rule converts"


def test_of_a_step_in_one_that_nothing_can_take_the_inner_one_is_taken():
    sites = (step("a", obstacle="several residual sums"), step("a.b"))
    assert list(plan_of(rule("*", method=RD), sites=sites).methods()) == ["a.b"]


def test_a_name_that_only_starts_alike_is_not_inside():
    plan = plan_of(rule("a", method=RD), rule("*", method=DEPTHWISE), sites=(step("a"), site("ab")))
    assert list(plan.methods()) == ["a", "ab"]


def test_inside_is_told_by_any_of_the_names():
    sites = (step("a", aliases=("z",)), site("z.conv", aliases=("q.conv",)))
    assert reasons(plan_of(rule("*", method=RD), sites=sites))["z.conv"].startswith("inside a")


def test_a_step_that_would_be_dearer_is_refused_with_the_two_numbers():
    # As in a ConvMixer: the residual holds a depthwise convolution alone.
    conv = ConvSpec(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1), groups=8)
    site = Site(
        name="a", kind="step", spec=StepSpec(channels=8, convs=(conv,)), sizes=(Size(height=4, width=4),)
    )
    macs = 16 * (2 * 9 * 8 + 8 * 8)
    assert site.why_not(RD) == f"would not be cheaper: {macs:,} MACs instead of {16 * 9 * 8:,}"


class TakesStages(RdExplicit):
    """Stands in for a method that takes stage-changing blocks."""

    kinds = frozenset({"transition"})
    by_name_only = frozenset()
    obstacle: str | None = None

    def why_not(self, _spec):
        return self.obstacle

    def cost(self, _spec, _size):
        return Cost(params=1, macs=1)


STAGE = StepSpec(
    channels=32,
    in_channels=16,
    stride=(2, 2),
    convs=(site("", 16, 32).spec, site("", 32).spec),
    shortcut=(site("", 16, 32, (1, 1)).spec,),
)
CHANGING = (
    Site(name="a", kind="transition", spec=STAGE, sizes=(Size(height=8, width=8),)),
    site("a.conv1", 16, 32),
    site("a.conv2", 32),
    site("a.down", 16, 32, (1, 1), shortcut=True),
)


def test_a_stage_changing_block_is_taken_with_what_is_inside_and_its_description_is_kept():
    plan = plan_of(rule("*", method=TakesStages()), sites=CHANGING)
    assert list(plan.methods()) == ["a"]
    assert set(reasons(plan).values()) == {"inside a, which rd_explicit replaces"}
    assert plan.steps == {"a": STAGE}


@pytest.mark.parametrize("method", [TakesStages(obstacle="too narrow"), RD])
def test_what_is_inside_a_stage_changing_block_that_stays_dense_is_open_to_the_next_rule(method):
    plan = plan_of(rule("*", method=method), rule("*", method=DEPTHWISE), sites=CHANGING)
    assert list(plan.methods()) == ["a.conv2"]


def test_the_description_of_a_stage_changing_block_survives_json():
    plan = plan_of(rule("*", method=TakesStages()), sites=CHANGING)
    assert Plan(steps=plan.steps) == Plan.model_validate_json(Plan(steps=plan.steps).model_dump_json())
    assert Site.model_validate_json(CHANGING[0].model_dump_json()) == CHANGING[0]


# Banks


LONE = "no other convolution of its shape, stride, size and part in a block to share with"
BANK = (step("a"), site("a.conv1"), step("b"), site("b.conv1"), site("b.conv2"), site("wide", 32))


def test_isomorphic_convolutions_are_one_bank_and_one_without_another_stays_dense():
    plan = plan_of(rule("*", method=Shared()), sites=BANK)
    assert [group.sites for group in plan.groups] == [("a.conv1", "b.conv1", "b.conv2")]
    assert reasons(plan)["wide"] == LONE


def test_a_convolution_whose_bank_goes_with_replaced_steps_stays_dense():
    plan = plan_of(rule("b", method=RD), rule("*", method=Shared(scale=True)), sites=BANK)
    assert list(plan.methods()) == ["b"]
    assert reasons(plan)["a.conv1"] == LONE
    assert reasons(plan)["b.conv1"] == "inside b, which rd_explicit replaces"


def test_a_convolution_without_a_bank_does_not_keep_the_step_around_it():
    rules = (rule("b", method=RD), rule("?.conv?", method=Shared()), rule("a", "b", method=RD))
    with pytest.raises(RecipeError, match=r"a can't be converted by rd_explicit: holds a\.conv1"):
        plan_of(*rules, sites=BANK)  # spelled out
    plan = plan_of(*rules[:2], rule("[ab]", method=RD), sites=BANK)
    assert list(plan.methods()) == ["a", "b"]


def test_a_convolution_spelled_out_without_a_bank_is_an_error():
    with pytest.raises(RecipeError, match=f"a.conv1 can't be converted by shared: {LONE}"):
        plan_of(rule("b", method=RD), rule("a.conv1", "b.*", method=Shared()), sites=BANK)


def test_nothing_to_convert_counts_the_kinds_that_the_rules_are_about():
    sites = (step("a"), site("a.conv", kernel=(1, 1)))
    with pytest.raises(NothingToConvertError, match=r"among 1 sites: 1 x already pointwise \(1x1\);"):
        make_plan(sites, (rule("*", method=DEPTHWISE),))


# Nothing to convert


def test_nothing_to_convert_counts_the_reasons_most_frequent_first():
    sites = (*(site(f"p{i}", kernel=(1, 1)) for i in range(3)), site("stem", 3, 16))
    with pytest.raises(NothingToConvertError) as caught:
        make_plan(sites, rules_for(DEPTHWISE))
    assert str(caught.value) == (
        "nothing to convert among 4 sites: 3 x already pointwise (1x1); "
        "1 x channels change (3 to 16) and change_channels is off; `lcc inspect` lists them all"
    )


def test_nothing_to_convert_is_one_line_with_at_most_three_reasons():
    sites = tuple(site(f"c{i}", 3, 16 + i) for i in range(9))
    with pytest.raises(NothingToConvertError) as caught:
        make_plan(sites, rules_for(DEPTHWISE))
    assert (str(caught.value).count(" x "), str(caught.value).count("\n")) == (3, 0)


def test_a_network_without_convolutions_has_nothing_to_convert():
    with pytest.raises(NothingToConvertError, match=r"no nn\.Conv2d"):
        make_plan((), rules_for(DEPTHWISE))


def test_without_any_rule_nothing_is_converted():
    with pytest.raises(NothingToConvertError, match=re.escape(NO_RULE)):
        make_plan(SITES, ())


def test_nothing_to_convert_is_the_users_to_solve():
    assert NothingToConvertError.exit_code == 2


# Values


def test_a_plan_survives_json():
    plan = make_plan(SITES, (rule("layer1.0.*", method=GROUPED), rule("layer2.*", method=DEPTHWISE)))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    "made", [*SITES, *NESTED, site("twice", sizes=((8, 8), (4, 2)), aliases=("b",), norm="bn")]
)
def test_a_site_survives_json(made):
    assert Site.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("made", [rule("a", "b*"), rule("a", method=GROUPED)])
def test_a_rule_survives_json(made):
    assert Rule.model_validate_json(made.model_dump_json()) == made


def test_a_plan_in_json_names_its_method_and_hyperparameters():
    plan = make_plan(SITES, rules_for(GROUPED, include=("layer1.0.conv1",)))
    assert json.loads(plan.model_dump_json())["groups"] == [
        {
            "method": {"name": "linear_mix", "group_size": 4, "stencil": "square", "change_channels": False},
            "sites": ["layer1.0.conv1"],
        }
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"groups": [], "kept": [], "more": 1}',
        '{"groups": [{"method": {"name": "linear_mix", "size": 1}, "sites": []}]}',
        '{"groups": [{"method": {"name": "magic"}, "sites": []}]}',
        '{"groups": [{"method": "linear_mix", "sites": []}]}',
    ],
    ids=["unknown key", "unknown hyperparameter", "unknown method", "method without a table"],
)
def test_a_plan_with_something_unknown_in_it_is_refused(text):
    with pytest.raises(ValidationError):
        Plan.model_validate_json(text)


def test_a_plan_can_not_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Plan().groups = ()


def test_an_empty_plan_converts_nothing():
    assert Plan(kept=(Kept(site="a", reason="b"),)).methods() == {}


def test_methods_of_a_plan_are_listed_by_site():
    plan = Plan(
        groups=(Group(method=DEPTHWISE, sites=("a", "b")), Group(method=GROUPED, sites=("c",))),
    )
    assert plan.methods() == {"a": DEPTHWISE, "b": DEPTHWISE, "c": GROUPED}


def test_planning_twice_gives_the_same_plan():
    assert make_plan(SITES, rules_for(DEPTHWISE)) == make_plan(SITES, rules_for(DEPTHWISE))

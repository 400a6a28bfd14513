"""Rules, and the plan that they make of a list of sites."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError
from written_sites import DEPTHWISE, GROUPED, NESTED, SITES, converted, reasons, rule, site, step

from lcc.errors import NothingToConvertError, RecipeError
from lcc.methods.linear_mix import LinearMix
from lcc.plan import DENSE_BY_RULE, NO_RULE, Group, Kept, Plan, Rule, Site, make_plan, rules_for
from lcc.specs import Cost

# Which rule decides


def test_a_star_takes_all_that_the_method_can_take():
    plan = make_plan(SITES, rules_for(DEPTHWISE))
    assert list(plan.methods()) == ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv2"]


def test_the_first_rule_that_matches_decides():
    plan = make_plan(SITES, (rule("layer1.0.*", method=GROUPED), rule("*", method=DEPTHWISE)))
    assert converted(plan) == {
        "layer1.0.conv1": "linear_mix:group_size=4",
        "layer1.0.conv2": "linear_mix:group_size=4",
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


def test_a_name_that_reads_as_a_glob_matches_itself():
    plan = make_plan((site("conv[3x3]"), site("conv3")), (rule("conv[3x3]", method=DEPTHWISE),))
    assert list(plan.methods()) == ["conv[3x3]"]


def test_a_glob_that_is_no_name_matches_what_it_says():
    plan = make_plan((site("conv[1x1]"), site("conv3")), (rule("conv[3x3]", method=DEPTHWISE),))
    assert list(plan.methods()) == ["conv3"]


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


def test_a_pattern_that_is_almost_a_name_is_told_which():
    with pytest.raises(RecipeError, match=r"no site matches '.*covn1'; did you mean 'layer1\.0\.conv1'\?"):
        make_plan(SITES, (rule("layer1.0.covn1", method=DEPTHWISE),))


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


def test_nothing_to_convert_counts_the_kinds_that_the_rules_are_about():
    sites = (step("a"), site("a.conv", kernel=(1, 1)))
    with pytest.raises(NothingToConvertError, match=r"among 1 sites: 1 x already pointwise \(1x1\);"):
        make_plan(sites, (rule("*", method=DEPTHWISE),))


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

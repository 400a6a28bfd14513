"""Plans for residual steps, for stage-changing blocks, and for sites inside each other."""

from __future__ import annotations

import pytest
from written_sites import DEPTHWISE, NESTED, RD, RD_7, converted, plan_of, reasons, rule, site, step

from lcc.errors import RecipeError
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import DENSE_BY_RULE, Plan, Site, make_plan
from lcc.specs import ConvSpec, Cost, Size, StepSpec


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

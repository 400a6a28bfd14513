"""Plans for banks: which convolutions share a kernel, and which have no other to share with."""

from __future__ import annotations

import pytest
from written_sites import RD, plan_of, reasons, rule, site, step

from lcc.errors import RecipeError
from lcc.methods.shared import Shared

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

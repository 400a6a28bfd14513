"""Replacing residual steps as a whole, and plans that name steps."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hosts import (
    Block,
    TinyResNet,
    assert_same,
    conv3,
    convert_all_,
    converts,
    count_params,
    photos,
    seeded,
    state_of,
)
from torch import nn

from lcc import surgery
from lcc.errors import RecipeError
from lcc.methods import LowCostOp
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import Group, Plan, make_plan, rules_for
from lcc.surgery import find_sites, replace_
from lcc.zoo import BasicBlock

STEP = RdExplicit()


def test_a_step_is_replaced_as_a_whole():
    model = seeded(TinyResNet)
    block, x = model.layer1, photos(2)
    assert replace_(model, converts("layer1", method=STEP)) == {"layer1": block}
    assert isinstance(model.layer1, LowCostOp)
    assert model(x).shape == (2, 3)


def test_replacing_a_step_leaves_its_original_alone():
    model = seeded(TinyResNet)
    before = state_of(model.layer1)
    (original,) = replace_(model, converts("layer1", method=STEP)).values()
    assert_same(before, state_of(original))


def test_steps_and_convolutions_are_replaced_by_one_plan():
    model = seeded(TinyResNet)
    plan = Plan(
        groups=(Group(method=STEP, sites=("layer1",)), Group(method=LinearMix(), sites=("layer2.conv1",)))
    )
    assert list(replace_(model, plan)) == ["layer1", "layer2.conv1"]


def test_a_block_under_two_parents_becomes_one_operator():
    shared = Block(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    replace_(model, converts("b.0", method=STEP))
    assert isinstance(model["a"][0], LowCostOp)
    assert model["a"][0] is model["b"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operator_of_a_step_takes_over_the_dtype(dtype):
    model = seeded(TinyResNet).to(dtype)
    replace_(model, converts("layer1", method=STEP))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_operator_of_a_step_takes_over_the_device():
    model = TinyResNet().to("meta")
    replace_(model, converts("layer1", method=STEP))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("wanted", [torch.channels_last, torch.contiguous_format])
def test_the_operator_of_a_step_takes_over_the_memory_format(wanted):
    model = seeded(TinyResNet).to(memory_format=wanted)
    replace_(model, converts("layer1", method=STEP))
    x = photos(2, channels=4).contiguous(memory_format=wanted)
    assert model.layer1(x).is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_of_a_step_takes_over_the_mode(training):
    model = seeded(TinyResNet).train(not training)
    model.layer1.train(training)
    replace_(model, converts("layer1", method=STEP))
    assert {m.training for m in model.layer1.modules()} == {training}


@pytest.mark.parametrize("trained", [False, True])
def test_the_operator_of_a_step_takes_over_requires_grad(trained):
    model = seeded(TinyResNet)
    model.layer1.requires_grad_(trained)
    model.layer1.bn1.requires_grad_(requires_grad=False)
    replace_(model, converts("layer1", method=STEP))
    assert {p.requires_grad for p in model.layer1.parameters()} == {trained}


def test_the_five_steps_of_resnet18_are_replaced():
    model = torchvision.models.resnet18()
    originals = convert_all_(model, torch.randn(1, 3, 64, 64), STEP)
    assert list(originals) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    # 9 c for the stencil, c^2 for the mixing, 2 c for the norm, instead of 18 c^2 + 4 c.
    saved = sum(count * (18 * c * c + 4 * c - 9 * c - c * c - 2 * c) for count, c in WIDTHS)
    assert count_params(model) == 11_689_512 - saved


WIDTHS = ((2, 64), (1, 128), (1, 256), (1, 512))


def test_a_plan_for_a_step_and_something_inside_it_is_refused():
    plan = Plan(
        groups=(Group(method=STEP, sites=("layer1",)), Group(method=LinearMix(), sites=("layer1.conv1",)))
    )
    model = seeded(TinyResNet)
    before = state_of(model)
    with pytest.raises(RecipeError, match="'layer1' and something inside it"):
        replace_(model, plan)
    assert_same(before, state_of(model))


def test_a_plan_for_a_step_that_can_not_be_taken_says_why():
    model = torchvision.models.resnet18()
    model.layer2[1].downsample = conv3(128)
    with pytest.raises(RecipeError, match=r"'layer2\.1', but nothing can take it: its skip is no identity"):
        replace_(model, converts("layer2.1", method=STEP))


@pytest.mark.parametrize(
    ("site", "method", "kind"),
    [
        ("layer2.0", STEP, "a stage-changing block"),
        ("layer2.0", LinearMix(), "a stage-changing block"),
        ("layer2.1", LinearMix(), "a residual step"),
    ],
)
def test_a_plan_for_a_kind_of_site_that_its_method_does_not_take_says_so(site, method, kind):
    with pytest.raises(RecipeError, match=f"{method.name} takes .*, and this is {kind}"):
        replace_(torchvision.models.resnet18(), converts(site, method=method))


def test_a_plan_is_replayed_without_looking_again_at_what_a_step_is(monkeypatch):
    model = seeded(BasicBlock, 4, 4)
    holder = nn.Sequential(model)
    plan = make_plan(find_sites(holder, photos(1, channels=4)), rules_for(RdExplicit()))
    assert list(plan.steps) == ["0"]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    monkeypatch.setattr(surgery, "residual_step", None)
    replace_(holder, plan)
    assert holder[0].spec == plan.steps["0"]

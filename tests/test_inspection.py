"""What inspecting shows of convolutions, residual steps and what is inside them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hosts import TinyResNet, convert_all_, converts, seeded

from lcc.counts import count_macs, count_params
from lcc.inspection import Inspection, inspection, inspection_sheet
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import Rule, make_plan
from lcc.specs import Cost
from lcc.surgery import find_sites, replace_

X = torch.randn(1, 3, 64, 64)


def inspected(model, method, x=X, rules=None):
    sites = find_sites(model, x)
    return inspection(
        "net",
        random_weights=True,
        image_size=tuple(x.shape[2:]),
        total=Cost(params=count_params(model), macs=count_macs(model, x).macs),
        sites=sites,
        method=method,
        plan=None if rules is None else make_plan(sites, rules),
    )


def counts(value):
    return [line for line in inspection_sheet(value).notes if " of " in line and "MACs" not in line][:3]


def shown(value, site):
    rows = inspection_sheet(value).rows
    return next([cell.text for cell in row] for row in rows if row[0].text.strip() == site)


@pytest.mark.parametrize("method", [LinearMix(), RdExplicit()], ids=str)
def test_the_ceiling_is_what_converting_everything_gives(method):
    model = torchvision.models.resnet18()
    value = inspected(model, method)
    convert_all_(model, X, method)
    assert value.after == Cost(params=count_params(model), macs=count_macs(model, X).macs)


def test_the_ceiling_counts_a_step_inside_a_step_once():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torchvision.models.resnet.BasicBlock(16, 16)

        def forward(self, x):
            return x + self.inner(x)

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), Outer()).eval()
    value = inspected(model, RdExplicit())
    assert [row.site.name for row in value.rows if row.after] == ["1"]
    assert value.addressable.params == count_params(model[1])


def test_the_totals_name_each_kind():
    model = torchvision.models.resnet18()
    assert counts(inspected(model, LinearMix())) == [
        "13 of 20 convolutions can be converted",
        "5 of 5 residual steps are open to other methods: see `lcc methods`",
        "3 of 3 stage-changing blocks are open to other methods: see `lcc methods`",
    ]
    value = inspected(model, RdExplicit())
    assert "5 of 5 residual steps can be converted" in inspection_sheet(value).notes
    assert (
        "convolutions: only where a rule, or --include, spells the name out" in inspection_sheet(value).notes
    )


def test_a_plan_counts_the_kinds_that_it_converts():
    rules = (Rule(match=("layer1",), method=RdExplicit()), Rule(match=("*",), method=LinearMix()))
    value = inspected(seeded(TinyResNet).float(), LinearMix(), rules=rules)
    assert counts(value)[:2] == [
        "2 of 6 convolutions would be converted",
        "1 of 2 residual steps would be converted",
    ]


def test_what_is_inside_a_converted_step_is_indented_and_left_to_it():
    value = inspected(seeded(TinyResNet).float(), RdExplicit())
    names = [row[0].text for row in inspection_sheet(value).rows]
    assert names[:4] == ["stem", "layer1", "  layer1.conv1", "  layer1.conv2"]
    assert shown(value, "layer1")[-1] == "rd_explicit"
    assert shown(value, "layer1.conv1")[-1] == ""


def test_a_block_that_nothing_can_take_shows_why_and_no_cost():
    model = torchvision.models.resnet18()
    model.layer2[0].bn1 = torch.nn.Sequential(model.layer2[0].bn1, torch.nn.PReLU())
    cells = shown(inspected(model, RdExplicit()), "layer2.0")
    reason = (
        "dense: its skip is no identity: Conv2d, BatchNorm2d; holds a PReLU, for which a step has no word"
    )
    assert cells[3:] == ["—", "—", "—", reason]


def test_a_stage_changing_block_shows_its_cost_and_holds_its_convolutions():
    model = torchvision.models.resnet18()
    value = inspected(model, LinearMix())
    params, macs = 64 * 128 * 9 + 128 * 128 * 9 + 64 * 128 + 6 * 128, (64 * 9 + 128 * 9 + 64) * 128 * 64
    (row,) = (row for row in value.rows if row.site.name == "layer2.0")
    assert row.before == Cost(params=params, macs=macs)
    assert shown(value, "layer2.0")[1:] == [
        *("transition 64->128 /2: 3x3 128, 3x3 128", "16x16", "230k", "14.7M"),
        *(f"{macs / value.before.macs:.1%}", ""),
    ]
    depths = {row.site.name: row.depth for row in value.rows if row.site.name.startswith("layer2.0")}
    assert depths == {"layer2.0": 0, "layer2.0.conv1": 1, "layer2.0.conv2": 1, "layer2.0.downsample.0": 1}


def test_a_stage_changing_block_says_which_methods_do_not_take_it():
    rules = (Rule(match=("layer2.0.conv2",)), Rule(match=("*",), method=LinearMix()))
    value = inspected(torchvision.models.resnet18(), LinearMix(), rules=rules)
    reason = "linear_mix takes convolutions, and this is a stage-changing block"
    assert shown(value, "layer2.0")[-1] == f"dense: {reason}"


def test_a_block_kept_around_what_is_converted_says_so():
    rules = (Rule(match=("layer1.0.conv1", "layer1.1.*"), method=LinearMix()),)
    value = inspected(torchvision.models.resnet18(), LinearMix(), rules=rules)
    assert shown(value, "layer1.0")[-1] == "not as a whole: 1 site inside"
    assert shown(value, "layer1.1")[-1] == "not as a whole: 2 sites inside"
    assert shown(value, "layer2.0")[-1] == "dense: named by no rule (or --include)"
    assert f"with them converted: {value.after.macs:,} MACs" in "".join(inspection_sheet(value).notes)


def test_a_converted_step_shows_what_its_operator_costs():
    model = seeded(TinyResNet).float()
    replace_(model, converts("layer1", method=RdExplicit()))
    row = next(
        row
        for row in inspection(
            "net",
            random_weights=True,
            image_size=(64, 64),
            total=Cost(params=1, macs=1),
            sites=find_sites(model, X),
            method=LinearMix(),
            done={"layer1": RdExplicit()},
        ).rows
        if row.site.name == "layer1"
    )
    assert row.before.params == count_params(model.layer1)


def test_an_inspection_survives_json():
    value = inspected(seeded(TinyResNet).float(), RdExplicit())
    assert Inspection.model_validate_json(value.model_dump_json()) == value

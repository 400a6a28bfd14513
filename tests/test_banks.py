"""Which convolutions become a bank, how banks are split, and what that makes of published networks."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import Block, conv3, photos, seeded
from torch import nn

from lcc.banks import ALONE, settle_banks_
from lcc.calibrate import project_
from lcc.conversion import planned
from lcc.counts import count_params
from lcc.errors import NothingToConvertError
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.network import layer_rows, open_network
from lcc.plan import Group, Plan, Rule, Site, decide, make_plan, rules_for
from lcc.recipe import ModelPart
from lcc.settings import Settings
from lcc.specs import ConvSpec, Size
from lcc.surgery import find_sites, replace_
from lcc.zoo import ZOO

SPEC = ConvSpec(in_channels=64, out_channels=64, kernel_size=(3, 3), padding=(1, 1))
SIZE = Size(height=8, width=8)
QUIET = Settings(device="cpu", say=lambda _: None)
SHARED = rules_for(Shared())
LONE = "no other convolution of its shape, stride, size and part in a block to share with"


def site(name, spec=SPEC, **options):
    return Site(name=name, spec=spec, **{"sizes": (SIZE,), **options})


# Isomorphic


@pytest.mark.parametrize(
    "other",
    [
        site("c", SPEC.model_copy(update={"in_channels": 32})),
        site("c", SPEC.model_copy(update={"stride": (2, 2)})),
        site("c", SPEC.model_copy(update={"groups": 2})),
        site("c", SPEC.model_copy(update={"dilation": (2, 2), "padding": (2, 2)})),
        site("c", SPEC.model_copy(update={"bias": True})),
        site("c", sizes=(Size(height=4, width=4),)),
        site("c", shortcut=True),
    ],
    ids=("shape", "stride", "groups", "dilation", "bias", "stage", "shortcut"),
)
def test_what_differs_from_the_others_is_no_part_of_their_bank(other):
    plan = decide((site("a"), site("b", norm="bn"), other), SHARED)
    assert [group.sites for group in plan.groups] == [("a", "b")]
    assert [(kept.site, kept.reason) for kept in plan.kept] == [("c", LONE)]


def test_rules_with_other_options_make_banks_of_their_own():
    sites = tuple(site(f"{part}{number}") for part in "ab" for number in range(2))
    rules = (Rule(match=("a*",), method=Shared()), Rule(match=("b*",), method=Shared(scale=True)))
    assert [group.sites for group in decide(sites, rules).groups] == [("a0", "a1"), ("b0", "b1")]


def test_what_a_bank_has_in_common_counts_for_its_first_site_alone():
    sites = tuple(site(name) for name in "abc")
    plan = decide(sites, rules_for(Shared(scale=True)))
    costs = [s.cost_with(Shared(scale=True), first=plan.is_first(s.name)) for s in sites]
    assert [cost.params for cost in costs] == [64 * 64 * 9 + 64, 64, 64]
    assert [cost.macs for cost in costs] == [64 * 64 * 9 * 64] * 3


def test_a_bank_of_an_operator_that_costs_more_than_its_sites_stays_dense():
    tiny = ConvSpec(in_channels=1, out_channels=1, kernel_size=(1, 1))
    plan = decide((site("a", tiny), site("b", tiny)), rules_for(Shared(scale=True)))
    assert [kept.reason for kept in plan.kept] == ["would not be cheaper: 3 parameters instead of 2"] * 2


# Several kernels


class Row(nn.Module):
    """Convolutions in a row, the kernels of those with one letter being nearly the same."""

    def __init__(self, letters):
        super().__init__()
        torch.manual_seed(0)
        kinds = {letter: torch.randn(4, 4, 3, 3) for letter in sorted(set(letters))}
        self.convs = nn.Sequential(*(conv3(4) for _ in letters))
        for number, (conv, letter) in enumerate(zip(self.convs, letters, strict=True)):
            noisy = kinds[letter] + 0.05 * torch.randn(4, 4, 3, 3)
            conv.weight.data = noisy * (number + 1)  # their size says nothing

    def forward(self, x):
        return self.convs(x)


def settled(model, method):
    example = photos(1, 8, 4)
    sites = find_sites(model, example)
    return settle_banks_(model, sites, make_plan(sites, rules_for(method)), example)[0]


def test_a_bank_with_several_kernels_is_split_by_how_alike_they_are_whatever_their_size():
    plan = settled(seeded(lambda: Row("abaab")), Shared(kernels=2, align=False))
    assert [group.sites for group in plan.groups] == [
        ("convs.0", "convs.2", "convs.3"),
        ("convs.1", "convs.4"),
    ]
    assert plan.kept == ()


def test_what_is_alone_with_its_kernel_stays_dense_and_that_is_said():
    plan = settled(seeded(lambda: Row("aacab")), Shared(kernels=3, align=False))
    assert [group.sites for group in plan.groups] == [("convs.0", "convs.1", "convs.3")]
    assert [(kept.site, kept.reason) for kept in plan.kept] == [("convs.2", ALONE), ("convs.4", ALONE)]


def test_as_many_kernels_as_sites_leave_nothing_to_convert():
    with pytest.raises(NothingToConvertError, match="every site would have a kernel of its own"):
        settled(seeded(lambda: Row("abc")), Shared(kernels=3, align=False))


@pytest.mark.parametrize(("align", "kernels"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_settling_leaves_the_function_of_the_network_as_it_was(align, kernels):
    model, x = seeded(lambda: nn.Sequential(*(Block(4) for _ in range(3)))), photos(2, 8, 4)
    with torch.no_grad():
        wanted, before = model(x), copy.deepcopy(model.state_dict())
        settled(model, Shared(align=align, kernels=kernels))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-10)
    moved = any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert moved == align


def test_banks_of_other_methods_stay_as_they_are():
    model = seeded(lambda: Row("abc"))
    plan = Plan(groups=(Group(method=LinearMix(), sites=("convs.0", "convs.1")),))
    example = photos(1, 8, 4)
    assert settle_banks_(model, find_sites(model, example), plan, example) == (plan, None)


# Published networks


def converted(source, size, method, **options):
    """Return the sites, the plan, and the converted network, whose weights stay as they were drawn."""
    part = ModelPart(source=source, weights="none", image_size=(size, size), **options)
    sites, model, plan = planned(open_network(part), rules_for(method), QUIET)
    replace_(model, plan)
    return sites, plan, model


# arXiv:2210.14151 gives ConvMixer and SE-ResNet; the others follow from their shapes.
@pytest.mark.parametrize(
    ("source", "size", "classes", "count", "banks"),
    [
        ("torchvision:resnet18", 64, None, 5_385_768, [4, 3, 3, 3]),
        ("torchvision:resnet34", 64, None, 5_393_192, [6, 7, 11, 5]),
        ("zoo:convmixer_256_16", 16, 10, 107_274, [16, 16]),
        ("zoo:convmixer_256_16", 16, 100, 130_404, [16, 16]),
    ],
)
def test_a_network_with_every_stage_shared_has_as_many_parameters_as_published(
    source, size, classes, count, banks
):
    sites, plan, model = converted(source, size, Shared(align=False), num_classes=classes)
    assert [len(group.sites) for group in plan.groups] == banks
    assert count_params(model) == count
    assert_rows_add_up(sites, plan, model)


def assert_rows_add_up(sites, plan, model):
    """Check that the rows of a report, and what is outside of them, make the network."""
    methods = plan.methods()
    rows = layer_rows(sites, plan, {})
    outside = [
        parameter
        for name, module in model.named_modules()
        if not any(name == site or name.startswith(f"{site}.") for site in methods)
        for parameter in module.parameters(recurse=False)
    ]
    rest = sum(parameter.numel() for parameter in outside)
    assert rest + sum(row.after.params for row in rows) == count_params(model)


def test_resnet50_keeps_the_shortcut_of_its_first_stage_out_of_the_bank_of_its_shape():
    sites, plan, model = converted("torchvision:resnet50", 64, Shared(align=False))
    assert count_params(model) == 14_587_944
    (bank,) = [group.sites for group in plan.groups if "layer1.0.conv3" in group.sites]
    assert bank == ("layer1.0.conv3", "layer1.1.conv3", "layer1.2.conv3")
    by_name = {entry.name: entry for entry in sites}
    shortcut = by_name["layer1.0.downsample.0"]
    assert shortcut.spec == by_name["layer1.0.conv3"].spec
    assert {kept.site: kept.reason for kept in plan.kept}[shortcut.name] == LONE
    assert_rows_add_up(sites, plan, model)


@pytest.mark.parametrize(
    ("blocks", "rules", "suffix"),
    [
        (2, ("*",), "_shared"),
        (3, ("*",), "_shared"),
        (2, ("layer2.*", "layer3.*"), "_shared_23"),
    ],
)
def test_a_converted_se_resnet_is_the_shared_one_of_the_paper(blocks, rules, suffix):
    dense = ZOO[f"se_resnet_d{blocks}"]().eval()
    sites = find_sites(dense, torch.zeros(1, 3, 32, 32))
    model = copy.deepcopy(dense)
    plan = make_plan(sites, (Rule(match=rules, method=Shared()),))
    project_(model, replace_(model, plan))
    paper = ZOO[f"se_resnet_d{blocks}{suffix}"]().eval()
    assert count_params(model) == count_params(paper)
    state = {name.replace(".kernel.weight", ".weight"): value for name, value in model.state_dict().items()}
    paper.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), paper(x))
    assert {name.replace(".kernel.weight", ".weight") for names in ties(model) for name in names} == {
        name for names in ties(paper) for name in names
    }


def ties(model):
    """Return the names of every parameter that has several."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [found for found in names.values() if len(found) > 1]

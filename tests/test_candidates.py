"""What can be chosen, and what it would save, against the sites' own counts and the networks converted."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
from cases import BLOCKS, CASES, STEPS, conv
from hosts import TinyResNet, photos, seeded

from lcc.budget import Option
from lcc.candidates import BYTES, obstacles, options_for, worthwhile
from lcc.counts import count_macs, count_params
from lcc.method_text import method_from_text
from lcc.methods import METHODS, parse_method
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.plan import Rule, make_plan
from lcc.specs import ConvSpec, Size
from lcc.surgery import find_sites, replace_

MODEL = seeded(TinyResNet)
EXAMPLE = photos(1, size=8)
SITES = find_sites(MODEL, EXAMPLE)
BY_NAME = {site.name: site for site in SITES}
EVERY = options_for(SITES, list(METHODS.values()))
CONVS = ("layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2")


def taken(options, method=None):
    return [option.sites for option in options if method is None or option.method == method]


def option(method, *sites, **saved):
    return Option(
        method=method, sites=sites, covers=sites, saved={"params": 0, "macs": 0, "size": 0, **saved}
    )


@pytest.mark.parametrize("found", [o for o in EVERY if len(o.sites) == 1], ids=lambda o: f"{o.method}")
def test_an_option_saves_the_difference_of_the_costs_of_its_site(found):
    (site,) = (BY_NAME[name] for name in found.sites)
    before, after = site.cost(), site.cost_with(found.method)
    assert found.saved["params"] == before.params - after.params
    assert found.saved["macs"] == before.macs - after.macs
    assert found.error == 0


@pytest.mark.parametrize("found", EVERY, ids=lambda o: f"{o.method}-{o.sites[0]}")
def test_a_network_with_one_option_is_smaller_by_what_it_saves(found):
    model = copy.deepcopy(MODEL)
    replace_(model, make_plan(SITES, (Rule(match=found.sites, method=found.method),)))
    assert count_params(MODEL) - count_params(model) == found.saved["params"]
    assert count_macs(MODEL, EXAMPLE).macs - count_macs(model, EXAMPLE).macs == found.saved["macs"]
    assert stored(copy.deepcopy(MODEL).float()) - stored(model.float()) == found.saved["size"]


def stored(model):
    """The bytes of a file's tensors: each once, buffers too."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def test_every_family_has_a_part_in_the_options():
    methods = {type(found.method) for found in options_for(SITES, [Mgic(group_size=2, coarsest=2)])}
    assert methods | {type(found.method) for found in EVERY} == set(METHODS.values())


def test_the_levels_of_multigrid_are_varied_too():
    conv = ConvSpec(in_channels=64, out_channels=64, kernel_size=(3, 3), padding=(1, 1))
    tried = {(member.group_size, len(member.conv_levels(conv))) for member in Mgic.family(conv)}
    assert len({levels for _, levels in tried}) > 1
    assert len({size for size, _ in tried}) > 1


@pytest.mark.parametrize("channels", [48, 128, 256, 512])
def test_options_get_cheaper_in_steps_of_at_most_two_and_a_half_however_wide_a_convolution_is(channels):
    spec, size = conv(channels, padding=(1, 1)), Size(height=8, width=8)
    able = [member for member in LinearMix.family(spec) if member.why_not(spec) is None]
    costs = sorted({spec.cost(size).macs, *(member.cost(spec, size).macs for member in able)})
    assert all(after / before < 2.5 for before, after in pairwise(costs) if after < spec.cost(size).macs)
    assert costs[-1] / costs[costs.index(spec.cost(size).macs) - 1] < 2.5


def test_multigrid_convolutions_of_a_family_may_change_channels():
    spec = conv(128, padding=(1, 1), out=256, stride=(2, 2))
    assert any(member.why_not(spec) is None for member in Mgic.family(spec))


def test_an_option_for_a_convolution_settles_it_and_one_for_a_step_what_is_inside():
    covers = {found.sites: set(found.covers) for found in EVERY}
    assert covers["layer1.conv1",] == {"layer1.conv1"}
    assert covers["layer2",] == {"layer2", "layer2.conv1", "layer2.conv2"}
    assert covers["layer1.conv1", "layer1.conv2"] == {"layer1.conv1", "layer1.conv2"}


def test_a_method_that_shares_takes_whole_banks():
    assert taken(EVERY, Shared(align=False)) == [CONVS[:2], CONVS[2:]]
    kernel = BY_NAME["layer2.conv1"].cost().params
    (_, bank) = (found for found in EVERY if found.method == Shared(align=False, scale=True))
    assert bank.saved == {"params": kernel - 2 * 8, "macs": 0, "size": BYTES * (kernel - 2 * 8)}


def test_a_bank_of_one_is_no_option():
    assert options_for(SITES, [Shared], include=("layer1.conv1", "down")) == []
    assert taken(options_for(SITES, [Shared()], exclude=("*.conv2",))) == []


def test_a_method_stands_for_itself_and_its_class_for_the_family():
    assert taken(options_for(SITES, [LinearMix(group_size=2)])) == [(name,) for name in CONVS]
    sizes = {found.method.group_size for found in options_for(SITES, [LinearMix])}
    assert sizes == {1, 2, 4, 8}


def test_a_method_named_twice_has_no_option_twice():
    found = options_for(SITES, [LinearMix, LinearMix(group_size=2), LinearMix])
    assert len({(o.method, o.sites) for o in found}) == len(found)
    banks = options_for(SITES, [Shared, Shared(align=False)])
    assert taken(banks, Shared(align=False)) == [CONVS[:2], CONVS[2:]]


def test_the_family_may_change_channels_and_the_method_alone_may_not():
    assert ("down",) in taken(options_for(SITES, [LinearMix]))
    assert ("down",) not in taken(options_for(SITES, [LinearMix()]))


def test_a_step_is_taken_by_a_step_method_and_a_convolution_is_not():
    assert taken(options_for(SITES, [RdExplicit])) == [("layer1",), ("layer2",)]
    assert taken(options_for(SITES, [RdExplicit()])) == [("layer1",), ("layer2",)]


@pytest.mark.parametrize(
    ("globs", "sites"),
    [
        ({}, CONVS),
        ({"include": ("layer1.*",)}, CONVS[:2]),
        ({"include": ("layer1.*", "*.conv2")}, (*CONVS[:2], CONVS[3])),
        ({"exclude": ("layer1.*",)}, CONVS[2:]),
        ({"include": ("*.conv1",), "exclude": ("layer2.*",)}, CONVS[:1]),
        ({"include": ("nothing",)}, ()),
    ],
    ids=str,
)
def test_globs_say_which_sites_are_free(globs, sites):
    assert taken(options_for(SITES, [Circulant], **globs)) == [(name,) for name in sites]


def test_a_block_stays_around_what_is_excluded_inside_it():
    options = options_for(SITES, [RdExplicit()], exclude=("layer1.conv2",))
    assert taken(options) == [("layer2",)]
    assert ("layer1",) in taken(options_for(SITES, [RdExplicit()]))
    why = obstacles(SITES, [RdExplicit()], include=("layer*",), exclude=("*.conv2",))
    assert "2 x holds what --exclude names" in why


def test_a_site_that_is_never_called_is_no_option():
    silent = tuple(site.model_copy(update={"sizes": ()}) for site in SITES)
    assert options_for(silent, list(METHODS.values())) == []


def test_what_would_not_be_cheaper_is_no_option():
    assert all(found.saved["macs"] >= 0 and found.saved["params"] >= 0 for found in EVERY)
    narrow = {found.method for found in EVERY if found.sites == ("layer1.conv1",)}
    assert LinearMix(group_size=2) in narrow
    assert LinearMix(group_size=4) not in narrow  # that is the dense convolution


# What is worth trying


def test_what_saves_nothing_of_what_is_asked_is_left_out():
    mix = option(LinearMix(), "a", macs=9, params=3)
    bank = option(Shared(), "a", "b", macs=0, params=5, size=20)
    assert worthwhile([mix, bank], ["macs"]) == [mix]
    assert worthwhile([mix, bank], ["params"]) == [mix, bank]
    assert worthwhile([mix, bank], ["macs", "size"]) == [mix, bank]


def test_of_a_family_that_saves_as_much_the_one_with_most_parameters_stays():
    cross = option(LinearMix(group_size=4, stencil="cross"), "a", macs=8, params=7)
    square = option(LinearMix(group_size=4), "a", macs=8, params=4)
    for order in ([cross, square], [square, cross]):
        assert worthwhile(order, ["macs"]) == [square]
        assert set(methods_of_all(worthwhile(order, ["macs", "params"]))) == {cross.method, square.method}


def test_of_a_family_that_is_equal_in_all_costs_every_member_stays():
    equals = [
        option(LinearMix(group_size=8, stencil=stencil), "a", macs=8, params=4)
        for stencil in ("horizontal", "vertical")
    ]
    assert worthwhile(equals, ["macs"]) == equals
    better = option(LinearMix(group_size=2), "a", macs=8, params=3)
    assert worthwhile([*equals, better], ["macs"]) == [better]


def methods_of_all(options):
    return [found.method for found in options]


def test_equals_of_other_families_and_on_other_sites_stay():
    alike = [
        option(LinearMix(), "a", macs=8, params=4),
        option(Circulant(), "a", macs=8, params=9),
        option(LinearMix(), "b", macs=8, params=4),
    ]
    assert worthwhile(alike, ["macs"]) == alike


def test_for_a_latency_what_is_not_faster_is_left_out():
    fast, slow = (
        option(LinearMix(group_size=size), "a", macs=size, params=1, latency=ms)
        for size, ms in ((1, 0.1), (2, -0.1))
    )
    assert worthwhile([fast, slow], ["latency"]) == [fast]


# Families

WIDE = (conv(64, padding=(1, 1)), conv(32, padding=(1, 1), out=64, stride=(2, 2)))
SPECS = {"conv": WIDE, "step": STEPS, "transition": tuple(s for s in BLOCKS if s.is_transition)}


@pytest.mark.parametrize("name", METHODS)
def test_every_member_of_a_family_is_a_valid_method(name):
    for kind in METHODS[name].kinds:
        for spec in SPECS[kind]:
            members = METHODS[name].family(spec)
            assert len(set(members)) == len(members) > 0
            for member in members:
                assert parse_method(member.model_dump(mode="json")) == member
                assert method_from_text(str(member)) == member


@pytest.mark.parametrize("name", METHODS)
def test_every_member_of_a_family_can_take_something(name):
    specs = [case.spec for case in CASES[name]] + [*WIDE, *STEPS]
    specs += [conv(256, padding=(1, 1)), conv(128, padding=(1, 1), out=256)]
    members = {member for spec in specs for member in family_of(METHODS[name], spec)}
    able = {member for member in members if any(can_take(member, spec) for spec in specs)}
    assert able == members


def family_of(kind, spec):
    wanted = "conv" if isinstance(spec, ConvSpec) else "transition" if spec.is_transition else "step"
    return kind.family(spec) if wanted in kind.kinds else ()


def can_take(method, spec):
    return member_fits(method, spec) and method.cost(spec, Size(height=8, width=8)).macs > 0


def member_fits(method, spec):
    wanted = "conv" if isinstance(spec, ConvSpec) else "transition" if spec.is_transition else "step"
    return wanted in method.kinds and method.why_not(spec) is None


@pytest.mark.parametrize("name", METHODS)
def test_a_family_is_the_same_each_time(name):
    spec = next(case.spec for case in CASES[name])
    assert METHODS[name].family(spec) == METHODS[name].family(spec)

"""Inner channels in the order that suits channel groups: what is gained, and that nothing changes."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision
from hosts import Block, conv3, photos, seeded
from planning_setting import FORM, SETTINGS, counted_passes, few_images, network, planned  # noqa: F401  # fixtures
from pydantic import ValidationError
from scipy.stats import spearmanr
from torch import nn

from lcc.conversion import convert_network
from lcc.errors import RecipeError, TrainingError
from lcc.features import distance, watched
from lcc.grouping import group_, group_for_, kept_pairs
from lcc.inner_channels import InnerPair, inner_pairs, reorder_
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.plan import Plan, chained, rules_for
from lcc.planning import plan_within
from lcc.recipe import Budget, Calibrate, Finetune
from lcc.surgery import find_sites
from lcc.teachers import in_order_of
from lcc.tuning import train_network
from lcc.zoo import ZOO

PAIR = InnerPair("conv1", "bn1", "conv2")


def everywhere(sites, *methods):
    return {site.name: methods for site in sites}


def kept_slowly(model, groups):
    """Return which share of the energy of PAIR's taps around the centres lies inside `groups` groups."""
    w1, w2 = (model.get_parameter(f"{name}.weight").detach().numpy() ** 2 for name in PAIR[::2])
    scale = model.bn1.weight.detach().numpy() ** 2
    inside = outside = 0.0
    own = w1.sum(axis=(1, 2, 3))
    adds = [scale[m] * w2[:, m].sum() for m in range(len(scale))]
    totals = (sum(adds), sum(adds))  # of the first, its channels counted by what they add to the second's
    width = len(scale) // groups
    for o, i, y, x in itertools.product(*map(range, w1.shape)):
        if (y, x) == (1, 1):
            continue
        first = w1[o, i, y, x] / own[o] * adds[o] / totals[0]
        second = w2[o, i, y, x] * scale[i] / totals[1]
        if o // width == i // width:
            inside += first + second
        else:
            outside += first + second
    return inside / (inside + outside)


def in_groups_(model, groups):
    """Drop the taps around the centres between channels of different groups: what LinearMix computes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == module.out_channels:
            place = torch.arange(module.in_channels) // (module.in_channels // groups)
            apart = (place[:, None] != place).double()[:, :, None, None]
            centre = torch.zeros(3, 3, dtype=torch.float64)
            centre[1, 1] = 1
            with torch.no_grad():
                module.weight.mul_(1 - apart * (1 - centre))


def shuffled_(model, size, channels=3):
    """Put the inner channels into random orders; return the sites."""
    example = photos(1, size, channels).to(next(model.parameters()).dtype)
    sites = find_sites(model, example)
    rng = np.random.default_rng(0)
    for pair in inner_pairs(model, sites, example):
        width = len(model.get_parameter(f"{pair.first}.weight"))
        reorder_(model, pair, torch.from_numpy(rng.permutation(width)))
    return sites


def grouped_network(groups=2):
    """A trained network, so to speak, that LinearMix could replace without loss if channels were in order."""
    one = network()
    with torch.no_grad():
        in_groups_(one.loaded.model.double(), groups)
    shuffled_(one.loaded.model.float(), 8)
    return one


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (ZOO["cifar_resnet20"], 16),
        (lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1]), 32),
        (lambda: torchvision.models.vgg.make_layers([8, 8, "M", 8, 8]), 16),
    ],
    ids=["resnet20", "bottlenecks", "vgg"],
)
def test_a_network_computes_the_same_and_keeps_more_in_its_groups(make, size):
    model = seeded(make)
    images = photos(2, size)
    sites = find_sites(model, images[:1])
    with torch.no_grad():
        before = model(images)
        found = group_for_(model, sites, everywhere(sites, LinearMix(group_size=2)), images[:1])
        after = model(images)
    assert len(found.orders) >= 2
    assert found.after > 1.05 * found.before
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9 * float(before.abs().max()))
    again = group_for_(model, sites, everywhere(sites, LinearMix(group_size=2)), images[:1])
    assert again.before == pytest.approx(found.after, rel=1e-9)
    assert again.orders == {}


@pytest.mark.parametrize("groups", [2, 4])
def test_the_order_is_the_best_of_all_and_the_shares_are_right(groups):
    method = LinearMix(group_size=4 // groups)
    shares = []
    for order in itertools.permutations(range(4)):
        model = seeded(lambda: Block(4))
        reorder_(model, PAIR, torch.tensor(order))
        shares.append(kept_slowly(model, groups))
    model = seeded(lambda: Block(4))
    sites = find_sites(model, photos(1, 8, 4))
    found = group_for_(model, sites, everywhere(sites, method), photos(1, 8, 4))
    assert found.before == pytest.approx(shares[0], rel=1e-9)
    assert found.after == pytest.approx(max(shares), rel=1e-9)
    assert kept_slowly(model, groups) == pytest.approx(max(shares), rel=1e-9)


def test_the_orders_say_which_output_is_where():
    model, before = (seeded(lambda: Block(6)) for _ in range(2))
    x = photos(1, 8, 6)
    sites = find_sites(model, x)
    ((name, order),) = group_for_(model, sites, everywhere(sites, LinearMix()), x).orders.items()
    assert name == "conv1"
    torch.testing.assert_close(model.conv1(x), before.conv1(x)[:, list(order)], rtol=0, atol=1e-12)


def test_methods_that_may_take_a_site_count_on_average():
    (site,) = find_sites(seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))), photos(1, 8, 4))
    methods = (LinearMix(), LinearMix(group_size=2), Circulant())
    kept = kept_pairs([site], {site.name: methods})[site.name]
    assert kept.tolist() == [[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]]
    assert kept_pairs([site], {site.name: (Circulant(),)}) == {}
    assert kept_pairs([site], {}) == {}


def test_channels_of_kernels_to_be_shared_stay():
    model = seeded(lambda: nn.Sequential(Block(6), Block(6)))
    sites = find_sites(model, photos(1, 8, 6))
    methods = everywhere(sites, LinearMix()) | {"0.conv2": (Shared(),)}
    assert list(group_for_(model, sites, methods, photos(1, 8, 6)).orders) == ["1.conv1"]


def test_kernels_of_zeros_are_no_obstacle():
    model = seeded(lambda: Block(4))
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.conv2.weight.zero_()
    sites = find_sites(model, photos(1, 8, 4))
    assert group_(model, [PAIR], kept_pairs(sites, everywhere(sites, LinearMix()))) == (1.0, 1.0, {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_stay_where_they_are(value):
    model = seeded(lambda: nn.Sequential(conv3(4), nn.ReLU(), conv3(4)))
    sites = find_sites(model, photos(1, 8, 4))
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = value
    pair = InnerPair("0", None, "2")
    assert group_(model, [pair], kept_pairs(sites, everywhere(sites, LinearMix()))) == (1.0, 1.0, {})
    assert group_for_(model, sites, everywhere(sites, LinearMix()), photos(1, 8, 4)).orders == {}


def test_within_a_group_channels_stay_in_their_order_since_rounding_would_decide_otherwise():
    model = seeded(lambda: Block(16))
    x = photos(1, 8, 16)
    sites = find_sites(model, x)
    order = group_for_(model, sites, everywhere(sites, LinearMix(group_size=4)), x).orders["conv1"]
    groups = [order[start : start + 4] for start in range(0, 16, 4)]
    assert [list(group) for group in groups] == [sorted(group) for group in groups]


# Conversion and planning


def test_what_is_in_groups_but_for_its_order_is_converted_without_loss(tmp_path):
    one, said = grouped_network(), []
    rules = rules_for(LinearMix(group_size=2), include=("layer1.*",))
    settings = replace(SETTINGS, say=said.append)
    _, converted = convert_network(one, rules, None, settings, fits=tmp_path / "fits")
    x = photos(4, 8).float()
    with torch.no_grad():
        torch.testing.assert_close(converted.loaded.model(x), one.loaded.model(x), rtol=0, atol=1e-5)
    assert list(converted.plan.orders) == ["layer1.conv1"]
    assert sum("groups hold 100.0% of the kernels' energy" in line for line in said) == 1


def test_errors_are_predicted_for_the_network_in_order(data):
    one = grouped_network()
    method = "linear_mix:group_size=2"
    report = planned(data, "macs=90%", original=one, methods=(method,), include=("layer1.*",)).report
    unshuffled = network()
    in_groups_(unshuffled.loaded.model.double(), 2)
    unshuffled.loaded.model.float()
    wanted = planned(data, "macs=90%", original=unshuffled, methods=(method,), include=("layer1.*",)).report
    assert report.error == pytest.approx(wanted.error, abs=1e-6)
    assert report.error < 1e-6


def alike_network():
    """Blocks of one kernel, each with norms of its own: to share it loses nothing while channels stay."""

    def make():
        blocks = [Block(8) for _ in range(3)]
        for block in blocks:
            block.conv1.weight = nn.Parameter(blocks[0].conv1.weight.clone())
        return nn.Sequential(conv3(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    one = network()
    return one.but(loaded=replace(one.loaded, model=seeded(make).float()))


def test_kernels_to_be_shared_are_priced_in_the_order_in_which_they_are_converted(data):
    options = {"original": alike_network(), "include": ("*.conv1",)}
    alone = planned(data, "params=90%", methods=("shared",), **options).report
    both = planned(data, "params=90%", methods=("linear_mix", "shared"), **options).report
    assert [part.method for part in both.parts] == [part.method for part in alone.parts]
    assert both.error == pytest.approx(alone.error, abs=1e-9)
    assert alone.error < 1e-9


def test_errors_are_not_found_out_again_for_another_quantity_or_without_some_sites(data, passes):
    methods = {"methods": ("linear_mix", "circulant")}
    planned(data, "macs=80%", "params=80%", **methods)
    planned(data, "params=80%", **methods)
    planned(data, "macs=80%", exclude=("layer1.conv1",), **methods)
    assert len(passes) == 1


def test_errors_are_checked_where_they_were_predicted(data, monkeypatch):
    compared = []

    def noted(predicted, true):
        compared.extend(zip(predicted, true, strict=True))
        return spearmanr(predicted, true)

    monkeypatch.setattr(scipy.stats, "spearmanr", noted)
    budget = Budget(targets=("macs=90%",), methods=("linear_mix:group_size=2",), include=("layer1.*",))
    plan_within(grouped_network(), budget, Calibrate(data=data, images=12), SETTINGS, check_errors=True)
    assert len(compared) == 2
    assert all(max(pair) < 1e-12 for pair in compared)


def test_random_weights_stay_where_they_are(tmp_path):
    one = grouped_network()
    source = one.loaded.source.model_copy(update={"weights": "none"})
    one = one.but(loaded=replace(one.loaded, source=source))
    assert one.is_random
    rules = rules_for(LinearMix(group_size=2))
    _, converted = convert_network(one, rules, None, SETTINGS, fits=tmp_path / "fits")
    assert converted.plan.orders == {}


def test_orders_follow_one_another():
    first, then = {"a": (2, 0, 1), "b": (1, 0)}, {"a": (1, 2, 0), "c": (0, 2, 1)}
    assert chained(first, then) == {"b": (1, 0), "c": (0, 2, 1)}
    assert Plan(orders=first).then(Plan(orders=then)).orders == chained(first, then)
    assert Plan.model_validate_json(Plan(orders=first).model_dump_json()).orders == first
    assert Plan(orders={"a": (1, 0)}).then(Plan(orders={"a": (1, 0)})).orders == {}


@pytest.mark.parametrize("order", [(0, 0), (0, 2), (1, 2)])
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ValidationError, match="a: not an order of 2 channels"):
        Plan(orders={"a": order})


# Features of a teacher


def converted_and_teacher(tmp_path):
    one = grouped_network()
    rules = rules_for(LinearMix(group_size=2), include=("layer1.*",))
    return convert_network(one, rules, None, SETTINGS, fits=tmp_path / "fits")[1], one


def features_apart(student, teacher):
    x, names = photos(8, 8).float(), tuple(student.plan.methods())
    with torch.no_grad(), watched(student.loaded.model, names) as own:
        student.loaded.model(x)
    with torch.no_grad(), watched(teacher.loaded.model, names) as theirs:
        teacher.loaded.model(x)
    return float(distance(own, theirs))


def test_the_teachers_channels_are_put_into_the_students_order(tmp_path):
    student, teacher = converted_and_teacher(tmp_path)
    assert features_apart(student, teacher) > 0.1
    ordered = in_order_of(teacher, student)
    assert in_order_of(ordered, student) is ordered
    assert features_apart(student, ordered) < 1e-6
    x = photos(2, 8).float()
    with torch.no_grad():
        wanted = teacher.loaded.model(x)
        torch.testing.assert_close(ordered.loaded.model(x), wanted, rtol=0, atol=1e-5)


def test_a_teacher_that_is_in_order_stays_and_one_that_cant_be_is_refused(tmp_path):
    student, teacher = converted_and_teacher(tmp_path)
    assert in_order_of(student, student) is student
    assert in_order_of(teacher, teacher) is teacher
    rules = rules_for(LinearMix(group_size=1), include=("layer1.conv1",))
    _, other = convert_network(teacher, rules, None, SETTINGS, fits=tmp_path / "fits")
    with pytest.raises(RecipeError, match=r"features: conversion reordered the channels of layer1\.conv1"):
        in_order_of(other, student)
    rules = rules_for(Circulant(), include=("layer1.*",))
    _, plain = convert_network(teacher, rules, None, SETTINGS, fits=tmp_path / "fits")
    with pytest.raises(RecipeError, match=r"features: conversion reordered the channels of layer1\.conv1"):
        in_order_of(other, plain)


def test_a_student_learns_from_a_teacher_in_its_own_order(tmp_path, data):
    student, teacher = converted_and_teacher(tmp_path)
    options = Finetune(data=data, epochs=1, batch_size=8, distill=0.5, features=1.0)

    def losses(expert):
        _, result = train_network(
            student, options, expert, tmp_path / "out", SETTINGS, resume=False, origin="", workers=0
        )
        return [epoch.loss for epoch in result.history]

    wanted = losses(in_order_of(teacher, student))
    moved = student.but(plan=student.plan.model_copy(update={"orders": {}}))
    with pytest.raises(TrainingError, match="can't resume"):
        train_network(moved, options, teacher, tmp_path / "out", SETTINGS, resume=True, origin="", workers=0)
    shutil.rmtree(tmp_path / "out.checkpoints")
    assert losses(teacher) == pytest.approx(wanted, rel=1e-4)

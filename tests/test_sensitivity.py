"""Predicted divergences, against the Fisher form from finite differences for every class, and true ones."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hosts import (
    Blind,
    CalledTwice,
    EvenOdds,
    Probed,
    Rounding,
    TinyResNet,
    TwoParents,
    assert_same,
    conv3,
    photos,
    seeded,
    state_of,
)
from torch import nn
from torch.nn import functional as F

from lcc import models, sensitivity
from lcc.errors import SourceError
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.sensitivity import damages
from lcc.surgery import find_sites

IMAGES = photos(6, size=8)
STEP = 1e-5  # of the finite differences
DRAWS = 600

# An option of each kind: behind a BatchNorm, another stride, a bank, whole steps.
OPTIONS = {
    "linear_mix": (LinearMix(), ("layer1.conv1",)),
    "groups": (LinearMix(group_size=2, change_channels=True), ("down",)),
    "circulant": (Circulant(), ("layer2.conv2",)),
    "bank": (Shared(align=False), ("layer1.conv1", "layer1.conv2")),
    "scaled bank": (Shared(align=False, scale=True), ("layer2.conv1", "layer2.conv2")),
    "rd_explicit": (RdExplicit(), ("layer1",)),
    "mgic": (Mgic(group_size=2, coarsest=2), ("layer1",)),
}


SHIFTED = torch.cat([photos(1, size=8).roll((n, 2 * n), (2, 3)) for n in range(5)])


def even_odds():
    return seeded(EvenOdds, SHIFTED[:1])


def tiny():
    """A network whose predictions are neither certain nor alike."""
    return seeded(TinyResNet, classes=4)


def sites_of(model, images=IMAGES):
    return {site.name: site for site in find_sites(model, images[:1])}


def found(model, *options, images=IMAGES, **how):
    with models.seeded(0):
        return damages(model, sites_of(model, images), options, images, **how).entries


def divergences(model, *options, **how):
    return [entry.divergence for entry in found(model, *options, **how)]


# The oracle


def calls_of(model, names, images):
    """Return (input, output) of every call of each named module in one forward pass."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, x, y, name=name: seen[name].append((x[0].clone(), y.clone()))
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def fitted(model, method, names, images):
    """Return operators fitted to the activations of the original network."""
    sites, seen = sites_of(model, images), calls_of(model, names, images)
    with models.seeded(0):
        operators = [method.build(sites[name].spec).double().eval() for name in names]
        method.tie_(operators)
        method.project_bank_(operators, [model.get_submodule(name) for name in names])
        statistics = [
            op.statistics(free_means=sites[name].norm is not None)
            for op, name in zip(operators, names, strict=True)
        ]
        for name, entry in zip(names, statistics, strict=True):
            for x, y in seen[name]:
                entry.add(x, y)
        method.fit_bank_(operators, statistics)
    return dict(zip(names, operators, strict=True))


@torch.no_grad()
def errors_of(model, operators, images):
    """Return by how much each call's output is off, behind a BatchNorm with each channel standardised."""
    sites, seen = sites_of(model, images), calls_of(model, operators, images)
    errors = {}
    for name, operator in operators.items():
        wanted = [y.numpy() for _, y in seen[name]]
        got = [operator(x).numpy() for x, _ in seen[name]]
        if sites[name].norm is not None:
            for c in range(wanted[0].shape[1]):
                y, z = (np.concatenate([call[:, c].ravel() for call in calls]) for calls in (wanted, got))
                for call in got:
                    call[:, c] = (call[:, c] - np.mean(z)) / np.std(z) * np.std(y) + np.mean(y)
        errors[name] = [torch.from_numpy(z - y) for z, y in zip(got, wanted, strict=True)]
    return errors


@torch.no_grad()
def log_likelihoods(model, images, errors, share):
    """Return (N, classes) with every call's output moved by a share of its error."""
    handles = []
    for name, calls in errors.items():
        left = iter(calls)
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda _m, _x, y, left=left: y + share * next(left)
            )
        )
    logits = model(images).numpy()
    for handle in handles:
        handle.remove()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def fisher(model, errors, images):
    """Return 1/2 E sum_c p_c (d log p_c / dy . e)^2, and how it spreads over labels drawn once."""
    plus, minus = (log_likelihoods(model, images, errors, share) for share in (STEP, -STEP))
    squares = np.square((plus - minus) / (2 * STEP))
    p = np.exp(log_likelihoods(model, images, {}, 0))
    means = (p * squares).sum(1)
    variances = (p * np.square(squares - means[:, None])).sum(1)
    return 0.5 * means.mean(), 0.5 * np.sqrt(variances.sum()) / len(images)


def predicted_slowly(model, method, names, images):
    operators = fitted(model, method, names, images)
    return fisher(model, errors_of(model, operators, images), images)


def true_divergence(model, operators, images):
    """Return the mean over images of KL(original || converted)."""
    converted = copy.deepcopy(model)
    for name, operator in operators.items():
        parent, _, key = name.rpartition(".")
        setattr(converted.get_submodule(parent), key, operator)
    before, after = (log_likelihoods(one, images, {}, 0) for one in (model, converted))
    less = before - after  # each term plus q - p, which adds up to 0: without cancellation
    return (np.exp(before) * (np.expm1(-less) + less)).sum(1).mean()


# What is predicted


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_many_draws_come_near_the_exact_fisher_form(monkeypatch, option):
    monkeypatch.setattr(sensitivity, "DRAWS", DRAWS)
    model = tiny()
    exact, spread = predicted_slowly(model, *option, IMAGES)
    spread /= np.sqrt(DRAWS)
    assert spread < 0.05 * exact
    (got,) = divergences(model, option)
    assert got == pytest.approx(exact, abs=4 * spread)


@pytest.mark.parametrize("method", [LinearMix(), Circulant()], ids=str)
def test_where_two_classes_are_as_likely_a_draw_gives_the_exact_fisher_form(method):
    model = even_odds()
    for name in ("second", "third"):
        exact, spread = predicted_slowly(model, method, (name,), SHIFTED)
        assert spread < 1e-6 * exact
        assert divergences(model, (method, (name,)), images=SHIFTED) == pytest.approx([exact], rel=1e-6)


def test_a_bank_adds_up_over_its_sites_before_it_is_squared():
    model, bank = even_odds(), (Shared(align=False), ("second", "third"))
    exact, _ = predicted_slowly(model, *bank, SHIFTED)
    (got,) = divergences(model, bank, images=SHIFTED)
    assert got == pytest.approx(exact, rel=1e-6)
    operators = fitted(model, *bank, SHIFTED)
    alone = [fisher(model, errors_of(model, {n: op}, SHIFTED), SHIFTED)[0] for n, op in operators.items()]
    assert got != pytest.approx(sum(alone), rel=1e-2)


@pytest.mark.parametrize(
    ("host", "name"),
    [(CalledTwice, "conv"), (partial(CalledTwice, norms=2), "conv"), (TwoParents, "left.0")],
    ids=["a norm", "two norms", "two parents"],
)
def test_a_site_called_twice_is_off_in_both_calls(monkeypatch, host, name):
    monkeypatch.setattr(sensitivity, "DRAWS", DRAWS)
    model = seeded(host)
    assert len(calls_of(model, [name], IMAGES)[name]) == 2
    exact, spread = predicted_slowly(model, LinearMix(), (name,), IMAGES)
    (got,) = divergences(model, (LinearMix(), (name,)))
    assert spread / np.sqrt(DRAWS) < 0.05 * exact
    assert got == pytest.approx(exact, abs=4 * spread / np.sqrt(DRAWS))


def shrink_removed_(conv, share):
    """Leave a share of the taps that LinearMix has no place for."""
    kernel = conv.weight
    depthwise = torch.eye(len(kernel), dtype=torch.bool)[:, :, None, None].expand_as(kernel)
    centre = torch.zeros_like(kernel, dtype=torch.bool)
    centre[:, :, 1, 1] = True
    with torch.no_grad():
        kernel.copy_(torch.where(depthwise | centre, kernel, share * kernel))


def test_an_option_that_loses_nothing_does_no_harm():
    model = tiny()
    for name in ("layer1.conv1", "layer2.conv2"):
        shrink_removed_(model.get_submodule(name), 0)
        (entry,) = found(model, (LinearMix(), (name,)))
        assert entry == pytest.approx((0, 0), abs=1e-6)
        assert entry.divergence < 1e-10
    with torch.no_grad():
        model.layer1.conv2.weight.copy_(model.layer1.conv1.weight)
    (entry,) = found(model, (Shared(align=False), ("layer1.conv1", "layer1.conv2")))
    assert entry == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("name", ["second", "third"])
def test_the_prediction_approaches_the_true_divergence_as_the_error_shrinks(name):
    away = []
    for share in (0.1, 0.01, 0.001):
        model = even_odds()
        shrink_removed_(model.get_submodule(name), share)
        with torch.no_grad():
            model.head.bias -= model(SHIFTED[:1])[0]
        (got,) = divergences(model, (LinearMix(), (name,)), images=SHIFTED)
        operators = fitted(model, LinearMix(), (name,), SHIFTED)
        away.append(abs(got / true_divergence(model, operators, SHIFTED) - 1))
    assert away[2] < 1e-2
    assert away[2] < away[1] / 3 < away[0] / 9


# How it is found


def test_many_options_at_once_are_what_each_is_alone(monkeypatch):
    monkeypatch.setattr(sensitivity, "AT_ONCE", 2)
    model, fast = tiny(), [OPTIONS[name] for name in OPTIONS if name not in ("rd_explicit", "mgic")]
    assert found(model, *fast) == tuple(found(model, option)[0] for option in fast)


def test_those_that_are_fitted_slowly_get_their_own_entries():
    model, slow, fast = tiny(), OPTIONS["rd_explicit"], OPTIONS["linear_mix"]
    assert found(model, slow, fast) == (*found(model, slow), *found(model, fast))


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    model, option = even_odds(), (LinearMix(), ("second",))
    whole = divergences(model, option, images=SHIFTED)
    monkeypatch.setattr(sensitivity, "CHUNK", 2)
    assert divergences(model, option, images=SHIFTED) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["linear_mix", "groups", "circulant"])
def test_what_a_norm_takes_along_are_the_moments_of_all_images(monkeypatch, name):
    whole = divergences(tiny(), OPTIONS[name])
    monkeypatch.setattr(sensitivity, "CHUNK", 1)
    assert divergences(tiny(), OPTIONS[name]) == pytest.approx(whole, rel=1e-4)


def test_the_seed_decides_which_labels_are_drawn():
    model, option = tiny(), OPTIONS["circulant"]
    assert divergences(model, option, seed=1) == divergences(model, option, seed=1)
    assert divergences(model, option, seed=1) != divergences(model, option, seed=2)


def test_what_it_took_is_said_in_forward_passes(monkeypatch):
    clock = iter((100.0, 102.0, 109.0))  # at the start, after a pass over the images, at the end
    monkeypatch.setattr(sensitivity, "_now", lambda _: next(clock))
    model = tiny()
    assert damages(model, sites_of(model), [(LinearMix(), ("layer1.conv1",))], IMAGES).forward_passes == 4.5


def test_each_pass_says_how_many_options_are_fitted(monkeypatch):
    monkeypatch.setattr(sensitivity, "AT_ONCE", 2)
    said = []
    found(tiny(), *(OPTIONS[n] for n in ("linear_mix", "rd_explicit", "groups", "bank")), on_done=said.append)
    assert said == [2, 3, 4]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_network_is_left_as_it_was(frozen):
    model = tiny().requires_grad_(not frozen)
    sites, before = sites_of(model), state_of(model)
    damages(model, sites, [OPTIONS[name] for name in ("linear_mix", "bank", "rd_explicit")], IMAGES)
    assert_same(before, state_of(model))


def test_the_network_is_left_in_eval_mode():
    model = tiny()
    sites = sites_of(model)
    damages(model.train(), sites, [OPTIONS["linear_mix"]], IMAGES)
    assert not any(module.training for module in model.modules())


def test_hooks_are_gone_if_a_pass_fails(monkeypatch):
    model = tiny()
    sites, before = sites_of(model), state_of(model)["hooks"]
    monkeypatch.setattr(LinearMix, "fit_bank_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        damages(model, sites, [OPTIONS["linear_mix"]], IMAGES)
    assert state_of(model)["hooks"] == before


class WorksInPlace(nn.Module):
    """A host that overwrites what its convolutions give and see."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv3(3), conv3(3), conv3(3)

    def forward(self, x):
        x = self.second(F.relu(self.first(x), inplace=True))
        x += 1
        y = self.third(F.relu(x, inplace=True))
        y += x
        return y.mean((2, 3)) * 10


def test_what_a_host_does_in_place_changes_nothing(monkeypatch):
    monkeypatch.setattr(sensitivity, "DRAWS", DRAWS)
    model = seeded(WorksInPlace)
    for name in ("first", "second", "third"):
        exact, spread = predicted_slowly(model, LinearMix(), (name,), IMAGES)
        got = divergences(model, (LinearMix(), (name,)))
        assert got == pytest.approx([exact], abs=4 * spread / np.sqrt(DRAWS))


# Hosts that let no slope through


@pytest.mark.parametrize("host", [Blind, Probed, Rounding])
@pytest.mark.parametrize("option", ["linear_mix", "circulant", "groups"])
def test_where_slopes_are_cut_the_true_divergence_is_found(host, option):
    method, names = OPTIONS[option]
    model = seeded(host, classes=4)
    (got,) = divergences(model, (method, names))
    errors = errors_of(model, fitted(model, method, names, IMAGES), IMAGES)
    before, after = (log_likelihoods(model, IMAGES, errors, share) for share in (0, 1))
    true = (np.exp(before) * (before - after)).sum(1).mean()
    if host is Rounding and option != "linear_mix":  # it is behind the cut, where slopes are as ever
        (true,) = divergences(seeded(TinyResNet, classes=4), (method, names))
        assert got == pytest.approx(true, rel=0.5)
    else:
        assert got == pytest.approx(true, rel=1e-6)
    assert got > 0


def test_a_network_that_computes_in_bfloat16_inside_is_planned_for():
    class Mixed(TinyResNet):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model, images = seeded(Mixed, classes=4).float(), IMAGES.float()
    options = [OPTIONS[name] for name in ("linear_mix", "circulant", "groups")]
    assert all(0 < one < 1 for one in divergences(model, *options, images=images))


def test_a_network_for_one_image_at_a_time_is_refused():
    class Single(TinyResNet):
        def forward(self, x):
            return super().forward(x).reshape(1, 3)

    with pytest.raises(SourceError, match=r"can't run on a 6x3x8x8 input .* several images at once"):
        found(seeded(Single), OPTIONS["linear_mix"])

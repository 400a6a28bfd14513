"""How reaction-diffusion steps start without images, and how they are fitted to a teacher's."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from diffusion_reference import EVERY, POST, largest_symbol, operator, step, without_reaction
from draws import random
from torch import nn

from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.ops.regression import Activations, regress_


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("post", [None, "relu"])
def test_the_start_without_images_is_the_identity_up_to_a_little_diffusion(method, post):
    op = operator(method, step(4, post=post))
    fit = op.project_(nn.Identity())
    assert (fit.how, fit.start_error, fit.relative_error, fit.samples) == ("weights", None, None, 0)
    x = random(2, 4, 6, 5, seed=1)
    with torch.no_grad():
        off = np.linalg.norm(op(x).numpy() - POST[post](x.numpy()))
        reaction = float((op.step * op.reaction(x)).norm())
    assert 0 < off <= 0.0501 * float(x.norm()) + reaction
    assert reaction == pytest.approx(0.01 * method.step * x.numel() ** 0.5)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_every_parameter_can_be_trained_from_the_start_without_images(method):
    op = operator(method, step(4))
    op.project_(nn.Identity())
    before = copy.deepcopy(op.state_dict())
    op.train()
    optimizer = torch.optim.SGD(op.parameters(), lr=0.1)
    x = random(4, 4, 6, 5)
    for _ in range(3):
        optimizer.zero_grad()
        (op(x) - 2 * x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in op.named_parameters())


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_fresh_step_is_drawn_from_the_global_seed(method):
    one, same, other = (operator(method, seed=seed).stencil for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def smooth(count, channels, height, width, *, seed):
    """Pixels that depend on their neighbours, as in a network."""
    white = random(count, channels, height + 2, width + 2, seed=seed)
    return nn.functional.avg_pool2d(white, 3, stride=1) * 3 + 0.2


FITTED = [RdExplicit(), RdImplicit(), RdCirculant()]


@torch.no_grad()
def teacher(method, spec):
    """A step of the same family, with a small stencil and a small reaction."""
    op = operator(method, spec, seed=11)
    op.stencil.mul_(2)
    op.mix.weight.mul_(0.5)
    op.norm.running_mean.zero_()
    op.norm.weight.uniform_(0.2, 0.5)
    op.norm.bias.uniform_(0.2, 0.6)
    return op


@cache
def fitted(method):
    """An operator fitted to a step of its own family on two image sizes, its fit, and the teacher."""
    spec = step(3, post="relu")
    op, wanted = operator(method, spec, seed=12), teacher(method, spec)
    op.project_(wanted)
    op.mix.weight.requires_grad_(False)
    statistics = op.statistics(free_means=False)
    with torch.no_grad():
        for size, seed in (((6, 6), 1), ((5, 8), 2)):
            x = smooth(15, 3, *size, seed=seed)
            statistics.add(x, wanted(x))
    return op, op.fit_(statistics), wanted


@pytest.mark.parametrize("method", FITTED, ids=str)
def test_a_step_of_its_own_family_is_found_again(method):
    op, fit, wanted = fitted(method)
    assert fit.how == "data"
    assert fit.relative_error < 0.3 * fit.start_error
    x = smooth(10, 3, 6, 6, seed=9)
    with torch.no_grad():
        error = float((op(x) - wanted(x)).norm() / wanted(x).norm())
    assert error < 0.35 * fit.start_error
    assert error < 0.05


@pytest.mark.parametrize("method", FITTED, ids=str)
def test_the_fit_counts_the_positions_of_all_calls(method):
    _, fit, _ = fitted(method)
    assert fit.samples == 15 * (6 * 6 + 5 * 8)


@pytest.mark.parametrize("method", FITTED, ids=str)
def test_the_stated_errors_are_those_of_every_fifth_image(method):
    op, fit, wanted = fitted(method)
    off = norm = 0.0
    with torch.no_grad():
        for size, seed in (((6, 6), 1), ((5, 8), 2)):
            y = wanted(x := smooth(15, 3, *size, seed=seed)[4::5])
            off, norm = off + float((op(x) - y).square().sum()), norm + float(y.square().sum())
    assert fit.relative_error == pytest.approx((off / norm) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("method", FITTED, ids=str)
def test_a_fit_leaves_an_operator_ready_to_use(method):
    op, _, _ = fitted(method)
    needed = {name: parameter.requires_grad for name, parameter in op.named_parameters()}
    assert needed == {"stencil": True, "mix.weight": False, "norm.weight": True, "norm.bias": True}
    assert all(parameter.grad is None for parameter in op.parameters())
    assert not any(part.training for part in op.modules())
    assert all(bool(value.isfinite().all()) for value in op.state_dict().values())
    assert float(op.norm.running_var.min()) > 0
    assert op.norm.momentum == 0.1
    assert op.warning() is None


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setitem(regress_.__kwdefaults__, "steps", 40)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", FITTED, ids=str)
def test_a_fit_is_reproducible(method):
    def fit(global_seed):
        op = operator(method, step(2), seed=3)
        op.project_(nn.Identity())
        torch.manual_seed(global_seed)
        statistics = op.statistics(free_means=False)
        x = smooth(6, 2, 3, 3, seed=4)
        statistics.add(x, 1.1 * x)
        return op.fit_(statistics), op.state_dict()

    (one, weights), (other, same) = fit(0), fit(1)
    assert one == other
    assert all(torch.equal(value, same[key]) for key, value in weights.items())


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("method", [RdExplicit(), RdCirculant()], ids=str)
def test_a_fit_to_what_is_unstable_stays_inside_the_bound(method):
    op = operator(method, step(2), seed=3)
    op.project_(nn.Identity())
    nn.init.zeros_(op.norm.bias)  # the reaction off
    with torch.no_grad():
        op.stencil.mul_((2 / op.amplification()).sqrt())  # it starts at the bound
    sharpened = without_reaction(method, random(2, 3, 3, seed=6))
    x = random(10, 2, 4, 4)
    statistics = op.statistics(free_means=False)
    with torch.no_grad():
        statistics.add(x, sharpened(x))
    op.fit_(statistics)
    assert sharpened.warning() is not None
    assert largest_symbol(op) <= 2.02


def test_statistics_of_another_operator_are_refused():
    op = operator(RdExplicit())
    assert isinstance(op.statistics(free_means=True), Activations)
    with pytest.raises(TypeError, match="another kind of operator"):
        op.fit_(nn.Identity())

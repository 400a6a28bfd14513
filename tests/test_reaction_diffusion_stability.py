"""The stability of reaction-diffusion steps: deep stacks, the cap, restraining, the warning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusion_reference import (
    EXPLICIT,
    largest_symbol,
    length,
    operator,
    step,
    used_stencil,
    without_reaction,
)
from draws import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit

PIXELS = random(1, 3, 8, 8, seed=5)


@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-2, 1e2),
    h=st.floats(1e-2, 1e2),
    kernel=st.sampled_from([(3, 3), (5, 3), (7, 7)]),
    stiffness=st.sampled_from([math.inf, 0.3, 10.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_linear_part_of_an_implicit_step_has_a_spectral_radius_of_at_most_one(
    seed, scale, h, kernel, stiffness
):
    method = RdImplicit(step=h, stiffness=stiffness)
    op = method.build(step(1, kernel)).double().eval()
    op.project_(nn.Identity())
    nn.init.zeros_(op.norm.bias)  # the reaction off
    with torch.no_grad():
        op.stencil.copy_(scale * random(1, *kernel, seed=seed))
        units = torch.eye(20, dtype=torch.float64).reshape(20, 1, 4, 5)
        matrix = op(units).reshape(20, 20).T.numpy()
    eigenvalues = np.linalg.eigvals(matrix)
    assert np.abs(eigenvalues).max() <= 1 + 1e-10
    assert np.linalg.norm(matrix, 2) <= 1 + 1e-10
    assert eigenvalues.real.min() > -1e-10


def stack(op, x, steps=50):
    sizes = []
    with torch.no_grad():
        for _ in range(steps):
            x = op(x)
            sizes.append(float(x.norm()))
    return sizes


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
def test_a_deep_explicit_stack_blows_up_beyond_the_bound_and_not_inside(method):
    stencil = random(3, 3, 3, seed=6)
    largest = largest_symbol(without_reaction(method, stencil))
    start = float(PIXELS.norm())
    inside = stack(without_reaction(method, stencil * (1.99 / largest) ** 0.5), PIXELS)
    beyond = stack(without_reaction(method, stencil * (4.0 / largest) ** 0.5), PIXELS)
    assert max(inside) <= start * (1 + 1e-12)
    assert beyond[-1] > 1e6 * start


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "method", [RdImplicit(), RdImplicit(stiffness=math.inf), RdImplicit(step=50.0)], ids=str
)
def test_a_deep_implicit_stack_never_grows(method, scale):
    sizes = stack(without_reaction(method, scale * random(3, 3, 3, seed=6)), PIXELS)
    assert max(sizes) <= float(PIXELS.norm()) * (1 + 1e-12)
    assert np.all(np.diff(sizes) <= 1e-12)


@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-4, 1e6),
    h=st.floats(1e-3, 1e3),
    stiffness=st.floats(1e-3, 1e2),
    learn_step=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_stiffness_is_capped_for_any_parameters(seed, scale, h, stiffness, learn_step):
    method = RdImplicit(step=h, stiffness=stiffness, learn_step=learn_step)
    op = method.build(step(2)).double()
    with torch.no_grad():
        op.stencil.copy_(scale * random(2, 3, 3, seed=seed))
        used = op.capped_stencil()
    np.testing.assert_allclose(used.numpy(), used_stencil(op), rtol=1e-9)
    assert length(op) * largest_symbol(op, 64) <= stiffness * (1 + 1e-9)


def test_gradients_flow_below_and_beyond_the_cap():
    method = RdImplicit(learn_step=True)
    for scale in (0.01, 10.0):
        op = operator(method)
        with torch.no_grad():
            op.stencil.copy_(scale * random(4, 3, 3, seed=3))
        op(random(2, 4, 6, 5)).square().sum().backward()
        for parameter in op.parameters():
            assert bool(parameter.grad.isfinite().all())
            assert float(parameter.grad.abs().max()) > 0


def test_gradients_of_an_implicit_step_are_right_beyond_the_cap():
    op = operator(RdImplicit(learn_step=True), step(2))
    x = random(1, 2, 3, 4)

    def run(x, stencil, log_step):
        return torch.func.functional_call(op, {"stencil": stencil, "log_step": log_step}, (x,))

    inputs = (x, 3 * random(2, 3, 3, seed=4), torch.tensor(-0.3).double())
    assert torch.autograd.gradcheck(run, tuple(part.requires_grad_() for part in inputs))


def test_a_stencil_of_zeros_is_no_trouble_to_the_cap():
    op = operator(RdImplicit())
    with torch.no_grad():
        op.stencil.zero_()
    x = random(2, 4, 6, 5)
    y = op(x)
    y.sum().backward()
    np.testing.assert_allclose(y.detach(), (x + op.reaction(x)).detach(), atol=1e-12)
    assert bool(op.stencil.grad.isfinite().all())


@pytest.mark.parametrize("kind", [RdExplicit, RdImplicit, RdCirculant])
def test_a_learned_step_is_trained_and_stays_positive(kind):
    op = operator(kind(step=0.5, learn_step=True)).train()
    x = random(4, 4, 6, 5)
    optimizer = torch.optim.SGD(op.parameters(), lr=5.0)  # far too long steps
    lengths = {0.5}
    for _ in range(5):
        optimizer.zero_grad()
        (op(x) - x).square().mean().backward()
        optimizer.step()
        lengths.add(length(op))
    assert len(lengths) > 3
    assert min(lengths) > 0


@pytest.mark.parametrize("kind", [RdExplicit, RdImplicit, RdCirculant])
def test_a_step_that_is_not_learned_is_no_parameter(kind):
    op = kind(step=0.5).build(step())
    assert op.step == 0.5
    assert {name for name, _ in op.named_parameters()} == {
        "stencil",
        "mix.weight",
        "norm.weight",
        "norm.bias",
    }


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
@pytest.mark.parametrize("learn_step", [False, True])
def test_restraining_brings_a_step_back_inside_its_bound(method, learn_step):
    method = method.model_copy(update={"learn_step": learn_step, "step": 1.5})
    op = operator(method)
    with torch.no_grad():
        op.stencil.copy_(3 * random(4, 3, 3, seed=7))
    before = op.stencil.detach().clone()
    assert 1.5 * largest_symbol(op) > 2
    op.restrain_()
    after = op.stencil.detach()
    # The maximum is sought on a grid, which may miss one percent of it.
    assert 1.98 <= 1.5 * largest_symbol(op) <= 2.02
    ratio = (after / before).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
def test_restraining_leaves_a_step_inside_its_bound_alone(method):
    op = operator(method)
    before = op.stencil.detach().clone()
    op.restrain_()
    assert torch.equal(op.stencil, before)


def test_restraining_shrinks_only_the_channels_that_leave_the_bound():
    op = operator(RdExplicit())
    with torch.no_grad():
        op.stencil[2] *= 100
    before = op.stencil.detach().clone()
    op.restrain_()
    assert torch.equal(op.stencil[[0, 1, 3]], before[[0, 1, 3]])
    assert float(op.stencil[2].detach().norm()) < float(before[2].norm())


def test_restraining_an_implicit_step_does_not_change_what_it_computes():
    op = operator(RdImplicit())
    with torch.no_grad():
        op.stencil.copy_(3 * random(4, 3, 3, seed=7))
    x = random(2, 4, 6, 5)
    before, raw = op(x).detach(), op.stencil.detach().clone()
    op.restrain_()
    assert not torch.equal(op.stencil, raw)
    torch.testing.assert_close(op(x).detach(), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
def test_a_user_is_warned_beyond_the_bound_only(method):
    stencil = random(3, 3, 3, seed=8)
    largest = largest_symbol(without_reaction(method, stencil))
    for wanted in (0.1, 1.0, 1.97):
        assert without_reaction(method, stencil * (wanted / largest) ** 0.5).warning() is None
    text = without_reaction(method, stencil * (5.0 / largest) ** 0.5).warning()
    assert "past the bound of 2" in text
    assert "h max|k^|^2 is 5.0" in text or "h max|k^|^2 is 4.9" in text


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
def test_the_length_of_the_step_counts_in_the_warning(method):
    for learn_step in (False, True):
        stencil = torch.zeros(3, 3, 3, dtype=torch.float64)
        stencil[0, 1, 1] = 1.0  # |k^|^2 is 1 everywhere
        long = method.model_copy(update={"step": 4.0, "learn_step": learn_step})
        assert "h max|k^|^2 is 4.00" in without_reaction(long, stencil).warning()


def test_an_implicit_step_needs_no_warning():
    assert without_reaction(RdImplicit(stiffness=math.inf), 100 * random(3, 3, 3)).warning() is None

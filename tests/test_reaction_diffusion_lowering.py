"""Reaction-diffusion steps lowered: as close as they say, and apart from the operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusion_reference import EVERY, POST, SIZE, conv, operator, step, step_of
from draws import random

from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.specs import Size

LOWERED = [
    *EVERY,
    RdExplicit(step=0.4, learn_step=True),
    RdImplicit(step=0.4, stiffness=5.0),
    RdCirculant(step=0.4),
]


@pytest.mark.parametrize("method", LOWERED, ids=str)
@pytest.mark.parametrize(
    "spec", [step(4), step(3, post="relu"), step(4, (5, 3), post="silu"), conv(5)], ids=str
)
@pytest.mark.parametrize("size", [(6, 5), (9, 8), (3, 2)])
def test_what_is_lowered_is_as_close_to_the_step_as_it_says(method, spec, size):
    op = operator(method, spec)
    x = random(3, op.channels, *size, seed=1)
    wanted = step_of(op, x)  # before the activation: none of them makes differences larger by a tenth
    lowerings = op.lowerings(Size(height=size[0], width=size[1]), 1e-3)
    assert lowerings
    with torch.no_grad():
        for lowering in lowerings:
            got = lowering.module(x).numpy()
            allowed = (1.1 * lowering.relative_error + 1e-10) * np.linalg.norm(wanted)
            assert np.linalg.norm(got - POST[op.post](wanted)) <= allowed


def test_an_implicit_step_is_lowered_to_a_short_stencil_at_the_tolerance_and_to_exact_matrices():
    op = operator(RdImplicit())
    short, exact = op.lowerings(Size(height=24, width=24), 1e-2)
    shorter, _ = op.lowerings(Size(height=24, width=24), 1e-1)
    assert 0 < short.relative_error <= 1e-2
    assert shorter.relative_error <= 1e-1
    assert exact.relative_error == 0
    taps, fewer = (lowering.module.solve.conv.weight.shape for lowering in (short, shorter))
    assert fewer[2] <= taps[2] < 24
    assert f"{taps[2]}x{taps[3]} stencil" in short.how
    assert "24x24" in exact.how


def test_no_weights_make_the_stencil_longer_than_those_at_its_slowest():
    def taps(op):
        return op.lowerings(Size(height=24, width=24), 1e-3)[0].module.solve.conv.weight.shape[2]

    method, spec = RdImplicit(), conv(5)
    start, slowest = (method.build(spec).double() for _ in range(2))
    slowest.at_its_slowest_()
    assert taps(start) < taps(slowest)
    for seed in range(20):
        other = method.build(spec).double()
        with torch.no_grad():
            other.stencil.copy_(random(*other.stencil.shape, seed=seed) * 10 ** (seed % 3))
        assert taps(other) <= taps(slowest)


@pytest.mark.parametrize("method", LOWERED, ids=str)
def test_what_is_lowered_does_not_change_with_the_operator(method):
    op = operator(method, step(4, post="relu"))
    x = random(2, 4, 6, 5, seed=1)
    with torch.no_grad():
        lowerings = op.lowerings(SIZE, 1e-3)
        before = [lowering.module(x) for lowering in lowerings]
        for value in [*op.parameters(), *op.buffers()]:
            value.fill_(7)
        for lowering, wanted in zip(lowerings, before, strict=True):
            assert torch.equal(lowering.module(x), wanted)


@pytest.mark.parametrize("method", LOWERED, ids=str)
def test_lowering_changes_nothing_in_the_operator(method):
    op = operator(method)
    before = {key: value.clone() for key, value in op.state_dict().items()}
    modules = [lowering.module for lowering in op.lowerings(SIZE, 1e-3)]
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in op.state_dict().items())
    assert all(parameter.requires_grad for parameter in op.parameters())

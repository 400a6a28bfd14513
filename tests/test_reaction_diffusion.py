"""Reaction-diffusion steps: what they stand in for, what they cost and what they compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusion_reference import EVERY, SIZE, conv, length, operator, step, step_of
from draws import random
from torch.utils.flop_counter import FlopCounterMode

from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.specs import Size

# What a step can stand in for.

REFUSED = [
    (conv(stride=(2, 2)), "stride 2x2"),
    (conv(stride=(1, 2)), "stride 1x2"),
    (conv(out_channels=8), "channels change (4 to 8)"),
    (conv(groups=4), "grouped"),
    (conv(bias=True), "bias"),
    (conv(padding=(0, 0)), "padding changes the size"),
    (conv(padding="valid"), "padding changes the size"),
    (conv(padding=(2, 1)), "padding changes the size"),
    (conv(padding=(2, 2), dilation=(2, 2)), "dilated"),
    (conv(padding="same", dilation=(1, 2)), "dilated"),
    (conv(padding_mode="reflect"), "padded by reflect"),
    (conv(kernel=(3, 4), padding="same"), "even kernel 3x4"),
    (step(kernel=(4, 4)), "even kernel 4x4"),
]


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=lambda value: str(value).replace(" ", "-"))
def test_what_a_step_cannot_stand_in_for_is_refused_in_words(method, spec, words):
    assert words in method.why_not(spec)


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        conv(),
        conv(kernel=(5, 3)),
        conv(kernel=(1, 1)),
        conv(padding="same"),
        conv(kernel=(1, 1), padding="valid"),
        step(),
        step(kernel=(1, 7), post="silu", pre_norm=True, drop_path=0.2),
    ],
    ids=str,
)
def test_what_keeps_its_shape_is_taken_and_keeps_it(method, spec):
    assert method.why_not(spec) is None
    x = random(2, 4, 6, 5)
    assert operator(method, spec)(x).shape == x.shape


@pytest.mark.parametrize("kind", [RdExplicit, RdImplicit, RdCirculant])
def test_a_kernel_size_of_its_own_makes_even_kernels_eligible_and_even_sizes_not(kind):
    assert kind(kernel_size=5).why_not(step(kernel=(4, 4))) is None
    assert kind(kernel_size=5).why_not(conv(kernel=(6, 6), padding="same")) is None
    assert "kernel_size 4 is even" in kind(kernel_size=4).why_not(step())


@pytest.mark.parametrize(
    ("options", "spec", "size"),
    [
        ({}, step(kernel=(3, 3)), (3, 3)),
        ({}, step(kernel=(5, 3)), (5, 3)),
        ({}, step(kernel=(1, 1)), (3, 3)),
        ({}, conv(kernel=(1, 7)), (3, 7)),
        ({"kernel_size": 7}, step(), (7, 7)),
        ({"kernel_size": 3}, conv(kernel=(5, 5)), (3, 3)),
    ],
)
def test_the_stencil_is_as_large_as_the_original_at_least_3_or_as_said(options, spec, size):
    for kind in (RdExplicit, RdImplicit, RdCirculant):
        assert kind(**options).build(spec).stencil.shape == (4, *size)


@pytest.mark.parametrize("name", ["step", "stiffness", "kernel_size"])
def test_a_hyperparameter_that_makes_no_sense_is_refused(name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=name):
            RdImplicit(**{name: value})


# What it costs: methods.md of the papers' formulas, in integers.


def real_fft(points):
    """One real transform, half of 2.5 N log2 N multiply-accumulates."""
    return round(1.25 * points * math.log2(points))


COSTS = [
    (RdExplicit(), lambda c, n, k: 2 * k * c * n),
    (RdImplicit(), lambda c, n, k: 2 * c * real_fft(n)),
    (RdCirculant(boundary="periodic"), lambda c, n, k: 2 * real_fft(c * n)),
    # There and back between channels and frequencies, of which there are an even number; four products of
    # real and imaginary parts.
    (RdCirculant(), lambda c, n, k: (2 * c * (c + c % 2) + 4 * k * (c + c % 2)) * n),
]


@pytest.mark.parametrize(("method", "diffusion"), COSTS, ids=[str(method) for method, _ in COSTS])
@pytest.mark.parametrize(("channels", "kernel"), [(16, (3, 3)), (7, (5, 3)), (3, (1, 1))])
@pytest.mark.parametrize("of", [step, conv])
def test_the_cost_is_that_of_the_formula(method, diffusion, channels, kernel, of):
    size = Size(height=12, width=9)
    cost = method.cost(of(channels, kernel), size)
    taps = max(kernel[0], 3) * max(kernel[1], 3)
    assert cost.params == taps * channels + channels**2 + 2 * channels
    assert cost.macs == channels**2 * size.pixels + diffusion(channels, size.pixels, taps)
    assert type(cost.macs) is type(cost.params) is int


def test_an_explicit_step_at_3x3_has_the_papers_numbers():
    cost = RdExplicit().cost(step(32), Size(height=32, width=32))
    assert cost.params - 2 * 32 == 9 * 32 + 32**2  # BatchNorm apart
    assert cost.macs == 1024 * (18 * 32 + 32**2)


@pytest.mark.parametrize("learn_step", [False, True])
@pytest.mark.parametrize("kind", [RdExplicit, RdImplicit, RdCirculant])
def test_the_stated_parameters_are_the_modules(kind, learn_step):
    for spec in (step(6), conv(5, (5, 3)), step(3, (1, 1))):
        method = kind(learn_step=learn_step)
        op = method.build(spec)
        assert method.cost(spec, SIZE).params == sum(parameter.numel() for parameter in op.parameters())


@pytest.mark.parametrize("method", [RdExplicit(), RdCirculant()], ids=str)
@pytest.mark.parametrize("channels", [4, 5])
def test_the_stated_macs_of_the_direct_forms_are_what_torch_counts(method, channels):
    spec = step(channels, (5, 3))
    with FlopCounterMode(display=False) as counter:
        operator(method, spec)(random(1, channels, 6, 5))
    assert method.cost(spec, SIZE).macs == counter.get_total_flops() // 2


# What it computes.


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("size", [(6, 5), (4, 4), (2, 3)])
@pytest.mark.parametrize("spec", [step(4), step(5, (5, 3)), conv(4), step(1), step(4, norm_eps=0.1)], ids=str)
def test_a_step_is_its_formula(method, size, spec):
    op = operator(method, spec)
    x = random(2, op.channels, *size, seed=1)
    np.testing.assert_allclose(op(x).detach().numpy(), step_of(op, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [RdExplicit, RdImplicit, RdCirculant])
@pytest.mark.parametrize("h", [0.25, 3.0])
@pytest.mark.parametrize("learn_step", [False, True])
def test_a_step_of_another_length_is_its_formula(method, h, learn_step):
    op = operator(method(step=h, learn_step=learn_step))
    x = random(2, 4, 6, 5, seed=1)
    with torch.no_grad():
        assert length(op) == pytest.approx(h, rel=1e-6)
        np.testing.assert_allclose(op(x).numpy(), step_of(op, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("post", ["relu", "silu"])
def test_the_activation_after_the_sum_stays_inside_the_operator(method, post):
    op = operator(method, step(4, post=post))
    x = random(2, 4, 6, 5, seed=1)
    np.testing.assert_allclose(op(x).detach().numpy(), step_of(op, x, post), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [RdExplicit(), RdCirculant(), RdImplicit()], ids=str)
def test_the_norm_has_the_constants_of_the_original(method):
    norm = method.build(step(4, norm_eps=1e-3, norm_momentum=0.01)).norm
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_under_autocast_a_step_is_about_the_same_and_finite(method):
    op = operator(method).float()
    x = random(2, 4, 6, 5, seed=1).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(x)
    np.testing.assert_allclose(got.float(), step_of(op.double(), x.double()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_the_memory_layout_is_kept(method):
    op = operator(method).to(memory_format=torch.channels_last)
    x = random(2, 4, 6, 5, seed=1).to(memory_format=torch.channels_last)
    assert op(x).is_contiguous(memory_format=torch.channels_last)

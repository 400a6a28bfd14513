"""The conv form of multigrid in channels: its laws, its start, and its fit."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from cases import conv, inputs, original, smooth_inputs
from mgic_conv_reference import dense_kernel, mgic_conv_reference
from torch import nn

from lcc.methods.mgic import Mgic
from lcc.ops.fit import HELD_OUT_EVERY
from lcc.ops.regression import Activations

METHOD = Mgic(group_size=2, coarsest=4)
CHANGES = Mgic(group_size=3, coarsest=4, change_channels=True)
SAME = {"padding": (1, 1)}
SPECS = (
    (METHOD, conv(8, **SAME)),
    (METHOD, conv(8, **SAME, bias=True)),
    (METHOD, conv(8, **SAME, stride=(2, 2))),
    (METHOD, conv(8, padding=(2, 2), dilation=(2, 2), bias=True)),
    (METHOD, conv(8, padding=(0, 0), stride=(2, 1))),
    (METHOD, conv(8, padding="same", kernel=(5, 3), bias=True)),
    (METHOD, conv(8, padding="valid")),
    (METHOD, conv(8, **SAME, padding_mode="reflect", bias=True)),
    (METHOD, conv(8, padding=(2, 1), padding_mode="circular", stride=(1, 2))),
    (METHOD, conv(8, kernel=(1, 1), bias=True)),
    (METHOD, conv(6, **SAME)),
    (Mgic(group_size=8, coarsest=8), conv(8, **SAME)),
    (CHANGES, conv(6, out=12, **SAME, bias=True)),
    (CHANGES, conv(12, out=6, **SAME, stride=(2, 2))),
)
EVERY = pytest.mark.parametrize(("method", "spec"), SPECS, ids=lambda value: str(value).replace(" ", "-"))
# Without and with a bias, then with another width and a stride; before a BatchNorm or not.
FITTED = pytest.mark.parametrize(("number", "free_means"), [(0, False), (0, True), (7, False), (13, True)])
PADDED, STRIDED = conv(8, **SAME), conv(8, **SAME, stride=(2, 2))


def operator(method, spec, *, seed=1):
    """Return the operator in float64, R and P off their averages."""
    torch.manual_seed(seed)
    op = method.build(spec).double()
    for part in (*op.restrict, *op.prolong):
        nn.init.normal_(part.weight)
    return op


def relative_error(got, wanted, *, centered):
    axes = (0, 2, 3)
    if centered:
        got = got - got.mean(axes, keepdim=True)
        wanted = wanted - wanted.mean(axes, keepdim=True)
    return float((got - wanted).norm() / wanted.norm())


@EVERY
def test_it_equals_the_slow_reference(method, spec):
    op, x = operator(method, spec), inputs(spec)
    got = op(x).detach().numpy()
    np.testing.assert_allclose(got, mgic_conv_reference(op, method, x.numpy()), rtol=0, atol=1e-10)


@EVERY
def test_it_is_linear_in_its_input(method, spec):
    op, x, y = operator(method, spec), inputs(spec, seed=3), inputs(spec, seed=4)
    origin = op(torch.zeros_like(x))
    combined = 2 * (op(x) - origin) - 3 * (op(y) - origin)
    torch.testing.assert_close(op(2 * x - 3 * y) - origin, combined, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "spec"), [SPECS[1], SPECS[3], SPECS[9], SPECS[12]], ids=str)
def test_its_gradients_are_right_and_reach_every_weight(method, spec):
    op = operator(method, spec)
    x = inputs(spec, 1)[:, :, :6, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: op(x), (x, *op.parameters()), fast_mode=True)
    op(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in op.parameters())


@EVERY
def test_it_has_the_shape_and_the_attributes_of_the_convolution(method, spec):
    replaced, op, x = original(spec), operator(method, spec), inputs(spec)
    assert op(x).shape == replaced(x).shape
    assert (op.bias is None) == (replaced.bias is None)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(op, name) == getattr(replaced, name)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_it_is_the_identity_for_any_r_and_p_if_every_k_is(kernel, mode):
    spec = conv(16, kernel=kernel, padding="same", padding_mode=mode)
    op, x = operator(METHOD, spec), inputs(spec)
    for level in op.kernels:
        nn.init.dirac_(level.weight, level.groups)
    torch.testing.assert_close(op(x), x, rtol=0, atol=1e-12)


def test_white_noise_keeps_its_variance_on_the_way_up():
    torch.manual_seed(0)
    op = Mgic(group_size=16, coarsest=16).build(conv(256, kernel=(1, 1)))
    x = torch.randn(64, 256, 8, 8)
    assert float(op.seen(x, 0).detach().var()) == pytest.approx(1, rel=0.1)


def test_there_is_one_group_of_pairs_for_every_group_of_channels():
    op = METHOD.build(conv(8, **SAME))
    down, up = (
        dense_kernel(part.weight.detach().numpy(), 4)[:, :, 0, 0] for part in (op.restrict[0], op.prolong[0])
    )
    pairs = np.repeat(np.eye(4), 2, axis=1)
    np.testing.assert_array_equal(down, pairs / 2)
    np.testing.assert_array_equal(up, pairs.T)


@EVERY
@torch.no_grad()
def test_the_start_is_what_of_the_kernel_lies_inside_the_groups(method, spec):
    replaced, op, x = original(spec), operator(method, spec), inputs(spec)
    whole = replaced.weight.clone()
    fit = op.project_(replaced)
    groups = op.kernels[0].groups
    ones = np.ones(op.kernels[0].weight.shape)
    replaced.weight *= torch.from_numpy(dense_kernel(ones, groups))
    torch.testing.assert_close(op(x), replaced(x), rtol=0, atol=1e-12)
    error = float((whole - replaced.weight).norm() / whole.norm())
    assert fit.kernel_error == pytest.approx(error, abs=1e-14)
    assert fit.how == "weights"


@torch.no_grad()
def test_an_identity_stays_one_without_error():
    spec = conv(16, padding="same")
    replaced, op, x = original(spec), operator(METHOD, spec), inputs(spec)
    nn.init.dirac_(replaced.weight)
    assert op.project_(replaced).kernel_error == 0
    torch.testing.assert_close(op(x), x, rtol=0, atol=0)


@cache
def fit_to_smooth_images(number, *, free_means, scale=1.0):
    """Return (start, fitted operator, fit, x, y) of a case; every fifth of 40 images is held out."""
    method, spec = SPECS[number]
    replaced, op, x = original(spec), operator(method, spec), smooth_inputs(spec)
    with torch.no_grad():
        replaced.weight *= scale
        y = replaced(x)
    op.project_(replaced)
    start, statistics = copy.deepcopy(op), op.statistics(free_means=free_means)
    statistics.add(x[:25], y[:25])
    statistics.add(x[25:], y[25:])
    return start, op, op.fit_(statistics), x, y


@FITTED
def test_fitting_to_data_helps_on_held_out_images(number, free_means):
    *_, fit, _, y = fit_to_smooth_images(number, free_means=free_means)
    assert fit.relative_error < 0.8 * fit.start_error
    assert fit.samples == y.numel() // y.shape[1]


@FITTED
@torch.no_grad()
def test_the_reported_errors_equal_the_errors_recomputed_on_every_fifth_image(number, free_means):
    start, op, fit, x, y = fit_to_smooth_images(number, free_means=free_means)
    held_out, centered = slice(HELD_OUT_EVERY - 1, None, HELD_OUT_EVERY), free_means or op.spec.bias
    for found, stated in ((start, fit.start_error), (op, fit.relative_error)):
        error = relative_error(found(x[held_out]), y[held_out], centered=centered)
        assert stated == pytest.approx(error, abs=1e-9)


def test_r_and_p_are_trained_too():
    start, op, *_ = fit_to_smooth_images(0, free_means=True)
    assert not torch.equal(op.restrict[0].weight, start.restrict[0].weight)
    assert not torch.equal(op.prolong[0].weight, start.prolong[0].weight)


def test_a_bias_takes_on_the_mean_of_the_outputs():
    _, op, _, x, y = fit_to_smooth_images(7, free_means=False)
    torch.testing.assert_close(op(x).mean((0, 2, 3)), y.mean((0, 2, 3)), rtol=0, atol=1e-9)


def test_the_fit_does_not_depend_on_the_scale():
    *_, small, _, _ = fit_to_smooth_images(0, free_means=True, scale=1e-5)
    *_, plain, _, _ = fit_to_smooth_images(0, free_means=True)
    assert small.relative_error == pytest.approx(plain.relative_error, rel=1e-3)


def test_fitting_to_noise_does_no_harm_on_held_out_images():
    replaced, op, x = original(PADDED), operator(METHOD, PADDED), inputs(PADDED, 6)
    op.project_(replaced)
    statistics = op.statistics(free_means=False)
    statistics.add(x, replaced(x))
    fit = op.fit_(statistics)
    assert fit.relative_error <= fit.start_error


@torch.no_grad()
def test_calls_on_two_sizes_are_both_fitted_to():
    replaced, op, x = original(PADDED), operator(METHOD, PADDED), smooth_inputs(PADDED)
    op.project_(replaced)
    start, small = copy.deepcopy(op), x[:, :, :5, :5]
    statistics = op.statistics(free_means=False)
    statistics.add(x, replaced(x))
    statistics.add(small, replaced(small))
    fit = op.fit_(statistics)
    assert fit.samples == 40 * (9 * 7 + 5 * 5)
    for part in (x, small):
        errors = [relative_error(found(part), replaced(part), centered=False) for found in (op, start)]
        assert errors[0] < 0.8 * errors[1]


def test_statistics_of_another_operator_are_refused():
    with pytest.raises(TypeError, match="another kind of operator"):
        METHOD.build(PADDED).fit_(Activations())


@EVERY
@torch.no_grad()
def test_scaling_scales_every_output_channel(method, spec):
    op, x = operator(method, spec), inputs(spec)
    factor = torch.linspace(0.5, 2, spec.out_channels, dtype=torch.float64)
    wanted, norms = op(x) * factor[:, None, None], op.weight_norms() * factor
    op.scale_(factor)
    torch.testing.assert_close(op(x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(op.weight_norms(), norms, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_lowering_is_exact_and_holds_weights_of_its_own():
    op, x = operator(METHOD, STRIDED), inputs(STRIDED)
    wanted = op(x)
    (lowering,) = op.lowerings(None, 1e-3)
    for parameter in op.parameters():
        parameter.zero_()
    torch.testing.assert_close(lowering.module(x), wanted, rtol=0, atol=0)

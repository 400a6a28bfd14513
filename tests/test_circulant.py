"""Circulant coupling against loops and dense matrices, its fit against one regression on all unknowns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from draws import random
from reference import conv_reference
from torch import nn
from torchvision.models import resnet18

from lcc.calibrate import project_
from lcc.counts import count_params
from lcc.methods.circulant import Circulant
from lcc.ops import circulant
from lcc.ops.frequency_fit import FrequencyGram
from lcc.plan import Site, make_plan, rules_for
from lcc.specs import ConvSpec, Size
from lcc.surgery import find_sites, replace_

CHANNELS = [2, 3, 4, 7, 8]


def conv(channels, kernel=(3, 3), **options):
    return ConvSpec(in_channels=channels, out_channels=channels, kernel_size=kernel, **options)


def dense_kernel(theta):
    """W[i, i + d mod c] = theta[d], entry by entry."""
    c = len(theta)
    kernel = np.zeros((c, c, *theta.shape[1:]))
    for i in range(c):
        for d in range(c):
            kernel[i, (i + d) % c] = theta[d]
    return kernel


def padded(x, theta, stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    """K x with zeros outside, by loops."""
    return conv_reference(
        x.numpy(),
        dense_kernel(theta.numpy()),
        None,
        stride=stride,
        margin=tuple((p, p) for p in padding),
        dilation=dilation,
        mode="zeros",
    )


def periodic(x, theta):
    """K x on a torus, by shifting the image once for every tap."""
    c, kh, kw = theta.shape
    y = np.zeros_like(x)
    for i in range(c):
        for d in range(c):
            for a in range(kh):
                for b in range(kw):
                    shift = (kh // 2 - a, kw // 2 - b)
                    y[:, i] += theta[d, a, b] * np.roll(x[:, (i + d) % c], shift, axis=(1, 2))
    return y


def matrix_of(function, shape):
    """The dense matrix of a linear function of one (C, H, W) image."""
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return function(units).reshape(len(units), -1).T


def across(matrix, x):
    return torch.einsum("ij,njhw->nihw", matrix, x)


@pytest.mark.parametrize("c", CHANNELS)
def test_the_analysis_gives_real_and_imaginary_parts_of_the_channel_transform(c):
    x = random(c)
    z = np.fft.fft(x.numpy(), norm="ortho")
    half = (c + 1) // 2
    real, imaginary = z.real[:half] * 2**0.5, z.imag[:half] * 2**0.5
    real[0], imaginary[0] = z.real[0], z.real[c // 2] if c % 2 == 0 else 0
    got = circulant.analysis(c) @ x
    np.testing.assert_allclose(got, np.concatenate([real, imaginary]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("c", [*CHANNELS, 511, 512])
def test_synthesis_undoes_analysis_and_norms_are_kept(c):
    there, back = circulant.analysis(c), circulant.synthesis(c)
    assert there.shape == (circulant.spectral_channels(c), c)
    torch.testing.assert_close(back @ there, torch.eye(c, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(back, there.T, rtol=0, atol=0)


@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [((1, 1), (1, 2), (1, 1)), ((2, 1), (0, 3), (1, 2))]
)
def test_stencils_in_the_transformed_channels_equal_the_dense_convolution(c, stride, padding, dilation):
    theta, x = random(c, 3, 5), random(2, c, 8, 11, seed=1)
    z = circulant.apply(
        across(circulant.analysis(c), x),
        *circulant.spectral_stencils(theta),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    got = across(circulant.synthesis(c), z)
    wanted = padded(x, theta, stride, padding, dilation)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("c", CHANNELS)
def test_the_adjoint_in_the_transformed_channels_is_the_true_one(c):
    theta, shape = random(c, 3, 3), (c, 4, 5)
    matrix = matrix_of(lambda x: padded(torch.from_numpy(x), theta), shape)
    x = random(2, *shape, seed=1)
    re, im = circulant.spectral_stencils(theta)
    z = circulant.apply(across(circulant.analysis(c), x), re, im, padding=(1, 1))
    z = circulant.apply(z, *circulant.adjoint_stencils(re, im), padding=(1, 1))
    wanted = (x.flatten(1).numpy() @ matrix.T @ matrix).reshape(x.shape)
    np.testing.assert_allclose(across(circulant.synthesis(c), z), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("c", CHANNELS)
def test_the_dense_kernel_is_the_one_written_out_and_its_diagonals_give_theta_back(c):
    theta = random(c, 3, 2)
    kernel = circulant.circulant_kernel(theta)
    np.testing.assert_array_equal(kernel, dense_kernel(theta.numpy()))
    torch.testing.assert_close(circulant.diagonal_means(kernel), theta, rtol=0, atol=1e-14)


@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize(("kernel", "size"), [((3, 3), (6, 7)), ((5, 3), (5, 4)), ((5, 7), (3, 2))])
def test_the_fourier_form_is_the_convolution_on_a_torus(c, kernel, size):
    theta, x = random(c, *kernel), random(2, c, *size, seed=1)
    wanted = periodic(x.numpy(), theta.numpy())
    np.testing.assert_allclose(circulant.periodic_circulant(x, theta), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("c", CHANNELS)
def test_the_squared_symbol_is_the_adjoint_times_the_convolution_on_a_torus(c):
    theta, shape = random(c, 3, 3), (c, 4, 5)
    matrix = matrix_of(lambda x: periodic(x, theta.numpy()), shape)
    x = random(2, *shape, seed=1)
    wanted = (x.flatten(1).numpy() @ matrix.T @ matrix).reshape(x.shape)
    np.testing.assert_allclose(circulant.periodic_circulant_gram(x, theta), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", [circulant.periodic_circulant, circulant.periodic_circulant_gram])
def test_the_fourier_forms_are_differentiable(function):
    x, theta = random(1, 3, 4, 5).requires_grad_(), random(3, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, theta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fourier_form_is_computed_in_float32_at_least(dtype):
    x, theta = random(1, 6, 8, 8).to(dtype), random(6, 3, 3, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = circulant.periodic_circulant(x, theta)
    assert got.dtype == dtype
    wanted = periodic(x.double().numpy(), theta.double().numpy())
    rounding = 4 * torch.finfo(dtype).eps * np.abs(wanted).max()
    np.testing.assert_allclose(got.double(), wanted, rtol=0, atol=rounding)


@pytest.mark.parametrize("c", [2, 3, 6])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0])
def test_the_fit_by_frequency_is_the_ridge_solution_for_all_unknowns_at_once(c, centered, ridge):
    taps, count = 4, 30
    x, y, start = random(count, c, taps) + 0.4, random(count, c, seed=1) - 0.2, random(c, taps, seed=2)
    gram = FrequencyGram(c, taps, torch.device("cpu"))
    gram.add(x[:11], y[:11])
    gram.add(x[11:], y[11:])
    got_from = gram.centered() if centered else gram
    got = got_from.solve(ridge, start)

    turned = np.stack([np.roll(x, -d, axis=1) for d in range(c)], axis=2)  # (M, C, D, T)
    rows, wanted = turned.reshape(count, c, -1), y.numpy()
    if centered:
        rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    energy = (x - x.mean(0) if centered else x).square().sum() / (c * taps)
    pull = (ridge * float(energy) * c) ** 0.5 * np.eye(c * taps)  # c copies of theta make the dense kernel
    solution = np.linalg.lstsq(
        np.concatenate([rows.reshape(-1, c * taps), pull]),
        np.concatenate([wanted.ravel(), pull @ start.flatten().numpy()]),
        rcond=None,
    )[0]
    np.testing.assert_allclose(got.flatten(), solution, rtol=0, atol=1e-10)
    error = np.square(rows @ solution - wanted).sum()
    assert float(got_from.squared_error(got).sum()) == pytest.approx(error, abs=1e-9)
    assert float(got_from.output_output.sum()) == pytest.approx(np.square(wanted).sum(), abs=1e-9)
    shift = (y.numpy() - turned.reshape(count, c, -1) @ solution).mean(0)
    np.testing.assert_allclose(gram.intercept(got), shift, rtol=0, atol=1e-10)


def test_dead_inputs_give_the_start_back():
    start = random(4, 9)
    gram = FrequencyGram(4, 9, torch.device("cpu"))
    gram.add(torch.zeros(20, 4, 9), torch.ones(20, 4))
    torch.testing.assert_close(gram.solve(1e-5, start), start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(bad):
    gram = FrequencyGram(4, 9, torch.device("cpu"))
    gram.add(torch.full((20, 4, 9), bad), torch.ones(20, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gram.solve(1e-3, random(4, 9))


@pytest.mark.parametrize(
    "spec", [conv(6, padding=(1, 1), bias=True), conv(5, (4, 2), stride=(2, 1))], ids=str
)
def test_a_convolution_that_is_circulant_is_found_from_its_activations(spec):
    torch.manual_seed(3)
    exact, op = Circulant().build(spec).double(), Circulant().build(spec).double()
    images = random(15, spec.in_channels, 9, 8)
    statistics = op.statistics(free_means=False)
    statistics.add(images, exact(images).detach())
    fit = op.fit_(statistics)
    assert fit.relative_error < 1e-4 < fit.start_error
    torch.testing.assert_close(op(images), exact(images), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (conv(8, (1, 1)), "a 1x1 kernel costs less than the transforms across channels"),
        (conv(8, groups=2), "already grouped (2 groups)"),
        (ConvSpec(in_channels=4, out_channels=8, kernel_size=(3, 3)), "channels change (4 to 8)"),
        (conv(1), "a single channel couples with no other"),
        (conv(8, (2, 3), stride=(3, 2), padding_mode="circular"), None),
    ],
)
def test_why_a_convolution_can_not_be_taken_is_said_in_words(spec, reason):
    assert Circulant().why_not(spec) == reason


@pytest.mark.parametrize(
    ("spec", "macs"),
    [
        (conv(2, padding=(1, 1)), (2 * (2 * 2 + 2 * 9) * 64, 2 * 2 * 9 * 64)),
        (conv(6, (1, 2)), (6 * (6 * 64 + 6 * 56 + 2 * 2 * 56), 6 * 6 * 2 * 56)),
    ],
    ids=str,
)
def test_a_site_is_kept_where_the_transforms_cost_more_than_the_convolution(spec, macs):
    site = Site(name="a", spec=spec, sizes=(Size(height=8, width=8),))
    wanted = f"would not be cheaper: {macs[0]:,} MACs instead of {macs[1]:,}"
    assert site.why_not(Circulant()) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bases_are_exact_in_every_dtype(dtype):
    op = Circulant().build(conv(6)).to(torch.bfloat16).to(dtype)
    assert op.analysis.dtype == op.synthesis.dtype == dtype
    assert torch.equal(op.analysis[:, :, 0, 0], circulant.analysis(6).to(dtype))
    assert torch.equal(op.synthesis[:, :, 0, 0], circulant.synthesis(6).to(dtype))


def test_an_operator_made_without_memory_gets_its_bases_with_its_weights():
    exact = Circulant().build(conv(6))
    with torch.device("meta"):
        op = Circulant().build(conv(6))
    op = op.to_empty(device="cpu")
    op.load_state_dict(exact.state_dict())
    x = torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(op(x), exact(x), rtol=0, atol=0)


def test_only_the_weights_are_stored():
    assert set(Circulant().build(conv(6, bias=True)).state_dict()) == {"theta", "bias"}


def test_output_channels_have_one_scale_together():
    op = Circulant().build(conv(4))
    with pytest.raises(ValueError, match="one scale"):
        op.scale_(torch.tensor([1.0, 1.0, 2.0, 1.0]))


def test_a_lowered_operator_keeps_its_weights_when_the_operator_trains_on():
    op, x = Circulant().build(conv(6, padding=(1, 1))), torch.randn(1, 6, 5, 5)
    lowered = op.lowerings(Size(height=5, width=5), 1e-3)[0].module
    before = lowered(x)
    with torch.no_grad():
        op.theta.add_(1)
    assert torch.equal(lowered(x), before)
    assert not any(parameter.requires_grad for parameter in lowered.parameters())


def test_resnet18_keeps_the_parameters_that_the_arithmetic_says():
    model, example = resnet18(weights=None), torch.randn(1, 3, 64, 64)
    sites = find_sites(model, example)
    plan = make_plan(sites, rules_for(Circulant()))
    originals = replace_(model, plan)
    assert len(plan.methods()) == len(originals) == 13
    assert count_params(model) == 2_278_824


def test_the_projection_keeps_what_a_circulant_kernel_holds_of_a_network():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    theta = random(4, 3, 3).float()
    noise = torch.randn_like(model[0].weight)
    noise -= circulant.circulant_kernel(circulant.diagonal_means(noise))  # orthogonal to the family
    with torch.no_grad():
        model[0].weight.copy_(circulant.circulant_kernel(theta) + noise)
    original = copy.deepcopy(model[0])
    sites = find_sites(model, torch.randn(1, 4, 8, 8))
    fits = project_(model, replace_(model, make_plan(sites, rules_for(Circulant()))))
    torch.testing.assert_close(model[0].theta, theta, rtol=0, atol=1e-6)
    wanted = float((noise.norm() / original.weight.norm()).detach())
    assert fits["0"].kernel_error == pytest.approx(wanted, abs=1e-6)

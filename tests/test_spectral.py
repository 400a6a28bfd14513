"""The periodic solve, as a transform, as a stencil and by real matrices, against dense matrices in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import random
from hypothesis import given, settings
from hypothesis import strategies as st

from lcc.ops.spectral import (
    RealFourier,
    apply_real_fourier,
    green,
    laid_out_as,
    real_fourier,
    solve_periodic,
)

KERNELS = [(3, 3), (5, 5), (3, 5), (1, 3), (7, 7)]
SIZES = [(6, 5), (5, 6), (8, 8), (7, 7), (2, 3), (1, 4), (5, 1), (2, 2), (1, 1)]
HARD = [((3, 3), (8, 6)), ((3, 3), (7, 9)), ((5, 3), (9, 6)), ((5, 5), (4, 5)), ((3, 3), (12, 12))]


def periodic(image, taps):
    """The stencil (kh, kw) on images (..., H, W) that go on periodically: a sum of rolled images."""
    kh, kw = taps.shape
    return sum(
        taps[a, b] * np.roll(image, (kh // 2 - a, kw // 2 - b), axis=(-2, -1))
        for a in range(kh)
        for b in range(kw)
    )


def system(taps, step, height, width):
    """I + step K^T K as a dense matrix over the pixels."""
    units = np.eye(height * width).reshape(-1, height, width)
    k = periodic(units, taps).reshape(len(units), -1).T
    return np.eye(len(k)) + step * k.T @ k


def solved(rhs, stencil, step):
    """The solve of rhs (N, C, H, W), channel by channel, dense."""
    out = np.zeros(rhs.shape)
    for c, taps in enumerate(stencil.double().numpy()):
        flat = rhs[:, c].double().numpy().reshape(len(rhs), -1).T
        out[:, c] = np.linalg.solve(system(taps, step, *rhs.shape[2:]), flat).T.reshape(out[:, c].shape)
    return out


def as_stencil(x, taps):
    """What Green's taps (C, a, b) do to periodic images x (N, C, H, W), from the stated offsets."""
    return np.stack([periodic(x[:, c].numpy(), tap) for c, tap in enumerate(taps.numpy())], axis=1)


def relative(got, wanted):
    return np.linalg.norm(np.asarray(got) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_the_solve_is_the_dense_one_on_a_periodic_image(kernel, size):
    rhs, stencil = random(2, 3, *size, seed=1), random(3, *kernel, seed=2)
    for step in (0.1, 1.0, 7.0):
        got = solve_periodic(rhs, stencil, step).numpy()
        np.testing.assert_allclose(got, solved(rhs, stencil, step), rtol=0, atol=1e-10)


def test_a_learned_step_solves_like_a_fixed_one():
    rhs, stencil = random(2, 3, 6, 5), random(3, 3, 3, seed=1)
    learned = solve_periodic(rhs, stencil, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(learned, solve_periodic(rhs, stencil, 0.7))


@pytest.mark.parametrize(("kernel", "size"), [((3, 3), (4, 3)), ((5, 3), (3, 4)), ((3, 3), (1, 2))])
def test_gradients_reach_the_image_the_stencil_and_the_step(kernel, size):
    inputs = (random(2, 2, *size, seed=1), random(2, *kernel, seed=2), torch.tensor(0.6).double())
    assert torch.autograd.gradcheck(solve_periodic, tuple(part.requires_grad_() for part in inputs))


@given(
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5])),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    scale=st.floats(1e-3, 1e3),
    step=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_solve_never_makes_an_image_larger_and_keeps_its_mean_under_a_difference(
    kernel, size, scale, step, seed
):
    rhs, stencil = random(1, 2, *size, seed=seed), scale * random(2, *kernel, seed=seed + 1)
    unit = solve_periodic(rhs, stencil, step)
    assert bool((unit.norm(dim=(2, 3)) <= rhs.norm(dim=(2, 3)) * (1 + 1e-12)).all())
    difference = stencil - stencil.mean((1, 2), keepdim=True)  # its symbol is zero at frequency zero
    kept = solve_periodic(rhs, difference, step).mean((2, 3))
    torch.testing.assert_close(kept, rhs.mean((2, 3)), rtol=1e-6, atol=1e-6)


def test_the_layout_of_the_image_is_kept():
    rhs, stencil = random(2, 4, 6, 5), random(4, 3, 3, seed=1)
    last = rhs.to(memory_format=torch.channels_last)
    got = solve_periodic(last, stencil, 1.0)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert solve_periodic(rhs, stencil, 1.0).is_contiguous()
    assert solve_periodic(rhs.transpose(2, 3), stencil, 1.0).is_contiguous()
    torch.testing.assert_close(got, solve_periodic(rhs, stencil, 1.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_laying_out_keeps_the_numbers_and_takes_dtype_and_layout_of_the_model(layout, dtype):
    x = torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=layout)
    y = random(2, 3, 4, 5)
    got = laid_out_as(x, y)
    assert got.dtype == dtype
    assert got.stride() == x.stride()
    assert torch.equal(got, y.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_the_transforms_are_at_least_float32(dtype):
    rhs, stencil = random(2, 3, 8, 6).to(dtype), random(3, 3, 3, seed=1).to(dtype)
    got = solve_periodic(rhs, stencil, 2.0)
    assert got.dtype == dtype
    # The inputs are exactly representable, so that only the transforms and the result round.
    rounding = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert relative(got.double(), solved(rhs, stencil, 2.0)) <= rounding


def test_under_autocast_the_solve_is_the_same_to_the_bit():
    rhs, stencil = random(2, 3, 8, 6).float(), random(3, 3, 3, seed=1).float()
    wanted = solve_periodic(rhs, stencil, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve_periodic(rhs, stencil, 1.0), wanted)
        assert torch.is_autocast_enabled("cpu")
        half = solve_periodic(rhs.bfloat16(), stencil, 1.0)
    assert half.dtype == torch.bfloat16
    assert relative(half.double(), solved(rhs.bfloat16(), stencil, 1.0)) <= 2**-8


def test_autocast_gradients_are_finite_and_those_of_float32():
    def gradient(*, autocast):
        stencil = random(3, 3, 3, seed=1).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            total = solve_periodic(random(2, 3, 8, 6).float(), stencil, 1.0).square().sum()
        return torch.autograd.grad(total, stencil)[0]

    assert torch.equal(gradient(autocast=True), gradient(autocast=False))


@pytest.mark.parametrize("tolerance", [0.3, 1e-1, 1e-2, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize(("kernel", "size"), HARD)
def test_the_stated_error_of_a_short_stencil_bounds_that_of_every_image(kernel, size, tolerance):
    stencil, step = 0.3 * random(3, *kernel, seed=3), 0.8
    taps, stated = green(stencil, step, *size, tolerance)
    assert stated <= tolerance
    smooth = random(4, 3, *size, seed=4).cumsum(-1).cumsum(-2)
    for x in (random(8, 3, *size, seed=5), smooth):
        wanted = solved(x, stencil, step)
        error = np.linalg.norm(as_stencil(x, taps) - wanted, axis=(2, 3))
        assert np.all(error <= (stated + 1e-13) * np.linalg.norm(wanted, axis=(2, 3)))


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize(("kernel", "size"), HARD)
def test_the_stated_error_is_that_of_the_worst_image(kernel, size, tolerance):
    stencil, step = 0.3 * random(3, *kernel, seed=3), 0.8
    taps, stated = green(stencil, step, *size, tolerance)
    worst = 0.0
    for short, tap in zip(taps.numpy(), stencil.numpy(), strict=True):
        units = np.eye(size[0] * size[1]).reshape(-1, *size)
        matrix = periodic(units, short).reshape(len(units), -1).T
        # |(short - solve) f| / |solve f| over all f is the norm of short solve^-1 - I.
        worst = max(worst, np.linalg.norm(matrix @ system(tap, step, *size) - np.eye(len(matrix)), 2))
    assert stated == pytest.approx(worst, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize(("kernel", "size"), HARD)
def test_a_constant_image_is_answered_exactly(kernel, size, tolerance):
    stencil, step = 0.3 * random(3, *kernel, seed=6), 0.8
    taps, _ = green(stencil, step, *size, tolerance)
    exact = 1 / (1 + step * stencil.sum((1, 2)) ** 2)
    torch.testing.assert_close(taps.sum((1, 2)), exact, rtol=1e-12, atol=1e-12)


def cut(taps, size, stencil, step):
    """The worst relative error of the dense Green's function cut to `size`, the rest given to the centre."""
    worst = 0.0
    height, width = taps
    for tap in stencil.numpy():
        matrix = system(tap, step, *size)
        units = np.eye(len(matrix))[0].reshape(size)
        response = np.linalg.solve(matrix, units.ravel()).reshape(size)
        rows = (np.arange(height) - height // 2) % size[0]
        columns = (np.arange(width) - width // 2) % size[1]
        kept = np.zeros(size)
        kept[np.ix_(rows, columns)] = response[np.ix_(rows, columns)]
        kept[0, 0] += response.sum() - kept.sum()
        got, wanted = np.fft.fft2(kept), np.fft.fft2(response)
        worst = max(worst, np.abs((got - wanted) / wanted).max())
    return worst


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize(("kernel", "size"), HARD)
def test_no_smaller_square_stencil_meets_the_tolerance(kernel, size, tolerance):
    stencil, step = 0.3 * random(3, *kernel, seed=7), 0.8
    taps, _ = green(stencil, step, *size, tolerance)
    found = taps.shape[1:]
    assert all(n <= m for n, m in zip(found, size, strict=True))
    for side in range(3, max(found), 2):
        smaller = (min(side, size[0]), min(side, size[1]))
        assert cut(smaller, size, stencil, step) > tolerance


def test_the_stencil_grows_with_the_stiffness_up_to_the_image():
    stencil = random(4, 3, 3, seed=8)
    stencil = stencil / stencil.abs().sum((1, 2), keepdim=True)
    sides = [green(stencil, step, 32, 32, 1e-3).taps.shape[1] for step in (0.03, 0.3, 3.0, 1e4)]
    assert sides == sorted(sides)
    assert sides[0] <= 7
    assert sides[-1] == 32


@pytest.mark.parametrize("size", [(6, 5), (5, 8), (4, 4), (7, 7), (2, 2), (1, 1), (1, 6), (2, 9)])
def test_a_stencil_as_large_as_the_image_is_exact(size):
    stencil, step = random(3, 5, 3, seed=9), 50.0
    taps, stated = green(stencil, step, *size, 1e-15)
    assert taps.shape[1:] == size
    assert stated <= 1e-12
    x = random(2, 3, *size, seed=10)
    np.testing.assert_allclose(as_stencil(x, taps), solved(x, stencil, step), rtol=0, atol=1e-12)


def test_a_short_stencil_has_the_dtype_of_the_stencil_and_no_gradient():
    stencil = random(2, 3, 3).float().requires_grad_()
    taps, _ = green(stencil, 0.5, 8, 8, 1e-3)
    assert taps.dtype == torch.float32
    assert not taps.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_real_matrices_solve_exactly(kernel, size):
    x, stencil, step = random(2, 3, *size, seed=11), random(3, *kernel, seed=12), 1.7
    got = apply_real_fourier(x, real_fourier(stencil, step, *size))
    assert not got.is_complex()
    np.testing.assert_allclose(got.numpy(), solved(x, stencil, step), rtol=0, atol=1e-10)


def symmetric_in_rows(stencil):
    return (stencil + stencil.flip(1)) / 2


def separable(stencil):
    return stencil[:, :, :1] * stencil[:, :1, :]


@pytest.mark.parametrize("even_in_each_frequency", [symmetric_in_rows, separable])
@pytest.mark.parametrize("size", [(6, 5), (7, 7), (8, 4)])
def test_no_product_of_different_functions_is_needed_where_the_symbol_is_even(even_in_each_frequency, size):
    stencil = even_in_each_frequency(random(3, 3, 5, seed=13))
    fourier = real_fourier(stencil, 0.9, *size)
    assert fourier.mixed is None
    x = random(2, 3, *size, seed=14)
    got = apply_real_fourier(x, fourier).numpy()
    np.testing.assert_allclose(got, solved(x, stencil, 0.9), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(6, 5), (1, 1), (2, 2), (7, 8)])
def test_the_real_bases_are_orthonormal_and_a_swap_undoes_itself(size):
    fourier: RealFourier = real_fourier(random(2, 3, 3, seed=15), 1.0, *size)
    bases = ((fourier.rows, fourier.swap_rows), (fourier.columns, fourier.swap_columns))
    for n, (basis, swap) in zip(size, bases, strict=True):
        np.testing.assert_allclose(basis.numpy() @ basis.numpy().T, np.eye(n), atol=1e-12)
        assert swap[swap].tolist() == list(range(n))


def test_real_matrices_have_the_dtype_of_the_stencil():
    stencil = random(3, 3, 3, seed=16).float()
    fourier = real_fourier(stencil, 1.0, 8, 6)
    x = random(2, 3, 8, 6, seed=17).float()
    got = apply_real_fourier(x, fourier)
    assert got.dtype == torch.float32
    assert relative(got.double(), solved(x, stencil, 1.0)) <= 1e-6

"""Depthwise stencils against sums of shifted images, and their gain against dense eigenvalues, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import random
from hypothesis import given, settings
from hypothesis import strategies as st

from lcc.ops.stencil import depthwise, depthwise_adjoint, gain, periodic_grid, slack

KERNELS = [(1, 1), (3, 3), (5, 5), (3, 5), (5, 3), (1, 3), (7, 1), (9, 7)]
SIZES = [(6, 5), (1, 4), (2, 2), (1, 1)]


def shifted(image, rows, columns, *, periodic):
    """The image (H, W) with pixel (i, j) taken from (i + rows, j + columns)."""
    if periodic:
        return np.roll(image, (-rows, -columns), axis=(0, 1))
    height, width = image.shape
    around = np.pad(image, ((height + abs(rows),) * 2, (width + abs(columns),) * 2))
    top, left = height + abs(rows) + rows, width + abs(columns) + columns
    return around[top : top + height, left : left + width]


def stencil_of(image, taps, *, periodic=False):
    """The sum over the taps (kh, kw) of the shifted image."""
    kh, kw = taps.shape
    return sum(
        taps[a, b] * shifted(image, a - kh // 2, b - kw // 2, periodic=periodic)
        for a in range(kh)
        for b in range(kw)
    )


def dense(taps, height, width, *, periodic=False):
    """The matrix (H W, H W) of a stencil, column by column from the images with one bright pixel."""
    units = np.eye(height * width).reshape(-1, height, width)
    return np.stack([stencil_of(unit, taps, periodic=periodic).ravel() for unit in units], axis=1)


def symbol_squared(taps, count):
    """|k^|^2 from its definition at count x count frequencies."""
    kh, kw = taps.shape
    turns = 2 * np.pi * np.arange(count) / count
    rows = np.exp(1j * np.outer(turns, np.arange(kh)))
    columns = np.exp(1j * np.outer(turns, np.arange(kw)))
    return np.abs(rows @ taps @ columns.T) ** 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_a_stencil_sums_its_neighbours_with_zeros_outside(kernel, size):
    x, taps = random(2, 3, *size, seed=1), random(3, *kernel, seed=2)
    wanted = [
        [stencil_of(channel.numpy(), tap.numpy()) for channel, tap in zip(image, taps, strict=True)]
        for image in x
    ]
    np.testing.assert_allclose(depthwise(x, taps).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_the_adjoint_is_the_transposed_matrix(kernel, size):
    x, taps = random(2, 3, *size, seed=3), random(3, *kernel, seed=4)
    transposed = np.stack([dense(tap.numpy(), *size).T for tap in taps])
    wanted = np.einsum("cpq,ncq->ncp", transposed, x.flatten(2).numpy()).reshape(x.shape)
    np.testing.assert_allclose(depthwise_adjoint(x, taps).numpy(), wanted, atol=1e-12)


@given(
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5, 7])),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_adjoint_moves_the_stencil_across_inner_products(kernel, size, seed):
    taps = random(2, *kernel, seed=seed)
    x, y = random(1, 2, *size, seed=seed + 1), random(1, 2, *size, seed=seed + 2)
    across = float((depthwise_adjoint(x, taps) * y).sum())
    assert across == pytest.approx(float((x * depthwise(y, taps)).sum()), abs=1e-10)


def test_the_adjoint_is_not_the_stencil_itself():
    x, taps = random(1, 2, 6, 5, seed=5), random(2, 3, 3, seed=6)
    assert (depthwise_adjoint(x, taps) - depthwise(x, taps)).norm() > 0.1 * x.norm()


def test_both_directions_are_differentiable_in_image_and_stencil():
    x, taps = random(1, 2, 4, 3).requires_grad_(), random(2, 3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(depthwise, (x, taps))
    assert torch.autograd.gradcheck(depthwise_adjoint, (x, taps))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_the_grid_is_the_reflected_response_to_a_delta_also_where_taps_wrap(kernel, size):
    taps = random(3, *kernel, seed=7)
    delta = np.zeros(size)
    delta[0, 0] = 1
    for tap, grid in zip(taps.numpy(), periodic_grid(taps, *size).numpy(), strict=True):
        response = stencil_of(delta, tap, periodic=True)
        reflected = response[-np.arange(size[0]) % size[0]][:, -np.arange(size[1]) % size[1]]
        np.testing.assert_allclose(grid, reflected, atol=1e-12)


def test_a_stencil_larger_than_the_image_adds_up_where_it_wraps():
    taps = torch.arange(1.0, 16.0, dtype=torch.float64).reshape(1, 3, 5)
    grid = periodic_grid(taps, 2, 3)
    # Rows -1, 0, 1 fall on 1, 0, 1; columns -2..2 on 1, 2, 0, 1, 2.
    wanted = [[8.0, 6 + 9, 7 + 10], [3 + 13, 1 + 4 + 11 + 14, 2 + 5 + 12 + 15]]
    assert grid.tolist() == [wanted]
    assert float(grid.sum()) == float(taps.sum())


def test_the_grid_keeps_dtype_and_gradient():
    taps = random(2, 3, 3).float().requires_grad_()
    grid = periodic_grid(taps, 2, 2)
    assert grid.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(grid.sum(), taps)[0], torch.ones_like(taps))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(7, 6), (4, 9), (1, 5), (2, 2)])
def test_the_gain_bounds_the_eigenvalues_of_a_zero_padded_image(kernel, size):
    taps = random(4, *kernel, seed=8)
    for tap, bound in zip(taps.numpy(), gain(taps).tolist(), strict=True):
        matrix = dense(tap, *size)
        assert np.linalg.eigvalsh(matrix.T @ matrix).max() <= bound * (1 + 1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gain_of_a_smoothing_stencil_is_attained_on_any_periodic_image(kernel):
    taps = random(3, *kernel, seed=9).abs()
    for tap, bound in zip(taps.numpy(), gain(taps).tolist(), strict=True):
        for size in [(5, 7), (4, 4), (1, 3)]:
            matrix = dense(tap, *size, periodic=True)
            assert np.linalg.eigvalsh(matrix.T @ matrix).max() == pytest.approx(bound, rel=1e-10)


@pytest.mark.parametrize(("kernel", "size"), [((3, 1), (64, 1)), ((5, 1), (64, 1)), ((1, 7), (1, 64))])
def test_the_gain_of_any_line_is_attained_on_a_periodic_line(kernel, size):
    taps = random(5, *kernel, seed=10)
    for tap, bound in zip(taps.numpy(), gain(taps).tolist(), strict=True):
        matrix = dense(tap, *size, periodic=True)
        assert np.linalg.eigvalsh(matrix.T @ matrix).max() == pytest.approx(bound, rel=1e-10)


@given(side=st.sampled_from([3, 5]), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_gain_misses_the_true_maximum_by_no_more_than_its_grid_can(side, seed):
    # A trigonometric polynomial of degree n takes at least cos(pi n / N) of its maximum at N even points.
    taps = random(1, side, side, seed=seed)
    true, got = symbol_squared(taps[0].numpy(), 512).max(), float(gain(taps))
    assert true * np.cos(np.pi * (side - 1) / 64) ** 2 <= got <= true * (1 + 1e-9)


def test_the_gain_is_each_channels_own_and_quadratic_in_the_stencil():
    taps = random(3, 3, 3, seed=11)
    scale = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    torch.testing.assert_close(gain(taps * scale[:, None, None]), gain(taps) * scale**2)
    torch.testing.assert_close(gain(taps[1:2]), gain(taps)[1:2])


def test_the_gain_of_a_second_difference_is_sixty_four():
    taps = torch.tensor([[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]])  # -8 at the highest frequency of both axes
    assert gain(taps).tolist() == pytest.approx([64])
    assert gain(taps).dtype == torch.float64


@pytest.mark.parametrize("size", [3, 31, 33, 51])
def test_between_the_grids_points_a_symbol_is_no_larger_than_the_slack_says(size):
    stencil = random(2, size, size)
    true = torch.fft.rfft2(stencil, s=(2048, 2048)).abs().square().amax((1, 2))
    bound = gain(stencil) * slack(size, size)
    assert (true <= bound * (1 + 1e-9)).all()
    assert (bound <= true * 1.4).all()

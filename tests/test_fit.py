"""Least squares from Gram matrices, against the full regressor matrix and numpy's own solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lcc.ops.fit import ArrowGram, ArrowWeights, best_ridge, relative_error

COMMON, GROUPS, WIDTH, OUTPUTS = 5, 3, 4, 2
SHAPES = [(5, 3, 4, 2), (1, 1, 1, 1), (4, 4, 8, 1), (6, 1, 3, 6), (3, 3, 0, 1)]


def samples(count=60, shape=(COMMON, GROUPS, WIDTH, OUTPUTS), *, seed=0, offset=0.7):
    """Common, private and output samples that depend on each other and have means."""
    common, groups, width, outputs = shape
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(count, 3))
    x, z, y = (
        hidden @ generator.normal(size=(3, size)) + generator.normal(size=(count, size)) + offset
        for size in (common, groups * width, groups * outputs)
    )
    return x, z.reshape(count, groups, width), y.reshape(count, groups, outputs)


def gram_of(x, z, y, *, dtype=torch.float64):
    gram = ArrowGram(x.shape[1], z.shape[1:], y.shape[2], torch.device("cpu"))
    gram.add(*(torch.from_numpy(array).to(dtype) for array in (x, z, y)))
    return gram


def weights(shape=(COMMON, GROUPS, WIDTH, OUTPUTS), seed=5):
    common, groups, width, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    return ArrowWeights(
        torch.randn(groups, outputs, common, dtype=torch.float64, generator=generator),
        torch.randn(groups, outputs, width, dtype=torch.float64, generator=generator),
    )


def regressors(x, z, group):
    """The full regressor matrix of one group, (M, c + p)."""
    return np.concatenate([x, z[:, group]], axis=1)


def stacked(weights, group):
    """One group's weights for that matrix, (q, c + p)."""
    return torch.cat([weights.common[group], weights.private[group]], dim=1).numpy()


def ridge_solution(x, z, y, group, ridge, start):
    """The minimum of |Ab - y|^2 + pull |b - start|^2 as ordinary least squares on more rows."""
    matrix = regressors(x, z, group)
    root = np.sqrt(ridge * np.square(x).sum() / x.shape[1])
    more = root * np.eye(matrix.shape[1])
    rows = np.concatenate([matrix, more])
    wanted = np.concatenate([y[:, group], more @ stacked(start, group).T])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def without_means(*arrays):
    return [array - array.mean(0) for array in arrays]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0, 10.0])
def test_solve_gives_the_ridge_solution_of_the_full_regression(shape, ridge):
    x, z, y = samples(shape=shape)
    start = weights(shape)
    got = gram_of(x, z, y).solve(ridge, start)
    for group in range(shape[1]):
        wanted = ridge_solution(x, z, y, group, ridge, start)
        np.testing.assert_allclose(stacked(got, group), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_vanishing_ridge_gives_ordinary_least_squares(group):
    x, z, y = samples()
    got = gram_of(x, z, y).solve(1e-14, weights())
    wanted = np.linalg.lstsq(regressors(x, z, group), y[:, group], rcond=None)[0].T
    np.testing.assert_allclose(stacked(got, group), wanted, rtol=0, atol=1e-9)


def test_a_huge_ridge_gives_the_start_back():
    start = weights()
    got = gram_of(*samples()).solve(1e15, start)
    for a, b in zip(got, start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_more_unknowns_than_samples_still_give_the_ridge_solution():
    x, z, y = samples(count=4)
    start = weights()
    got = gram_of(x, z, y).solve(1e-3, start)
    for group in range(GROUPS):
        wanted = ridge_solution(x, z, y, group, 1e-3, start)
        np.testing.assert_allclose(stacked(got, group), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "noise"), [(40, 1.0), (400, 0.01), (2000, 0.001)])
def test_float32_samples_that_nearly_depend_on_each_other_still_give_a_better_fit(count, noise):
    shape = (512, 3, 8, 1)
    generator = np.random.default_rng(1)
    hidden = generator.normal(size=(count, 3))

    def dependent(*sizes):
        mixed = hidden @ generator.normal(size=(3, np.prod(sizes)))
        return (mixed + noise * generator.normal(size=mixed.shape) + 3).reshape(count, *sizes)

    x, z, y = dependent(512), dependent(3, 8), samples(count, shape)[2]
    start, exact = weights(shape), gram_of(x, z, y).centered()
    got = gram_of(x, z, y, dtype=torch.float32).centered().solve(1e-5, start)
    assert exact.squared_error(got).sum() < 0.1 * exact.squared_error(start).sum()


def test_inputs_that_are_all_zero_give_the_start_back():
    x, z, y = (np.zeros_like(array) for array in samples())
    start = weights()
    got = gram_of(x, z, y).solve(1e-5, start)
    for a, b in zip(got, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_dead_common_regressor_keeps_its_start_weight():
    x, z, y = samples()
    x[:, 2] = 0
    start = weights()
    got = gram_of(x, z, y).solve(1e-4, start)
    torch.testing.assert_close(got.common[:, :, 2], start.common[:, :, 2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_error_is_that_of_the_predictions(shape):
    x, z, y = samples(shape=shape)
    chosen = weights(shape)
    got = gram_of(x, z, y).squared_error(chosen).numpy()
    for group in range(shape[1]):
        wrong = y[:, group] - regressors(x, z, group) @ stacked(chosen, group).T
        np.testing.assert_allclose(got[group], np.square(wrong).sum(0), rtol=1e-9)


def test_squared_error_of_a_perfect_fit_is_not_negative():
    x, z, y = samples()
    exact = weights()
    for group in range(GROUPS):
        y[:, group] = regressors(x, z, group) @ stacked(exact, group).T
    assert (gram_of(x, z, y).squared_error(exact) >= 0).all()


def test_the_solution_has_the_least_penalised_error_of_its_neighbours():
    gram, start = gram_of(*samples()), weights()
    ridge, best = 0.3, gram_of(*samples()).solve(0.3, start)
    pull = ridge * float(gram.common_common.diagonal().mean())

    def penalised(candidate):
        distance = sum((a - b).square().sum() for a, b in zip(candidate, start, strict=True))
        return float(gram.squared_error(candidate).sum() + pull * distance)

    for seed in range(5):
        near = ArrowWeights(*(a + 1e-4 * b for a, b in zip(best, weights(seed=seed), strict=True)))
        assert penalised(near) > penalised(best)


def test_centered_moments_are_those_of_samples_without_their_means():
    x, z, y = samples()
    start = weights()
    got = gram_of(x, z, y).centered().solve(0.01, start)
    for group in range(GROUPS):
        wanted = ridge_solution(*without_means(x, z, y), group, 0.01, start)
        np.testing.assert_allclose(stacked(got, group), wanted, rtol=0, atol=1e-9)


def test_centered_squared_error_leaves_the_means_out():
    x, z, y = samples()
    chosen = weights()
    got = gram_of(x, z, y).centered().squared_error(chosen).numpy()
    x, z, y = without_means(x, z, y)
    for group in range(GROUPS):
        wrong = y[:, group] - regressors(x, z, group) @ stacked(chosen, group).T
        np.testing.assert_allclose(got[group], np.square(wrong).sum(0), rtol=1e-9)


def test_centering_leaves_the_original_moments_alone():
    gram, fresh = gram_of(*samples()), gram_of(*samples())
    gram.centered()
    torch.testing.assert_close(vars(gram), vars(fresh), rtol=0, atol=0)


def test_the_intercept_makes_the_mean_of_the_predictions_right():
    x, z, y = samples()
    chosen = weights()
    got = gram_of(x, z, y).intercept(chosen).numpy()
    for group in range(GROUPS):
        wrong = y[:, group] - regressors(x, z, group) @ stacked(chosen, group).T
        np.testing.assert_allclose(got[group], wrong.mean(0), rtol=0, atol=1e-9)


def test_a_centered_fit_with_its_intercept_is_least_squares_with_a_column_of_ones():
    x, z, y = samples()
    gram = gram_of(x, z, y)
    got = gram.centered().solve(1e-14, weights())
    shift = gram.intercept(got).numpy()
    for group in range(GROUPS):
        matrix = np.concatenate([regressors(x, z, group), np.ones((len(x), 1))], axis=1)
        wanted = np.linalg.lstsq(matrix, y[:, group], rcond=None)[0].T
        both = np.concatenate([stacked(got, group), shift[group][:, None]], axis=1)
        np.testing.assert_allclose(both, wanted, rtol=0, atol=1e-9)


def test_adding_samples_in_parts_is_adding_them_at_once():
    x, z, y = samples()
    parts, whole = gram_of(x[:13], z[:13], y[:13]), gram_of(x, z, y)
    parts.add(*(torch.from_numpy(array[13:]) for array in (x, z, y)))
    torch.testing.assert_close(vars(parts), vars(whole), rtol=1e-12, atol=1e-12)


def test_the_sum_of_two_grams_is_the_gram_of_all_their_samples():
    x, z, y = samples()
    total = gram_of(x[:25], z[:25], y[:25]) + gram_of(x[25:], z[25:], y[25:])
    torch.testing.assert_close(vars(total), vars(gram_of(x, z, y)), rtol=1e-12, atol=1e-12)


def test_the_sum_of_two_grams_leaves_both_alone():
    first, second = gram_of(*samples()), gram_of(*samples(seed=1))
    first + second
    torch.testing.assert_close(vars(first), vars(gram_of(*samples())), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_short_floats_are_summed_without_overflow(dtype):
    x, z, y = samples(count=4000, offset=5)
    got = gram_of(x, z, y, dtype=dtype)
    assert got.common_common.dtype == torch.float64
    rounded = torch.from_numpy(x).to(dtype).double()
    bound = 4000 * 2**-24  # of sums of so many in float32, in whatever order a CPU takes them
    torch.testing.assert_close(got.common_common, rounded.T @ rounded, rtol=bound, atol=0)


def test_relative_error_is_the_ratio_of_norms():
    wrong, right = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    assert relative_error(wrong.square(), right.square()) == pytest.approx(0.5)


def test_relative_error_of_nothing_to_be_explained_is_zero_if_nothing_is_wrong():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_relative_error_of_something_wrong_where_nothing_was_wanted_is_infinite():
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")


def test_relative_error_of_half_numbers_does_not_overflow():
    squares = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert relative_error(squares, squares) == 1


def test_solvers_use_one_thread_and_give_the_others_back(monkeypatch):
    seen, solved = [], ArrowGram.solve

    def solve(gram, *arguments):
        seen.append(blas_threads())
        return solved(gram, *arguments)

    monkeypatch.setattr(ArrowGram, "solve", solve)
    with threadpool_limits(2, user_api="blas"):
        best_ridge(gram_of(*samples()), gram_of(*samples(seed=1)), weights(), centered=False)
        assert set(blas_threads()) == {2}
    assert seen
    assert all(set(threads) == {1} for threads in seen)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

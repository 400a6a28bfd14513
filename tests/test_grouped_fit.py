"""Least squares of grouped regressions, against numpy's lstsq on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcc.ops.fit import best_ridge
from lcc.ops.grouped_fit import GroupedGram

GROUPS, WIDTH, OUTPUTS = 3, 4, 2


def samples(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, GROUPS, WIDTH, dtype=torch.float64, generator=generator) + 0.5
    y = torch.randn(count, GROUPS, OUTPUTS, dtype=torch.float64, generator=generator) - 0.3
    return x, y + x[:, :, :OUTPUTS]


def gram(*parts):
    total = GroupedGram(GROUPS, WIDTH, OUTPUTS, torch.device("cpu"))
    for x, y in parts:
        total.add(x, y)
    return total


def start(fill=0.0):
    return torch.full((GROUPS, OUTPUTS, WIDTH), fill, dtype=torch.float64)


def test_it_solves_every_group_as_lstsq_does_on_its_samples():
    x, y = samples(50)
    found = gram((x, y)).solve(0.0, start())
    for group in range(GROUPS):
        wanted = np.linalg.lstsq(x[:, group].numpy(), y[:, group].numpy(), rcond=None)[0].T
        np.testing.assert_allclose(found[group], wanted, rtol=0, atol=1e-9)


def test_centred_moments_are_those_of_samples_without_their_means():
    x, y = samples(50)
    found = gram((x, y)).centered().solve(0.0, start())
    wanted = gram((x - x.mean(0), y - y.mean(0))).solve(0.0, start())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_the_intercept_makes_the_means_right():
    x, y = samples(50)
    weights = start(0.7)
    intercept = gram((x, y)).intercept(weights)
    predicted = torch.einsum("gqp,mgp->mgq", weights, x) + intercept
    torch.testing.assert_close(predicted.mean(0), y.mean(0), rtol=0, atol=1e-12)


def test_the_error_is_the_sum_of_squares():
    x, y = samples(50)
    weights = start(0.7)
    wanted = (torch.einsum("gqp,mgp->mgq", weights, x) - y).square().sum(0)
    torch.testing.assert_close(gram((x, y)).squared_error(weights), wanted, rtol=1e-12, atol=0)


def test_a_large_ridge_gives_the_start_back():
    torch.testing.assert_close(gram(samples(50)).solve(1e9, start(0.7)), start(0.7), rtol=1e-6, atol=0)


def test_batches_add_up():
    first, second = samples(20), samples(30, seed=1)
    together = gram(tuple(torch.cat(pair) for pair in zip(first, second, strict=True)))
    split, added = gram(first, second), gram(first) + gram(second)
    for other in (split, added):
        torch.testing.assert_close(other.solve(0.1, start()), together.solve(0.1, start()))


def test_dead_inputs_keep_their_start():
    x, y = samples(20)
    x[:, 1] = 0
    found = gram((x, y)).solve(1e-3, start(0.7))
    torch.testing.assert_close(found[1], start(0.7)[1])


def test_numbers_that_are_not_finite_are_refused():
    x, y = samples(20)
    x[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"infs|NaN"):
        gram((x, y)).solve(1e-3, start())


def test_the_ridge_is_chosen_on_held_out_samples():
    found = best_ridge(gram(samples(60)), gram(samples(40, seed=1)), start(), centered=True)
    assert found.ridge is not None
    assert found.relative_error < found.start_error

"""Moments of channels against torch.var_mean in float64."""

from __future__ import annotations

import pytest
import torch

from lcc.ops.moments import PooledMoments, moments


@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (6, 3, 5), (6, 3), (1, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_moments_of_channels_are_those_of_all_their_numbers(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    dims = [0, *range(2, x.ndim)]
    wanted = torch.var_mean(x.double(), dims, correction=0)
    for got, moment in zip(moments(x), wanted, strict=True):
        torch.testing.assert_close(got.double(), moment, rtol=1e-5, atol=1e-12)


def test_a_constant_has_no_variance_at_all():
    variance, mean = moments(torch.full((500, 2, 7, 7), 0.1))
    assert variance.tolist() == [0, 0]
    torch.testing.assert_close(mean, torch.full((2,), 0.1), rtol=0, atol=0)


def test_one_value_far_off_costs_no_digits():
    x = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 1e4
    variance, _ = moments(x)
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2), (5, 1)], ids=str)
def test_pooled_moments_are_those_of_all_tensors_at_once(sizes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 5, 4, generator=generator) * torch.arange(1, 7)[:, None, None, None] + 100
    pooled = PooledMoments()
    for part in x.split(sizes):
        pooled.add(part)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(pooled.variance, variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(pooled.mean, mean, rtol=1e-5, atol=0)

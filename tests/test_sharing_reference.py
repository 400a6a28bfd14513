"""The oracle itself, against torch: what is said to be the best kernel must be one."""

import numpy as np
import pytest
import torch
from sharing_reference import best_shared_conv
from torch.nn import functional as F

GEOMETRIES = [
    {"kernel_size": (3, 3), "padding": (1, 1)},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": (3, 3), "padding": (1, 1), "groups": 2},
    {"kernel_size": (1, 1), "stride": (2, 2), "bias": False},
]


def torch_conv(x, kernel, bias, geometry):
    options = {key: value for key, value in geometry.items() if key not in ("kernel_size", "bias")}
    bias = None if bias is None else torch.from_numpy(bias)
    return F.conv2d(torch.from_numpy(x), torch.from_numpy(kernel), bias, **options).numpy()


def problem(geometry, noise, layers=3, seed=0):
    rng = np.random.default_rng(seed)
    groups = geometry.get("groups", 1)
    kernel = rng.standard_normal((4, 4 // groups, *geometry["kernel_size"]))
    bias = rng.standard_normal(4) if geometry.get("bias", True) else None
    inputs = [rng.standard_normal((2, 4, 7, 6)) + layer for layer in range(layers)]
    outputs = [torch_conv(x, kernel, bias, geometry) for x in inputs]
    return kernel, bias, inputs, [y + noise * rng.standard_normal(y.shape) for y in outputs]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_kernel_that_all_layers_have_is_found_again(geometry):
    kernel, bias, inputs, outputs = problem(geometry, noise=0.0)
    found, shift, least = best_shared_conv(inputs, outputs, **geometry)
    np.testing.assert_allclose(found, kernel, rtol=0, atol=1e-10)
    assert (shift is None) == (bias is None)
    if bias is not None:
        np.testing.assert_allclose(shift, bias, rtol=0, atol=1e-10)
    assert least < 1e-18 * sum((y**2).sum() for y in outputs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_at_the_best_kernel_the_summed_error_is_flat_and_as_stated(geometry, weighted):
    _, _, inputs, outputs = problem(geometry, noise=1.0)
    weights = np.random.default_rng(1).uniform(0.5, 2, (len(inputs), 4)) if weighted else None
    found, shift, least = best_shared_conv(inputs, outputs, **geometry, weights=weights)
    kernel = torch.from_numpy(found).requires_grad_()
    bias = None if shift is None else torch.from_numpy(shift).requires_grad_()
    options = {key: value for key, value in geometry.items() if key not in ("kernel_size", "bias")}
    total = torch.zeros((), dtype=torch.float64)
    for number, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
        error = torch.from_numpy(y) - F.conv2d(torch.from_numpy(x), kernel, bias, **options)
        factor = 1 if weights is None else torch.from_numpy(weights[number])[:, None, None]
        total = total + (error * factor).square().sum()
    total.backward()
    assert total.item() == pytest.approx(least, rel=1e-12)
    for tensor in (kernel, bias):
        assert tensor is None or tensor.grad.abs().max() < 1e-9 * least

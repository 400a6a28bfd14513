"""Regression onto recorded activations: what is kept and held out, the fit, and what it leaves behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from draws import random
from torch import nn

from lcc.ops import regression
from lcc.ops.regression import Activations, error_of, estimate_norm_, regress_


def numbered(count, *shape, first=0):
    """Images that hold their number, and outputs that hold its negative."""
    x = torch.arange(first, first + count, dtype=torch.float64)
    x = x.reshape(-1, *(1 for _ in shape)).expand(-1, *shape).clone()
    return x, -x


def numbers(samples):
    return [x[:, 0, 0, 0].int().tolist() for x, _ in samples]


def network(channels=3, *, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)).double()


def nothing():
    pass


def test_every_fifth_image_is_held_out_across_calls():
    activations = Activations()
    activations.add(*numbered(7, 2, 3, 4))
    activations.add(*numbered(4, 2, 3, 4, first=7))
    fitted, held_out = activations.split()
    assert numbers(fitted) == [[0, 1, 2, 3, 5, 6, 7, 8, 10]]
    assert numbers(held_out) == [[4, 9]]


def test_outputs_stay_with_their_inputs():
    activations = Activations()
    activations.add(*numbered(7, 2, 3, 4))
    activations.add(*numbered(6, 2, 5, 5, first=7))
    for part in activations.split():
        assert all(torch.equal(y, -x) for x, y in part)


def test_calls_on_several_sizes_are_kept_apart_and_all_count():
    activations = Activations()
    activations.add(*numbered(5, 2, 3, 4))
    activations.add(*numbered(6, 2, 4, 3, first=20))
    activations.add(*numbered(5, 2, 3, 4, first=40))
    fitted, held_out = activations.split()
    assert sorted(numbers(fitted)) == [[0, 1, 2, 3, 40, 41, 42, 43], [20, 21, 22, 23, 25]]
    assert sorted(numbers(held_out)) == [[4, 44], [24]]


def test_few_images_are_fitted_to_and_judged_by():
    activations = Activations()
    activations.add(*numbered(4, 2, 3, 3))
    fitted, held_out = activations.split()
    assert numbers(fitted) == numbers(held_out) == [[0, 1, 2, 3]]


def test_what_was_recorded_does_not_change_with_the_tensors_it_came_from():
    x, y = random(5, 2, 3, 3), random(5, 2, 3, 3, seed=1)
    kept = x.clone(), y.clone()
    activations = Activations()
    activations.add(x.requires_grad_(), y.requires_grad_())
    with torch.no_grad():
        x.zero_()
        y.zero_()
    (fitted,), _ = activations.split()
    for got, wanted in zip(fitted, kept, strict=True):
        assert torch.equal(got, wanted[:4])
        assert not got.requires_grad


def test_images_beyond_the_memory_set_aside_are_left_out(monkeypatch):
    monkeypatch.setattr(regression, "MAX_NUMBERS", 100)
    activations = Activations()
    activations.add(*numbered(6, 2, 2, 2))  # 8 numbers each: 48
    activations.add(*numbered(9, 2, 2, 2, first=6))  # 6 of them fit
    activations.add(*numbered(3, 2, 2, 2, first=15))
    fitted, held_out = activations.split()
    assert sorted(numbers(fitted)[0] + numbers(held_out)[0]) == list(range(12))


def test_a_linear_map_is_recovered():
    module = nn.Conv2d(2, 2, 1).double()
    target = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    x = random(20, 2, 4, 4, seed=3)
    y = torch.einsum("ij,njhw->nihw", target, x) + 0.1
    assert error_of(module, [(x, y)]) == 1
    regress_(module, [(x, y)], after_step=nothing)
    assert error_of(module, [(x, y)]) < 0.05
    np.testing.assert_allclose(module.weight.detach()[:, :, 0, 0], target, atol=0.03)


def test_samples_of_every_size_are_fitted_to():
    # The sizes want different things of the bias: what comes out is between.
    module = nn.Conv2d(1, 1, 1).double()
    with torch.no_grad():
        module.weight.fill_(0.8)
        module.bias.fill_(0.3)
    small, large = random(8, 1, 3, 3), random(8, 1, 5, 5, seed=1)
    regress_(module, [(small, small + 0.5), (large, large - 0.5)], after_step=nothing)
    assert module.weight.item() == pytest.approx(1, abs=0.1)
    assert module.bias.item() == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("unit", [1e-9, 1e4])
def test_the_first_steps_do_not_depend_on_the_units_of_the_outputs(unit):
    def fitted(unit):
        module = nn.Conv2d(3, 3, 1).double()
        with torch.no_grad():
            module.weight.zero_()
            module.bias.zero_()
        x, y = random(8, 3, 4, 4), random(8, 3, 4, 4, seed=1) + 0.5
        regress_(module, [(x, unit * y)], after_step=nothing, steps=1)
        return module.bias.detach()

    # Adam's first step has one length: it must not be lost in its epsilon.
    torch.testing.assert_close(fitted(unit), fitted(1.0), rtol=1e-2, atol=0)


def test_the_fit_is_reproducible_and_leaves_the_random_numbers_alone():
    x, y = random(12, 3, 4, 4), random(12, 3, 4, 4, seed=1)

    def fitted(seed, *, global_seed):
        module = network()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        regress_(module, [(x, y)], after_step=nothing, steps=10, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([value.double().flatten() for value in module.state_dict().values()])

    assert torch.equal(fitted(0, global_seed=1), fitted(0, global_seed=2))


def test_another_seed_draws_other_batches(monkeypatch):
    monkeypatch.setattr(regression, "POSITIONS", 4 * 16)  # four of the twelve images in a batch
    x, y = random(12, 3, 4, 4), random(12, 3, 4, 4, seed=1)
    weights = []
    for seed in (0, 1):
        module = network()
        regress_(module, [(x, y)], after_step=nothing, steps=5, seed=seed)
        weights.append(module[0].weight)
    assert not torch.equal(*weights)


def test_parameters_are_brought_back_after_every_step():
    module = nn.Conv2d(1, 1, 1, bias=False).double()
    x = random(8, 1, 4, 4)
    seen = []
    with torch.no_grad():
        module.weight.fill_(0.2)

    def cap():
        seen.append(module.weight.item())
        with torch.no_grad():
            module.weight.clamp_(max=0.25)

    regress_(module, [(x, 3 * x)], after_step=cap, steps=40)
    assert len(seen) == 40
    assert max(seen) > 0.25
    assert module.weight.item() == 0.25


def test_a_fit_leaves_gradients_modes_and_requirements_as_they_were():
    module = network()
    module[0].weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    before = module[0].weight.clone()
    x = random(8, 3, 4, 4)
    with torch.no_grad():
        regress_(module, [(x, 2 * x)], after_step=nothing, steps=5)
        assert not torch.is_grad_enabled()
    assert (
        [parameter.requires_grad for parameter in module.parameters()] == wanted == [False, True, True, True]
    )
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part.training for part in module.modules())
    assert not torch.equal(module[0].weight, before)  # a frozen weight is fitted too


def test_norms_end_with_the_statistics_of_all_samples_and_their_own_momentum():
    module = network()
    module[1].momentum = 0.3
    x = random(30, 3, 4, 4) + 2
    regress_(module, [(x, x)], after_step=nothing, steps=5)
    estimate_norm_(module, module[1], [(x, x)])
    weight, bias = (part.detach().numpy() for part in module[0].parameters())
    seen = np.einsum("ij,njhw->inhw", weight[:, :, 0, 0], x.numpy()).reshape(3, -1) + bias[:, None]
    np.testing.assert_allclose(module[1].running_mean, seen.mean(1), rtol=1e-10)
    np.testing.assert_allclose(module[1].running_var, seen.var(1, ddof=1), rtol=1e-10)
    assert module[1].momentum == 0.3


def test_norm_statistics_are_taken_over_all_chunks():
    module = nn.Sequential(nn.BatchNorm2d(2)).double()
    module[0].running_mean.fill_(100)
    x = random(2 * regression.CHUNK + 1, 2, 3, 3) * 3 + 1
    x[-1] += 30
    y = random(3, 2, 5, 4)
    estimate_norm_(module, module[0], [(x, x), (y, y)])
    values = torch.cat([x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)], dim=1)
    np.testing.assert_allclose(module[0].running_mean, values.mean(1), rtol=1e-10)
    np.testing.assert_allclose(module[0].running_var, values.var(1), rtol=1e-10)
    assert not module[0].training


def test_norm_statistics_do_not_change_parameters():
    module = network()
    before = copy.deepcopy(list(module.parameters()))
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    estimate_norm_(module, norm, [(random(8, 3, 4, 4), random(8, 3, 4, 4))])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("count", [3, 70])
def test_the_error_is_relative_over_all_numbers_and_sizes(count):
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).double()
    with torch.no_grad():
        module[0].weight.fill_(0.5)
    samples = [
        (random(count, 1, 3, 4), random(count, 1, 3, 4, seed=1)),
        (random(2, 1, 9, 2), random(2, 1, 9, 2)),
    ]
    off = np.concatenate([(0.5 * x - y).numpy().ravel() for x, y in samples])
    wanted = np.concatenate([y.numpy().ravel() for _, y in samples])
    got = error_of(module, samples)
    assert got == pytest.approx(np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-12)


def test_the_error_is_that_of_eval_mode():
    module = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5)).double().train()
    x = 5 * random(6, 2, 3, 3) + 1  # running statistics are still 0 and 1: about the identity
    assert error_of(module, [(x, x)]) < 1e-4
    assert not module.training


def test_outputs_that_are_all_zero_are_fitted_to_without_nan():
    module = network()
    x = random(8, 3, 4, 4)
    regress_(module, [(x, torch.zeros_like(x))], after_step=nothing, steps=5)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())

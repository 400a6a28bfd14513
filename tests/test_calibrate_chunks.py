"""Calibration in chunks: what sites are fitted to, and the moments that norms get from several chunks."""

from __future__ import annotations

import copy

import pytest
import torch
from calibration_reference import (
    IMAGES,
    NORMS,
    SITES,
    calls_of,
    close,
    converted_,
    done,
    kernels_at,
    mask_of,
    set_norm_,
)
from hosts import CutLate, TinyResNet, photos, seeded
from torch import nn

from lcc import calibrate
from lcc import two_streams as two_streams_module
from lcc.methods.linear_mix import LinearMix


@pytest.mark.parametrize("name", SITES)
def test_in_chunks_sites_are_fitted_to_the_inputs_of_the_original(name):
    close(*kernels_at(name, chunk=7))


def test_the_number_of_chunks_is_reported():
    assert done(chunk=7).calibration.chunks == 4


def test_in_chunks_every_image_is_used():
    assert done(chunk=7).calibration.fits["layer1.conv1"].samples == len(IMAGES) * 12 * 12


@torch.no_grad()
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_in_chunks_moments_are_averages_over_the_chunks_weighted_by_their_images(name):
    result = done(chunk=7)
    (((x_original, _),), ((x, _),)) = (
        calls_of(model, "layer1.bn1", IMAGES) for model in (result.original, result.model)
    )
    wanted = copy.deepcopy(result.original.layer1.bn1)
    set_norm_(wanted, x_original.split(7), x.split(7))
    close(getattr(result.model.layer1.bn1, name), getattr(wanted, name), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", sorted(NORMS - {"bn"}))
def test_a_norm_gives_the_second_stream_the_moments_that_it_gave_the_first(name, chunk):
    result = done(chunk=chunk)
    (((_, wanted),), ((_, y),)) = (calls_of(model, name, IMAGES) for model in (result.original, result.model))
    spread = wanted.std((0, 2, 3))
    assert ((y.mean((0, 2, 3)) - wanted.mean((0, 2, 3))).abs() < 0.2 * spread).all()
    assert ((y.std((0, 2, 3)) - spread).abs() < 0.2 * spread).all()


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_channel_that_was_dead_does_not_blow_up(spread):
    norm = nn.BatchNorm2d(1).double().eval()
    norm.running_var.fill_(1e-12)
    generator = torch.Generator().manual_seed(0)
    was, now = (
        size * torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64) for size in (spread, 0.5)
    )
    both = two_streams_module._TwoStreamNorm(norm)
    both.images = 8
    _, y = both(torch.cat([was, now])).chunk(2)
    assert y.abs().max() < 0.01


@torch.no_grad()
def test_sites_that_lose_nothing_leave_the_network_as_it_is():
    model = seeded(TinyResNet)  # whose norms' statistics are not those of the images
    for name in SITES:
        conv = model.get_submodule(name)
        conv.weight.copy_(torch.where(mask_of(conv, LinearMix()), conv.weight, 0))
    wanted = model(IMAGES)
    converted_(model, LinearMix())
    close(model(IMAGES), wanted, 1e-5)


def test_chunks_of_one_image_leave_finite_weights_and_statistics(monkeypatch):
    monkeypatch.setattr(calibrate, "images_at_once", lambda *_: 1)
    model = seeded(TinyResNet)
    converted_(model, LinearMix(), photos(3, size=2))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@torch.no_grad()
def test_norms_behind_where_a_host_cuts_images_up_keep_their_statistics():
    model, original = seeded(CutLate), seeded(CutLate)
    converted_(model, LinearMix(), photos(6, size=8), names=("layer1.conv1",))
    behind = {name for name in NORMS if name.startswith(("down", "layer2"))}
    changed = {
        name
        for name in NORMS
        if not torch.equal(model.get_submodule(name).running_mean, original.get_submodule(name).running_mean)
    }
    assert "layer1.bn1" in changed
    assert behind
    assert not changed & behind

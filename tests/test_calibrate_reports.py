"""What calibration reports of each site, and what it leaves in the network and around it."""

from __future__ import annotations

import copy

import pytest
import torch
from calibration_reference import IMAGES, METHODS, NORMS, SITES, converted_, done
from hosts import TinyResNet, assert_same, conv3, converts, seeded, state_of
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc import calibrate
from lcc.calibrate import calibrate_, project_
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.surgery import find_sites, replace_

# What is reported


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_no_site_is_worse_than_its_mask_on_held_out_images(method, norm, name):
    fit = done(method, norm).calibration.fits[name]
    assert fit.relative_error <= fit.start_error


def test_every_site_has_a_fit_from_data():
    fits = done().calibration.fits
    assert {name: fit.how for name, fit in fits.items()} == dict.fromkeys(SITES, "data")


def test_each_site_is_announced_with_its_fit_in_call_order():
    model, seen = seeded(TinyResNet), []
    _, result = converted_(
        model, LinearMix(), names=SITES[::-1], on_site=lambda name, fit: seen.append((name, fit))
    )
    assert seen == [(name, result.fits[name]) for name in SITES]


class SkipsForBatches(nn.Module):
    """A host that calls one of its convolutions only for a single image."""

    def __init__(self):
        super().__init__()
        self.always, self.seldom = conv3(3), conv3(3)

    def forward(self, x):
        x = self.always(x)
        return self.seldom(x) if len(x) == 1 else x


@pytest.mark.parametrize("chunk", [100, 7])
def test_a_site_that_no_image_reaches_keeps_its_projection(monkeypatch, chunk):
    monkeypatch.setattr(calibrate, "images_at_once", lambda *_: chunk)
    model = seeded(SkipsForBatches)
    projected = copy.deepcopy(model)
    wanted = project_(projected, replace_(projected, converts("always", "seldom")))["seldom"]
    _, result = converted_(model, LinearMix(), names=("always", "seldom"))
    assert result.fits["seldom"] == wanted
    assert_same({"tensors": projected.seldom.state_dict()}, {"tensors": model.seldom.state_dict()})


class SkipsOneOfThree(SkipsForBatches):
    """A host with one more, that it always calls."""

    def __init__(self):
        super().__init__()
        self.first = conv3(3)

    def forward(self, x):
        return super().forward(self.first(x))


@pytest.mark.parametrize("chunk", [100, 7])
def test_a_bank_is_fitted_to_those_of_its_sites_that_images_reach(monkeypatch, chunk):
    monkeypatch.setattr(calibrate, "images_at_once", lambda *_: chunk)
    model = seeded(SkipsOneOfThree)
    originals, result = converted_(model, Shared(), names=("first", "always", "seldom"))
    slow = seeded(SkipsOneOfThree)
    project_(slow, replace_(slow, converts("first", "always", "seldom", method=Shared())))
    operators, x = [slow.first, slow.always], IMAGES
    seen = [op.statistics(free_means=False) for op in operators]
    for name, statistics in zip(("first", "always"), seen, strict=True):
        with torch.no_grad():
            y = originals[name](x)
        statistics.add(x, y)
        x = y
    for name, fit in zip(("first", "always"), Shared().fit_bank_(operators, seen), strict=True):
        assert result.fits[name].relative_error == pytest.approx(fit.relative_error, rel=1e-6)
    torch.testing.assert_close(model.seldom.kernel.weight, slow.always.kernel.weight, rtol=0, atol=1e-9)
    assert result.fits["seldom"].how == "weights"


# What is left behind


def test_the_network_is_left_in_eval_mode():
    model = seeded(TinyResNet).train()
    converted_(model, LinearMix())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("chunk", [100, 7])
def test_no_hook_attribute_or_gradient_is_left_behind(monkeypatch, chunk):
    monkeypatch.setattr(calibrate, "images_at_once", lambda *_: chunk)
    model = seeded(TinyResNet)
    sites = find_sites(model, IMAGES[:1])
    originals = replace_(model, converts(*SITES))
    before = state_of(model)
    calibrate_(model, originals, sites, IMAGES)
    after = state_of(model)
    assert_same({**before, "tensors": {}}, {**after, "tensors": {}})


@pytest.mark.parametrize("chunk", [100, 7])
def test_forwards_are_put_back_if_the_pass_fails(monkeypatch, chunk):
    monkeypatch.setattr(calibrate, "images_at_once", lambda *_: chunk)
    model = seeded(TinyResNet)
    sites = find_sites(model, IMAGES[:1])
    originals = replace_(model, converts(*SITES))
    before = state_of(model)["attributes"]
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate_(model, originals, sites, IMAGES)
    assert state_of(model)["attributes"] == before


def test_a_forward_that_a_host_put_on_its_norm_is_put_back():
    model = seeded(TinyResNet)
    model.bn.forward = model.bn.forward
    converted_(model, LinearMix())
    assert "forward" in vars(model.bn)


def test_images_and_originals_are_left_alone():
    model, images = seeded(TinyResNet), IMAGES.clone()
    before = {name: model.get_submodule(name).weight.clone() for name in SITES}
    originals, _ = converted_(model, LinearMix(), images)
    assert torch.equal(images, IMAGES)
    assert all(torch.equal(before[name], conv.weight) for name, conv in originals.items())


def test_a_frozen_norm_of_torchvision_keeps_its_statistics():
    result = done(norm=FrozenBatchNorm2d)
    for name in NORMS:
        assert_same(
            {"tensors": result.original.get_submodule(name).state_dict()},
            {"tensors": result.model.get_submodule(name).state_dict()},
        )


def test_a_norm_frozen_by_hand_stays_frozen():
    model = seeded(TinyResNet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(requires_grad=False)
    converted_(model, LinearMix())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())

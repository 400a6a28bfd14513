"""The two-stream pass, against site-by-site reconstruction with one regression for each output channel."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from calibration_reference import (
    IMAGES,
    METHODS,
    NORMS,
    SITES,
    calls_of,
    close,
    converted_,
    done,
    fit_slowly,
    kernels_at,
    mask_of,
    set_norm_,
)
from hosts import CalledTwice, PreActivation, TinyResNet, TwoParents, assert_same, converts, photos, seeded
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc.calibrate import project_
from lcc.methods import Fit
from lcc.methods.linear_mix import LinearMix
from lcc.surgery import replace_

# One batch


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_one_pass_finds_the_weights_of_the_site_by_site_reconstruction(method, name):
    close(*kernels_at(name, method=method))


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_one_pass_reports_the_errors_of_the_site_by_site_reconstruction(method, name):
    fit, slow = done(method).calibration.fits[name], done(method).slow_fits[name]
    assert (fit.start_error, fit.relative_error) == pytest.approx((slow.start_error, slow.error), abs=1e-8)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_one_pass_chooses_the_ridge_of_the_site_by_site_reconstruction(method, name):
    assert done(method).calibration.fits[name].ridge == done(method).slow_fits[name].ridge


@pytest.mark.parametrize("name", sorted(NORMS))
def test_one_pass_finds_the_statistics_of_the_site_by_site_reconstruction(name):
    got, wanted = (model.get_submodule(name).state_dict() for model in (done().model, done().slow))
    close(got, wanted)


def test_one_pass_gives_the_outputs_of_the_site_by_site_reconstruction():
    x = photos(5, seed=9)
    close(done().model(x), done().slow(x))


@pytest.mark.parametrize("name", SITES)
def test_without_a_norm_the_weights_are_those_of_the_reconstruction_too(name):
    close(*kernels_at(name, norm=FrozenBatchNorm2d))


def test_all_images_and_positions_of_a_small_set_are_used():
    assert done().calibration.fits["layer1.conv1"].samples == len(IMAGES) * 12 * 12


def test_one_batch_is_one_chunk():
    assert done().calibration.chunks == 1


@pytest.mark.parametrize("name", SITES)
def test_a_site_before_a_norm_keeps_the_weight_norms_of_the_mask(name):
    masked = torch.where(mask_of(done().originals[name], LinearMix()), done().originals[name].weight, 0)
    got = done().model.get_submodule(name).dense_kernel().detach()
    close(got.flatten(1).norm(dim=1), masked.detach().flatten(1).norm(dim=1), 1e-12)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(
    ("names", "before"),
    [
        (SITES, {"bn"}),
        (SITES[2:], {"bn", "layer1.bn1", "layer1.bn2", "down_bn"}),
        (SITES[3:], NORMS - {"layer2.bn2"}),
    ],
    ids=["all", "last two", "last"],
)
def test_norms_before_the_first_converted_site_keep_their_statistics_to_the_bit(names, before, chunk):
    result = done(names=names, chunk=chunk)
    unchanged = {
        name
        for name in NORMS
        if torch.equal(
            result.model.get_submodule(name).running_mean, result.original.get_submodule(name).running_mean
        )
        and torch.equal(
            result.model.get_submodule(name).running_var, result.original.get_submodule(name).running_var
        )
    }
    assert unchanged == before


def test_nothing_but_weights_of_sites_and_statistics_of_norms_changes():
    before, after = (done().original.state_dict(), done().model.state_dict())
    same = {name for name, tensor in before.items() if name in after and torch.equal(tensor, after[name])}
    statistics = {f"{n}.running_{kind}" for n in NORMS - {"bn"} for kind in ("mean", "var")}
    assert before.keys() - same == statistics | {f"{name}.weight" for name in SITES}


# What the second stream computed


def without_running_statistics(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


NORM_KINDS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNormAct2d": BatchNormAct2d,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "GroupNorm": partial(nn.GroupNorm, 2),
    "without running statistics": without_running_statistics,
    "without affine part": partial(nn.BatchNorm2d, affine=False),
}


def two_streams(model, names=SITES):
    """Calibrate a network in place; return what both streams computed."""
    outputs = []
    handle = model.register_forward_hook(lambda _m, _x, y: outputs.append(y))
    converted_(model, LinearMix(), names=names)
    handle.remove()
    return outputs[-1].chunk(2)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_the_calibrated_network_computes_what_the_second_stream_computed(kind):
    model = seeded(TinyResNet, norm=NORM_KINDS[kind])
    _, converted_stream = two_streams(model)
    close(model(IMAGES), converted_stream, 1e-10)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_the_first_stream_is_the_original(kind):
    model = seeded(TinyResNet, norm=NORM_KINDS[kind])
    wanted = model(IMAGES).detach()
    original_stream, _ = two_streams(model)
    close(original_stream, wanted, 1e-10)


def test_a_pre_activation_network_computes_what_the_second_stream_computed():
    model = seeded(PreActivation)
    _, converted_stream = two_streams(model, ("conv1", "conv2"))
    close(model(IMAGES), converted_stream, 1e-10)


# Convolutions called twice


@torch.no_grad()
def test_a_convolution_called_twice_is_fitted_to_both_calls():
    original = seeded(CalledTwice, norms=2)
    model, slow = copy.deepcopy(original), copy.deepcopy(original)
    converted_(model, LinearMix(), names=("conv",))
    (first, second) = calls_of(original, "conv", IMAGES)
    # The second call sees what the weights after the first call made of the images.
    slow.conv.weight.copy_(fit_slowly(original.conv, LinearMix(), [first], centred=False).kernel)
    set_norm_(slow.norms[0], [original.conv(IMAGES)], [slow.conv(IMAGES)])
    x_second = calls_of(slow, "conv", IMAGES)[1][0]
    wanted = fit_slowly(original.conv, LinearMix(), [first, (x_second, second[1])], centred=False)
    close(model.conv.dense_kernel().detach(), wanted.kernel)


@torch.no_grad()
def test_a_convolution_under_two_parents_is_fitted_to_both_calls():
    original = seeded(TwoParents)
    model = copy.deepcopy(original)
    converted_(model, LinearMix(), names=("left.0",))
    wanted = fit_slowly(original.left[0], LinearMix(), calls_of(original, "left.0", IMAGES), centred=True)
    close(model.left[0].dense_kernel().detach(), wanted.kernel)


@torch.no_grad()
def test_a_bias_makes_the_means_right():
    original = seeded(TwoParents)
    model = copy.deepcopy(original)
    converted_(model, LinearMix(), names=("left.0",))
    wanted = fit_slowly(original.left[0], LinearMix(), calls_of(original, "left.0", IMAGES), centred=True)
    close(model.left[0].bias.detach(), torch.from_numpy(wanted.bias))


# Other floats, formats and sizes


def test_float32_finds_nearly_the_same_network():
    model = seeded(TinyResNet).float()
    converted_(model, LinearMix(), IMAGES.float())
    close(model(IMAGES.float()).double(), done().model(IMAGES), 1e-3)


def test_channels_last_finds_the_same_network():
    model = seeded(TinyResNet).to(memory_format=torch.channels_last)
    converted_(model, LinearMix(), IMAGES.contiguous(memory_format=torch.channels_last))
    close(model(IMAGES), done().model(IMAGES))


def test_channels_last_weights_stay_so():
    model = seeded(TinyResNet).to(memory_format=torch.channels_last)
    converted_(model, LinearMix(), IMAGES.contiguous(memory_format=torch.channels_last))
    kernels = [p for p in model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_help_too(dtype):
    model = seeded(TinyResNet).to(dtype)
    _, result = converted_(model, LinearMix(), (IMAGES * 4).to(dtype))
    assert all(fit.relative_error < 1.01 * fit.start_error for fit in result.fits.values())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(("count", "size"), [(1, 12), (1, 2), (2, 2), (4, 4)])
def test_very_few_and_small_images_leave_finite_weights_and_statistics(count, size):
    model = seeded(TinyResNet)
    converted_(model, LinearMix(), photos(count, size=size))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_dead_input_keeps_the_projection():
    model = seeded(TinyResNet)
    nn.init.zeros_(model.bn.weight)
    nn.init.constant_(model.bn.bias, -1)
    converted_(model, LinearMix(), names=("layer1.conv1",))
    projected = seeded(TinyResNet)
    project_(projected, replace_(projected, converts("layer1.conv1")))
    close(model.layer1.conv1.dense_kernel(), projected.layer1.conv1.dense_kernel(), 1e-12)


# Weights only


@torch.no_grad()
def test_projecting_masks_every_kernel():
    model = seeded(TinyResNet)
    originals = replace_(model, converts(*SITES))
    project_(model, originals)
    for name, conv in originals.items():
        wanted = torch.where(mask_of(conv, LinearMix()), conv.weight, 0)
        close(model.get_submodule(name).dense_kernel(), wanted, 1e-12)


def test_projecting_reports_how_far_each_kernel_is_off():
    model = seeded(TinyResNet)
    originals = replace_(model, converts(*SITES))
    for name, fit in project_(model, originals).items():
        kernel = originals[name].weight.detach()
        lost = torch.where(mask_of(originals[name], LinearMix()), 0, kernel).norm() / kernel.norm()
        assert fit == Fit(how="weights", kernel_error=fit.kernel_error)
        assert fit.kernel_error == pytest.approx(float(lost), abs=1e-12)


def test_projecting_leaves_norms_alone():
    model = seeded(TinyResNet)
    before = {name: model.get_submodule(name).state_dict() for name in NORMS}
    before = copy.deepcopy(before)
    project_(model, replace_(model, converts(*SITES)))
    for name, tensors in before.items():
        assert_same({"tensors": tensors}, {"tensors": model.get_submodule(name).state_dict()})


def test_an_original_without_an_operator_is_an_error():
    model = seeded(TinyResNet)
    with pytest.raises(TypeError, match=r"layer1\.conv1 was not replaced"):
        project_(model, {"layer1.conv1": model.layer1.conv1})

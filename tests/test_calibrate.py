"""The two-stream pass, against site-by-site reconstruction with one regression for each output channel."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hosts import (
    CalledTwice,
    PreActivation,
    TinyResNet,
    TwoParents,
    assert_same,
    conv3,
    converts,
    photos,
    seeded,
    state_of,
)
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from lcc import calibrate
from lcc import two_streams as two_streams_module
from lcc.calibrate import calibrate_, project_
from lcc.methods import Fit
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.ops.fit import RIDGES
from lcc.ops.sampling import HELD_OUT_EVERY
from lcc.surgery import find_sites, replace_

IMAGES = photos(23)
SITES = ("layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2")
NORMS = {"bn", "layer1.bn1", "layer1.bn2", "down_bn", "layer2.bn1", "layer2.bn2"}


# The oracle


class Slow(NamedTuple):
    """What the slow implementation found for one site."""

    kernel: torch.Tensor
    bias: np.ndarray
    ridge: float
    start_error: float
    error: float


def mask_of(conv, method):
    """Return which entries of the dense kernel are free, from the definition of the family."""
    mask = torch.zeros_like(conv.weight, dtype=torch.bool)
    kh, kw = conv.kernel_size
    for o in range(conv.out_channels):
        for i in range(conv.in_channels):
            for a in range(kh):
                for b in range(kw):
                    inside = o // method.group_size == i // method.group_size
                    on = method.stencil == "square" or a == kh // 2 or b == kw // 2
                    mask[o, i, a, b] = (a == kh // 2 and b == kw // 2) or (inside and on)
    return mask


def rows_of(conv, x):
    """Return the regressors of every output pixel, (N, H' W', C_in kh kw)."""
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return unfolded.transpose(1, 2).numpy()


def fit_slowly(conv, method, calls, *, centred):
    """Fit each output channel by ordinary least squares on all pixels of all calls, choosing the ridge."""
    free = mask_of(conv, method).flatten(1).numpy()
    pixels = [y[0, 0].numel() for _, y in calls]
    regressors = np.concatenate([rows_of(conv, x).reshape(-1, free.shape[1]) for x, _ in calls])
    wanted = np.concatenate([y.permute(0, 2, 3, 1).flatten(0, 2).numpy() for _, y in calls])
    images = np.arange(len(calls[0][0]) * len(calls)).reshape(len(calls), -1)
    held = np.concatenate([np.repeat(i, n) for i, n in zip(images, pixels, strict=True)])
    held = held % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    start = np.where(free, conv.weight.detach().flatten(1).numpy(), 0)
    centre = np.arange(free.shape[1]).reshape(conv.in_channels, -1)[:, np.prod(conv.kernel_size) // 2]

    def samples(rows):
        x, y = regressors[rows], wanted[rows]
        return (x - x.mean(0), y - y.mean(0)) if centred else (x, y)

    def solve(x, y, ridge):
        root = np.sqrt(ridge * np.square(x[:, centre]).sum(0).mean())
        kernel = np.zeros_like(start)
        for o, taps in enumerate(free):
            more = root * np.eye(taps.sum())
            kernel[o, taps] = np.linalg.lstsq(
                np.concatenate([x[:, taps], more]),
                np.concatenate([y[:, o], more @ start[o, taps]]),
                rcond=None,
            )[0]
        return kernel

    def error(kernel):
        x, y = samples(held)
        return np.linalg.norm(x @ kernel.T - y) / np.linalg.norm(y)

    train = samples(~held)
    errors = {ridge: error(solve(*train, ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.get)
    kernel = solve(*samples(slice(None)), ridge)
    bias = (wanted - regressors @ kernel.T).mean(0)
    dense = torch.from_numpy(kernel).reshape(conv.weight.shape)
    return Slow(dense, bias, ridge, error(start), errors[ridge])


def calls_of(model, name, images):
    """Return (input, output) of every call of one module in one forward pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def in_call_order(model, images):
    order = []
    handles = [
        m.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, m in model.named_modules()
        if not list(m.children())
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return order


def mean_and_var(parts):
    """Moments of a list of arrays: the mean of each one's own, weighted by its images."""
    axes, total = (0, 2, 3), sum(map(len, parts))
    return tuple(sum(len(p) * moment(p, axis=axes) for p in parts) / total for moment in (np.mean, np.var))


def set_norm_(norm, originals, converted):
    """Give a BatchNorm the statistics that go with inputs of other moments; both are lists of chunks."""
    (old_mean, old_var), (new_mean, new_var) = (
        mean_and_var([x.numpy() for x in parts]) for parts in (originals, converted)
    )
    ratio = new_var / old_var
    mean = new_mean + np.sqrt(ratio) * (norm.running_mean.numpy() - old_mean)
    var = ratio * (norm.running_var.numpy() + norm.eps) - norm.eps
    norm.running_mean.copy_(torch.from_numpy(mean))
    norm.running_var.copy_(torch.from_numpy(var))


@torch.no_grad()
def convert_slowly(original, names, norms, method, images, *, own_inputs=True):
    """Return the converted network, as dense convolutions, and each site's fit.

    Targets come from a run of the original, inputs from a run of the network converted so far (or, in
    chunks, of the original); a BatchNorm that sees something new gets statistics that go with it.
    """
    converted, fits = copy.deepcopy(original), {}
    for name in in_call_order(original, images):
        module = converted.get_submodule(name)
        ((x_original, y),) = calls_of(original, name, images)
        ((x, _),) = calls_of(converted, name, images)
        if name in names:
            pairs = [(x if own_inputs else x_original, y)]
            fits[name] = fit_slowly(original.get_submodule(name), method, pairs, centred=bool(norms[name]))
            kernel = fits[name].kernel
            if norms[name]:
                masked = torch.where(mask_of(module, method), module.weight, 0)
                scale = masked.flatten(1).norm(dim=1) / kernel.flatten(1).norm(dim=1)
                kernel = kernel * scale.reshape(-1, 1, 1, 1)
            module.weight.copy_(kernel)
        elif isinstance(module, nn.BatchNorm2d) and not torch.equal(x, x_original):
            set_norm_(module, [x_original], [x])
    return converted, fits


class Done(NamedTuple):
    """A calibrated network beside its original and the slow result."""

    original: nn.Module
    model: nn.Module
    originals: dict[str, nn.Conv2d]
    calibration: calibrate.Calibration
    slow: nn.Module
    slow_fits: dict[str, Slow]


METHODS = {
    "depthwise": LinearMix(),
    "grouped": LinearMix(group_size=2),
    "cross": LinearMix(group_size=4, stencil="cross"),
}


def converted_(model, method, images=IMAGES, *, names=SITES, **options):
    """Convert a network in place and calibrate it; return the originals and the calibration."""
    sites = find_sites(model, images[:1])
    originals = replace_(model, converts(*names, method=method))
    return originals, calibrate_(model, originals, sites, images, **options)


@cache
def done(method="depthwise", norm=nn.BatchNorm2d, chunk=None, names=SITES):
    original = seeded(TinyResNet, norm=norm)
    model = copy.deepcopy(original)
    with pytest.MonkeyPatch.context() as patch:
        if chunk:
            patch.setattr(calibrate, "images_at_once", lambda *_: chunk)
        originals, calibration = converted_(model, METHODS[method], names=names)
    norms = {name: name.replace("conv", "bn") if norm is nn.BatchNorm2d else None for name in names}
    slow = convert_slowly(original, names, norms, METHODS[method], IMAGES, own_inputs=not chunk)
    return Done(original, model, originals, calibration, *slow)


@torch.no_grad()
def kernels_at(name, **options):
    """Return the equivalent dense kernel of one site, and the slow one."""
    result = done(**options)
    return result.model.get_submodule(name).dense_kernel(), result.slow.get_submodule(name).weight


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


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


@pytest.mark.parametrize("name", NORMS)
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


# In chunks


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

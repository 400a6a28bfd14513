"""Networks calibrated, and the same by a slow oracle: site by site, one regression per output channel."""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hosts import TinyResNet, converts, photos, seeded
from torch import nn
from torch.nn import functional as F

from lcc import calibrate
from lcc.calibrate import calibrate_
from lcc.methods.linear_mix import LinearMix
from lcc.ops.fit import RIDGES
from lcc.ops.sampling import HELD_OUT_EVERY
from lcc.surgery import find_sites, replace_

IMAGES = photos(23)
SITES = ("layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2")
NORMS = {"bn", "layer1.bn1", "layer1.bn2", "down_bn", "layer2.bn1", "layer2.bn2"}


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

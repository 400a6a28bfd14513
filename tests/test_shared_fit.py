"""One kernel for several sites, fitted to data, against regressions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_banks import bank, convolutions
from sharing_reference import best_shared_conv
from torch.nn import functional as F

from lcc.methods.shared import Shared
from lcc.ops import fit
from lcc.ops.fit import HELD_OUT_EVERY

TINY = 1e-13  # a ridge that does nothing


def rows_of(conv, group, x):
    """Return the regressors of a group of outputs, and what is wanted of them: (N, pixels, ...) each."""
    part = x.chunk(conv.groups, 1)[group]
    unfolded = F.unfold(part, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    with torch.no_grad():
        wanted = conv(x).chunk(conv.groups, 1)[group].flatten(2)
    return unfolded.transpose(1, 2).numpy(), wanted.transpose(1, 2).numpy()


def samples_of(*counts):
    """Return smooth inputs for every site, (N, 4, 9, 8), in each of which another channel is large."""
    torch.manual_seed(1)
    found = [F.avg_pool2d(torch.randn(n, 4, 13, 12, dtype=torch.float64).cumsum(3), 5, 1) for n in counts]
    for site, x in enumerate(found):
        x[:, site] *= 5
    return found


def fitted(method, convs, inputs, *, norms=()):
    """Return the operators of a bank fitted to these inputs, and the fits; `norms`: sites with one behind."""
    operators, _ = bank(method, convs)
    statistics = [op.statistics(free_means=i in norms) for i, op in enumerate(operators)]
    for entry, conv, x in zip(statistics, convs, inputs, strict=True):
        with torch.no_grad():
            entry.add(x, conv(x))
    return operators, method.fit_bank_(operators, statistics)


GEOMETRIES = [
    {},
    {"bias": False},
    {"stride": 2, "bias": False},
    {"stride": (1, 2), "dilation": 2, "padding": 2},
    {"groups": 4},
    {"groups": 2, "kernel_size": (1, 3), "padding": (0, 1), "bias": False},
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_a_bank_without_norms_is_one_regression_over_all_its_sites(options, count, monkeypatch):
    monkeypatch.setattr(fit, "RIDGES", (TINY,))
    convs, inputs = convolutions(count, **options), samples_of(*(20, 25, 30)[:count])
    (op, *_), _ = fitted(Shared(), convs, inputs)
    with torch.no_grad():
        outputs = [conv(x).numpy() for conv, x in zip(convs, inputs, strict=True)]
    geometry = {key: getattr(convs[0], key) for key in ("kernel_size", "stride", "padding", "dilation")}
    kernel, bias, _ = best_shared_conv(
        [x.numpy() for x in inputs], outputs, groups=op.groups, bias=op.bias is not None, **geometry
    )
    np.testing.assert_allclose(op.kernel.weight.detach(), kernel, rtol=0, atol=1e-7)
    if bias is not None:
        np.testing.assert_allclose(op.bias.detach(), bias, rtol=0, atol=1e-7)


def judged(parts, start, ridge, *, bias):
    """Return each site's squared error on held-out images, of weights pulled towards `start` (q, p).

    `parts` are the rows and what is wanted of them, (N, pixels, ...) each, by site; a `ridge` of None
    stands for the start itself.
    """
    held_out = [np.arange(len(x)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for x, _ in parts]
    weights = start
    if ridge is not None:
        chosen = zip(parts, held_out, strict=True)
        pairs = [[part[~out].reshape(-1, part.shape[-1]) for part in pair] for pair, out in chosen]
        x, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
        x, y = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
        pull = np.sqrt(ridge * np.square(x).sum(0).mean()) * np.eye(x.shape[1])
        weights = np.linalg.lstsq(np.r_[x, pull], np.r_[y, pull @ start.T], rcond=None)[0].T
    left = [y - x @ weights.T for x, y in parts]
    shift = np.concatenate([e.reshape(-1, len(start)) for e in left]).mean(0) if bias else 0
    return np.array([np.square(e[out] - shift).sum() for e, out in zip(left, held_out, strict=True)])


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_the_errors_without_norms_are_those_on_images_held_out_and_together_they_shrink(options):
    convs, inputs = convolutions(3, **options), samples_of(25, 30, 35)
    (start, *_), _ = bank(Shared(), convs)
    _, fits = fitted(Shared(), convs, inputs)
    (ridge,) = {entry.ridge for entry in fits}
    before, after = np.zeros(3), np.zeros(3)
    for group in range(start.groups):
        parts = [rows_of(conv, group, x) for conv, x in zip(convs, inputs, strict=True)]
        kernel = start.kernel.weight.detach().flatten(1).chunk(start.groups)[group].numpy()
        before += judged(parts, kernel, None, bias=start.bias is not None)
        after += judged(parts, kernel, ridge, bias=start.bias is not None)
    assert after.sum() < before.sum()
    sizes = [
        spread(conv, x[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) for conv, x in zip(convs, inputs, strict=True)
    ]
    np.testing.assert_allclose([e.start_error for e in fits], np.sqrt(before / sizes), rtol=1e-6)
    np.testing.assert_allclose([e.relative_error for e in fits], np.sqrt(after / sizes), rtol=1e-6)


@torch.no_grad()
def spread(conv, x):
    """Return the sum of squares of the outputs, about their means where there is a bias."""
    y = conv(x)
    return float((y - (0 if conv.bias is None else y.mean((0, 2, 3), keepdim=True))).square().sum())


def in_own_size(convs, inputs, start, signs):
    """Return each site's samples about its means, outputs as large as those of the start's kernel.

    Those fitted to and those held out have means of their own. `signs`: of every site's scales.
    """
    found = []
    for conv, x, sign in zip(convs, inputs, signs, strict=True):
        rows, y = rows_of(conv, 0, x)
        present = (rows @ start.T).reshape(-1, len(start))
        y = y * sign * present.std(0) / y.reshape(present.shape).std(0)
        held_out = np.arange(len(x)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        for chosen in (held_out, ~held_out):
            pair = (part[chosen].reshape(-1, part.shape[-1]) for part in (rows, y))
            found.append([(part - part.mean(0)) / np.sqrt(present.var(0).mean()) for part in pair])
    return found


@pytest.mark.parametrize("scale", [False, True])
def test_before_norms_a_bank_is_one_regression_of_outputs_of_one_size(scale, monkeypatch):
    monkeypatch.setattr(fit, "RIDGES", (TINY,))
    convs, inputs = convolutions(3, bias=False), samples_of(20, 25, 30)
    starts, _ = bank(Shared(scale=scale), convs)
    operators, _ = fitted(Shared(scale=scale), convs, inputs, norms=range(3))
    signs = [op.scale.detach().sign().numpy() if scale else 1 for op in starts]
    parts = in_own_size(convs, inputs, starts[0].kernel.weight.detach().flatten(1).numpy(), signs)
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    wanted = np.linalg.lstsq(x, y, rcond=None)[0].T
    got = operators[0].kernel.weight.detach().flatten(1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-7)
    for op, sign, conv, x in zip(operators, signs, convs, inputs, strict=True):
        if scale:
            with torch.no_grad():
                sizes = conv(x).std((0, 2, 3)) / F.conv2d(x, starts[0].kernel.weight, padding=1).std(
                    (0, 2, 3)
                )
            np.testing.assert_allclose(op.scale.detach().numpy(), sizes.numpy() * sign, rtol=1e-10)


def test_every_site_before_a_norm_counts_alike_however_large_its_inputs():
    convs, inputs = convolutions(2, bias=False), samples_of(20, 25)
    (op, *_), fits = fitted(Shared(), convs, inputs, norms=range(2))
    (other, *_), others = fitted(Shared(), convs, [inputs[0], 1000 * inputs[1]], norms=range(2))
    torch.testing.assert_close(op.kernel.weight, other.kernel.weight, rtol=1e-8, atol=1e-10)
    assert [e.relative_error for e in fits] == pytest.approx([e.relative_error for e in others], rel=1e-6)

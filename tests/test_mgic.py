"""Multigrid in channels: what it costs, what it refuses, and where the block form starts from and ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from cases import (
    BLOCKS,
    BOTTLENECK,
    INVERTED,
    MGIC,
    SIZE,
    STEPS,
    Case,
    block,
    conv,
    inputs,
    operator,
    smooth_inputs,
    step,
)
from cases import original as original_of
from torch import nn

from lcc import models
from lcc.counts import fvcore_macs
from lcc.methods.mgic import Mgic
from lcc.specs import Size, StepSpec
from lcc.surgery import find_sites

ONE = Size(height=1, width=1)


def basic(channels):
    return step(channels, post="relu")


def bottleneck(width):
    return block(4 * width, width, width, 4 * width, kernels=(1, 3, 1), post="relu")


@torch.no_grad()
def fitted(spec, *, count=40, scale=1.0):
    """Return the operator fitted to what the original gives, its fit, and inputs and outputs.

    With a scale, the original and what comes in are on another one: s F(x / s) for s x.
    """
    replaced = original_of(spec)
    first, *_, last = (m for m in replaced.modules() if isinstance(m, nn.BatchNorm2d))
    for tensor in (first.running_mean, last.weight, last.bias):
        tensor.mul_(scale)
    first.running_var.mul_(scale**2)
    x = scale * smooth_inputs(spec, count)
    y = replaced(x)
    op = operator(Case(MGIC, spec))
    op.project_(replaced)
    statistics = op.statistics(free_means=False)
    statistics.add(x, y)
    return op, op.fit_(statistics), x, y


# Parameters with BatchNorms, as counted from the released networks.
@pytest.mark.parametrize(
    ("spec", "group_size", "coarsest", "params"),
    [
        (basic(64), 8, 8, 19_264),
        (basic(64), 16, 16, 35_904),
        (basic(64), 32, 32, 63_616),
        (basic(64), 64, 64, 96_768),
        (basic(128), 32, 32, 142_208),
        (basic(256), 32, 32, 299_392),
        (basic(512), 64, 64, 1_191_680),
        (basic(512), 32, 32, 613_760),
        (basic(512), 16, 16, 313_664),
        (bottleneck(64), 32, 32, 107_840),
        (bottleneck(128), 32, 32, 245_568),
        (bottleneck(256), 32, 32, 521_024),
        (bottleneck(512), 32, 32, 1_071_936),
        (bottleneck(512), 64, 64, 2_064_512),
    ],
    ids=str,
)
@pytest.mark.parametrize("as_released", [False, True])
def test_blocks_count_as_the_released_ones(spec, group_size, coarsest, params, as_released):
    method = Mgic(group_size=group_size, coarsest=coarsest, as_released=as_released)
    op = method.build(spec)
    norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    normed = sum(p.numel() for norm in norms for p in norm.parameters())
    assert sum(p.numel() for p in op.parameters()) == params
    assert method.cost(spec, ONE).params == params
    assert method.cost(spec, SIZE).macs == (params - normed) * SIZE.pixels
    assert fvcore_macs(op, torch.zeros(1, spec.channels, 3, 2)).macs == (params - normed) * 6


def test_the_conv_form_counts_its_transfers_and_its_kernels():
    spec = conv(64, padding=(1, 1), stride=(2, 2), bias=True)
    cost = Mgic(group_size=16, coarsest=32).cost(spec, Size(height=8, width=8))
    finest, inner = 9 * 64 * 16, 64 * 16 + (9 + 1) * 32 * 16 + 9 * 16 * 16
    assert cost.params == finest + inner + 64
    assert cost.macs == finest * 16 + inner * 64


@pytest.mark.parametrize("channels", [128, 256, 512, 1024])
def test_parameters_and_macs_grow_linearly_with_the_width(channels):
    narrow, wide = (Mgic().cost(basic(n), SIZE) for n in (channels, 2 * channels))
    assert 2 < wide.params / narrow.params < 2.2
    assert 2 < wide.macs / narrow.macs < 2.2


@pytest.mark.parametrize(
    ("method", "spec", "words"),
    [
        (MGIC, step(4, in_a_row=False), "not in one row"),
        (MGIC, step(4, pre_norm=True), "begins with its normalisation"),
        (MGIC, step(4).model_copy(update={"norm_params": 8}), "one normalisation after each"),
        (MGIC, step(4, activation=None), "none of those with a name"),
        (MGIC, step(4, kernel=(3, 4)), "even kernel 3x4"),
        (MGIC, step(5), "odd width 5"),
        (MGIC, block(4, 6, 4, kernels=(3, 3)), "odd width 3 (half of 6)"),
        (Mgic(form="conv"), step(4), 'form = "conv"'),
        (Mgic(form="block"), conv(4, padding=(1, 1)), 'form = "block"'),
        (Mgic(), BLOCKS[5], "transitions = true"),
        (Mgic(), conv(4, out=8), "channels change (4 to 8)"),
        (Mgic(), conv(4, groups=2), "already grouped (2 groups)"),
        (Mgic(), conv(4, kernel=(2, 3)), "even kernel 2x3"),
        (Mgic(), conv(7), "odd width 7"),
        (
            MGIC,
            StepSpec(channels=8, convs=(conv(8, padding=(1, 1), groups=2),), norm_params=16),
            "grouped already (2 groups)",
        ),
        (MGIC, StepSpec(channels=8, convs=(conv(8),), norm_params=16), "changes the size"),
        (
            MGIC,
            StepSpec(channels=8, convs=(conv(8, (1, 1)),), squeeze=(conv(8, (1, 1)),) * 3, norm_params=16),
            "no squeeze-and-excitation",
        ),
        (
            MGIC,
            StepSpec(channels=8, convs=(conv(8, (1, 1)),), squeeze=(conv(4, (1, 1)),) * 2, norm_params=16),
            "sees 4 channels",
        ),
    ],
)
def test_what_it_can_not_take_it_refuses_in_words(method, spec, words):
    assert words in method.why_not(spec)


@pytest.mark.parametrize("spec", BLOCKS, ids=str)
def test_it_takes_the_blocks_of_resnets_and_mobile_networks(spec):
    assert MGIC.why_not(spec) is None


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"])
def test_it_takes_every_residual_step_of_a_library_network(name):
    network = torchvision.models.get_model(name).eval()
    sites = find_sites(network, torch.zeros(1, 3, 32, 32))
    steps = [site for site in sites if site.kind == "step" and site.obstacle is None]
    assert len(steps) >= 5
    assert [site.name for site in steps if Mgic().why_not(site.spec)] == []


def test_a_block_that_does_not_pay_is_refused_with_both_numbers():
    method = Mgic(group_size=64, coarsest=64)
    network = torchvision.models.resnet18()
    site = next(s for s in find_sites(network, torch.zeros(1, 3, 32, 32)) if s.name == "layer1.0")
    words = site.why_not(method)
    assert words == "would not be cheaper: 6,160,384 MACs instead of 4,718,592"
    assert 64 * (96_768 - 6 * 64 - 4 * 32) == 6_160_384
    assert 64 * (73_984 - 4 * 64) == 4_718_592


@torch.no_grad()
def test_where_the_original_adds_nothing_the_start_adds_nothing():
    for spec in (STEPS[0], BOTTLENECK, INVERTED):
        replaced, x = original_of(spec), inputs(spec).abs()
        last = [m for m in replaced.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        op = operator(Case(MGIC, spec))
        op.project_(replaced)
        torch.testing.assert_close(op(x), x, rtol=0, atol=0)


@torch.no_grad()
def test_the_start_takes_kernels_inside_groups_averaged_to_each_width():
    spec = step(8, post="relu")
    replaced, op = original_of(spec), operator(Case(MGIC, spec))
    op.project_(replaced)
    kernel = replaced.inner[0].weight.numpy()
    finest, middle, *_ = op.cycle.blocks()
    for o in range(8):
        for i in range(2):
            np.testing.assert_allclose(finest.convs[0].weight[o, i], kernel[o, o // 2 * 2 + i], atol=1e-12)
    for o in range(4):
        for i in range(2):
            j = o // 2 * 2 + i
            wanted = kernel[2 * o : 2 * o + 2, 2 * j : 2 * j + 2].sum(1).mean(0)
            np.testing.assert_allclose(middle.convs[0].weight[o, i], wanted, atol=1e-12)


@torch.no_grad()
def test_the_start_averages_depthwise_kernels_and_norms():
    replaced, op = original_of(INVERTED), operator(Case(MGIC, INVERTED))
    op.project_(replaced)
    depthwise, norm = replaced.inner[3], replaced.inner[4]
    middle = list(op.cycle.blocks())[1]
    pairs = depthwise.weight.reshape(6, 2, 1, 3, 3).mean(1)
    torch.testing.assert_close(middle.convs[1].weight, pairs, rtol=0, atol=1e-12)
    for name in ("weight", "bias", "running_mean", "running_var"):
        wanted = getattr(norm, name).reshape(6, 2).mean(1)
        torch.testing.assert_close(getattr(middle.norms[1], name).data, wanted.data, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_bias_before_a_norm_goes_into_its_mean():
    inner = conv(4, padding=(1, 1), bias=True)
    spec = StepSpec(channels=4, convs=(inner, inner), norm_params=16)
    replaced, op = original_of(spec), operator(Case(Mgic(), spec))
    for part in replaced.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.zero_()
    op.project_(replaced)
    finest, _ = op.cycle.blocks()
    torch.testing.assert_close(finest.norms[0].running_mean, -replaced.inner[0].bias.data)


@torch.no_grad()
def test_transfers_average_pairs_and_repeat_them():
    op = operator(Case(MGIC, STEPS[0]))
    op.project_(original_of(STEPS[0]))
    level = next(op.cycle.levels())
    x = inputs(STEPS[0])
    coarse = level.down(x)
    torch.testing.assert_close(coarse, x.unflatten(1, (2, 2)).mean(2))
    torch.testing.assert_close(level.up(coarse), coarse.repeat_interleave(2, dim=1))


@torch.no_grad()
def test_an_opening_starts_as_the_shortcut_inside_its_groups():
    spec = block(4, 8, 8, kernels=(3, 3), stride=2, shortcut=True, post="relu")
    replaced, op = original_of(spec), operator(Case(MGIC, spec))
    op.project_(replaced)
    kernel, projection = op.cycle.opening.weight, replaced.shortcut[0].weight
    wanted = torch.zeros_like(kernel)
    for o in range(8):
        wanted[o, 0, 1, 1] = projection[o, o // 2, 0, 0]
    torch.testing.assert_close(kernel, wanted, rtol=0, atol=1e-12)
    for name in ("weight", "bias", "running_mean", "running_var"):
        torch.testing.assert_close(getattr(op.cycle.opening_norm, name), getattr(replaced.shortcut[1], name))


@torch.no_grad()
def test_a_dense_opening_starts_as_the_shortcut_with_its_scale():
    spec = block(6, 4, 4, kernels=(3, 3), shortcut=True, post="relu")
    replaced, op = original_of(spec), operator(Case(MGIC, spec))
    op.project_(replaced)
    x = inputs(spec)
    got, wanted = op.cycle.opening(x), replaced.shortcut(x)
    shift = (wanted - got).mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(got + shift, wanted, rtol=0, atol=1e-12)


def test_what_is_not_such_a_block_is_refused():
    op = operator(Case(MGIC, STEPS[0]))
    with pytest.raises(TypeError, match="no convolution"):
        op.project_(original_of(step(6)))
    with pytest.raises(TypeError, match="another kind"):
        op.fit_(object())


@pytest.mark.parametrize("spec", [STEPS[0], INVERTED, BLOCKS[5]], ids=str)
def test_the_regression_helps_and_says_how_much(spec):
    op, fit, x, y = fitted(spec, count=40)
    held_out = slice(4, None, 5)
    got = op(x)[held_out].detach()
    assert fit.how == "data"
    assert fit.samples == 40 * SIZE.pixels
    assert fit.relative_error == pytest.approx(float((got - y[held_out]).norm() / y[held_out].norm()))
    assert fit.relative_error < 0.8 * fit.start_error


def test_a_fit_that_does_not_help_is_undone(monkeypatch):
    from lcc.methods import mgic_block

    def spoil(module, *_, **__):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)

    monkeypatch.setattr(mgic_block, "regress_", spoil)
    op, fit, x, _ = fitted(STEPS[0])
    fresh = operator(Case(MGIC, STEPS[0]))
    fresh.project_(original_of(STEPS[0]))
    assert fit.relative_error == fit.start_error
    assert torch.equal(op(x), fresh(x))


def test_training_begins_with_the_function_of_the_start(monkeypatch):
    from lcc.methods import mgic_block

    seen = []
    monkeypatch.setattr(
        mgic_block, "regress_", lambda module, samples, **_: seen.append(module(samples[0][0]))
    )
    _, _, x, _ = fitted(INVERTED, count=10)
    fresh = operator(Case(MGIC, INVERTED))
    fresh.project_(original_of(INVERTED))
    fitted_to = x[torch.arange(1, 11) % 5 != 0]
    torch.testing.assert_close(seen[0], fresh(fitted_to), rtol=0, atol=1e-9)


def test_one_image_that_shrinks_to_one_pixel_can_be_fitted_to():
    replaced, x = original_of(BLOCKS[5]), inputs(BLOCKS[5], 1, size=Size(height=2, width=2))
    op = operator(Case(MGIC, BLOCKS[5]))
    op.project_(replaced)
    statistics = op.statistics(free_means=False)
    statistics.add(x, replaced(x))
    fit = op.fit_(statistics)
    assert fit.relative_error <= fit.start_error


def test_the_fit_does_not_depend_on_the_scale_of_the_activations():
    errors = [fitted(STEPS[0], scale=scale)[1].relative_error for scale in (1.0, 1e3)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_released_squeezes_are_a_quarter_rounded_to_eight():
    spec = block(40, 120, 120, 40, kernels=(1, 5, 1), depthwise=1, squeeze=32, activation="relu")
    released = Mgic(group_size=16, coarsest=16, as_released=True).design(spec)
    clean = Mgic(group_size=16, coarsest=16).design(spec)
    assert [level.step.squeeze[0].out_channels for level in released.levels] == [32, 16, 8]
    assert [level.step.squeeze[0].out_channels for level in clean.levels] == [32, 16, 8]
    wide = block(80, 184, 184, 80, kernels=(1, 3, 1), depthwise=1, squeeze=10, activation="relu")
    squeezes = [level.step.squeeze[0].out_channels for level in Mgic(as_released=True).design(wide).levels]
    assert squeezes == [48, 24, 16]


@pytest.mark.parametrize("source", ["torchvision:mobilenet_v2", "timm:mobilenetv4_conv_small"])
def test_what_is_not_refused_can_be_built(source):
    model = models.load(source, weights="none").model
    method = Mgic(transitions=True, group_size=8, coarsest=8)
    sites = [site for site in find_sites(model, torch.zeros(1, 3, 64, 64)) if isinstance(site.spec, StepSpec)]
    assert any("begins with a depthwise" in (method.why_not(site.spec) or "") for site in sites)
    for site in sites:
        if method.why_not(site.spec) is None:
            size = site.sizes[0]
            x = torch.zeros(2, site.spec.channels_in, size.height, size.width)
            assert method.build(site.spec)(x).shape[1] == site.spec.channels


class _Strided(nn.Module):
    """A stage-changing block, its shortcut registered before or after its convolutions."""

    def __init__(self, *, shortcut_first):
        super().__init__()
        shortcut = nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32)
        if shortcut_first:
            self.beside, self.norm = shortcut
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        if not shortcut_first:
            self.beside, self.norm = shortcut

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.norm(self.beside(x)))


def test_where_a_shortcut_is_registered_does_not_matter():
    last, first = _Strided(shortcut_first=False), _Strided(shortcut_first=True)
    for norm in (last.bn1, last.bn2, last.norm):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    first.load_state_dict(last.state_dict())
    starts = []
    for module in (last, first):
        host = nn.Sequential(module.eval())
        (site,) = [s for s in find_sites(host, torch.zeros(1, 16, 12, 12)) if isinstance(s.spec, StepSpec)]
        op = Mgic(transitions=True, group_size=8, coarsest=8).build(site.spec)
        op.project_(module)
        starts.append(op.state_dict())
    torch.testing.assert_close(*starts, rtol=0, atol=0)
    assert not torch.equal(last.bn1.weight, last.norm.weight)

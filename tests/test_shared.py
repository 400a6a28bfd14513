"""One kernel for several sites: what loses nothing, what weights alone give, and other methods shared."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hosts import Block, conv3, photos
from kernel_banks import bank, convolutions
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from lcc.calibrate import calibrate_, project_
from lcc.errors import RecipeError
from lcc.method_text import method_from_text
from lcc.methods import parse_method
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared, closest_multiples
from lcc.plan import Group, Plan, make_plan, rules_for
from lcc.specs import ConvSpec
from lcc.surgery import find_sites, replace_

IMAGES = photos(24, 12, 4)


def randomised(model, seed=0):
    """Return a network in float64 and eval mode whose norms do something."""
    torch.manual_seed(seed)
    for module in model.double().modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            for positive in (module.weight.data, module.running_var):
                positive.uniform_(0.5, 2)
            for signed in (module.bias.data, module.running_mean):
                signed.normal_()
    return model.eval()


@torch.no_grad()
def follow_(model, images):
    """Let every norm store the statistics of these images, in order of call."""

    def see(norm, inputs):
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    model(images)
    for handle in handles:
        handle.remove()


class Plain(nn.Module):
    """Convolutions of one shape in a row, with nothing else between them than an activation."""

    def __init__(self, count=3, **options):
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, **options}
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, **options) for _ in range(count))

    def forward(self, x):
        for conv in self.convs:
            x = F.hardtanh(conv(x), -4, 4)
        return x


class HalfNormed(nn.Module):
    """A norm behind the first of two convolutions, as in a pre-activation block."""

    def __init__(self, *, bias):
        super().__init__()
        self.conv1, self.bn, self.conv2 = conv3(4, bias=bias), nn.BatchNorm2d(4), conv3(4, bias=bias)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn(self.conv1(x))))


def with_equal_kernels(model):
    """Return the network with every convolution like the first one."""
    first, *others = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    for conv in others:
        conv.load_state_dict(first.state_dict())
    return model


EQUAL = {
    "norms": lambda: with_equal_kernels(randomised(nn.Sequential(Block(4), Block(4)))),
    "no norms": lambda: with_equal_kernels(randomised(Plain(bias=False))),
    "biases": lambda: with_equal_kernels(randomised(Plain())),
    "some norms": lambda: with_equal_kernels(randomised(HalfNormed(bias=False))),
    "some norms and biases": lambda: with_equal_kernels(randomised(HalfNormed(bias=True))),
    "depthwise": lambda: with_equal_kernels(randomised(Plain(groups=4, kernel_size=5, padding=2))),
}


def converted(model, method, images=None):
    """Return the converted copy, and its fits; from images, or from weights alone."""
    sites, copied = find_sites(model, IMAGES[:1]), copy.deepcopy(model)
    originals = replace_(copied, make_plan(sites, rules_for(method)))
    if images is None:
        return copied, project_(copied, originals)
    return copied, calibrate_(copied, originals, sites, images).fits


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("host", EQUAL)
def test_sharing_kernels_that_are_equal_changes_nothing(host, scale):
    model = EQUAL[host]()
    got, fits = converted(model, Shared(scale=scale))
    assert all(entry.kernel_error < 1e-12 for entry in fits.values())
    with torch.no_grad():
        torch.testing.assert_close(got(IMAGES), model(IMAGES), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("host", EQUAL)
def test_sharing_kernels_that_are_equal_changes_nothing_from_data_either(host, scale):
    model = EQUAL[host]()
    follow_(model, IMAGES)
    got, fits = converted(model, Shared(scale=scale), IMAGES)
    assert all(entry.relative_error < 1e-6 for entry in fits.values())  # the root of what rounds a square
    with torch.no_grad():
        torch.testing.assert_close(got(IMAGES), model(IMAGES), rtol=0, atol=1e-10)


@pytest.mark.parametrize("from_data", [False, True])
def test_with_scales_kernels_that_are_multiples_of_one_lose_nothing(from_data):
    model = EQUAL["norms"]()
    for block, factors in zip(model, ([1.0, -2, 0.5, 3], [-1.0, 1, 2, 4]), strict=True):
        block.conv2.weight.data *= torch.tensor(factors, dtype=torch.float64)[:, None, None, None]
    follow_(model, IMAGES)
    got, _ = converted(model, Shared(scale=True), IMAGES if from_data else None)
    with torch.no_grad():
        torch.testing.assert_close(got(IMAGES), model(IMAGES), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [False, True])
def test_what_a_norm_follows_is_fitted_no_worse_than_it_was_from_weights(scale):
    torch.manual_seed(0)
    model = nn.Sequential(Block(4), Block(4), Block(4)).double().eval()
    _, fits = converted(model, Shared(scale=scale), IMAGES)
    assert sum(f.relative_error**2 for f in fits.values()) < sum(f.start_error**2 for f in fits.values())


# From weights alone


@torch.no_grad()
def test_without_data_a_bank_takes_the_mean_of_its_kernels_and_biases():
    convs = convolutions()
    operators, fits = bank(Shared(), convs)
    mean = np.mean([conv.weight.numpy() for conv in convs], axis=0)
    for op, conv, entry in zip(operators, convs, fits, strict=True):
        np.testing.assert_allclose(op.kernel.weight, mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(op.bias, np.mean([c.bias.numpy() for c in convs], axis=0), atol=1e-12)
        wanted = conv.weight.numpy()
        error = np.linalg.norm(mean - wanted) / np.linalg.norm(wanted)
        assert entry.kernel_error == pytest.approx(error, rel=1e-10)


def alternating(kernels, rounds=500):
    """Find the closest multiples of one kernel for each output channel by alternating least squares."""
    rows = kernels.reshape(*kernels.shape[:2], -1)
    scales = np.ones(rows.shape[:2])
    for _ in range(rounds):
        kernel = np.einsum("lo,lop->op", scales, rows) / (scales**2).sum(0)[:, None]
        scales = np.einsum("op,lop->lo", kernel, rows) / (kernel**2).sum(1)
    return scales[:, :, None] * kernel


@torch.no_grad()
def test_with_scales_a_bank_takes_the_kernel_with_the_closest_multiples():
    convs = convolutions(count=4, bias=False)
    operators, fits = bank(Shared(scale=True), convs)
    kernels = np.stack([conv.weight.numpy() for conv in convs])
    closest = alternating(kernels).reshape(kernels.shape)
    for op, wanted in zip(operators, closest, strict=True):
        np.testing.assert_allclose(op.dense_kernel(), wanted, rtol=0, atol=1e-8)
    squares = [(f.kernel_error * np.linalg.norm(k)) ** 2 for f, k in zip(fits, kernels, strict=True)]
    spectra = [np.linalg.svd(kernels[:, o].reshape(4, -1), compute_uv=False) for o in range(4)]
    assert sum(squares) == pytest.approx(sum((values[1:] ** 2).sum() for values in spectra), rel=1e-10)
    assert sum(squares) < ((kernels - kernels.mean(0)) ** 2).sum()


@torch.no_grad()
def test_with_scales_the_bias_is_the_one_with_the_closest_multiples():
    convs = convolutions(count=4)
    operators, _ = bank(Shared(scale=True), convs)
    for channel in range(4):
        scales = np.array([op.scale[channel] for op in operators])
        biases = np.array([conv.bias[channel] for conv in convs])
        (wanted,) = np.linalg.lstsq(scales[:, None], biases)[0]
        assert float(operators[0].bias[channel]) == pytest.approx(wanted)


def test_the_scales_of_a_channel_are_one_on_average():
    scales, kernel = closest_multiples(torch.randn(5, 3, 2, 3, 3, dtype=torch.float64))
    assert kernel.shape == (3, 2, 3, 3)
    torch.testing.assert_close(scales.abs().mean(0), torch.ones(3, dtype=torch.float64))


# Other methods' operators, shared


@pytest.mark.parametrize(
    "inner", [LinearMix(), LinearMix(group_size=2, stencil="cross"), Circulant()], ids=str
)
@pytest.mark.parametrize("from_data", [False, True])
def test_sharing_another_method_gives_every_site_the_same_operator(inner, from_data):
    model = randomised(nn.Sequential(Block(4), Block(4)))
    got, fits = converted(model, Shared(method=inner), IMAGES if from_data else None)
    operators = [got.get_submodule(name) for name in fits]
    assert len(operators) == 4
    parameters = [list(op.parameters()) for op in operators]
    for own in parameters[1:]:
        assert all(mine is first for mine, first in zip(own, parameters[0], strict=True))
    alone = inner.build(operators[0].spec).double()
    alone.load_state_dict(operators[0].kernel.state_dict())
    for op in operators:
        with torch.no_grad():
            assert torch.equal(op(IMAGES), alone(IMAGES))
    if not from_data:
        mean = copy.deepcopy(model[0].conv1)
        mean.weight.data = torch.stack([model.get_submodule(name).weight for name in fits]).mean(0)
        alone.project_(mean)
        torch.testing.assert_close(operators[0].dense_kernel(), alone.dense_kernel(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Shared(), "shared has no closed form on convolutions, so it can't be shared"),
        (RdExplicit(), "rd_explicit has no closed form on convolutions, so it can't be shared"),
    ],
    ids=str,
)
def test_a_method_without_a_closed_form_is_not_shared(method, said):
    with pytest.raises(ValidationError, match=said):
        Shared(method=method)


def test_circulant_operators_have_one_size_for_all_channels_and_take_no_scales():
    with pytest.raises(ValidationError, match="circulant has one scale for all channels; leave scale out"):
        Shared(scale=True, method=Circulant())


def test_a_shared_method_survives_json_and_says_what_it_shares():
    method = Shared(scale=True, method=LinearMix(group_size=2))
    assert parse_method(method.model_dump(mode="json")) == method
    assert str(method) == "shared:scale=true,method=linear_mix:group_size=2"
    crosses = Shared(method=LinearMix(group_size=2, stencil="cross"), align=False)
    assert method_from_text(str(method)) == method
    assert method_from_text(str(crosses)) == crosses


def test_what_the_shared_method_refuses_the_bank_refuses():
    spec = ConvSpec(in_channels=4, out_channels=8, kernel_size=(3, 3))
    assert Shared().why_not(spec) is None
    assert Shared(method=Circulant()).why_not(spec) == Circulant().why_not(spec)


def test_the_operators_of_a_bank_that_differ_in_shape_are_refused():
    model = nn.Sequential(conv3(4, 4), conv3(4, 8))
    plan = Plan(groups=(Group(method=Shared(), sites=("0", "1")),))
    with pytest.raises(RecipeError, match="the plan shares one kernel between '0' and '1', which differ"):
        replace_(model, plan)

"""The first paper's networks: counts as it prints them, each function against one written on its tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from norms import normalised
from small_data import Form, idx_data
from torch import nn
from torch.nn import functional as F

import lcc
from lcc import artifact, models, pipeline
from lcc.comparison import plain_report
from lcc.counts import count_macs, count_norm_params, count_params
from lcc.errors import SourceError
from lcc.export import to_onnx
from lcc.paper_networks import PAPER_NETWORKS, STEPS, PaperNetwork
from lcc.plan import Plan
from lcc.recipe import Finetune, ModelPart
from lcc.settings import Settings
from lcc.surgery import find_sites
from lcc.tables import report_sheets, to_markdown
from lcc.train import finetune
from lcc.zoo import ZOO

QUICK = ("linear_mix", "rd_explicit")
DIFFUSING = ("rd_explicit", "rd_implicit", "rd_circulant")
# Of Table 2, by (size, classes): the weights as the paper counts them.
RESNET = {("a", 10): 1_555_274, ("b", 10): 3_494_122, ("c", 100): 6_324_900}
CHEAP = {("a", 10): 101_066, ("b", 10): 216_106, ("b", 100): 250_756, ("c", 100): 423_460}
LINEAR_MIX = {("a", 10): 195_146, ("b", 10): 421_738, ("b", 100): 456_388, ("c", 100): 788_900}
PUBLISHED = {"resnet": RESNET, "linear_mix": LINEAR_MIX, "mobilenet": CHEAP} | dict.fromkeys(DIFFUSING, CHEAP)
WITH_NORMS = {
    ("a", 10, "rd_explicit"): 103_818,
    ("a", 10, "mobilenet"): 105_610,
    ("a", 10, "linear_mix"): 197_898,
    ("a", 10, "resnet"): 1_558_026,
    ("b", 10, "rd_implicit"): 220_234,
    ("b", 10, "mobilenet"): 222_922,
    ("b", 10, "linear_mix"): 425_866,
    ("b", 10, "resnet"): 3_498_250,
    ("c", 100, "rd_circulant"): 429_284,
    ("c", 100, "mobilenet"): 433_124,
    ("c", 100, "linear_mix"): 794_724,
    ("c", 100, "resnet"): 6_330_724,
}
EXPECTED_MACS = {
    "resnet": (229.5, 514.1, 305.0),
    "mobilenet": (17.6, 35.9, 22.0),
    "linear_mix": (32.3, 67.3, 41.0),
}


def built(size: str, step: str, classes: int) -> nn.Module:
    return PAPER_NETWORKS[f"lowcost_{size}_{step}"](num_classes=classes)


def tiny(step: str, classes: int = 10, widths: tuple[int, ...] = (4, 8)) -> PaperNetwork:
    torch.manual_seed(0)
    return PaperNetwork(widths, STEPS[step], classes)


def with_lived_in_norms(network: nn.Module) -> nn.Module:
    """Return the network in float64 with statistics and scales that no start has."""
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def test_every_size_has_every_step_and_is_in_the_zoo():
    assert PAPER_NETWORKS.keys() == {f"lowcost_{size}_{step}" for size in "abc" for step in PUBLISHED}
    assert PAPER_NETWORKS.items() <= ZOO.items()


@pytest.mark.parametrize(
    ("step", "size", "classes", "count"),
    [(step, *key, count) for step, table in PUBLISHED.items() for key, count in table.items()],
)
def test_weights_number_as_published_batch_norm_left_out(step, size, classes, count):
    network = built(size, step, classes)
    assert count_params(network) - count_norm_params(network) == count


@pytest.mark.parametrize(("size", "classes", "step"), WITH_NORMS)
def test_batch_norms_add_what_their_channels_say(size, classes, step):
    assert count_params(built(size, step, classes)) == WITH_NORMS[size, classes, step]


@pytest.mark.parametrize("step", EXPECTED_MACS)
def test_macs_at_32_pixels_are_those_that_follow_from_the_layout(step):
    x = torch.zeros(1, 3, 32, 32)
    millions = [count_macs(built(size, step, 10), x).macs / 1e6 for size in "abc"]
    assert millions == pytest.approx(EXPECTED_MACS[step], abs=0.06)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [(32, 32), (96, 96), (17, 23)])
def test_images_of_any_size_give_one_score_for_each_class(step, shape):
    network = tiny(step, classes=7).eval()
    with torch.no_grad():
        scores = network(torch.randn(2, 3, *shape))
    assert network.num_classes == 7
    assert scores.shape == (2, 7)
    assert scores.isfinite().all()


def resnet_step(state, name, x):
    y = F.conv2d(x, state[f"{name}.conv1.weight"], padding=1)
    y = normalised(state, f"{name}.norm", y).clamp(min=0)
    return x + F.conv2d(y, state[f"{name}.conv2.weight"], padding=1)


def mobilenet_step(state, name, x):
    y = F.conv2d(x, state[f"{name}.conv1.weight"], padding=1, groups=x.shape[1])
    y = normalised(state, f"{name}.norm1", y).clamp(min=0)
    y = torch.einsum("oc,nchw->nohw", state[f"{name}.conv2.weight"][:, :, 0, 0], y)
    return normalised(state, f"{name}.norm2", y).clamp(min=0)


def linear_mix_step(state, name, x):
    def mixed(conv, x):
        pointwise = torch.einsum("oc,nchw->nohw", state[f"{conv}.pointwise.weight"][:, :, 0, 0], x)
        return pointwise + F.conv2d(x, state[f"{conv}.spatial.weight"], padding=1, groups=x.shape[1])

    y = normalised(state, f"{name}.norm", mixed(f"{name}.conv1", x)).clamp(min=0)
    return x + mixed(f"{name}.conv2", y)


REFERENCES = {"resnet": resnet_step, "mobilenet": mobilenet_step, "linear_mix": linear_mix_step}


@pytest.mark.parametrize("step", REFERENCES)
def test_forward_is_the_papers_layout_written_out(step):
    network = with_lived_in_norms(tiny(step, widths=(4, 8, 16)))
    state, images = network.state_dict(), torch.randn(2, 3, 17, 16, dtype=torch.float64)
    x = normalised(state, "norm", F.conv2d(images, state["conv.weight"], padding=2)).clamp(min=0)
    for block in range(3):
        for number in (1, 2, 3, 4):
            x = REFERENCES[step](state, f"blocks.{block}.step{number}", x)
        kernel = state[f"blocks.{block}.connect.conv.weight"]
        x = torch.cat([x, F.conv2d(x, kernel, padding=1, groups=x.shape[1])], dim=1)
        x = normalised(state, f"blocks.{block}.connect.norm", x)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * height, : 2 * width].unflatten(3, (width, 2)).unflatten(2, (height, 2)).mean((3, 5))
    want = x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(network(images), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_every_parameter_gets_a_gradient(step):
    network = tiny(step)
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("step", ["resnet", "linear_mix"])
def test_a_residual_steps_variance_grows_by_about_one_each(step):
    torch.manual_seed(0)
    steps = nn.Sequential(*(STEPS[step](64) for _ in range(4)))
    with torch.no_grad():
        grown = steps(torch.randn(8, 64, 24, 24)).var().item()
    assert 3.5 < grown < 6.5


@pytest.fixture
def loaded():
    """Return a function that gives a network of 16x16 images, its norms lived in."""

    def load(step):
        found = models.load(f"zoo:lowcost_a_{step}", weights="none", image_size=(16, 16))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with_lived_in_norms(found.model).float()
        return found

    return load


@pytest.mark.parametrize("step", STEPS)
def test_a_network_comes_back_from_its_directory_with_every_bit(step, loaded, tmp_path):
    before = loaded(step)
    artifact.save(before, tmp_path / "net")
    after = lcc.load(tmp_path / "net")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(after(x), before.model(x))


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=() if step in QUICK else pytest.mark.slow) for step in STEPS],
)
def test_a_network_runs_the_same_in_onnx_runtime(step, loaded, tmp_path):
    small = replace(loaded(step), model=with_lived_in_norms(tiny(step)).float())
    exported = to_onnx(small, tmp_path / "net.onnx", Plan())
    assert [entry.batch for entry in exported.parity] == [1, 3]
    assert max(entry.relative_error for entry in exported.parity) < 1e-4


def test_operators_of_a_network_are_sites_that_are_converted_already(loaded):
    sites = find_sites(loaded("linear_mix").model, torch.zeros(1, 3, 16, 16))
    done = {site.name for site in sites if site.obstacle == "converted already"}
    steps = (f"blocks.{block}.step{step}" for block in range(3) for step in range(1, 5))
    assert done == {f"{step}.conv{number}" for step in steps for number in (1, 2)}


def test_a_file_of_one_is_matched_with_the_networks_that_have_its_tensors(tmp_path):
    torch.save(built("b", "linear_mix", 10).state_dict(), tmp_path / "x.pth")
    with pytest.raises(SourceError, match="add --arch zoo:lowcost_b_linear_mix"):
        models.load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("step", STEPS)
def test_the_loss_falls_when_trained_from_scratch(step, tmp_path):
    options = Finetune(
        data=idx_data(tmp_path / "data", train=192), epochs=6, batch_size=16, optimizer="adam", lr=0.01,
        weight_decay=0.0, schedule="step", decay_rate=0.5, decay_epochs=2, warmup=0.0, distill=0.0,
        crop="resize", crop_scale=(0.5, 1.0),
    )  # fmt: skip
    network = tiny(step, classes=3)
    result = finetune(network, Form(), options, device="cpu", workers=0, say=lambda _: None)
    losses = [epoch.loss for epoch in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.accuracy.top1 > 90


def test_the_report_counts_with_and_without_batch_norm(tmp_path):
    part = ModelPart(source="zoo:lowcost_a_linear_mix", weights="none")
    settings = Settings(device="cpu", say=lambda _: None)
    (row,) = pipeline.report((part,), settings).models
    text = to_markdown(report_sheets(plain_report((row,))))
    assert "| parameters | 197,898 |" in text
    assert "norms left out | 195,146 |" in text

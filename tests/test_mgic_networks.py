from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from norms import lived_in
from torch import nn
from torch.nn import functional as F

import lcc
from lcc import artifact, models
from lcc.counts import count_macs, count_params
from lcc.export import to_onnx
from lcc.libraries import Preprocessing
from lcc.mgic_networks import MGIC_NETWORKS, MobileNetV3Mg, ResNetMg
from lcc.plan import Plan
from lcc.surgery import find_sites
from lcc.zoo import OF_IMAGENET, ZOO

# By name, for 1000 classes at 224x224: parameters, and GMACs as printed.
RESNETS = {
    "resnet_mg34_16": (2_813_096, 0.91),
    "resnet_mg34_32": (4_929_704, 1.59),
    "resnet_mg34_64": (8_806_568, 2.65),
    "resnet_mg50_16": (6_117_928, 1.49),
    "resnet_mg50_32": (9_748_520, 2.64),
    "resnet_mg50_32_64": (9_409_576, 2.35),
    "resnet_mg50_64": (16_303_144, 4.33),
}
TEN_CLASSES = {"resnet_mg18_16": 1_184_714, "resnet_mg18_32": 2_262_474, "resnet_mg18_64": 4_239_818}
# Printed only in millions of parameters and GMACs.
MOBILES = {
    "mobilenet_v3_mg_16": (4.20, 0.595),
    "mobilenet_v3_mg_32": (4.55, 0.799),
    "mobilenet_v3_mg_64": (5.03, 1.007),
    "mobilenet_v3_mg_stride2_16": (4.20, 0.156),
    "mobilenet_v3_mg_stride2_32": (4.55, 0.207),
    "mobilenet_v3_mg_stride2_64": (5.03, 0.259),
}


def tiny(*, bottleneck: bool, seed: int = 0) -> ResNetMg:
    torch.manual_seed(seed)
    network = ResNetMg((1, 2), 2, 4, widths=(4, 8), bottleneck=bottleneck, num_classes=3)
    return lived_in(network)


def test_the_networks_are_in_the_zoo():
    assert MGIC_NETWORKS.items() <= ZOO.items()
    assert MGIC_NETWORKS.keys() == (RESNETS | TEN_CLASSES | MOBILES).keys() == OF_IMAGENET


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_mg_counts_as_released(name):
    network = ZOO[name]()
    params, giga_macs = RESNETS[name]
    assert count_params(network) == params
    macs = count_macs(network, torch.zeros(1, 3, 224, 224))
    assert round(macs.macs / 1e9, 2) == giga_macs
    assert macs.uncounted == {}
    assert macs.never_called == ()


@pytest.mark.parametrize("name", TEN_CLASSES)
def test_a_resnet_mg_of_ten_classes_counts_as_released(name):
    assert count_params(ZOO[name](num_classes=10)) == TEN_CLASSES[name]


def test_the_released_drivers_default_counts_as_released():
    network = ResNetMg((1, 2, 2, 2), 32, 32, widths=(32, 64, 128, 256), num_classes=10)
    assert count_params(network) / 1e6 == pytest.approx(1.047, abs=5e-4)


@pytest.mark.parametrize("name", MOBILES)
def test_a_mobilenet_mg_counts_as_released(name):
    network = ZOO[name]()
    millions, giga_macs = MOBILES[name]
    assert round(count_params(network) / 1e6, 2) == millions
    macs = count_macs(network, torch.zeros(1, 3, 224, 224))
    assert round(macs.macs / 1e9, 3) == giga_macs
    assert macs.uncounted == {}
    assert macs.never_called == ()


class Written:
    """The released networks, written out on a state dict."""

    def __init__(self, state: dict[str, torch.Tensor], *, double_skips: bool, clips: bool) -> None:
        self.state, self.double_skips, self.clips = state, double_skips, clips

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2, groups=groups)

    def norm(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def step(self, name, x, stride, activation):
        """Return an MGIC block of the input; `activation` is its inner one."""
        if f"{name}.opening.weight" in self.state:
            x = self.conv(f"{name}.opening", x, stride)
        if f"{name}.opening_norm.weight" in self.state:
            x = self.norm(f"{name}.opening_norm", x).clamp(min=0)
        return self.cycle(f"{name}.finest", x, activation)

    def cycle(self, name, x, activation):
        if f"{name}.down.weight" not in self.state:
            return self.block(name, x, activation, coarsest=True)
        coarse = self.conv(f"{name}.down", x)
        if f"{name}.down_norm.weight" in self.state:
            coarse = self.norm(f"{name}.down_norm", coarse)
        z = self.cycle(f"{name}.coarser", coarse, activation)
        u = x + self.norm(f"{name}.up_norm", self.conv(f"{name}.up", z - coarse))
        return self.block(f"{name}.block", u, activation, coarsest=False)

    def block(self, name, u, activation, *, coarsest):
        y = u
        last = max(n for n in range(3) if f"{name}.convs.{n}.weight" in self.state)
        for number in range(last + 1):
            y = self.norm(f"{name}.norms.{number}", self.conv(f"{name}.convs.{number}", y))
            if number == last - 1 and f"{name}.gate.squeeze.weight" in self.state:
                y = self.gated(f"{name}.gate", y)
            if number < last:
                y = activation(y)
        if self.double_skips:
            return (y + u).clamp(min=0) + u
        return (u + (y.clamp(min=0) if coarsest and self.clips else y)).clamp(min=0)

    def gated(self, name, y):
        few = self.conv(f"{name}.squeeze", y.mean((2, 3), keepdim=True)).clamp(min=0)
        return y * ((self.conv(f"{name}.excite", few) + 3) / 6).clamp(0, 1)


def relu(x):
    return x.clamp(min=0)


def hard_swish(x):
    return x * ((x + 3) / 6).clamp(0, 1)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_mg_is_the_released_layout_written_out(bottleneck):
    network = tiny(bottleneck=bottleneck).double()
    written = Written(network.state_dict(), double_skips=False, clips=bottleneck)
    images = torch.randn(2, 3, 33, 28, dtype=torch.float64)
    x = relu(written.norm("bn", written.conv("conv", images, stride=2)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, block, stride in ((0, 0, 1), (1, 0, 2), (1, 1, 1)):
        x = written.step(f"stages.{stage}.{block}.cycle", x, stride, relu)
    state = network.state_dict()
    want = x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(network(images), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_a_mobilenet_mg_is_the_released_layout_written_out(stem_stride):
    torch.manual_seed(0)
    network = lived_in(MobileNetV3Mg(16, 16, stem_stride=stem_stride, num_classes=3)).double()
    for module in network.modules():  # with norms so lived in, every block would double what it gets
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.1)
    written = Written(network.state_dict(), double_skips=True, clips=False)
    images = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    x = hard_swish(written.norm("stem.1", written.conv("stem.0", images, stem_stride)))
    strides = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1)
    for block, stride in enumerate(strides):
        x = written.step(f"blocks.{block}.cycle", x, stride, hard_swish if block > 5 else relu)
    x = relu(written.conv("features", relu(written.norm("bn", written.conv("conv", x)))))
    state = network.state_dict()
    want = x.flatten(2).max(2).values @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(network(images), want, rtol=1e-10, atol=1e-10)


def test_squeezes_are_rounded_to_eights_at_every_level():
    state = ZOO["mobilenet_v3_mg_16"]().state_dict()
    got = {
        name.removesuffix(".gate.squeeze.weight").removeprefix("blocks.10.cycle."): tuple(tensor.shape[:2])
        for name, tensor in state.items()
        if name.startswith("blocks.10.") and name.endswith("gate.squeeze.weight")
    }
    # expansion 480, at 80 -> 112 channels: a quarter of 480, 240, 120 and 60
    assert got == {
        "finest.block": (120, 480),
        "finest.coarser.block": (64, 240),
        "finest.coarser.coarser.block": (32, 120),
        "finest.coarser.coarser.coarser": (16, 60),
    }


def test_convolutions_start_with_the_variance_of_he_initialisation():
    torch.manual_seed(0)
    network = ZOO["resnet_mg34_32"]()
    cycle = network.stages[3][1].cycle.finest
    for conv, fan_out in (
        (cycle.down, 256),
        (cycle.up, 512),
        (cycle.block.convs[0], 9 * 512),
        (network.conv, 49 * 64),
    ):
        assert conv.weight.var().item() == pytest.approx(2 / fan_out, rel=0.1)


@pytest.mark.parametrize(
    "build", [lambda: tiny(bottleneck=False), lambda: tiny(bottleneck=True), lambda: MobileNetV3Mg(32, 32)]
)
def test_every_parameter_gets_a_gradient(build):
    network = build().train()
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet_mg34_16", "resnet_mg50_32", "mobilenet_v3_mg_32"])
def test_scores_at_the_start_are_of_moderate_size(name):
    torch.manual_seed(0)
    network = ZOO[name]().train()
    with torch.no_grad():
        scores = network(torch.randn(4, 3, 96, 96))
    assert 1e-3 < scores.std() < 1e3


def test_they_see_images_as_imagenet_networks_do():
    loaded = models.load("zoo:resnet_mg18_16", weights="none")
    assert loaded.preprocessing == Preprocessing()
    assert loaded.model.num_classes == 1000
    few = models.load("zoo:mobilenet_v3_mg_stride2_16", weights="none", num_classes=7)
    assert few.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_their_blocks_are_sites_that_are_converted_already():
    sites = find_sites(tiny(bottleneck=False), torch.zeros(1, 3, 32, 32))
    done = {site.name for site in sites if site.obstacle == "converted already"}
    assert done == {"stages.0.0", "stages.1.0", "stages.1.1"}


@pytest.mark.parametrize("name", ["resnet_mg18_16", "mobilenet_v3_mg_stride2_16"])
def test_a_network_comes_back_from_its_directory_with_every_bit(name, tmp_path):
    before = models.load(f"zoo:{name}", weights="none", image_size=(64, 64))
    artifact.save(before, tmp_path / "net")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(lcc.load(tmp_path / "net")(x), before.model(x))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_mg_runs_the_same_in_onnx_runtime(bottleneck, tmp_path):
    loaded = models.load("zoo:resnet_mg18_16", weights="none", image_size=(64, 64))
    exported = to_onnx(replace(loaded, model=tiny(bottleneck=bottleneck)), tmp_path / "net.onnx", Plan())
    assert max(entry.relative_error for entry in exported.parity) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)  # torch's exporter takes its time over 800 nodes
def test_a_mobilenet_mg_runs_the_same_in_onnx_runtime(tmp_path):
    loaded = models.load("zoo:mobilenet_v3_mg_stride2_16", weights="none", image_size=(64, 64))
    exported = to_onnx(loaded, tmp_path / "net.onnx", Plan())
    assert max(entry.relative_error for entry in exported.parity) < 1e-4

from __future__ import annotations

import copy
from collections import defaultdict

import onnx
import pytest
import torch
from norms import lived_in, normalised
from small_data import idx_data
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import lcc
from lcc import artifact, models
from lcc.counts import count_macs, count_params
from lcc.errors import SourceError
from lcc.export import to_onnx
from lcc.libraries import CIFAR
from lcc.plan import Plan
from lcc.recipe import Finetune
from lcc.sharing_networks import SHARING_NETWORKS, ConvMixer, SeResNet
from lcc.steps import _follow_
from lcc.train import finetune
from lcc.zoo import ZOO

# By name: parameters for 10 and for 100 classes, MACs at 32x32 as printed.
CONVMIXERS = {"convmixer_256_16": (1_409_034, 1_432_164), "convmixer_256_16_shared": (107_274, 130_404)}
DENSE = {
    2: (2_771_290, 2_794_420),
    3: (4_332_122, 4_355_252),
    4: (5_892_954, 5_916_084),
    6: (9_014_618, 9_037_748),
    8: (12_136_282, 12_159_412),
    10: (15_257_946, 15_281_076),
}
SHARED = {
    2: (1_223_002, 1_246_132),
    3: (1_235_546, 1_258_676),
    4: (1_248_090, 1_271_220),
    6: (1_273_178, 1_296_308),
    8: (1_298_266, 1_321_396),
    10: (1_323_354, 1_346_484),
}
MEGA_MACS = {2: 392.6, 3: 619.1, 4: 845.6, 6: 1298.6, 8: 1751.7, 10: 2204.7}
PARTLY = {
    (3,): 1_591_642,
    (2, 3): 1_296_730,
    (2,): 2_476_378,
    (1,): 2_697_562,
    (1, 3): 1_517_914,
    (1, 2): 2_402_650,
}
TABLE = CONVMIXERS | {
    f"se_resnet_d{blocks}{suffix}": counts
    for suffix, table in (("", DENSE), ("_shared", SHARED))
    for blocks, counts in table.items()
}


def small_mixer(*, shared: bool, seed: int = 0) -> ConvMixer:
    torch.manual_seed(seed)
    return lived_in(ConvMixer(8, 3, kernel=5, patch=2, num_classes=3, shared=shared))


def small_se_resnet(*, shared: bool, seed: int = 0) -> SeResNet:
    torch.manual_seed(seed)
    return lived_in(SeResNet(2, num_classes=3, shared_stages=(1, 2, 3) if shared else ()))


SMALL = {"convmixer": small_mixer, "se_resnet": small_se_resnet}
EXPECTED_TIES = {
    "convmixer": [
        [f"blocks.{block}.{conv}.{part}" for block in range(3)]
        for conv in ("mix.depthwise", "pointwise")
        for part in ("weight", "bias")
    ],
    "se_resnet": [
        [f"layer{stage}.{conv}.weight" for conv in ("0.conv2", "1.conv1", "1.conv2")] for stage in (1, 2, 3)
    ],
}


def ties(network: nn.Module) -> list[list[str]]:
    """Return the names of every Parameter object that has more than one."""
    names = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(found for found in names.values() if len(found) > 1)


def memories(network: nn.Module) -> list[list[str]]:
    """Return the names of every stretch of memory that has more than one."""
    names = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names[parameter.data_ptr()].append(name)
    return sorted(found for found in names.values() if len(found) > 1)


def test_the_networks_are_in_the_zoo():
    assert SHARING_NETWORKS.items() <= ZOO.items()
    assert SHARING_NETWORKS.keys() - TABLE.keys() == {f"se_resnet_d{blocks}_shared_23" for blocks in DENSE}


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [(name, *pair) for name, counts in TABLE.items() for pair in zip((10, 100), counts, strict=True)],
)
def test_parameters_number_as_released(name, classes, count):
    assert count_params(ZOO[name](num_classes=classes)) == count


@pytest.mark.parametrize("stages", PARTLY)
def test_parameters_of_partly_shared_networks_number_as_released(stages):
    assert count_params(SeResNet(2, shared_stages=stages)) == PARTLY[stages]


@pytest.mark.parametrize("blocks", DENSE)
def test_a_partly_shared_network_keeps_the_kernels_of_the_first_stage_apart(blocks):
    saved = sum((2 * blocks - 2) * 9 * channels**2 for channels in (128, 256))
    assert count_params(ZOO[f"se_resnet_d{blocks}_shared_23"]()) == DENSE[blocks][0] - saved


@pytest.mark.parametrize("suffix", ["", "_shared", "_shared_23"])
@pytest.mark.parametrize("blocks", MEGA_MACS)
def test_macs_are_those_of_the_layout_shared_or_not(blocks, suffix):
    count = count_macs(ZOO[f"se_resnet_d{blocks}{suffix}"](), torch.zeros(1, 3, 32, 32))
    assert count.macs / 1e6 == pytest.approx(MEGA_MACS[blocks], abs=0.06)
    assert count.uncounted == {}
    assert count.never_called == ()


@pytest.mark.parametrize("name", CONVMIXERS)
def test_macs_of_a_convmixer_are_1_414_giga(name):
    count = count_macs(ZOO[name](), torch.zeros(1, 3, 32, 32))
    pixel = 3 * 256 + 16 * (256 * 81 + 256 * 256)
    assert count.macs == 32 * 32 * pixel + 256 * 10
    assert count.macs / 1e9 == pytest.approx(1.414, abs=5e-4)


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def mixer_written_out(state, x):
    x = normalised(state, "bn", gelu(F.conv2d(x, state["conv.weight"], state["conv.bias"], stride=2)))
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        y = F.conv2d(
            x,
            state[f"{block}.mix.depthwise.weight"],
            state[f"{block}.mix.depthwise.bias"],
            padding=2,
            groups=8,
        )
        x = x + normalised(state, f"{block}.mix.bn", gelu(y))
        y = torch.einsum("oc,nchw->nohw", state[f"{block}.pointwise.weight"][:, :, 0, 0], x)
        x = normalised(state, f"{block}.bn", gelu(y + state[f"{block}.pointwise.bias"][:, None, None]))
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


def se_resnet_written_out(state, x):
    x = normalised(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = normalised(state, f"{name}.bn1", y).clamp(min=0)
            y = normalised(state, f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1))
            few = (y.flatten(2).mean(2) @ state[f"{name}.se.squeeze.weight"].T).clamp(min=0)
            y = y / (1 + (-few @ state[f"{name}.se.excite.weight"].T).exp())[:, :, None, None]
            if block == 0:
                x = F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride)
                x = normalised(state, f"{name}.shortcut.1", x)
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


WRITTEN_OUT = {"convmixer": mixer_written_out, "se_resnet": se_resnet_written_out}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_forward_is_the_layout_written_out(kind, shared):
    network = SMALL[kind](shared=shared).double()
    x = torch.randn(2, 3, 16, 14, dtype=torch.float64)
    want = WRITTEN_OUT[kind](network.state_dict(), x)
    torch.testing.assert_close(network(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SMALL)
def test_shared_layers_hold_one_parameter_object_and_others_their_own(kind):
    assert ties(SMALL[kind](shared=True)) == sorted(EXPECTED_TIES[kind])
    assert ties(SMALL[kind](shared=False)) == []


def test_a_shared_kernel_starts_as_one_of_its_shape_does():
    torch.manual_seed(0)
    convmixer = ZOO["convmixer_256_16_shared"]()
    se_resnet = ZOO["se_resnet_d3_shared"]()
    for conv, fan_in in (
        (convmixer.blocks[15].mix.depthwise, 81),
        (convmixer.blocks[15].pointwise, 256),
        (se_resnet.layer3[2].conv1, 9 * 256),
        (se_resnet.layer3[0].conv1, 9 * 128),
    ):
        assert conv.weight.var().item() == pytest.approx(2 / fan_in, rel=0.05)
    assert convmixer.blocks[7].pointwise.bias.count_nonzero() == 0


CHANGES = {
    "channels_last": lambda network: network.to(memory_format=torch.channels_last),
    "half": lambda network: network.half(),
    "bfloat16 and back": lambda network: network.bfloat16().float(),
    "double": lambda network: network.double(),
    "deepcopy": copy.deepcopy,
    "deepcopy of channels_last": lambda network: copy.deepcopy(network.to(memory_format=torch.channels_last)),
    "average": lambda network: AveragedModel(network, use_buffers=True).module,
    "frozen": lambda network: network.requires_grad_(requires_grad=False),
    "own state": lambda network: (network.load_state_dict(network.state_dict()), network)[1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", SMALL)
def test_ties_survive(kind, change):
    changed = CHANGES[change](SMALL[kind](shared=True))
    assert ties(changed) == memories(changed) == sorted(EXPECTED_TIES[kind])


@pytest.mark.parametrize("kind", SMALL)
def test_channels_last_gives_the_same_scores(kind):
    network = SMALL[kind](shared=True).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    want = network(x)
    last = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SMALL)
def test_an_optimiser_holds_a_shared_parameter_once(kind):
    shared, dense = SMALL[kind](shared=True), SMALL[kind](shared=False)
    held = [
        len(torch.optim.SGD(each.parameters(), lr=0.1).param_groups[0]["params"]) for each in (shared, dense)
    ]
    assert held[1] - held[0] == sum(len(names) - 1 for names in EXPECTED_TIES[kind])


@pytest.mark.parametrize("kind", SMALL)
def test_the_gradient_of_a_shared_parameter_is_the_sum_over_its_layers(kind):
    shared, dense = SMALL[kind](shared=True).double(), SMALL[kind](shared=False).double()
    dense.load_state_dict(shared.state_dict())
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for network in (shared, dense):
        network(x).square().sum().backward()
    apart = dict(dense.named_parameters())
    for names in EXPECTED_TIES[kind]:
        want = sum(apart[name].grad for name in names)
        got = dict(shared.named_parameters())[names[0]].grad
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert want.abs().sum() > 0


def trained(network: nn.Module, tmp_path, **options: object) -> nn.Module:
    options = {
        "epochs": 2, "batch_size": 16, "lr": 0.05, "distill": 0.0, "crop": "none", "warmup": 0.0, **options,
    }  # fmt: skip
    data = idx_data(tmp_path / "data")
    form = CIFAR.model_copy(update={"image_size": (8, 8)})
    finetune(network, form, Finetune(data=data, **options), device="cpu", workers=0, say=lambda _: None)
    return network


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"channels_last": True, "ema": 0.9}])
@pytest.mark.parametrize("kind", SMALL)
def test_ties_survive_training_and_the_shared_kernel_moves(kind, options, tmp_path):
    before = SMALL[kind](shared=True)
    network = trained(copy.deepcopy(before), tmp_path, **options)
    assert ties(network) == memories(network) == sorted(EXPECTED_TIES[kind])
    name = EXPECTED_TIES[kind][0][0]
    assert not torch.equal(network.state_dict()[name], before.state_dict()[name])


@pytest.mark.parametrize("kind", SMALL)
def test_a_moving_average_takes_a_shared_kernel_one_step_and_not_one_for_each_layer(kind):
    average, network = SMALL[kind](shared=True).double(), SMALL[kind](shared=True, seed=1).double()
    want = [
        0.9 * old + 0.1 * new for old, new in zip(average.parameters(), network.parameters(), strict=True)
    ]
    _follow_(average, network, 0.9)
    for got, wanted in zip(average.parameters(), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SMALL)
def test_a_shared_network_is_stored_once_and_loads_with_its_ties(kind, tmp_path):
    name = {"convmixer": "convmixer_256_16_shared", "se_resnet": "se_resnet_d2_shared"}[kind]
    loaded = models.load(f"zoo:{name}", weights="none", image_size=(16, 16))
    full = lived_in(loaded.model)
    artifact.save(loaded, tmp_path / "net")
    again = lcc.load(tmp_path / "net")
    assert ties(again) == memories(again) == ties(full)
    assert len(ties(again)) == len(EXPECTED_TIES[kind])
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    assert size == pytest.approx(stored_bytes(full), rel=0.05)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), full(x))


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of parameters and buffers, each counted once."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("name", ["convmixer_256_16_shared", "se_resnet_d2_shared", "se_resnet_d2_shared_23"])
def test_an_onnx_file_holds_a_shared_kernel_once(name, tmp_path):
    loaded = models.load(f"zoo:{name}", weights="none")
    lived_in(loaded.model)
    exported = to_onnx(loaded, tmp_path / "net.onnx", Plan())
    graph = onnx.load(tmp_path / "net.onnx").graph
    kernels = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    convs = [module for module in loaded.model.modules() if isinstance(module, nn.Conv2d)]
    assert len(kernels) == len(convs)
    assert len(set(kernels)) == len({id(conv.weight) for conv in convs}) < len(convs)
    assert exported.size_bytes == pytest.approx(stored_bytes(loaded.model), rel=0.05)


def test_a_file_whose_kernels_differ_is_not_squeezed_into_a_shared_network(tmp_path):
    torch.save(ZOO["se_resnet_d2"]().state_dict(), tmp_path / "x.pth")
    with pytest.raises(SourceError) as refused:
        models.load("zoo:se_resnet_d2_shared_23", weights=str(tmp_path / "x.pth"))
    assert "does not fit zoo:se_resnet_d2_shared_23: 4 shared in the network, not in the file" in str(
        refused.value
    )
    assert str(refused.value).endswith("; it fits zoo:se_resnet_d2")


def test_a_file_of_a_shared_network_goes_into_it_and_into_a_dense_one(tmp_path):
    shared = lived_in(ZOO["se_resnet_d2_shared"]())
    torch.save(shared.state_dict(), tmp_path / "x.pth")
    x = torch.randn(2, 3, 32, 32)
    for name in ("se_resnet_d2_shared", "se_resnet_d2"):
        loaded = models.load(f"zoo:{name}", weights=str(tmp_path / "x.pth"))
        assert torch.equal(loaded.model(x), shared(x))

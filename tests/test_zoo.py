from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from lcc.mgic_networks import MGIC_NETWORKS
from lcc.paper_networks import PAPER_NETWORKS
from lcc.sharing_networks import SHARING_NETWORKS
from lcc.zoo import ZOO, BasicBlock, CifarResNet, Subsample

BLOCKS = {
    "cifar_resnet20": 3,
    "cifar_resnet32": 5,
    "cifar_resnet44": 7,
    "cifar_resnet56": 9,
    "cifar_resnet110": 18,
}
PUBLISHED_MILLIONS = {
    "cifar_resnet20": 0.27,
    "cifar_resnet32": 0.46,
    "cifar_resnet44": 0.66,
    "cifar_resnet56": 0.85,
    "cifar_resnet110": 1.7,
}


def params_by_formula(blocks: int, classes: int) -> int:
    total = 9 * 3 * 16 + 2 * 16
    for c_in, c in ((16, 16), (16, 32), (32, 64)):
        total += 9 * c_in * c + (2 * blocks - 1) * 9 * c * c + 2 * blocks * 2 * c
    return total + 64 * classes + classes


def names_of_public_checkpoint(blocks: int) -> set[str]:
    def norm(name):
        return {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")}

    names = {"conv1.weight", "linear.weight", "linear.bias"} | norm("bn1")
    for stage in (1, 2, 3):
        for block in range(blocks):
            for i in (1, 2):
                names |= {f"layer{stage}.{block}.conv{i}.weight"} | norm(f"layer{stage}.{block}.bn{i}")
    return names


def test_the_table_holds_the_networks_this_file_checks():
    others = PAPER_NETWORKS | SHARING_NETWORKS | MGIC_NETWORKS
    assert ZOO.keys() - others.keys() == BLOCKS.keys() == PUBLISHED_MILLIONS.keys()


@pytest.mark.parametrize("name", BLOCKS)
def test_parameter_counts_are_those_of_the_paper_and_of_the_formula(name):
    count = sum(parameter.numel() for parameter in ZOO[name]().parameters())
    assert count == params_by_formula(BLOCKS[name], 10)
    assert count / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.02)


def test_resnet20_has_269722_parameters():
    assert sum(parameter.numel() for parameter in ZOO["cifar_resnet20"]().parameters()) == 269_722


@pytest.mark.parametrize("name", BLOCKS)
def test_tensors_are_named_as_in_the_public_checkpoints(name):
    got = {key for key in ZOO[name]().state_dict() if not key.endswith("num_batches_tracked")}
    assert got == names_of_public_checkpoint(BLOCKS[name])


def test_class_count_is_the_width_of_the_last_layer():
    network = ZOO["cifar_resnet20"](num_classes=7)
    assert network.num_classes == 7
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
def test_option_a_shortcut_equals_its_definition_pixel_by_pixel(height, width):
    x = np.random.default_rng(0).normal(size=(2, 4, height, width))
    want = np.zeros((2, 8, (height + 1) // 2, (width + 1) // 2))
    for n, c, i, j in np.ndindex(2, 4, *want.shape[2:]):
        want[n, c + 2, i, j] = x[n, c, 2 * i, 2 * j]
    np.testing.assert_array_equal(Subsample(2)(torch.from_numpy(x)).numpy(), want)


def reference_forward(state: dict[str, torch.Tensor], x: torch.Tensor, blocks: int) -> torch.Tensor:
    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{p}"][:, None, None] for p in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    x = torch.clamp(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"), min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1")
            y = norm(F.conv2d(torch.clamp(y, min=0), state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:], dtype=x.dtype)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = torch.clamp(x + y, min=0)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


def test_forward_equals_a_reference_written_on_the_state_dict():
    torch.manual_seed(0)
    network = CifarResNet(blocks=2, num_classes=5).double().eval()
    state = network.state_dict()
    for name, tensor in state.items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) + 0.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference_forward(state, x, 2), rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient():
    network = ZOO["cifar_resnet20"]()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_convolutions_start_with_the_variance_of_he_initialisation():
    torch.manual_seed(0)
    network = CifarResNet(blocks=2)
    assert network.layer3[1].conv1.weight.var().item() == pytest.approx(2 / (9 * 64), rel=0.05)


def test_a_widening_block_runs_the_same_in_onnx_runtime(tmp_path):
    block, x = BasicBlock(4, 8).eval(), torch.randn(3, 4, 9, 7)
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (x[:2],), path, dynamo=True, verbose=False, dynamic_shapes=({0: "n"},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, block(x).detach().numpy(), atol=1e-5)

"""Converted networks whose kernels are shared: shared they stay, whatever is done to them, and in files."""

from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from hosts import photos
from small_data import idx_data
from torch.optim.swa_utils import AveragedModel

import lcc
from lcc import artifact, models
from lcc.banks import settle_banks_
from lcc.calibrate import project_
from lcc.counts import count_params
from lcc.export import to_onnx
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.plan import make_plan, rules_for
from lcc.recipe import Finetune
from lcc.surgery import find_sites, replace_
from lcc.train import finetune

METHODS = {
    "plain": Shared(),
    "scale": Shared(scale=True),
    "two kernels": Shared(kernels=2, align=False),
    "linear mix": Shared(method=LinearMix()),
    "linear mix, scale": Shared(scale=True, method=LinearMix()),
    "circulant": Shared(method=Circulant()),
}


def converted(method, source="zoo:cifar_resnet20", size=16):
    """Return a converted network, with norms as they are after training, and its plan."""
    loaded = models.load(source, weights="none", image_size=(size, size))
    model = loaded.model
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for positive in (module.weight.data, module.running_var):
                positive.uniform_(0.5, 1.5)
            for signed in (module.bias.data, module.running_mean):
                signed.normal_(std=0.3)
    example = photos(1, size).float()
    sites = find_sites(model, example)
    plan, _ = settle_banks_(model, sites, make_plan(sites, rules_for(method)), example)
    project_(model, replace_(model, plan))
    for operator in (model.get_submodule(name) for name in plan.methods()):
        if operator.scale is not None:
            operator.scale.data.uniform_(0.5, 1.5)
    return loaded, plan


@pytest.fixture(scope="module", params=METHODS)
def network(request):
    return converted(METHODS[request.param])


def banks(model, plan):
    """Return how many stretches of memory, and parameters, the kernels of every bank are."""
    found = []
    for group in plan.groups:
        kernels = [list(model.get_submodule(site).kernel.parameters()) for site in group.sites]
        memory = {parameter.data_ptr() for own in kernels for parameter in own}
        found.append((len({p for own in kernels for p in own}), len(memory)))
    return found


def once(model, plan):
    """Return what `banks` gives where every kernel is there once."""
    alone = [len(list(model.get_submodule(group.sites[0]).kernel.parameters())) for group in plan.groups]
    return [(count, count) for count in alone]


CHANGES = {
    "nothing": lambda model: model,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "half": lambda model: model.half(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
    "deepcopy": copy.deepcopy,
    "deepcopy of channels_last": lambda model: copy.deepcopy(model.to(memory_format=torch.channels_last)),
    "average": lambda model: AveragedModel(model, use_buffers=True).module,
    "own state": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernels_of_a_converted_network_stay_shared(network, change):
    (loaded, plan) = network
    changed = CHANGES[change](copy.deepcopy(loaded.model))
    assert banks(changed, plan) == once(changed, plan)
    assert count_params(changed) == count_params(loaded.model)


def test_an_optimiser_holds_the_kernel_of_a_bank_once(network):
    loaded, plan = network
    held = torch.optim.SGD(loaded.model.parameters(), lr=0.1).param_groups[0]["params"]
    assert sum(parameter.numel() for parameter in held) == count_params(loaded.model)
    for group in plan.groups:
        kernel = set(loaded.model.get_submodule(group.sites[-1]).kernel.parameters())
        assert sum(parameter in kernel for parameter in held) == len(kernel)


@pytest.mark.parametrize("options", [{}, {"channels_last": True, "ema": 0.9}])
@pytest.mark.parametrize("kind", ["scale", "linear mix"])
def test_kernels_stay_shared_in_training_and_move(kind, options, tmp_path):
    loaded, plan = converted(METHODS[kind], size=8)
    before = copy.deepcopy(loaded.model)
    options = {"epochs": 1, "batch_size": 16, "lr": 0.05, "distill": 0.0, "crop": "none", **options}
    data = Finetune(data=idx_data(tmp_path / "data"), **options)
    finetune(loaded.model, loaded.preprocessing, data, device="cpu", workers=0, say=lambda _: None)
    assert banks(loaded.model, plan) == once(before, plan)
    for group in plan.groups:
        old, new = (m.get_submodule(group.sites[0]).dense_kernel() for m in (before, loaded.model))
        assert not torch.equal(old, new)


def needed_bytes(model):
    """Return the bytes of the parameters and buffers, each once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_directory_has_every_kernel_once_and_gives_the_network_back(network, tmp_path):
    loaded, plan = network
    artifact.save(loaded, tmp_path / "net", plan=plan)
    again = lcc.load(tmp_path / "net")
    assert banks(again, plan) == once(again, plan)
    x = photos(2, 16).float()
    assert torch.equal(again(x), loaded.model.eval()(x))
    further = sum((len(group.sites) - 1) * len(kernels(loaded.model, group)) for group in plan.groups)
    assert len(json.loads((tmp_path / "net" / "manifest.json").read_text())["ties"]) == further
    stored = sum(t.numel() * t.element_size() for t in set(again.state_dict(keep_vars=True).values()))
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "net" / "model.safetensors").read_bytes()[:8], "little")
    assert size == stored + 8 + header  # the rest of a small file are the tensors' names


def kernels(model, group):
    return list(model.get_submodule(group.sites[0]).kernel.parameters())


ROUNDED = 1e-4  # of the largest output, as `to_onnx` demands


@pytest.mark.parametrize("kind", ["plain", "scale", "two kernels", "linear mix, scale"])
def test_an_onnx_file_has_every_kernel_once_and_no_scale_before_a_norm(kind, tmp_path):
    loaded, plan = converted(METHODS[kind])
    exported = to_onnx(loaded, tmp_path / "net.onnx", plan)
    assert all(entry.relative_error < ROUNDED for entry in exported.parity)
    assert exported.lowering_error is None
    assert_shared(tmp_path / "net.onnx", loaded.model, plan)


def assert_shared(path, model, plan):
    graph = onnx.load(path).graph
    types = [node.op_type for node in graph.node]
    assert "Mul" not in types
    converted_sites = sum(len(group.sites) for group in plan.groups)
    terms = len(kernels(model, plan.groups[0]))  # a sum's norm goes to each of its terms
    assert types.count("BatchNormalization") == converted_sites * terms
    read = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    repeated = {name: read.count(name) for name in read if read.count(name) > 1}
    assert sorted(repeated.values()) == sorted(len(g.sites) for g in plan.groups for _ in kernels(model, g))
    stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert stored <= needed_bytes(model)


@pytest.mark.parametrize("kind", ["plain", "two kernels"])
def test_the_files_of_a_converted_resnet18_are_as_large_as_its_numbers(kind, tmp_path):
    loaded, plan = converted(METHODS[kind], "torchvision:resnet18", 64)
    needed = needed_bytes(loaded.model)
    exported = to_onnx(loaded, tmp_path / "net.onnx", plan)
    assert_shared(tmp_path / "net.onnx", loaded.model, plan)
    artifact.save(loaded, tmp_path / "net", plan=plan)
    assert exported.size_bytes == pytest.approx(needed, rel=0.05)
    assert (tmp_path / "net" / "model.safetensors").stat().st_size == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("frozen", [("first",), ("last",), ("first", "last")])
def test_a_shared_kernel_is_trained_if_one_of_its_sites_was(frozen):
    loaded = models.load("zoo:cifar_resnet20", weights="none")
    sites = find_sites(loaded.model, photos(1, 32).float())
    plan = make_plan(sites, rules_for(Shared(align=False), ("layer3.1.*",)))
    (names,) = (group.sites for group in plan.groups)
    assert len(names) == 2
    for which in frozen:
        loaded.model.get_submodule(names[0 if which == "first" else -1]).requires_grad_(requires_grad=False)
    replace_(loaded.model, plan)
    kernels = {loaded.model.get_submodule(name).kernel.weight for name in names}
    assert [kernel.requires_grad for kernel in kernels] == [len(frozen) == 1]

"""lcc directories: what goes in comes out, bit for bit; what they tell of their history; writing back."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_networks import (
    DONE,
    FITS,
    RECIPE_TEXT,
    SMALL,
    SOURCE,
    Net,
    converted_network,  # noqa: F401  # the fixture `converted`
    in_memory,
    same_tensors,
    saved_network,  # noqa: F401  # the fixture `saved`
    seeded_on_one_thread,  # noqa: F401  # a fixture of every test
)
from torch import nn

import lcc
from lcc import artifact, models, probe, surgery
from lcc.directory import PROBE, RECIPE, WEIGHTS
from lcc.errors import ArtifactError
from lcc.manifest import Manifest
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdCirculant
from lcc.models import Loaded
from lcc.network import open_network
from lcc.plan import Group, Plan, make_plan, rules_for
from lcc.recipe import ModelPart

# Round trips


def test_a_converted_network_comes_back_with_the_same_tensors(converted, saved):
    assert same_tensors(artifact.load(saved).loaded.model, converted[0].model)


def test_a_converted_network_answers_bit_for_bit_the_same_in_a_new_process(converted, saved, tmp_path):
    x = torch.randn(3, 3, 32, 32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, torch, lcc\nfrom safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "y = lcc.load(sys.argv[1])(load_file(sys.argv[2])['x']).detach(); save_file({'y': y}, sys.argv[3])"
    )
    files = [str(tmp_path / name) for name in ("net", "x.safetensors", "y.safetensors")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, cwd=lcc.__path__[0] + "/..")
    assert torch.equal(load_file(files[2])["y"], converted[0].model(x))


def test_a_pretrained_like_library_network_comes_back(tmp_path):
    loaded = models.load("torchvision:resnet18", weights="none", num_classes=7, image_size=(64, 64))
    artifact.save(loaded, tmp_path / "net")
    assert same_tensors(artifact.load(tmp_path / "net").loaded.model, loaded.model)


def test_what_was_said_about_the_network_comes_back(converted, saved):
    got = artifact.load(saved)
    assert got.directory == saved
    assert got.manifest.plan == converted[1]
    assert got.manifest.fits == FITS
    assert got.manifest.history == (DONE,)
    assert got.loaded.source == converted[0].source
    assert got.loaded.preprocessing == converted[0].preprocessing
    assert got.loaded.class_names == tuple("abcdefghij")


def test_the_recipe_is_kept_as_given(saved):
    assert (saved / RECIPE).read_bytes() == RECIPE_TEXT.encode()


def test_a_manifest_survives_a_trip_through_json(saved):
    manifest = artifact.read(saved)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_same_network_gives_the_same_files(converted, saved, tmp_path):
    artifact.save(converted[0], tmp_path / "again", plan=converted[1])
    for name in (WEIGHTS, PROBE):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_comes_back(tmp_path, dtype):
    net = Net().to(dtype)
    artifact.save(in_memory(net), tmp_path / "net")
    assert same_tensors(artifact.load(tmp_path / "net", model=Net()).loaded.model, net)


def test_frozen_parameters_of_the_source_stay_frozen(tmp_path):
    net = Net()
    net.first.weight.requires_grad_(False)
    artifact.save(in_memory(Net()), tmp_path / "net")
    got = artifact.load(tmp_path / "net", model=net).loaded.model
    assert [got.first.weight.requires_grad, got.second.weight.requires_grad] == [False, True]


def test_a_network_with_several_outputs_comes_back(tmp_path):
    class Two(Net):
        def forward(self, x):
            return {"sum": super().forward(x), "parts": [self.first(x), (self.second(x),)]}

    net = Two()
    artifact.save(in_memory(net), tmp_path / "net")
    assert {"output.sum", "output.parts.0", "output.parts.1.0"} < load_file(tmp_path / "net" / PROBE).keys()
    assert same_tensors(artifact.load(tmp_path / "net", model=Two()).loaded.model, net)


def test_a_diverged_network_can_still_be_looked_at(tmp_path):
    net = Net()
    net.first.bias.data.fill_(math.nan)
    artifact.save(in_memory(net), tmp_path / "net")
    assert artifact.load(tmp_path / "net", model=Net()).loaded.model.first.bias.isnan().all()


# Ties


def test_a_tied_tensor_is_stored_once(tmp_path):
    artifact.save(in_memory(Net(tied=True)), tmp_path / "net")
    assert load_file(tmp_path / "net" / WEIGHTS).keys() == {"first.weight", "first.bias", "second.bias"}


@pytest.mark.parametrize("rebuilt_tied", [True, False])
def test_a_tie_is_rebuilt_whether_or_not_the_source_makes_it(tmp_path, rebuilt_tied):
    artifact.save(in_memory(Net(tied=True)), tmp_path / "net")
    got = artifact.load(tmp_path / "net", model=Net(tied=rebuilt_tied)).loaded.model
    assert got.second.weight is got.first.weight


def test_tensors_that_were_untied_come_back_untied(tmp_path):
    net = Net()
    artifact.save(in_memory(net), tmp_path / "net")
    assert same_tensors(artifact.load(tmp_path / "net", model=Net(tied=True)).loaded.model, net)


def test_parameters_that_share_memory_are_tied(tmp_path):
    net = Net()
    net.second.weight = nn.Parameter(net.first.weight.data)
    artifact.save(in_memory(net), tmp_path / "net")
    got = artifact.load(tmp_path / "net", model=Net()).loaded.model
    assert got.second.weight is got.first.weight


def test_a_tied_channels_last_network_comes_back(tmp_path):
    net = Net(tied=True).to(memory_format=torch.channels_last)
    artifact.save(in_memory(net), tmp_path / "net")
    got = artifact.load(tmp_path / "net", model=Net()).loaded.model
    assert same_tensors(got, net)
    assert got.second.weight is got.first.weight


def test_a_convolution_registered_twice_is_converted_and_comes_back_as_one(tmp_path):
    def twice():
        net = Net()
        net.second = net.first
        return net

    net = twice()
    plan = Plan(groups=(Group(method=LinearMix(), sites=("first",)),))
    surgery.replace_(net, plan)
    artifact.save(in_memory(net), tmp_path / "net", plan=plan)
    got = artifact.load(tmp_path / "net", model=twice()).loaded.model
    assert got.second is got.first
    assert same_tensors(got, net)


# Saving and loading leave the rest of the world as it was


def test_saving_keeps_the_mode_of_every_module(tmp_path):
    net = Net().train()
    net.second.eval()
    loaded = Loaded(model=net, source=SOURCE, preprocessing=SMALL)
    artifact.save(loaded, tmp_path / "net")
    assert [module.training for module in net.modules()] == [True, True, False]


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    artifact.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_gives_eval_mode(saved):
    assert not any(module.training for module in artifact.load(saved).loaded.model.modules())


def test_loading_copies_the_model_it_is_given(tmp_path):
    artifact.save(in_memory(Net()), tmp_path / "net")
    given = Net()
    weight = given.first.weight.clone()
    artifact.load(tmp_path / "net", model=given)
    assert torch.equal(given.first.weight, weight)


def test_a_loaded_network_does_not_depend_on_its_files(saved):
    network = artifact.load(saved).loaded.model
    with (saved / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * 10_000)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


# History and the machine


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("lcc convert /data/ann/net.pth -o out", "lcc convert net.pth -o out"),
        ("lcc eval runs/net --data imagefolder:/data/pets", "lcc eval runs/net --data imagefolder:pets"),
        ("lcc finetune d --data=cifar10:/data/c --lr 1e-3", "lcc finetune d --data=cifar10:c --lr 1e-3"),
        (r"lcc convert C:\Users\ann\net.pth", "lcc convert net.pth"),
        ("lcc convert timm:resnet18 -o ../out", "lcc convert timm:resnet18 -o ../out"),
        ("12 images/s at https://example.org/a/b", "12 images/s at https://example.org/a/b"),
    ],
)
def test_an_event_tells_no_absolute_path(text, kept):
    event = artifact.event_now("convert", text, details={"what": text})
    assert (event.command, event.details["what"]) == (kept, kept)


def test_a_path_with_spaces_is_cut_to_its_name():
    assert artifact.event_now("convert", "x", details={"data": "/data/ann lee/a b.pth"}).details == {
        "data": "a b.pth"
    }


def test_an_event_knows_when_and_with_what():
    event = artifact.event_now("convert", "lcc convert", seed=1)
    assert event.date.endswith("+00:00")
    assert event.versions.keys() == {"lcc", "python", "torch", "torchvision", "timm"}


def test_metrics_of_former_weights_are_not_the_networks():
    def event(top1, **options):
        return artifact.event_now("train", "x", metrics={"top1": top1}, **options)

    manifest = Manifest(source=SOURCE, preprocessing=SMALL, history=(event(0.5), event(0.6)))
    assert manifest.metrics == {"top1": 0.6}
    measured = artifact.event_now("measure", "x", metrics={"top5": 0.9})
    manifest = Manifest(source=SOURCE, preprocessing=SMALL, history=(event(0.5), measured))
    assert manifest.metrics == {"top1": 0.5, "top5": 0.9}


# Writing back


def trained(directory):
    """Return the directory's network after a step of somebody's training, in train mode."""
    network = lcc.load(directory).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    return network


def test_a_network_trained_elsewhere_is_written_back(saved):
    network = trained(saved)
    lcc.save(network, saved)
    assert same_tensors(lcc.load(saved), network)


def test_writing_back_says_that_what_was_measured_before_is_of_other_weights(saved):
    before = artifact.read(saved)
    lcc.save(trained(saved), saved)
    after = artifact.read(saved)
    assert after.history[:-1] == before.history
    assert after.fits == before.fits
    assert "recorded before are of other weights" in after.history[-1].details["weights"]
    assert after.metrics == {}


def test_writing_back_keeps_the_recipe_and_other_files(saved):
    (saved / "notes").mkdir()
    (saved / "notes" / "mine.txt").write_text("mine")
    lcc.save(trained(saved), saved)
    assert (saved / RECIPE).read_bytes() == RECIPE_TEXT.encode()
    assert (saved / "notes" / "mine.txt").read_text() == "mine"
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_writing_back_can_change_the_dtype(saved):
    lcc.save(lcc.load(saved).half(), saved)
    assert lcc.load(saved).conv1.weight.dtype == torch.float16


def test_another_network_is_not_written_back(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ArtifactError, match=r"holds another network: .*give the very module") as caught:
        lcc.save(nn.Sequential(lcc.load(saved)), saved)
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_writing_back_needs_a_directory_of_ours(tmp_path):
    with pytest.raises(ArtifactError, match="is not an lcc directory"):
        lcc.save(Net(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", [Circulant(), RdCirculant(), LinearMix()], ids=str)
def test_operators_of_another_dtype_come_back_whole(method, dtype, tmp_path):
    loaded = models.load("zoo:cifar_resnet20", weights="none")
    plan = make_plan(surgery.find_sites(loaded.model, torch.zeros(1, 3, 32, 32)), rules_for(method))
    surgery.replace_(loaded.model, plan)
    artifact.save(loaded, tmp_path / "net", plan=plan)
    lcc.save(lcc.load(tmp_path / "net").to(dtype), tmp_path / "net")
    again = lcc.load(tmp_path / "net")
    floats = {
        tensor.dtype for tensor in (*again.parameters(), *again.buffers()) if tensor.is_floating_point()
    }
    assert floats == {dtype}
    network = open_network(ModelPart(source=str(tmp_path / "net")))
    assert network.row().macs > 0  # commands compute in float32


def test_an_infinite_output_hides_no_difference():
    wanted, got = ({"output": torch.tensor([math.inf, last])} for last in (5.0, 1.0))
    assert probe.relative_difference(got, wanted) == pytest.approx(0.8)
    assert probe.relative_difference(wanted, wanted) == 0


def test_outputs_without_a_tensor_are_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x)

    with pytest.raises(ArtifactError, match="returns a SimpleNamespace, in which lcc finds no tensor"):
        probe.outputs(Odd(), torch.zeros(1, 3, 4, 4))

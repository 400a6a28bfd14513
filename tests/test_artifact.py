"""lcc directories: what goes in comes out, bit for bit; whatever is wrong with one is said in one line."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lcc
from lcc import artifact, models, surgery
from lcc.directory import MANIFEST, PROBE, RECIPE, WEIGHTS
from lcc.errors import ArtifactError
from lcc.manifest import Event, Manifest
from lcc.methods import Fit
from lcc.methods.linear_mix import LinearMix
from lcc.models import Loaded, Preprocessing, Source
from lcc.plan import Group, Plan, make_plan, rules_for

SMALL = Preprocessing(image_size=(8, 12), crop_pct=1.0)
SOURCE = Source(id="py:mine:net", weights="none")
RECIPE_TEXT = 'lcc = 1  # as given\r\n[model]\nsource = "zoo:cifar_resnet20"\n'
FITS = {"layer1.0.conv1": Fit(how="weights", kernel_error=0.5), "layer1.0.conv2": Fit(how="data", samples=7)}
DONE = Event(
    kind="train",
    command="lcc convert",
    date="2026-01-02T03:04:05+00:00",
    versions={"torch": "9.9"},
    seed=3,
    metrics={"top1": 0.5, "loss": math.inf},
    details={"start": "mask"},
)


class Net(nn.Module):
    """Two convolutions that may share a weight, and a buffer that state_dict leaves out."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("shift", torch.ones(1), persistent=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.shift


def in_memory(model):
    return Loaded(model=model.eval(), source=SOURCE, preprocessing=SMALL)


def shaken(model):
    """Give BatchNorm statistics and biases that are not their initial values."""
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def converted():
    """A ResNet-20 with LinearMix on all equal-channel 3x3 convolutions, and its plan."""
    loaded = models.load("zoo:cifar_resnet20", weights="none")
    sites = surgery.find_sites(loaded.model, torch.zeros(1, 3, 32, 32))
    plan = make_plan(sites, rules_for(LinearMix(group_size=2)))
    surgery.replace_(loaded.model, plan)
    shaken(loaded.model)
    return loaded, plan


@pytest.fixture
def saved(converted, tmp_path):
    """The converted network's directory."""
    loaded, plan = converted
    named = replace(loaded, class_names=tuple("abcdefghij"))
    artifact.save(named, tmp_path / "net", plan=plan, fits=FITS, history=(DONE,), recipe=RECIPE_TEXT)
    return tmp_path / "net"


def refusal(directory, **options):
    """Return the one line that a directory is refused with."""
    with pytest.raises(ArtifactError) as caught:
        artifact.load(directory, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def edit(directory, change):
    """Change the manifest's JSON."""
    path = directory / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rehash(directory):
    """Make the manifest agree with files that were changed."""
    hashes = {name: artifact._sha256(directory / name) for name in (WEIGHTS, PROBE)}
    edit(directory, lambda content: content["hashes"].update(hashes))


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


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


# Damage


def cut(name):
    def damage(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: len(data) // 2])

    return damage


def flip(name):
    def damage(directory):
        data = bytearray((directory / name).read_bytes())
        data[-1] ^= 1
        (directory / name).write_bytes(data)

    return damage


def set_manifest(**changes):
    return lambda directory: edit(directory, lambda content: content.update(changes))


def set_plan(site, **method):
    group = {"method": {"name": "linear_mix", **method}, "sites": [site]}
    return set_manifest(plan={"groups": [group], "kept": []})


def set_tensors(name, change):
    def damage(directory):
        tensors = load_file(directory / name)
        change(tensors)
        save_file(tensors, directory / name)
        rehash(directory)

    return damage


DAMAGE = {
    "truncated weights": (cut(WEIGHTS), "model.safetensors is truncated or damaged"),
    "truncated probe": (cut(PROBE), "probe.safetensors is truncated or damaged"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "model.safetensors is truncated or damaged"),
    "one bit of a weight": (flip(WEIGHTS), "model.safetensors is not the file that was saved"),
    "one bit of the probe": (flip(PROBE), "probe.safetensors is not the file that was saved"),
    "one bit of the recipe": (flip(RECIPE), "recipe.toml is not the file that was saved"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors is missing"),
    "no probe": (lambda d: (d / PROBE).unlink(), "probe.safetensors is missing"),
    "no recipe": (lambda d: (d / RECIPE).unlink(), "recipe.toml is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "is not an lcc directory: there is no manifest.json"),
    "truncated manifest": (cut(MANIFEST), "manifest.json is damaged"),
    "binary manifest": (lambda d: (d / MANIFEST).write_bytes(b"\xff\0"), "manifest.json is damaged"),
    "deep manifest": (lambda d: (d / MANIFEST).write_text("[" * 10**5), "manifest.json is damaged"),
    "list for a manifest": (lambda d: (d / MANIFEST).write_text("[]"), "is not an lcc directory"),
    "manifest of a browser": (lambda d: (d / MANIFEST).write_text('{"name": 1}'), "names no format"),
    "newer format": (set_manifest(format="lcc/2"), "manifest.json has format 'lcc/2'; lcc 0"),
    "unknown key": (set_manifest(extra=1), "manifest.json: extra: unknown key"),
    "wrong type": (set_manifest(fits=3), "manifest.json: fits: should be a table, not 3"),
    "unknown method": (set_plan("conv1", name="wavelet"), "no method is called 'wavelet'"),
    "no hashes": (set_manifest(hashes={}), "model.safetensors is not the file that was saved"),
    "foreign hash": (set_manifest(hashes={"../x": "0"}), "manifest.json: hashes"),
    "tie to nothing": (set_manifest(ties={"a": "b"}), "manifest.json: ties: model.safetensors has no 'b'"),
    "unknown site": (
        set_plan("layer9.conv"),
        "the plan converts 'layer9.conv', but this network has no module",
    ),
    "impossible site": (set_plan("conv1"), "which can't take it: channels change"),
    "no plan": (set_manifest(plan={}), "model.safetensors doesn't fit the network in manifest.json"),
    "another source": (
        set_manifest(source={"id": "zoo:cifar_resnet32", "weights": "none"}),
        "model.safetensors doesn't fit the network in manifest.json",
    ),
    "a tensor missing": (set_tensors(WEIGHTS, lambda t: t.pop("conv1.weight")), "1 missing (conv1.weight)"),
    "a tensor more": (set_tensors(WEIGHTS, lambda t: t.update(x=torch.ones(1))), "not in the network (x)"),
    "a tensor reshaped": (
        set_tensors(WEIGHTS, lambda t: t.update({"conv1.weight": torch.ones(1)})),
        "1 of another shape (conv1.weight",
    ),
    "other weights": (
        set_tensors(WEIGHTS, lambda t: t["conv1.weight"].mul_(1.1)),
        "load it with what it was saved with: torch 9.9",
    ),
    "probe without input": (set_tensors(PROBE, lambda t: t.pop("input")), "holds no input"),
    "probe without output": (
        set_tensors(PROBE, lambda t: t.pop("output")),
        "differs from the one saved by inf",
    ),
    "input of another size": (
        set_tensors(PROBE, lambda t: t.update(input=torch.zeros(1, 4, 32, 32))),
        "the network can't run on a 1x4x32x32 input",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_one_line(saved, kind):
    damage, line = DAMAGE[kind]
    damage(saved)
    assert line in refusal(saved)


def test_a_directory_that_is_none_of_ours_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "photos is not an lcc directory" in refusal(tmp_path / "photos")


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"x")
    assert "net.pth is not an lcc directory" in refusal(tmp_path / "net.pth")


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert "nowhere: there is no such directory" in refusal(tmp_path / "nowhere")


def test_rounding_is_forgiven(saved):
    set_tensors(PROBE, lambda tensors: tensors["output"].mul_(1 + 1e-5))(saved)
    assert artifact.load(saved).manifest.format == "lcc/1"


def test_non_tensor_state_can_not_be_stored(tmp_path):
    class Odd(Net):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(ArtifactError, match="_extra_state is a dict, not a tensor"):
        artifact.save(in_memory(Odd()), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_can_not_run_is_not_written(tmp_path):
    with pytest.raises(ArtifactError, match="can't run on a 1x3x8x12 input"):
        artifact.save(in_memory(nn.Linear(5, 5)), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


# No code runs


def test_a_users_own_code_never_runs_unasked(tmp_path, monkeypatch):
    (tmp_path / "mine_to_run.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Source(id="py:mine_to_run:net", weights="none")
    artifact.save(replace(in_memory(Net()), source=source), tmp_path / "net")
    assert "lcc.load(DIR, model=...)" in refusal(tmp_path / "net")
    assert "mine_to_run" not in sys.modules


def test_a_users_own_code_runs_when_trusted(tmp_path, monkeypatch):
    (tmp_path / "mine_trusted.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(3, 2, 1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = nn.Conv2d(3, 2, 1)
    source = Source(id="py:mine_trusted:net", weights="none")
    artifact.save(replace(in_memory(net), source=source), tmp_path / "net")
    assert same_tensors(artifact.load(tmp_path / "net", trust_code=True).loaded.model, net)


@pytest.mark.parametrize("name", ["hf-hub:someone/net", "local-dir:net"])
def test_a_timm_name_that_points_elsewhere_is_refused(saved, name):
    set_manifest(source={"id": f"timm:{name}", "weights": "none"})(saved)
    assert "manifest.json can't be followed" in refusal(saved)


# History and the machine


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("lcc convert /home/ann/net.pth -o out", "lcc convert net.pth -o out"),
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
    assert artifact.event_now("convert", "x", details={"data": "/home/ann lee/a b.pth"}).details == {
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

"""lcc directories that are damaged or hostile: what is wrong is said in one line, and no code runs."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_networks import (
    Net,
    converted_network,  # noqa: F401  # the fixture `converted`
    in_memory,
    same_tensors,
    saved_network,  # noqa: F401  # the fixture `saved`
    seeded_on_one_thread,  # noqa: F401  # a fixture of every test
)
from torch import nn

from lcc import artifact
from lcc.directory import MANIFEST, PROBE, RECIPE, WEIGHTS
from lcc.errors import ArtifactError
from lcc.models import Source


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

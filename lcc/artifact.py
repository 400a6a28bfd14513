"""Save and load an lcc directory: a network that needs no pickle and no user code, and proves it is itself.

DIR/manifest.json       what it was made of and how: source, preprocessing, plan, fits, history, hashes
DIR/model.safetensors   every tensor once; the manifest's `ties` name the others
DIR/probe.safetensors   a seeded input and the network's output for it, compared at load
DIR/recipe.toml         the recipe, as given; not always there
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from lcc import models, probe, surgery, weights
from lcc.directory import MANIFEST, PROBE, RECIPE, WEIGHTS, Directory
from lcc.errors import ArtifactError, LccError, one_line
from lcc.manifest import Event, Hashed, Manifest, event_now, read
from lcc.models import Loaded
from lcc.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lcc.methods import Fit

__all__ = ["Artifact", "Event", "Manifest", "check_target", "event_now", "load", "read", "save", "save_back"]

HASHED: tuple[Hashed, ...] = get_args(Hashed)
WRITTEN_BACK = (
    "written back after training outside lcc; metrics and fits recorded before are of other weights"
)
AGAIN = "copy the directory again from where it is whole"


class Artifact(NamedTuple):
    """A network, ready to run, and what its directory says about it."""

    loaded: Loaded
    manifest: Manifest
    directory: Path


def check_target(directory: str | Path, *, force: bool = False) -> None:
    """Make sure, before any long work and leaving no trace, that `save` can write there.

    Raises: ArtifactError: it exists (without `force`), is not an lcc directory, or can't be written.
    """
    Directory(directory).check(force=force)


def save(
    loaded: Loaded,
    directory: str | Path,
    *,
    plan: Plan | None = None,
    fits: Mapping[str, Fit] | None = None,
    history: tuple[Event, ...] = (),
    recipe: str | None = None,
    force: bool = False,
) -> None:
    """Write an lcc directory, whole or not at all; `force` replaces one that is there.

    `plan` is what turned the source's network into this one; `recipe` the text of the recipe.
    Raises: ArtifactError: as `check_target`; the network can't run, or holds what can't be stored.
    """
    target = Directory(directory)
    target.check(force=force)
    manifest = Manifest(
        source=loaded.source,
        preprocessing=loaded.preprocessing,
        class_names=loaded.class_names,
        plan=plan or Plan(),
        fits=dict(fits or {}),
        history=history,
    )
    _write(loaded.model, manifest, None if recipe is None else recipe.encode(), target)


def save_back(model: nn.Module, directory: str | Path) -> None:
    """Write a network that `load` gave back into its directory, after training outside lcc.

    The history gets an event that says so, since metrics and fits from before are of other weights. A model
    on another device stays there; other files in the directory stay too.
    Raises: ArtifactError: it is not the directory's network, or can't be written.
    """
    target = Directory(directory)
    manifest = read(directory)
    target.check_writable()
    stored = _untied(_read_tensors(target.shown / WEIGHTS), manifest, target.shown)
    difference = weights.compare(weights.shapes(stored), weights.shapes(model.state_dict()))
    if not difference.fits:
        raise ArtifactError(
            f"{target.shown} holds another network: {difference}; give the very module that lcc.load gave"
        )
    recipe = target.shown / RECIPE
    done = event_now("train", "lcc.save", details={"weights": WRITTEN_BACK})
    manifest = manifest.model_copy(update={"history": (*manifest.history, done)})
    _write(model, manifest, recipe.read_bytes() if recipe.exists() else None, target)


def load(directory: str | Path, *, model: nn.Module | None = None, trust_code: bool = False) -> Artifact:
    """Return the network of an lcc directory, in eval mode on the CPU, checked to be the one saved.

    Nothing that the manifest names is imported or run, unless `trust_code`. `model` is the network before
    conversion, for a source that is your own code; it is copied.
    Raises: ArtifactError: one line with the file and what to do.
    """
    root = Path(directory)
    manifest = read(root)
    _check_hashes(root, manifest)
    with torch.random.fork_rng(devices=[]):
        network = _rebuilt(root, manifest, model, trust_code=trust_code)
    _fill_(network, manifest, root)
    _check_probe(network.eval(), manifest, root / PROBE)
    loaded = Loaded(
        model=network,
        source=manifest.source,
        preprocessing=manifest.preprocessing,
        class_names=manifest.class_names,
    )
    return Artifact(loaded, manifest, root)


def _write(model: nn.Module, manifest: Manifest, recipe: bytes | None, target: Directory) -> None:
    tensors, ties = _stored_once(model)
    example = probe.example(model, manifest.preprocessing)
    answer = {"input": example, **probe.outputs(model, example)}
    with target.replaced() as new:
        # not save_file: it leaves files that only their owner can read
        (new / WEIGHTS).write_bytes(serialize(tensors))
        (new / PROBE).write_bytes(serialize(answer))
        if recipe is not None:
            (new / RECIPE).write_bytes(recipe)
        hashes = {file.name: _sha256(file) for file in sorted(new.iterdir())}
        complete = manifest.model_copy(update={"ties": ties, "hashes": hashes})
        (new / MANIFEST).write_text(complete.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _stored_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous CPU copies of all tensors by first name, and {further name: first name}."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(
                f"{name} is a {type(tensor).__name__}, not a tensor; an lcc directory can't hold it"
            )
        is_parameter = isinstance(tensor, nn.Parameter)
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, is_parameter)
        owner = first.setdefault(memory if tensor.numel() else id(tensor), name)
        if owner == name:
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            ties[name] = owner
    return tensors, ties


def _rebuilt(root: Path, manifest: Manifest, model: nn.Module | None, *, trust_code: bool) -> nn.Module:
    """Return the source's network with the plan replayed, its weights arbitrary."""
    try:
        if model is None:
            network = models.build(manifest.source, trust_code=trust_code)
        else:
            network = copy.deepcopy(model)
        surgery.replace_(network, manifest.plan)
    except LccError as error:
        raise ArtifactError(f"{root / MANIFEST} can't be followed: {error}") from error
    return network.cpu()


def _fill_(network: nn.Module, manifest: Manifest, root: Path) -> None:
    """Give the network the stored tensors themselves, so that dtypes and ties are those of the one saved."""
    stored = _read_tensors(root / WEIGHTS)
    state = network.state_dict(keep_vars=True)
    difference = weights.compare(weights.shapes(_untied(stored, manifest, root)), weights.shapes(state))
    if not difference.fits:
        raise ArtifactError(f"{root / WEIGHTS} doesn't fit the network in {MANIFEST}: {difference}; {AGAIN}")
    shared = {name: _like(state[name], tensor) for name, tensor in stored.items()}
    state.update(_untied(shared, manifest, root))
    network.load_state_dict(state, strict=True, assign=True)


def _untied(stored: dict[str, Tensor], manifest: Manifest, root: Path) -> dict[str, Tensor]:
    """Return the tensors under all their names."""
    absent = set(manifest.ties.values()) - stored.keys()
    if absent:
        raise ArtifactError(f"{root / MANIFEST}: ties: {WEIGHTS} has no {min(absent)!r}; {AGAIN}")
    return stored | {alias: stored[name] for alias, name in manifest.ties.items()}


def _like(present: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor as a parameter if the one whose place it takes is one."""
    if not isinstance(present, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=present.requires_grad and tensor.is_floating_point())


def _check_probe(network: nn.Module, manifest: Manifest, path: Path) -> None:
    """Compare the network's output for the stored input with the stored output."""
    wanted = _read_tensors(path)
    if "input" not in wanted:
        raise ArtifactError(f"{path} holds no input; {AGAIN}")
    error = probe.relative_difference(probe.outputs(network, wanted.pop("input")), wanted)
    if error <= probe.TOLERANCE:
        return
    versions = manifest.history[-1].versions if manifest.history else {}
    made_with = (
        ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions not recorded"
    )
    raise ArtifactError(
        f"{path}: the output differs from the one saved by {error:.1e} of its largest number, where rounding "
        f"stays below {probe.TOLERANCE:g}; load it with what it was saved with: {made_with}"
    )


def _check_hashes(root: Path, manifest: Manifest) -> None:
    """Make sure that every file is the one that was saved."""
    for name in HASHED:
        path, wanted = root / name, manifest.hashes.get(name)
        if wanted is None and name == RECIPE:
            continue
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; {AGAIN}")
        if _sha256(path) == wanted:
            continue
        if name != RECIPE:
            _read_tensors(path)  # says so where it is truncated
        raise ArtifactError(f"{path} is not the file that was saved: {MANIFEST} has another SHA-256; {AGAIN}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in memory of their own."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; {AGAIN}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is truncated or damaged ({one_line(error)}); {AGAIN}") from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error

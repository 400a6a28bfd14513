"""A network as one ONNX file that has been checked: BatchNorms folded, operators lowered, batch dynamic."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcc import __version__
from lcc.errors import ArtifactError, CheckFailedError, RecipeError, SourceError
from lcc.manifest import FORMAT
from lcc.methods import LowCostOp
from lcc.onnx_channels import split_multipliers
from lcc.onnx_graph import drop_unused, fold_batch_norms, order_sums, strip, to_half
from lcc.onnx_runtime import Session, first_line
from lcc.specs import Frozen, Size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lcc.models import Loaded
    from lcc.onnx_runtime import Array
    from lcc.plan import Plan

INPUT, OUTPUT = "input", "output"
MIN_OPSET = 18  # the exporter's own; it can't go below
BATCHES = (1, 3)  # checked; the example has 2, so a batch frozen at export shows
TOLERANCE = 1e-4  # of the largest output
HALF_TOLERANCE = 1e-2  # likewise; float16 keeps 11 bits and errors add up over layers
VERSIONS = {module.__name__: str(module.__version__) for module in (torch, onnx, onnxscript, onnxruntime)}


class Parity(Frozen):
    """How far ONNX Runtime was from torch on `batch` seeded random images.

    `relative_error` is the largest difference over the largest output; `top1_agreement` the share of images
    whose largest output is the same one (None: the network does not give one row of numbers per image).
    """

    batch: int
    relative_error: float
    top1_agreement: float | None


class Exported(Frozen):
    """What was written, and what its check gave."""

    path: str
    size_bytes: int
    opset: int
    half: bool
    tolerance: float
    parity: tuple[Parity, ...]


def to_onnx(
    loaded: Loaded,
    path: Path,
    plan: Plan,
    *,
    half: bool = False,
    opset: int = 20,
    tolerance: float | None = None,
    seed: int = 0,
) -> Exported:
    """Write the network to `path` if ONNX Runtime computes with it what torch computes, and say how closely.

    One input (N, C, H, W), float32, with N dynamic and H, W those of the preprocessing; `half` stores and
    computes in float16 and keeps float32 inputs and outputs. The network itself is left as it is.
    Raises: ArtifactError: `path` can't be written. RecipeError: opset below 18. CheckFailedError: the network
    can't be exported, or the file is not the network; nothing is left at `path`, and what was there stays.
    SourceError: the network can't run on images of its size.
    """
    if opset < MIN_OPSET:
        raise RecipeError(f"opset {opset} is too old: the exporter needs {MIN_OPSET} or later")
    if tolerance is None:
        tolerance = HALF_TOLERANCE if half else TOLERANCE
    check_file(path, force=True)
    with _written_at_once(path) as part:
        network = copy.deepcopy(loaded.model).cpu().float().eval()
        channels, (height, width) = len(loaded.preprocessing.mean), loaded.preprocessing.image_size
        generator = torch.Generator().manual_seed(seed)
        images = [torch.randn(batch, channels, height, width, generator=generator) for batch in BATCHES]
        wanted = _run_and_lower_(network, images)
        model = export_graph(network, torch.randn(2, channels, height, width, generator=generator), opset)
        if half:
            to_half(model)
        model.metadata_props.update(_metadata(loaded, plan, half=half))
        data = ir.to_proto(model).SerializeToString()
        parity = _check(data, images, wanted, tolerance)
        part.write_bytes(data)
    return Exported(
        path=str(path), size_bytes=len(data), opset=opset, half=half, tolerance=tolerance, parity=parity
    )


def export_graph(network: nn.Module, example: Tensor, opset: int) -> ir.Model:
    """Return the network (eval mode, operators lowered) as an ONNX graph, rewritten for ONNX Runtime.

    Raises: CheckFailedError: the exporter can't do it.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamo=True,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # the exporter raises what any of its stages raises
            raise CheckFailedError(
                f"torch's ONNX exporter can't take this network: {first_line(error)}"
            ) from error
    assert program is not None  # only the legacy exporter gives None
    model = program.model
    if model.opset_imports[""] != opset:
        raise RecipeError(
            f"opset {opset} can't be had: the exporter gives {model.opset_imports['']}; use that"
        )
    fold_batch_norms(model)
    order_sums(model)
    split_multipliers(model)
    drop_unused(model)
    strip(model)
    model.producer_name, model.producer_version = "lcc", __version__
    return model


def check_file(path: Path, *, force: bool = False) -> None:
    """Make sure, before any long work and leaving no trace, that `to_onnx` can write there.

    Raises: ArtifactError: it is no file name, it exists (without `force`), or the folder can't be written.
    """
    if path.is_dir() or not path.name:
        raise ArtifactError(f"{path} can't be written: it is a directory; name a file, such as model.onnx")
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists; choose another path, or replace it with --force")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"{path} can't be written: {folder.name} is no folder that you can write to")


@contextmanager
def _written_at_once(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which takes its place if all goes well and is gone otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        yield part
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines from the user; failures are exceptions anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def _run_and_lower_(network: nn.Module, images: list[Tensor]) -> list[list[Array]]:
    """Return the network's outputs for each batch, then lower its operators for the sizes they saw."""
    sizes: dict[nn.Module, Size] = {}

    def see(op: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.setdefault(op, Size(height=inputs[0].shape[-2], width=inputs[0].shape[-1]))

    operators = [module for module in network.modules() if isinstance(module, LowCostOp)]
    handles = [op.register_forward_pre_hook(see) for op in operators]
    try:
        outputs = [
            [y.numpy() for y in pytree.tree_leaves(network(x)) if isinstance(y, Tensor)] for x in images
        ]
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(map(str, images[0].shape))
        raise SourceError(f"the network can't run on a {shape} input: {first_line(error)}") from error
    for handle in handles:
        handle.remove()
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, LowCostOp) and module in sizes:
            network.set_submodule(name, module.lowerings(sizes[module])[0].module)
    return outputs


def _metadata(loaded: Loaded, plan: Plan, *, half: bool) -> dict[str, str]:
    """Return what a user of the file alone needs to know; JSON where it has structure."""
    height, width = loaded.preprocessing.image_size
    named = {
        "format": FORMAT,
        "source": loaded.source.model_dump_json(),
        "plan": plan.model_dump_json(),
        "preprocessing": loaded.preprocessing.model_dump_json(),
        "image_size": f"{height}x{width}",
        "class_names": None if loaded.class_names is None else json.dumps(loaded.class_names),
        "precision": "float16, inputs and outputs float32" if half else "float32",
        "versions": json.dumps({"lcc": __version__, **VERSIONS}),
    }
    return {f"lcc.{key}": value for key, value in named.items() if value is not None}


def _check(
    data: bytes, images: list[Tensor], wanted: list[list[Array]], tolerance: float
) -> tuple[Parity, ...]:
    """Return how ONNX Runtime compares with torch. Raises: CheckFailedError: too far apart, or no run."""
    try:
        onnx.checker.check_model(data, full_check=True)
        session = Session(data)
        got = [session.run({INPUT: x.numpy()}) for x in images]
    except Exception as error:  # the checker and the runtime share no base class
        raise CheckFailedError(
            f"the exported graph does not hold: {first_line(error)}; no file was kept"
        ) from error
    if len(got[0]) != len(wanted[0]):
        raise CheckFailedError(
            f"the exported graph has {len(got[0])} outputs and the network {len(wanted[0])}; no file was kept"
        )
    parity = tuple(_compare(*pair) for pair in zip(got, wanted, strict=True))
    for entry in parity:
        if not entry.relative_error <= tolerance:  # NaN fails too
            raise CheckFailedError(
                f"at batch {entry.batch} ONNX Runtime differs from torch by {entry.relative_error:.1e} of "
                f"the largest output, tolerance {tolerance:.0e}; no file was kept"
            )
    return parity


def _compare(got: list[Array], wanted: list[Array]) -> Parity:
    errors = [
        float(np.abs(g.astype(np.float64) - w).max() / max(float(np.abs(w).max()), np.finfo(np.float32).tiny))
        if g.shape == w.shape
        else math.inf
        for g, w in zip(got, wanted, strict=True)
    ]
    rows = got[0].shape == wanted[0].shape and wanted[0].ndim == 2
    agreement = float(np.mean(got[0].argmax(1) == wanted[0].argmax(1))) if rows else None
    # max() drops a NaN that is not the first
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    return Parity(batch=len(wanted[0]), relative_error=worst, top1_agreement=agreement)

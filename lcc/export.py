"""A network as one ONNX file that has been checked: BatchNorms folded, operators lowered, batch dynamic."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcc import __version__
from lcc.errors import CheckFailedError, RecipeError, cannot_run, first_line
from lcc.lowering import TOLERANCE as LOWERING_TOLERANCE
from lcc.lowering import lower_
from lcc.manifest import FORMAT
from lcc.methods import LowCostOp
from lcc.onnx_export import INPUT, export_graph, to_file
from lcc.onnx_graph import to_half
from lcc.onnx_runtime import Session
from lcc.specs import Frozen, Size
from lcc.written_files import check_file, written_at_once

if TYPE_CHECKING:
    from pathlib import Path

    from lcc.methods import Lowering
    from lcc.models import Loaded
    from lcc.onnx_runtime import Array
    from lcc.plan import Plan

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
    """What was written, and what its checks gave.

    `lowered` says in words what became of the operators that are not exported as they are, by site.
    `lowering_error` is how far the network is from itself for that, without ONNX Runtime: the largest
    difference over the largest output, on the same images as `parity`. None: nothing is approximated.
    """

    path: str
    size_bytes: int
    opset: int
    half: bool
    tolerance: float
    parity: tuple[Parity, ...]
    lowered: dict[str, str]
    lowering_error: float | None


def to_onnx(
    loaded: Loaded,
    path: Path,
    plan: Plan,
    *,
    half: bool = False,
    opset: int = 20,
    tolerance: float | None = None,
    lowering_tolerance: float = LOWERING_TOLERANCE,
    seed: int = 0,
) -> Exported:
    """Write the network to `path` if ONNX Runtime computes with it what torch computes, and say how closely.

    One input (N, C, H, W), float32, with N dynamic and H, W those of the preprocessing; `half` stores and
    computes in float16 and keeps float32 inputs and outputs. An operator that has to be approximated is by
    at most `lowering_tolerance`, if it can; ONNX Runtime is compared with what came of that, to `tolerance`.
    The network itself is left as it is.
    Raises: ArtifactError: `path` can't be written. RecipeError: the opset is too old. CheckFailedError: the
    network can't be exported, or the file is not the network; nothing is left at `path`, and what was there
    stays. SourceError: the network can't run on images of its size.
    """
    if opset < MIN_OPSET:
        raise RecipeError(f"opset {opset} is too old: the exporter needs {MIN_OPSET} or later")
    if tolerance is None:
        tolerance = HALF_TOLERANCE if half else TOLERANCE
    check_file(path, force=True)
    with written_at_once(path) as part:
        network = copy.deepcopy(loaded.model).cpu().float().eval()
        channels, (height, width) = len(loaded.preprocessing.mean), loaded.preprocessing.image_size
        generator = torch.Generator().manual_seed(seed)
        images = [torch.randn(batch, channels, height, width, generator=generator) for batch in BATCHES]
        exact, sizes = _run_and_see_sizes(network, images)
        chosen = lower_(network, sizes, tolerance=lowering_tolerance)
        wanted = _run(network, images)
        lowering_error = _lowering_error(wanted, exact, chosen)
        example = torch.randn(2, channels, height, width, generator=generator)
        model = export_graph(network, example, opset, operators=chosen.keys())
        if half:
            to_half(model)
        lowered = _in_words(chosen)
        model.metadata_props.update(_metadata(loaded, plan, lowered, half=half))
        data = to_file(model)
        parity = _check(data, images, wanted, tolerance)
        part.write_bytes(data)
    return Exported(
        path=str(path),
        size_bytes=len(data),
        opset=opset,
        half=half,
        tolerance=tolerance,
        parity=parity,
        lowered=lowered,
        lowering_error=lowering_error,
    )


@torch.no_grad()
def _run(network: nn.Module, images: list[Tensor]) -> list[list[Array]]:
    """Return the network's outputs for each batch."""
    try:
        return [[y.numpy() for y in pytree.tree_leaves(network(x)) if isinstance(y, Tensor)] for x in images]
    except (RuntimeError, ValueError, TypeError) as error:
        raise cannot_run(images[0].shape, error) from error


def _run_and_see_sizes(
    network: nn.Module, images: list[Tensor]
) -> tuple[list[list[Array]], dict[nn.Module, list[Size]]]:
    """Return the network's outputs for each batch, and the input sizes that every operator saw."""
    sizes: dict[nn.Module, list[Size]] = {}

    def see(op: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        size, seen = Size(height=height, width=width), sizes.setdefault(op, [])
        if size not in seen:
            seen.append(size)

    operators = [module for module in network.modules() if isinstance(module, LowCostOp)]
    handles = [op.register_forward_pre_hook(see) for op in operators]
    try:
        return _run(network, images), sizes
    finally:
        for handle in handles:
            handle.remove()


def _lowering_error(
    got: list[list[Array]], exact: list[list[Array]], chosen: dict[str, tuple[Lowering, ...]]
) -> float | None:
    """Return how far lowering moved the outputs; None: not at all.

    Raises: CheckFailedError: they moved although nothing is approximated, or are no numbers any more.
    """
    errors = [_compare(*pair).relative_error for pair in zip(got, exact, strict=True)]
    approximate = any(lowering.relative_error > 0 for found in chosen.values() for lowering in found)
    limit = sys.float_info.max if approximate else TOLERANCE
    for error in errors:
        if not error <= limit:  # NaN fails too
            raise CheckFailedError(
                f"lowering the operators for export changed the outputs by {error:.1e} of the largest; "
                "no file was kept"
            )
    return max(errors) if approximate else None


def _in_words(chosen: dict[str, tuple[Lowering, ...]]) -> dict[str, str]:
    """Return how operators were lowered, by site, where there is something to say."""
    said = {
        site: "; ".join(dict.fromkeys(lowering.how for lowering in found if lowering.how))
        for site, found in chosen.items()
    }
    return {site: how for site, how in said.items() if how}


def _metadata(loaded: Loaded, plan: Plan, lowered: dict[str, str], *, half: bool) -> dict[str, str]:
    """Return what a user of the file alone needs to know; JSON where it has structure."""
    height, width = loaded.preprocessing.image_size
    named = {
        "format": FORMAT,
        "source": loaded.source.model_dump_json(),
        "plan": plan.model_dump_json(),
        "preprocessing": loaded.preprocessing.model_dump_json(),
        "image_size": f"{height}x{width}",
        "class_names": None if loaded.class_names is None else json.dumps(loaded.class_names),
        "lowering": json.dumps(lowered) if lowered else None,
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

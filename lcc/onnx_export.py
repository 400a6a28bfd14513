"""torch's ONNX exporter, made quiet, and its graph rewritten for ONNX Runtime."""

from __future__ import annotations

import ast
import logging
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

import torch
from onnxscript import ir

from lcc import __version__
from lcc.errors import CheckFailedError, RecipeError, first_cause, first_line
from lcc.onnx_channels import split_multipliers
from lcc.onnx_constants import drop_unused, readers, separate, share_constants
from lcc.onnx_graph import order_sums, strip
from lcc.onnx_norms import fold_batch_norms, fold_scales
from lcc.onnx_padding import is_wrap, wraps_as_convs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor, nn

INPUT, OUTPUT = "input", "output"
LAYER_OPSET = 20
WRAP_OPSET = 19  # the first with Pad(mode="wrap"); ONNX's checker does not look at the mode
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes which modules a node came from


def export_graph(
    network: nn.Module, example: Tensor, opset: int, *, operators: Collection[str] = ()
) -> ir.Model:
    """Return the network (eval mode, operators lowered) as an ONNX graph, rewritten for ONNX Runtime.

    `operators`: names of the modules in which no Fourier transform may be left.
    Raises: CheckFailedError: the exporter can't do it, or there is one. RecipeError: another opset is needed.
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
                optimize=False,
            )
            assert program is not None  # only the legacy exporter gives None
            before = readers(program.model)
            program.optimize()
        except Exception as error:  # the exporter raises what any of its stages raises
            raise CheckFailedError(
                f"torch's ONNX exporter can't take this network: {first_line(first_cause(error))}"
            ) from error
    model = program.model
    _refuse_fourier(model, operators)
    separate(model, before)
    fold_scales(model)
    fold_batch_norms(model)
    order_sums(model)
    split_multipliers(model)
    wraps_as_convs(model)
    _check_opset(model, opset)
    drop_unused(model)
    share_constants(model)
    strip(model)
    model.producer_name, model.producer_version = "lcc", __version__
    return model


def to_file(model: ir.Model) -> bytes:
    """Return the graph as the bytes of a file, without the shapes between nodes, which its reader infers."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    data: bytes = proto.SerializeToString()
    return data


def layer_file(layer: nn.Module, example: Tensor) -> bytes:
    """Return a lowered layer (put in eval mode) as an ONNX file for inputs like `example` (N, C, H, W).

    Raises: CheckFailedError: the exporter can't do it.
    """
    two = torch.randn(2, *example.shape[1:])  # a batch of one would be frozen
    return to_file(export_graph(layer.eval(), two, LAYER_OPSET))


def _check_opset(model: ir.Model, opset: int) -> None:
    if model.opset_imports[""] != opset:
        raise RecipeError(
            f"opset {opset} can't be had: the exporter gives {model.opset_imports['']}; use that"
        )
    if opset < WRAP_OPSET and any(is_wrap(node) for node in model.graph):
        raise RecipeError(f"opset {opset} has no periodic padding; use opset {WRAP_OPSET} or later")


def _refuse_fourier(model: ir.Model, operators: Collection[str]) -> None:
    """Make sure that no operator is left with a node that ONNX Runtime runs 5 to 75 times too slowly."""
    for node in model.graph.all_nodes():
        if node.op_type != "DFT":
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        found = next((name for name in scopes if name in operators), None)
        if found is not None:
            raise CheckFailedError(f"{found} was lowered to a Fourier transform, which must not be in a file")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines from the user; failures are exceptions anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            yield
    finally:
        logging.disable(before)

"""Latency of exported steps against each other in ONNX Runtime, one thread, interleaved.

The ratios are shown by: pytest -m slow tests/test_speed.py --log-cli-level=INFO
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from onnxscript import ir

from lcc.lowering import choose, example_for
from lcc.methods.reaction_diffusion import RdExplicit, RdImplicit
from lcc.onnx_export import LAYER_OPSET, export_graph, layer_file
from lcc.onnx_runtime import Session
from lcc.specs import ConvSpec, Size, StepSpec
from lcc.timing import interleave

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def spec(channels):
    conv = ConvSpec(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=(1, 1))
    return StepSpec(channels=channels, convs=(conv, conv), norm_params=4 * channels, post="relu")


def trained(method, channels):
    """Return a step whose stencils are as large as the method lets them be: the hardest to solve for."""
    torch.manual_seed(0)
    op = method.build(spec(channels)).eval()
    with torch.no_grad():
        op.stencil.normal_()
    return op


def ratios(files, size, channels, rounds=30):
    """Return how many times as long as the first each file takes."""
    x = example_for(spec(channels), size).numpy()
    calls = {}
    for name, data in files.items():
        calls[name] = partial(Session(data).run, {"input": x})
    latencies, speedups = interleave(calls, rounds=rounds)
    first, *_ = files
    logger.info("%d channels at %s: %s %.3f ms", channels, size, first, latencies[first].median_ms)
    for name, speedup in speedups.items():
        spread = 1 / speedup.p90, 1 / speedup.p10
        logger.info("%s: %.2f times as long (%.2f to %.2f)", name, 1 / speedup.median, *spread)
    return {name: 1 / speedup.median for name, speedup in speedups.items()}


@pytest.mark.parametrize(
    ("channels", "side"), [(64, 56), (128, 28), (256, 14), (512, 7), (16, 32), (32, 16), (64, 8)]
)
def test_an_implicit_step_takes_at_most_twice_as_long_as_an_explicit_one(channels, side):
    size = Size(height=side, width=side)
    files = {"explicit": choose(trained(RdExplicit(), channels), size).module}
    wanted = {}
    # At 0.07 a 7x7 stencil does.
    for method, most in ((RdImplicit(stiffness=0.07), 1.3), (RdImplicit(), 2.0)):
        lowering = choose(trained(method, channels), size)
        assert lowering.relative_error <= 1e-3
        assert most == 2.0 or "7x7" in lowering.how or "5x5" in lowering.how
        name = f"implicit {method.stiffness} ({lowering.how})"
        files[name], wanted[name] = lowering.module, most
    example = example_for(spec(channels), size)
    got = ratios({name: layer_file(module, example) for name, module in files.items()}, size, channels)
    assert all(got[name] <= most for name, most in wanted.items()), got


@pytest.mark.parametrize(
    ("channels", "side", "least"), [(64, 56, 30), (256, 14, 30), (16, 32, 4), (32, 16, 4), (64, 8, 4)]
)
def test_a_lowered_implicit_step_is_faster_than_one_with_fourier_nodes(channels, side, least):
    size = Size(height=side, width=side)
    op = trained(RdImplicit(), channels)
    example = example_for(spec(channels), size)
    two = torch.randn(2, *example.shape[1:])
    graph = ir.to_proto(export_graph(op, two, LAYER_OPSET))
    assert "DFT" in {node.op_type for node in graph.graph.node}
    files = {
        "lowered": layer_file(choose(op, size).module, example),
        "with DFT nodes": graph.SerializeToString(),
    }
    assert ratios(files, size, channels, rounds=10)["with DFT nodes"] >= least

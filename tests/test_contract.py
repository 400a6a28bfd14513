"""The laws that every method keeps, on every case."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from cases import (
    CASES,
    CLOSED_FORMS,
    EVERY,
    METHOD_STRATEGIES,
    METHODS_BY_KIND,
    ON_CONVS,
    ONE_SCALE,
    ONNX,
    ONNX_CASES,
    ORACLES,
    SIZE,
    SPECS,
    channels_of,
    inputs,
    is_exact,
    operator,
    original,
    smooth_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcc.counts import fvcore_macs
from lcc.export import export_graph
from lcc.methods import METHODS, LinearOp, parse_method
from lcc.methods.shared import Shared
from lcc.specs import Size, kind_of

# Torch says once that it pads a copy; the operators must do what it does.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_every_method_has_cases_an_oracle_and_random_configurations():
    assert CASES.keys() == METHODS.keys() == ORACLES.keys() == METHOD_STRATEGIES.keys() == ONNX.keys()
    assert METHODS.keys() >= ONE_SCALE


@pytest.mark.parametrize("name", METHODS)
def test_there_is_a_case_of_every_kind_that_a_method_takes(name):
    kinds = {kind_of(case.spec) for case in CASES[name]}
    assert kinds == METHODS[name].kinds


def test_every_method_is_named_as_in_the_table():
    assert [kind.model_fields["name"].default for kind in METHODS.values()] == list(METHODS)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_method_survives_json(case):
    assert parse_method(case.method.model_dump(mode="json")) == case.method


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_it_stands_in_for_what_it_replaces(case):
    replaced, x = original(case.spec).float(), inputs(case.spec).float()
    op = case.method.build(case.spec)
    wanted, got = replaced(x), op(x)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert case.spec.out_size(SIZE) == Size(height=wanted.shape[2], width=wanted.shape[3])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert op.to(memory_format=torch.channels_last)(channels_last).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("case", ON_CONVS, ids=str)
def test_it_has_the_attributes_of_the_convolution(case):
    replaced, op = original(case.spec), case.method.build(case.spec)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(op, name) == getattr(replaced, name)
    assert (op.bias is None) == (replaced.bias is None)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_it_runs_in_mixed_precision_and_keeps_the_dtype_there(case):
    op, x = case.method.build(case.spec).eval(), inputs(case.spec).float()
    wanted = op(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(x)
    assert got.isfinite().all()
    assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_it_equals_the_slow_reference(case):
    op, x = operator(case), inputs(case.spec)
    wanted = ORACLES[case.method.name](op, case.method, x.numpy())
    np.testing.assert_allclose(op(x).detach().numpy(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
def test_it_is_linear_in_its_input(case):
    op = operator(case)
    x, y = inputs(case.spec, seed=3), inputs(case.spec, seed=4)
    origin = op(torch.zeros_like(x))
    combined = 2 * (op(x) - origin) - 3 * (op(y) - origin)
    torch.testing.assert_close(op(2 * x - 3 * y) - origin, combined, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_its_gradients_are_right(case):
    op = operator(case)
    x = inputs(case.spec, 1)[:, :, :6, :6].clone().requires_grad_()
    parameters = tuple(op.parameters())

    def loss(x, *_):
        return op(x)

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)
    op.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
def test_projecting_its_own_dense_kernel_is_lossless(case):
    op, conv, x = operator(case), original(case.spec), inputs(case.spec)
    conv.weight.data.copy_(op.dense_kernel())
    if op.bias is not None:
        conv.bias.data.copy_(op.bias)
    fresh = operator(case, seed=9)
    fit = fresh.project_(conv)
    assert fit.kernel_error <= 1e-12
    torch.testing.assert_close(fresh(x), conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
@torch.no_grad()
def test_the_projection_is_the_closest_member_of_the_family(case):
    conv, op = original(case.spec), operator(case)
    fit = op.project_(conv)
    best = (conv.weight - op.dense_kernel()).norm()
    assert fit.kernel_error == pytest.approx(float(best / conv.weight.norm()), abs=1e-12)
    for seed in range(5):
        near = copy.deepcopy(op)
        torch.manual_seed(seed)
        for parameter in near.parameters():
            parameter.data += 1e-3 * torch.randn_like(parameter)
        assert (conv.weight - near.dense_kernel()).norm() >= best


@pytest.mark.parametrize(
    "case", [c for c in CLOSED_FORMS if c.method.kept_pairs(c.spec) is not None], ids=str
)
@torch.no_grad()
def test_it_keeps_the_taps_between_the_channels_that_it_says(case):
    kept = case.method.kept_pairs(case.spec)
    assert kept.dtype == torch.bool
    assert kept.shape == (case.spec.out_channels, case.spec.in_channels)
    conv, op = original(case.spec), operator(case)
    op.project_(conv)
    around = op.dense_kernel().flatten(2)
    around[:, :, around.shape[2] // 2] = 0
    assert torch.equal(around.abs().sum(2) > 0, kept)


ROUNDING = 1e-7  # an error of nothing, told from moments: the root of what float64 rounds a square to


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
@pytest.mark.parametrize("free_means", [False, True])
def test_fitting_to_data_helps_on_held_out_images(case, free_means):
    torch.manual_seed(5)
    conv, x = original(case.spec), smooth_inputs(case.spec)
    op = operator(case)
    op.project_(conv)
    statistics = op.statistics(free_means=free_means)
    statistics.add(x[:25], conv(x[:25]))
    statistics.add(x[25:], conv(x[25:]))
    fit = op.fit_(statistics)
    if is_exact(case):
        assert fit.relative_error < ROUNDING
    else:
        assert fit.relative_error < fit.start_error
    assert fit.samples == 40 * case.spec.out_size(SIZE).pixels


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
@pytest.mark.parametrize("count", [2, 6, 10])
def test_fitting_to_noise_does_no_harm_on_held_out_images(case, count):
    conv, x = original(case.spec), inputs(case.spec, count)
    op = operator(case)
    op.project_(conv)
    statistics = op.statistics(free_means=False)
    statistics.add(x, conv(x))
    fit = op.fit_(statistics)
    assert fit.relative_error <= fit.start_error + (ROUNDING if is_exact(case) else 0)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
@pytest.mark.parametrize("free_means", [False, True])
def test_the_reported_errors_equal_the_errors_recomputed(case, free_means):
    torch.manual_seed(5)
    conv, x = original(case.spec), smooth_inputs(case.spec, 4)  # too few to hold any out
    wanted = conv(x).detach()
    op = operator(case)
    op.project_(conv)
    before = op(x).detach()
    statistics = op.statistics(free_means=free_means)
    statistics.add(x, wanted)
    fit = op.fit_(statistics)

    def error(got):
        axes = (0, 2, 3)
        centred = free_means or case.spec.bias
        shift = (got - wanted).mean(axes, keepdim=True) if centred else 0
        scale = wanted - (wanted.mean(axes, keepdim=True) if centred else 0)
        return float((got - wanted - shift).norm() / scale.norm())

    size = 1.0  # where a kernel is shared and the outputs' size is free, that of the start is made up for
    if isinstance(case.method, Shared) and (free_means or case.method.scale):
        size = wanted.std((0, 2, 3), keepdim=True) / before.std((0, 2, 3), keepdim=True)
    tolerance = ROUNDING if is_exact(case) else 1e-9
    assert fit.start_error == pytest.approx(error(before * size), abs=tolerance if is_exact(case) else 1e-12)
    after = op(x).detach() * (1.0 if isinstance(case.method, Shared) and case.method.scale else size)
    assert fit.relative_error == pytest.approx(error(after), abs=tolerance)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
@torch.no_grad()
def test_scaling_scales_every_output_channel(case):
    op, x = operator(case), inputs(case.spec)
    factor = torch.linspace(0.5, 2, case.spec.out_channels, dtype=torch.float64)
    if case.method.name in ONE_SCALE:
        factor = torch.full_like(factor, 1.7)
    wanted = op(x) * factor[:, None, None]
    norms = op.weight_norms() * factor
    op.scale_(factor)
    torch.testing.assert_close(op(x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(op.weight_norms(), norms, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_stated_parameters_are_the_counted_ones(case):
    op = case.method.build(case.spec)
    assert case.method.cost(case.spec, SIZE).params == sum(p.numel() for p in op.parameters())


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_stated_macs_are_what_fvcore_counts(case):
    op = case.method.build(case.spec)
    counted = fvcore_macs(op, inputs(case.spec, 1).float())
    assert counted.macs == case.method.cost(case.spec, SIZE).macs


@pytest.mark.parametrize(("name", "kind"), METHODS_BY_KIND)
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_eligible_builds_and_runs_and_what_is_not_says_why(name, kind, data):
    method, spec = data.draw(METHOD_STRATEGIES[name]), data.draw(SPECS[kind])
    reason = method.why_not(spec)
    if reason is not None:
        assert len(reason.split()) >= 2
        return
    x = torch.randn(1, channels_of(spec), 13, 12)
    replaced = original(spec).float()
    op = method.build(spec)
    assert op(x).shape == replaced(x).shape
    fit = op.project_(replaced)
    if isinstance(op, LinearOp):
        assert 0 <= fit.kernel_error <= 1
    assert fit.how == "weights"


LOAD_AND_RUN = """
import json, pathlib, sys, torch
from safetensors.torch import load_file
from lcc.methods import parse_method
from lcc.specs import ConvSpec, StepSpec
same = 0
for folder in pathlib.Path(sys.argv[1]).iterdir():
    method, kind, spec = json.loads((folder / "case.json").read_text())
    kind = {"ConvSpec": ConvSpec, "StepSpec": StepSpec}[kind]
    op = parse_method(method).build(kind.model_validate_json(spec)).double().eval()
    op.load_state_dict(load_file(folder / "op.safetensors"))
    probe = load_file(folder / "probe.safetensors")
    same += torch.equal(op(probe["x"]), probe["y"])
sys.exit(same)
"""


def test_every_case_gives_the_same_bits_in_another_process(tmp_path):
    for number, case in enumerate(EVERY):
        op, x = operator(case), inputs(case.spec)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(op.state_dict(), folder / "op.safetensors")
        save_file({"x": x, "y": op(x).detach().contiguous()}, folder / "probe.safetensors")
        (folder / "case.json").write_text(
            json.dumps(
                [
                    case.method.model_dump(mode="json"),
                    type(case.spec).__name__,
                    case.spec.model_dump_json(),
                ]
            )
        )
    done = subprocess.run([sys.executable, "-c", LOAD_AND_RUN, str(tmp_path)], check=False)
    assert done.returncode == len(EVERY)


@pytest.mark.parametrize("case", EVERY, ids=str)
@torch.no_grad()
def test_every_lowering_is_as_close_as_it_says(case):
    op, x = operator(case), inputs(case.spec)
    wanted, before = op(x), {key: value.clone() for key, value in op.state_dict().items()}
    lowerings = op.lowerings(SIZE, 1e-3)
    assert lowerings
    for lowering in lowerings:
        assert (lowering.module(x) - wanted).norm() <= (lowering.relative_error + 1e-10) * wanted.norm()
    assert all(torch.equal(before[key], value) for key, value in op.state_dict().items())


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_lowered_modules_train_nothing_of_the_operator(case):
    op = operator(case)
    own = {parameter.data_ptr() for parameter in op.parameters()}
    for lowering in op.lowerings(SIZE, 1e-3):
        assert own.isdisjoint(parameter.data_ptr() for parameter in lowering.module.parameters())


@pytest.mark.parametrize("case", ONNX_CASES, ids=str)
@torch.no_grad()
def test_onnx_runtime_computes_the_same_without_a_fourier_transform(case):
    from onnxscript import ir

    x = inputs(case.spec, 3).float()
    for lowering in operator(case).float().lowerings(SIZE, 1e-3):
        module = lowering.module.eval()
        wanted = module(x).numpy()
        model = ir.to_proto(export_graph(module, x[:2], 20))
        assert model.opset_import[0].version == 20
        assert "DFT" not in {node.op_type for node in model.graph.node}
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            (got,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
            assert np.abs(got - wanted[:batch]).max() <= 1e-4 * np.abs(wanted).max()

import pytest
import torch
from onnx_graphs import make, serialised
from torch import nn

from lcc import measure
from lcc.errors import RecipeError
from lcc.measure import bench_layers, bench_onnx, bench_torch
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit, RdImplicit
from lcc.plan import Site
from lcc.specs import ConvSpec, Size, StepSpec
from lcc.timing import Latency, Speedup

SPEC = ConvSpec(in_channels=16, out_channels=16, kernel_size=(3, 3), padding=(1, 1))
SITES = tuple(Site(name=name, spec=SPEC, sizes=(Size(height=7, width=9),)) for name in ("a", "b", "kept"))
OPERATORS = {name: LinearMix().build(SPEC) for name in ("a", "b")}
STEP = StepSpec(channels=16, convs=(SPEC, SPEC), norm_params=64, post="relu")
CONV = "(float[N,3,{size},{size}] x) => (float[N,8,{size},{size}] y) {{ y = Conv<pads=[1,1,1,1]>(x, w) }}"


def test_a_processor_without_a_name_is_known_by_its_board_and_cores(tmp_path):
    cpuinfo, board = tmp_path / "cpuinfo", tmp_path / "model"
    assert measure.cpu_name(cpuinfo, board) == ""
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd03\n\nCPU part\t: 0xd09\n")
    assert measure.cpu_name(cpuinfo, board) == "CPU implementer 0x41, CPU part 0xd03, CPU part 0xd09"
    board.write_bytes(b"Some Board Rev 1.2\0")
    assert measure.cpu_name(cpuinfo, board).startswith("Some Board Rev 1.2, CPU implementer 0x41")
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert measure.cpu_name(cpuinfo, board) == "Some CPU @ 2 GHz"


def test_a_larger_network_is_slower_and_the_conditions_say_how_that_was_measured():
    torch.manual_seed(0)
    small, large = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 64, 5), nn.Conv2d(64, 64, 5))
    bench = bench_torch({"large": large, "small": small}, torch.randn(2, 3, 32, 33), threads=1)
    assert bench.speedups["small"].median > 2
    assert bench.latencies["large"].runs >= 30
    conditions = bench.conditions
    assert (conditions.threads, conditions.batch, conditions.image_size) == (1, 2, "32x33")
    assert (conditions.dtype, conditions.version) == ("float32", torch.__version__)


def test_timing_leaves_the_network_and_the_threads_as_they_were():
    network, threads = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)).train(), torch.get_num_threads()
    bench_torch({"network": network}, torch.randn(2, 3, 4, 4), threads=threads + 1)
    assert (network[0].training, torch.get_num_threads()) == (True, threads)
    assert torch.equal(network[1].running_mean, torch.zeros(3))


def test_onnx_files_of_different_sizes_are_timed_in_one_run():
    files = {size: serialised(make(CONV.format(size=size), w=(8, 3, 3, 3))) for size in (64, 8)}
    bench = bench_onnx({str(size): data for size, data in files.items()}, batch=2)
    assert bench.speedups["8"].median > 2
    assert bench.conditions.image_size == "64x64, 8x8"
    assert bench.conditions.runtime == "ONNX Runtime"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_does_not_find_is_one_line():
    with pytest.raises(RecipeError, match="--device cpu"):
        bench_torch({"conv": nn.Conv2d(3, 4, 3)}, torch.randn(1, 3, 8, 8), device="cuda")


@pytest.mark.parametrize("onnx", [False, True])
def test_every_converted_site_is_timed_against_its_dense_original(onnx):
    bench = bench_layers(SITES, OPERATORS, onnx=onnx)
    assert list(bench.layers) == ["a", "b"]
    layer = bench.layers["a"]
    assert layer.before.runs == layer.after.runs >= 30
    assert layer.speedup.median == pytest.approx(layer.before.median_ms / layer.after.median_ms, rel=0.5)
    assert bench.conditions.runtime == ("ONNX Runtime" if onnx else "torch eager (NCHW)")


@pytest.mark.parametrize("onnx", [False, True])
def test_a_residual_step_is_timed_against_the_block_that_it_was(onnx):
    sites = tuple(
        Site(name=name, kind="step", spec=STEP, sizes=(Size(height=14, width=14),))
        for name in ("explicit", "implicit")
    )
    operators = {"explicit": RdExplicit().build(STEP), "implicit": RdImplicit().build(STEP)}
    bench = bench_layers(sites, operators, onnx=onnx)
    assert list(bench.layers) == ["explicit", "implicit"]
    assert all(layer.after.runs >= 30 for layer in bench.layers.values())


def test_the_weights_that_are_there_decide_what_is_timed(monkeypatch):
    seen, operator = [], RdImplicit().build(STEP)
    real = measure.choose
    monkeypatch.setattr(measure, "choose", lambda op, size: seen.append(op) or real(op, size))
    site = Site(name="implicit", kind="step", spec=STEP, sizes=(Size(height=14, width=14),))
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.25)
    bench_layers((site,), {"implicit": operator}, onnx=True)
    assert all(torch.equal(a, b) for a, b in zip(seen[0].parameters(), operator.parameters(), strict=True))


def fixed(monkeypatch, before, after):
    """Make every timing come out as these milliseconds; return the list of what was timed."""
    timed = []

    def interleave(calls, **_):
        timed.append(list(calls))
        spread = {"p10_ms": 0.0, "p90_ms": 0.0, "iqr_ms": 0.0, "runs": 40, "noisy": False}
        latencies = {
            name: Latency(median_ms=ms, **spread) for name, ms in (("before", before), ("after", after))
        }
        return latencies, {"after": Speedup(median=before / after, p10=0.0, p90=0.0)}

    monkeypatch.setattr(measure, "interleave", interleave)
    return timed


@pytest.mark.parametrize(("before", "after", "slower"), [(1.0, 1.1, True), (1.1, 1.0, False)])
def test_a_layer_that_got_slower_is_flagged(monkeypatch, before, after, slower):
    fixed(monkeypatch, before, after)
    assert bench_layers(SITES, OPERATORS, onnx=False).layers["a"].slower is slower


def test_a_layer_is_not_flagged_where_ratios_and_medians_disagree(monkeypatch):
    fixed(monkeypatch, 0.31, 0.29)
    real = measure.interleave
    side_by_side = {"after": Speedup(median=0.99, p10=0.8, p90=1.2)}
    monkeypatch.setattr(measure, "interleave", lambda calls, **how: (real(calls, **how)[0], side_by_side))
    assert not bench_layers(SITES, OPERATORS, onnx=False).layers["a"].slower


def test_sites_alike_are_timed_once(monkeypatch):
    timed = fixed(monkeypatch, 2.0, 1.0)
    other = SITES[1].model_copy(update={"sizes": (Size(height=8, width=9),)})
    bench_layers(SITES, OPERATORS, onnx=False)
    assert len(timed) == 1
    bench_layers((SITES[0], other), OPERATORS, onnx=False)
    assert len(timed) == 3


def test_a_plan_without_a_layer_to_time_is_refused():
    with pytest.raises(RecipeError, match="no layer to time"):
        bench_layers(SITES, {}, onnx=False)

"""Operators swept over shapes: what is timed, what is said, what is drawn."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from onnx_graphs import make, serialised

from lcc import measure, operator_timing, plots, sweep_views
from lcc.errors import CheckFailedError, RecipeError
from lcc.method_text import method_from_text
from lcc.methods import METHODS, Lowering
from lcc.methods.linear_mix import LinearMix
from lcc.methods.shared import Shared
from lcc.operator_timing import affordable, sweep_operators
from lcc.sweep import Crossing, Point, Sweep, break_evens, crossing
from lcc.sweep_axes import ALONE, Shape, SweepOptions, axes_from_text, shape_from_text
from lcc.timing import Latency, Speedup

TINY = Shape(channels=4, size=8, kernel=3)
LINEAR_MIX = (LinearMix(),)


def latency(milliseconds, *, noisy=False):
    return Latency(
        median_ms=milliseconds, p10_ms=milliseconds, p90_ms=milliseconds, iqr_ms=0, runs=32, noisy=noisy
    )


def point(value, *, noisy=False, **ratios):
    """A point where the dense convolution takes 12 ms and every operator's speed-up spreads by a tenth."""
    return Point(
        value=value,
        rounds=8,
        latencies={"dense": latency(12.0), **{n: latency(12.0 / r, noisy=noisy) for n, r in ratios.items()}},
        speedups={n: Speedup(median=r, p10=0.9 * r, p90=1.1 * r) for n, r in ratios.items()},
    )


@pytest.fixture
def timed(monkeypatch):
    """Make every operator 3 times faster than dense, at once; give the list of what was timed."""
    names = []

    def interleave(calls, *, rounds, **_):
        names.append((list(calls), rounds))
        dense, *operators = calls
        times = {dense: latency(12.0), **{name: latency(4.0) for name in operators}}
        return times, {name: Speedup(median=3.0, p10=2.9, p90=3.1) for name in operators}

    monkeypatch.setattr(measure, "interleave", interleave)
    return names


@pytest.fixture
def quick(timed, monkeypatch):
    """As `timed`, and every layer is exported as the same small graph."""
    graph = serialised(make("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }"))
    monkeypatch.setattr(operator_timing, "layer_file", lambda *_: graph)
    return timed


@pytest.fixture
def swept():
    conditions = {"version": "1", "device": "some CPU", "threads": 1, "batch": 1, "dtype": "float32"}
    common = {"fixed": Shape(), "notes": ("slow: left out: it is slow",)}
    sweeps = []
    for runtime, factor in (("torch", 0.01), ("onnx", 0.03)):
        points = (point(64, fast=64 * factor, slow=0.1), point(128, noisy=True, fast=128 * factor))
        about = measure.Conditions(runtime=runtime, image_size="64x64", rounds=8, **conditions)
        sweeps.append(
            Sweep(
                axis="channels",
                runtime=runtime,
                conditions=about,
                points=points,
                break_even=break_evens(points),
                **common,
            )
        )
    return tuple(sweeps)


def options(methods=LINEAR_MIX, fixed=TINY, seconds=60.0, **axes):
    return SweepOptions(axes=axes, methods=methods, fixed=fixed, seconds=seconds)


@pytest.mark.parametrize(
    ("ratios", "relation", "channels"),
    [
        ({64: 0.64, 128: 1.28}, "about", 100),  # proportional to channels, as in the paper: exact
        ({64: 1.0, 128: 2.0}, "below", 64),
        ({64: 0.1, 128: 0.9}, "above", 128),
        ({64: 1.2, 128: 0.9, 256: 1.8}, "about", 142),  # 128 / 0.9: faster from there on
        ({256: 1.8, 64: 0.45, 128: 0.9}, "about", 142),
        ({64: 0.5, 256: 2.0}, "about", 128),
    ],
)
def test_break_even_is_where_the_speedup_stays_above_one(ratios, relation, channels):
    assert crossing(ratios) == Crossing(relation=relation, channels=channels)


def test_break_even_has_the_spread_of_the_speedups():
    found = break_evens([point(64, op=0.64), point(256, op=2.56)])["op"]
    # a speed-up of f * channels / 100 crosses 1 at 100 / f
    assert [at.channels for at in (found.earliest, found.median, found.latest)] == [91, 100, 111]


def test_break_even_knows_an_operator_only_where_it_was_timed():
    found = break_evens([point(64, a=0.5), point(128, a=0.9, b=2.0)])
    assert (str(found["a"].median), str(found["b"].median)) == ("above 128", "below 128")


def test_all_is_what_the_paper_swept():
    axes = axes_from_text(["all"])
    assert {axis: (values[0], values[-1]) for axis, values in axes.items()} == {
        "channels": (64, 1024),
        "size": (16, 256),
        "kernel": (3, 11),
    }


def test_values_are_swept_in_order_and_once():
    assert axes_from_text(["channels=32, 8,32", "kernel"]) == {
        "channels": (8, 32),
        "kernel": (3, 5, 7, 9, 11),
    }


def test_what_is_not_swept_can_be_given_in_part():
    assert shape_from_text("size=32,kernel=5") == Shape(channels=256, size=32, kernel=5)


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (axes_from_text, "width", "known: channels, size, kernel"),
        (axes_from_text, "channels=", "no whole number"),
        (axes_from_text, "channels=0", "no whole number"),
        (axes_from_text, "size=1.5", "no whole number"),
        (axes_from_text, "kernel=3,4", "odd"),
        (shape_from_text, "kernel=2", "odd"),
        (shape_from_text, "width=2", "known: channels, size, kernel"),
        (shape_from_text, "channels", "channels=N"),
    ],
)
def test_what_can_not_be_swept_is_named(read, text, said):
    with pytest.raises(RecipeError, match=said) as error:
        read([text] if read is axes_from_text else text)
    assert text in str(error.value)


def test_dense_and_every_operator_take_turns_at_every_point(quick):
    methods = (LinearMix(), LinearMix(group_size=2))
    sweeps = sweep_operators(options(methods, channels=(4, 8), kernel=(3, 5)))
    assert [(sweep.axis, sweep.runtime, [at.value for at in sweep.points]) for sweep in sweeps] == [
        ("channels", "torch", [4, 8]),
        ("channels", "onnx", [4, 8]),
        ("kernel", "torch", [3, 5]),
        ("kernel", "onnx", [3, 5]),
    ]
    assert all(names == ["dense", "linear_mix", "linear_mix:group_size=2"] for names, _ in quick)
    assert len(quick) == 2 * 3  # 4 channels and a 3x3 kernel are on both axes


def test_break_even_is_stated_where_channels_are_swept(quick):
    over_channels, _, over_sizes, _ = sweep_operators(options(channels=(4, 8), size=(8,)))
    assert str(over_channels.break_even["linear_mix"].median) == "below 4"
    assert over_sizes.break_even == {}


def test_an_operator_that_can_not_stand_in_is_left_out_with_the_reason_where_it_can_not(quick):
    methods = (LinearMix(), LinearMix(group_size=3))
    torch_sweep, onnx_sweep = sweep_operators(options(methods, channels=(4, 6)))
    name = "linear_mix:group_size=3"
    assert [name in at.speedups for at in torch_sweep.points] == [False, True]
    reason = LinearMix(group_size=3).why_not(TINY.spec)
    assert torch_sweep.notes == onnx_sweep.notes == (f"at channels 4: {name}: left out: {reason}",)


def test_a_method_that_saves_by_sharing_is_left_out_since_it_runs_as_a_dense_convolution(quick):
    torch_sweep, _ = sweep_operators(options((LinearMix(), Shared()), channels=(4,)))
    assert list(torch_sweep.points[0].speedups) == ["linear_mix"]
    assert torch_sweep.notes == (f"shared: left out: {ALONE}",)


def test_a_sweep_without_anything_to_time_is_refused_with_the_reason(quick):
    reason = LinearMix(group_size=3).why_not(TINY.spec)
    with pytest.raises(RecipeError) as error:
        sweep_operators(options((LinearMix(group_size=3),), channels=(4,)))
    assert reason in str(error.value)


def test_a_point_too_large_for_the_memory_is_left_out_and_said(quick, monkeypatch):
    # 4 channels of 512x512 pixels are 4 MiB; a dozen of them are too many for 40, and 8x8 pixels are not
    monkeypatch.setattr(operator_timing, "free_memory", lambda _: 40 * 2**20)
    sweep = sweep_operators(options(size=(8, 512)))[0]
    assert [at.value for at in sweep.points] == [8]
    assert "at size 512: left out: may take 0.1 GB" in sweep.notes[0]


def test_slow_operators_are_left_out_before_the_point_is():
    # 40 timed runs and a warm-up of 8
    rounds, said = affordable({"dense": 1.0, "slow": 9.0, "fast": 0.5}, seconds=100.0, rounds=15)
    assert rounds >= 8
    assert [remark.operator for remark in said] == ["slow"]
    rounds, said = affordable({"dense": 3.0, "slow": 9.0, "fast": 0.5}, seconds=100.0, rounds=15)
    assert (rounds, [remark.operator for remark in said]) == (0, [None])
    assert "with fast alone" in said[0].text


def test_a_slow_point_gets_fewer_rounds_and_says_so(quick, monkeypatch):
    monkeypatch.setattr(operator_timing, "one_run", lambda *_, **__: 0.1)
    sweep = sweep_operators(options(channels=(4,), seconds=12.0), rounds=30)[0]
    # 0.2 s a round's turn, 5 turns a round, 8 to warm up: (12 / 0.2 - 8) / 5
    assert (sweep.points[0].rounds, quick[0][1]) == (10, 10)
    assert "10 rounds" in sweep.notes[0]


def test_an_operator_that_can_not_be_exported_is_timed_in_torch_alone(quick, monkeypatch):
    def refuse(layer, example):
        if not isinstance(layer, torch.nn.Conv2d):
            raise CheckFailedError("no such operation")
        return b""

    monkeypatch.setattr(operator_timing, "layer_file", refuse)
    (sweep,) = sweep_operators(options(channels=(4,)))
    assert (sweep.runtime, sweep.operators) == ("torch", ("linear_mix",))
    assert sweep.notes == ("in ONNX Runtime: linear_mix: left out: no such operation",)


def test_every_runtime_has_its_own_notes(quick, monkeypatch):
    lowering = Lowering(torch.nn.Identity(), "by a trick")
    monkeypatch.setattr(operator_timing, "choose", lambda *_, **__: lowering)
    torch_sweep, onnx_sweep = sweep_operators(options(channels=(4,)))
    assert (torch_sweep.notes, onnx_sweep.notes) == ((), ("linear_mix: by a trick",))


def test_a_runtime_that_can_not_have_the_device_is_said(quick, monkeypatch):
    monkeypatch.setattr(operator_timing, "_obstacle", lambda _: "not timed: it has no such device")
    (sweep,) = sweep_operators(options(channels=(4,)))
    assert sweep.notes == ("in ONNX Runtime: not timed: it has no such device",)


def test_a_point_that_does_not_fit_on_the_gpu_is_left_out_and_said(quick, monkeypatch):
    def run_out(model, example, **_):
        if len(example[0]) > 4:
            raise torch.OutOfMemoryError
        return 0.001

    monkeypatch.setattr(operator_timing, "one_run", run_out)
    sweep = sweep_operators(options(channels=(4, 8)))[0]
    assert [at.value for at in sweep.points] == [4]
    assert sweep.notes == ("at channels 8: left out: the GPU ran out of memory",)


def test_lowerings_are_chosen_by_a_trial():
    example = torch.randn(1, 16, 16, 16)
    few, many = operator_timing._trial([torch.nn.Conv2d(16, 16, k) for k in (1, 9)], example)
    assert few < many


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_sweep_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="--device cpu"):
        sweep_operators(options(channels=(4,)), device="cuda")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_timed_in_both_runtimes(name, timed):
    method = method_from_text(name)
    if "conv" not in method.kinds or method.shares:
        pytest.skip("stands in for no single convolution")
    sweeps = sweep_operators(options((method,), channels=(8,)))
    assert [(sweep.runtime, sweep.operators) for sweep in sweeps] == [("torch", (name,)), ("onnx", (name,))]


def test_a_real_sweep_finds_less_work_faster():
    sweep = sweep_operators(options(fixed=Shape(channels=32, size=32), kernel=(3, 9)), rounds=8)[1]
    small, large = (at.speedups["linear_mix"].median for at in sweep.points)
    assert large > small  # the dense convolution grows by 9, the operator by less than 9 / 2
    assert sweep.conditions.runtime == "ONNX Runtime"


@pytest.mark.gpu
def test_operators_are_swept_on_a_gpu():
    sweep = sweep_operators(options(channels=(8,)), device="cuda", rounds=8)[0]
    assert sweep.conditions.device == torch.cuda.get_device_name()


def test_a_sweep_survives_json(swept):
    assert Sweep.model_validate_json(swept[0].model_dump_json()) == swept[0]


def test_the_tables_show_speedups_spreads_and_what_is_missing(swept):
    torch_sheet, _, _ = sweep_views.sweep_sheets(swept)
    assert torch_sheet.headers == ("channels", "dense ms", "fast", "slow")
    texts = [[cell.text for cell in row] for row in torch_sheet.rows]
    assert texts[0] == ["64", "12.0", "0.64\N{MULTIPLICATION SIGN}", "0.10\N{MULTIPLICATION SIGN}"]
    assert texts[1][2] == "0.58 to 0.70\N{MULTIPLICATION SIGN}"
    assert texts[2] == ["128", "12.0", "~ 1.28\N{MULTIPLICATION SIGN}", "\N{EM DASH}"]
    assert "slow: left out: it is slow" in torch_sheet.notes


def test_the_break_evens_stand_side_by_side(swept):
    sheet = sweep_views.sweep_sheets(swept)[-1]
    assert sheet.headers[1:] == ("eager torch", "ONNX Runtime")
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows}
    # torch: 1 / 0.01 channels, a tenth more or less; ONNX Runtime: 1.92 at 64 already
    assert rows == {"fast": ["100 (91 to 111)", "below 64"], "slow": ["above 64", "above 64"]}


def test_the_plot_has_a_panel_for_every_sweep_and_a_line_for_every_operator(swept, tmp_path):
    path = tmp_path / "sweep.svg"
    over_kernels = swept[0].model_copy(update={"axis": "kernel", "break_even": {}})
    sweep_views.write_plot((*swept, over_kernels), path)
    drawn = path.read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("fast", "slow", "kernel size")] == [1, 1, 1]
    assert "ONNX Runtime" in drawn


def test_the_plot_is_a_picture(swept, tmp_path):
    plots.check_plot(tmp_path / "sweep.png")
    sweep_views.write_plot(swept, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match="pip install matplotlib"):
        plots.check_plot(tmp_path / "sweep.png")


def test_bench_sweeps_operators(quick, lcc_run, tmp_path):
    what = ("--sweep", "channels=4,8", "--fixed", "size=8", "--method", "linear_mix:group_size=2")
    plot = ("--plot", tmp_path / "sweep.png")
    code, out, err = lcc_run("bench", *what, "--batch", "2", "--json", *plot)
    assert code == 0, err
    sweeps = [Sweep.model_validate_json(json.dumps(entry)) for entry in json.loads(out)]
    assert [(s.runtime, s.operators, s.conditions.batch) for s in sweeps] == [
        ("torch", ("linear_mix:group_size=2",), 2),
        ("onnx", ("linear_mix:group_size=2",), 2),
    ]
    assert (tmp_path / "sweep.png").is_file()


def test_bench_prints_tables_of_the_sweep(quick, lcc_run):
    code, out, err = lcc_run("bench", "--sweep", "size=8", "--fixed", "channels=4", "--method", "linear_mix")
    assert code == 0, err
    assert "3.00\N{MULTIPLICATION SIGN}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--sweep all"),
        (("--sweep", "width"), "known: channels"),
        (("--sweep", "channels", "zoo:cifar_resnet20"), "leave out one"),
        (("--sweep", "channels", "--device", "mps"), "--device mps"),
        (("--sweep", "channels", "--method", "linear_mx"), "known: linear_mix"),
        (("--sweep", "channels=4", "--rounds", "2", "--fixed", "size=8"), "--rounds"),
        (("--sweep", "channels", "--plot", "nowhere/sweep.png"), "nowhere"),
        (("--sweep", "channels", "--plot", "sweep.bmpx"), "known: "),
        (("x.onnx", "--plot", "sweep.png"), "--sweep"),
        (("x.onnx", "--method", "linear_mix"), "--sweep"),
        (("x.onnx", "--max-seconds", "3"), "--sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_bench_can_not_do_is_one_line(lcc_run, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = lcc_run("bench", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err

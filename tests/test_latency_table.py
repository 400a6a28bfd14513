"""Latencies of dense convolutions and candidates: what is timed, what is kept, what is said."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kills import KilledError

from lcc import latency_table, progress
from lcc.errors import ArtifactError, CheckFailedError, RecipeError, SourceError
from lcc.latency_table import Place, Timed, Timing, measure_latencies, missing, reasons
from lcc.measure import Bench, Conditions
from lcc.measurements import cache_folder
from lcc.methods import METHODS, Lowering
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.specs import ConvSpec, Size, StepSpec
from lcc.timing import Latency, Speedup

SPEC = ConvSpec(in_channels=4, out_channels=4, kernel_size=(3, 3), padding=(1, 1))
STEP = StepSpec(channels=4, convs=(SPEC, SPEC), norm_params=16, post="relu")
SIZE = Size(height=5, width=6)
CONV, BLOCK = Place(spec=SPEC, size=SIZE), Place(spec=STEP, size=SIZE)
SMALLER = Place(spec=SPEC, size=Size(height=3, width=3))
MIX, RING = LinearMix(), Circulant()
WANTED = {CONV: [MIX, RING], BLOCK: [RdExplicit()]}
TORCH = Timing(runtime="torch")
RATIOS = {"dense": 1.0, str(MIX): 0.5, str(RING): 0.25, str(RdExplicit()): 0.3}


class Clock:
    """Stands for bench_torch and bench_onnx: the dense one takes `dense_ms`, the others their ratio of it."""

    def __init__(self):
        self.dense_ms, self.die_at, self.runs, self.how = 8.0, None, [], []

    def __call__(self, rivals, *examples, threads, device, rounds, batch=None):
        if len(self.runs) == self.die_at:
            raise KilledError
        self.runs.append(tuple(rivals))
        self.how.append((threads, device, rounds, batch or len(*examples)))
        times = {name: RATIOS[name] * self.dense_ms for name in rivals}
        about = {"runtime": "", "version": "", "device": "", "dtype": "", "image_size": ""}
        return Bench(
            conditions=Conditions(threads=threads, batch=1, rounds=rounds, **about),
            latencies={
                name: Latency(median_ms=ms, p10_ms=ms, p90_ms=ms, iqr_ms=ms / 4, runs=40, noisy=True)
                for name, ms in times.items()
            },
            speedups={name: Speedup(median=1 / RATIOS[name], p10=1.0, p90=1.0) for name in list(rivals)[1:]},
        )


@pytest.fixture
def clock(monkeypatch):
    """Let nothing be timed or exported really."""
    clock = Clock()
    monkeypatch.setattr(latency_table, "bench_torch", clock)
    monkeypatch.setattr(latency_table, "bench_onnx", clock)
    monkeypatch.setattr(latency_table, "choose", lambda op, size: Lowering(op))
    monkeypatch.setattr(latency_table, "layer_file", lambda *_: b"a file")
    monkeypatch.setattr(latency_table, "Session", lambda *_, **__: None)
    return clock


def file_in(folder):
    (file,) = folder.iterdir()
    return file


def test_every_rival_is_timed_in_one_run_with_the_dense_convolution_first(clock):
    table = measure_latencies(WANTED, TORCH, cache=None)
    assert clock.runs == [("dense", str(MIX), str(RING)), ("dense", str(RdExplicit()))]
    assert table[CONV] == {
        None: Timed(median_ms=8.0, iqr_ms=2.0, noisy=True, ratio=1.0),
        MIX: Timed(median_ms=4.0, iqr_ms=1.0, noisy=True, ratio=0.5),
        RING: Timed(median_ms=0.25 * 8.0, iqr_ms=0.5, noisy=True, ratio=0.25),
    }
    assert list(table) == [CONV, BLOCK]


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_rivals_are_timed_as_is_asked_for(clock, runtime):
    measure_latencies({CONV: [MIX]}, Timing(runtime=runtime, batch=3, threads=2, rounds=9), cache=None)
    assert clock.how == [(2, "cpu", 9, 3)]


def test_what_is_kept_is_not_measured_again_and_the_same_to_the_bit(clock, tmp_path):
    clock.dense_ms = 1 / 3 + 1e-9
    first = measure_latencies(WANTED, TORCH, cache=tmp_path / "deep" / "down")
    clock.die_at = 2
    assert measure_latencies(WANTED, TORCH, cache=tmp_path / "deep" / "down") == first


def test_methods_with_a_method_inside_are_found_again(clock, tmp_path, monkeypatch):
    nested = Shared(method=MIX, scale=True)
    monkeypatch.setitem(RATIOS, str(nested), 0.9)
    first = measure_latencies({CONV: [nested]}, TORCH, cache=tmp_path)
    assert nested in first[CONV]
    assert measure_latencies({CONV: [nested]}, TORCH, cache=tmp_path) == first
    assert len(clock.runs) == 1


def test_without_a_cache_everything_is_measured_again(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("LCC_CACHE", str(tmp_path))
    for _ in range(2):
        measure_latencies({CONV: [MIX]}, TORCH, cache=None)
    assert len(clock.runs) == 2
    assert missing({CONV: [MIX]}, TORCH, cache=None) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"threads": 2}, {"batch": 3}, {"runtime": "onnx"}])
def test_other_conditions_are_measured_again(clock, tmp_path, change):
    other = TORCH.model_copy(update=change)
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    assert missing({CONV: [MIX]}, other, cache=tmp_path) == 2
    measure_latencies({CONV: [MIX]}, other, cache=tmp_path)
    assert len(clock.runs) == len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        ("torch", "torch.__version__"),
        ("onnx", "torch.__version__"),
        ("onnx", "onnxruntime.__version__"),
    ],
)
def test_another_version_is_measured_again(clock, tmp_path, monkeypatch, runtime, name):
    timing = Timing(runtime=runtime)
    measure_latencies({CONV: [MIX]}, timing, cache=tmp_path)
    monkeypatch.setattr(f"lcc.latency_table.{name}", "0.0.0")
    assert missing({CONV: [MIX]}, timing, cache=tmp_path) == 2


def test_other_code_is_measured_again(clock, tmp_path, monkeypatch):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    monkeypatch.setattr(latency_table, "own_code", lambda: "another version")
    assert missing({CONV: [MIX]}, TORCH, cache=tmp_path) == 2


def test_another_processor_is_measured_again(clock, tmp_path, monkeypatch):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    monkeypatch.setattr(latency_table, "device_name", lambda _: "another one")
    assert missing({CONV: [MIX]}, TORCH, cache=tmp_path) == 2


def test_more_rounds_alone_measure_nothing_again(clock, tmp_path):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    assert missing({CONV: [MIX]}, Timing(runtime="torch", rounds=20), cache=tmp_path) == 0


def test_a_file_states_its_conditions_first(clock, tmp_path):
    measure_latencies({CONV: [MIX]}, Timing(threads=2, batch=3), cache=tmp_path)
    head, *rivals = map(json.loads, file_in(tmp_path).read_text().splitlines())
    stated = head["conditions"]
    assert (stated["runtime"], stated["threads"], stated["batch"]) == ("onnx", 2, 3)
    assert stated.keys() >= {"version", "device", "lcc", "torch"}
    assert [rival["method"] for rival in rivals] == [None, MIX.model_dump()]


def test_a_file_of_other_conditions_under_this_name_is_not_read(clock, tmp_path):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    file = file_in(tmp_path)
    file.write_text(file.read_text().replace('"batch": 1', '"batch": 2'))
    assert missing({CONV: [MIX]}, TORCH, cache=tmp_path) == 2
    clock.dense_ms = 16.0
    for _ in range(2):
        assert measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)[CONV][MIX].median_ms == 8.0
    assert len(clock.runs) == 2


def test_a_kill_at_the_second_place_keeps_the_first(clock, tmp_path):
    clock.die_at = 1
    with pytest.raises(KilledError):
        measure_latencies(WANTED, TORCH, cache=tmp_path)
    assert missing(WANTED, TORCH, cache=tmp_path) == 2
    clock.die_at = None
    assert len(measure_latencies(WANTED, TORCH, cache=tmp_path)[BLOCK]) == 2
    assert clock.runs == [("dense", str(MIX), str(RING)), ("dense", str(RdExplicit()))]


@pytest.mark.parametrize("left", range(1, 200, 40))
def test_a_line_cut_short_is_measured_again_and_harms_no_other(clock, tmp_path, left):
    first = measure_latencies(WANTED, TORCH, cache=tmp_path)
    file = file_in(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1 + left])
    assert missing(WANTED, TORCH, cache=tmp_path) == 1
    assert measure_latencies(WANTED, TORCH, cache=tmp_path) == first
    assert clock.runs[2:] == [("dense", str(RdExplicit()))]
    assert missing(WANTED, TORCH, cache=tmp_path) == 0


@pytest.mark.parametrize("left", [0, 1, 30])
def test_a_file_cut_short_in_its_first_line_starts_afresh(clock, tmp_path, left):
    first = measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    file = file_in(tmp_path)
    file.write_bytes(file.read_bytes()[:left])
    for _ in range(2):
        assert measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path) == first
    assert len(clock.runs) == 2


@pytest.mark.parametrize("damage", [b"\xff\xfe{\n", b"null\n", b'{"place":1}\n', b"\n\n"])
def test_a_damaged_line_counts_for_nothing(clock, tmp_path, damage):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    with file_in(tmp_path).open("ab") as file:
        file.write(damage)
    assert missing({CONV: [MIX, RING]}, TORCH, cache=tmp_path) == 1


def test_a_method_that_is_no_more_counts_for_nothing(clock, tmp_path, monkeypatch):
    measure_latencies({CONV: [MIX, RING]}, TORCH, cache=tmp_path)
    monkeypatch.delitem(METHODS, "circulant")
    assert missing({CONV: [MIX]}, TORCH, cache=tmp_path) == 0


def test_a_late_comer_is_put_on_the_scale_of_the_first_dense_time(clock, tmp_path):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    clock.dense_ms = 16.0  # the machine is busier now
    table = measure_latencies({CONV: [MIX, RING]}, TORCH, cache=tmp_path)
    assert clock.runs[1] == ("dense", str(RING))
    assert (table[CONV][None].median_ms, table[CONV][MIX].median_ms) == (8.0, 4.0)
    late = table[CONV][RING]
    assert (late.median_ms, late.iqr_ms, late.ratio) == (0.25 * 8.0, 0.25 * 2.0, 0.25)
    assert measure_latencies({CONV: [MIX, RING]}, TORCH, cache=tmp_path) == table


def test_what_two_processes_measured_at_once_is_on_one_scale(clock, tmp_path):
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path / "a")
    clock.dense_ms = 16.0
    measure_latencies({CONV: [RING]}, TORCH, cache=tmp_path / "b")
    file = file_in(tmp_path / "a")
    file.write_bytes(file.read_bytes() + file_in(tmp_path / "b").read_bytes())
    table = measure_latencies({CONV: [MIX, RING]}, TORCH, cache=tmp_path / "a")
    assert [one.median_ms for one in table[CONV].values()] == [8.0, 4.0, 2.0]
    assert len(clock.runs) == 2


def append(folder, sizes):
    """Keep a record at each of these sizes, one after the other."""
    store = latency_table._store(folder, TORCH)
    timed = Timed(median_ms=1.0, iqr_ms=0.1, noisy=False, ratio=1.0)
    for size in sizes:
        place = Place(spec=SPEC, size=Size(height=size, width=1))
        store.keep([latency_table._Record(place=place, method=rival, outcome=timed) for rival in (None, MIX)])


def test_several_that_append_at_once_lose_nothing(tmp_path):
    """Threads stand for processes: each opens the file itself, and writes while others may run."""
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(append, tmp_path, range(100 * n, 100 * n + 30)) for n in range(1, 5)]
    assert [one.exception() for one in done] == [None] * 4
    assert len(latency_table._store(tmp_path, TORCH).read()) == 4 * 2 * 30
    assert file_in(tmp_path).read_bytes().startswith(b'{"conditions"')


@pytest.mark.parametrize("error", [CheckFailedError, SourceError])
def test_a_candidate_that_cannot_be_exported_has_no_entry_and_is_not_tried_again(
    clock, tmp_path, monkeypatch, error
):
    tried = []

    def choose(op, size):
        tried.append(op.method)
        if op.method == RING:
            raise error("an operation is not known")
        return Lowering(op)

    monkeypatch.setattr(latency_table, "choose", choose)
    for _ in range(2):
        table = measure_latencies(WANTED, Timing(), cache=tmp_path)
        assert list(table[CONV]) == [None, MIX]
        assert list(table[BLOCK]) == [None, RdExplicit()]
    assert tried == [MIX, RING, RdExplicit()]
    assert missing(WANTED, Timing(), cache=tmp_path) == 0
    assert reasons(Timing(), cache=tmp_path) == {(CONV, RING): "an operation is not known"}


def test_a_place_whose_dense_convolution_cannot_be_exported_is_empty(clock, tmp_path, monkeypatch):
    def layer_file(module, example):
        if example.shape[-1] == 3:
            raise CheckFailedError("too small")
        return b"a file"

    monkeypatch.setattr(latency_table, "layer_file", layer_file)
    wanted = {SMALLER: [MIX], CONV: [MIX]}
    table = measure_latencies(wanted, Timing(), cache=tmp_path)
    assert (table[SMALLER], list(table[CONV])) == ({}, [None, MIX])
    assert missing(wanted, Timing(), cache=tmp_path) == 0
    assert set(reasons(Timing(), cache=tmp_path).values()) == {
        "the dense convolution can't be timed: too small"
    }


def test_missing_counts_each_rival_once_the_dense_ones_too(clock, tmp_path):
    twice = {CONV: [MIX, RING, MIX], BLOCK: [RdExplicit()], SMALLER: []}
    assert missing(twice, TORCH, cache=tmp_path) == 3 + 2 + 1
    assert list(tmp_path.iterdir()) == []
    measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    assert missing(twice, TORCH, cache=tmp_path) == 1 + 2 + 1
    assert list(measure_latencies(twice, TORCH, cache=tmp_path)[SMALLER]) == [None]
    assert missing(twice, TORCH, cache=tmp_path) == 0


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_measured(clock, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ArtifactError, match=rf"^{folder}, .*set LCC_CACHE.*$"):
            measure_latencies({CONV: [MIX]}, TORCH, cache=folder)
    assert clock.runs == []


def test_a_full_cache_needs_no_right_to_write(clock, tmp_path, monkeypatch):
    first = measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path)
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr("os.fsync", None)
    assert measure_latencies({CONV: [MIX]}, TORCH, cache=tmp_path) == first


def test_there_is_a_bar_only_if_something_must_be_measured(clock, tmp_path, monkeypatch):
    bars, whole = [], progress.bar
    monkeypatch.setattr(
        progress, "bar", lambda title, total: bars.append((title, total)) or whole(title, total)
    )
    for _ in range(2):
        measure_latencies(WANTED, TORCH, cache=tmp_path)
    assert bars == [("timing operators", 2)]


def test_random_numbers_drawn_later_do_not_depend_on_what_was_kept(clock, tmp_path):
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        measure_latencies(WANTED, TORCH, cache=tmp_path)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LCC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "lcc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lcc"
    monkeypatch.setenv("LCC_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_does_not_find_is_one_line(tmp_path):
    for ask in (measure_latencies, missing):
        with pytest.raises(RecipeError, match="--device cpu"):
            ask({CONV: [MIX]}, Timing(device="cuda"), cache=tmp_path)


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_real_measurement_gives_a_spread_and_a_ratio(tmp_path, runtime):
    timing = Timing(runtime=runtime, rounds=8)
    table = measure_latencies({CONV: [MIX]}, timing, cache=tmp_path)
    before, after = table[CONV].values()
    assert (before.ratio, after.median_ms) == (1.0, after.ratio * before.median_ms)
    assert min(before.median_ms, after.median_ms, before.iqr_ms, after.iqr_ms) > 0
    assert measure_latencies({CONV: [MIX]}, timing, cache=tmp_path) == table

"""What operators cost over shapes: the numbers, the gaps, how they are shown and drawn."""

from __future__ import annotations

import csv
import json
import re
import sys
from io import StringIO

import pytest

from lcc import cost_views
from lcc.cost_sweep import CostSweep, count_costs
from lcc.errors import RecipeError
from lcc.methods import METHODS
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.methods.shared import Shared
from lcc.specs import ConvSpec, Size, StepSpec
from lcc.sweep_axes import Shape, SweepOptions
from lcc.tables import ARROW, TIMES, UNKNOWN

PAPER = Shape()
WIDTHS = (64, 128, 256, 512, 1024)


def swept(*methods, fixed=PAPER, **axes):
    return count_costs(SweepOptions(axes=axes or {"channels": WIDTHS}, methods=methods, fixed=fixed))


def line(sweep, name):
    return next(one for one in sweep.lines if one.name == name)


def conv(channels, kernel=3):
    half = kernel // 2
    return ConvSpec(
        in_channels=channels, out_channels=channels, kernel_size=(kernel, kernel), padding=(half, half)
    )


def block(channels):
    return StepSpec(
        channels=channels, convs=(conv(channels), conv(channels)), norm_params=4 * channels, post="relu"
    )


@pytest.mark.parametrize("kind", {**METHODS, "mgic": Mgic}.values(), ids=lambda kind: kind.__name__)
def test_costs_are_those_of_the_method_and_parameters_those_of_its_operator(kind):
    method = kind()
    if method.shares:
        pytest.skip("has no cost of its own")
    (sweep,) = swept(method, channels=(32, 64), fixed=Shape(size=8))
    specs = {f"{method.name} (conv)": conv, f"{method.name} (block)": block}
    named = {one.name: one for one in sweep.lines if one.operator != "dense"}
    assert named
    for name, one in named.items():
        for point in one.points:
            spec = specs[name](point.value)
            assert point.cost == method.cost(spec, Size(height=8, width=8))
            assert point.cost.params == sum(p.numel() for p in method.build(spec).parameters())


def test_dense_costs_stand_beside_them():
    (sweep,) = swept(Mgic(), channels=(64,), fixed=Shape(size=16, kernel=5))
    assert [one.name for one in sweep.lines] == [
        "dense (conv)",
        "mgic (conv)",
        "dense (block)",
        "mgic (block)",
    ]
    assert line(sweep, "dense (conv)").at(64).model_dump() == {
        "params": 25 * 64 * 64,
        "macs": 25 * 64 * 64 * 256,
    }
    assert line(sweep, "dense (block)").at(64).model_dump() == {
        "params": 2 * 25 * 64 * 64 + 4 * 64,  # two BatchNorms
        "macs": 2 * 25 * 64 * 64 * 256,
    }


def test_a_block_of_256_channels_costs_what_the_released_code_counts():
    (sweep,) = swept(Mgic())
    assert line(sweep, "dense (block)").at(256).params == 1_180_672
    assert line(sweep, "mgic (block)").at(256).params == 299_392


@pytest.mark.parametrize("count", ["params", "macs"])
@pytest.mark.parametrize("form", ["conv", "block"])
def test_mgic_grows_by_two_per_doubling_and_dense_by_four(form, count):
    (sweep,) = swept(Mgic(), channels=(*WIDTHS, 2048, 4096))
    growth = [getattr(p.per_doubling, count) for p in line(sweep, f"mgic ({form})").points[1:]]
    assert growth == sorted(growth, reverse=True)
    assert 2 < growth[-1] < 2.01 < growth[0] < 2.3
    dense = [getattr(p.per_doubling, count) for p in line(sweep, f"dense ({form})").points[1:]]
    assert dense == pytest.approx([4] * 6, rel=2e-3)


def test_the_table_says_so():
    parameters, macs = cost_views.cost_sheets(swept(Mgic()))
    for sheet in (parameters, macs):
        assert sheet.headers == ("channels", *map(str, WIDTHS), "per doubling")
        growth = {row[0].text: row[-1].text for row in sheet.rows}
        assert growth["dense (conv)"] == f"4.00{TIMES}"
        for form in ("conv", "block"):
            first, last = growth[f"mgic ({form})"].replace(TIMES, "").split(ARROW)
            assert float(first) > float(last)
            assert float(last) == pytest.approx(2, abs=0.03)
    texts = {row[0].text: [cell.text for cell in row[1:-1]] for row in parameters.rows}
    assert texts["mgic (block)"][2] == "299k"


def test_growth_is_per_doubling_over_other_ratios_too():
    (sweep,) = swept(LinearMix(), channels=(64, 96, 384))
    growth = [point.per_doubling.params for point in line(sweep, "dense (conv)").points[1:]]
    assert growth == pytest.approx([4, 4])


def test_a_width_that_a_method_can_not_take_is_a_gap_with_the_reason():
    (sweep,) = swept(Mgic(), channels=(64, 66, 128))
    reason = Mgic().why_not(conv(66))
    gap = line(sweep, "mgic (conv)").points[1]
    assert (gap.cost, gap.per_doubling, gap.why_not) == (None, None, reason)
    (whole,) = swept(Mgic(), channels=(64, 128))
    assert line(sweep, "mgic (conv)").points[2] == line(whole, "mgic (conv)").points[1]
    sheet = cost_views.cost_sheets([sweep])[0]
    assert [row[2].text for row in sheet.rows if row[0].text == "mgic (conv)"] == [UNKNOWN]
    assert f"at channels 66: mgic (conv): left out: {reason}" in sheet.notes


def test_what_costs_more_than_dense_is_marked():
    sheet = cost_views.cost_sheets(swept(Mgic(), channels=(48, 128)))[0]
    marked = {row[0].text: [cell.text.endswith("!") for cell in row[1:-1]] for row in sheet.rows}
    assert marked["mgic (block)"] == [True, False]
    assert marked["dense (block)"] == [False, False]
    assert any(note.startswith("! more than dense") for note in sheet.notes)


def test_a_form_that_a_method_leaves_alone_is_said_and_not_shown():
    (sweep,) = swept(Mgic(form="conv"))
    assert [one.name for one in sweep.counted] == ["dense (conv)", "mgic:form=conv (conv)"]
    assert sweep.gaps() == ('mgic:form=conv (block): left out: form = "conv" leaves whole blocks alone',)


def test_kinds_of_site_taken_by_name_only_are_left_out():
    (sweep,) = swept(RdExplicit())
    assert [one.name for one in sweep.lines] == ["dense (block)", "rd_explicit (block)"]


def test_nothing_to_count_is_refused_with_the_reason():
    with pytest.raises(RecipeError, match=r"shared .*several convolutions"):
        swept(Shared())


def test_a_cost_sweep_survives_json():
    (sweep,) = swept(Mgic(), channels=(64, 66))
    assert CostSweep.model_validate_json(sweep.model_dump_json()) == sweep


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.1, 0.5, 0.5], [0.1, 0.45, 0.55]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([1.0, 1.0], [0.9, 1.0]),
    ],
)
def test_labels_make_room_for_each_other(heights, expected):
    assert cost_views.spread(heights, 0.1) == pytest.approx(expected)


def drawn(sweeps, path):
    """Return the texts in the plot; matplotlib writes each as a comment into an SVG."""
    cost_views.write_plot(sweeps, path)
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_the_plot_has_two_panels_and_labels_every_line(tmp_path):
    texts = drawn(swept(Mgic(), LinearMix(), channels=(64, 66, 128)), tmp_path / "growth.svg")
    assert [texts.count(text) for text in ("parameters", "MACs per image", "channels")] == [1, 1, 2]
    labels = ("dense (conv)", "linear_mix (conv)", "mgic (conv)", "dense (block)", "mgic (block)")
    for name in (*labels, "linear", "quadratic"):
        assert sum(text.startswith(f"{name}  ") and text.endswith(TIMES) for text in texts) == 2, name
    assert any("odd width 33" in text for text in texts)


def test_the_plot_has_a_row_for_every_axis(tmp_path):
    texts = drawn(swept(LinearMix(), channels=(8, 16), kernel=(3, 5), size=(4,)), tmp_path / "growth.svg")
    assert [texts.count(text) for text in ("parameters", "kernel size", "image size")] == [3, 2, 2]


def test_an_axis_with_nothing_to_count_has_no_row_and_is_said(tmp_path):
    texts = drawn(swept(Mgic(), channels=(63, 65), size=(16, 32)), tmp_path / "growth.svg")
    assert [texts.count(text) for text in ("parameters", "channels", "image size")] == [1, 0, 2]
    assert any("odd width 63" in text for text in texts)


def test_bench_counts_and_draws_every_method(lcc_run, tmp_path):
    code, out, err = lcc_run(
        "bench", "--sweep", "channels=64,128", "--costs", "--json", "--plot", tmp_path / "x.png"
    )
    assert code == 0, err
    (sweep,) = [CostSweep.model_validate_json(json.dumps(entry)) for entry in json.loads(out)]
    assert {one.operator for one in sweep.lines} == {*METHODS, "dense"}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_bench_prints_what_is_counted_as_a_table_and_as_csv(lcc_run):
    what = ("--sweep", "channels=6,8", "--fixed", "size=8", "--costs", "--method", "linear_mix:group_size=4")
    code, out, err = lcc_run("bench", *what)
    assert code == 0, err
    assert "at channels 6: linear_mix:group_size=4 (conv): left out" in out
    code, out, err = lcc_run("bench", *what, "--csv")
    rows = list(csv.DictReader(StringIO(out)))
    replaced = LinearMix(group_size=4).cost(conv(8), Size(height=8, width=8))
    assert [(row["operator"], row["channels"], row["params"]) for row in rows] == [
        ("dense", "6", str(9 * 6 * 6)),
        ("dense", "8", str(9 * 8 * 8)),
        ("linear_mix:group_size=4", "6", ""),
        ("linear_mix:group_size=4", "8", str(replaced.params)),
    ]
    assert [bool(row["why_not"]) for row in rows] == [False, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--costs",), "--sweep channels"),
        (("--sweep", "channels", "--costs", "--method", "linear_mx"), "known: linear_mix"),
        (("--sweep", "channels", "--costs", "--rounds", "9"), "--rounds"),
        (("--sweep", "channels", "--costs", "--max-seconds", "9"), "--max-seconds"),
        (("--sweep", "channels", "--costs", "--csv", "--json"), "exclude each other"),
        (("--sweep", "channels", "--csv"), "--costs"),
        (("--sweep", "channels", "--costs", "--plot", "growth.bmpx"), "known: "),
        (("--sweep", "channels=7", "--costs", "--method", "linear_mix:group_size=2"), "nothing to count"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_counted_is_one_line(lcc_run, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = lcc_run("bench", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_without_matplotlib_a_plot_of_costs_is_refused_in_one_line(lcc_run, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = lcc_run("bench", "--sweep", "channels", "--costs", "--plot", tmp_path / "growth.png")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "pip install matplotlib" in err

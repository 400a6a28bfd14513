import csv
from io import StringIO

import pytest
from rich.console import Console

from lcc.evaluation import Accuracy
from lcc.measure import Conditions, LayerLatency
from lcc.methods import Fit
from lcc.report import LayerRow, ModelRow, Report, layers_to_csv, to_csv, to_json
from lcc.specs import ConvSpec, Cost, Size
from lcc.tables import TIMES, UNKNOWN, ms, report_sheets, si, size, to_markdown, to_rich
from lcc.timing import Latency, Speedup


def latency(median, *, noisy=False):
    return Latency(
        median_ms=median, p10_ms=0.9 * median, p90_ms=1.1 * median, iqr_ms=0.1, runs=40, noisy=noisy
    )


def layer(site, *, after=0.309):
    speedup = 1.43 / after
    timed = LayerLatency(
        before=latency(1.43),
        after=latency(after),
        speedup=Speedup(median=speedup, p10=speedup, p90=speedup),
        slower=speedup < 1,
    )
    return LayerRow(
        site=site,
        spec=ConvSpec(in_channels=512, out_channels=512, kernel_size=(3, 3), stride=(2, 2)),
        size=Size(height=112, width=112),
        method="linear_mix",
        before=Cost(params=2_359_296, macs=115_605_504),
        after=Cost(params=266_752, macs=13_070_848),
        fit=Fit(how="data", start_error=0.823, relative_error=0.431, samples=500),
        torch=timed,
        onnx=timed,
    )


DENSE = ModelRow(
    name="resnet18",
    source="torchvision:resnet18",
    random_weights=False,
    params=11_689_512,
    norm_params=9_600,
    macs=1_814_073_344,
    flops=3_628_146_688,
    size_bytes=46_750_982,
    accuracy=Accuracy(top1=69.76, top5=89.08, images=50_000),
    data="imagefolder:imagenet",
    torch=latency(40.0),
    onnx=latency(25.0),
    converted=0,
    kept=20,
)
CHEAP = ModelRow(
    name="resnet18-linear-mix",
    source="torchvision:resnet18",
    random_weights=False,
    params=3_327_400,
    norm_params=9_600,
    macs=490_154_496,
    flops=980_308_992,
    size_bytes=13_308_881,
    accuracy=Accuracy(top1=66.5, top5=87.0, images=50_000),
    data="imagefolder:imagenet",
    torch=latency(20.0),
    torch_speedup=Speedup(median=2.0, p10=1.9, p90=2.1),
    onnx=latency(7.14),
    onnx_speedup=Speedup(median=3.5, p10=3.4, p90=3.6),
    converted=13,
    kept=7,
    history=("convert", "finetune"),
    layers=tuple(layer(f"layer{stage}.0.conv1") for stage in range(1, 5)),
)
UNMEASURED = ModelRow(
    name="mystery",
    source="py:module:factory",
    random_weights=True,
    params=10,
    norm_params=0,
    macs=20,
    flops=40,
    uncounted=("odd",),
)
CONDITIONS = Conditions(
    runtime="ONNX Runtime",
    version="1.31.1",
    device="a processor",
    threads=1,
    batch=1,
    image_size="224x224",
    dtype="float32",
    rounds=10,
)


def report(*models):
    return Report(models=models, conditions=(CONDITIONS,), versions={"lcc": "0.1.0"}, date="2026-11-21")


def shown(*models, width=100):
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(to_rich(report_sheets(report(*models))))
    return console.file.getvalue()


def line(text, label):
    """Return the one line that begins with a label."""
    (found,) = [row.strip() for row in text.splitlines() if row.strip().startswith(label)]
    return found.removeprefix(label).strip()


def test_a_report_is_the_same_after_a_trip_through_json():
    value = report(DENSE, CHEAP, UNMEASURED)
    assert Report.model_validate_json(to_json(value)) == value


def test_a_model_is_shown_with_its_ratios_to_the_first():
    text = shown(DENSE, CHEAP)
    assert line(text, "parameters").split() == ["11,689,512", "3,327,400", f"3.51{TIMES}", "fewer"]
    assert line(text, "norms left out").split() == ["11,679,912", "3,317,800", f"3.52{TIMES}", "fewer"]
    assert line(text, "MACs per image").split() == ["1.814G", "490.2M", f"3.70{TIMES}", "fewer"]
    assert line(text, "FLOPs (2 per MAC)").split() == ["3.628G", "980.3M", f"3.70{TIMES}", "fewer"]
    assert line(text, "size on disk").split() == ["46.75", "MB", "13.31", "MB", f"3.51{TIMES}", "smaller"]
    assert line(text, "top-1").split() == ["69.76", "%", "66.50", "%", "-3.26", "points"]
    assert line(text, "ONNX Runtime").split() == ["25.0", "ms", "7.14", "ms", f"3.50{TIMES}", "faster"]
    assert line(text, "sites converted").split() == ["0", "of", "20", "13", "of", "20"]


def test_the_conditions_and_the_history_are_below_the_table():
    text = " ".join(shown(DENSE, CHEAP).split())
    assert str(CONDITIONS) in text
    assert "resnet18-linear-mix: convert; finetune" in text
    assert "ONNX Runtime 1.31.1, a processor, 1 thread, batch 1, 224x224, float32" in text


@pytest.mark.parametrize("label", ["size on disk", "top-1", "top-5", "torch eager", "ONNX Runtime"])
def test_what_is_not_known_is_a_dash_and_no_number(label):
    assert line(shown(UNMEASURED), label) == UNKNOWN


def test_random_weights_are_said_loudly_in_every_form():
    assert "RANDOM WEIGHTS" in shown(DENSE, UNMEASURED)
    assert "**RANDOM WEIGHTS**" in to_markdown(report_sheets(report(DENSE, UNMEASURED)))
    assert "RANDOM" not in shown(DENSE)


def test_modules_whose_macs_are_not_counted_are_named():
    assert "mystery: MACs of odd are not counted" in shown(UNMEASURED)


def test_a_slower_network_is_said_to_be_slower():
    slow = CHEAP.model_copy(update={"onnx_speedup": Speedup(median=0.5, p10=0.4, p90=0.6)})
    assert line(shown(DENSE, slow), "ONNX Runtime").endswith(f"2.00{TIMES} SLOWER")


def test_a_slower_layer_is_flagged_and_counted():
    slow = CHEAP.model_copy(update={"layers": (layer("fast"), layer("slow", after=1.6))})
    text = shown(DENSE, slow)
    assert line(text, "slow").endswith("1.4→1.6 !")
    assert line(text, "fast").endswith("1.4→0.31")
    assert "each timed alone: 1 of 2 in eager torch, 1 of 2 in ONNX Runtime" in text


def test_a_noisy_measurement_is_marked_and_explained():
    noisy = DENSE.model_copy(update={"onnx": latency(25.0, noisy=True)})
    assert line(shown(noisy), "ONNX Runtime") == "~ 25.0 ms"
    assert "~ noisy machine" in shown(noisy)
    assert "~" not in shown(DENSE)


def test_layers_say_shape_costs_errors_and_times_before_and_after():
    cells = line(shown(DENSE, CHEAP), "layer1.0.conv1").split()
    assert cells[:5] == ["3x3", "512→512", "/2", "112x112", "2.36M→267k"]
    assert cells[5:] == ["116M→13.1M", "0.82→0.43", "1.4→0.31", "1.4→0.31"]


def test_an_error_from_the_weights_alone_is_told_from_one_of_the_output():
    rows = (
        layer("mask").model_copy(update={"fit": Fit(how="weights", kernel_error=0.71)}),
        layer("nothing").model_copy(update={"fit": None}),
    )
    text = shown(CHEAP.model_copy(update={"layers": rows}))
    assert line(text, "mask").split()[6:8] == ["0.71", "k"]
    assert line(text, "nothing").split()[6] == UNKNOWN


def test_nothing_in_a_table_wraps_at_100_columns():
    def rows(text):
        lines = [row.split() for row in text.splitlines()]
        return [cells for cells in lines if cells and cells[0].startswith(("param", "MACs", "top", "layer"))]

    assert rows(shown(DENSE, CHEAP, CHEAP)) == rows(shown(DENSE, CHEAP, CHEAP, width=300))


def test_many_models_are_shown_a_few_at_a_time_beside_the_first():
    sheets = report_sheets(report(DENSE, *[CHEAP.model_copy(update={"layers": ()})] * 5))
    assert [sheet.headers[1] for sheet in sheets] == ["resnet18"] * 3
    assert [len(sheet.headers) for sheet in sheets] == [6, 6, 4]


def test_markdown_has_as_many_cells_in_every_row_of_a_table():
    lines = to_markdown(report_sheets(report(DENSE, CHEAP))).splitlines()
    widths = [row.count("|") for row in lines if row.startswith("|")]
    assert set(widths) == {5, 9}  # label, first, other, its ratio; the eight columns of a layer


def test_csv_holds_exact_numbers_and_leaves_the_unknown_empty():
    first, second = csv.DictReader(StringIO(to_csv(report(CHEAP, UNMEASURED))))
    assert (first["macs"], first["flops"], first["top1_percent"]) == ("490154496", "980308992", "66.5")
    assert (second["size_bytes"], second["top1_percent"], second["torch_median_ms"]) == ("", "", "")


def test_csv_of_layers_has_a_line_for_each():
    rows = list(csv.DictReader(StringIO(layers_to_csv(report(DENSE, CHEAP)))))
    assert [row["site"] for row in rows] == [row.site for row in CHEAP.layers]
    assert (rows[0]["shape"], rows[0]["params_after"], rows[0]["slower"]) == (
        "3x3 512->512 /2",
        "266752",
        "False",
    )


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (si(999), "999"),
        (si(36_864), "36.9k"),
        (si(1_814_073_344, 4), "1.814G"),
        (size(532), "0.5320 kB"),
        (size(1_089_000), "1.089 MB"),
        (ms(0.2134), "0.213"),
        (ms(12.34), "12.3"),
        (ms(1234.5), "1234"),
    ],
)
def test_numbers_are_rounded_to_a_few_digits(got, wanted):
    assert got == wanted

"""`lcc convert` with a planner as a user meets it: what is refused in one line, and what a dry run prints."""

from __future__ import annotations

import json

import pytest
from command_line import one_line
from small_data import idx_data

NET = ("zoo:cifar_resnet20", "--weights", "none")
DRY = ("convert", *NET, "--dry-run")
IMAGES = ("--calibrate", "idx:nowhere")
TARGET = ("--target", "macs=50%")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*DRY, *TARGET), "--calibrate DATA"),
        (("convert", *NET, "-o", "out", *TARGET), "--calibrate DATA"),
        (("convert", *NET, *TARGET, *IMAGES), "-o DIR"),
        ((*DRY, *IMAGES, "--target", "speed=50%"), "--target: speed=50%: 'speed' is none of params"),
        ((*DRY, *IMAGES, "--target", "macs=50"), "macs=50: write macs=50% to keep half"),
        ((*DRY, *IMAGES, "--target", "macs=150%"), "150% of what it costs now is no budget"),
        ((*DRY, *IMAGES, *TARGET, "--target", "size=5M"), "an amount such as size=5MB"),
        ((*DRY, *IMAGES, *TARGET, "--method", "linear_mx"), "linear_mx"),
        ((*DRY, *IMAGES, *TARGET, "--plan", "plan.toml"), "both decide"),
        ((*DRY, "--plan", "plan.toml"), "plan.toml: no such"),
        ((*DRY, "--plan", "plan.toml", "--method", "circulant"), "leave --method and globs out"),
        ((*DRY, "--plan", "plan.toml", "--include", "*"), "leave --method and globs out"),
        (
            (*DRY, "--method", "linear_mix", "--method", "circulant"),
            "several methods at once are for --target",
        ),
        ((*DRY, "--save-plan", "plan.toml"), "--save-plan writes what a planner decides"),
        ((*DRY, "--images", "16"), "--images says how many of --calibrate DATA"),
        ((*DRY, "--check-errors"), "--check-errors goes with --dry-run and a --target"),
        (
            ("convert", *NET, *IMAGES, *TARGET, "-o", "x", "--check-errors"),
            "--check-errors goes with --dry-run",
        ),
        ((*DRY, *IMAGES, *TARGET, "--runtime", "torch"), "--runtime: is about latency"),
        ((*DRY, *IMAGES, *TARGET, "--minimise", "params"), "--minimise: goes with max_drop"),
        ((*DRY, *IMAGES, "--max-drop", "1"), "--max-drop: needs data, the labelled images"),
        ((*DRY, *IMAGES, *TARGET, "--data", "nowhere"), "--data: goes with max_drop"),
        ((*DRY, "--runtime", "torch"), "--runtime"),
        ((*DRY, "--batch", "2"), "--batch"),
        ((*DRY, *IMAGES, *TARGET, "--batch", "0"), "--batch"),
        ((*DRY, *IMAGES, "--bench-threads", "2"), "--bench-threads"),
        ((*DRY, *IMAGES, *TARGET), "no such folder as 'nowhere'"),
        ((*DRY, *IMAGES, "--target", "macs=1%"), "satisfiable: no; the floor is"),
        (
            (*DRY, *IMAGES, "--target", "macs=90%", "--include", "layer1.0"),
            "layer1.0 is a whole block; its convolutions are --include 'layer1.0.*'",
        ),
        ((*DRY, *IMAGES, "--target", "macs=1G"), "has its targets already"),
        ((*DRY, *IMAGES, *TARGET, "--save-plan", "nowhere/plan.toml"), "nowhere/plan.toml can't be written"),
    ],
    ids=lambda value: " ".join(value[4:]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(lcc_run, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = lcc_run(*arguments)
    assert code == 2
    assert said in one_line(err)
    assert out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [("--dry-run",), ("-o", "out")])
def test_a_plan_is_not_written_over_what_is_there(lcc_run, monkeypatch, tmp_path, more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text("mine")
    code, _, err = lcc_run("convert", *NET, *more, *IMAGES, *TARGET, "--save-plan", "plan.toml")
    assert code == 2
    assert "plan.toml exists; choose another path, or replace it with --force" in one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]
    assert (tmp_path / "plan.toml").read_text() == "mine"


def test_a_dry_run_does_not_go_on_with_anything(lcc_run, within):
    code, _, err = lcc_run(*within, "--dry-run", "--resume")
    assert (code, "leave one of them out" in one_line(err)) == (2, True)


def test_a_device_that_is_not_there_is_refused_whatever_is_kept(lcc_run, within):
    assert lcc_run(*within, "--dry-run")[0] == 0
    code, _, err = lcc_run(*within, "--dry-run", "--device", "foo")
    assert (code, "device 'foo' can't be used" in one_line(err)) == (2, True)


def test_resume_replaces_no_plan_that_may_have_been_edited(lcc_run, within, tmp_path):
    (tmp_path / "plan.toml").write_text("mine")
    more = ("--save-plan", tmp_path / "plan.toml", "-o", tmp_path / "out", "--resume")
    code, _, err = lcc_run(*within, *more)
    assert (code, "--force" in one_line(err)) == (2, True)
    assert (tmp_path / "plan.toml").read_text() == "mine"
    code, _, err = lcc_run(*within, *more, "--force")
    assert code == 0, err
    assert "predicted error" in (tmp_path / "plan.toml").read_text()


# A few sites and methods of ResNet-20, on small images.
SMALL = ("--image-size", "8", "--include", "layer3.2.*", "--include", "layer1.0.*", "--method", "linear_mix")


@pytest.fixture
def within(tmp_path):
    """What makes a plan quickly."""
    data = idx_data(tmp_path / "data", train=16)
    return ("convert", *NET, *SMALL, "--calibrate", data, "--images", "16", "--target", "macs=85%")


def test_a_dry_run_prints_the_plan_as_json_and_writes_nothing(lcc_run, within, tmp_path):
    before = set(tmp_path.rglob("*"))
    code, out, err = lcc_run(*within, "--dry-run", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["targets"] == ["macs=85%"]
    assert report["then"]["macs"] <= 0.85 * report["now"]["macs"]
    assert report["then"].keys() == report["now"].keys() == {"params", "macs", "size"}
    assert report["error"] == pytest.approx(sum(part["error"] for part in report["parts"]))
    assert [point["error"] for point in report["frontier"]] == sorted(
        (point["error"] for point in report["frontier"]), reverse=True
    )
    assert set(tmp_path.rglob("*")) == before


def test_a_dry_run_prints_tables_and_saves_the_plan_that_convert_then_takes(lcc_run, within, tmp_path):
    plan, small = tmp_path / "plan.toml", tmp_path / "small"
    code, out, err = lcc_run(*within, "--dry-run", "--save-plan", plan)
    assert code == 0, err
    assert "RANDOM WEIGHTS" in out
    assert "frontier" in out
    assert f"--plan {plan} --calibrate DATA -o DIR" in err
    fit = within[within.index("--calibrate") : within.index("--target")]
    code, _, err = lcc_run("convert", *NET, "--image-size", "8", "--plan", plan, *fit, "-o", small)
    assert code == 0, err
    code, out, err = lcc_run(*within, "-o", tmp_path / "direct", "--json")
    assert code == 0, err
    assert "planned for macs=85%" in err
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("small", "direct")]
    groups = [manifest["plan"]["groups"] for manifest in manifests]
    assert groups[0] == groups[1] != []

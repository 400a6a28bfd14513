"""The command line as a user meets it: what it prints, what it exits with, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_line import one_line
from small_data import idx_data, image_folder
from typer.testing import CliRunner

import lcc
from lcc.cli import app
from lcc.methods import METHODS
from lcc.tables import TIMES

ROOT = Path(__file__).parent.parent
NET = "zoo:cifar_resnet20"
SMALL = ("--include", "layer1.0.conv1", "--include", "layer3.2.*")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def converted(lcc_run, tmp_path):
    code, _, err = lcc_run("convert", NET, "--weights", "none", "-o", tmp_path / "small", *SMALL)
    assert code == 0, err
    return tmp_path / "small"


def test_help_is_fast_and_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; sys.argv = ['lcc', '--help']\nfrom lcc.cli import main\ntry: main()\n"
        "except SystemExit: pass\nassert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    seconds = []  # of the processor: others may keep it busy
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert "convert" in done.stdout
    assert min(seconds) < 0.3


def test_every_command_explains_itself():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert command.callback.__doc__.split(".")[0] in " ".join(result.stdout.split())


def test_version_and_changelog_agree(lcc_run):
    assert lcc_run("--version")[1].strip() == f"lcc {lcc.__version__}"
    assert (
        re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == lcc.__version__
    )


def test_methods_lists_the_table(lcc_run):
    code, out, _ = lcc_run("methods")
    assert code == 0
    assert all(name in out for name in METHODS)


def test_inspect_states_the_share_and_the_ceiling_of_resnet18(lcc_run):
    code, out, _ = lcc_run("inspect", "torchvision:resnet18", "--weights", "none")
    assert code == 0
    assert "RANDOM WEIGHTS" in out
    assert f"3,327,400 parameters, 3.51{TIMES} fewer" in out
    assert f"3.70{TIMES} fewer" in out
    assert "channels change (3 to 64)" in out


def test_inspect_gives_json_with_every_site(lcc_run):
    code, out, _ = lcc_run("inspect", NET, "--weights", "none", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert Counter(row["site"]["kind"] for row in rows) == {"conv": 19, "step": 7, "transition": 2}
    assert sum(row["after"] is not None for row in rows) == 16


def test_inspect_exits_with_0_where_nothing_can_be_converted(lcc_run):
    code, out, _ = lcc_run("inspect", "torchvision:mobilenet_v2", "--weights", "none")
    assert code == 0
    assert "0 of 52 convolutions can be converted" in out


def test_convert_exits_with_2_where_nothing_can_be_converted(lcc_run, tmp_path):
    code, _, err = lcc_run("convert", "torchvision:mobilenet_v2", "--weights", "none", "-o", tmp_path / "out")
    assert code == 2
    assert "nothing to convert among 52 sites" in one_line(err)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_plan_and_writes_nothing(lcc_run, tmp_path):
    code, out, _ = lcc_run("convert", NET, "--weights", "none", "--dry-run", "--exclude", "layer1.*")
    assert code == 0
    assert "10 of 19 convolutions" in out
    assert "kept dense by a rule" in out
    assert not list(tmp_path.iterdir())


def test_convert_takes_hyperparameters(lcc_run):
    code, out, _ = lcc_run(
        "convert", NET, "--weights", "none", "--dry-run", "--method", "linear_mix:group_size=4,stencil=cross"
    )
    assert code == 0
    assert "linear_mix:group_size=4,stencil=cross" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", NET, "--weights", "none"), "-o DIR"),
        (("inspect", NET), "--weights"),
        (("inspect", "torchvision:resnet81", "--weights", "none"), "resnet18"),
        (("inspect", "nowhere.pth"), "nowhere.pth"),
        (("inspect", NET, "--weights", "none", "--method", "linear_mx"), "known: linear_mix"),
        (("inspect", NET, "--weights", "none", "--method", "linear_mix:group=2"), "did you mean"),
        (("inspect", NET, "--weights", "none", "--image-size", "big"), "--image-size big"),
        (("convert", NET, "--weights", "none", "--dry-run", "--include", "layr1.*"), "'layr1.*'"),
        (
            ("convert", NET, "--weights", "none", "--dry-run", "--include", "conv1"),
            "conv1 can't be converted",
        ),
        (("eval", NET, "--weights", "none", "--data", "imagefolder:nowhere"), "nowhere"),
        (("finetune", NET, "--weights", "none", "--data", "idx:x"), "-o DIR"),
        (("finetune", ".", "--from-scratch", "--data", "idx:x", "-o", "net"), "holds weights"),
        (("finetune", NET, "--from-scratch", "--weights", "default", "--data", "idx:x"), "leave one of them"),
        (("run", "nowhere.toml"), "nowhere.toml"),
        (("inspect", NET, "--weights", "none", "--num-classes", "0"), "--num-classes"),
        (("inspect", NET, "--weights", "none", "--seed", "-1"), "--seed"),
        (("inspect", NET, "--weights", "none", "--image-size", "0"), "--image-size"),
        (("eval", NET, "--weights", "none", "--data", "idx:x", "--std", "0,0,0"), "--std"),
        (("bench", NET, "--device", "mps"), "--device mps"),
        (("demo", "-o", "/dev/null/demo"), "/dev/null/demo"),
        (("bench", "nowhere.onnx"), "lcc export"),
        (("report", "."), "not an lcc directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(lcc_run, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = lcc_run(*arguments)
    assert code == 2
    assert said in one_line(err)
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_convert_writes_a_directory_that_loads(converted):
    model = lcc.load(converted)
    assert type(model.layer1[0].conv1).__name__ == "LinearMixOp"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_save_writes_a_trained_model_back(converted):
    model = lcc.load(converted)
    with torch.no_grad():
        model.linear.bias += 1
    lcc.save(model, converted)
    assert torch.equal(lcc.load(converted).linear.bias, model.linear.bias)


def test_convert_does_not_replace_a_directory_unless_forced(lcc_run, converted):
    again = ("convert", NET, "--weights", "none", "-o", converted, *SMALL)
    code, _, err = lcc_run(*again)
    assert code == 2
    assert "--force" in one_line(err)
    assert lcc_run(*again, "--force")[0] == 0


def test_a_converted_network_can_be_converted_further(lcc_run, converted, tmp_path):
    code, _, err = lcc_run("convert", converted, "-o", tmp_path / "more", "--include", "layer2.*")
    assert code == 0, err
    plan = json.loads((tmp_path / "more" / "manifest.json").read_text())["plan"]
    sites = [site for group in plan["groups"] for site in group["sites"]]
    assert len(sites) == len(set(sites)) == 3 + 5
    assert not set(sites) & {kept["site"] for kept in plan["kept"]}
    lcc.load(tmp_path / "more")


@pytest.mark.parametrize("form", ["json", "csv", "md"])
def test_report_gives_the_same_counts_in_every_form(lcc_run, converted, form):
    code, out, _ = lcc_run("report", converted, "--no-latency", f"--{form}")
    assert code == 0
    params = sum(p.numel() for p in lcc.load(converted).parameters())
    assert str(params) in out.replace(",", "" if form != "csv" else ",")


def test_an_unwritable_target_is_refused_before_the_work(lcc_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = lcc_run("convert", NET, "--weights", "none", "-o", tmp_path / "file" / "dir", *SMALL)
    assert code == 2
    one_line(err)
    assert (tmp_path / "file").read_text() == "mine"


def test_distilling_needs_the_original_or_says_so(lcc_run, converted, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    code, _, err = lcc_run("finetune", converted, "--data", data)
    assert code == 2
    assert "--teacher" in one_line(err)


def test_finetune_report_and_export_follow_convert(lcc_run, converted, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    options = ("--epochs", 1, "--batch-size", 8, "--set", "lr=0.01", "--set", "distill=0", "--device", "cpu")
    code, out, err = lcc_run("finetune", converted, "--data", data, *options)
    assert code == 0, err
    assert "top-1" in out
    assert not (tmp_path / "small.checkpoints").exists()
    event = json.loads((converted / "manifest.json").read_text())["history"][-1]
    assert event["command"].startswith("lcc finetune")
    code, out, err = lcc_run("export", converted)
    assert code == 0, err
    assert (tmp_path / "small.onnx").is_file()
    assert "checked in ONNX Runtime at batch 1 and 3" in out


def test_a_usage_error_is_one_line(lcc_run):
    code, out, err = lcc_run("convert", NET, "--wieghts", "none")
    assert code == 2
    assert "--wieghts" in one_line(err)
    assert out == ""


def test_export_does_not_replace_a_file_unless_forced(lcc_run, converted, tmp_path):
    target = tmp_path / "net.onnx"
    target.write_text("mine")
    code, _, err = lcc_run("export", converted, "-o", target)
    assert code == 2
    assert "--force" in one_line(err)
    assert target.read_text() == "mine"


def test_export_to_a_folder_is_refused(lcc_run, converted):
    code, _, err = lcc_run("export", converted, "-o", ".")
    assert code == 2
    assert "name a file" in one_line(err)


def test_finetuning_that_makes_it_worse_says_so(lcc_run, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    trained = ("finetune", NET, "--weights", "none", "--data", data, "--batch-size", 8, "--device", "cpu")
    assert lcc_run(*trained, "--epochs", 2, "-o", tmp_path / "net")[0] == 0
    code, _, err = lcc_run(
        "finetune",
        tmp_path / "net",
        "--data",
        data,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--lr",
        5,
        "--device",
        "cpu",
    )
    assert code == 0, err
    assert "before fine-tuning" in err
    assert ("made it worse" in err) == (
        float(re.search(r"evaluation ([\d.]+) %", err)[1])
        < float(re.search(r"before fine-tuning: ([\d.]+) %", err)[1])
    )


def test_a_network_is_trained_from_scratch_without_talk_of_teachers_or_of_a_network_before(lcc_run, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    code, out, err = lcc_run(
        "finetune", "zoo:lowcost_a_mobilenet", "--from-scratch", "--image-size", 8, "--data", data,
        "--epochs", 1, "--batch-size", 8, "--set", 'optimizer="adam"', "--device", "cpu",
        "-o", tmp_path / "net", "--json",
    )  # fmt: skip
    assert code == 0, err
    (row,) = json.loads(out)["models"]
    assert (row["name"], row["random_weights"]) == ("trained", False)
    assert row["params"] - row["norm_params"] == 101_066
    assert "the weights are random (seed 0)" in err
    assert not re.search("teacher|warning|before", err)


def test_training_from_scratch_may_have_a_teacher(lcc_run, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    few = ("--data", data, "--epochs", 1, "--batch-size", 8, "--image-size", 8, "--device", "cpu")
    assert lcc_run("finetune", NET, "--from-scratch", *few, "-o", tmp_path / "one")[0] == 0
    code, _, err = lcc_run(
        "finetune", NET, "--from-scratch", *few, "-o", tmp_path / "two", "--teacher", tmp_path / "one"
    )
    assert code == 0, err
    assert "teacher: " in err


def test_a_folders_class_names_travel_with_the_network(lcc_run, tmp_path):
    counts = {str(label): 2 for label in range(10)}
    data = image_folder(tmp_path / "data", {"train": counts, "test": counts})
    code, _, err = lcc_run(
        "finetune", NET, "--weights", "none", "--data", data, "--batch-size", 4, "--epochs", 1,
        "--device", "cpu", "-o", tmp_path / "net",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "net" / "manifest.json").read_text())["class_names"] == sorted(counts)


def test_report_takes_the_original_with_its_weights(lcc_run, converted, tmp_path):
    data = idx_data(tmp_path / "data", classes=10)
    code, out, err = lcc_run(
        "report", converted, "--no-latency", "--original", NET, "--weights", "none", "--data", data, "--json"
    )
    assert code == 0, err
    names = [model["name"] for model in json.loads(out)["models"]]
    assert names == ["original", "small"]
    assert "fvcore counts" in json.loads(out)["notes"][0]


def test_an_interrupted_command_says_so(lcc_run, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcc.pipeline.inspect", interrupt)
    code, out, err = lcc_run("inspect", "zoo:cifar_resnet20")
    assert (code, out, err) == (130, "", "lcc: interrupted\n")

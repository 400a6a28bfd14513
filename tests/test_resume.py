"""Training runs stopped at any moment: resumed to the same bits, or refused in words."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from small_data import idx_data, tiny_network
from torch import nn
from training_process import calls_in_training, differences, killed_run, run, train

from lcc import checkpoints
from lcc.batches import Batches
from lcc.errors import InterruptedRunError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_killed_at_a_step_resumes_to_the_same_bits(tmp_path, data):
    whole = train(data, None)
    assert killed_run(data, tmp_path / "run", step=9) == -signal.SIGKILL
    resumed = train(data, tmp_path / "run", resume=True)
    assert resumed[0].resumed_from == 8
    assert differences(whole, resumed) == []


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_a_run_killed_at_any_step_or_within_any_write_resumes_to_the_same_bits(tmp_path, data, attempt):
    generator = random.Random(attempt)
    whole = train(data, None)
    for _ in range(2):
        how = generator.choice(("step", "sync"))
        killed_run(data, tmp_path / "run", **{how: generator.randint(1, 12)})
    assert differences(whole, train(data, tmp_path / "run", resume=True)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_that_goes_on_exactly(tmp_path, data, number):
    whole = train(data, None)
    before = signal.getsignal(number)
    hook = calls_in_training(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(InterruptedRunError, match=r"stopped after step 5 of 18; .*--resume"):
        train(data, tmp_path / "run", hook=hook)
    assert signal.getsignal(number) is before
    resumed = train(data, tmp_path / "run", resume=True)
    assert resumed[0].resumed_from == 5
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_signal_that_ends_the_processes_that_load_images_first_leaves_a_checkpoint_too(
    tmp_path, data, monkeypatch, evaluating
):
    """As `timeout` and job schedulers do, which signal the whole process group."""
    whole, load, taken = train(data, None), Batches.on, []

    def dying(self, device):
        for batch in load(self, device):
            trains = self.split.name == "train"
            if len(taken) == 5 + evaluating and trains != evaluating:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
            taken.extend([batch] if trains else [])
            yield batch

    monkeypatch.setattr(Batches, "on", dying)
    with pytest.raises(InterruptedRunError, match=rf"stopped after step {6 if evaluating else 5} of 18"):
        train(data, tmp_path / "run")
    monkeypatch.undo()
    resumed = train(data, tmp_path / "run", resume=True)
    assert resumed[0].resumed_from == (6 if evaluating else 5)
    assert differences(whole, resumed) == []


def test_a_finished_run_resumes_to_its_own_result(tmp_path, data):
    first = train(data, tmp_path / "run")
    assert differences(first, train(data, tmp_path / "run", resume=True)) == []


def test_a_signal_while_the_last_epoch_is_evaluated_ends_the_run_too(tmp_path, data):
    calls = []

    def hook(module, _inputs):
        calls.append(module.training)
        if calls.count(True) == 18 and not module.training:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match=r"stopped after step 18 of 18; .*--resume"):
        train(data, tmp_path / "run", hook=hook)
    assert differences(train(data, None), train(data, tmp_path / "run", resume=True)) == []


def test_a_run_with_adam_and_steps_resumes_to_the_same_bits(tmp_path, data):
    changes = {"optimizer": "adam", "schedule": "step", "decay_epochs": 1, "lr": 0.01, "crop": "resize"}
    whole = train(data, None, **changes)
    hook = calls_in_training(9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError):
        train(data, tmp_path / "run", hook=hook, **changes)
    assert differences(whole, train(data, tmp_path / "run", resume=True, **changes)) == []


def test_the_run_neither_uses_nor_changes_the_callers_generators(data):
    def draws(before):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        before()
        return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    assert draws(lambda: run(data, mixup=0.2, random_erase=0.5)) == draws(lambda: None)


def test_resume_with_another_option_is_refused_by_its_name(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match=r"can't resume: lr is 0\.1 now and was 0\.05 .* remove .*run$"):
        run(data, tmp_path / "run", epochs=1, lr=0.1, resume=True)


def test_resume_in_another_precision_is_refused_and_the_one_in_use_is_told(tmp_path, data, monkeypatch):
    assert run(data, tmp_path / "run", epochs=1).precision == "no"
    monkeypatch.setattr("lcc.train.precision_on", lambda *_: "bf16")
    with pytest.raises(TrainingError, match="can't resume: precision is 'bf16' now and was 'no'"):
        run(data, tmp_path / "run", epochs=1, resume=True)


def test_resume_on_other_data_is_refused(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="training data"):
        run(idx_data(tmp_path / "more", train=49), tmp_path / "run", epochs=1, resume=True)


def test_resume_with_another_teacher_is_refused(tmp_path, data):
    run(data, tmp_path / "run", epochs=1, teacher=tiny_network(seed=1))
    with pytest.raises(TrainingError, match="the teacher now and in the checkpoint differ"):
        run(data, tmp_path / "run", epochs=1, teacher=tiny_network(seed=2), resume=True)


def test_resume_of_another_network_is_refused(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(TrainingError, match="of another network"):
        run(data, tmp_path / "run", model=other, epochs=1, resume=True)


def test_resume_with_another_number_of_threads_says_so(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    torch.set_num_threads(2)
    notes = []
    run(data, tmp_path / "run", epochs=1, resume=True, say=notes.append)
    assert any("begun on 1 CPU threads, resumed on 2 CPU threads" in note for note in notes)


def test_a_folder_with_checkpoints_is_not_overwritten_by_a_new_run(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="checkpoints of an earlier run"):
        run(data, tmp_path / "run", epochs=1)


def test_of_what_a_kill_cut_off_only_whole_checkpoints_are_kept_and_counted(tmp_path):
    for step in (4, 5):
        checkpoints.write(tmp_path / "run", step, {})
    (tmp_path / "run" / "step-00000006.new").mkdir()
    checkpoints.write(tmp_path / "run", 7, {})
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"latest", "step-00000005", "step-00000007"}


def test_what_lies_beside_the_checkpoints_is_kept(tmp_path):
    for name in ("mine", "run"):
        checkpoints.write(tmp_path / name, 1, {})
    (tmp_path / "mine" / "best.pth").touch()
    for name in ("mine", "run", "nowhere"):
        checkpoints.discard(tmp_path / name)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "mine",
        "mine/best.pth",
    ]


def test_a_damaged_checkpoint_is_named(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    path = checkpoints.newest(tmp_path / "run") / checkpoints.STATE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"step-00000006/state\.pt: damaged checkpoint") as caught:
        run(data, tmp_path / "run", epochs=1, resume=True)
    assert "\n" not in str(caught.value)


def test_the_last_two_checkpoints_are_kept(tmp_path, data):
    run(data, tmp_path / "run", epochs=2, checkpoint_every=None)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "latest",
        "step-00000006",
        "step-00000012",
    ]


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, data):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(TrainingError, match="can't be written"):
        run(data, tmp_path / "run", epochs=1)

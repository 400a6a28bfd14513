"""Training runs: resumed to the same bits, stopped in words, and what they give and report."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_data import Form, idx_data, image_folder, tiny_network
from torch import nn
from training_process import CPU, calls_in_training, differences, killed_run, options, train

from lcc import checkpoints
from lcc.batches import Batches, eval_batches
from lcc.data import open_eval
from lcc.errors import DataError, InterruptedRunError, RecipeError, SourceError, TrainingError
from lcc.evaluation import evaluate
from lcc.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def run(data, folder=None, model=None, **changes):
    keywords = {
        name: changes.pop(name)
        for name in ("teacher", "teacher_preprocessing", "resume", "say")
        if name in changes
    }
    keywords = {"say": lambda _text: None, "workers": 0} | keywords
    model = model or tiny_network()
    return finetune(model, Form(), options(data, **changes), checkpoint_dir=folder, device="cpu", **keywords)


# Resuming


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


def test_a_teacher_of_other_classes_is_named(data, tmp_path):
    with pytest.raises(TrainingError, match="teacher tells 5 classes apart, the model 3; name a teacher"):
        run(data, teacher=tiny_network(classes=5))
    with pytest.raises(DataError, match="has 3 classes, the teacher 2"):
        run(data, teacher=tiny_network(classes=2))


def test_images_that_are_trained_on_evaluate_nothing(tmp_path):
    text = image_folder(tmp_path, {"": {"a": 8, "b": 8, "c": 8}})
    with pytest.raises(DataError, match=r"evaluated on what it is trained on; hold .* --val-split 0\.1 \("):
        run(text)
    assert run(text, val_split=0.25, epochs=1).accuracy.images == 6
    trained = image_folder(tmp_path / "split", {"train": {"a": 8, "b": 8, "c": 8}})
    with pytest.raises(DataError, match=r"has no folder test/; hold some images out: --val-split 0\.1 \("):
        run(trained)


def test_a_policy_that_timm_does_not_know_is_named(data):
    with pytest.raises(RecipeError, match="auto_augment = 'nosuch' is none of timm's policies"):
        run(data, auto_augment="nosuch")


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


# Failures


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_good_weights(tmp_path, data):
    hook = calls_in_training(8, lambda: model[0].weight.data.fill_(math.inf))
    model = tiny_network()
    model.register_forward_pre_hook(hook)
    with pytest.raises(TrainingError, match="no finite number any more at step 8 of 18; lower lr"):
        run(data, tmp_path / "run", model=model, checkpoint_every=1)
    state = checkpoints.read(checkpoints.newest(tmp_path / "run"))
    assert state["step"] == 7
    assert all(tensor.isfinite().all() for tensor in state["stepper"]["model"].values())


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(tmp_path, data):
    model = tiny_network()
    with pytest.raises(TrainingError, match="no finite number"):
        run(data, tmp_path / "run", model=model, checkpoint_every=1, lr=1e38, warmup=0.0)
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is None or all(
        tensor.isfinite().all() for tensor in checkpoints.read(newest)["stepper"]["model"].values()
    )


def test_out_of_memory_suggests_a_smaller_batch(data):
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_network()
    model.register_forward_pre_hook(calls_in_training(2, no_memory))
    with pytest.raises(TrainingError, match="out of memory at batch_size = 8; halve it"):
        run(data, model=model)


def test_a_model_with_another_number_of_classes_is_refused_before_training(tmp_path):
    text = image_folder(tmp_path, {part: {"a": 8, "b": 8} for part in ("train", "val")})
    with pytest.raises(DataError, match="has 2 classes, the model 3"):
        run(text)


def test_a_class_missing_from_one_part_is_named(tmp_path):
    text = image_folder(tmp_path, {"train": {"a": 8, "b": 8, "c": 8}, "val": {"a": 8, "c": 8}})
    with pytest.raises(DataError, match="class 'b' is missing from val"):
        run(text)


def test_fewer_images_than_a_batch_are_refused(data):
    with pytest.raises(DataError, match="48 training images are fewer than one batch of 64"):
        run(data, batch_size=64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "nosuch"}, "optimizer = 'nosuch'"),
        ({"mixup": 0.2, "batch_size": 7}, "batch_size = 7"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_by_name(data, changes, words):
    with pytest.raises(RecipeError, match=words):
        run(data, **changes)


def test_an_unknown_device_is_refused(data):
    with pytest.raises(RecipeError, match="device 'warp' can't be used"):
        finetune(tiny_network(), Form(), options(data), device="warp")


# Results


def test_training_learns_and_reports_the_last_epoch(data):
    model = tiny_network()
    result = run(data, model=model, epochs=8, lr=0.2, crop="none")
    assert result.accuracy.top1 > 90
    assert result.accuracy == result.history[-1].accuracy
    assert result.accuracy == evaluate(model, eval_batches(open_eval(data), Form()), device="cpu")
    assert not model.training
    assert (result.evaluated_on, result.best_epoch) == ("test", None)


def test_the_best_epoch_is_told_only_where_images_were_held_out_for_it(data):
    result = run(data, val_split=0.25)
    tops = [epoch.accuracy.top1 for epoch in result.history]
    assert result.evaluated_on.startswith("val")
    assert result.best_epoch == 1 + tops.index(max(tops))


def test_the_moving_average_is_the_result(data):
    model = tiny_network()
    averaged = run(data, model=model, ema=0.99, epochs=4)
    assert averaged.accuracy == evaluate(model, eval_batches(open_eval(data), Form()), device="cpu")
    plain = tiny_network()
    run(data, model=plain, epochs=4)
    assert not torch.equal(model[0].weight, plain[0].weight)


def test_mixed_precision_and_channels_last_train_too(data):
    model = tiny_network()
    result = run(data, model=model, epochs=8, lr=0.2, crop="none", precision="bf16", channels_last=True)
    assert result.accuracy.top1 > 90
    assert all(
        parameter.is_contiguous() and parameter.dtype == torch.float32 for parameter in model.parameters()
    )


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_float32_where_a_cpu_would_emulate_it(data, monkeypatch, native):
    monkeypatch.setattr("lcc.steps.cpu_has_bfloat16", lambda: native)
    model, notes, seen = tiny_network(), [], set()
    model[-1].register_forward_hook(lambda module, _, out: seen.add(out.dtype) if module.training else None)
    run(data, model=model, epochs=1, precision="bf16", say=notes.append)
    assert seen == {torch.bfloat16 if native else torch.float32}
    assert any("training in float32" in note for note in notes) != native


def test_float16_is_float32_on_a_cpu_and_that_is_told(data):
    model, notes, seen = tiny_network(), [], set()
    model[-1].register_forward_hook(lambda module, _, out: seen.add(out.dtype) if module.training else None)
    result = run(data, model=model, epochs=1, precision="fp16", say=notes.append)
    assert seen == {torch.float32}
    assert result.precision == "no"
    assert "note: fp16 is for GPUs: training in float32 instead" in notes


class _Fussy(nn.Module):
    """Takes images of one size alone, as vision transformers do."""

    def forward(self, x):
        assert x.shape[2:] == (16, 16), "wrong size"
        return x.mean((2, 3))


def test_a_teacher_of_images_of_another_size_is_refused_in_words(data):
    size = replace(Form(), image_size=(16, 16))
    with pytest.raises(RecipeError, match=r"the teacher wants images of \(16, 16\), the model of \(8, 8\)"):
        run(data, teacher=_Fussy(), teacher_preprocessing=size)
    with pytest.raises(
        SourceError, match=r"run on a 1x3x8x8 input \(wrong size\); give it another --image-size"
    ):
        run(data, teacher=_Fussy())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_trains_and_resumes_at_every_precision(tmp_path, data, precision):
    model, changes = (
        tiny_network(),
        {"epochs": 8, "lr": 0.2, "crop": "none", "precision": precision, "ema": 0.9},
    )
    model.register_forward_pre_hook(calls_in_training(30, lambda: os.kill(os.getpid(), signal.SIGINT)))
    keywords = {"checkpoint_dir": tmp_path / "run", "device": "cuda", "say": lambda _text: None}
    with pytest.raises(InterruptedRunError):
        finetune(model, Form(), options(data, **changes), teacher=tiny_network(seed=1), **keywords)
    model = tiny_network()
    changed = options(data, **changes)
    result = finetune(model, Form(), changed, teacher=tiny_network(seed=1), resume=True, **keywords)
    assert (result.resumed_from, len(result.history)) == (30, 8)
    assert all(parameter.isfinite().all() and parameter.device == CPU for parameter in model.parameters())


def test_a_poor_teacher_is_warned_of(data):
    notes = []
    result = run(data, epochs=1, teacher=tiny_network(seed=1), say=notes.append)
    assert result.teacher.images == 12
    assert any(note.startswith("warning: the teacher") for note in notes)


def test_a_good_teacher_is_not_warned_of(data):
    teacher, notes = tiny_network(), []
    assert run(data, model=teacher, epochs=8, lr=0.2, crop="none").accuracy.top1 > 90
    run(data, epochs=1, teacher=teacher, say=notes.append)
    assert not any(note.startswith("warning") for note in notes)

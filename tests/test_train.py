"""Training runs: refused in words, and what they give and report."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from small_data import Form, image_folder, tiny_network
from torch import nn
from training_process import CPU, calls_in_training, options, run

from lcc import checkpoints
from lcc.batches import eval_batches
from lcc.data import open_eval
from lcc.errors import DataError, InterruptedRunError, RecipeError, SourceError, TrainingError
from lcc.evaluation import evaluate
from lcc.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


# Failures


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

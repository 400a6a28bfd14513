from __future__ import annotations

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from small_data import Form, idx_data, image_folder, tiny_network
from torch import nn
from training_process import calls_in_training, differences, killed_run, options, train

from lcc import checkpoints
from lcc.batches import eval_batches, train_batches
from lcc.data import open_eval, open_split
from lcc.errors import DataError, InterruptedRunError, RecipeError, TrainingError
from lcc.evaluation import evaluate
from lcc.steps import Stepper, Teacher
from lcc.train import finetune

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    return idx_data(tmp_path / "data")


def run(data, folder=None, model=None, **changes):
    keywords = {name: changes.pop(name) for name in ("teacher", "resume", "say") if name in changes}
    keywords = {"say": lambda _text: None, "workers": 0} | keywords
    model = model or tiny_network()
    return finetune(model, Form(), options(data, **changes), checkpoint_dir=folder, device="cpu", **keywords)


# resume


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


def test_a_finished_run_resumes_to_its_own_result(tmp_path, data):
    first = train(data, tmp_path / "run")
    assert differences(first, train(data, tmp_path / "run", resume=True)) == []


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
    with pytest.raises(TrainingError, match=r"the option lr is 0\.1 now and was 0\.05"):
        run(data, tmp_path / "run", epochs=1, lr=0.1, resume=True)


def test_resume_on_other_data_is_refused(tmp_path, data):
    run(data, tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="training data"):
        run(idx_data(tmp_path / "more", train=49), tmp_path / "run", epochs=1, resume=True)


def test_resume_with_another_teacher_is_refused(tmp_path, data):
    run(data, tmp_path / "run", epochs=1, teacher=tiny_network(seed=1))
    with pytest.raises(TrainingError, match="hash of the teacher"):
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


# failures


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


# results


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


def test_the_learning_rate_rises_linearly_then_falls_as_half_a_cosine(data):
    stepper = Stepper(tiny_network(), options(data, lr=0.4, warmup=0.25), steps=40, classes=3)
    rates = []
    for step in range(40):
        stepper.take(step, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        rates.append(stepper.lr)
    rise = [0.4 * (1 / 11 + step / 10 * (10 / 11)) for step in range(10)]
    fall = [0.4 * (1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)]
    assert rates == pytest.approx(rise + fall, abs=1e-12)


@pytest.mark.parametrize(("warmup", "rise"), [(0.0, []), (0.1, [0.01 / 3, 0.02 / 3])])
def test_the_learning_rate_falls_in_steps_counted_in_epochs_from_the_start(data, warmup, rise):
    changes = {"schedule": "step", "decay_rate": 0.5, "decay_epochs": 2, "warmup": warmup, "epochs": 5}
    stepper = Stepper(tiny_network(), options(data, lr=0.01, **changes), steps=20, classes=3)
    rates = []
    for step in range(20):
        stepper.take(step, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        rates.append(stepper.lr)
    want = [0.01] * 8 + [0.005] * 8 + [0.0025] * 4
    assert rates == pytest.approx(rise + want[len(rise) :], abs=1e-12)


def test_adam_has_its_usual_constants(data):
    options_ = options(data, optimizer="adam", lr=0.01, weight_decay=0.0)
    optimizer = Stepper(tiny_network(), options_, steps=2, classes=3).optimizer.optimizer
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)


def test_a_run_with_adam_and_steps_resumes_to_the_same_bits(tmp_path, data):
    changes = {"optimizer": "adam", "schedule": "step", "decay_epochs": 1, "lr": 0.01, "crop": "resize"}
    whole = train(data, None, **changes)
    hook = calls_in_training(9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError):
        train(data, tmp_path / "run", hook=hook, **changes)
    assert differences(whole, train(data, tmp_path / "run", resume=True, **changes)) == []


def test_the_loss_is_labels_and_teacher_in_the_stated_shares(data):
    student, teacher = tiny_network(), tiny_network(seed=1)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = np.array([0, 2, 1, 1])
    s = student.train()(x).detach().double().numpy()
    t = teacher.eval()(x).detach().double().numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    labels = -np.log(softmax(s)[np.arange(4), y]).mean()
    p, q = softmax(t / 3), softmax(s / 3)
    apart = 9 * (p * np.log(p / q)).sum(axis=1).mean()
    stepper = Stepper(
        tiny_network().train(), options(data, distill=0.3, temperature=3.0), steps=10, classes=3
    )
    stepper.teacher = Teacher.make(teacher, Form(), Form(), CPU)
    loss, right = stepper.take(0, x, torch.from_numpy(y))
    assert loss.item() == pytest.approx(0.7 * labels + 0.3 * apart, rel=1e-5)
    assert right.item() == (s.argmax(axis=1) == y).sum()


def test_the_teacher_sees_images_under_its_own_normalisation():
    own = Form(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(form):
        return (pixels - torch.tensor(form.mean).view(3, 1, 1)) / torch.tensor(form.std).view(3, 1, 1)

    teacher = Teacher.make(nn.Identity(), own, Form(), CPU)
    torch.testing.assert_close(teacher(normalised(Form())), normalised(own), rtol=0, atol=1e-5)


def test_weight_decay_spares_biases_and_norms_unless_asked(data):
    def decayed(**changes):
        stepper = Stepper(tiny_network(), options(data, weight_decay=0.1, **changes), steps=2, classes=3)
        return sum(len(group["params"]) for group in stepper.optimizer.param_groups if group["weight_decay"])

    assert decayed() == 2
    assert decayed(decay_norms=True) == 5


class _Fixed(nn.Module):
    """Ranks the classes 0, 1, 2, ... for every image."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return -torch.arange(self.classes).float().expand(len(x), -1)


def test_top_1_and_top_5_count_the_right_guesses(tmp_path):
    text = idx_data(tmp_path, test=40, classes=8)
    accuracy = evaluate(_Fixed(8), eval_batches(open_eval(text), Form(), batch_size=7), device="cpu")
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (100 / 8, 500 / 8, 40)


def test_top_5_is_not_told_for_five_classes(tmp_path):
    text = idx_data(tmp_path, test=40, classes=5)
    assert evaluate(_Fixed(5), eval_batches(open_eval(text), Form()), device="cpu").top5 is None


def test_evaluation_leaves_every_module_in_its_own_mode(data):
    model = tiny_network().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, eval_batches(open_eval(data), Form()), device="cpu")
    assert [module.training for module in model.modules()] == before


# batches


def stream(text, start=0, workers=0, epochs=2, **changes):
    split = open_split(text, "train")
    batches = train_batches(
        split, Form(), options(text, epochs=epochs, **changes), start=start, workers=workers
    )
    return list(batches.on(CPU))


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b)
        for left, right in zip(one, two, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "changes", [{}, {"crop": "resize"}, {"auto_augment": "rand-m5", "random_erase": 0.5}]
)
def test_a_stream_begun_later_is_the_end_of_the_whole_one(data, changes):
    whole = stream(data, **changes)
    assert len(whole) == 12
    assert same(stream(data, start=7, **changes), whole[7:])


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    text = image_folder(tmp_path, {"train": {"a": 24, "b": 24}})
    changes = {"crop": "resize", "auto_augment": "rand-m5", "random_erase": 0.5}
    assert same(stream(text, **changes), stream(text, workers=2, **changes))


def test_every_epoch_shows_every_image_once_in_another_order(data):
    batches = stream(data, crop="none", hflip=0.0)
    plain = open_split(data, "train")
    pixels = torch.stack([torch.from_numpy(np.array(plain.images[i][0])) for i in range(48)]).permute(
        0, 3, 1, 2
    )
    expected = {tuple(image.flatten().tolist()) for image in pixels}
    shape = (1, 3, 1, 1)
    epochs = []
    for half in (batches[:6], batches[6:]):
        images = torch.cat([x for x, _ in half])
        images = (images * torch.tensor(Form().std).view(shape) + torch.tensor(Form().mean).view(shape)) * 255
        epochs.append([tuple(image.round().int().flatten().tolist()) for image in images])
    assert set(epochs[0]) == set(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_a_shifted_crop_moves_the_image_by_up_to_four_pixels_and_flips_half(tmp_path):
    import lcc.augment as b

    pixels = np.arange(1, 65, dtype=np.uint8).reshape(1, 1, 8, 8).repeat(3, axis=1)
    padded = np.pad(pixels[0], ((0, 0), (4, 4), (4, 4)))
    windows = {
        padded[:, y : y + 8, x : x + 8][:, :, ::step].tobytes(): (y, x, step)
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    count = 4000
    bits = b.mixed_bits(0, 0, np.arange(count))
    moved = b.shift_and_flip(pixels.repeat(count, axis=0), bits, 4, 0.5)
    seen = [windows[image.tobytes()] for image in moved]
    assert len(set(seen)) == 9 * 9 * 2
    assert abs(sum(step == -1 for _, _, step in seen) / count - 0.5) < 0.03


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_met_while_training_is_named_by_its_path(tmp_path, workers):
    text = image_folder(tmp_path, {"train": {"a": 8}})
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"^\S*train/a/3\.png: damaged image"):
        stream(text, workers=workers, crop="resize")

"""Fine-tuning with an exact resume. Knows no method and no recipe file.

A run is a function of its options, data, start weights and teacher: the generators are seeded anew at every
step from (seed, step) (`lcc.steps`), order and variation of the images are functions of (seed, epoch, index)
(`lcc.batches`), and the learning rate is a function of the step. So a checkpoint holds weights, optimiser
state and counters, and no generator's state: accelerate's and timm's own ways to resume are not exact.
On a CPU a resumed run ends with the same bits, given the same number of threads.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lcc import checkpoints, progress
from lcc.augment import seeded
from lcc.batches import eval_batches, train_batches
from lcc.data import open_parts
from lcc.errors import InterruptedRunError, TrainingError
from lcc.evaluation import Accuracy, accuracy_on, count_outputs, mode, pick_device, placed
from lcc.features import check_sites
from lcc.hashing import hash_of_weights, short_hash
from lcc.interrupts import signals
from lcc.memory import out_of_memory_as
from lcc.specs import Frozen
from lcc.steps import Stepper, Teacher, precision_on
from lcc.two_streams import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lcc.batches import Batches
    from lcc.data import Preprocessing
    from lcc.interrupts import Stop
    from lcc.recipe import Finetune

TEACHER_IMAGES = 2000
FINITE_CHECK_STEPS = 20
FREE_TO_CHANGE = frozenset({"data", "checkpoint_every"})  # the data is compared by its fingerprint


class Epoch(Frozen):
    """What one epoch gave: `loss` and `train_top1` are means over its steps, `lr` is its last."""

    epoch: int
    loss: float
    train_top1: float
    lr: float
    accuracy: Accuracy
    images_per_s: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: loss {self.loss:.3f}, train {self.train_top1:.1f} %, "
            f"evaluation {self.accuracy}, {self.images_per_s:,.0f} images/s"
        )


class TrainResult(Frozen):
    """What a run gave; `accuracy` is the last epoch's, on the part of the data `evaluated_on`.

    `best_epoch` is there only where images were held out to choose by (val/ or val_split); `precision` is
    what was computed in, see `lcc.steps.precision_on`.
    """

    accuracy: Accuracy
    evaluated_on: str
    history: tuple[Epoch, ...]
    best_epoch: int | None = None
    precision: str = "no"
    teacher: Accuracy | None = None
    resumed_from: int | None = None


def finetune(
    model: nn.Module,
    preprocessing: Preprocessing,
    options: Finetune,
    *,
    teacher: nn.Module | None = None,
    teacher_preprocessing: Preprocessing | None = None,
    sites: Sequence[str] = (),
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    origin: str = "",
    device: str = "auto",
    workers: int | None = None,
    shown: bool | None = None,
    say: Callable[[str], None] = progress.say,
) -> TrainResult:
    """Train `model` in place, and leave it in eval mode on the device where it was.

    `teacher_preprocessing` None: the model's. `sites` names the modules whose outputs `options.features`
    compares. `resume` goes on from the newest checkpoint, or starts if there is none; `origin` says what the
    weights at the start were made from, which has to be the same then. `workers` changes only the speed;
    `shown` None: a progress bar on a terminal; `say` takes notes.
    Raises: TrainingError: the loss is not finite, no memory, a checkpoint that doesn't fit;
    InterruptedRunError: stopped by a signal, after a checkpoint; DataError; RecipeError.
    """
    start = checkpoints.begin(checkpoint_dir, resume=resume, say=say)
    target = pick_device(device)
    train, held_out = open_parts(options.data, val_split=options.val_split, seed=options.seed)
    taught = teacher is not None and (options.distill > 0 or options.features > 0)
    expert = teacher if teacher is not None and taught else nn.Identity()
    if options.features > 0:
        check_sites(expert, sites)
    full = TrainingError(
        f"out of memory at batch_size = {options.batch_size}; halve it, and lr with it, or set precision = "
        '"bf16"'
    )
    with (
        placed(model, target, channels_last=options.channels_last),
        placed(expert, target),
        mode(expert, training=False),
        _own_generators(options.seed, target),
        _tuned_convolutions(),
        out_of_memory_as(full),
    ):
        first = 0 if start is None else int(start["step"])
        stream = train_batches(train, preprocessing, options, start=first, workers=workers)
        evaluation = eval_batches(held_out, preprocessing, batch_size=2 * options.batch_size, workers=workers)
        run = _Run(model, stream, evaluation, options, say, sites, origin)
        if run.precision != options.precision:
            is_half = options.precision == "fp16"
            why = "fp16 is for GPUs" if is_half else "this CPU would emulate bf16, which is slow"
            say(f"note: {why}: training in float32 instead")
        if expert is teacher:
            run.learn_from(teacher, teacher_preprocessing or preprocessing)
        if start is not None:
            run.restore(start, checkpoint_dir)
        run.go(checkpoint_dir, shown=shown)
        run.stepper.hand_over()
    model.eval()
    return run.result()


class _Run:
    """A training run between its start and its end; `step` counts finished steps."""

    def __init__(
        self,
        model: nn.Module,
        stream: Batches,
        evaluation: Batches,
        options: Finetune,
        say: Callable[[str], None],
        sites: Sequence[str],
        origin: str,
    ) -> None:
        self.device = device_of(model)
        self.stream = stream
        self.evaluation = evaluation
        self.options = options
        self.say = say
        self.origin = origin
        self.precision = precision_on(self.device, options.precision)
        self.steps_per_epoch = len(stream.split) // options.batch_size
        self.steps = options.epochs * self.steps_per_epoch
        classes = count_outputs(model, stream)
        self.stepper = Stepper(model, options, self.steps, classes, sites)
        self.step = 0
        self.sums = torch.zeros(2, device=self.device)  # of this epoch: loss per step, right guesses
        self.seconds = 0.0  # of this epoch, training only
        self.history: list[Epoch] = []
        self.teacher: Accuracy | None = None
        self.teacher_hash = ""
        self.resumed_from: int | None = None

    def learn_from(self, teacher: nn.Module, own: Preprocessing) -> None:
        """Distil from `teacher`, and say how good it is on this data."""
        expert = Teacher.make(teacher, own, self.stream.preprocessing, self.device)
        outputs = count_outputs(teacher, self.stream, called="the teacher")
        if outputs != self.stepper.classes:
            raise TrainingError(
                f"the teacher tells {outputs} classes apart, the model {self.stepper.classes}; "
                "name a teacher of as many, or set distill = 0"
            )
        self.stepper.teacher = expert
        self.teacher_hash = hash_of_weights(teacher)
        split = self.evaluation.split
        chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:TEACHER_IMAGES])
        some, size = split.subset(chosen, split.name), 2 * self.options.batch_size
        self.teacher = accuracy_on(teacher, eval_batches(some, own, batch_size=size, workers=0))
        self.say(f"teacher: {self.teacher} on {self.teacher.images:,} images of {split.name}")
        if self.teacher.top1 < (100 + 100 / self.stepper.classes) / 2:
            self.say(
                "warning: the teacher is nearer to guessing than to being right on this data, and will "
                "hold the model back; fine-tune the teacher on it first, or set distill = 0"
            )

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Go on from a checkpoint's state. Raises: TrainingError: it is of another run."""
        options, facts = json.loads(state["options"]), state["facts"]
        differing = [
            *(
                f"{name} is {value!r} now and was {options[name]!r} in the checkpoint"
                for name, value in self._options().items()
                if options.get(name, value) != value
            ),
            *(
                f"the {name} now and in the checkpoint differ"
                for name, value in self._facts().items()
                if facts.get(name, value) != value
            ),
        ]
        if differing:
            raise TrainingError(
                f"can't resume: {differing[0]}; give what the run was begun with, or remove {directory}"
            )
        if state["machine"] != (machine := _machine(self.device)):
            self.say(f"note: begun on {state['machine']}, resumed on {machine}: the last bits will differ")
        self.stepper.load(state["stepper"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.sums.copy_(state["sums"])
        self.history = [Epoch.model_validate_json(each) for each in state["history"]]
        self.resumed_from = self.step
        self.say(f"resumed after step {self.step} of {self.steps}")

    def go(self, directory: Path | None, *, shown: bool | None) -> None:
        """Train to the end, or until a signal."""
        with (
            signals() as stop,
            mode(self.stepper.model, training=True),
            progress.bar("fine-tune", self.steps, start=self.step, shown=shown) as tick,
            self._loaders_may_stop_first(stop, directory),
        ):
            self._start_clock()
            if self._epoch_is_over():
                self._end_epoch()
            for x, y in self.stream.on(self.device):
                self._take(x, y)
                tick(self.step, self._numbers)
                over = self._epoch_is_over()
                if stop.requested or self._due(over=over):
                    self._checkpoint(directory)
                if stop.requested:
                    raise InterruptedRunError(self._where_it_stopped(directory))
                if over:
                    self._end_epoch()
            if stop.requested:  # while the last epoch was evaluated
                raise InterruptedRunError(self._where_it_stopped(directory))

    @contextmanager
    def _loaders_may_stop_first(self, stop: Stop, directory: Path | None) -> Iterator[None]:
        """Stop after a checkpoint, too, where a signal ended the processes that load images."""
        try:
            yield
        except RuntimeError as error:
            if not stop.requested or "DataLoader worker" not in str(error):
                raise
            self._checkpoint(directory)
            raise InterruptedRunError(self._where_it_stopped(directory)) from error

    def result(self) -> TrainResult:
        """What the run gave; call it after `go`."""
        chosen = self.evaluation.split.name.startswith("val")
        best = max(self.history, key=lambda epoch: epoch.accuracy.top1)
        last = self.history[-1].accuracy
        return TrainResult(
            accuracy=last,
            evaluated_on=self.evaluation.split.name,
            history=tuple(self.history),
            best_epoch=best.epoch if chosen else None,
            precision=self.precision,
            teacher=self.teacher,
            resumed_from=self.resumed_from,
        )

    def _take(self, x: Tensor, y: Tensor) -> None:
        loss, right = self.stepper.take(self.step, x, y)
        self.sums += torch.stack([loss, right])
        self.step += 1
        # Reading a number waits for the GPU, so there it is done now and then.
        if self.device.type == "cpu" or self.step % FINITE_CHECK_STEPS == 0:
            self._check_finite()

    def _check_finite(self, *, weights: bool = False) -> None:
        if bool(self.sums[0].isfinite()) and (not weights or self.stepper.finite()):
            return
        raise TrainingError(
            f"the loss or a weight is no finite number any more at step {self.step} of {self.steps}; lower "
            f"lr = {self.options.lr:g} or set clip_norm (checkpoints hold the last good weights)"
        )

    def _epoch_is_over(self) -> bool:
        return self.step == self.steps_per_epoch * (len(self.history) + 1)

    def _due(self, *, over: bool) -> bool:
        every = self.options.checkpoint_every
        return over if every is None else self.step % every == 0 or self.step == self.steps

    def _end_epoch(self) -> None:
        """Evaluate and begin the next epoch; a checkpoint of this step has this still to do."""
        self._check_finite(weights=True)
        self._stop_clock()
        images = self.steps_per_epoch * self.options.batch_size
        loss, right = self.sums.tolist()
        epoch = Epoch(
            epoch=len(self.history) + 1,
            loss=loss / self.steps_per_epoch,
            train_top1=100 * right / images,
            lr=self.stepper.lr,
            accuracy=accuracy_on(self.stepper.result, self.evaluation),
            images_per_s=images / self.seconds,
        )
        self.history.append(epoch)
        self.say(str(epoch))
        self.sums.zero_()
        self.seconds = 0.0
        self._start_clock()

    def _checkpoint(self, directory: Path | None) -> None:
        if directory is None:
            return
        self._check_finite(weights=True)
        self._stop_clock()
        state = {
            "options": json.dumps(self._options()),
            "facts": self._facts(),
            "machine": _machine(self.device),
            "stepper": self.stepper.state(),
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
            "history": [epoch.model_dump_json() for epoch in self.history],
        }
        checkpoints.write(directory, self.step, state)
        self._start_clock()

    def _options(self) -> dict[str, Any]:
        given = self.options.model_dump(mode="json", exclude=set(FREE_TO_CHANGE))
        return {**given, "precision": self.precision}

    def _facts(self) -> dict[str, str]:
        form = self.stream.preprocessing
        text = f"{form.image_size} {form.mean} {form.std} {form.crop_pct} {form.interpolation}"
        return {
            "training data": self.stream.split.fingerprint,
            "preprocessing": short_hash(text.encode()),
            "teacher": self.teacher_hash,
            "start weights' origin": short_hash(self.origin.encode()),
        }

    def _start_clock(self) -> None:
        self.clock = time.perf_counter()

    def _stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self.clock

    def _numbers(self) -> str:
        done = self.step - self.steps_per_epoch * len(self.history)
        loss, right = (self.sums / done).tolist()
        speed = done * self.options.batch_size / (self.seconds + time.perf_counter() - self.clock)
        accuracy = 100 * right / self.options.batch_size
        return f"epoch {len(self.history) + 1}: loss {loss:.3f}, {accuracy:.1f} %, {speed:,.0f} images/s"

    def _where_it_stopped(self, directory: Path | None) -> str:
        text = f"stopped after step {self.step} of {self.steps}"
        return (
            text if directory is None else f"{text}; resume from the checkpoint in {directory} with --resume"
        )


@contextmanager
def _own_generators(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with seeded(seed), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms: the sizes stay the same."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _machine(device: torch.device) -> str:
    """Return what the last bits of a sum depend on."""
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type

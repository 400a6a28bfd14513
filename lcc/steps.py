"""One optimiser step: loss, distillation, mixed precision, EMA; and the state that continues it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcc.augment import mixed_bits
from lcc.errors import RecipeError, TrainingError
from lcc.features import distance, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lcc.data import Preprocessing
    from lcc.recipe import Finetune


@dataclass(frozen=True)
class Teacher:
    """A frozen network that grades the student's images, under its own normalisation."""

    model: nn.Module
    scale: Tensor
    shift: Tensor

    @classmethod
    def make(
        cls, model: nn.Module, own: Preprocessing, student: Preprocessing, device: torch.device
    ) -> Teacher:
        """Return the teacher for images normalised for `student`.

        Raises: RecipeError: the image sizes differ.
        """
        if own.image_size != student.image_size:
            raise RecipeError(
                f"the teacher wants images of {own.image_size}, the model of {student.image_size}"
            )
        mean, std, to_mean, to_std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (student.mean, student.std, own.mean, own.std)
        )
        return cls(model.to(device).eval(), std / to_std, (mean - to_mean) / to_std)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 logits (N, classes)."""
        logits: Tensor = self.model(x * self.scale + self.shift)
        return logits.float()


class Stepper:
    """Trains `model` one batch at a time; `take(step, ...)` depends on the state and its arguments alone."""

    def __init__(
        self, model: nn.Module, options: Finetune, steps: int, classes: int, sites: Sequence[str] = ()
    ) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.model = model
        self.options = options
        self.classes = classes
        self.teacher: Teacher | None = None
        self.sites = sites if options.features > 0 else ()  # where features are compared
        device = next(model.parameters()).device
        self.accelerator = _accelerator(device, precision_on(device, options.precision))
        bare = _optimizer(model, options)
        self.schedule = _schedule(bare, options, steps)
        self.optimizer = self.accelerator.prepare_optimizer(bare)
        self.ema = None if options.ema is None else ModelEmaV3(model, decay=options.ema, use_warmup=True)
        self.mix = _mixup(options, classes)

    @property
    def result(self) -> nn.Module:
        """The network that counts: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def take(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Make step number `step` (from 0) and return the loss and the number of right first guesses."""
        _seed_everything(self.options.seed, step, x.device)
        self.schedule.step_update(step)
        if self.options.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        targets = y
        if self.mix is not None:
            x, targets = self.mix(x, y)
        with self.accelerator.autocast(), watched(self.model, self.sites) as own:
            logits = self.model(x)
        if self.teacher is None:
            loss = self._loss(logits.float(), targets, None)
        else:
            with self.accelerator.autocast(), watched(self.teacher.model, self.sites) as theirs:
                taught = self.teacher(x)
            loss = self._loss(logits.float(), targets, taught)
            if self.sites:
                loss = loss + self.options.features * distance(own, theirs)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            _follow_(self.ema.module, self.model, self.ema.get_decay(step + 1))
        return loss.detach(), (logits.detach().argmax(dim=1) == y).sum()

    def _loss(self, logits: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        loss = F.cross_entropy(logits, targets, label_smoothing=self.options.label_smoothing)
        if taught is None:
            return loss
        share, temperature = self.options.distill, self.options.temperature
        student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (logits, taught))
        # times T^2, so that the gradient keeps its size (Hinton et al., arXiv:1503.02531, section 2)
        apart = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
        return (1 - share) * loss + share * apart

    def hand_over(self) -> None:
        """Give the model the weights that count."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def finite(self) -> bool:
        """Whether every weight and buffer is a number."""
        tensors = [each for each in self.model.state_dict().values() if each.is_floating_point()]
        return bool(torch.stack([each.sum() for each in tensors]).isfinite().all())

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to go on: tensors and plain values. The schedule needs only the step."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take on a state. Raises: TrainingError: it is another network's."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError) as error:
            raise TrainingError("can't resume: the checkpoint is of another network") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def _follow_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model, a tensor that several layers share once.

    timm's own update goes by names, and would move it once for each of them.
    """
    states = (each.state_dict(keep_vars=True).values() for each in (average, model))
    pairs = {id(mine): (mine, new) for mine, new in zip(*states, strict=True)}.values()
    moving = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in moving], [new for _, new in moving], 1 - decay)
    for mine, new in pairs:
        if not mine.is_floating_point():
            mine.copy_(new)


def precision_on(device: torch.device, wanted: str) -> str:
    """Return the precision to compute in where `wanted` is asked for.

    "no", which is float32, on CPUs for float16, and for bfloat16 where that is emulated: that takes ten
    times as long as float32.
    """
    on_cpu = device.type == "cpu"
    return "no" if on_cpu and (wanted == "fp16" or (wanted == "bf16" and not cpu_has_bfloat16())) else wanted


def cpu_has_bfloat16() -> bool:
    """Whether convolutions on this CPU are made for bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def _accelerator(device: torch.device, precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps one configuration per process; without this a second run could not change precision.
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False)
    except ValueError as error:
        raise RecipeError(f"precision = {precision!r} can't be used on {device.type}: {error}") from error


def _optimizer(model: nn.Module, options: Finetune) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm lists no exports

    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=options.optimizer,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            filter_bias_and_bn=not options.decay_norms,
        )
    except (ValueError, AssertionError, KeyError) as error:
        raise RecipeError(f"optimizer = {options.optimizer!r} is none of timm's: {error}") from error
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, options: Finetune, steps: int) -> Any:
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    warmup = min(round(options.warmup * steps), steps - 1)
    falls_in_steps = options.schedule == "step"
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="step" if options.schedule == "constant" else options.schedule,  # steps that change nothing
        decay_rate=options.decay_rate if falls_in_steps else 1.0,  # "poly" takes it as its power
        decay_epochs=options.decay_epochs * (steps // options.epochs),
        num_epochs=steps - warmup,
        warmup_epochs=warmup,
        warmup_prefix=not falls_in_steps,  # where the fall is counted from
        warmup_lr=options.lr / (warmup + 1),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def _mixup(options: Finetune, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if options.mixup == 0 and options.cutmix == 0:
        return None
    from timm.data.mixup import Mixup

    if options.batch_size % 2:
        raise RecipeError(f"batch_size = {options.batch_size}: mixup and cutmix need an even one")
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(  # type: ignore[no-untyped-call]  # timm
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, label_smoothing=0.0, num_classes=classes
    )
    return mix


def _seed_everything(seed: int, step: int, device: torch.device) -> None:
    """Seed what the model (dropout) and mixup draw from in this step.

    Not by `torch.manual_seed`, which queues a call and a stack trace for every kind of device not in use.
    """
    bits = int(mixed_bits(seed, -2, np.array([step]))[0])
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)  # noqa: NPY002 (timm's mixup draws from it)
    torch.default_generator.manual_seed(bits)
    if device.type == "cuda":
        with torch.cuda.device(device):  # it may not be the current one
            torch.cuda.manual_seed(bits)
    elif device.type == "mps":
        torch.mps.manual_seed(bits)

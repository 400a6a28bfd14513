"""A training run for a process of its own, which a test kills."""

from __future__ import annotations

import os
import random
import signal
import sys
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch
from small_data import Form, tiny_network

from lcc.recipe import Finetune
from lcc.train import TrainResult, finetune

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
EVERYTHING = {
    "auto_augment": "rand-m5-mstd0.5",
    "random_erase": 0.5,
    "mixup": 0.2,
    "cutmix": 0.3,
    "ema": 0.9,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
}


def options(data: str, **changes) -> Finetune:
    """Return options for a short run on tiny data."""
    return Finetune(
        **({"data": data, "epochs": 3, "batch_size": 8, "lr": 0.05, "checkpoint_every": 2} | changes)
    )


def run(data, folder=None, model=None, **changes):
    keywords = {
        name: changes.pop(name)
        for name in ("teacher", "teacher_preprocessing", "resume", "say")
        if name in changes
    }
    keywords = {"say": lambda _text: None, "workers": 0} | keywords
    model = model or tiny_network()
    return finetune(model, Form(), options(data, **changes), checkpoint_dir=folder, device="cpu", **keywords)


def train(data: str, folder: Path | None, *, resume=False, hook=None, **changes):
    """Return the result and weights of a run that uses every source of randomness."""
    torch.set_num_threads(1)
    # The run must not depend on the generators it finds.
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(int.from_bytes(os.urandom(4)))
    model = tiny_network(dropout=0.3)
    if hook is not None:
        model.register_forward_pre_hook(hook)
    result = finetune(
        model,
        Form(),
        options(data, **(EVERYTHING | changes)),
        teacher=tiny_network(seed=1),
        checkpoint_dir=folder,
        resume=resume,
        device="cpu",
        workers=0,
        say=lambda _text: None,
    )
    return result, model.state_dict()


def calls_in_training(count: int, action):
    """Return a forward hook that acts before the `count`-th training step."""
    left = [count]

    def hook(module, _inputs):
        if module.training:
            left[0] -= 1
            if left[0] == 0:
                action()

    return hook


def die():
    """Die as of kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die_at_step(data, folder, step):
    train(data, folder, resume=True, hook=calls_in_training(step, die))


def _train_and_die_at_sync(data, folder, count):
    real, left = os.fsync, [count]

    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            die()
        real(handle)

    os.fsync = fsync
    train(data, folder, resume=True)


def killed_run(data: str, folder: Path, *, step: int = 0, sync: int = 0) -> int:
    """Return the exit code of a run that dies before its `step`-th step, or in its `sync`-th sync to disk."""
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["lcc.train"])
    target, count = (_train_and_die_at_step, step) if step else (_train_and_die_at_sync, sync)
    process = context.Process(target=target, args=(data, folder, count))
    process.start()
    process.join()
    return process.exitcode


def differences(one: tuple[TrainResult, dict], two: tuple[TrainResult, dict]) -> list[str]:
    """Return in what two runs differ, bit for bit; speed and the place of the resume don't count."""
    different = [name for name, tensor in one[1].items() if not torch.equal(tensor, two[1][name])]
    histories = [
        [epoch.model_dump(exclude={"images_per_s"}) for epoch in result.history]
        for result in (one[0], two[0])
    ]
    return different + (["history"] if histories[0] != histories[1] else [])

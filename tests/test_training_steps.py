"""One training step after another: the learning rate, the optimizer, the loss and the teacher in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_data import Form, tiny_network
from torch import nn
from training_process import CPU, options

from lcc.steps import Stepper, Teacher

pytestmark = pytest.mark.usefixtures("one_thread")


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

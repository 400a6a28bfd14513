"""A small network and a converted one, and the lcc directory in which it is saved."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lcc import artifact, models, surgery
from lcc.manifest import Event
from lcc.methods import Fit
from lcc.methods.linear_mix import LinearMix
from lcc.models import Loaded, Preprocessing, Source
from lcc.plan import make_plan, rules_for

SMALL = Preprocessing(image_size=(8, 12), crop_pct=1.0)
SOURCE = Source(id="py:mine:net", weights="none")
RECIPE_TEXT = 'lcc = 1  # as given\r\n[model]\nsource = "zoo:cifar_resnet20"\n'
FITS = {"layer1.0.conv1": Fit(how="weights", kernel_error=0.5), "layer1.0.conv2": Fit(how="data", samples=7)}
DONE = Event(
    kind="train",
    command="lcc convert",
    date="2026-01-02T03:04:05+00:00",
    versions={"torch": "9.9"},
    seed=3,
    metrics={"top1": 0.5, "loss": math.inf},
    details={"start": "mask"},
)


class Net(nn.Module):
    """Two convolutions that may share a weight, and a buffer that state_dict leaves out."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("shift", torch.ones(1), persistent=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.shift


def in_memory(model):
    return Loaded(model=model.eval(), source=SOURCE, preprocessing=SMALL)


def shaken(model):
    """Give BatchNorm statistics and biases that are not their initial values."""
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@pytest.fixture(autouse=True)
def seeded_on_one_thread(one_thread):
    """Draw the same random numbers in every test, and sum in the same order."""
    torch.manual_seed(0)


@pytest.fixture(name="converted")
def converted_network():
    """A ResNet-20 with LinearMix on all equal-channel 3x3 convolutions, and its plan."""
    loaded = models.load("zoo:cifar_resnet20", weights="none")
    sites = surgery.find_sites(loaded.model, torch.zeros(1, 3, 32, 32))
    plan = make_plan(sites, rules_for(LinearMix(group_size=2)))
    surgery.replace_(loaded.model, plan)
    shaken(loaded.model)
    return loaded, plan


@pytest.fixture(name="saved")
def saved_network(converted, tmp_path):
    """The converted network's directory."""
    loaded, plan = converted
    named = replace(loaded, class_names=tuple("abcdefghij"))
    artifact.save(named, tmp_path / "net", plan=plan, fits=FITS, history=(DONE,), recipe=RECIPE_TEXT)
    return tmp_path / "net"


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)

"""What fitting to activations takes, as a multiple of a forward pass over the same images.

The multiples are shown by: pytest -m slow tests/test_calibration_speed.py --log-cli-level=INFO
"""

from __future__ import annotations

import copy
import logging
from statistics import median
from time import perf_counter

import pytest
import torch

from lcc import models
from lcc.calibrate import calibrate_
from lcc.methods.linear_mix import LinearMix
from lcc.plan import make_plan, rules_for
from lcc.surgery import find_sites, replace_

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
def seconds_forward(model, images):
    start = perf_counter()
    model(images)
    return perf_counter() - start


def seconds_calibrating(model, sites, images):
    converted = copy.deepcopy(model)
    originals = replace_(converted, make_plan(sites, rules_for(LinearMix())))
    start = perf_counter()
    calibrate_(converted, originals, sites, images)
    return perf_counter() - start


@pytest.mark.parametrize(
    ("source", "images", "side", "most", "rounds"),
    [("zoo:cifar_resnet20", 500, 32, 10, 7), ("torchvision:resnet18", 512, 224, 4, 1)],
    ids=["resnet20", "resnet18"],
)
def test_a_fit_takes_few_forward_passes(threads, source, images, side, most, rounds):
    model = models.load(source, weights="none").model.eval()
    x = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    sites = find_sites(model, x[:1])
    seconds_forward(model, x)
    taken = [(seconds_forward(model, x), seconds_calibrating(model, sites, x)) for _ in range(rounds)]
    times = sorted(fit / forward for forward, fit in taken)
    logger.info(
        "%s, %d images, %d threads: %.2f times a forward pass of %.2f s (%.2f to %.2f)",
        source,
        images,
        threads,
        median(times),
        median(forward for forward, _ in taken),
        times[0],
        times[-1],
    )
    assert median(times) <= most

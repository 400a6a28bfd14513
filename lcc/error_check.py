"""Whether predicted errors can be trusted: every option is really taken, alone, and outputs compared."""

from __future__ import annotations

import copy
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from lcc import calibrate, data, models, progress, surgery
from lcc.candidates import rules_of
from lcc.errors import DataError
from lcc.evaluation import pick_device, placed
from lcc.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from lcc.budget import Option
    from lcc.error_table import Starts
    from lcc.plan import Site
    from lcc.recipe import Calibrate
    from lcc.settings import Settings

CHUNK = 256  # images at a time


def refuse_few_images(calibration: Calibrate) -> None:
    """Make sure, before any long work, that there are images for `checked_errors`. Raises: DataError."""
    there, needed = len(data.enough_images(calibration.data, 0)), 2 * calibration.images
    if there < needed:
        raise DataError(
            f"{calibration.data} has {there} images, and errors are checked on as many more as are fitted "
            f"to: give --images {there // 2}"
        )


def checked_errors(
    starts: Starts,
    sites: tuple[Site, ...],
    options: Sequence[Option],
    calibration: Calibrate,
    settings: Settings,
) -> str:
    """Return in words how the options' predicted errors rank beside true ones.

    Each option is converted alone, on the calibration's images; the truth is the Kullback-Leibler divergence
    of the predictions on as many other images, in nats.
    """
    from scipy.stats import spearmanr  # not at the start of every command

    preprocessing = starts.original.loaded.preprocessing
    images = data.images(calibration.data, preprocessing, 2 * calibration.images, calibration.seed)
    fitted, held_out = images[: calibration.images], images[calibration.images :]
    device = pick_device(settings.device, doubles=True)
    model = starts.original.loaded.model.eval()
    true = []
    with placed(model, device), progress.bar("check errors", len(options)) as tick:
        wanted = _log_probabilities(model, held_out.to(device))
        for done, option in enumerate(options, 1):
            converted = copy.deepcopy(starts.of(option.method).loaded.model).to(device).eval()
            with models.seeded(calibration.seed):
                originals = surgery.replace_(converted, make_plan(sites, rules_of([option])))
            converted.to(device)
            calibrate.calibrate_(converted, originals, sites, fitted)
            got = _log_probabilities(converted, held_out.to(device))
            true.append(float((wanted.exp() * (wanted - got)).sum(1).mean()))
            tick(done)
    predicted = [option.error for option in options]
    alike = len(set(predicted)) < 2 or len(set(true)) < 2  # where there is no order to compare
    rank = "not defined" if alike else f"{float(spearmanr(predicted, true).statistic):.3f}"
    ratios = [was / said for said, was in zip(predicted, true, strict=True) if said > 0]
    size = f"; the true ones are {median(ratios):.2g} times as large (median)" if ratios else ""
    return (
        f"predicted errors of {len(options)} options beside true ones, each converted alone, on "
        f"{len(held_out)} other images: rank correlation {rank}{size}"
    )


@torch.no_grad()
def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(model(part).double(), dim=1) for part in images.split(CHUNK)])

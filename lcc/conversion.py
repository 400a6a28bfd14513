"""A network in, a converted copy out: sites, plan, surgery, and weights from weights or from images."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from lcc import calibrate, data, progress, surgery
from lcc.evaluation import pick_device
from lcc.manifest import event_now
from lcc.network import Network, sites_of
from lcc.plan import Plan, Rule, Site, make_plan
from lcc.settings import command_line

if TYPE_CHECKING:
    from torch import nn

    from lcc.methods import Fit
    from lcc.recipe import Calibrate
    from lcc.settings import Settings


def convert_network(
    original: Network, rules: tuple[Rule, ...], calibration: Calibrate | None, settings: Settings
) -> tuple[tuple[Site, ...], Network]:
    """Return the sites of a network, and a converted copy of it; without images its fit is from weights.

    Raises: NothingToConvertError: no site; RecipeError: an idle rule; DataError: the images.
    """
    sites = sites_of(original)
    decided = make_plan(sites, rules)
    model = copy.deepcopy(original.loaded.model)
    originals = surgery.replace_(model, decided)
    if calibration is None:
        fits = calibrate.project_(model, originals)
        details = {"weights": "closest to the original's, from weights alone"}
    else:
        fits, details = _fit_(model, originals, sites, original, calibration, settings)
    seed = None if calibration is None else calibration.seed
    event = event_now("convert", command_line(), seed=seed, details=details)
    return sites, original.but(
        loaded=replace(original.loaded, model=model),
        plan=_merged(original.plan, decided),
        fits={**original.fits, **fits},
        history=(*original.history, event),
        size_bytes=None,
    )


def _fit_(
    model: nn.Module,
    originals: dict[str, nn.Module],
    sites: tuple[Site, ...],
    original: Network,
    calibration: Calibrate,
    settings: Settings,
) -> tuple[dict[str, Fit], dict[str, str]]:
    """Fit the operators to unlabelled images; return the fits, and how they were made in words."""
    images = data.images(
        calibration.data, original.loaded.preprocessing, calibration.images, calibration.seed
    )
    device = pick_device(settings.device)
    for module in (model, *originals.values()):
        module.to(device)
    done: list[str] = []
    with progress.bar("calibrate", len(originals)) as tick:

        def on_site(name: str, _fit: Fit) -> None:
            done.append(name)
            tick(min(len(done), len(originals)), lambda: name)

        result = calibrate.calibrate_(model, originals, sites, images, on_site=on_site)
    model.cpu()
    details = {
        "weights": f"least squares on {len(images)} images of {calibration.data}, no labels",
        "inputs": "from the converted prefix",
    }
    if result.chunks > 1:
        details["inputs"] = "from the original network, since the images do not fit in memory at once"
        settings.say(
            f"note: fitted in {result.chunks} chunks; inputs {details['inputs']}; fewer --images may"
        )
    return result.fits, details


def _merged(before: Plan, now: Plan) -> Plan:
    """Return the plan that does both, where `now` converts more of a network that `before` made."""
    done = before.methods()
    return Plan(
        groups=(*before.groups, *now.groups),
        kept=tuple(entry for entry in now.kept if entry.site not in done),
    )

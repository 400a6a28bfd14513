"""Progressive conversion: a plan carried out in stages, with some training after each but the last.

Nothing but checkpoints and fits is kept in between: a resumed run converts every stage again, and takes its
training from the last checkpoint, which knows what it is of.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from lcc import checkpoints, fit_store, surgery
from lcc.conversion import convert_network, in_order, tried
from lcc.directory import checkpoints_of, fits_of
from lcc.network import sites_of
from lcc.plan import Plan, Rule, make_plan
from lcc.tuning import train_network

if TYPE_CHECKING:
    from pathlib import Path

    from lcc.network import Network
    from lcc.plan import Site
    from lcc.recipe import Calibrate, Finetune, Progressive
    from lcc.settings import Settings


def refuse_leftovers(progressive: Progressive, directory: Path) -> None:
    """Make sure, before any long work, that no stage before the last has something of an earlier run.

    Raises: TrainingError: checkpoints. ArtifactError: fits.
    """
    for place in _places(progressive, directory):
        fit_store.refuse_leftovers(fits_of(place))
        checkpoints.refuse_leftovers(checkpoints_of(place))


def discard_stages(progressive: Progressive, directory: Path) -> None:
    """Remove what was kept of the stages before the last."""
    for place in _places(progressive, directory):
        checkpoints.discard(checkpoints_of(place))
        fit_store.discard(fits_of(place))


def convert_in_stages(
    original: Network,
    rules: tuple[Rule, ...],
    teacher: Network | None,
    progressive: Progressive,
    finetune: Finetune,
    calibrate: Calibrate | None,
    directory: Path,
    settings: Settings,
    *,
    resume: bool,
    origin: str,
    workers: int | None,
) -> tuple[tuple[Site, ...], Network]:
    """Return the sites of a network, and a copy converted as the rules say, part by part.

    After each part but the last the network is trained at a constant learning rate; checkpoints go to
    DIR.stage1.checkpoints and so on.
    Raises: what conversion and training raise.
    """
    sites = sites_of(original)
    plan = make_plan(sites, rules)
    parts = parts_of(plan, sites, progressive.stages)
    if len(parts) < progressive.stages:
        settings.say(f"note: there are {len(parts)} sites to convert, so as many stages")
    options = finetune.model_copy(update={"epochs": progressive.epochs, "schedule": "constant"})
    places = (*_places(progressive, directory)[: len(parts) - 1], directory)
    network = in_order(original, sites, plan, settings)
    orders = network.plan.orders
    surgery.check_reached(*tried(network, sites, plan), network.example)  # before any stage is trained
    for part, place in zip(parts, places, strict=True):
        _, network = convert_network(
            network, part, calibrate, settings, fits=fits_of(place), resume=resume, ordered=True
        )
        if place != directory:
            network, result = train_network(
                network, options, teacher, place, settings, resume=resume, origin=origin, workers=workers
            )
            done = len(network.plan.methods()) - len(original.plan.methods())
            settings.say(f"{place.name}: {done} of {len(plan.methods())} sites, {result.accuracy}")
    return sites, network.but(plan=original.plan.then(plan).model_copy(update={"orders": orders}))


def parts_of(plan: Plan, sites: tuple[Site, ...], count: int) -> tuple[tuple[Rule, ...], ...]:
    """Return the rules of so many stages, from the input to the output, each with about as many sites.

    Fewer stages, where there are fewer sites. No site shares its kernel: that would need all of them at once.
    """
    methods = plan.methods()
    names = [site.name for site in sites if site.name in methods]
    count = min(count, len(names))
    cuts = [round(len(names) * number / count) for number in range(count + 1)]
    later = Rule(match=("*",), reason="not yet")
    return tuple(
        (*(Rule(match=(name,), method=methods[name]) for name in names[start:end]), later)
        for start, end in pairwise(cuts)
    )


def _places(progressive: Progressive, directory: Path) -> list[Path]:
    """Return what the checkpoints and fits of all stages but the last are named after."""
    return [directory.parent / f"{directory.name}.stage{number}" for number in range(1, progressive.stages)]

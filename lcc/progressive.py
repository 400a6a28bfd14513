"""Progressive conversion: a plan carried out in stages, with some training after each but the last."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import TYPE_CHECKING

from lcc import artifact, fit_store
from lcc.conversion import convert_network
from lcc.directory import RECIPE
from lcc.errors import RecipeError
from lcc.network import sites_of
from lcc.pipeline import saved
from lcc.plan import Kept, Plan, Rule, make_plan
from lcc.recipe import ModelPart
from lcc.settings import checkpoints_of, fits_of
from lcc.tuning import train_network

if TYPE_CHECKING:
    from pathlib import Path

    from lcc.network import Network
    from lcc.plan import Site
    from lcc.recipe import Finetune, Progressive, Recipe
    from lcc.settings import Settings


class Stages:
    """The networks on the way to a converted one, each kept beside its directory: DIR.stage1 and so on."""

    def __init__(
        self,
        recipe: Recipe,
        text: str,
        directory: Path,
        settings: Settings,
        *,
        resume: bool,
        workers: int | None,
    ) -> None:
        assert recipe.progressive is not None
        assert recipe.finetune is not None
        self.progressive: Progressive = recipe.progressive
        self.finetune: Finetune = recipe.finetune
        self.calibrate = recipe.calibrate
        self.text, self.directory, self.settings = text, directory, settings
        self.resume, self.workers = resume, workers
        self.places = [
            directory.parent / f"{directory.name}.stage{number}"
            for number in range(1, self.progressive.stages)
        ]

    def check(self) -> None:
        """Make sure, before any long work, that they can be kept.

        Raises: ArtifactError: one can't be written. RecipeError: one is another recipe's.
        """
        for place in self.places:
            if not (self.resume and place.exists()):
                artifact.check_target(place, force=self.settings.force)
            elif (place / RECIPE).read_text(encoding="utf-8") != self.text:
                raise RecipeError(f"{place} is of another recipe; remove it, or take that recipe again")

    def convert(
        self, original: Network, rules: tuple[Rule, ...], teacher: Network | None
    ) -> tuple[tuple[Site, ...], Network]:
        """Return the sites of a network, and a copy converted as the rules say, part by part.

        Raises: what conversion and training raise.
        """
        sites = sites_of(original)
        plan = make_plan(sites, rules)
        *firsts, last = parts_of(plan, sites, self.progressive.stages)
        network = original
        for part, place in zip(firsts, self.places, strict=False):
            if self.resume and place.exists():
                network = self.settings.open(ModelPart(source=str(place)))
            else:
                network = self._next(network, part, place, teacher)
        network = self._converted(network, last, self.directory)
        return sites, network.but(plan=_with_reasons(network.plan, plan))

    def discard(self) -> None:
        """Remove them, when they are needed no more."""
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)

    def _converted(self, network: Network, part: tuple[Rule, ...], place: Path) -> Network:
        _, converted = convert_network(
            network, part, self.calibrate, self.settings, fits=fits_of(place), resume=self.resume
        )
        return converted

    def _next(
        self, network: Network, part: tuple[Rule, ...], place: Path, teacher: Network | None
    ) -> Network:
        """Return the network with one more part converted, trained and kept."""
        network = self._converted(network, part, place)
        options = self.finetune.model_copy(update={"epochs": self.progressive.epochs, "schedule": "constant"})
        network, result = train_network(
            network, options, teacher, place, self.settings, resume=self.resume, workers=self.workers
        )
        network = saved(network, place, self.settings, recipe=self.text)
        fit_store.discard(fits_of(place))
        shutil.rmtree(checkpoints_of(place), ignore_errors=True)
        self.settings.say(f"{place.name}: {len(network.plan.methods())} sites converted, {result.accuracy}")
        return network


def parts_of(plan: Plan, sites: tuple[Site, ...], count: int) -> tuple[tuple[Rule, ...], ...]:
    """Return the rules of so many stages, from the input to the output, each with about as many sites.

    What shares a kernel stays together, with its first site. Fewer stages, where there is less to convert.
    """
    order = {site.name: number for number, site in enumerate(sites)}
    units = [
        (unit, group.method)
        for group in plan.groups
        for unit in ([group.sites] if group.method.shares else [(name,) for name in group.sites])
    ]
    units.sort(key=lambda unit: order[unit[0][0]])
    count = min(count, len(units))
    later = Rule(match=("*",), reason="not yet")
    cuts = [round(len(units) * number / count) for number in range(count + 1)]
    return tuple(
        (*(Rule(match=names, method=method) for names, method in units[start:end]), later)
        for start, end in pairwise(cuts)
    )


def _with_reasons(done: Plan, decided: Plan) -> Plan:
    """Return a plan that was carried out in parts, with the reasons why the rest stays as it is."""
    reasons = {kept.site: kept.reason for kept in decided.kept}
    kept = tuple(
        Kept(site=one.site, reason=reasons.get(one.site, one.reason), kind=one.kind) for one in done.kept
    )
    return done.model_copy(update={"kept": kept})

"""A target in, rules out: what every option saves and harms is found out, and the least harm chosen.

What can't be met is refused before any work is done. What was found out is kept on disk, so that another
target for the same network and images costs seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lcc.budget import amount, check, frontier, meet, neighbours, parse_target
from lcc.candidates import options_for, worthwhile
from lcc.counts import count_macs, count_params
from lcc.error_table import with_errors
from lcc.errors import NothingToConvertError
from lcc.latency_table import Timing
from lcc.methods import METHODS
from lcc.network import sites_of
from lcc.plan import Rule
from lcc.plan_report import Part, PlanReport, Point, changes
from lcc.recipe import method_from_text
from lcc.specs import Cost
from lcc.whole_latency import Clock, rules_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.budget import Budgeted, Costs, Option, Target
    from lcc.error_table import ErrorTable
    from lcc.methods import Method
    from lcc.network import Network
    from lcc.plan import Site
    from lcc.recipe import Budget, Calibrate
    from lcc.settings import Settings

ROUNDS = 4  # of choosing, and measuring what was chosen
CLOSE = 0.02  # relative, of a latency to what was predicted: no further round
BENCH_ROUNDS = 10


class Planned(NamedTuple):
    """The rules that make the plan, and the report on it."""

    rules: tuple[Rule, ...]
    report: PlanReport


def plan_within(original: Network, budget: Budget, calibration: Calibrate, settings: Settings) -> Planned:
    """Return the plan with the least predicted harm that keeps a network within a budget.

    Raises: RecipeError: it can't be kept, with the least that can be reached. NothingToConvertError: it is
    kept already. DataError: the images. ArtifactError: the cache.
    """
    targets = tuple(map(parse_target, budget.targets))
    counted = tuple(target for target in targets if target.quantity != "latency")
    sites = sites_of(original)
    now = _costs(original)
    options = options_for(sites, _methods(budget), include=budget.include, exclude=budget.exclude)
    check(options, now, counted)
    clock = None
    if counted != targets:
        now, options, clock = _timed(original, sites, options, targets, budget, settings)
    if all(now[target.quantity] <= target.of(now) for target in targets):
        reached = ", ".join(amount(target.quantity, now[target.quantity]) for target in targets)
        raise NothingToConvertError(f"nothing to convert: the network has its targets already ({reached})")
    options = worthwhile(options, [target.quantity for target in targets])
    table = with_errors(original, sites, options, calibration, settings)
    found = _chosen(table.options, now, targets, clock)
    kept = Rule(match=("*",), reason=f"dense is worth more here, for {' and '.join(budget.targets)}")
    report = _report(original, sites, budget, found, table, now, clock)
    return Planned((*rules_of(found.taken), kept), report)


def _methods(budget: Budget) -> list[Method | type[Method]]:
    """Return what to choose from: what is named, else the families of all that is fitted in closed form.

    A method named without hyperparameters stands for its family.
    """
    if not budget.methods:
        return [kind for kind in METHODS.values() if not kind.fits_slowly]
    return [METHODS.get(text) or method_from_text(text) for text in dict.fromkeys(budget.methods)]


def _costs(network: Network) -> Costs:
    """Return what a network costs now; weights in bytes, buffers included."""
    model = network.loaded.model
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return {
        "params": count_params(model),
        "macs": count_macs(model, network.example).macs,
        "size": sum(stored.values()),
    }


def _timed(
    original: Network,
    sites: tuple[Site, ...],
    options: Sequence[Option],
    targets: Sequence[Target],
    budget: Budget,
    settings: Settings,
) -> tuple[Costs, list[Option], Clock]:
    """Return the costs with the network's latency, and the options that are faster, with what they save."""
    timing = Timing(
        runtime=budget.runtime,
        device="cuda" if settings.device.startswith("cuda") else "cpu",
        batch=budget.batch,
        threads=budget.threads,
        rounds=BENCH_ROUNDS,
    )
    clock = Clock(original, sites, timing)
    counted = [target.quantity for target in targets if target.quantity != "latency"]
    priced = clock.price(worthwhile(options, [*counted, "macs"]))
    now: Costs = {**_costs(original), "latency": clock.now_ms}
    check(clock.scaled(priced), now, targets)
    return now, priced, clock


def _chosen(
    options: Sequence[Option], now: Costs, targets: Sequence[Target], clock: Clock | None
) -> Budgeted:
    """Return the choice; where latency is a target, one that was measured, and made anew where it is off."""
    if clock is None:
        return meet(options, now, targets)
    priced = {(option.method, option.sites): option for option in options}
    for _ in range(ROUNDS):
        found = meet(clock.scaled(options), now, targets)
        measured = clock.measure([priced[option.method, option.sites] for option in found.taken])
        if abs(found.costs["latency"] - measured) <= CLOSE * measured:
            break
    return found


def _report(
    original: Network,
    sites: tuple[Site, ...],
    budget: Budget,
    found: Budgeted,
    table: ErrorTable,
    now: Costs,
    clock: Clock | None,
) -> PlanReport:
    options = table.options if clock is None else clock.scaled(table.options)
    first = parse_target(budget.targets[0]).quantity
    cheaper, dearer = neighbours(options, now, found, first)
    return PlanReport(
        source=str(original.loaded.source),
        random_weights=original.is_random,
        targets=budget.targets,
        now=now,
        then=found.costs,
        error=found.error,
        gap=found.gap,
        parts=tuple(_part(option, sites, table, clock) for option in found.taken),
        frontier=tuple(
            Point(costs=point.costs, error=point.error) for point in frontier(options, now, first)
        ),
        cheaper=None if cheaper is None else changes(found, cheaper, now, first),
        dearer=None if dearer is None else changes(found, dearer, now, first),
        compared=() if clock is None else tuple(clock.compared),
        noisy=clock is not None and clock.noisy,
        timing=None if clock is None else clock.conditions,
        cost=table.cost,
    )


def _part(option: Option, sites: tuple[Site, ...], table: ErrorTable, clock: Clock | None) -> Part:
    taken = [site for site in sites if site.name in option.sites]
    none = Cost(params=0, macs=0)
    return Part(
        method=option.method,
        sites=option.sites,
        shape=str(taken[0].spec),
        before=sum((site.cost() for site in taken), none),
        after=sum((site.cost_with(option.method, first=site is taken[0]) for site in taken), none),
        saved=option.saved,
        ms=None if clock is None else clock.alone_ms(option),
        error=option.error,
        relative_error=table.relative_errors[option.method, option.sites],
    )

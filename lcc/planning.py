"""A target in, rules out: the least harm within the budget is chosen and, where time counts, measured."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lcc import data
from lcc.batches import eval_batches
from lcc.budget import CLOSE, EXACT, Target, amount, eased, floor, frontier, meet, neighbours, parse_target
from lcc.candidates import rules_of
from lcc.comparison import measured_accuracy
from lcc.conversion import convert_network
from lcc.error_check import checked_errors, refuse_few_images
from lcc.errors import InfeasibleError, RecipeError
from lcc.evaluation import count_outputs
from lcc.plan import Rule, costs_of
from lcc.plan_report import Compared, Part, PlanReport, Point, changes
from lcc.plan_tables import Tables, not_tried, tables_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lcc.budget import Budgeted, Costs, Option, Quantity
    from lcc.data import Split
    from lcc.evaluation import Accuracy
    from lcc.network import Network
    from lcc.recipe import Budget, Calibrate
    from lcc.settings import Settings
    from lcc.whole_latency import Clock

ROUNDS = 4  # of choosing, and measuring what was chosen
TRIALS = 7  # networks converted and evaluated in search of the cheapest that loses little
NEAR = 0.005  # of what the network costs: where that search stops


class Planned(NamedTuple):
    """The rules that make the plan, and the report on it."""

    rules: tuple[Rule, ...]
    report: PlanReport


def plan_within(
    original: Network,
    budget: Budget,
    calibration: Calibrate,
    settings: Settings,
    *,
    check_errors: bool = False,
) -> Planned:
    """Return the plan with the least predicted harm that keeps a network within a budget.

    `check_errors`: take every option alone, and say how the errors rank beside those predicted.
    Raises: InfeasibleError: it can't be kept, with the least that can be reached. NothingToConvertError:
    it is kept already. SourceError: no classifier. DataError: the images. ArtifactError: the cache.
    RecipeError: methods, globs or device. CheckFailedError: latency in ONNX Runtime, and no ONNX file can
    be made.
    """
    if check_errors:
        refuse_few_images(calibration)
    targets = tuple(map(parse_target, budget.targets))
    judges = None if budget.data is None else _judges(original, budget.data, calibration, settings)
    try:
        tables = tables_for(original, budget, targets, calibration, settings)
    except InfeasibleError as error:
        raise InfeasibleError(f"{error}{not_tried(original, budget)}") from error
    if judges is None or budget.max_drop is None:
        found, drop = _chosen(tables, targets, settings), None
    else:
        before = measured_accuracy(original, judges, settings)
        lost = partial(_points_lost, original, before, tables.now, calibration, judges, settings)
        found, drop = _within_drop(tables, budget.minimise, budget.max_drop, lost)
    kept = Rule(match=("*",), reason=f"left as it is by the plan for {' and '.join(budget.wanted)}")
    report = _report(original, budget, targets, found, tables)
    if drop is not None:
        report = report.model_copy(update={"drop": drop})
    if check_errors:
        said = checked_errors(tables.starts, tables.sites, tables.options, calibration, settings)
        report = report.model_copy(update={"checked": said})
    return Planned((*rules_of(found.taken), kept), report)


def _chosen(tables: Tables, targets: Sequence[Target], settings: Settings) -> Budgeted:
    """Return the choice; where latency is known, one that was measured, and made anew where it is off.

    Raises: InfeasibleError: no choice does; or those measured turned out too slow.
    """
    clock, now = tables.clock, tables.now
    if clock is None:
        return meet(tables.options, now, targets)
    trials: list[_Trial] = []
    for _ in range(ROUNDS):
        try:
            options = clock.scaled(tables.options)
            found = meet(options, now, eased(options, now, targets))
        except InfeasibleError:  # by what was measured since; one of the trials may do
            if not trials:
                raise
            break
        trials.append(_measured(found, tables, clock))
        if abs(trials[-1].choice.costs["latency"] - found.costs["latency"]) <= CLOSE * found.costs["latency"]:
            break
        clock.learn(trials[-1].whole)
    fitting = [trial for trial in trials if _keeps(trial.choice, now, targets)]
    if not fitting:
        settings.say("note: what was chosen turned out slower than the target; trying the fastest there is")
        others = [target for target in targets if target.quantity != "latency"]
        trials.append(_measured(floor(tables.options, now, "latency", others), tables, clock))
        fitting = [trial for trial in trials[-1:] if _keeps(trial.choice, now, targets)]
    if not fitting:
        reached = amount("latency", min(trial.choice.costs["latency"] for trial in trials))
        raise InfeasibleError(
            f"satisfiable: no; the fastest network found takes {reached}, measured, of "
            f"{amount('latency', now['latency'])}, which misses the target"
        )
    best = min(fitting, key=lambda trial: trial.choice.harm)
    clock.choose(best.whole)
    return best.choice


class _Trial(NamedTuple):
    """A choice with the latency that its network has, and how that was predicted."""

    choice: Budgeted
    whole: Compared


def _measured(found: Budgeted, tables: Tables, clock: Clock) -> _Trial:
    priced = {(option.method, option.sites): option for option in tables.options}
    whole = clock.measure([priced[option.method, option.sites] for option in found.taken])
    return _Trial(found._replace(costs={**found.costs, "latency": whole.measured_ms}), whole)


def _keeps(found: Budgeted, now: Costs, targets: Sequence[Target]) -> bool:
    """Whether every target is kept; a latency but for what timing can't tell."""
    return all(
        found.costs[target.quantity]
        <= target.of(now) * (1 + (CLOSE if target.quantity == "latency" else EXACT))
        for target in targets
    )


def _judges(original: Network, text: str, calibration: Calibrate, settings: Settings) -> Split:
    """Return the images that tell what a plan loses. Raises: RecipeError: nothing that can be lost."""
    if original.is_random or original.has_new_head:
        raise RecipeError("--max-drop needs a trained network; weights here are random, or the last layer's")
    judges = data.open_eval(text)
    count_outputs(original.loaded.model, eval_batches(judges, original.loaded.preprocessing, batch_size=1))
    if judges.name == "test":
        settings.say(
            f"note: {text} has no val part, so its test images choose what is converted, and do not judge it "
            "fairly afterwards"
        )
    elif judges.name == data.ALL and text == calibration.data:
        settings.say(
            f"note: {text} has neither a val nor a test part, so images that the weights are fitted to are "
            "among those that judge: on others, more is lost"
        )
    return judges


def _within_drop(
    tables: Tables, quantity: Quantity, most: float, lost: Callable[[Budgeted], float]
) -> tuple[Budgeted, float]:
    """Return the cheapest choice that loses at most so many points right after conversion, and what it loses.

    Tries the floor, then halves the range above it; every choice is converted and evaluated once.
    Raises: InfeasibleError: no choice loses so little.
    """
    options, now = tables.in_company(), tables.now
    tried: dict[tuple[Rule, ...], tuple[Budgeted, float]] = {}

    def loses_little(found: Budgeted) -> bool:
        rules = rules_of(found.taken)
        if rules not in tried:
            tried[rules] = found, lost(found)
        return tried[rules][1] <= most + EXACT

    cheapest = floor(options, now, quantity)
    low, high = cheapest.costs[quantity] / now[quantity], 1.0
    if loses_little(cheapest):
        high = low
    while high - low > NEAR and len(tried) < TRIALS:
        middle = (low + high) / 2
        found = meet(options, now, (Target(quantity=quantity, share=middle),))
        if loses_little(found):
            high = found.costs[quantity] / now[quantity]
        else:
            low = middle
    fitting = [(found, drop) for found, drop in tried.values() if drop <= most + EXACT]
    if not fitting:
        nearest, drop = min(tried.values(), key=lambda one: (one[1], -one[0].costs[quantity]))
        share = nearest.costs[quantity] / now[quantity]
        raise InfeasibleError(
            f"satisfiable: no; {share:.1%} of the {quantity} loses {drop:.2f} points already, before "
            f"fine-tuning, more than {most:g}; allow more, or give a --target and fine-tune"
        )
    best = min(fitting, key=lambda one: one[0].costs[quantity])
    if tables.clock is None:
        return best
    trial = _measured(best[0], tables, tables.clock)
    taken = trial.choice.costs["latency"]
    if taken >= now["latency"]:
        raise InfeasibleError(
            f"satisfiable: no; the fastest network predicted that loses at most {most:g} points takes "
            f"{amount('latency', taken)}, measured, of {amount('latency', now['latency'])}: allow more"
        )
    tables.clock.choose(trial.whole)
    return trial.choice, best[1]


def _points_lost(
    original: Network,
    before: Accuracy,
    now: Costs,
    calibration: Calibrate,
    judges: Split,
    settings: Settings,
    found: Budgeted,
) -> float:
    """Return by how many points of top-1 a choice is worse than the original, right after conversion."""
    quiet = replace(settings, say=_nothing)
    with tempfile.TemporaryDirectory() as folder:
        _, converted = convert_network(original, rules_of(found.taken), calibration, quiet, fits=Path(folder))
    after = measured_accuracy(converted, judges, settings)
    costs = ", ".join(
        f"{cost / now[quantity]:.1%} of the {quantity}{', predicted' * (quantity == 'latency')}"
        for quantity, cost in found.costs.items()
    )
    settings.say(f"tried {costs}: {before} becomes {after}")
    return before.top1 - after.top1


def _nothing(_: str) -> None:
    """Say nothing: trials are not results."""


def _report(
    original: Network, budget: Budget, targets: Sequence[Target], found: Budgeted, tables: Tables
) -> PlanReport:
    options, now, clock = tables.in_company(), tables.now, tables.clock
    saved = {(option.method, option.sites): option.saved for option in options}
    by_error = [option.model_copy(update={"penalty": None}) for option in options]
    # What is shortest decides what the frontier is about.
    tight = max(targets, key=lambda t: found.costs[t.quantity] / max(t.of(now), 1e-9), default=None)
    first = budget.minimise if tight is None else tight.quantity
    others = [target for target in targets if target is not tight]
    cheaper, dearer = neighbours(options, now, found, first, others)
    order = {site.name: number for number, site in enumerate(tables.sites)}
    limits: Costs = {}
    for target in targets:
        limits[target.quantity] = min(target.of(now), limits.get(target.quantity, math.inf))
    return PlanReport(
        source=original.pedigree,
        random_weights=original.is_random,
        targets=budget.wanted,
        limits=limits,
        quantity=first,
        now=now,
        then=found.costs,
        error=found.error,
        keep=budget.keep,
        gap=found.gap,
        parts=tuple(
            _part(option.model_copy(update={"saved": saved[option.method, option.sites]}), tables)
            for option in sorted(found.taken, key=lambda option: order[option.sites[0]])
        ),
        frontier=tuple(
            Point(costs=point.costs if clock is None else clock.together(point.costs), error=point.error)
            for point in frontier(by_error, now, first, others)
        ),
        cheaper=None if cheaper is None else changes(found, cheaper, now, first),
        dearer=None if dearer is None else changes(found, dearer, now, first),
        compared=() if clock is None else clock.compared,
        noisy=clock is not None and clock.noisy,
        timing=None if clock is None else clock.conditions,
        cost=tables.errors.cost,
        uncounted=tables.uncounted,
    )


def _part(option: Option, tables: Tables) -> Part:
    taken = [site for site in tables.sites if site.name in option.sites]
    before, after = costs_of(taken, option.method)
    return Part(
        method=option.method,
        sites=option.sites,
        shape=str(taken[0].spec),
        before=before,
        after=after,
        saved=option.saved,
        alone=None if tables.clock is None else tables.clock.alone(option),
        error=option.error,
        relative_error=tables.errors.relative_errors[option.method, option.sites],
    )

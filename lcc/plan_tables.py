"""What a planner chooses from: the options, what each saves, and what it harms.

What can't be met is refused before the dear parts: the latencies, and then the errors. These are kept on
disk, so that another target for the same network and images costs seconds.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lcc import data, surgery
from lcc.banks import refuse_unsettled
from lcc.budget import amount, check, eased, floor
from lcc.candidates import obstacles, options_for, rules_of, worthwhile
from lcc.conversion import tried
from lcc.counts import count_bytes, count_macs, count_params
from lcc.error_table import Starts, with_errors
from lcc.errors import InfeasibleError, NothingToConvertError
from lcc.evaluation import pick_device
from lcc.grouping import group_for_
from lcc.latency_table import Timing
from lcc.method_text import method_from_text
from lcc.methods import METHODS
from lcc.network import sites_of
from lcc.plan import Rule, make_plan, refuse_idle_patterns
from lcc.sensitivity import refuse_no_classes
from lcc.whole_latency import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lcc.budget import Costs, Option, Quantity, Target
    from lcc.error_table import ErrorTable
    from lcc.methods import Method
    from lcc.network import Network
    from lcc.plan import Site
    from lcc.recipe import Budget, Calibrate
    from lcc.settings import Settings


class Tables(NamedTuple):
    """All that a choice is made from: `options` with what each saves alone, `now` what the network costs.

    `uncounted`: modules of which the MACs are not in that.
    """

    starts: Starts
    sites: tuple[Site, ...]
    now: Costs
    options: list[Option]
    errors: ErrorTable
    clock: Clock | None
    uncounted: tuple[str, ...]

    def in_company(self) -> list[Option]:
        """Return the options with the time that each saves in a whole network."""
        return self.options if self.clock is None else self.clock.scaled(self.options)


def tables_for(
    original: Network,
    budget: Budget,
    targets: tuple[Target, ...],
    calibration: Calibrate,
    settings: Settings,
) -> Tables:
    """Find out what there is to choose from.

    Raises: InfeasibleError: a target can't be kept, with the least that can be reached. RecipeError: the
    methods, globs or device. NothingToConvertError: all targets are kept already. SourceError: no classifier.
    DataError: the images. ArtifactError: the cache. CheckFailedError: latency in ONNX Runtime, and no ONNX
    file can be made.
    """
    quantities = [target.quantity for target in targets] or [budget.minimise]
    counted = [target for target in targets if target.quantity != "latency"]
    sites, (now, uncounted), clock = sites_of(original), _costs(original), None
    methods = _methods(budget)
    refuse_idle_patterns(sites, tuple(Rule(match=globs) for globs in (budget.include, budget.exclude)))
    options = options_for(sites, methods, include=budget.include, exclude=budget.exclude)
    options = _reached(original, sites, options, settings)
    idle = partial(obstacles, sites, methods, include=budget.include, exclude=budget.exclude)
    met = {target.quantity for target in counted if now[target.quantity] <= target.of(now)}
    stated = any(target.quantity == "latency" and target.limit is not None for target in targets)
    for quantity in quantities:
        if quantity == "latency" and (stated or len(met) < len(counted)):
            continue  # it may be met as it is, while another target is not
        if quantity not in met:
            _refuse_none(options, quantity, idle)
    check(options, now, counted)
    with torch.no_grad():
        refuse_no_classes(original.loaded.model(original.example))
    if "latency" in quantities:
        settings.check_bench_device()
        data.enough_images(calibration.data, calibration.images)
        clock = _clock(original, sites, budget, settings)
        if stated:
            _refuse_kept({**now, "latency": clock.time_original()}, targets)
        if len(met) == len(counted):
            _refuse_none(options, "latency", idle)
        options = _priced(clock, options, now, targets, settings)
        now = {**now, "latency": clock.now_ms}
    _refuse_kept(now, targets)
    options = worthwhile(options, quantities)
    pick_device(settings.device, doubles=True)  # errors that are kept need none
    starts = Starts(original, _grouped(original, sites, methods))
    errors = with_errors(starts, sites, options, calibration, settings)
    found = errors.options if budget.keep == "outputs" else _by_capacity(errors.options, now)
    return Tables(starts, sites, now, found, errors, clock, uncounted)


def _refuse_none(options: Sequence[Option], quantity: Quantity, idle: Callable[[], str]) -> None:
    """Raise InfeasibleError if nothing saves any of a quantity; `idle` says why."""
    if not worthwhile(options, ["macs" if quantity == "latency" else quantity]):
        raise InfeasibleError(f"satisfiable: no; the floor is 100% of the {quantity}: {idle()}")


def _refuse_kept(now: Costs, targets: Sequence[Target]) -> None:
    """Raise NothingToConvertError if the network has all its targets already."""
    if targets and all(now[target.quantity] <= target.of(now) for target in targets):
        reached = ", ".join(amount(target.quantity, now[target.quantity]) for target in targets)
        raise NothingToConvertError(f"nothing to convert: the network has its targets already ({reached})")


def _reached(
    original: Network, sites: tuple[Site, ...], options: list[Option], settings: Settings
) -> list[Option]:
    """Return the options that the network would call: not those which its code goes round."""
    some: list[Option] = []
    settled: set[str] = set()
    for option in options:
        if settled.isdisjoint(option.covers):
            some.append(option)
            settled.update(option.covers)
    if not some:
        return options
    model, taken = tried(original, sites, make_plan(sites, rules_of(some)))
    missed = surgery.not_reached(model, taken, original.example)
    for name in missed:
        settings.say(
            f"note: {name} stays dense: the network's code would go round what takes its place, as it holds "
            "it twice, such as in a list, or looks at its type"
        )
    return [option for option in options if not set(option.sites) & set(missed)]


def _priced(
    clock: Clock, options: Sequence[Option], counted: Costs, targets: tuple[Target, ...], settings: Settings
) -> list[Option]:
    """Return the options that are not slower than what they replace, with the time that each saves alone.

    `counted` is what the network costs without its latency. Raises: InfeasibleError: a target can't be kept.
    """
    also = [target.quantity for target in targets if target.quantity != "latency"]
    cheaper = worthwhile(options, [*also, "macs"])
    priced = clock.price(cheaper, settings.say)
    now, in_company = {**counted, "latency": clock.now_ms}, clock.scaled(priced)
    try:
        check(in_company, now, eased(in_company, now, targets))
    except InfeasibleError as error:
        left_out = _left_out(len(cheaper) - len(priced), len(cheaper))
        raise InfeasibleError(f"{error}{left_out}{_tried(clock)}") from error
    if not targets and floor(in_company, now, "latency").costs["latency"] >= clock.now_ms:
        raise InfeasibleError(
            "satisfiable: no; the floor is 100% of the latency: nothing that would save MACs was faster"
            + _tried(clock)
        )
    return priced


def _left_out(slower: int, count: int) -> str:
    if not slower:
        return ""
    return f"; {slower} of {count} options were left out, being slower here than what they replace"


def _tried(clock: Clock) -> str:
    """Return in words how a network did of which the layers are faster alone, but not together."""
    slower = next((one for one in clock.compared if one.measured_ms >= clock.now_ms > one.by_parts_ms), None)
    if slower is None:
        return ""
    reached, now = (amount("latency", ms) for ms in (slower.measured_ms, clock.now_ms))
    return f"; the network of all that is faster alone takes {reached} of {now}, measured"


def not_tried(original: Network, budget: Budget) -> str:
    """Return in words which methods that are fitted by training, and so left out, would save MACs."""
    sites = sites_of(original)
    globs = {"include": budget.include, "exclude": budget.exclude}
    slow = [] if budget.methods else [kind for kind in METHODS.values() if kind.fits_slowly]
    able = [
        kind.model_fields["name"].default
        for kind in slow
        if worthwhile(options_for(sites, [kind], **globs), ["macs"])
    ]
    fast = [kind.model_fields["name"].default for kind in METHODS.values() if not kind.fits_slowly]
    named = " ".join(f"--method {name}" for name in (*fast, *able))
    if not able:
        return ""
    return f"; not tried, since fitted by training: {', '.join(able)}; add {named} (a recipe: budget.methods)"


def _by_capacity(options: Sequence[Option], now: Costs) -> list[Option]:
    """Return options whose harm is the share of the parameters that they take; errors decide between equals.

    To learn in fine-tuning what it lost, a network needs parameters.
    """
    return [
        option.model_copy(update={"penalty": max(option.saved["params"], 0.0) / now["params"]})
        for option in options
    ]


def _grouped(original: Network, sites: tuple[Site, ...], methods: Sequence[Method | type[Method]]) -> Network:
    """Return the network with its inner channels in the order that suits all options on average.

    Those, too, that globs or targets leave out: the order, and the errors with it, are the same without them.
    """
    if original.is_random:
        return original
    able: dict[str, list[Method]] = {}
    for option in options_for(sites, methods):
        if not option.method.shares:
            able.setdefault(option.sites[0], []).append(option.method)
    model = copy.deepcopy(original.loaded.model)
    moved = group_for_(model, sites, able, original.example).orders
    return original.but(loaded=replace(original.loaded, model=model)) if moved else original


def _methods(budget: Budget) -> list[Method | type[Method]]:
    """Return what to choose from: what is named, else the families of all that is fitted in closed form.

    A method named without hyperparameters stands for its family. Raises: RecipeError: banks that a planner
    can't price.
    """
    if not budget.methods:
        return [kind for kind in METHODS.values() if not kind.fits_slowly]
    named = [METHODS.get(text) or method_from_text(text) for text in dict.fromkeys(budget.methods)]
    refuse_unsettled(named)
    return named


def _costs(network: Network) -> tuple[Costs, tuple[str, ...]]:
    """Return what a network costs now, and what of it is not counted; weights in bytes, buffers included."""
    model, count = network.loaded.model, count_macs(network.loaded.model, network.example)
    costs: Costs = {"params": count_params(model), "macs": count.macs, "size": count_bytes(model)}
    return costs, count.missing


def _clock(original: Network, sites: tuple[Site, ...], budget: Budget, settings: Settings) -> Clock:
    timing = Timing(
        runtime=budget.runtime,
        device=settings.bench_device,
        batch=budget.batch,
        threads=budget.threads,
    )
    return Clock(original, sites, timing)

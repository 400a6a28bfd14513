"""Choices that meet a budget with the least harm, by integer programming.

Pure: in goes what every option saves and harms, out come those to take. HiGHS solves it, through scipy.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lcc.errors import InfeasibleError, RecipeError
from lcc.methods import AnyMethod
from lcc.specs import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

Quantity = Literal["params", "macs", "size", "latency"]
Costs = dict[Quantity, float]


class Unit(NamedTuple):
    """What a quantity is called, what its amounts may be given in, and an example."""

    noun: str
    factors: dict[str, float]
    example: str


COUNTS = {"k": 1e3, "M": 1e6, "G": 1e9}
UNITS: dict[Quantity, Unit] = {
    "params": Unit("parameters", COUNTS, "params=1.2M"),
    "macs": Unit("MACs", COUNTS, "macs=300M"),
    "size": Unit("of weights", {"kB": 1e3, "MB": 1e6, "GB": 1e9}, "size=5MB"),
    "latency": Unit("a run", {"us": 1e-3, "ms": 1.0, "s": 1e3}, "latency=8ms"),
}
AMOUNT = re.compile(r"(?P<minus>-?)(?P<number>\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*(?P<unit>%|[a-zA-Z]*)")
GAP = 1e-6  # of the least error: where the search stops
SECONDS = 20.0  # or after that long
EXACT = 1e-9  # relative, of a cost that is just a limit
CLOSE = 0.02  # relative, of a latency: what timing can't tell
TRIES = 100  # choices over a limit by HiGHS's tolerance, before there is said to be none


class Option(Frozen):
    """A method, the sites that it takes together, what that saves and how much it harms.

    `covers`: the sites that are settled with it: those that it takes, and those inside them.
    `saved` may be negative. `error`: the predicted divergence of the network's output, in nats. `penalty`:
    what the sum to be made small has of it; None: the error.
    """

    method: AnyMethod
    sites: tuple[str, ...]
    covers: tuple[str, ...]
    saved: dict[Quantity, float]
    error: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    penalty: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @property
    def harm(self) -> float:
        """What is to be made small."""
        return self.error if self.penalty is None else self.penalty


class Target(Frozen):
    """What a network may cost at most: `share` of what it costs now, or `limit`; `text`: as it was said."""

    quantity: Quantity
    share: float | None = None
    limit: float | None = None
    text: str = ""

    def of(self, now: Mapping[Quantity, float]) -> float:
        """Return the limit for a network that costs `now`."""
        if self.share is not None:
            return self.share * now[self.quantity]
        return self.limit or 0.0


class Budgeted(NamedTuple):
    """The options to take, what the network then costs, and the sums of the predicted errors and of the harm.

    `gap`: how far the harm may be above the least possible, relative; None: it was not made small.
    """

    taken: tuple[Option, ...]
    costs: Costs
    error: float
    harm: float
    gap: float | None


def amount(quantity: Quantity, value: float) -> str:
    """Return an amount with its unit, such as 1.2M parameters, 5 MB of weights, 8.1 ms a run."""
    noun, factors, _ = UNITS[quantity]
    fitting = [(factor, unit) for unit, factor in factors.items() if value >= factor]
    factor, unit = max(fitting, default=(1.0, ""))
    space = " " if quantity in ("size", "latency") else ""
    return f"{value / factor:.4g}{space}{unit} {noun}"


def parse_target(text: str) -> Target:
    """Return what `macs=50%` (what remains), `latency=-40%` (the change) or `size=5MB` (an amount) means.

    Counts from 1000 on need no unit. Raises: RecipeError: it is none of these, or no budget.
    """
    name, _, wanted = (part.strip() for part in text.partition("="))
    quantity = next((known for known in UNITS if known == name), None)
    if quantity is None:
        raise RecipeError(f"{text}: {name!r} is none of {', '.join(UNITS)}; try macs=50%")
    match, unit = AMOUNT.fullmatch(wanted), UNITS[quantity]
    number = 0.0 if match is None else float(match["number"])
    match = match if math.isfinite(number) else None
    factors = {known.lower(): factor for known, factor in unit.factors.items()}
    if unit.factors is COUNTS and number >= COUNTS["k"]:  # less may be meant as a share
        factors[""] = 1.0
    if match is None or (match["unit"] != "%" and (match["minus"] or match["unit"].lower() not in factors)):
        raise RecipeError(
            f"{text}: write {name}=50% to keep half, {name}=-40% to cut 40 %, or an amount such as "
            f"{unit.example} (units: {', '.join(unit.factors)})"
        )
    if match["unit"] != "%":
        return Target(quantity=quantity, limit=number * factors[match["unit"].lower()], text=text)
    share = (100 - number if match["minus"] else number) / 100
    if not 0 < share < 1:
        raise RecipeError(f"{text}: {share:.0%} of what it costs now is no budget; try {name}=50%")
    return Target(quantity=quantity, share=share, text=text)


def meet(options: Sequence[Option], now: Costs, targets: Sequence[Target]) -> Budgeted:
    """Return the options with the least summed harm that bring what costs `now` within every target.

    Raises: InfeasibleError: none do; with the least that can be reached, and how.
    """
    check(options, now, targets)
    found = _least_harm(options, now, _limits(targets, now))
    if found is None:
        raise InfeasibleError(
            "the targets can be met, but no plan that meets them was found in time; relax one a little"
        )
    return found


def check(options: Sequence[Option], now: Costs, targets: Sequence[Target]) -> None:
    """Raise InfeasibleError if the targets can't be reached by any choice; harm plays no part."""
    for target in targets:
        quantity, limit = target.quantity, target.of(now)
        least = floor(options, now, quantity)
        if least.costs[quantity] > limit * (1 + EXACT):
            total, lowest = now[quantity], least.costs[quantity]
            reached = f"{amount(quantity, lowest)} of {amount(quantity, total)}"
            raise InfeasibleError(
                f"satisfiable: no; the floor is {lowest / total:.1%} of the {quantity} ({reached}), "
                f"{_by(least.taken)}; the target is {limit / total:.1%}"
            )
    if targets and _search(options, now, _limits(targets, now), least=targets[0].quantity) is None:
        every = " and ".join(target.text for target in targets)
        raise InfeasibleError(f"satisfiable: no; each target alone is, but not {every} at once")


def eased(options: Sequence[Option], now: Costs, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Return the targets, a latency that is missed by less than timing can tell raised to the least there is.

    That is the latency of the fastest choice that keeps the other targets.
    """
    others = [target for target in targets if target.quantity != "latency"]
    if len(others) == len(targets):
        return tuple(targets)
    least = floor(options, now, "latency", others).costs["latency"]
    if least == now["latency"]:  # nothing is faster
        return tuple(targets)
    return tuple(
        target.model_copy(update={"share": None, "limit": least})
        if target.quantity == "latency" and target.of(now) < least <= target.of(now) * (1 + CLOSE)
        else target
        for target in targets
    )


def floor(
    options: Sequence[Option], now: Costs, quantity: Quantity, others: Sequence[Target] = ()
) -> Budgeted:
    """Return the choice that costs least, of those that keep the `others` among the targets, if any does."""
    found = _search(options, now, _limits(others, now), least=quantity)
    return (found or Budgeted((), dict(now), 0.0, 0.0, 0.0))._replace(gap=None)


def frontier(
    options: Sequence[Option],
    now: Costs,
    quantity: Quantity,
    others: Sequence[Target] = (),
    *,
    points: int = 9,
) -> tuple[Budgeted, ...]:
    """Return the best choices at evenly spaced budgets from the floor up to what the network costs now.

    All keep the `others` among the targets; each is there once.
    """
    kept = _limits(others, now)
    least = _search(options, now, kept, least=quantity)
    if least is None:
        return ()
    limits = np.linspace(least.costs[quantity], now[quantity], points)
    found = (_least_harm(options, now, [*kept, (quantity, float(limit))]) for limit in limits)
    choices = [entry for entry in found if entry is not None]
    distinct = {tuple((one.method, one.sites) for one in choice.taken): choice for choice in choices}
    return tuple(distinct.values())


def neighbours(
    options: Sequence[Option],
    now: Costs,
    found: Budgeted,
    quantity: Quantity,
    others: Sequence[Target] = (),
) -> tuple[Budgeted | None, Budgeted | None]:
    """Return the next cheaper choice, and the next dearer one with less harm; None: there is none.

    Both keep the `others` among the targets.
    """
    kept = _limits(others, now)
    step = now[quantity] * 1e-4
    cheaper = _least_harm(options, now, [*kept, (quantity, found.costs[quantity] - step)])
    if not found.taken or found.harm == 0:
        return cheaper, None
    return cheaper, _search(options, now, kept, least=quantity, most_harm=found.harm * (1 - 1e-3))


def _limits(targets: Sequence[Target], now: Costs) -> list[tuple[Quantity, float]]:
    return [(target.quantity, target.of(now)) for target in targets]


def _by(taken: Sequence[Option]) -> str:
    """Return in words which methods make a choice cheap."""
    counts: Counter[str] = Counter()
    for option in taken:
        counts[str(option.method)] += len(option.sites)
    if not counts:
        return "since nothing that was tried makes any of it cheaper"
    named = [f"{method} on {count} site{'s' * (count > 1)}" for method, count in counts.most_common(2)]
    more = f" and {len(counts) - 2} more method{'s' * (len(counts) > 3)}" if len(counts) > 2 else ""
    return f"by {', '.join(named)}{more}"


def _least_harm(
    options: Sequence[Option], now: Costs, limits: Sequence[tuple[Quantity, float]]
) -> Budgeted | None:
    """Return the choice with the least harm within limits, of equals the one of least error; None: none."""
    found = _search(options, now, limits)
    if found is None:
        return None
    fitting = [option for option in options if option.harm <= found.harm]
    found = _search(fitting, now, limits) or found
    if all(option.penalty is None for option in fitting):
        return found
    gap = found.gap  # of the harm: what the search is about
    for _ in range(2):  # as for the harm, the error found first is the unit of the second search
        equal = _search(fitting, now, limits, least="error", most_harm=found.harm * (1 + GAP))
        if equal is None:
            break
        found = equal._replace(gap=gap)
        fitting = [option for option in fitting if option.error <= equal.error]
    return found


def _search(
    options: Sequence[Option],
    now: Costs,
    limits: Sequence[tuple[Quantity, float]],
    *,
    least: Quantity | Literal["harm", "error"] = "harm",
    most_harm: float | None = None,
) -> Budgeted | None:
    """Return the choice with the least harm, error or cost, within limits; None: there is none.

    HiGHS's tolerances are absolute, of what is counted here in units of the largest that an option has: so it
    can be asked again with the options that have no more than all of what was found. What it finds over a
    limit, by a tolerance, is forbidden and searched anew.
    """
    if most_harm is not None:
        options = [option for option in options if option.harm <= most_harm]
    if not options:
        fits = all(now[quantity] <= limit for quantity, limit in limits)
        return Budgeted((), dict(now), 0.0, 0.0, 0.0) if fits else None
    constraints = [LinearConstraint(_conflicts(options), -np.inf, 1)]
    for quantity, limit in limits:
        saved, needed = _saved(options, quantity), now[quantity] - limit
        constraints.append(LinearConstraint(saved[None] / now[quantity], needed / now[quantity], np.inf))
    harms = np.array([option.harm for option in options])
    if most_harm is not None:
        scale = most_harm or 1.0
        constraints.append(LinearConstraint(harms[None] / scale, -np.inf, most_harm / scale))
    if least == "harm":
        objective = harms / (harms.max() or 1.0)
    elif least == "error":
        errors = np.array([option.error for option in options])
        objective = errors / (errors.max() or 1.0)
    else:
        objective = -_saved(options, least) / now[least]
    for _ in range(TRIES):
        with silent_stdout():
            result = milp(
                objective,
                integrality=np.ones(len(options)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": GAP, "time_limit": SECONDS},
            )
        if result.x is None:
            return None
        chosen = result.x > 0.5  # 0 or 1
        taken = tuple(option for option, is_in in zip(options, chosen, strict=True) if is_in)
        costs: Costs = {
            quantity: total - sum(option.saved[quantity] for option in taken)
            for quantity, total in now.items()
        }
        if all(costs[quantity] <= limit * (1 + EXACT) for quantity, limit in limits):
            error, harm = sum(option.error for option in taken), sum(option.harm for option in taken)
            return Budgeted(taken, costs, error, harm, float(result.mip_gap or 0.0))
        constraints.append(LinearConstraint(np.where(chosen, 1, -1)[None], -np.inf, chosen.sum() - 1))
    return None


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Keep what a C library writes to the standard output, as HiGHS does now and then, from what lcc says."""
    if sys.stdout is None:  # closed
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what is in C's own buffer
        os.dup2(kept, 1)
        os.close(kept)


def _saved(options: Sequence[Option], quantity: Quantity) -> NDArray[np.float64]:
    return np.array([option.saved[quantity] for option in options], dtype=float)


def _conflicts(options: Sequence[Option]) -> csr_array:
    """Return a row for every site: which options settle it, of which one at most can be taken."""
    sites = {site: row for row, site in enumerate(dict.fromkeys(s for o in options for s in o.covers))}
    entries = [(sites[site], column) for column, option in enumerate(options) for site in option.covers]
    rows, columns = zip(*entries, strict=True)
    return csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(sites), len(options)))

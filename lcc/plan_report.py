"""What a planner chose for a target, why, and what else could be had; as a table, and as rules to edit."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Literal

from lcc.budget import Costs, Quantity, amount
from lcc.methods import AnyMethod
from lcc.specs import Cost, Frozen
from lcc.tables import GOOD, NOISE, QUIET, UNKNOWN, Cell, Sheet, change, ms, not_counted, si

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lcc.budget import Budgeted, Option
    from lcc.plan import Rule

SHOWN = 4  # differences between two choices
CERTAIN = 1e-5


class Compared(Frozen):
    """A whole network: what its layers' own times predict, the same scaled, and what was measured."""

    by_parts_ms: float
    predicted_ms: float
    measured_ms: float


class Alone(Frozen):
    """What an option's sites take outside of the network, the median in ms; `noisy`: one was not steady."""

    before_ms: float
    after_ms: float
    noisy: bool


class Part(Frozen):
    """An option that was chosen; `saved` of the network, `alone`: where latency counts and it changes any."""

    method: AnyMethod
    sites: tuple[str, ...]
    shape: str
    before: Cost
    after: Cost
    saved: Costs
    alone: Alone | None = None
    error: float
    relative_error: float


class Point(Frozen):
    """A budget, and the least predicted error that can be had for it, whatever else is kept."""

    costs: Costs
    error: float


class PlanReport(Frozen):
    """A choice: costs `now` and `then`, `limits` of those asked for, and the predicted error in nats.

    `gap`: how far above the least possible the harm may be; None: what costs least was taken.
    `cheaper` and `dearer`: what the nearest other choices change. `compared`: whole networks that were timed,
    the chosen one last. `quantity` is what the frontier is about; `drop`: points of accuracy lost.
    `uncounted`: modules of which the MACs are not in the costs.
    """

    source: str
    random_weights: bool
    targets: tuple[str, ...]
    quantity: Quantity
    limits: Costs
    now: Costs
    then: Costs
    error: float
    keep: Literal["outputs", "capacity"]
    gap: float | None
    parts: tuple[Part, ...]
    frontier: tuple[Point, ...]
    cheaper: str | None
    dearer: str | None
    compared: tuple[Compared, ...] = ()
    drop: float | None = None
    noisy: bool = False
    timing: str | None = None
    cost: str
    checked: str | None = None
    uncounted: tuple[str, ...] = ()


def changes(found: Budgeted, other: Budgeted, now: Costs, quantity: Quantity) -> str:
    """Return in words what another choice changes, and what that costs and saves."""
    before, after = _by_site(found.taken), _by_site(other.taken)
    different = [
        site
        for site in (*before, *(s for s in after if s not in before))
        if before.get(site) != after.get(site)
    ]
    named = [
        f"{site} {before.get(site, 'dense')} to {after.get(site, 'dense')}" for site in different[:SHOWN]
    ]
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    shown: list[Quantity] = [quantity]
    if quantity != "params" and any(option.penalty is not None for option in (*found.taken, *other.taken)):
        shown.append("params")  # of which a plan for capacity keeps the most
    costs = ", ".join(f"{other.costs[each] / now[each]:.1%} of the {each}" for each in shown)
    return f"{costs}, error {other.error:.3g}: {', '.join(named)}{more}"


def plan_sheets(report: PlanReport) -> list[Sheet]:
    """Return the choice and the frontier as tables."""
    return [_plan_sheet(report), _frontier_sheet(report)]


def plan_line(report: PlanReport) -> str:
    """Return the choice in a line."""
    costs = ", ".join(f"{after / report.now[q]:.1%} of the {q}" for q, after in report.then.items())
    converted = sum(len(part.sites) for part in report.parts)
    return (
        f"planned for {' and '.join(report.targets)}: {converted} sites converted, {costs}, "
        f"predicted error {report.error:.3g} nats" + "".join(f"; {note}" for note in _over(report))
    )


def rules_text(rules: Sequence[Rule], report: PlanReport) -> str:
    """Return rules as TOML, to be edited, passed back with --plan, or put into a recipe."""
    errors = {site: part.error for part in report.parts for site in part.sites}
    lines = [
        f"# {report.source}: {' and '.join(report.targets)}; predicted error {report.error:.3g}",
        "# The first entry that matches a site decides it; no method keeps it dense.",
    ]
    for rule in rules:
        lines += ["", "[[convert]]"]
        if rule.match == ("*",):
            lines.append('match = ["*"]')
        else:
            lines.append("match = [")
            lines += [f"    {json.dumps(site)},  # error {errors[site]:.2g}" for site in rule.match]
            lines.append("]")
        if rule.method is not None:
            lines.append(f"method = {_inline(rule.method.model_dump(mode='json', exclude_none=True))}")
        if rule.reason is not None:
            lines.append(f"reason = {json.dumps(rule.reason)}")
    return "\n".join(lines) + "\n"


def _inline(value: object) -> str:
    """Return plain data as a TOML value in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(part)}" for key, part in value.items()) + " }"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, as TOML has it and JSON does not
    return json.dumps(value)


def _by_site(taken: Sequence[Option]) -> dict[str, str]:
    return {site: str(option.method) for option in taken for site in option.sites}


def _plan_sheet(report: PlanReport) -> Sheet:
    headers = ["site", "shape", "becomes", "params", "MACs"]
    timed = any(part.alone for part in report.parts)
    headers += ["ms alone"] if timed else []
    headers += ["of the saving", "error", "of the error"]
    quantity = report.quantity
    saving = report.now[quantity] - report.then[quantity]
    rows = []
    for part in report.parts:
        cells = [
            Cell(
                part.sites[0] if len(part.sites) == 1 else f"{part.sites[0]} and {len(part.sites) - 1} more"
            ),
            Cell(part.shape),
            Cell(str(part.method), GOOD),
            Cell(change(si(part.before.params), si(part.after.params))),
            Cell(change(si(part.before.macs), si(part.after.macs))),
        ]
        if timed:
            cells.append(_alone(part))
        cells += [
            Cell(f"{part.saved[quantity] / saving:.1%}" if saving else UNKNOWN),
            Cell(f"{part.error:.3g}"),
            Cell(f"{part.error / report.error:.1%}" if report.error else UNKNOWN),
        ]
        rows.append(tuple(cells))
    random = " (RANDOM WEIGHTS)" if report.random_weights else ""
    return Sheet(
        title=f"{report.source}{random}: {' and '.join(report.targets)}",
        headers=tuple(headers),
        rows=tuple(rows),
        notes=tuple(_notes(report)),
        left=(0, 1, 2),
    )


def _alone(part: Part) -> Cell:
    if (alone := part.alone) is None:
        return Cell(UNKNOWN)
    return Cell("~" * alone.noisy + change(ms(alone.before_ms, 2), ms(alone.after_ms, 2)))


def _notes(report: PlanReport) -> Iterator[str]:
    for quantity, total in report.now.items():
        after = report.then[quantity]
        yield f"{amount(quantity, total)} becomes {amount(quantity, after)}, {after / total:.1%}"
    if report.uncounted:
        yield not_counted(report.uncounted)
    if report.gap is None:
        aim = "whatever is cheapest"
    else:
        least = "the least possible" if report.gap < CERTAIN else f"at most {report.gap:.1g} above the least"
        least += " by the times predicted" if report.compared else ""
        aim = {"outputs": least, "capacity": f"parameters kept first, {least} loss of them"}[report.keep]
    yield f"predicted error {report.error:.3g} nats (divergence of the outputs), {aim}; the rest stays dense"
    if report.parts and report.error == 0:
        yield "the outputs do not depend on these sites (zeros behind them?): any choice is as good"
    if report.drop is not None:
        what = "gained" if report.drop < 0 else "lost"
        yield f"{abs(report.drop):.2f} points {what} right after conversion, before fine-tuning"
    yield from _over(report)
    for number, found in enumerate(report.compared, 1):
        name = "the chosen network" if number == len(report.compared) else "a network timed on the way"
        off = found.predicted_ms / found.measured_ms - 1
        yield (
            f"{name}: {ms(found.measured_ms)} ms measured, {ms(found.predicted_ms)} predicted ({off:+.1%}), "
            f"{ms(found.by_parts_ms)} as the sum of its layers, each timed alone"
        )
    if report.timing:
        yield f"latency: {report.timing}" + (" (~ noisy machine)" if report.noisy else "")
    if any(part.alone is not None and part.alone.noisy for part in report.parts):
        yield f"~ {NOISE}"
    yield f"next cheaper: {report.cheaper or 'none within the targets'}"
    yield f"next dearer: {report.dearer or 'none within the targets'}"
    yield report.cost
    if report.checked is not None:
        yield report.checked


def _over(report: PlanReport) -> Iterator[str]:
    over = report.then.get("latency", 0.0) / report.limits.get("latency", float("inf")) - 1
    if over > 0:
        yield f"the latency is {over:.1%} over its target, which is within what timing can tell"


def _frontier_sheet(report: PlanReport) -> Sheet:
    quantity = report.quantity
    also = [each for each in report.now if each != quantity and each in report.limits]
    return Sheet(
        title="frontier",
        headers=(f"{quantity}, of now", quantity, *also, "predicted error"),
        rows=tuple(
            (
                Cell(f"{point.costs[quantity] / report.now[quantity]:.1%}"),
                Cell(amount(quantity, point.costs[quantity]), QUIET),
                *(Cell(f"{point.costs[each] / report.now[each]:.1%}") for each in also),
                Cell(f"{point.error:.3g}"),
            )
            for point in report.frontier
        ),
        left=(),
    )

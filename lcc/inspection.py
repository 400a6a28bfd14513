"""What `lcc inspect` and `lcc convert --dry-run` show: every convolution, and what could be gained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcc.plan import Site
from lcc.specs import Cost, Frozen
from lcc.tables import BAD, GOOD, QUIET, TIMES, UNKNOWN, Cell, Sheet, change, ms, si

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lcc.measure import Bench
    from lcc.methods import Method
    from lcc.plan import Plan
    from lcc.timing import Latency, Speedup


class SiteRow(Frozen):
    """A site, its cost in the network as it is, and what a method would make of it.

    `after` is None, and `reason` says in words why, where it stays dense.
    """

    site: Site
    before: Cost
    after: Cost | None
    reason: str | None
    method: str | None


class Inspection(Frozen):
    """Every site, and totals: of the network, and of the network if all that can be converted is."""

    source: str
    random_weights: bool
    image_size: tuple[int, int]
    rows: tuple[SiteRow, ...]
    before: Cost
    after: Cost
    planned: bool = False
    uncounted: tuple[str, ...] = ()

    @property
    def addressable(self) -> Cost:
        """Cost of the sites that can be converted, as they are."""
        return sum((row.before for row in self.rows if row.after is not None), Cost(params=0, macs=0))


def inspection(
    source: str,
    *,
    random_weights: bool,
    image_size: tuple[int, int],
    total: Cost,
    sites: tuple[Site, ...],
    method: Method,
    plan: Plan | None = None,
    done: Mapping[str, Method] | None = None,
    uncounted: tuple[str, ...] = (),
) -> Inspection:
    """Return what `method` could do for each site; with `plan`, what it decides instead.

    `done` says what made the operators that the network has already, by site.
    """
    rows = tuple(_row(site, method, plan, done or {}) for site in sites)
    saved = [(row.before, row.after) for row in rows if row.after is not None]
    after = Cost(
        params=total.params - sum(b.params - a.params for b, a in saved),
        macs=total.macs - sum(b.macs - a.macs for b, a in saved),
    )
    return Inspection(
        source=source,
        random_weights=random_weights,
        image_size=image_size,
        rows=rows,
        before=total,
        after=after,
        planned=plan is not None,
        uncounted=uncounted,
    )


def inspection_sheet(value: Inspection) -> Sheet:
    """Return the inspection as a table."""
    height, width = value.image_size
    return Sheet(
        title=f"{value.source}, {height}x{width}" + (" (RANDOM WEIGHTS)" if value.random_weights else ""),
        headers=("site", "shape", "at", "params", "MACs", "of MACs", "becomes"),
        rows=tuple(_cells(row, value.before) for row in value.rows),
        notes=tuple(_totals(value)),
        left=(0, 1, 6),
    )


def methods_sheet(methods: Mapping[str, type[Method]]) -> Sheet:
    """Return the table of methods."""
    return Sheet(
        title="methods",
        headers=("method", "hyperparameters", "formula", "paper"),
        rows=tuple(
            (
                Cell(name, GOOD),
                Cell(", ".join(f"{k}={v.default}" for k, v in kind.model_fields.items() if k != "name")),
                Cell(kind.formula),
                Cell(kind.paper, QUIET),
            )
            for name, kind in methods.items()
        ),
        notes=tuple(
            f"{name}.{key}: {field.description}"
            for name, kind in methods.items()
            for key, field in kind.model_fields.items()
            if key != "name"
        ),
        left=(0, 1, 2, 3),
    )


def bench_sheet(bench: Bench) -> Sheet:
    """Return latencies side by side."""
    return Sheet(
        title=bench.conditions.runtime,
        headers=("network", "median ms", "p10 to p90", "speed-up", "p10 to p90"),
        rows=tuple(
            _bench_cells(name, latency, bench.speedups.get(name)) for name, latency in bench.latencies.items()
        ),
        notes=(str(bench.conditions),),
    )


def _bench_cells(name: str, latency: Latency, speedup: Speedup | None) -> tuple[Cell, ...]:
    noisy = "~ " if latency.noisy else ""
    cells = (
        Cell(name),
        Cell(f"{noisy}{ms(latency.median_ms)}"),
        Cell(f"{ms(latency.p10_ms)} to {ms(latency.p90_ms)}", QUIET),
    )
    if speedup is None:
        return (*cells, Cell("baseline", QUIET), Cell(""))
    style = GOOD if speedup.median >= 1 else BAD
    return (
        *cells,
        Cell(f"{speedup.median:.2f}{TIMES}", style),
        Cell(f"{speedup.p10:.2f} to {speedup.p90:.2f}{TIMES}", QUIET),
    )


def _row(site: Site, method: Method, plan: Plan | None, done: Mapping[str, Method]) -> SiteRow:
    if plan is None:
        chosen, reason = (None, why) if (why := site.why_not(method)) else (method, None)
    else:
        chosen = plan.methods().get(site.name)
        reason = next((kept.reason for kept in plan.kept if kept.site == site.name), None)
    after = None if chosen is None else site.cost_with(chosen)
    return SiteRow(
        site=site,
        before=site.cost_with(done[site.name]) if site.name in done and site.sizes else site.cost(),
        after=after,
        reason=reason,
        method=None if chosen is None else str(chosen),
    )


def _cells(row: SiteRow, total: Cost) -> tuple[Cell, ...]:
    site = row.site
    share = Cell(f"{row.before.macs / total.macs:.1%}" if total.macs else UNKNOWN)
    if row.after is None:
        outcome = Cell(f"dense: {row.reason}", QUIET)
        costs = (Cell(si(row.before.params)), Cell(si(row.before.macs)))
    else:
        outcome = Cell(row.method or "", GOOD)
        costs = (
            Cell(change(si(row.before.params), si(row.after.params))),
            Cell(change(si(row.before.macs), si(row.after.macs))),
        )
    calls = f" {TIMES}{len(site.sizes)}" if len(site.sizes) > 1 else ""
    size = Cell(f"{site.sizes[0]}{calls}" if site.sizes else UNKNOWN)
    return (Cell(site.name), Cell(str(site.spec)), size, *costs, share, outcome)


def _totals(value: Inspection) -> list[str]:
    part, before, after = value.addressable, value.before, value.after
    count = sum(row.after is not None for row in value.rows)
    lines = [f"{count} of {len(value.rows)} convolutions {'would' if value.planned else 'can'} be converted"]
    word = "chosen" if value.planned else "addressable"
    if count:
        lines += [
            f"{word}: {part.params / before.params:.0%} of {before.params:,} parameters",
            f"{word}: {part.macs / before.macs:.0%} of {before.macs:,} MACs ({2 * before.macs:,} FLOPs)",
            f"all converted: {after.params:,} parameters, {before.params / after.params:.2f}{TIMES} fewer",
            f"all converted: {after.macs:,} MACs, {before.macs / after.macs:.2f}{TIMES} fewer",
            "fewer MACs are not yet less time: `lcc report` measures that",
        ]
    if value.uncounted:
        lines.append(f"MACs of {', '.join(value.uncounted)} are not counted")
    return lines

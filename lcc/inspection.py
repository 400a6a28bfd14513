"""What `lcc inspect` and `lcc convert --dry-run` show: every site, and what could be gained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcc.plan import NOUNS, Plan, Site, decide, rules_for
from lcc.specs import Cost, Frozen, SiteKind
from lcc.tables import BAD, GOOD, QUIET, TIMES, UNKNOWN, Cell, Sheet, change, ms, not_counted, si

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lcc.measure import Bench
    from lcc.methods import Method
    from lcc.timing import Latency, Speedup


SYMBOLS = (
    "c channels, c' the next even number; k the kernel's side, g the group size; n pixels, n_in those put in",
    "MACs of one image; N a BatchNorm, whose 2 c parameters, and a bias, come on top",
    "dense: params k^2 c^2; MACs n k^2 c^2. A residual step has two such convolutions",
    "rfft(n) is 1.25 n log2 n MACs, half of what a complex Fourier transform counts",
)


class SiteRow(Frozen):
    """A site, its cost in the network as it is, and what a method would make of it.

    `after` is None, and `reason` says in words why, where it stays dense. `before` is None for a block
    that nothing can take: what it costs is not known from its description. `depth` counts the blocks that it
    is inside of; `gone`: one of them is replaced; `converted_inside`: sites inside a block that are
    converted instead of it. `shares_with` is the site that counts what they share.
    """

    site: Site
    before: Cost | None
    after: Cost | None
    reason: str | None
    method: str | None
    shares_with: str | None = None
    depth: int = 0
    gone: bool = False
    converted_inside: int = 0


class Inspection(Frozen):
    """Every site, and totals: of the network, and of the network if all that can be converted is.

    `kinds` are those that are taken wherever they can be, or that a plan converts; `by_name` those of which
    the method takes only what a rule spells out.
    """

    source: str
    random_weights: bool
    image_size: tuple[int, int]
    rows: tuple[SiteRow, ...]
    before: Cost
    after: Cost
    kinds: tuple[SiteKind, ...] = ("conv",)
    by_name: tuple[SiteKind, ...] = ()
    planned: bool = False
    uncounted: tuple[str, ...] = ()

    @property
    def addressable(self) -> Cost:
        """Cost of the sites that can be converted, as they are."""
        return sum((before for before, _ in self.converted), Cost(params=0, macs=0))

    @property
    def converted(self) -> list[tuple[Cost, Cost]]:
        """What each site that can be converted costs now, and then; none of them is inside another."""
        return [(row.before, row.after) for row in self.rows if row.before and row.after]


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
    decided = decide(sites, rules_for(method)) if plan is None else plan
    rows = tuple(_row(site, sites, decided, done or {}) for site in sites)
    if plan is None:
        kinds = method.kinds - method.by_name_only
    else:
        kinds = frozenset(row.site.kind for row in rows if row.after is not None)
    found = Inspection(
        source=source,
        random_weights=random_weights,
        image_size=image_size,
        rows=rows,
        before=total,
        after=total,
        kinds=tuple(kind for kind in NOUNS if kind in kinds),
        by_name=tuple(sorted(method.by_name_only)),
        planned=plan is not None,
        uncounted=uncounted,
    )
    after = Cost(
        params=total.params - sum(b.params - a.params for b, a in found.converted),
        macs=total.macs - sum(b.macs - a.macs for b, a in found.converted),
    )
    return found.model_copy(update={"after": after})


def inspection_sheet(value: Inspection) -> Sheet:
    """Return the inspection as a table."""
    height, width = value.image_size
    return Sheet(
        title=f"{value.source}, {height}x{width}" + (" (RANDOM WEIGHTS)" if value.random_weights else ""),
        headers=("site", "shape", "at", "params", "MACs", "of MACs", "becomes"),
        rows=tuple(_cells(row, value) for row in value.rows),
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
        notes=(*SYMBOLS, *_hyperparameter_notes(methods)),
        left=(0, 1, 2, 3),
    )


def _hyperparameter_notes(methods: Mapping[str, type[Method]]) -> list[str]:
    """Return what every hyperparameter means; methods that share one share a line."""
    owners: dict[tuple[str, str | None], list[str]] = {}
    for name, kind in methods.items():
        for key, field in kind.model_fields.items():
            if key != "name":
                owners.setdefault((key, field.description), []).append(name)
    return [f"{key} ({', '.join(names)}): {text}" for (key, text), names in owners.items()]


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


def _row(site: Site, sites: tuple[Site, ...], plan: Plan, done: Mapping[str, Method]) -> SiteRow:
    methods = plan.methods()
    chosen = methods.get(site.name)
    around = [other.name for other in sites if other.kind != "conv" and other.holds(site)]
    before = site.cost_with(done[site.name]) if site.name in done and site.sizes else site.cost()
    return SiteRow(
        site=site,
        before=None if site.kind != "conv" and site.name not in done and site.obstacle else before,
        after=None if chosen is None else site.cost_with(chosen, first=plan.is_first(site.name)),
        reason=next((kept.reason for kept in plan.kept if kept.site == site.name), None),
        method=None if chosen is None else str(chosen),
        shares_with=plan.shares_with(site.name),
        depth=len(around),
        gone=any(name in methods for name in around),
        converted_inside=sum(other.name in methods and site.holds(other) for other in sites),
    )


def _cells(row: SiteRow, value: Inspection) -> tuple[Cell, ...]:
    site, before, after = row.site, row.before, row.after
    total = value.before.macs
    costs = (Cell(UNKNOWN), Cell(UNKNOWN))
    if before is not None:
        costs = (Cell(si(before.params)), Cell(si(before.macs)))
    if before is not None and after is not None:
        params, macs = change(si(before.params), si(after.params)), change(si(before.macs), si(after.macs))
        costs = (Cell(params), Cell(macs))
    share = Cell(f"{before.macs / total:.1%}" if before and total else UNKNOWN)
    calls = f" {TIMES}{len(site.sizes)}" if len(site.sizes) > 1 else ""
    size = Cell(f"{site.sizes[0]}{calls}" if site.sizes else UNKNOWN)
    return (
        Cell("  " * row.depth + site.name),
        Cell(str(site.spec)),
        size,
        *costs,
        share,
        _outcome(row, value),
    )


def _outcome(row: SiteRow, value: Inspection) -> Cell:
    if row.method is not None:
        return Cell(row.method + (f" with {row.shares_with}" if row.shares_with else ""), GOOD)
    of_other_kind = row.site.obstacle is None and row.site.kind not in value.kinds
    if row.gone or (of_other_kind and not value.planned):
        return Cell("")  # the block around it says what becomes of it, or the totals say why nothing does
    if row.converted_inside and value.planned:
        sites = "1 site" if row.converted_inside == 1 else f"{row.converted_inside} sites"
        return Cell(f"not as a whole: {sites} inside")
    return Cell(f"dense: {row.reason}", QUIET)


def _counts(value: Inspection) -> Iterator[str]:
    """Yield, for every kind of site, how many of them can be converted."""
    for kind, (_, nouns) in NOUNS.items():
        rows = [row for row in value.rows if row.site.kind == kind]
        free = sum(row.site.obstacle is None for row in rows)
        if kind in value.kinds:
            count = sum(row.after is not None for row in rows)
            yield f"{count} of {len(rows)} {nouns} {'would' if value.planned else 'can'} be converted"
        elif rows and not value.planned and kind in value.by_name:
            yield f"{nouns}: only where a rule, or --include, spells the name out"
        elif rows and not value.planned:
            yield f"{free} of {len(rows)} {nouns} are open to other methods: see `lcc methods`"


def _totals(value: Inspection) -> list[str]:
    part, before, after = value.addressable, value.before, value.after
    lines = [*_counts(value)]
    word, then = ("chosen", "with them converted") if value.planned else ("addressable", "all converted")
    if value.converted:
        lines += [
            f"{word}: {part.params / before.params:.0%} of {before.params:,} parameters",
            f"{word}: {part.macs / before.macs:.0%} of {before.macs:,} MACs ({2 * before.macs:,} FLOPs)",
            f"{then}: {_fewer(before.params, after.params, 'parameters')}",
            f"{then}: {_fewer(before.macs, after.macs, 'MACs')}",
        ]
    if after.macs < before.macs:
        lines.append("fewer MACs are not yet less time: `lcc report` measures that")
    if value.uncounted:
        lines.append(not_counted(value.uncounted))
    return lines


def _fewer(before: int, after: int, what: str) -> str:
    change = "as many as before" if before == after else f"{before / after:.2f}{TIMES} fewer"
    return f"{after:,} {what}, {change}"

"""What a planner can choose from: every method's configurations, at every site, with what they would save."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from lcc.blocks import dense
from lcc.budget import Option
from lcc.methods import Method
from lcc.plan import Rule, banks_of, costs_of
from lcc.specs import ConvSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lcc.budget import Quantity
    from lcc.plan import Site
    from lcc.specs import StepSpec

BYTES = 4  # of a parameter


def options_for(
    sites: tuple[Site, ...],
    methods: Sequence[Method | type[Method]],
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> list[Option]:
    """Return every way of giving methods sites that they can take, and what it saves; errors not yet known.

    A class stands for its family. `include` and `exclude` are globs over names; a block stays around what is
    excluded inside it. A method that shares takes a whole bank.
    """
    free = [
        site
        for site in sites
        if _is_named(site, include, exclude) and site.sizes and not _holds_kept(site, sites, exclude)
    ]
    wanted: dict[Method, list[Site]] = {}
    for site in free:
        found = [_members(method, site) for method in methods]
        for member in dict.fromkeys(member for members in found for member in members):
            wanted.setdefault(member, []).append(site)
    return [option for method, able in wanted.items() for option in _options(method, able, sites)]


def worthwhile(options: Sequence[Option], quantities: Sequence[Quantity]) -> list[Option]:
    """Return the options that save something of what is short, each amount of it with the least loss.

    Of members of one family on the same sites that save as much, those which save least of the rest have
    the most freedom to fit.
    """
    counted: tuple[Quantity, ...] = ("macs", *(q for q in quantities if q in ("params", "size")))
    best: dict[object, list[Option]] = {}
    for option in options:
        if all(option.saved[quantity] <= 0 for quantity in quantities):
            continue
        key = (type(option.method), option.sites, tuple(option.saved[quantity] for quantity in counted))
        equals = best.setdefault(key, [option])
        if option.saved["params"] < equals[0].saved["params"]:
            best[key] = [option]
        elif option.saved["params"] == equals[0].saved["params"] and option is not equals[0]:
            equals.append(option)
    return [option for equals in best.values() for option in equals]


def rules_of(taken: Sequence[Option]) -> tuple[Rule, ...]:
    """Return the rules that give methods the sites of these options: a rule for each bank, or each method."""
    banks = [Rule(match=option.sites, method=option.method) for option in taken if option.method.shares]
    alone: dict[Method, list[str]] = {}
    for option in taken:
        if not option.method.shares:
            alone.setdefault(option.method, []).extend(option.sites)
    return (*banks, *(Rule(match=tuple(names), method=method) for method, names in alone.items()))


def obstacles(
    sites: tuple[Site, ...],
    methods: Sequence[Method | type[Method]],
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> str:
    """Return in words why these methods take no site: what the first says of each, most often first."""
    counts: Counter[str] = Counter()
    named = [site for site in sites if _is_named(site, include, exclude)]
    for site in named:
        kinds = [method for method in methods if site.kind in method.kinds]
        if kinds:
            reason = site.why_not(_members(kinds[0], site)[0]) or "would save none of it"
            reason = "holds what --exclude names" if _holds_kept(site, sites, exclude) else reason
            counts[reason.partition(" (")[0].partition(":")[0]] += 1
    left = " that --include and --exclude leave" if include or exclude else ""
    if named and not counts:
        block = named[0].name
        return (
            f"the methods replace convolutions, and {block} is a whole block; its convolutions are "
            f"--include '{block}.*'"
        )
    listed = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))
    return f"no method takes any of its {counts.total()} sites{left} ({listed})"


def _members(method: Method | type[Method], site: Site) -> tuple[Method, ...]:
    if isinstance(method, Method):
        return (method,)
    return method.family(site.spec) if site.kind in method.kinds else ()


def _is_named(site: Site, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    return (not include or Rule(match=include).matches(site)) and not Rule(match=exclude).matches(site)


def _holds_kept(site: Site, sites: tuple[Site, ...], exclude: tuple[str, ...]) -> bool:
    kept = Rule(match=exclude)
    return any(site.holds(other) and kept.matches(other) for other in sites)


def _options(method: Method, free: Sequence[Site], sites: tuple[Site, ...]) -> Iterator[Option]:
    if method.shares:
        for bank in banks_of(free, method):
            yield _option(method, bank, sites)
        return
    for site in free:
        if site.why_not(method) is None:
            yield _option(method, (site,), sites)


def _option(method: Method, taken: tuple[Site, ...], sites: tuple[Site, ...]) -> Option:
    before, after = costs_of(taken, method)
    inside = (other.name for site in taken for other in sites if site.holds(other))
    params = before.params - after.params
    buffers = sum(_buffers_saved(method, site.spec) for site in taken)
    return Option(
        method=method,
        sites=tuple(site.name for site in taken),
        covers=tuple(dict.fromkeys((*(site.name for site in taken), *inside))),
        saved={"params": params, "macs": before.macs - after.macs, "size": BYTES * params + buffers},
    )


def _buffers_saved(method: Method, spec: ConvSpec | StepSpec) -> int:
    """Return by how many bytes the stored buffers of a site shrink, such as the statistics of its norms."""
    if isinstance(spec, ConvSpec):
        return 0
    with torch.device("meta"):
        before, after = dense(spec), method.build(spec)
    return sum(
        sign * tensor.nbytes
        for sign, module in ((1, before), (-1, after))
        for name, tensor in module.state_dict().items()
        if name not in dict(module.named_parameters())
    )

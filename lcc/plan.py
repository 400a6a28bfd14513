"""Who gets what, decided once: sites and rules in, a plan out. Pure data."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, field_validator

from lcc.errors import NothingToConvertError, RecipeError
from lcc.methods import AnyMethod, Method
from lcc.specs import ConvSpec, Cost, Frozen, SiteKind, Size, StepSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

DENSE_BY_RULE = "kept dense by a rule (or --exclude)"
NO_RULE = "named by no rule (or --include)"
NOUNS: dict[SiteKind, tuple[str, str]] = {
    "conv": ("convolution", "convolutions"),
    "step": ("residual step", "residual steps"),
    "transition": ("stage-changing block", "stage-changing blocks"),
}


def other_kind(method: Method, kind: SiteKind) -> str | None:
    """Return in words that a method takes other kinds of sites than this; None if it takes this one."""
    if kind in method.kinds:
        return None
    taken = " and ".join(NOUNS[taken][1] for taken in sorted(method.kinds))
    return f"{method.name} takes {taken}, and this is a {NOUNS[kind][0]}"


class Site(Frozen):
    """Something that can be replaced, by name.

    `aliases` are its other names, where the host registers one module twice. `sizes` holds the size of
    every map that it is given for one image. `norm` names the BatchNorm that alone consumes its output.
    `shortcut`: a convolution on the skip path of a residual block. `obstacle` says in words why nothing can
    take it.
    """

    name: str
    kind: SiteKind = "conv"
    spec: ConvSpec | StepSpec
    sizes: tuple[Size, ...] = ()
    aliases: tuple[str, ...] = ()
    norm: str | None = None
    shortcut: bool = False
    obstacle: str | None = None

    def cost(self) -> Cost:
        """Cost of the site as it is: parameters once, multiply-accumulates summed over its calls."""
        macs = sum(self.spec.cost(size).macs for size in self.sizes)
        return Cost(params=self.spec.params, macs=macs)

    def cost_with(self, method: Method, *, first: bool = True) -> Cost:
        """Cost of the site if `method` took it, counted the same way; a site never called has no cost.

        What a bank has in common counts for the `first` of its sites alone.
        """
        costs = [method.cost(self.spec, size) for size in self.sizes]
        common = 0 if first else method.shared_params(self.spec)
        return Cost(params=costs[0].params - common, macs=sum(cost.macs for cost in costs))

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, and its other names."""
        return (self.name, *self.aliases)

    def holds(self, other: Site) -> bool:
        """Whether the other site is inside this one."""
        return any(inner.startswith(f"{outer}.") for outer in self.names for inner in other.names)

    def why_not(self, method: Method, *, by_name: bool = False) -> str | None:
        """Return in words why `method` can't or shouldn't take this site; None if it can.

        `by_name`: a rule spells the site out, as some methods want for some kinds.
        """
        if self.obstacle is not None:
            return self.obstacle
        if (other := other_kind(method, self.kind)) is not None:
            return other
        if self.kind in method.by_name_only and not by_name:
            return f"{method.name} takes a {NOUNS[self.kind][0]} only where a rule spells its name out"
        reason = method.why_not(self.spec)
        if reason is not None:
            return reason
        if method.shares:  # told by the bank: `_lone`
            return None
        return _not_cheaper(self.cost(), self.cost_with(method))


class Rule(Frozen):
    """Globs over site names, and the method that takes what they match; no method keeps it dense.

    `reason` is said of what is kept dense.
    """

    match: tuple[str, ...]
    method: AnyMethod | None = None
    reason: str | None = None

    def matches(self, site: Site, names: Collection[str] = ()) -> bool:
        """Whether any glob matches any name of the site, or is one, letter by letter.

        Of `names`, those of all sites, each stands for itself alone, even if it reads as a glob.
        """
        globs = (glob for glob in self.match if glob not in names)
        by_glob = (fnmatchcase(name, glob) for glob in globs for name in site.names)
        return self.spells_out(site) or any(by_glob)

    def spells_out(self, site: Site) -> bool:
        """Whether a pattern is one of the site's names, letter by letter."""
        return any(name in self.match for name in site.names)


class Group(Frozen):
    """A method and the sites it takes; of a method that shares, one bank."""

    method: AnyMethod
    sites: tuple[str, ...]


class Kept(Frozen):
    """A site that stays as it is, and why."""

    site: str
    reason: str
    kind: SiteKind = "conv"


class Plan(Frozen):
    """The decision: every site is in one group or kept with a reason.

    `steps` describes the residual steps and stage-changing blocks among the converted sites, so that
    replaying the plan on the same network need not find out again what they were. `orders`: for each
    convolution of which outputs come in another order than the original's, which of these is at each place.
    """

    groups: tuple[Group, ...] = ()
    kept: tuple[Kept, ...] = ()
    steps: dict[str, StepSpec] = Field(default_factory=dict)
    orders: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @field_validator("orders")
    @classmethod
    def _are_orders(cls, orders: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for site, order in orders.items():
            if sorted(order) != list(range(len(order))):
                raise ValueError(f"{site}: not an order of {len(order)} channels")
        return orders

    def is_first(self, site: str) -> bool:
        """Whether a converted site counts what it shares: the first of a bank, and every other site."""
        return self.shares_with(site) is None

    def shares_with(self, site: str) -> str | None:
        """Return the first site of its bank; None for that one itself, and for one that shares nothing."""
        banks = (group.sites for group in self.groups if group.method.shares)
        return next((first for first, *others in banks if site in others), None)

    def methods(self) -> dict[str, Method]:
        """Return the method of every converted site, by name."""
        return {site: group.method for group in self.groups for site in group.sites}

    def then(self, more: Plan) -> Plan:
        """Return the plan that does both, where `more` converts more of a network that this one made."""
        done = self.methods()
        return Plan(
            groups=(*self.groups, *more.groups),
            kept=tuple(entry for entry in more.kept if entry.site not in done),
            steps={**self.steps, **more.steps},
            orders=chained(self.orders, more.orders),
        )


def chained(
    first: Mapping[str, tuple[int, ...]], then: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the orders of outputs that two reorderings make, one after the other; not those that stay."""
    both = {
        site: tuple(first[site][place] for place in order) if site in first else order
        for site, order in then.items()
    }
    return {site: order for site, order in {**first, **both}.items() if order != tuple(range(len(order)))}


def rules_for(
    method: Method, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """Return the rules that a bare method with --include and --exclude globs stands for."""
    kept = (Rule(match=exclude),) if exclude else ()
    return (*kept, Rule(match=include or ("*",), method=method))


def make_plan(sites: tuple[Site, ...], rules: tuple[Rule, ...]) -> Plan:
    """Return the plan in which the first matching rule decides each site; see `decide`.

    Raises: RecipeError: a pattern matches no site, or names a site that its method can't take.
    NothingToConvertError: no site is converted.
    """
    if not sites:
        raise NothingToConvertError("nothing to convert: the network has no nn.Conv2d and no residual step")
    refuse_idle_patterns(sites, rules)
    plan = decide(sites, rules)
    if not plan.groups:
        raise NothingToConvertError(_nothing(plan.kept, rules))
    return plan


def decide(sites: tuple[Site, ...], rules: tuple[Rule, ...]) -> Plan:
    """Return the plan, which may convert nothing; sites are in order of call, a step before what is inside.

    A rule whose method does not take sites of a kind passes over those that it does not spell out: the next
    rule that matches decides. Where sites lie in one another, the earlier rule wins, and for one rule the
    outer site: a step is kept where an earlier rule converts, or keeps dense, something inside it; what is
    inside a step that is replaced goes with it.
    Raises: RecipeError: a rule spells out a site that its method can't take, or that another one rules out.
    """
    names = frozenset(name for site in sites for name in site.names)
    choices = _without_lone([_choose(site, rules, names) for site in sites], {})
    made, ruled_out = _made(choices)
    while (fewer := _without_lone(choices, ruled_out)) != choices:
        choices = fewer
        made, ruled_out = _made(choices)
    taken: dict[tuple[Method, object], list[str]] = {}
    kept: list[Kept] = []
    stands = {choice.site.name for choice in made}
    for choice in choices:
        site = choice.site
        if choice.method is not None and site.name in stands:
            bank = isomorphism(site) if choice.method.shares else None
            taken.setdefault((choice.method, bank), []).append(site.name)
        else:
            reason = ruled_out.get(site.name) or _inside(site, made) or choice.reason
            kept.append(Kept(site=site.name, reason=reason, kind=site.kind))
    groups = tuple(Group(method=method, sites=tuple(names)) for (method, _), names in taken.items())
    replaced = {name for names in taken.values() for name in names}
    steps = {s.name: s.spec for s in sites if s.name in replaced and isinstance(s.spec, StepSpec)}
    return Plan(groups=groups, kept=tuple(kept), steps=steps)


class _Choice(NamedTuple):
    """What the rules alone, without regard to other sites, say of one: its method, or why it has none."""

    site: Site
    number: int = 0  # of the rule that decides
    method: Method | None = None
    reason: str = ""
    is_decision: bool = False  # to convert it, or to keep it dense
    spelled_out: bool = False


def _choose(site: Site, rules: tuple[Rule, ...], names: Collection[str]) -> _Choice:
    passed_over = None
    for number, rule in enumerate(rules):
        if not rule.matches(site, names):
            continue
        method, spelled_out = rule.method, rule.spells_out(site)
        if method is None:
            said = site.obstacle or rule.reason or DENSE_BY_RULE
            return _Choice(site, number, reason=said, is_decision=True)
        reason = site.why_not(method, by_name=spelled_out)
        if reason is None:
            return _Choice(site, number, method, is_decision=True, spelled_out=spelled_out)
        if spelled_out:
            raise RecipeError(_refusal(site, method, reason))
        if site.kind in method.takes - method.by_name_only:
            return _Choice(site, number, reason=reason)
        passed_over = passed_over or reason
    return _Choice(site, reason=passed_over or site.obstacle or NO_RULE)


def _made(choices: list[_Choice]) -> tuple[list[_Choice], dict[str, str]]:
    """Return the decisions that stand, and by site the reasons why others, around or inside them, don't."""
    made: list[_Choice] = []
    ruled_out: dict[str, str] = {}
    for choice in sorted((c for c in choices if c.is_decision), key=lambda c: c.number):
        reason = _ruled_out(choice, made)
        if reason is None:
            made.append(choice)
        elif choice.spelled_out and choice.method is not None:
            raise RecipeError(_refusal(choice.site, choice.method, reason))
        else:
            ruled_out[choice.site.name] = reason
    return made, ruled_out


def isomorphism(site: Site) -> object:
    """Return what sites have in common that may share a kernel: shape, stride, stage and part in a block.

    A stage is what works at one size; a convolution on a shortcut is told from the others.
    """
    return site.spec, site.sizes, site.shortcut


def banks_of(sites: Iterable[Site], method: Method) -> list[tuple[Site, ...]]:
    """Return the sets of sites that could each be a bank of a method that shares."""
    alike: dict[object, list[Site]] = {}
    for site in sites:
        if site.why_not(method) is None:
            alike.setdefault(isomorphism(site), []).append(site)
    return [tuple(bank) for bank in alike.values() if _lone(bank, method) is None]


def costs_of(taken: Sequence[Site], method: Method) -> tuple[Cost, Cost]:
    """Return what sites cost as they are, and if `method` took them all, as one bank where it shares."""
    none = Cost(params=0, macs=0)
    after = (site.cost_with(method, first=site is taken[0]) for site in taken)
    return sum((site.cost() for site in taken), none), sum(after, none)


def _without_lone(choices: list[_Choice], ruled_out: Collection[str]) -> list[_Choice]:
    """Return the choices without those of methods that share where there is nothing to share with.

    `ruled_out` are sites whose choice does not stand, so that no others share with them.
    """
    banks: dict[tuple[Method, object], list[Site]] = {}
    for choice in choices:
        if choice.method is not None and choice.method.shares and choice.site.name not in ruled_out:
            banks.setdefault((choice.method, isomorphism(choice.site)), []).append(choice.site)
    found = []
    for choice in choices:
        reason = None
        if choice.method is not None and choice.method.shares and choice.site.name not in ruled_out:
            reason = _lone(banks[choice.method, isomorphism(choice.site)], choice.method)
        if reason is not None and choice.spelled_out and choice.method is not None:
            raise RecipeError(_refusal(choice.site, choice.method, reason))
        found.append(choice if reason is None else _Choice(choice.site, choice.number, reason=reason))
    return found


def _lone(bank: list[Site], method: Method) -> str | None:
    """Return in words why these sites can't be a bank; None if they can."""
    if len(bank) == 1:
        return "no other convolution of its shape, stride, size and part in a block to share with"
    return _not_cheaper(*costs_of(bank, method))


def _not_cheaper(before: Cost, after: Cost) -> str | None:
    if after.cheaper_than(before):
        return None
    if after.macs > before.macs:
        return f"would not be cheaper: {after.macs:,} MACs instead of {before.macs:,}"
    return f"would not be cheaper: {after.params:,} parameters instead of {before.params:,}"


def _ruled_out(choice: _Choice, made: list[_Choice]) -> str | None:
    """Return in words which decision of an earlier rule, on a site around it or inside it, bars this one."""
    around = _inside(choice.site, made)
    if around is not None or choice.method is None:
        return around
    inner = next((other for other in made if choice.site.holds(other.site)), None)
    if inner is None:
        return None
    return f"holds {inner.site.name}, which an earlier rule {'converts' if inner.method else 'keeps dense'}"


def _inside(site: Site, made: list[_Choice]) -> str | None:
    outer = next((other for other in made if other.method is not None and other.site.holds(site)), None)
    if outer is None or outer.method is None:
        return None
    return f"inside {outer.site.name}, which {outer.method.name} replaces"


def _refusal(site: Site, method: Method, reason: str) -> str:
    return f"{site.name} can't be converted by {method}: {reason}; match it with a glob to skip it"


def refuse_idle_patterns(sites: tuple[Site, ...], rules: tuple[Rule, ...]) -> None:
    """Raise RecipeError for a pattern that matches no site."""
    for rule in rules:
        for glob in rule.match:
            alone = Rule(match=(glob,))
            if not any(alone.matches(site) for site in sites):
                close = get_close_matches(glob, [name for site in sites for name in site.names], n=1)
                meant = f"; did you mean {close[0]!r}?" if close else ""
                raise RecipeError(
                    f"no site matches {glob!r}{meant}; `lcc inspect` lists the {len(sites)} names there are"
                )


def _nothing(kept: tuple[Kept, ...], rules: tuple[Rule, ...]) -> str:
    """Return in words why nothing is converted, of the kinds of sites that the rules are about."""
    about = {kind for rule in rules if rule.method for kind in rule.method.kinds - rule.method.by_name_only}
    counts: dict[str, int] = {}
    for entry in [entry for entry in kept if entry.kind in about] or kept:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    reasons = sorted(counts.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons[:3])
    return f"nothing to convert among {sum(counts.values())} sites: {listed}; `lcc inspect` lists them all"

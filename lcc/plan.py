"""Who gets what, decided once: sites and rules in, a plan out. Pure data."""

from __future__ import annotations

from fnmatch import fnmatchcase
from lcc.errors import NothingToConvertError, RecipeError
from lcc.methods import AnyMethod, Method, SiteKind
from lcc.specs import ConvSpec, Cost, Frozen, Size, StepSpec

DENSE_BY_RULE = "kept dense by a rule (or --exclude)"
NO_RULE = "named by no rule (or --include)"


class Site(Frozen):
    """Something that can be replaced, by name.

    `aliases` are its other names, where the host registers one module twice. `sizes` holds the input size
    of every call in one forward pass. `norm` names the BatchNorm that alone consumes its output.
    `obstacle` says in words why nothing can take it.
    """

    name: str
    kind: SiteKind = "conv"
    spec: ConvSpec | StepSpec
    sizes: tuple[Size, ...] = ()
    aliases: tuple[str, ...] = ()
    norm: str | None = None
    obstacle: str | None = None

    def cost(self) -> Cost:
        """Cost of the site as it is: parameters once, multiply-accumulates summed over its calls."""
        macs = sum(self.spec.cost(size).macs for size in self.sizes)
        return Cost(params=self.spec.params, macs=macs)

    def cost_with(self, method: Method) -> Cost:
        """Cost of the site if `method` took it, counted the same way; a site never called has no cost."""
        costs = [method.cost(self.spec, size) for size in self.sizes]
        return Cost(params=costs[0].params, macs=sum(cost.macs for cost in costs))

    def why_not(self, method: Method) -> str | None:
        """Return in words why `method` can't or shouldn't take this site; None if it can."""
        if self.obstacle is not None:
            return self.obstacle
        if self.kind not in method.kinds:
            return f"{method.name} takes {' and '.join(sorted(method.kinds))} sites, this is a {self.kind}"
        reason = method.why_not(self.spec)
        if reason is not None:
            return reason
        before, after = self.cost(), self.cost_with(method)
        if after.cheaper_than(before):
            return None
        if after.macs > before.macs:
            return f"would not be cheaper: {after.macs:,} MACs instead of {before.macs:,}"
        return f"would not be cheaper: {after.params:,} parameters instead of {before.params:,}"


class Rule(Frozen):
    """Globs over site names, and the method that takes what they match; no method keeps it dense."""

    match: tuple[str, ...]
    method: AnyMethod | None = None

    def matches(self, site: Site) -> bool:
        """Whether any glob matches any name of the site."""
        return any(fnmatchcase(name, glob) for glob in self.match for name in (site.name, *site.aliases))

    def spells_out(self, site: Site) -> bool:
        """Whether a pattern is one of the site's names, letter by letter."""
        return any(name in self.match for name in (site.name, *site.aliases))


class Group(Frozen):
    """A method and the sites it takes."""

    method: AnyMethod
    sites: tuple[str, ...]


class Kept(Frozen):
    """A site that stays as it is, and why."""

    site: str
    reason: str


class Plan(Frozen):
    """The decision: every site is in one group or kept with a reason."""

    groups: tuple[Group, ...] = ()
    kept: tuple[Kept, ...] = ()

    def methods(self) -> dict[str, Method]:
        """Return the method of every converted site, by name."""
        return {site: group.method for group in self.groups for site in group.sites}


def rules_for(
    method: Method, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """Return the rules that a bare method with --include and --exclude globs stands for."""
    kept = (Rule(match=exclude),) if exclude else ()
    return (*kept, Rule(match=include or ("*",), method=method))


def make_plan(sites: tuple[Site, ...], rules: tuple[Rule, ...]) -> Plan:
    """Return the plan in which the first matching rule decides each site.

    Raises: RecipeError: a pattern matches no site, or names a site that its method can't take.
    NothingToConvertError: no site is converted.
    """
    if not sites:
        raise NothingToConvertError("nothing to convert: the network has no nn.Conv2d")
    _refuse_idle_patterns(sites, rules)
    taken: dict[Method, list[str]] = {}
    kept: list[Kept] = []
    for site in sites:
        rule = next((rule for rule in rules if rule.matches(site)), None)
        if rule is None or rule.method is None:
            kept.append(
                Kept(site=site.name, reason=site.obstacle or (NO_RULE if rule is None else DENSE_BY_RULE))
            )
            continue
        reason = site.why_not(rule.method)
        if reason is None:
            taken.setdefault(rule.method, []).append(site.name)
        elif rule.spells_out(site):
            raise RecipeError(
                f"{site.name} can't be converted by {rule.method}: {reason}; match it with a glob to skip it"
            )
        else:
            kept.append(Kept(site=site.name, reason=reason))
    if not taken:
        raise NothingToConvertError(_nothing(kept))
    groups = tuple(Group(method=method, sites=tuple(names)) for method, names in taken.items())
    return Plan(groups=groups, kept=tuple(kept))


def _refuse_idle_patterns(sites: tuple[Site, ...], rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        for glob in rule.match:
            alone = Rule(match=(glob,))
            if not any(alone.matches(site) for site in sites):
                raise RecipeError(
                    f"no site matches {glob!r}; `lcc inspect` lists the {len(sites)} names there are"
                )


def _nothing(kept: list[Kept]) -> str:
    counts: dict[str, int] = {}
    for entry in kept:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    reasons = sorted(counts.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons[:3])
    return f"nothing to convert among {len(kept)} sites: {listed}; `lcc inspect` lists them all"

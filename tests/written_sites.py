"""Lists of sites written by hand, rules for them, and what a plan says of each site."""

from __future__ import annotations

from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import Rule, Site, make_plan
from lcc.specs import ConvSpec, Size, StepSpec

DEPTHWISE, GROUPED = LinearMix(), LinearMix(group_size=4)


def site(name, channels=16, out=None, kernel=(3, 3), sizes=((8, 8),), **options):
    fields = {key: options.pop(key) for key in ("aliases", "norm", "obstacle", "shortcut") if key in options}
    return Site(
        name=name,
        spec=ConvSpec(in_channels=channels, out_channels=out or channels, kernel_size=kernel, **options),
        sizes=tuple(Size(height=height, width=width) for height, width in sizes),
        **fields,
    )


SITES = (
    site("stem", 3, 16),
    site("layer1.0.conv1"),
    site("layer1.0.conv2"),
    site("layer1.1.conv1"),
    site("layer2.0.conv1", 16, 32),
    site("layer2.0.conv2", 32),
    site("head", 32, kernel=(1, 1)),
)


def rule(*match, method=None):
    return Rule(match=match, method=method)


def converted(plan):
    return {name: str(method) for name, method in plan.methods().items()}


def reasons(plan):
    return {kept.site: kept.reason for kept in plan.kept}


RD, RD_7 = RdExplicit(), RdExplicit(kernel_size=7)


def step(name, channels=16, sizes=((8, 8),), **options):
    conv = ConvSpec(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=(1, 1))
    return Site(
        name=name,
        kind="step",
        spec=StepSpec(channels=channels, convs=(conv, conv), norm_params=4 * channels),
        sizes=tuple(Size(height=height, width=width) for height, width in sizes),
        **options,
    )


NESTED = (
    site("stem", 3, 16),
    step("a"),
    site("a.conv1"),
    site("a.conv2", kernel=(1, 1)),
    step("b"),
    site("b.conv1"),
)


def plan_of(*rules, sites=NESTED):
    plan = make_plan(sites, rules)
    assert sorted([*plan.methods(), *reasons(plan)]) == sorted(s.name for s in sites)
    return plan

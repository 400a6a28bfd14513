"""A network in, a converted copy out: sites, plan, surgery, and weights from weights or from images."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from lcc import calibrate, data, models, progress, surgery
from lcc.banks import settle_banks_
from lcc.errors import RecipeError
from lcc.evaluation import pick_device
from lcc.fit_store import FitStore
from lcc.grouping import group_for_
from lcc.manifest import command_line, event_now
from lcc.measurements import content_key, own_code
from lcc.memory import out_of_memory_as
from lcc.methods import LowCostOp
from lcc.network import Network, sites_of
from lcc.plan import Plan, Rule, Site, chained, make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from lcc.methods import Fit
    from lcc.recipe import Calibrate
    from lcc.settings import Settings

LEAST_SQUARES = "least squares"
REGRESSION = "least squares, steps by regression,"


def convert_network(
    original: Network,
    rules: tuple[Rule, ...],
    calibration: Calibrate | None,
    settings: Settings,
    *,
    fits: Path,
    resume: bool = False,
    ordered: bool = False,
) -> tuple[tuple[Site, ...], Network]:
    """Return the sites of a network, and a converted copy of it.

    Without images the fit is from weights, and random weights are not fitted at all. Where fitting is slow,
    what was fitted is kept in the folder `fits` meanwhile; `resume` goes on from it. Inner channels are put
    into the order that suits the rules, unless they are so `ordered` already.
    Raises: NothingToConvertError: no site; RecipeError: an idle rule, or a host that goes round what was
    replaced; DataError: the images. ArtifactError: the folder of fits.
    """
    sites, model, decided = planned(original, rules, settings, ordered=ordered)
    with models.seeded(original.loaded.source.seed):
        originals = surgery.replace_(model, decided)
    surgery.check_reached(model, [site for site in sites if site.name in originals], original.example)
    if calibration is None and original.is_random:
        made, details = {}, {"weights": "freshly initialised, as the network's own are random"}
    elif calibration is None:
        made = calibrate.project_(model, originals)
        details = {
            "weights": "closest to the original's, from weights alone; whole blocks at their method's start"
        }
        if any(isinstance(m, LowCostOp) and m.method.fits_slowly for m in model.modules()):
            settings.say(
                "note: weights alone do not fit what is not linear, such as whole blocks: those are where "
                "their method starts, how far off is not known; --calibrate DATA fits them, without labels"
            )
    else:
        images = data.images(
            calibration.data, original.loaded.preprocessing, calibration.images, calibration.seed
        )
        store = None
        if any(isinstance(m, LowCostOp) and m.method.fits_slowly for m in model.modules()):
            key = content_key(original.loaded.model, images, decided.model_dump_json(), own_code())
            store = FitStore(fits, key, resume=resume)
        full = RecipeError(
            f"out of memory while weights were fitted to {len(images)} images; take fewer: --images "
            f"{max(1, len(images) // 4)} (a recipe: calibrate.images)"
        )
        with out_of_memory_as(full):
            made, details = _fit_(model, originals, sites, images, settings, store)
        details["weights"] += f" of {calibration.data}, no labels"
    seed = None if calibration is None else calibration.seed
    event = event_now("convert", command_line(), seed=seed, details=details)
    converted = original.but(
        loaded=replace(original.loaded, model=model),
        plan=original.plan.then(decided),
        fits={**original.fits, **made},
        history=(*original.history, event),
        size_bytes=None,
    )
    settings.warn_of(converted)
    return sites, converted


def planned(
    original: Network, rules: tuple[Rule, ...], settings: Settings, *, ordered: bool = False
) -> tuple[tuple[Site, ...], nn.Module, Plan]:
    """Return the sites of a network, a copy of it ready for surgery, and the plan with its banks settled.

    Inner channels of the copy are in the order that suits the plan, unless they are so `ordered` already.
    Raises: NothingToConvertError: no site; RecipeError: an idle rule.
    """
    sites = sites_of(original)
    model = copy.deepcopy(original.loaded.model)
    plan, alignment = settle_banks_(model, sites, make_plan(sites, rules), original.example)
    if alignment is not None and alignment.orders:
        before, after = alignment.distances[0], alignment.distances[-1]
        settings.say(
            f"kernels to be shared were {before:.2f} from their mean and are {after:.2f} from it, relative, "
            f"with inner channels reordered in {len(alignment.orders)} places; the network computes the same"
        )
    if ordered or original.is_random:
        return sites, model, plan
    return sites, model, _group_(model, sites, plan, original.example, settings)


def tried(network: Network, sites: tuple[Site, ...], plan: Plan) -> tuple[nn.Module, list[Site]]:
    """Return a copy of a network with fresh operators in it, and the sites of these."""
    model, methods = copy.deepcopy(network.loaded.model), plan.methods()
    with models.seeded(network.loaded.source.seed):
        surgery.replace_(model, plan)
    return model, [site for site in sites if site.name in methods]


def in_order(original: Network, sites: tuple[Site, ...], plan: Plan, settings: Settings) -> Network:
    """Return the network with its inner channels in the order that suits a plan, and say what that gains."""
    if original.is_random:
        return original
    model = copy.deepcopy(original.loaded.model)
    orders = _group_(model, sites, plan, original.example, settings).orders
    plan = original.plan.model_copy(update={"orders": chained(original.plan.orders, orders)})
    return original.but(loaded=replace(original.loaded, model=model), plan=plan)


def _group_(
    model: nn.Module, sites: tuple[Site, ...], plan: Plan, example: Tensor, settings: Settings
) -> Plan:
    """Put inner channels into the order that suits a plan; return the plan with the orders."""
    methods = {site: (method,) for site, method in plan.methods().items()}
    grouping = group_for_(model, sites, methods, example)
    if grouping.orders:
        settings.say(
            f"reordered the channels between {len(grouping.orders)} pairs of convolutions, so that channel "
            f"groups hold {grouping.after:.1%} of the kernels' energy around the centres instead of "
            f"{grouping.before:.1%}; the network computes the same"
        )
    return plan.model_copy(update={"orders": chained(plan.orders, grouping.orders)})


def _fit_(
    model: nn.Module,
    originals: dict[str, nn.Module],
    sites: tuple[Site, ...],
    images: Tensor,
    settings: Settings,
    store: FitStore | None,
) -> tuple[dict[str, Fit], dict[str, str]]:
    """Fit the operators to unlabelled images; return the fits, and how they were made in words."""
    device = pick_device(settings.device, doubles=True)
    for module in (model, *originals.values()):
        module.to(device)
    done: list[str] = []
    with progress.bar("calibrate", len(originals)) as tick:

        def on_site(name: str, fit: Fit) -> None:
            done.append(name)
            tick(min(len(done), len(originals)), lambda: name)
            if store is not None and fit.relative_error is not None:
                settings.say(f"fitted {name}: relative error {fit.relative_error:.2f}")

        try:
            result = calibrate.calibrate_(model, originals, sites, images, on_site=on_site, store=store)
        except KeyboardInterrupt:
            if store is not None and done:
                settings.say(
                    f"{len(done)} of {len(originals)} sites are fitted and kept in {store.folder}: the same "
                    "command with --resume goes on"
                )
            raise
    model.cpu()
    _tell_left_out(result.fits, model, sites, len(images), settings)
    details = {
        "weights": f"{LEAST_SQUARES if store is None else REGRESSION} on {len(images)} images",
        "inputs": "from the converted prefix",
    }
    if result.chunks > 1:
        details["inputs"] = "from the original network, since the images do not fit in memory at once"
        settings.say(
            f"note: fitted in {result.chunks} chunks; inputs {details['inputs']}; fewer --images avoid that"
        )
    return result.fits, details


def _tell_left_out(
    fits: dict[str, Fit], model: nn.Module, sites: tuple[Site, ...], images: int, settings: Settings
) -> None:
    """Say which share of the images the regressions had, where not all of them fit in memory."""
    shares = {}
    for site in sites:
        operator = model.get_submodule(site.name) if site.name in fits else None
        if isinstance(operator, LowCostOp) and operator.method.fits_slowly and site.sizes:
            seen = [site.spec.out_size(size) if site.kind == "conv" else size for size in site.sizes]
            wanted = images * sum(size.height * size.width for size in seen)
            shares[site.name] = fits[site.name].samples / wanted
    fewer = {name: share for name, share in shares.items() if share < 1}
    if fewer:
        name, share = min(fewer.items(), key=lambda entry: entry[1])
        settings.say(
            f"note: {len(fewer)} sites were fitted to fewer than the {images} images, which do not fit in "
            f"memory: {name} to {share * images:.0f}"
        )

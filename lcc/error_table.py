"""How much every option harms a network on some images: from disk where it is known, else found out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lcc import data, models, progress
from lcc.calibrate import finite_activations
from lcc.errors import DataError
from lcc.evaluation import pick_device, placed
from lcc.measurements import Store, cache_folder, content_key, own_code
from lcc.methods import AnyMethod
from lcc.sensitivity import damages
from lcc.specs import Frozen
from lcc.tracing import undisturbed
from lcc.trials import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lcc.budget import Option
    from lcc.methods import Method
    from lcc.network import Network
    from lcc.plan import Site
    from lcc.recipe import Calibrate
    from lcc.settings import Settings

    Key = tuple[Method, tuple[str, ...]]


SLOW = 8  # options that are fitted by training, of which the errors are kept together


class Harm(Frozen):
    """What an option, a method and the sites that it takes, does; see `lcc.sensitivity.Damage`."""

    method: AnyMethod
    sites: tuple[str, ...]
    relative_error: float
    divergence: float


class ErrorTable(NamedTuple):
    """The options with their errors, relative errors on their sites, and in words what the table cost."""

    options: list[Option]
    relative_errors: dict[Key, float]
    cost: str


class Starts(NamedTuple):
    """A network as it is, and with its inner channels in an order that suits channel groups, if that differs.

    Kernels to be shared are converted, and priced, in the first.
    """

    original: Network
    grouped: Network

    def of(self, method: Method) -> Network:
        """Return the network in which a method takes its sites."""
        return self.original if method.shares else self.grouped


def with_errors(
    starts: Starts,
    sites: tuple[Site, ...],
    options: Sequence[Option],
    calibration: Calibrate,
    settings: Settings,
) -> ErrorTable:
    """Return options with the divergence that each is predicted to cause.

    Options without a finite error are left out. What is kept is known by lcc's code, by the network, its
    weights and their order included, and by the images, see `lcc.data.state_of_images`.
    Raises: DataError: the images. ArtifactError: the cache can't be used. SourceError: no classifier.
    """
    known: dict[Key, Harm] = {}
    missing, passes = 0, 0.0
    for network in starts[:1] if starts.grouped is starts.original else starts:
        keys = [(option.method, option.sites) for option in options if starts.of(option.method) is network]
        harms, took = _looked_up(network, sites, keys, calibration, settings)
        known |= harms
        missing += took.options
        passes += took.passes
    cost = f"errors of {len(options)} options on {calibration.images} images: kept from an earlier run"
    if missing:
        cost = (
            f"errors of {missing} options on {calibration.images} images took as long as {passes:.0f} "
            "forward passes over them"
        )
    errors = [(option, known[option.method, option.sites].divergence) for option in options]
    priced = [option.model_copy(update={"error": e}) for option, e in errors if math.isfinite(e)]
    if not priced:
        raise DataError(f"{calibration.data}: no option has a finite error; look at --mean and --std")
    if lost := [option for option, e in errors if not math.isfinite(e)]:
        example = f"{lost[0].method} at {', '.join(lost[0].sites)}"
        settings.say(f"note: left out, without a finite error: {example} (and {len(lost) - 1} more options)")
    return ErrorTable(priced, {key: harm.relative_error for key, harm in known.items()}, cost)


class _Took(NamedTuple):
    """What finding out took: for so many options as long as so many forward passes over the images."""

    options: int
    passes: float


def _looked_up(
    network: Network,
    sites: tuple[Site, ...],
    options: Sequence[Key],
    calibration: Calibrate,
    settings: Settings,
) -> tuple[dict[Key, Harm], _Took]:
    """Return what is kept of a network's options, and find out what is not."""
    if not options:
        return {}, _Took(0, 0.0)
    store = Store(cache_folder(), "errors", _conditions(network, sites, calibration), Harm)
    known = {(harm.method, harm.sites): harm for harm in store.read()}
    missing = [option for option in options if option not in known]
    if not missing:
        return known, _Took(0, 0.0)
    store.keep(())  # that the folder can't be written is said before the work
    passes, found = _found(network, sites, missing, calibration, settings, store.keep)
    return known | {(harm.method, harm.sites): harm for harm in found}, _Took(len(missing), passes)


def _found(
    network: Network,
    sites: tuple[Site, ...],
    options: Sequence[Key],
    calibration: Calibrate,
    settings: Settings,
    keep: Callable[[list[Harm]], None],
) -> tuple[float, list[Harm]]:
    """Return what finding out took, in forward passes, and what was found; `keep` takes each part."""
    images = data.images(calibration.data, network.loaded.preprocessing, calibration.images, calibration.seed)
    model = network.loaded.model
    by_name = {site.name: site for site in sites}
    passes, harms = 0.0, list[Harm]()
    with (
        finite_activations("its layers"),
        undisturbed(model),
        placed(model, pick_device(settings.device, doubles=True)),
        progress.bar("fit options", len(options)) as tick,
    ):

        def told(done: int) -> None:
            tick(len(harms) + done)

        for part in _parts(options):
            with models.seeded(calibration.seed):
                found = damages(model, by_name, part, images, seed=calibration.seed, on_done=told)
            new = [
                Harm(method=method, sites=names, **harm._asdict())
                for (method, names), harm in zip(part, found.entries, strict=True)
            ]
            keep(new)
            harms += new
            passes += found.forward_passes
    return passes, harms


def _parts(options: Sequence[Key]) -> list[Sequence[Key]]:
    """Return the options that are fitted in closed form, and the others some at a time."""
    fast = [key for key in options if not key[0].fits_slowly]
    slow = [key for key in options if key[0].fits_slowly]
    return [part for part in (fast, *(slow[i : i + SLOW] for i in range(0, len(slow), SLOW))) if part]


def _conditions(network: Network, sites: tuple[Site, ...], calibration: Calibrate) -> dict[str, object]:
    loaded, place = network.loaded, calibration.data.partition(":")[2]
    structure = f"{loaded.source}{loaded.model}{[site.model_dump_json() for site in sites]}"
    answer = answer_of(loaded.model, network.example)
    return {
        "network": content_key(loaded.model, None, structure, answer),
        "preprocessing": loaded.preprocessing.model_dump(mode="json"),
        "data": calibration.model_dump(mode="json"),
        "place": str(Path(place).expanduser().resolve()),
        "images": data.state_of_images(calibration.data, calibration.images, calibration.seed),
        "lcc": own_code(),
        "torch": torch.__version__,
    }

"""A network with all that is known of it: from a source, a checkpoint file or an lcc directory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcc import artifact, models
from lcc.counts import count_bytes, count_macs, count_norm_params, count_params
from lcc.directory import WEIGHTS
from lcc.errors import SourceError
from lcc.methods import LowCostOp
from lcc.plan import Plan, Site
from lcc.report import LayerRow, ModelRow
from lcc.specs import kind_of
from lcc.surgery import find_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lcc.evaluation import Accuracy
    from lcc.manifest import Event
    from lcc.methods import Fit
    from lcc.models import Loaded
    from lcc.recipe import ModelPart


DONE = {"convert": "converted", "train": "fine-tuned"}


@dataclass(frozen=True)
class Network:
    """What is known of a network; `plan` is empty where nothing was converted.

    `size_bytes` is that of its weights' file, without what else that holds; None where it has no file.
    """

    name: str
    loaded: Loaded
    plan: Plan = field(default_factory=Plan)
    fits: dict[str, Fit] = field(default_factory=dict)
    history: tuple[Event, ...] = ()
    size_bytes: int | None = None

    @property
    def example(self) -> Tensor:
        """A seeded random image of its size, (1, C, H, W)."""
        preprocessing = self.loaded.preprocessing
        shape = (1, len(preprocessing.mean), *preprocessing.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def but(self, **changes: object) -> Network:
        """Return it with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # the fields' own types

    def row(
        self,
        *,
        accuracy: Accuracy | None = None,
        data: str | None = None,
        sites: tuple[Site, ...] = (),
    ) -> ModelRow:
        """Return its line of a report, without latencies; `sites`, of the original, make the layer table."""
        model = self.loaded.model
        count = count_macs(model, self.example)
        converted = len(self.plan.methods())
        return ModelRow(
            name=self.name,
            source=self.loaded.source.id,
            random_weights=self.is_random,
            params=count_params(model),
            norm_params=count_norm_params(model),
            macs=count.macs,
            flops=count.flops,
            uncounted=count.missing,
            size_bytes=self.size_bytes,
            accuracy=accuracy,
            data=data,
            converted=converted or None,
            kept=_alternatives_kept(model, self.plan) if converted else None,
            history=tuple(event.command for event in self.history),
            layers=layer_rows(sites, self.plan, self.fits),
        )

    @property
    def pedigree(self) -> str:
        """Its source, and what was done to its weights since, in words."""
        done = (DONE[event.kind] for event in self.history if event.changed_weights)
        return ", ".join([str(self.loaded.source), *done])

    @property
    def is_random(self) -> bool:
        """Whether its weights were never trained, at the source or since: accuracy means nothing."""
        return self.loaded.source.is_random and not self._was_trained

    @property
    def has_new_head(self) -> bool:
        """Whether its last layer was never trained, at the source or since."""
        return self.loaded.source.has_new_head and not self._was_trained

    @property
    def _was_trained(self) -> bool:
        return any(event.kind == "train" for event in self.history)

    @property
    def was_trained_first(self) -> bool:
        """Whether it was trained before it was converted: its source's weights are not its original's."""
        changes = [event for event in self.history if event.changed_weights]
        return bool(changes) and changes[0].kind == "train"


def open_network(
    part: ModelPart, *, trust_pickle: bool = False, trust_code: bool = False, name: str | None = None
) -> Network:
    """Return the network that the options of a command or a recipe mean.

    Raises: SourceError, ArtifactError: anything that can't be found, read, trusted or made to fit.
    """
    path = Path(part.source)
    if path.is_dir():
        return _open_directory(part, path, trust_code=trust_code, name=name)
    loaded = models.load(**part.model_dump(), trust_pickle=trust_pickle)
    # a checkpoint may hold an optimiser's state, too
    size = min(path.stat().st_size, count_bytes(loaded.model)) if path.is_file() else None
    return Network(name=name or _short(part.source), loaded=loaded, size_bytes=size)


def original_of(network: Network, *, trust_code: bool = False) -> Network:
    """Return a converted network's original: its architecture, with random weights."""
    loaded = network.loaded
    model = models.build(loaded.source, trust_code=trust_code)
    return Network(name="original", loaded=replace(loaded, model=model))


def sites_of(network: Network) -> tuple[Site, ...]:
    """Return the sites of a network."""
    return find_sites(network.loaded.model, network.example)


def layer_rows(sites: tuple[Site, ...], plan: Plan, fits: dict[str, Fit]) -> tuple[LayerRow, ...]:
    """Return what the plan changes at every site that it converts."""
    methods = plan.methods()
    return tuple(
        LayerRow(
            site=site.name,
            spec=site.spec,
            size=site.sizes[0],
            method=str(methods[site.name]),
            before=site.cost(),
            after=site.cost_with(methods[site.name], first=plan.is_first(site.name)),
            shares_with=plan.shares_with(site.name),
            fit=fits.get(site.name),
        )
        for site in sites
        if site.name in methods
    )


def _alternatives_kept(model: nn.Module, plan: Plan) -> int:
    """Return how many sites of the kinds that the plan converts stay dense; none inside a converted one."""
    done = list(plan.methods())
    operators = (model.get_submodule(name) for name in done)
    kinds = {kind_of(operator.spec) for operator in operators if isinstance(operator, LowCostOp)}
    return sum(
        entry.kind in kinds and not any(entry.site.startswith(f"{name}.") for name in done)
        for entry in plan.kept
    )


def _open_directory(part: ModelPart, path: Path, *, trust_code: bool, name: str | None) -> Network:
    given = part.model_dump(exclude={"source", "seed"}, exclude_defaults=True)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise SourceError(f"{path} is an lcc directory and says itself what it holds; leave out --{option}")
    loaded, manifest, directory = artifact.load(path, trust_code=trust_code)
    loaded.model.float()  # what was saved in half or double precision is exact, or exact enough, in single
    return Network(
        name=name or path.resolve().name,
        loaded=loaded,
        plan=manifest.plan,
        fits=manifest.fits,
        history=manifest.history,
        size_bytes=(directory / WEIGHTS).stat().st_size,
    )


def _short(source: str) -> str:
    """Return the part of a source that names a model or a file."""
    return Path(source).stem if Path(source).is_file() else source.rpartition(":")[2]

"""Recipes: what to do, as data. `Finetune` holds every training option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lcc.budget import Quantity, parse_target
from lcc.errors import RecipeError
from lcc.method_text import method_from_text
from lcc.methods import METHODS
from lcc.plan import Rule
from lcc.specs import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Finetune(Frozen):
    """How to train. The defaults suit some epochs of SGD on a network whose weights are worth keeping.

    Optimisation: `optimizer` and `schedule` are timm's names ("sgd" has Nesterov momentum); `lr` is the peak,
    `warmup` the share of all steps spent rising to it; "step" multiplies it by `decay_rate` every
    `decay_epochs` epochs, counted from the start; `decay_norms`: weight decay on biases and norms too;
    `ema` is the decay of a moving average of the weights, which then is the result.
    Distillation: the loss is (1 - distill) * labels + distill * KL to the teacher at `temperature`, plus
    `features` times how far the converted sites' outputs are from the teacher's, see `lcc.features`.
    Augmentation: `crop` "pad" is a crop shifted by up to 4 pixels, "resize" a random resized crop with areas
    in `crop_scale`, "auto" the first up to 64 pixels and the second above; `auto_augment` is timm's policy
    string; `mixup` and `cutmix` are the alphas of their beta distributions.
    Precision: mixed with `precision`, or "no"; "bf16" is "no" on a CPU that would emulate it.
    Evaluation: on val/, else test/; with `val_split`, on that share of train/, chosen by `seed`.
    Checkpoints: every `checkpoint_every` steps, else at the end of every epoch.
    """

    data: str
    val_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Count = 10
    batch_size: Annotated[int, Field(ge=2)] = 128
    optimizer: str = "sgd"
    lr: Positive = 0.02
    momentum: Share = 0.9
    weight_decay: NotNegative = 5e-4
    decay_norms: bool = False
    schedule: Literal["cosine", "constant", "step", "tanh", "poly"] = "cosine"
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    decay_epochs: Count = 30
    warmup: Share = 0.05
    clip_norm: Positive | None = None
    ema: Share | None = None
    distill: Share = 0.5
    temperature: Positive = 4.0
    features: NotNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    crop: Literal["auto", "pad", "resize", "none"] = "auto"
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    hflip: Share = 0.5
    color_jitter: NotNegative = 0.0
    auto_augment: str | None = None
    random_erase: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Count | None = None

    @model_validator(mode="after")
    def _one_change_of_colours(self) -> Finetune:
        if self.color_jitter and self.auto_augment:
            raise ValueError("color_jitter: timm leaves it out beside auto_augment; set one of them")
        return self


PREPARATION = ("image_size", "mean", "std", "crop_pct")  # what a source may say of its images


class ModelPart(Frozen):
    """Which network: the options of `lcc.models.load`, under the same names."""

    source: str
    arch: str | None = None
    weights: str | None = None
    num_classes: Count | None = None
    image_size: tuple[Count, Count] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    class_names: tuple[str, ...] | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class Calibrate(Frozen):
    """Which unlabelled images the data-aware fit sees: the first `images` of a seeded shuffle."""

    data: str
    images: Count = 512
    seed: Annotated[int, Field(ge=0)] = 0


class Budget(Frozen):
    """What the network may cost at most, from which a planner decides: see `lcc.planning`.

    `targets`, all at once: "macs=50%" is what remains, "latency=-40%" the change, "size=5MB" an amount. Or
    `max_drop`: as little of `minimise` as loses at most so many points of top-1 on `data` before fine-tuning.
    `keep`: "outputs" has the least error right after conversion, "capacity" the most parameters, for networks
    that are fine-tuned; errors then decide between equals. `methods` to choose from, as on the command line:
    "linear_mix" is its family, "linear_mix:group_size=8" itself; none: every method that is fitted in closed
    form. `include` and `exclude` are globs over sites. Latency is measured in `runtime`, with so many CPU
    `threads` and images (`batch`).
    """

    targets: tuple[str, ...] = ()
    max_drop: NotNegative | None = None
    minimise: Quantity = "macs"
    keep: Literal["outputs", "capacity"] = "outputs"
    data: str | None = None
    methods: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    runtime: Literal["onnx", "torch"] = "onnx"
    threads: Count = 1
    batch: Count = 1

    @property
    def wanted(self) -> tuple[str, ...]:
        """The targets in words."""
        drop = () if self.max_drop is None else (f"{self.minimise}, at most {self.max_drop:g} points lost",)
        return (*self.targets, *drop)

    @model_validator(mode="after")
    def _one_aim(self) -> Budget:
        if bool(self.targets) == (self.max_drop is not None):
            raise ValueError("targets: give either targets or max_drop")
        if self.max_drop is not None and self.data is None:
            raise ValueError("max_drop: needs data, the labelled images on which the drop is measured")
        if self.max_drop is None and self.data is not None:
            raise ValueError("data: goes with max_drop, which is measured there; targets need no labels")
        if self.targets and "minimise" in self.model_fields_set:
            raise ValueError("minimise: goes with max_drop; targets say what is to be small")
        timed = self.minimise == "latency" or any(
            parse_target(text).quantity == "latency" for text in self.targets
        )
        for name in ("runtime", "threads", "batch"):
            if name in self.model_fields_set and not timed:
                raise ValueError(f"{name}: is about latency, which is no target here; leave it out")
        return self

    @field_validator("targets")
    @classmethod
    def _are_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for text in targets:
            _as_value_error(parse_target, text)
        return targets

    @field_validator("methods")
    @classmethod
    def _are_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for text in methods:
            _as_value_error(method_from_text, text)
        return methods


def _as_value_error(parse: Callable[[str], object], text: str) -> None:
    """Let pydantic know of what a parser refuses."""
    try:
        parse(text)
    except RecipeError as error:
        raise ValueError(str(error)) from error


class Progressive(Frozen):
    """For deep cuts: convert in `stages`, from the input to the output, each with about as many sites.

    After each but the last the network is trained for so many `epochs`, at a constant learning rate and
    otherwise as [finetune] says, whose own epochs come after the last.
    """

    stages: Annotated[int, Field(ge=2)] = 2
    epochs: Count = 1


class Evaluate(Frozen):
    """Where top-1 and top-5 are measured; without it, on what [finetune] names."""

    data: str
    batch_size: Count = 256


class Export(Frozen):
    """How the ONNX file is written; `lowering_tolerance`: how far an operator may be from itself there."""

    opset: Annotated[int, Field(ge=18)] = 20
    half: bool = False
    lowering_tolerance: NotNegative = 1e-3


class Recipe(Frozen):
    """A whole run: load, convert, calibrate, fine-tune, evaluate, export. A part left out is a step left out.

    The first entry of `convert` that matches a site decides it; an entry without a method keeps it dense.
    With `budget` a planner decides instead.
    `teacher` is what distillation learns from; without it, the network before conversion.
    """

    lcc: Literal[1]
    model: ModelPart
    convert: tuple[Rule, ...] = ()
    budget: Budget | None = None
    calibrate: Calibrate | None = None
    progressive: Progressive | None = None
    teacher: ModelPart | None = None
    finetune: Finetune | None = None
    eval: Evaluate | None = None
    export: Export | None = None

    @property
    def decision(self) -> tuple[Rule, ...] | Budget:
        """What decides which site gets what: the rules, or the budget; in stages, kernels are not shared."""
        if self.budget is None:
            return self.convert
        if self.progressive is None or self.budget.methods:
            return self.budget
        alone = (name for name, kind in METHODS.items() if not (kind.fits_slowly or kind.shares))
        return self.budget.model_copy(update={"methods": tuple(alone)})

    @model_validator(mode="after")
    def _no_idle_part(self) -> Recipe:
        _refuse_empty(self.convert)
        if self.budget is not None and self.convert:
            raise ValueError("[[convert]] and [budget] both decide what is converted; take one out")
        if self.budget is not None and self.calibrate is None:
            raise ValueError("[budget] needs [calibrate]: only images show what harms least")
        if self.calibrate is not None and not self.convert and self.budget is None:
            raise ValueError(
                "[calibrate] has nothing to do without [[convert]] or [budget]; add one or take it out"
            )
        if self.progressive is not None and (self.finetune is None or not (self.convert or self.budget)):
            raise ValueError("[progressive] needs something to convert, and [finetune] to train in between")
        named = () if self.budget is None else map(method_from_text, self.budget.methods)
        methods = (*named, *(rule.method for rule in self.convert if rule.method is not None))
        sharing = next((method.name for method in methods if method.shares), None)
        if self.progressive is not None and sharing is not None:
            raise ValueError(f"[progressive]: {sharing} fits all sites of a kernel at once; leave one out")
        if self.teacher is not None and self.finetune is None:
            raise ValueError("[teacher] has nothing to do without [finetune]; add one or take it out")
        return self


class Rules(Frozen):
    """What a plan file holds: rules, and nothing else."""

    convert: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @field_validator("convert")
    @classmethod
    def _match_something(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        _refuse_empty(rules)
        return rules


def _refuse_empty(rules: tuple[Rule, ...]) -> None:
    for number, rule in enumerate(rules):
        if not rule.match:
            raise ValueError(f"convert.{number}.match: an empty list matches nothing; take the entry out")

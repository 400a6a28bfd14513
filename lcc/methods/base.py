"""A method's contract with the rest of lcc: `Method` decides, `LowCostOp` computes, `Fit` reports."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import PlainValidator, SerializeAsAny
from torch import Tensor, nn

from lcc.ops.fit import relative_error
from lcc.ops.sampling import SampledGrams
from lcc.specs import ConvSpec, Cost, Frozen, SiteKind, Size, StepSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Spec = Any  # a ConvSpec or a StepSpec: a method is asked only about the kinds of site that it takes


class Fit(Frozen):
    """How an operator got its weights, and how far it is from what it replaces.

    Errors are relative: |got - wanted| / |wanted| over all numbers, per-channel means removed where a bias
    or a BatchNorm makes them free to a closed form; a step's keep them. None is not known. Activation errors
    are taken on held-out images; on those fitted to, where fewer than five were given.
    """

    how: Literal["weights", "data"]
    kernel_error: float | None = None
    start_error: float | None = None
    relative_error: float | None = None
    ridge: float | None = None
    samples: int = 0


class Statistics(Protocol):
    """What an operator wants to remember of its activations; fed batch by batch."""

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C_in, H, W) inputs and the (N, C_out, H', W') outputs the original gave for its own."""


def as_conv(module: nn.Module) -> nn.Conv2d:
    """Return the module; raises: TypeError: it is no convolution."""
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"a {type(module).__name__} is no convolution")
    return module


class Lowering(NamedTuple):
    """An operator in operations that ONNX Runtime runs well, for frozen weights and one input size.

    `how` says in words what was done, "" where nothing is to be said. `relative_error` is how far it may be
    from the operator itself: |lowered - exact| / |exact|, estimated.
    """

    module: nn.Module
    how: str = ""
    relative_error: float = 0.0


class LowCostOp(nn.Module, ABC):
    """The module that stands in for a convolution or a residual step: (N, C_in, H, W) -> (N, C_out, H', W').

    In place of a convolution it carries the attributes that host networks read off one.
    """

    def __init__(self, method: Method, spec: ConvSpec | StepSpec) -> None:
        super().__init__()
        self.method, self.spec = method, spec
        if isinstance(spec, ConvSpec):
            self.in_channels = spec.in_channels
            self.out_channels = spec.out_channels
            self.kernel_size = spec.kernel_size
            self.stride = spec.stride
            self.padding = spec.padding
            self.dilation = spec.dilation
            self.groups = spec.groups
            self.padding_mode = spec.padding_mode

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for x (N, C_in, H, W)."""

    @abstractmethod
    def project_(self, original: nn.Module) -> Fit:
        """Take on the family's member closest to `original`, or a stated start, from its weights alone."""

    @abstractmethod
    def statistics(self, *, free_means: bool) -> Statistics:
        """Return an empty accumulator; `free_means`: a BatchNorm follows, so output means don't matter."""

    @abstractmethod
    def fit_(self, statistics: Statistics) -> Fit:
        """Take on the weights that reproduce the outputs best; call `project_` first, it is the start."""

    @abstractmethod
    def lowerings(self, size: Size, tolerance: float) -> tuple[Lowering, ...]:
        """Return the ways to run it in ONNX Runtime on inputs of this size; the fastest is measured.

        `tolerance` is the relative error that a way may have, where exactness costs time. None of them
        shares a tensor with the operator.
        """

    def at_its_slowest_(self) -> None:
        """Take on weights that take as long to run as any, where weights decide how long a lowering is."""
        return

    def warning(self) -> str | None:
        """Return in words what a user should know of the present weights; None if nothing."""
        return None


class Scalable(LowCostOp):
    """An operator whose output channels can be scaled by way of its weights."""

    @abstractmethod
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor`, one number per output channel, by way of the weights."""

    @abstractmethod
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of what makes each output channel, (C_out,)."""


class LinearOp(Scalable):
    """An operator that is linear in its input: a convolution with a structured kernel, plus a bias."""

    spec: ConvSpec
    one_scale: bool = False  # its output channels have their size in common

    @abstractmethod
    def dense_kernel(self) -> Tensor:
        """Return the equivalent dense kernel, (C_out, C_in, kh, kw)."""

    @abstractmethod
    def set_closest_(self, kernel: Tensor) -> None:
        """Take on the weights whose dense kernel is closest to `kernel`, (C_out, C_in, kh, kw)."""

    @torch.no_grad()
    def project_(self, original: nn.Module) -> Fit:
        """Take on the closest member of the family, and the bias of the convolution."""
        conv = as_conv(original)
        kernel = conv.weight.detach()
        self.set_closest_(kernel)
        bias: Tensor | None = getattr(self, "bias", None)
        if bias is not None and conv.bias is not None:
            bias.copy_(conv.bias)
        lost = (kernel - self.dense_kernel()).square()
        return Fit(how="weights", kernel_error=relative_error(lost, kernel.square()))

    @abstractmethod
    def statistics(self, *, free_means: bool) -> Any:
        """Return an empty accumulator of the Gram matrices of this operator's regressors."""

    @abstractmethod
    def free_weights(self) -> Any:
        """Return the non-redundant weights in float64, in the form that the Gram matrices take."""

    @abstractmethod
    def set_free_weights_(self, weights: Any) -> None:
        """Take on such weights."""

    @torch.no_grad()
    def fit_(self, statistics: Statistics) -> Fit:
        """Take on the ridge least-squares weights; the ridge pulls towards the present ones.

        The ridge is the one with the least error on held-out images; the weights then use all of them. Where
        none beats the start there, the start stays, and the ridge is None.
        """
        if not isinstance(statistics, SampledGrams):
            raise TypeError("these statistics were made by another kind of operator")
        found = statistics.best(self.free_weights())
        self.set_free_weights_(found.weights)
        bias: Tensor | None = getattr(self, "bias", None)
        if bias is not None:
            bias.copy_(found.moments.intercept(found.weights).flatten())
        return Fit(
            how="data",
            start_error=found.start_error,
            relative_error=found.relative_error,
            ridge=found.ridge,
            samples=found.moments.count,
        )

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of each output channel's equivalent dense kernel, (C_out,)."""
        norms: Tensor = torch.linalg.vector_norm(self.dense_kernel(), dim=(1, 2, 3))
        return norms


class Method(Frozen, ABC):
    """A frozen configuration: its fields are the hyperparameters that a recipe sets and a manifest keeps."""

    name: str
    formula: ClassVar[str]
    paper: ClassVar[str]
    kinds: ClassVar[frozenset[SiteKind]]
    by_name_only: ClassVar[frozenset[SiteKind]] = frozenset()  # kinds taken only where a rule spells one out
    fits_slowly: ClassVar[bool] = False  # by training on activations instead of a closed form
    shares: ClassVar[bool] = False  # a plan's group of it is one bank: operators that have weights in common

    def runs_as_dense(self, *, folded: bool) -> bool:  # noqa: ARG002  # for most it makes no difference
        """Whether its operators take the time of the dense convolutions that they replace.

        `folded`: a scale of the output channels goes into a BatchNorm behind.
        """
        return False

    @property
    def takes(self) -> frozenset[SiteKind]:
        """The kinds of sites that this configuration is about; what others are is for other rules to say."""
        return self.kinds

    @abstractmethod
    def why_not(self, spec: Spec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""

    @abstractmethod
    def cost(self, spec: Spec, size: Size) -> Cost:
        """Return the exact cost of the operator for one image of this size."""

    @abstractmethod
    def build(self, spec: Spec) -> LowCostOp:
        """Return the operator with freshly initialised weights."""

    def kept_pairs(self, spec: Spec) -> Tensor | None:  # noqa: ARG002  # most couple all alike
        """Return which pairs of channels stay coupled around the centre, bool (C_out, C_in); None: no such.

        By all taps or those of its stencil. Only in place of a convolution that `why_not` lets it take.
        """
        return None

    @classmethod
    def family(cls, spec: Spec) -> tuple[Self, ...]:  # noqa: ARG003  # most have one member
        """Return the configurations that a planner tries on `spec`, those that can't take it included."""
        return (cls(),)  # type: ignore[call-arg]  # a method has a default name

    def shared_params(self, spec: Spec) -> int:  # noqa: ARG002  # most have none
        """Return how many of the parameters in `cost` all operators of a bank have in common."""
        return 0

    def tie_(self, operators: Sequence[LowCostOp]) -> None:
        """Make the operators of a bank hold the same tensors for what they have in common."""

    def project_bank_(self, operators: Sequence[LowCostOp], originals: Sequence[nn.Module]) -> list[Fit]:
        """As `project_`, for all operators of a bank together."""
        return [op.project_(original) for op, original in zip(operators, originals, strict=True)]

    def fit_bank_(self, operators: Sequence[LowCostOp], statistics: Sequence[Statistics]) -> list[Fit]:
        """As `fit_`, for all operators of a bank together."""
        return [op.fit_(seen) for op, seen in zip(operators, statistics, strict=True)]

    def hyperparameters(self) -> Iterator[tuple[str, object]]:
        """Yield (name, value) of every hyperparameter."""
        return ((key, value) for key, value in self if key != "name")

    def __str__(self) -> str:
        """Return the method as it is written on the command line: `lcc.method_text` reads it."""
        changed = [
            f"{key}={_as_text(value)}"
            for key, value in self.hyperparameters()
            if value != type(self).model_fields[key].default
        ]
        return self.name + (f":{','.join(changed)}" if changed else "")


def _as_text(value: object) -> str:
    """Return a hyperparameter as on the command line; a method with commas in its own text as a table."""
    if isinstance(value, Method) and "," in str(value):
        fields = {"name": value.name} | value.model_dump(mode="json", exclude_defaults=True)
        return f"{{{', '.join(f'{key} = {json.dumps(part)}' for key, part in fields.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


METHODS: dict[str, type[Method]] = {}  # filled in lcc.methods, where all of them are known


def parse_method(value: Any) -> Method:
    """Return the method that a mapping with a `name` describes. Raises: ValueError with the known names."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a method is a table with a name, such as { name = "linear_mix" }')
    kind = METHODS.get(value["name"])
    if kind is None:
        raise ValueError(f"no method is called {value['name']!r}; known: {', '.join(METHODS)}")
    return kind.model_validate_json(json.dumps(value, default=str))  # a date is no value of any


# A tagged union that reads from the table: a field typed as the abstract Method would dump as {}.
AnyMethod = Annotated[SerializeAsAny[Method], PlainValidator(parse_method)]

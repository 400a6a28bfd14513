"""A method's contract with the rest of lcc: `Method` decides, `LowCostOp` computes, `Fit` reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor, nn

from lcc.specs import ConvSpec, Cost, Frozen, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

SiteKind = Literal["conv"]


class Fit(Frozen):
    """How an operator got its weights, and how far it is from what it replaces.

    Errors are relative: |got - wanted| / |wanted| over all numbers, per-channel means removed where a bias
    or a BatchNorm makes them free. None is not known. Activation errors are taken on held-out images.
    """

    how: Literal["weights", "data"]
    kernel_error: float | None = None
    start_error: float | None = None
    relative_error: float | None = None
    ridge: float | None = None
    samples: int = 0


class Statistics(Protocol):
    """What an operator wants to remember of its activations; fed batch by batch, never keeps them."""

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in (N, C_in, H, W) inputs and the (N, C_out, H', W') outputs the original gave for its own."""


class LowCostOp(nn.Module, ABC):
    """The module that stands in for a convolution: (N, C_in, H, W) -> (N, C_out, H', W').

    Carries the attributes that host networks read off a convolution.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec
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
    def project_(self, conv: nn.Conv2d) -> Fit:
        """Take on the member of the family closest to `conv`, from its weights alone."""

    @abstractmethod
    def statistics(self, *, free_means: bool) -> Statistics:
        """Return an empty accumulator; `free_means`: a BatchNorm follows, so output means don't matter."""

    @abstractmethod
    def fit_(self, statistics: Statistics) -> Fit:
        """Take on the weights that reproduce the outputs best; call `project_` first, it is the start."""

    @abstractmethod
    def scale_(self, factor: Tensor) -> None:
        """Multiply the output by `factor`, one number per output channel, by way of the weights."""

    @abstractmethod
    def weight_norms(self) -> Tensor:
        """Return the Euclidean norm of each output channel's weights, (C_out,)."""

    @abstractmethod
    def lower(self, size: Size) -> nn.Module:
        """Return the same function in operations that ONNX Runtime runs well, for inputs of this size."""


class Method(Frozen, ABC):
    """A frozen configuration: its fields are the hyperparameters that a recipe sets and a manifest keeps."""

    name: str
    formula: ClassVar[str]
    paper: ClassVar[str]
    kinds: ClassVar[frozenset[SiteKind]]

    @abstractmethod
    def why_not(self, spec: ConvSpec) -> str | None:
        """Return in words why this can't stand in for `spec`; None if it can."""

    @abstractmethod
    def cost(self, spec: ConvSpec, size: Size) -> Cost:
        """Return the exact cost of the operator for one image of this size."""

    @abstractmethod
    def build(self, spec: ConvSpec) -> LowCostOp:
        """Return the operator with freshly initialised weights."""

    def hyperparameters(self) -> Iterator[tuple[str, object]]:
        """Yield (name, value) of every hyperparameter."""
        return ((key, value) for key, value in self if key != "name")

    def __str__(self) -> str:
        changed = [
            f"{key}={value}"
            for key, value in self.hyperparameters()
            if value != type(self).model_fields[key].default
        ]
        return self.name + (f"({', '.join(changed)})" if changed else "")

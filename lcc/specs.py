"""The vocabulary: frozen descriptions of convolutions, residual steps and costs. No torch here."""

from __future__ import annotations

from itertools import groupby
from math import log2
from typing import Literal

from pydantic import BaseModel, ConfigDict

Activation = Literal["relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"]
SiteKind = Literal["conv", "step", "transition"]


class Frozen(BaseModel):
    """A value: immutable, closed to unknown keys, and the same after a trip through JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class Size(Frozen):
    """Height and width of a feature map, in pixels."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Cost(Frozen):
    """What an operator costs: stored numbers, and multiply-accumulates for one image. Exact integers."""

    params: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(params=self.params + other.params, macs=self.macs + other.macs)

    def cheaper_than(self, other: Cost) -> bool:
        """Whether this costs less in one respect and more in none."""
        return self != other and self.params <= other.params and self.macs <= other.macs


def fft_macs(points: int, *, real: bool) -> int:
    """Return what a Fourier transform of that many points counts: round(2.5 N log2 N) MACs, half if real."""
    return round((1.25 if real else 2.5) * points * log2(points))


class ConvSpec(Frozen):
    """A 2-d convolution, without its weights."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | Literal["same", "valid"] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"

    @property
    def margin(self) -> tuple[int, int]:
        """Padding in pixels above (and below) and left (and right); `same` is symmetric for odd kernels."""
        if self.padding == "valid":
            return (0, 0)
        if self.padding == "same":
            (kh, kw), (dh, dw) = self.kernel_size, self.dilation
            return (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
        return self.padding

    def out_size(self, size: Size) -> Size:
        """Size of the output for an input of this size."""
        if self.padding == "same":
            return size
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (size.height, size.width),
                self.margin,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        )
        return Size(height=height, width=width)

    @property
    def weights(self) -> int:
        """How many numbers the kernel has."""
        return (
            self.out_channels * (self.in_channels // self.groups) * self.kernel_size[0] * self.kernel_size[1]
        )

    @property
    def params(self) -> int:
        """How many parameters the convolution has, bias included."""
        return self.weights + (self.out_channels if self.bias else 0)

    def cost(self, size: Size) -> Cost:
        """Cost of the convolution itself on one image of this size; a bias costs parameters and no MACs."""
        return Cost(params=self.params, macs=self.weights * self.out_size(size).pixels)

    def __str__(self) -> str:
        text = f"{self.kernel_size[0]}x{self.kernel_size[1]} {self.in_channels}->{self.out_channels}"
        if self.stride != (1, 1):
            text += f" /{self.stride[0]}" if self.stride[0] == self.stride[1] else f" /{self.stride}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        return text


class StepSpec(Frozen):
    """A residual step post(x + F(x)) on (N, C, H, W), identity skip, stride 1: what F is made of.

    A transition is its stage-changing relative: post(S(x) + F(x)), or F(x) alone, with another width or a
    stride. `channels` come out, `in_channels` (None: as many) go in. `shortcut` is what S convolves with: it
    sees the input, or less where S pools first, and gives a map of the output's size.
    `convs` are F's convolutions in order of call, `squeeze` those (and linear layers) that see a map pooled
    to 1x1 (squeeze-and-excitation). `in_a_row`: each sees what the one before it gave, and nothing else.
    `norm_params` counts what its normalisations store, `batch_norms`: they are BatchNorms. `activation` is
    the first one inside F, if it is one of those with a name, `post` the one after the sum. `pre_norm`: F
    starts with its normalisation (pre-activation). `norm_eps` and `norm_momentum` are the first
    normalisation's. `drop_path` is the rate of its stochastic depth. Where nothing can take the step, `convs`
    is what was seen of it.
    """

    channels: int
    convs: tuple[ConvSpec, ...]
    squeeze: tuple[ConvSpec, ...] = ()
    in_a_row: bool = True
    norm_params: int = 0
    batch_norms: bool = True
    activation: Activation | None = "relu"
    post: Activation | None = None
    pre_norm: bool = False
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    drop_path: float = 0.0
    in_channels: int | None = None
    stride: tuple[int, int] = (1, 1)
    shortcut: tuple[ConvSpec, ...] = ()

    @property
    def is_transition(self) -> bool:
        """Whether the block changes width or size."""
        return self.channels_in != self.channels or self.stride != (1, 1)

    @property
    def channels_in(self) -> int:
        """How many channels go in."""
        return self.channels if self.in_channels is None else self.in_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """The largest kernel in F, (kh, kw)."""
        kernels = (conv.kernel_size for conv in self.convs)
        return max(kernels, key=lambda kernel: kernel[0] * kernel[1], default=(1, 1))

    @property
    def params(self) -> int:
        """How many parameters the step has, normalisations included."""
        convs = (*self.convs, *self.squeeze, *self.shortcut)
        return sum(conv.params for conv in convs) + self.norm_params

    def out_size(self, size: Size) -> Size:
        """Size of the output: the input's, but for a stride."""
        return Size(height=-(-size.height // self.stride[0]), width=-(-size.width // self.stride[1]))

    def cost(self, size: Size) -> Cost:
        """Cost of the step itself on one image of this size."""
        one = Size(height=1, width=1)
        macs = sum(conv.cost(one).macs for conv in self.squeeze)
        macs += sum(conv.weights * self.out_size(size).pixels for conv in self.shortcut)
        for conv in self.convs:
            macs += conv.cost(size).macs
            size = conv.out_size(size) if self.is_transition else size
        return Cost(params=self.params, macs=macs)

    def __str__(self) -> str:
        parts: list[str] = []
        for text, alike in groupby(_in_a_step(conv) for conv in self.convs):
            count = len(list(alike))
            parts += [text] * count if count < 3 else [f"{count} times {text}"]
        squeeze = f", squeeze {self.squeeze[0].out_channels}" if self.squeeze else ""
        if not self.is_transition:
            return f"step {self.channels}: {', '.join(parts)}{squeeze}"
        stride = f" /{self.stride[0]}" if self.stride != (1, 1) else ""
        return f"transition {self.channels_in}->{self.channels}{stride}: {', '.join(parts)}{squeeze}"


def kind_of(spec: ConvSpec | StepSpec) -> SiteKind:
    """Return what kind of site is described so."""
    if isinstance(spec, ConvSpec):
        return "conv"
    return "transition" if spec.is_transition else "step"


def _in_a_step(conv: ConvSpec) -> str:
    """Return a convolution in few words: its kernel, and how many channels it gives."""
    text = f"{conv.kernel_size[0]}x{conv.kernel_size[1]} {conv.out_channels}"
    if conv.groups == 1:
        return text
    return f"{text} depthwise" if conv.groups == conv.in_channels else f"{text} groups {conv.groups}"

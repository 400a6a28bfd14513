"""What the contract suite runs every method on: a new method is a new entry in every table."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from draws import random
from hypothesis import strategies as st
from mgic_reference import mgic_reference
from reference import circulant_reference, linear_mix_reference, shared_reference
from step_reference import step_reference
from torch import nn

from lcc.methods import METHODS, LinearOp, Method
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.methods.shared import Shared
from lcc.specs import ConvSpec, Size, StepSpec

SIZE = Size(height=9, width=7)


class Case(NamedTuple):
    method: Method
    spec: ConvSpec | StepSpec

    def __str__(self) -> str:
        return f"{self.method} on {self.spec}".replace(" ", "-")


def conv(channels, kernel=(3, 3), out=None, **options) -> ConvSpec:
    return ConvSpec(in_channels=channels, out_channels=out or channels, kernel_size=kernel, **options)


def step(channels, kernel=(3, 3), **options) -> StepSpec:
    """A basic block of a ResNet: two convolutions, each with a BatchNorm."""
    inner = conv(channels, kernel, padding=tuple(k // 2 for k in kernel))
    return StepSpec(channels=channels, convs=(inner, inner), norm_params=4 * channels, **options)


def block(*widths, kernels, depthwise=None, stride=1, squeeze=0, shortcut=False, **options) -> StepSpec:
    """Convolutions from width to width, each with a BatchNorm; the first one that is not 1x1 has the stride.

    `depthwise` is the number of one that is. `squeeze`: squeeze-and-excitation has so many hidden channels.
    """
    strided = next(number for number, k in enumerate(kernels) if k > 1)
    convs = tuple(
        conv(
            wide,
            (k, k),
            out=out,
            padding=(k // 2, k // 2),
            groups=wide if number == depthwise else 1,
            stride=(stride, stride) if number == strided else (1, 1),
        )
        for number, ((wide, out), k) in enumerate(zip(pairwise(widths), kernels, strict=True))
    )
    gated = widths[-1] if depthwise is None else widths[depthwise]
    gate = (conv(gated, (1, 1), out=squeeze, bias=True), conv(squeeze, (1, 1), out=gated, bias=True))
    beside = conv(widths[0], (1, 1), out=widths[-1], stride=(stride, stride))
    return StepSpec(
        channels=widths[-1],
        in_channels=widths[0],
        stride=(stride, stride),
        convs=convs,
        squeeze=gate if squeeze else (),
        shortcut=(beside,) if shortcut else (),
        norm_params=2 * sum(widths[1:]) + 2 * widths[-1] * shortcut,
        **options,
    )


# The padded 3x3 convolution of a ResNet, and everything that makes one different.
SHAPES = (
    conv(4, padding=(1, 1)),
    conv(4, padding=(1, 1), bias=True),
    conv(4, padding=(1, 1), stride=(2, 2)),
    conv(4, padding=(2, 2), dilation=(2, 2), bias=True),
    conv(4, padding=(0, 0), stride=(2, 1)),
    conv(4, padding=(3, 2), kernel=(3, 5)),
    conv(4, padding="same", kernel=(5, 3), bias=True),
    conv(4, padding="valid"),
    conv(4, padding=(1, 1), padding_mode="reflect", bias=True),
    conv(4, padding=(2, 1), padding_mode="circular", stride=(1, 2)),
    conv(4, padding=(1, 1), padding_mode="replicate"),
)

STEPS = (
    step(4, post="relu"),
    step(5),
    step(4, kernel=(5, 3), post="gelu", norm_eps=1e-3, norm_momentum=0.01),
    step(4, kernel=(1, 1), pre_norm=True),
)

BOTTLENECK = block(8, 4, 4, 8, kernels=(1, 3, 1), post="relu")
INVERTED = block(4, 12, 12, 4, kernels=(1, 3, 1), depthwise=1, squeeze=6, activation="hardswish")
BLOCKS = (
    BOTTLENECK,
    INVERTED,
    block(4, 8, 8, 4, kernels=(1, 5, 1), depthwise=1, activation="relu6", norm_momentum=None),
    block(4, 4, 4, kernels=(3, 1), depthwise=0, squeeze=3, activation="silu"),
    block(8, 8, 8, kernels=(3, 3), squeeze=8, post="relu"),
    block(4, 8, 8, kernels=(3, 3), stride=2, shortcut=True, post="relu"),
    block(8, 4, 4, 16, kernels=(1, 3, 1), stride=2, shortcut=True, post="relu"),
    block(6, 4, 4, kernels=(3, 3), shortcut=True, post="relu"),
    block(6, 12, 12, 4, kernels=(1, 3, 1), depthwise=1, stride=2, activation="relu6"),
)

MGIC = Mgic(group_size=2, coarsest=2, transitions=True)

CASES: dict[str, tuple[Case, ...]] = {
    "linear_mix": (
        *(Case(LinearMix(), spec) for spec in SHAPES),
        *(Case(LinearMix(group_size=2, stencil="cross"), spec) for spec in SHAPES),
        *(Case(LinearMix(stencil="horizontal"), spec) for spec in SHAPES[:6]),
        *(Case(LinearMix(group_size=4, stencil="vertical"), spec) for spec in SHAPES[:6]),
        Case(LinearMix(change_channels=True), conv(3, out=6, padding=(1, 1), stride=(2, 2))),
        Case(LinearMix(group_size=2, change_channels=True), conv(6, out=3, padding=(1, 1), bias=True)),
    ),
    "circulant": (
        *(Case(Circulant(), spec) for spec in SHAPES),
        Case(Circulant(), conv(2, padding=(1, 1), bias=True)),
        Case(Circulant(), conv(3, padding=(1, 1), bias=True, stride=(2, 2))),
        Case(Circulant(), conv(7, padding=(2, 1), kernel=(4, 3))),
        Case(Circulant(), conv(6, padding="same", kernel=(2, 4), bias=True)),
        Case(Circulant(), conv(5, padding="same", kernel=(4, 2), padding_mode="circular")),
    ),
    "rd_explicit": (
        *(Case(RdExplicit(), spec) for spec in STEPS),
        Case(RdExplicit(step=0.5, learn_step=True, kernel_size=5), step(3, post="relu")),
        Case(RdExplicit(), conv(4, padding=(1, 1))),
    ),
    "rd_implicit": (
        *(Case(RdImplicit(), spec) for spec in STEPS),
        Case(RdImplicit(step=0.5, learn_step=True, kernel_size=5), step(3, post="relu")),
        Case(RdImplicit(stiffness=math.inf), step(3, post="relu")),
        Case(RdImplicit(), conv(4, padding=(1, 1))),
    ),
    "rd_circulant": (
        *(Case(RdCirculant(), spec) for spec in STEPS),
        Case(RdCirculant(step=0.5, learn_step=True, kernel_size=5), step(3, post="relu")),
        Case(RdCirculant(boundary="periodic"), step(3, post="relu")),
        Case(RdCirculant(boundary="periodic"), step(4, kernel=(3, 5))),
        Case(RdCirculant(), conv(4, padding=(1, 1))),
    ),
    "shared": (
        *(Case(Shared(), spec) for spec in SHAPES),
        *(Case(Shared(scale=True), spec) for spec in SHAPES[:5]),
        Case(Shared(), conv(6, out=4, padding=(1, 1), groups=2, bias=True)),
        Case(Shared(scale=True), conv(4, kernel=(4, 2), padding=(1, 0), groups=4)),
        Case(Shared(), conv(4, kernel=(1, 1), out=6, bias=True)),
        Case(Shared(method=LinearMix()), SHAPES[1]),
        Case(Shared(scale=True, method=LinearMix(group_size=2, stencil="cross")), SHAPES[2]),
    ),
    "mgic": (
        *(Case(Mgic(group_size=2, coarsest=2), spec) for spec in SHAPES),
        *(Case(Mgic(group_size=2, coarsest=2), STEPS[number]) for number in (0, 2)),
        *(Case(MGIC, spec) for spec in BLOCKS),
        *(Case(MGIC.model_copy(update={"as_released": True}), spec) for spec in BLOCKS),
        Case(Mgic(), STEPS[0]),
        Case(Mgic(), conv(4, padding=(1, 1))),
        Case(Mgic(group_size=2, coarsest=2, change_channels=True), conv(4, out=6, padding=(1, 1), bias=True)),
        Case(Mgic(change_channels=True), conv(6, out=3, padding=(1, 1), stride=(2, 2))),
    ),
}
ORACLES = {
    "linear_mix": linear_mix_reference,
    "circulant": circulant_reference,
    "mgic": mgic_reference,
    "shared": shared_reference,
    **dict.fromkeys(("rd_explicit", "rd_implicit", "rd_circulant"), step_reference),
}
KERNELS = st.sampled_from([None, 3, 4, 5])
# Random configurations, for the test of eligibility.
METHOD_STRATEGIES = {
    "linear_mix": st.builds(
        LinearMix,
        group_size=st.integers(1, 4),
        stencil=st.sampled_from(["square", "cross", "horizontal", "vertical"]),
        change_channels=st.booleans(),
    ),
    "circulant": st.just(Circulant()),
    "rd_explicit": st.builds(RdExplicit, learn_step=st.booleans(), kernel_size=KERNELS),
    "rd_implicit": st.builds(RdImplicit, stiffness=st.sampled_from([math.inf, 0.1]), kernel_size=KERNELS),
    "rd_circulant": st.builds(
        RdCirculant, boundary=st.sampled_from(["zeros", "periodic"]), kernel_size=KERNELS
    ),
    "mgic": st.builds(
        Mgic,
        group_size=st.integers(1, 3),
        coarsest=st.integers(2, 4),
        form=st.sampled_from(["both", "block", "conv"]),
        transitions=st.booleans(),
        change_channels=st.booleans(),
        as_released=st.booleans(),
    ),
    "shared": st.builds(
        Shared, scale=st.booleans(), method=st.sampled_from([None, LinearMix(), LinearMix(group_size=2)])
    ),
}
# Which cases go through ONNX Runtime, by index.
ONNX = {
    "linear_mix": (1, 8, 13),
    "circulant": (1, 2, 8, 12, 14),
    "rd_explicit": (0, 2, 4, 5),
    "rd_implicit": (0, 2, 4, 5, 6),
    "rd_circulant": (0, 1, 4, 6, 7),
    "mgic": (1, 2, 8, 9, *range(11, 22), 23, 25, 33, 34),
    "shared": (1, 11, 16, 17, 20),
}
# Whose output channels share one scale.
ONE_SCALE = {"circulant"}


def is_exact(case: Case) -> bool:
    """Whether the operator can be what it replaces: a bank of one with a dense kernel."""
    return isinstance(case.method, Shared) and case.method.method is None


EVERY = [case for cases in CASES.values() for case in cases]
# Linear in the input and in the weights, so that a projection exists.
CLOSED_FORMS = [case for case in EVERY if isinstance(case.method.build(case.spec), LinearOp)]
ON_CONVS = [case for case in EVERY if isinstance(case.spec, ConvSpec)]
ONNX_CASES = [CASES[name][index] for name, chosen in ONNX.items() for index in chosen]

CONV_SPECS = st.builds(
    ConvSpec,
    in_channels=st.integers(1, 6),
    out_channels=st.integers(1, 6),
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.just("valid"), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "replicate"]),
)
STEP_SPECS = st.builds(
    step,
    st.integers(1, 6),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    activation=st.sampled_from(["relu", "silu"]),
    post=st.sampled_from([None, "relu", "gelu"]),
    pre_norm=st.booleans(),
    drop_path=st.sampled_from([0.0, 0.2]),
)
TRANSITION_SPECS = st.builds(
    lambda c_in, c_out, kernel, **options: block(c_in, c_out, c_out, kernels=(kernel, 3), **options),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(2, 5),
    stride=st.integers(1, 2),
    shortcut=st.booleans(),
    post=st.sampled_from([None, "relu"]),
).filter(lambda spec: spec.is_transition)
SPECS = {"conv": CONV_SPECS, "step": STEP_SPECS, "transition": TRANSITION_SPECS}
# Every method on every kind of site that it takes.
METHODS_BY_KIND = [(name, kind) for name, method in METHODS.items() for kind in sorted(method.kinds)]


ACTIVATIONS = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
}


class Step(nn.Module):
    """A residual step as the spec says, for methods to replace: x + F(x), then the activation after it.

    A transition adds S(x), or nothing.
    """

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        gated = [number for number, conv in enumerate(spec.convs) if conv.groups > 1] or [len(spec.convs) - 1]
        self.inner = nn.Sequential()
        for number, conv in enumerate(spec.convs):
            if spec.pre_norm:
                self.inner.append(nn.BatchNorm2d(conv.in_channels))
                self.inner.append(ACTIVATIONS[spec.activation]())
            self.inner.append(_conv(conv))
            if not spec.pre_norm:
                self.inner.append(nn.BatchNorm2d(conv.out_channels))
                if conv is not spec.convs[-1]:
                    self.inner.append(ACTIVATIONS[spec.activation]())
            if spec.squeeze and number in gated:
                self.inner.append(_Gate(spec))
        shortcut = [part for conv in spec.shortcut for part in (_conv(conv), nn.BatchNorm2d(spec.channels))]
        self.shortcut = nn.Sequential(*shortcut)
        self.adds = bool(shortcut) or not spec.is_transition
        self.post = ACTIVATIONS[spec.post]()

    def forward(self, x):
        y = self.inner(x)
        return self.post(self.shortcut(x) + y[:, :, : x.shape[2], : x.shape[3]] if self.adds else y)


class _Gate(nn.Module):
    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.squeeze, self.excite = map(_conv, spec.squeeze)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def _conv(spec: ConvSpec) -> nn.Conv2d:
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
    )


def original(spec: ConvSpec | StepSpec, *, seed=0) -> nn.Module:
    """Return what a method replaces, in float64 and eval mode, with random weights and statistics."""
    torch.manual_seed(seed)
    return perturbed(_conv(spec) if isinstance(spec, ConvSpec) else Step(spec))


def operator(case, *, seed=1):
    """Return the operator likewise."""
    torch.manual_seed(seed)
    return perturbed(case.method.build(case.spec))


@torch.no_grad()
def perturbed(module):
    """Move what a fresh module may hold at zero or one, where errors do not show."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_()
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
    return module.double().eval()


def channels_of(spec):
    return spec.in_channels if isinstance(spec, ConvSpec) else spec.channels_in


def inputs(spec, count=2, *, seed=2, size=SIZE):
    return random(count, channels_of(spec), size.height, size.width, seed=seed)


def smooth_inputs(spec, count=40):
    """Channels that depend on each other and pixels that depend on their neighbours, as in a network."""
    white = inputs(spec, count)
    mixing = torch.randn(channels_of(spec), channels_of(spec), dtype=torch.float64)
    mixed = torch.einsum("ij,njhw->nihw", mixing, white)
    return nn.functional.avg_pool2d(mixed, 3, stride=1, padding=1) + 0.3

"""What an MGIC block is made of: the host's block at every width, and the transfers between widths.

Source: arXiv:2011.09128 and its released code (MIT), from which `as_released` takes over the quirks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from lcc.ops.multigrid import levels, why_no_levels
from lcc.specs import ConvSpec, Cost, StepSpec

if TYPE_CHECKING:
    from lcc.specs import Size

Gate = Literal["sigmoid", "hardsigmoid"]
RELEASED_REDUCTION = 4  # of squeeze-and-excitation, in the released networks
RELEASED_MULTIPLE = 8


class BlockLevel(NamedTuple):
    """The block at one level, and R and P between its width and the next; None at the coarsest."""

    step: StepSpec
    down: ConvSpec | None = None
    up: ConvSpec | None = None


class Design(NamedTuple):
    """An MGIC block in place of a residual step, or of a stage-changing block.

    `opening` changes width and size beforehand, and with `opens_normed` a BatchNorm and an activation follow
    it. `gated`: squeeze-and-excitation comes after that convolution of each level; `gates_first`: before its
    activation. `norms_down`: a BatchNorm follows R. `skips_twice`: relu(F(u) + u) + u, not F(u) + u.
    `clips_coarsest`: relu(F(u)) + u at the coarsest level.
    """

    levels: tuple[BlockLevel, ...]
    opening: ConvSpec | None = None
    opens_normed: bool = False
    gated: int | None = None
    gate: Gate = "sigmoid"
    gates_first: bool = False
    norms_down: bool = False
    skips_twice: bool = False
    clips_coarsest: bool = False

    def cost(self, size: Size) -> Cost:
        """Return the exact cost for one image that comes in with this size; normalisations cost no MACs."""
        total = Cost(params=0, macs=0)
        if self.opening is not None:
            total += self.opening.cost(size)
            total += Cost(params=2 * self.opening.out_channels * self.opens_normed, macs=0)
            size = self.opening.out_size(size)
        for level in self.levels:
            total += level.step.cost(size)
            if level.down is not None and level.up is not None:
                normed = level.up.out_channels + level.down.out_channels * self.norms_down
                total += level.down.cost(size) + level.up.cost(size) + Cost(params=2 * normed, macs=0)
        return total


def why_no_design(spec: StepSpec, coarsest: int) -> str | None:
    """Return in words why there is no MGIC block for a step or a stage-changing block; None if there is."""
    if not spec.in_a_row:
        return "its convolutions are not in one row"
    if spec.pre_norm:
        return "begins with its normalisation, and a block's convolutions come before theirs"
    widths = (spec.channels_in, *(conv.out_channels for conv in spec.convs))
    if widths[:-1] != tuple(conv.in_channels for conv in spec.convs) or widths[-1] != spec.channels:
        return "its convolutions do not take what the ones before them give"
    if spec.channels_in != spec.channels and spec.convs and is_depthwise(spec.convs[0]):
        return "begins with a depthwise convolution, and a block begins with the new width"
    normed, more = (2 * sum(c.out_channels for c in convs) for convs in (spec.convs, spec.shortcut))
    if spec.norm_params not in (normed, normed + more):
        return "does not have one normalisation after each convolution"
    if not spec.batch_norms:
        return "its normalisations are no BatchNorms, and a block's are"
    if spec.activation is None and len(spec.convs) > 1:
        return "its activation is none of those with a name"
    return _why_not_convs(spec) or _why_not_squeeze(spec) or why_no_levels(*_halved(spec, coarsest))


def design(spec: StepSpec, group_size: int, coarsest: int, *, as_released: bool) -> Design:
    """Return the block for a step or a stage-changing block that `why_no_design` says nothing against."""
    inverted = any(is_depthwise(conv) for conv in spec.convs)
    base, _, *others = _halved(spec, coarsest)
    hierarchy = levels(base, group_size, coarsest, *others, spec.channels // 2)
    found = []
    for depth, level in enumerate(hierarchy):
        step = _at_level(spec, depth, level.groups, as_released=as_released)
        if depth == len(hierarchy) - 1:
            found.append(BlockLevel(step))
            break
        fine, coarse = step.channels, step.channels // 2
        found.append(
            BlockLevel(
                step,
                _pointwise(fine, coarse, groups=level.groups),
                _pointwise(coarse, fine, groups=level.groups),
            )
        )
    opening = _opening(spec, inverted=inverted) if spec.is_transition else None
    gated = _gated(spec)
    return Design(
        levels=tuple(found),
        opening=opening,
        opens_normed=opening is not None and opening.kernel_size != (1, 1),
        gated=gated,
        gate=_gate(spec),
        gates_first=as_released and gated is not None and spec.convs[gated].in_channels != spec.channels,
        norms_down=as_released and inverted,
        skips_twice=as_released and inverted,
        clips_coarsest=as_released and not inverted and base < spec.channels,
    )


def is_depthwise(conv: ConvSpec) -> bool:
    """Whether each channel is convolved alone."""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def _why_not_convs(spec: StepSpec) -> str | None:
    for conv in spec.convs:
        kh, kw = conv.kernel_size
        if conv.groups > 1 and not is_depthwise(conv):
            return f"has a convolution that is grouped already ({conv.groups} groups)"
        if kh % 2 == 0 or kw % 2 == 0:
            return f"even kernel {kh}x{kw}, which shifts the image"
        if not spec.is_transition and (conv.stride != (1, 1) or conv.margin != _margin(conv)):
            return "a convolution in it changes the size"
    return None


def _why_not_squeeze(spec: StepSpec) -> str | None:
    if not spec.squeeze:
        return None
    fits = len(spec.squeeze) == 2 and all(conv.weights == _full(conv) for conv in spec.squeeze)
    first, last = spec.squeeze[0], spec.squeeze[-1]
    if not fits or first.in_channels != last.out_channels or first.out_channels != last.in_channels:
        return "its layers on the pooled map are no squeeze-and-excitation"
    if all(conv.out_channels != first.in_channels for conv in spec.convs):
        return f"its squeeze-and-excitation sees {first.in_channels} channels, which no convolution gives"
    return None


def _full(conv: ConvSpec) -> int:
    return conv.in_channels * conv.out_channels


def _margin(conv: ConvSpec) -> tuple[int, int]:
    """Return the padding with which a convolution keeps the size."""
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    return (dh * (kh - 1) // 2, dw * (kw - 1) // 2)


def _halved(spec: StepSpec, coarsest: int) -> tuple[int, ...]:
    """Return the width by which levels and groups are told, `coarsest`, and the widths that halve with it.

    It is the narrowest: a bottleneck's inner width, the channels of an inverted residual.
    """
    widths = sorted({spec.channels, *(conv.out_channels for conv in spec.convs)})
    return (widths[0], coarsest, *widths[1:])


def _at_level(spec: StepSpec, depth: int, groups: int, *, as_released: bool) -> StepSpec:
    """Return the block at a level: widths halved `depth` times, stride 1, no bias before a normalisation."""
    entering = (spec.channels, *(conv.out_channels for conv in spec.convs))
    convs = tuple(
        ConvSpec(
            in_channels=wide >> depth,
            out_channels=conv.out_channels >> depth,
            kernel_size=conv.kernel_size,
            padding=_margin(conv),
            dilation=conv.dilation,
            groups=conv.out_channels >> depth if is_depthwise(conv) else groups,
            padding_mode=conv.padding_mode,
        )
        for conv, wide in zip(spec.convs, entering, strict=False)
    )
    return StepSpec(
        channels=spec.channels >> depth,
        convs=convs,
        squeeze=_squeeze(spec, depth, as_released=as_released),
        norm_params=2 * sum(conv.out_channels for conv in convs),
        activation=spec.activation,
        post=spec.post,
        norm_eps=spec.norm_eps,
        norm_momentum=spec.norm_momentum,
    )


def _squeeze(spec: StepSpec, depth: int, *, as_released: bool) -> tuple[ConvSpec, ...]:
    if not spec.squeeze:
        return ()
    down, up = spec.squeeze
    wide = down.in_channels >> depth
    narrow = _rounded(wide / RELEASED_REDUCTION) if as_released else max(down.out_channels >> depth, 1)
    return (_pointwise(wide, narrow, bias=down.bias), _pointwise(narrow, wide, bias=up.bias))


def _rounded(width: float) -> int:
    """Return the multiple of 8 next to a width, by no more than a tenth below it."""
    nearest = max(
        RELEASED_MULTIPLE, int(width + RELEASED_MULTIPLE / 2) // RELEASED_MULTIPLE * RELEASED_MULTIPLE
    )
    return nearest if nearest >= 0.9 * width else nearest + RELEASED_MULTIPLE


def _gated(spec: StepSpec) -> int | None:
    """Return after which convolution the gate comes: a depthwise one, else the last of its width."""
    if not spec.squeeze:
        return None
    fitting = [n for n, conv in enumerate(spec.convs) if conv.out_channels == spec.squeeze[0].in_channels]
    return next((n for n in reversed(fitting) if is_depthwise(spec.convs[n])), fitting[-1])


def _gate(spec: StepSpec) -> Gate:
    """Return the function of the gate, which a spec does not say: MobileNetV3's is a hard sigmoid.

    What has depthwise convolutions and relu or hardswish is taken for one of those.
    """
    is_mobile = any(is_depthwise(conv) for conv in spec.convs) and spec.activation in ("relu", "hardswish")
    return "hardsigmoid" if is_mobile else "sigmoid"


def _opening(spec: StepSpec, *, inverted: bool) -> ConvSpec:
    """Return what changes width and size: grouped in a ResNet's block, a dense 1x1 in others."""
    if inverted or spec.kernel_size == (1, 1) or spec.channels % spec.channels_in:
        return _pointwise(spec.channels_in, spec.channels, stride=spec.stride)
    kh, kw = spec.kernel_size
    return ConvSpec(
        in_channels=spec.channels_in,
        out_channels=spec.channels,
        kernel_size=(kh, kw),
        stride=spec.stride,
        padding=(kh // 2, kw // 2),
        groups=spec.channels_in,
    )


def _pointwise(
    wide: int, narrow: int, *, groups: int = 1, bias: bool = False, stride: tuple[int, int] = (1, 1)
) -> ConvSpec:
    return ConvSpec(
        in_channels=wide,
        out_channels=narrow,
        kernel_size=(1, 1),
        stride=stride,
        groups=groups,
        bias=bias,
    )

"""Where an MGIC block starts from: the original's weights, aggregated to every width.

R averages pairs of channels and P repeats them, N_l leaves the correction as it is. The kernels of a level
are what lies inside its groups of A W A^+, where A averages the channels that became one; norms and squeezes
are averaged likewise, and what a coarser block adds counts `COARSE_SHARE`. R and P as averages are what
arXiv:2011.09128 means; the rest of the start is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from lcc.methods.mgic_design import is_depthwise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcc.methods.mgic_block import Block, Cycle
    from lcc.specs import ConvSpec, StepSpec

# Undiminished, the levels add up what is in all of them: over the steps of the demo's ResNet-20 (groups of 8)
# the mean error of the start is 0.76 with 1, 0.64 with 1/4, 0.61 with 0; the regression at layer2.1 ends at
# 0.202, 0.195, 0.193. A share that is not zero gives the coarse kernels a gradient from the first step.
COARSE_SHARE = 0.25

_Layer = nn.Conv2d | nn.Linear
_Norm = _NormBase | nn.GroupNorm


class _Original:
    """What a block is made of: its layers told apart by their shapes, in order of registration.

    Of several norms as wide, a convolution's is the first that is registered after it.
    """

    def __init__(self, spec: StepSpec, original: nn.Module) -> None:
        parts = list(original.modules())
        layers = [m for m in parts if isinstance(m, _Layer)]
        norms = [m for m in parts if isinstance(m, _Norm)]
        self.convs = [_take(layers, conv) for conv in spec.convs]
        self.norms = [
            _take_norm(norms, conv.out_channels, parts[parts.index(layer) :])
            for conv, layer in zip(spec.convs, self.convs, strict=True)
        ]
        self.squeeze = [_take(layers, conv) for conv in spec.squeeze]
        pointwise = [conv for conv in spec.shortcut if conv.kernel_size == (1, 1)]
        self.shortcut = _take(layers, pointwise[0]) if pointwise else None
        normed = spec.norm_params > 2 * sum(conv.out_channels for conv in spec.convs)
        self.shortcut_norm = _take_norm(norms, spec.channels, norms) if pointwise and normed else None


def start_(cycle: Cycle, spec: StepSpec, original: nn.Module) -> None:
    """Give every weight of the cycle its start. Raises: TypeError: `original` is not what `spec` says."""
    found = _Original(spec, original)
    if cycle.opening is not None:
        _start_opening_(cycle, found)
    for level in cycle.levels():
        average = _average(level.down.in_channels, level.down.out_channels)
        _set_kernel_(level.down, average[:, :, None, None])
        _set_kernel_(level.up, torch.linalg.pinv(average)[:, :, None, None])
        _reset_(level.up_norm)
        if level.down_norm is not None:
            _reset_(level.down_norm)
    for depth, block in enumerate(cycle.blocks()):
        _start_block_(block, spec, found)
        if depth > 0:
            _, last = list(block.layers())[-1]
            last.weight.mul_(COARSE_SHARE)
            last.bias.mul_(COARSE_SHARE)


def _start_block_(block: Block, spec: StepSpec, found: _Original) -> None:
    for number, (conv, norm) in enumerate(block.layers()):
        source = found.convs[number]
        _aggregate_(conv, source, depthwise=is_depthwise(spec.convs[number]))
        _aggregate_norm_(norm, found.norms[number], source.bias)
    if block.gate is not None:
        for conv, source in zip((block.gate.squeeze, block.gate.excite), found.squeeze, strict=True):
            _aggregate_(conv, source, depthwise=False)
            if conv.bias is not None and source.bias is not None:
                conv.bias.copy_(_averaged(source.bias, len(conv.bias)))


def _start_opening_(cycle: Cycle, found: _Original) -> None:
    """Let the opening be the shortcut's convolution as far as its groups go, or repeat and average channels.

    Followed by no norm, it takes in the shortcut's scale.
    """
    opening, norm = cycle.opening, cycle.opening_norm
    assert opening is not None
    if found.shortcut is None:
        matrix = _average(opening.in_channels, opening.out_channels)
    else:
        matrix = _kernel(found.shortcut)[:, :, 0, 0].cpu()
    if norm is not None:
        _reset_(norm)
    if found.shortcut_norm is not None:
        if norm is None:
            matrix = matrix * _scale(found.shortcut_norm).cpu()[:, None]
        else:
            assert found.shortcut is not None
            _aggregate_norm_(norm, found.shortcut_norm, found.shortcut.bias)
    (kh, kw) = opening.kernel_size
    _set_kernel_(opening, F.pad(matrix[:, :, None, None], (kw // 2, kw // 2, kh // 2, kh // 2)))


def _aggregate_(conv: nn.Conv2d, source: _Layer, *, depthwise: bool) -> None:
    """Give a convolution the kernel of a wider one, averaged to its width, inside its groups."""
    kernel = _kernel(source)
    rows = _average(len(kernel), conv.out_channels).to(kernel.device)
    kernel = torch.einsum("po,oikl->pikl", rows, kernel)
    if depthwise:
        conv.weight.copy_(kernel)
        return
    columns = torch.linalg.pinv(_average(kernel.shape[1], conv.in_channels)).to(kernel.device)
    _set_kernel_(conv, torch.einsum("oikl,ij->ojkl", kernel, columns))


def _set_kernel_(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Give a grouped convolution what lies inside its groups of a dense kernel (C_out, C_in, kh, kw)."""
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    inside = [kernel[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(conv.groups)]
    conv.weight.copy_(torch.cat(inside))


def _aggregate_norm_(norm: nn.BatchNorm2d, source: _Norm, bias: Tensor | None) -> None:
    """Give a norm the averages of a wider one; a bias before that goes into the mean."""
    _reset_(norm)
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(source, name, None)
        if values is not None:
            if name == "running_mean" and bias is not None:
                values = values - bias
            getattr(norm, name).copy_(_averaged(values, norm.num_features))


def _reset_(norm: nn.BatchNorm2d) -> None:
    """Make a norm do nothing, but for its eps."""
    norm.reset_running_stats()
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _average(wide: int, narrow: int) -> Tensor:
    """Return the (narrow, wide) matrix that averages neighbours, or repeats them, in float64."""
    matrix: Tensor = F.adaptive_avg_pool1d(torch.eye(wide, dtype=torch.float64), narrow).T
    return matrix


def _averaged(values: Tensor, narrow: int) -> Tensor:
    averaged: Tensor = F.adaptive_avg_pool1d(values.detach().double()[None], narrow)[0]
    return averaged


def _kernel(layer: _Layer) -> Tensor:
    """Return the kernel of a convolution or linear layer in float64, (C_out, C_in / G, kh, kw)."""
    weight = layer.weight.detach().double()
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _scale(norm: _Norm) -> Tensor:
    """Return by what a norm in eval mode multiplies, in float64; without statistics, its weight."""
    weight = norm.weight.detach().double()
    variance = getattr(norm, "running_var", None)
    return weight if variance is None else weight / (variance.double() + norm.eps).sqrt()


def _take(layers: list[_Layer], spec: ConvSpec) -> _Layer:
    """Take the first layer of a shape out of the list. Raises: TypeError: there is none."""
    shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
    for layer in layers:
        if tuple(_kernel(layer).shape) == shape and getattr(layer, "stride", (1, 1)) == spec.stride:
            layers.remove(layer)
            return layer
    raise TypeError(f"holds no convolution {spec}")


def _take_norm(norms: list[_Norm], channels: int, rather: Sequence[nn.Module]) -> _Norm:
    """Take the first norm of a width out of the list, rather of some. Raises: TypeError: there is none."""
    wide = [n for n in norms if getattr(n, "num_features", getattr(n, "num_channels", None)) == channels]
    if not wide:
        raise TypeError(f"holds no normalisation of {channels} channels")
    norm = next((norm for norm in wide if norm in rather), wide[0])
    norms.remove(norm)
    return norm

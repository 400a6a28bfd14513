"""Inner channels put into the order in which convolutions keep most inside their channel groups.

An operator that couples channels in groups drops the taps around the centre between channels of different
groups. Which channels meet in a group is free wherever a convolution feeds only another: the Hungarian method
finds the order in which the two keep the most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lcc.inner_channels import inner_pairs, settle_
from lcc.specs import ConvSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lcc.inner_channels import InnerPair
    from lcc.methods import Method
    from lcc.plan import Site

ROUNDS = 10  # over all pairs; basic blocks settle in one, bottlenecks within five
LEAST_GAIN = 1e-3  # of what a pair keeps; less is not worth a change of places
TINY = 1e-30


class Grouping(NamedTuple):
    """Which share of the kernels around their centres is between channels of one group, before and after.

    By energy, averaged over the convolutions.

    `orders`: for each convolution of which outputs changed places, which of them comes at each place.
    """

    before: float
    after: float
    orders: dict[str, tuple[int, ...]]


def kept_pairs(sites: Sequence[Site], methods: Mapping[str, Sequence[Method]]) -> dict[str, Tensor]:
    """Return by site which pairs of channels stay coupled, (C_out, C_in), averaged over its methods.

    `methods`: those to think of at each site. A site of which none of them keeps whole pairs is left out.
    """
    found = {}
    for site in sites:
        if isinstance(site.spec, ConvSpec):
            able = [method for method in methods.get(site.name, ()) if site.why_not(method) is None]
            masks = [mask for mask in (method.kept_pairs(site.spec) for method in able) if mask is not None]
            if masks:
                found[site.name] = torch.stack(masks).double().mean(0)
    return found


def group_for_(
    model: nn.Module, sites: Sequence[Site], methods: Mapping[str, Sequence[Method]], example: Tensor
) -> Grouping:
    """Reorder inner channels, in place, for the methods that may take each site, on average.

    Where a convolution is to share its kernel, its channels stay: they are aligned, see `lcc.alignment`.
    `example` (N, C, H, W): see `inner_pairs`.
    """
    kept = kept_pairs(sites, methods)
    sharing = {name for name, each in methods.items() if any(method.shares for method in each)}
    pairs = inner_pairs(model, sites, example) if kept else ()
    free = [pair for pair in pairs if not sharing & {pair.first, pair.second}]
    return group_(model, free, kept)


@torch.no_grad()
def group_(model: nn.Module, pairs: Sequence[InnerPair], kept: Mapping[str, Tensor]) -> Grouping:
    """Reorder inner channels, in place, so that convolutions keep the most; `kept`: see `kept_pairs`.

    Taps count by their energy in what the convolution gives, as far as weights and norms tell: a channel
    behind a norm by the norm's scale, and by how much the second convolution makes of it. A pair at a time
    takes its best order, round after round, as long as that adds more than `LEAST_GAIN`. What is kept never
    gets less. Weights that are not finite stay where they are.
    """
    energies = _energies(model, pairs, kept)
    total = sum(float(energy.sum()) for energy in energies.values())
    if total == 0 or not math.isfinite(total):
        return Grouping(1.0, 1.0, {})
    before = _inside(energies, kept)
    here = [pair for pair in pairs if pair.first in energies or pair.second in energies]
    orders = settle_(model, here, lambda pair: _improve_(pair, energies, kept), ROUNDS)
    return Grouping(before / total, _inside(energies, kept) / total, orders)


def _improve_(pair: InnerPair, energies: dict[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor | None:
    """Take on a better order of a pair's channels and return it; None: there is none."""
    gains, asked = [], []  # (channel, place); what each place keeps
    if pair.first in energies:
        gains.append(energies[pair.first] @ kept[pair.first].T)
        asked.append(kept[pair.first])
    if pair.second in energies:
        gains.append(energies[pair.second].T @ kept[pair.second])
        asked.append(kept[pair.second].T)
    gain = torch.stack(gains).sum(0)
    channels, at = linear_sum_assignment(gain.numpy(), maximize=True)
    order = torch.empty(len(at), dtype=torch.long)
    order[torch.as_tensor(at)] = torch.as_tensor(channels)
    _sort_alike_(order, torch.cat(asked, 1))
    if gain[order, torch.arange(len(order))].sum() <= gain.trace() * (1 + LEAST_GAIN):
        return None
    for name, axis in ((pair.first, 0), (pair.second, 1)):
        if name in energies:
            energies[name] = energies[name].index_select(axis, order)
    return order


def _sort_alike_(order: Tensor, asked: Tensor) -> None:
    """Sort channels among places that keep the same, rows of `asked`: rounding would decide otherwise."""
    alike = asked.unique(dim=0, return_inverse=True)[1].numpy()
    order[np.argsort(alike, kind="stable")] = order[np.lexsort((order.numpy(), alike))]


def _inside(energies: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
    return sum(float((energy * kept[name]).sum()) for name, energy in energies.items())


def _energies(model: nn.Module, pairs: Sequence[InnerPair], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return by site which share of what it gives comes by the taps around the centre, (C_out, C_in)."""
    of_outputs, of_inputs = {}, {}
    for pair in pairs:
        first, second = (_squares(model, name).sum(2) for name in (pair.first, pair.second))
        own = first.sum(1)
        size = own if pair.norm is None else _scale(model, pair.norm, own).square()
        of_outputs[pair.first] = size * second.sum(0) / own.clamp_min(TINY)
        of_inputs[pair.second] = size
    found = {}
    for name in {name: None for pair in pairs for name in (pair.first, pair.second) if name in kept}:
        squares = _squares(model, name)
        squares = squares * of_outputs.get(name, torch.ones(len(squares)))[:, None, None]
        squares = squares * of_inputs.get(name, torch.ones(squares.shape[1]))[None, :, None]
        total = squares.sum().clamp_min(TINY)
        squares[:, :, squares.shape[2] // 2] = 0
        found[name] = squares.sum(2) / total
    return found


def _squares(model: nn.Module, name: str) -> Tensor:
    """Return the squared kernel of a convolution, (C_out, C_in, taps), in float64."""
    return model.get_parameter(f"{name}.weight").detach().to("cpu", torch.float64).square().flatten(2)


def _scale(model: nn.Module, norm: str, like: Tensor) -> Tensor:
    weight = getattr(model.get_submodule(norm), "weight", None)
    return torch.ones_like(like) if weight is None else weight.detach().to(like)

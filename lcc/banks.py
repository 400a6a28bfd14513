"""Banks of kernels to be shared: inner channels put in one order, and sites clustered where kernels differ.

Both look at the weights alone, and at those of the dense network: the reordering leaves its function as it
is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import fcluster, linkage

from lcc.alignment import align_, inner_pairs
from lcc.methods.base import as_conv
from lcc.methods.shared import Shared
from lcc.ops.fit import relative_error
from lcc.plan import Group, Kept, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lcc.plan import Site

ALONE = "the kernels of the other sites of its shape are too unlike its own"


def settle_banks_(model: nn.Module, sites: tuple[Site, ...], plan: Plan) -> Plan:
    """Return the plan with one group for each bank; order inner channels in place where a bank asks for it.

    A group that is to have several kernels is split by how alike its dense kernels are. A site that is alone
    then stays dense.
    """
    align = [g for g in plan.groups if isinstance(g.method, Shared) and g.method.align]
    pairs = inner_pairs(model, sites) if align else ()
    if align:
        align_(model, [group.sites for group in align], pairs)
    settled = plan.model_copy(
        update={"groups": tuple(part for g in plan.groups for part in _split(model, g))}
    )
    still = settled.methods()
    lost = [site for group in plan.groups for site in group.sites if site not in still]
    if align and len(settled.groups) > len(plan.groups):
        banks = [g.sites for g in settled.groups if isinstance(g.method, Shared) and g.method.align]
        align_(model, banks, pairs)
    kept = (*plan.kept, *(Kept(site=site, reason=ALONE) for site in lost))
    return settled.model_copy(update={"kept": kept})


def spread(model: nn.Module, plan: Plan) -> float | None:
    """Return the distance of kernels from their banks' means, over their size; None: there is no bank."""
    lost, norms = torch.zeros(2, dtype=torch.float64)
    for group in plan.groups:
        if group.method.shares:
            kernels = torch.stack([_kernel(model, site) for site in group.sites]).double()
            lost += (kernels - kernels.mean(0)).square().sum()
            norms += kernels.square().sum()
    return relative_error(lost, norms) if norms > 0 else None


def _kernel(model: nn.Module, site: str) -> Tensor:
    return as_conv(model.get_submodule(site)).weight.detach()


def _split(model: nn.Module, group: Group) -> Iterator[Group]:
    """Yield the banks of a group."""
    method = group.method
    if not isinstance(method, Shared) or method.kernels == 1:
        yield group
        return
    rows = torch.stack([_kernel(model, site).flatten() for site in group.sites])
    tree = linkage(torch.nn.functional.normalize(rows.double(), dim=1).numpy(), method="ward")
    labels = fcluster(tree, method.kernels, criterion="maxclust")
    for label in sorted(set(labels), key=list(labels).index):
        sites = tuple(site for site, own in zip(group.sites, labels, strict=True) if own == label)
        if len(sites) > 1:
            yield Group(method=method, sites=sites)

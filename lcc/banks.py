"""Banks of kernels to be shared: inner channels put in one order, and sites clustered where kernels differ.

Both look at the weights alone, and at those of the dense network: the reordering leaves its function as it
is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import fcluster, linkage

from lcc.alignment import align_
from lcc.errors import NothingToConvertError, RecipeError
from lcc.inner_channels import inner_pairs
from lcc.methods.shared import Shared
from lcc.plan import Group, Kept, Plan, chained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from lcc.alignment import Alignment
    from lcc.plan import Site

ALONE = "the kernels of the other sites of its shape are too unlike its own"


def settle_banks_(
    model: nn.Module, sites: tuple[Site, ...], plan: Plan, example: Tensor
) -> tuple[Plan, Alignment | None]:
    """Return the plan with one group for each bank; order inner channels in place where a bank asks for it.

    A group that is to have several kernels is split by how alike its dense kernels are. A site that is alone
    then stays dense. The alignment is that of the banks, None where none asks for it. `example`: see
    `lcc.inner_channels.inner_pairs`.
    Raises: NothingToConvertError: every site is alone.
    """
    pairs = inner_pairs(model, sites, example) if _to_align(plan) else ()
    alignment = align_(model, _to_align(plan), pairs) if _to_align(plan) else None
    split = plan.model_copy(update={"groups": tuple(part for g in plan.groups for part in _split(model, g))})
    still = split.methods()
    if not still:
        raise NothingToConvertError(
            "nothing to convert: every site would have a kernel of its own; ask for fewer"
        )
    lost = [site for group in plan.groups for site in group.sites if site not in still]
    if _to_align(split) != _to_align(plan):
        again = align_(model, _to_align(split), pairs)
        alignment = again._replace(orders=chained(alignment.orders if alignment else {}, again.orders))
    kept = (*plan.kept, *(Kept(site=site, reason=ALONE) for site in lost))
    orders = alignment.orders if alignment else {}
    return split.model_copy(update={"kept": kept, "orders": orders}), alignment


def refuse_unsettled(methods: Iterable[object]) -> None:
    """Refuse methods whose banks `settle_banks_` would change after a planner priced them.

    Raises: RecipeError: one has several kernels, or orders inner channels first.
    """
    for method in methods:
        if isinstance(method, Shared) and (method.kernels > 1 or method.align):
            raise RecipeError(
                f"{method}: a planner prices banks of one kernel, in the order that the channels have: give "
                "kernels=1 and align=false"
            )


def _to_align(plan: Plan) -> list[tuple[str, ...]]:
    return [g.sites for g in plan.groups if isinstance(g.method, Shared) and g.method.align]


def _split(model: nn.Module, group: Group) -> Iterator[Group]:
    """Yield the banks of a group."""
    method = group.method
    if not isinstance(method, Shared) or method.kernels == 1:
        yield group
        return
    rows = torch.stack([model.get_parameter(f"{site}.weight").detach().flatten() for site in group.sites])
    tree = linkage(torch.nn.functional.normalize(rows.double(), dim=1).numpy(), method="ward")
    labels = fcluster(tree, method.kernels, criterion="maxclust")
    for label in sorted(set(labels), key=list(labels).index):
        sites = tuple(site for site, own in zip(group.sites, labels, strict=True) if own == label)
        if len(sites) > 1:
            yield Group(method=method, sites=sites)

"""The hierarchy of widths of multigrid in channels: each level has half the channels, the last is dense.

Source: arXiv:2011.09128 and its released code, which stops at the first halving below the threshold. The
number of groups differs from the released one: it divides every width that is grouped, so none is cut.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class Level(NamedTuple):
    """A level of the hierarchy: its width in channels, and into how many groups its convolutions fall."""

    width: int
    groups: int


def levels(
    width: int, group_size: int, coarsest: int, *others: int, first: tuple[int, ...] = ()
) -> tuple[Level, ...]:
    """Return the levels from `width` down; at least two, the last one with one group.

    The last width is the first half strictly below `coarsest`. `others` are widths that halve along with it
    and are grouped alike (an expansion); `first` are widths only of the finest level (an output's).
    The groups are the largest number up to width / `group_size` that divides every width of the level, and
    half of `width`: ask `why_no_levels` first.
    """
    found = []
    for depth, (fine, coarse) in enumerate(pairwise(_widths(width, coarsest))):
        divided = (fine, coarse, *(other >> depth for other in others), *(() if depth else first))
        most = max(fine // group_size, 1)
        groups = next(g for g in range(most, 0, -1) if all(n % g == 0 for n in divided))
        found.append(Level(fine, groups))
    return (*found, Level(coarse, 1))


def why_no_levels(width: int, coarsest: int, *others: int) -> str | None:
    """Return in words why a width can't be halved so often; None if all can. `others` halve along with it.

    Source: the released code drops a channel of an odd width without a word.
    """
    for depth, _ in enumerate(pairwise(_widths(width, coarsest))):
        odd = next((n >> depth for n in (width, *others) if (n >> depth) % 2), None)
        if odd is not None:
            below = f" (half of {odd * 2})" if depth else ""
            return f"odd width {odd}{below}, and each level has half the channels"
    return None


def _widths(width: int, coarsest: int) -> Iterator[int]:
    yield width
    while width // 2 >= coarsest:
        width //= 2
        yield width
    yield width // 2

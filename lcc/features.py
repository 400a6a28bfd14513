"""Distillation of features: what converted sites give beside what the teacher gives in the same places."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lcc.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Seen = dict[str, list[Tensor]]  # the outputs of each site, call by call

EPS = 1e-5  # of a channel's variance


def check_sites(teacher: nn.Module, sites: Sequence[str]) -> None:
    """Make sure that the teacher has modules of these names.

    Raises: RecipeError: it has not, or there are none.
    """
    if not sites:
        raise RecipeError("features: nothing was converted, so there is nothing to compare; set features = 0")
    names = {name for name, _ in teacher.named_modules()}
    missing = next((site for site in sites if site not in names), None)
    if missing is not None:
        raise RecipeError(f"features: the teacher has no module called {missing}; set features = 0")


@contextmanager
def watched(model: nn.Module, sites: Sequence[str]) -> Iterator[Seen]:
    """Give the outputs of modules, as they are computed in the block."""
    seen: Seen = {site: [] for site in sites}
    with ExitStack() as stack:
        for site, outputs in seen.items():
            hook = model.get_submodule(site).register_forward_hook(
                lambda _module, _inputs, output, outputs=outputs: outputs.append(output)
            )
            stack.callback(hook.remove)
        yield seen


def distance(student: Seen, teacher: Seen) -> Tensor:
    """Return the mean squared difference of all sites' outputs, each channel at mean 0 and variance 1, ().

    Normalised over the batch, since what follows a site, a BatchNorm, sets the size of its channels anyway: 0
    is alike, 2 unrelated. Raises: RecipeError: the outputs' shapes differ.
    """
    apart = []
    for site, outputs in student.items():
        for got, wanted in zip(outputs, teacher[site], strict=True):
            if got.shape != wanted.shape:
                raise RecipeError(
                    f"features: {site} gives {tuple(got.shape)}, the teacher's {tuple(wanted.shape)}; set "
                    "features = 0"
                )
            apart.append(_apart(got, wanted))
    return torch.stack(apart).mean()


def _apart(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared difference of normalised channels, (), from their variances and covariance.

    In few passes over the outputs: on a CPU the plain way would take longer than the network itself.
    """
    x, y = _centred(got), _centred(wanted)
    with torch.autocast(x.device.type, enabled=False):
        x_variance, y_variance, covariance = (
            torch.linalg.vecdot(one, other) / x.shape[1] for one, other in ((x, x), (y, y), (x, y))
        )
    x_size, y_size = x_variance + EPS, y_variance + EPS
    alike = covariance * torch.rsqrt(x_size * y_size)
    apart: Tensor = x_variance / x_size + y_variance / y_size - 2 * alike
    return apart.mean()


def _centred(x: Tensor) -> Tensor:
    """Return the channels of (N, C, ...) as rows of mean 0, (C, values), at least in float32."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, 0).flatten(1)
    return rows - rows.mean(1, keepdim=True)

"""ACTIVATIONS: the functions that the names in a StepSpec stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lcc.specs import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def activate(x: Tensor, name: Activation | None) -> Tensor:
    """Return the activation of x; None leaves it as it is."""
    return x if name is None else ACTIVATIONS[name](x)

"""METHODS: the one table of names. A method is one file here and one entry there."""

from __future__ import annotations

from lcc.methods.base import (
    METHODS,
    AnyMethod,
    Fit,
    LinearOp,
    LowCostOp,
    Lowering,
    Method,
    Scalable,
    Statistics,
    parse_method,
)
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.mgic import Mgic
from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit
from lcc.methods.shared import Shared

METHODS |= {
    "linear_mix": LinearMix,
    "circulant": Circulant,
    "rd_explicit": RdExplicit,
    "rd_implicit": RdImplicit,
    "rd_circulant": RdCirculant,
    "mgic": Mgic,
    "shared": Shared,
}

__all__ = [
    "METHODS",
    "AnyMethod",
    "Fit",
    "LinearOp",
    "LowCostOp",
    "Lowering",
    "Method",
    "Scalable",
    "Statistics",
    "parse_method",
]

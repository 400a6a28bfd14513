"""METHODS: the one table of names. A method is one file here and one entry there."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny

from lcc.methods.base import Fit, LinearOp, LowCostOp, Lowering, Method, SiteKind, Statistics
from lcc.methods.circulant import Circulant
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdCirculant, RdExplicit, RdImplicit

METHODS: dict[str, type[Method]] = {
    "linear_mix": LinearMix,
    "circulant": Circulant,
    "rd_explicit": RdExplicit,
    "rd_implicit": RdImplicit,
    "rd_circulant": RdCirculant,
}

__all__ = [
    "METHODS",
    "AnyMethod",
    "Fit",
    "LinearOp",
    "LowCostOp",
    "Lowering",
    "Method",
    "SiteKind",
    "Statistics",
    "parse_method",
]


def parse_method(value: Any) -> Method:
    """Return the method that a mapping with a `name` describes. Raises: ValueError with the known names."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a method is a table with a name, such as { name = "linear_mix" }')
    kind = METHODS.get(value["name"])
    if kind is None:
        raise ValueError(f"no method is called {value['name']!r}; known: {', '.join(METHODS)}")
    return kind.model_validate_json(json.dumps(value))


# A tagged union that reads from the table: a field typed as the abstract Method would dump as {}.
AnyMethod = Annotated[SerializeAsAny[Method], PlainValidator(parse_method)]

"""What is wrong with input that does not fit its schema, in one line."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ValidationError

from lcc.methods import METHODS, Method

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def in_words(error: ValidationError, root: type[BaseModel]) -> str:
    """Return in one line the first thing that is wrong, as "key: what"; `root` is what was validated."""
    # a mistyped key is why another is missing
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    place, what = ".".join(str(part) for part in problems[0]["loc"]), _what(problems[0], root)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {what}{more}" if place else f"{what}{more}"


# What pydantic calls a problem, and what a writer of TOML should do about it.
_WANTED = {
    "bool_type": "should be true or false",
    "dict_type": "should be a table",
    "float_type": "should be a number",
    "int_from_float": "should be a whole number",
    "int_type": "should be a whole number",
    "model_type": "should be a table",
    "string_type": "should be text in quotes",
    "tuple_type": "should be a list",
}


def _what(problem: ErrorDetails, root: type[BaseModel]) -> str:
    kind, where, context = problem["type"], problem["loc"], problem.get("ctx", {})
    if kind == "missing":
        return "this list is too short" if isinstance(where[-1], int) else "is missing, and has no default"
    if kind == "extra_forbidden":
        return _unknown(str(where[-1]), _known_keys(root, where[:-1]))
    if kind == "too_long":
        return f"should have {context['max_length']} items, not {context['actual_length']}"
    if kind == "value_error":
        return str(context["error"])
    said = problem["msg"].replace("Input should be", "should be", 1)
    return f"{_WANTED.get(kind, said)}, not {_shown(problem['input'])}"


def _shown(value: object) -> str:
    text = json.dumps(value)
    short = text if len(text) <= 40 else f"{text[:37]}..."
    return f"the text {short}" if isinstance(value, str) else short


def _unknown(key: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; known: {', '.join(known)}"


def _known_keys(root: type[BaseModel], where: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the keys that the table at this place may have."""
    for part in where:
        field = root.model_fields.get(str(part))
        if field is not None:
            root = _table_in(field.annotation) or root
    tables = METHODS.values() if root is Method else (root,)
    return tuple(dict.fromkeys(key for table in tables for key in table.model_fields))


def _table_in(annotation: object) -> type[BaseModel] | None:
    """Return the model that an annotation such as `tuple[Model, ...] | None` is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_table_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)

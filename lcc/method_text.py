"""Methods as they are written on the command line."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from pydantic import ValidationError

from lcc.errors import RecipeError
from lcc.methods import METHODS, Method, parse_method
from lcc.validation import in_words

COMMAS = re.compile(r",(?![^{]*})")  # those outside of tables


def method_from_text(text: str) -> Method:
    """Return the method of "linear_mix" or "linear_mix:group_size=8,stencil=cross".

    A method in a method is text of its own, or a table: "shared:scale=true,method=linear_mix:group_size=8",
    'shared:method={name = "linear_mix", group_size = 8, stencil = "cross"}'.
    Raises: RecipeError.
    """
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {"name": name}
    for part in filter(None, COMMAS.split(rest)):
        key, equals, value = part.partition("=")
        if not equals:
            raise RecipeError(f"method {text}: {part!r} is no hyperparameter=value")
        try:
            fields[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            fields[key.strip()] = _text(key.strip(), value.strip())
    try:
        return parse_method(fields)
    except ValidationError as error:
        raise RecipeError(f"method {text}: {in_words(error, METHODS[name])}") from error
    except ValueError as error:
        raise RecipeError(f"method {text}: {error}") from error


def _text(key: str, value: str) -> object:
    """Return a value that is no TOML, since text needs no quotes here; a method's as its table."""
    return method_from_text(value).model_dump(mode="json") if key == "method" else value

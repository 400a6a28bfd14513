"""Recipes and plans from TOML files, with `--set` overrides laid over them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from lcc.errors import RecipeError
from lcc.recipe import Finetune, Recipe, Rules
from lcc.validation import in_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from lcc.plan import Rule

Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe in a TOML file, with `--set` overrides such as "finetune.lr=1e-3" laid over it.

    Raises: RecipeError: one line with the file, the key, what is wrong and what would be right.
    """
    document = _read(Path(path))
    for override in overrides:
        _override_(document, override)
    _list_single_globs_(document)

    def blamed(problem: str) -> str:
        given = [f" with --set {override}" for override in overrides if _about(problem, override)]
        return f"{path}{''.join(given)}: "

    return _valid(Recipe, document, blamed)


def text_with(path: str | Path, overrides: tuple[str, ...] = ()) -> str:
    """Return a recipe file's text as given, the overrides laid over it as comments at its end."""
    text = Path(path).read_text(encoding="utf-8")
    return text + "".join(f"# --set {override}\n" for override in overrides)


def rules_from(path: str | Path) -> tuple[Rule, ...]:
    """Return the rules of a plan file: [[convert]] entries as in a recipe, and nothing else.

    Raises: RecipeError: one line with the file, the key, what is wrong and what would be right.
    """
    document = _read(Path(path), "plan")
    _list_single_globs_(document)
    return _valid(Rules, document, lambda _: f"{path}: ").convert


def finetune_options(given: dict[str, Any], overrides: tuple[str, ...] = ()) -> Finetune:
    """Return training options: those given by name, with `--set` overrides such as "lr=1e-3" laid over them.

    Raises: RecipeError: one line with the key, what is wrong and what would be right.
    """
    document = dict(given)
    for override in overrides:
        _override_(document, override)
    return _valid(Finetune, document, lambda _: "fine-tuning option ")


def _valid(kind: type[Model], document: dict[str, Any], blamed: Callable[[str], str]) -> Model:
    """Return what a document says. Raises: RecipeError: with `blamed` of what is wrong in front."""
    try:
        # By way of JSON: strict validation takes a list for a tuple there, and only there.
        return kind.model_validate_json(json.dumps(document, default=_refuse_date))
    except ValidationError as error:
        problem = in_words(error, kind)
        raise RecipeError(f"{blamed(problem)}{problem}") from error
    except _DateError as error:
        raise RecipeError(f"{blamed('')}{error} is a date, which no key takes; put it in quotes") from error


def _read(path: Path, what: str = "recipe") -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such {what} file") from error
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # not TOML, or not even UTF-8
        raise RecipeError(f"{path}: not a TOML file: {error}") from error


def _override_(document: dict[str, Any], override: str) -> None:
    """Lay one `key.path=TOML value` over the document; numbers in the path count list entries from 0."""
    key, equals, text = override.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    if not equals or not all((*parents, last)) or len(override.splitlines()) > 1:
        raise RecipeError(f"--set {override!r}: write it as key=value in one line, such as finetune.lr=1e-3")
    node: Any = document
    for part in parents:
        node = _child(node, part, override, new={})
    value = _toml_value(text, override)
    if isinstance(node, dict):
        node[last] = value
    else:
        _child(node, last, override, new=None)
        node[int(last)] = value


def _about(problem: str, override: str) -> bool:
    """Whether a problem, as "key: what", lies at or below the key that an override sets."""
    key = override.partition("=")[0].strip()
    return problem.startswith((f"{key}:", f"{key}."))


def _child(node: Any, key: str, override: str, *, new: Any) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, new)
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return node[int(key)]
    has = f"a list of {len(node)}, counted from 0" if isinstance(node, list) else "a value, not a table"
    raise RecipeError(f"--set {override}: there is no {key!r} in {has}")


def _toml_value(text: str, override: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"""--set {override}: not a TOML value; text needs quotes: '{override.partition("=")[0]}="..."'"""
        ) from error


def _list_single_globs_(document: dict[str, Any]) -> None:
    """Write `match = "glob"` as the list of one that it stands for."""
    rules = document.get("convert")
    for rule in rules if isinstance(rules, list) else ():
        if isinstance(rule, dict) and isinstance(rule.get("match"), str):
            rule["match"] = [rule["match"]]


class _DateError(Exception):
    """A TOML date or time, which JSON does not have."""


def _refuse_date(value: object) -> NoReturn:
    raise _DateError(str(value))

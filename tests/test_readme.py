"""What the README says is there: methods, recipes, commands, options and the gate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lcc import recipe_file as recipes
from lcc.cli import app
from lcc.methods import METHODS
from lcc.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return what stands in the README's fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme_lists_every_method_and_its_hyperparameters():
    section = README.partition("## Methods")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([\w, ]+) \| ", section, re.MULTILINE)
    table = {name: set(fields.split(", ")) - {"none"} for name, fields in rows if name != "method"}
    assert table == {name: set(kind.model_fields) - {"name"} for name, kind in METHODS.items()}


def test_readme_lists_every_recipe():
    listed = re.findall(r"^\| (recipes/\S+\.toml) \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert recipes.load(path).finetune is not None


def test_the_recipe_of_the_readme_is_valid_and_leaves_out_only_what_is_seldom_given(tmp_path):
    (text,) = blocks("toml")
    (tmp_path / "recipe.toml").write_text(text)
    shown = recipes.load(tmp_path / "recipe.toml").model_fields_set
    assert set(Recipe.model_fields) - shown == {"convert", "teacher", "eval"}


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"^lcc (\w+) (.*)$", README, re.MULTILINE)
    assert len(commands) >= 5
    for name, arguments in commands:
        help_text = CliRunner().invoke(app, [name, "--help"]).stdout
        for option in re.findall(r"(?<!\S)(--?[a-z-]+)", arguments):
            assert re.search(rf"(?<!\S){option}\b", help_text), f"{name} has no {option}"


def test_the_gate_runs_the_test_command_of_the_readme():
    test_command = blocks("sh")[1].splitlines()[-1].removeprefix(".venv-dev/bin/")
    assert test_command.startswith("python -m pytest")
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()

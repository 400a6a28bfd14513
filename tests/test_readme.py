"""What the README says is there: methods, recipes, commands, options and the gate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

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


COMMANDS = get_command(app).commands
OPTIONS = {
    name: {text for one in command.params for text in (*one.opts, *one.secondary_opts)}
    for name, command in COMMANDS.items()
}


def test_the_commands_of_the_readme_have_their_options():
    quoted = re.findall(r"`(lcc [^`]+)`", README)
    typed = [line.removeprefix(".venv/bin/") for text in blocks("sh") for line in text.splitlines()]
    commands = [text.split()[1:] for text in (*quoted, *typed) if text.startswith("lcc ")]
    assert len(commands) >= 15
    for name, *arguments in commands:
        options = {word for word in arguments if word.startswith("-") and not word[1:2].isdigit()}
        assert options <= OPTIONS[name], f"{name} has no {options - OPTIONS[name]}"


def test_the_options_of_the_readme_are_those_of_some_command():
    spans = re.findall(r"`([^`]+)`", README.replace("```", ""))
    named = {
        option
        for span in spans
        if not span.startswith(("python", "pytest", "bash"))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)
    }
    assert len(named) >= 25
    assert named <= set().union(*OPTIONS.values())


def test_the_gate_runs_the_test_command_of_the_readme():
    test_command = blocks("sh")[1].splitlines()[-1].removeprefix(".venv-dev/bin/")
    assert test_command.startswith("python -m pytest")
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()

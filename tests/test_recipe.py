"""Recipes: TOML in, one frozen value out; whatever is wrong is said in one line with file and key."""

import json

import pytest

from lcc.errors import RecipeError
from lcc.method_text import method_from_text
from lcc.methods.linear_mix import LinearMix
from lcc.recipe import Calibrate, Recipe
from lcc.recipe_file import finetune_options, load

WHOLE = """
lcc = 1
[model]
source = "timm:resnet18.a1_in1k"
image_size = [224, 192]
mean = [0.5, 0, 0.25]
[[convert]]
match = ["layer1.*", "fc"]
[[convert]]
match = "layer[234].*.conv?"
method = { name = "linear_mix", group_size = 4 }
[calibrate]
data = "imagefolder:data/train"; images = 128
[teacher]
source = "runs/dense"
[finetune]
data = "imagefolder:data"; epochs = 5; lr = 3e-4; distill = 0.5
[eval]
data = "imagefolder:data"
[export]
half = true
""".replace("; ", "\n")
MODEL = 'lcc = 1\n[model]\nsource = "zoo:cifar_resnet20"\n'
FINETUNE = f'{MODEL}[finetune]\ndata = "cifar10:data"\n'
CONVERT = f'{MODEL}[[convert]]\nmatch = "*"\nmethod = {{ name = "linear_mix" }}\n'


@pytest.fixture
def read(tmp_path):
    """Write a text to recipe.toml and load it."""

    def load_text(text, *overrides):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load(path, overrides)

    return load_text


def refusal(read, text, *overrides):
    """Return the one line that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def test_a_whole_recipe_is_read(read):
    recipe = read(WHOLE)
    assert recipe.model.image_size == (224, 192)
    assert recipe.model.mean == (0.5, 0, 0.25)
    assert recipe.convert[0].method is None
    assert recipe.convert[1].method == LinearMix(group_size=4)
    assert recipe.calibrate == Calibrate(data="imagefolder:data/train", images=128, seed=0)
    assert (recipe.finetune.epochs, recipe.finetune.lr) == (5, 3e-4)
    assert recipe.export.half


def test_a_single_glob_stands_for_a_list_of_one(read):
    assert read(WHOLE).convert[1].match == ("layer[234].*.conv?",)


def test_a_part_left_out_is_none_or_empty(read):
    recipe = read(MODEL)
    assert recipe.convert == ()
    assert [recipe.calibrate, recipe.teacher, recipe.finetune, recipe.eval, recipe.export] == [None] * 5


def test_a_recipe_survives_a_trip_through_json(read):
    recipe = read(WHOLE)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ("finetune.lr=1e-3", lambda recipe: recipe.finetune.lr == 1e-3),
        (" finetune.lr = 1e-3 ", lambda recipe: recipe.finetune.lr == 1e-3),
        ("finetune.crop_scale=[0.5, 1]", lambda recipe: recipe.finetune.crop_scale == (0.5, 1.0)),
        ('model.weights="a=b.pth"', lambda recipe: recipe.model.weights == "a=b.pth"),
        ("convert.1.method.group_size=2", lambda recipe: recipe.convert[1].method.group_size == 2),
        ('convert.0.match="x.*"', lambda recipe: recipe.convert[0].match == ("x.*",)),
        ("export.opset=21", lambda recipe: recipe.export.opset == 21),
        ('convert.1={match="*"}', lambda recipe: recipe.convert[1].method is None),
    ],
)
def test_an_override_is_a_toml_value_at_a_path(read, override, got):
    assert got(read(WHOLE, override))


def test_an_override_makes_the_table_it_needs(read):
    assert read(MODEL, 'eval.data="cifar10:x"').eval.data == "cifar10:x"


def test_the_last_override_wins(read):
    assert read(FINETUNE, "finetune.epochs=2", "finetune.epochs=3").finetune.epochs == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{FINETUNE}lrr = 1", "recipe.toml: finetune.lrr: unknown key; did you mean 'lr'?"),
        (f"{MODEL}[extra]", "recipe.toml: extra: unknown key; known: lcc, model, convert, budget, calibrate"),
        (f"{CONVERT[:-3]}, groupsize = 2 }}", "did you mean 'group_size'?"),
        (f'{FINETUNE}lr = "3e-4"', 'recipe.toml: finetune.lr: should be a number, not the text "3e-4"'),
        (f"{FINETUNE}lr = []", "finetune.lr: should be a number, not []"),
        (f"{FINETUNE}epochs = 2.5", "finetune.epochs: should be a whole number, not 2.5"),
        (f"{FINETUNE}channels_last = 1", "finetune.channels_last: should be true or false, not 1"),
        (f"{FINETUNE}optimizer = 1", "finetune.optimizer: should be text in quotes, not 1"),
        (
            f'{FINETUNE}color_jitter = 0.4\nauto_augment = "rand-m5"',
            "color_jitter: timm leaves it out beside",
        ),
        (f"{FINETUNE}hflip = 2", "finetune.hflip: should be less than or equal to 1, not 2"),
        (f'{FINETUNE}schedule = "steps"', "'tanh' or 'poly', not the text \"steps\""),
        (f"{MODEL}image_size = 224", "model.image_size: should be a list, not 224"),
        (f"{MODEL}image_size = [1, 2, 3]", "model.image_size: should have 2 items, not 3"),
        (f"{MODEL}image_size = [1]", "model.image_size.1: this list is too short"),
        (f"{MODEL}mean = [1, 'x']", 'model.mean.1: should be a number, not the text "x"'),
        (f"{MODEL}weights = 2026-01-01", "2026-01-01 is a date, which no key takes; put it in quotes"),
        ("lcc = 2\nmodel = 3", "lcc: should be 1, not 2 (and 1 more)"),
        (
            f"{FINETUNE[:-1].replace('data', 'dta')}",
            "finetune.dta: unknown key; did you mean 'data'? (and 1 more)",
        ),
        ("lcc = 1", "model: is missing"),
        ("lcc = 1\n[model]", "model.source: is missing"),
        (f"{CONVERT}[finetune]", "finetune.data: is missing"),
        (CONVERT.replace("linear_mix", "wavelet"), "no method is called 'wavelet'; known: linear_mix"),
        (CONVERT.replace('{ name = "linear_mix" }', '"linear_mix"'), "a method is a table with a name"),
        (
            f"{CONVERT[:-3]}, group_size = 0 }}",
            "convert.0.method.group_size: should be greater than or equal",
        ),
        (CONVERT.replace('"*"', "[]"), "convert.0.match: an empty list matches nothing"),
        (f"{MODEL}[calibrate]\ndata = 'x'", "[calibrate] has nothing to do without [[convert]]"),
        (f"{MODEL}[teacher]\nsource = 'x'", "[teacher] has nothing to do without [finetune]"),
        ("lcc = [", "recipe.toml: not a TOML file"),
        ("lr: 3e-4", "recipe.toml: not a TOML file"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_key(read, text, line):
    assert line in refusal(read, text)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("finetune.lrr=1", "recipe.toml with --set finetune.lrr=1: finetune.lrr: unknown key"),
        ("finetune.epochs=0", "recipe.toml with --set finetune.epochs=0: finetune.epochs: should be"),
        ("model.source=timm:resnet18", "text needs quotes: 'model.source=\"...\"'"),
        ("finetune.lr", "write it as key=value"),
        ("finetune.=1", "write it as key=value"),
        ("finetune.lr=1\nfinetune.epochs=2", "write it as key=value in one line"),
        ("model.source.name=1", "there is no 'name' in a value, not a table"),
        ("convert.1.match='x'", "there is no '1' in a list of 1, counted from 0"),
        ("convert.1={}", "there is no '1' in a list of 1, counted from 0"),
    ],
)
def test_a_wrong_override_is_named(read, override, line):
    convert = FINETUNE.replace("[finetune]", '[[convert]]\nmatch = "*"\n[finetune]')
    assert line in refusal(read, convert, override)


def test_a_good_override_is_not_blamed_for_another_keys_fault(read):
    assert "--set" not in refusal(read, f"{FINETUNE}lrr = 1", "finetune.lr=1")


def test_a_date_is_refused_where_options_and_methods_are_given_by_hand():
    with pytest.raises(RecipeError, match="2026-01-01 is a date, which no key takes"):
        finetune_options({"data": "x"}, ("clip_norm=2026-01-01",))
    with pytest.raises(RecipeError, match="group_size: should be a whole number"):
        method_from_text("linear_mix:group_size=2026-01-01")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: no such recipe file$"):
        load(tmp_path / "none.toml")


def test_a_directory_is_not_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="can't be read"):
        load(tmp_path)


def test_bytes_that_are_no_text_are_not_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load(tmp_path / "recipe.toml")


def test_a_long_wrong_value_is_shortened(read):
    line = refusal(read, f"{FINETUNE}epochs = {json.dumps('x' * 500)}")
    assert len(line.partition("recipe.toml: ")[2]) < 110

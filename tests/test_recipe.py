"""Recipes: what is written is what is read, and whatever cannot be used is refused in one sentence."""

import dataclasses
from pathlib import Path

import pytest

from zo_engine import recipe as recipes
from zo_engine.recipe import GROWTH, HALVED, Recipe, RecipeError, dump, load, make

OTHER = {str: "other", int: 99, tuple[str, ...]: ("a [trigger] sun", 'quotes " \\ ü\n')}


def other(field):
    """A possible value that is not the default."""
    choices = [choice for choice in field.metadata["choices"] if choice != field.default]
    if choices:
        return choices[0]
    if field.type is bool:
        return not field.default
    if field.name == "text_columns":
        return ("prompt=question",)
    if field.type is float:
        low, high = field.metadata["low"], min(field.metadata["high"], 100.0)
        return low + (high - low) / 3
    return min(OTHER[int], field.metadata["high"]) if field.type is int else OTHER[field.type]


@pytest.fixture
def written(tmp_path):
    """written(text): a recipe file with that text, or those bytes."""

    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# Round trip


@pytest.mark.parametrize(
    ("taught", "quantization", "left_out"),
    [  # aqlm alone has codebooks to move, and plain weights alone can travel in fewer bits
        ("images", "aqlm", ("texts", "task", "reward", "transport")),
        ("texts", "aqlm", ("images", "task", "transport")),
        ("texts", "none", ("images", "reward", "moves")),
    ],
)
def test_every_setting_survives_the_file(written, tmp_path, taught, quantization, left_out):
    values = {f.name: other(f) for f in dataclasses.fields(Recipe) if f.name not in left_out}
    recipe = Recipe(**values | {"quantization": quantization})
    assert all(getattr(recipe, f.name) != f.default for f in dataclasses.fields(Recipe) if f.name not in left_out)
    recipe = dataclasses.replace(recipe, **{taught: str(tmp_path / "there")})
    assert load(written(dump(recipe))) == recipe


def test_the_default_survives_the_file_and_is_what_an_empty_file_means(written):
    assert load(written(dump(Recipe()))) == Recipe() == load(written(""))


def test_dumping_what_was_loaded_changes_nothing(written):
    text = dump(make({"eps": 0.1 + 0.2, "seed": 2**63 - 1, "prompts": ["a", "b"]}))
    assert dump(load(written(text))) == text


def test_whole_numbers_serve_as_numbers(written):
    recipe = load(written("eps = 1\nguidance = 5"))
    assert (recipe.eps, recipe.guidance) == (1.0, 5.0)
    assert type(recipe.eps) is float


def test_every_setting_has_a_help_text_and_a_possible_default():
    for field in dataclasses.fields(Recipe):
        assert field.metadata["help"]
        assert make({field.name: field.default}) == Recipe()


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().eps = 0.5


# Refused


def refused(text, written):
    with pytest.raises(RecipeError) as error:
        load(written(text))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [("stepsize", "step_size"), ("bacth_size", "batch_size"), ("Steps", "steps"), ("optimiser", "optimizer")],
)
def test_an_unknown_setting_is_named_with_its_nearest(key, near, written):
    message = refused(f"{key} = 1", written)
    assert "recipe.toml has an unknown setting" in message
    assert repr(key) in message and near in message


def test_a_setting_like_no_other_lists_what_is_possible(written):
    message = refused("zzzzzz = 1", written)
    assert all(field.name in message for field in dataclasses.fields(Recipe))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('steps = "300"', "steps must be a whole number, not '300'"),
        ("steps = 1.5", "steps must be a whole number, not 1.5"),
        ("steps = true", "steps must be a whole number, not True"),
        ('eps = "small"', "eps must be a number, not 'small'"),
        ("eps = true", "eps must be a number, not True"),
        ("columns = 1", "columns must be true or false, not 1"),
        ("trigger = 7", "trigger must be a text, not 7"),
        ('prompts = "a sun"', "prompts must be a list of texts, not 'a sun'"),
        ("prompts = [1]", "prompts must be a list of texts, not [1]"),
        ("eps = []", "eps must be a number, not []"),
        ("[eps]\nvalue = 1", "eps must be a number, not {'value': 1}"),
        ("seed = 2026-01-01", "seed must be a whole number, not datetime.date(2026, 1, 1)"),
    ],
)
def test_a_wrong_type_is_refused(line, sentence, written):
    assert refused(line, written) == sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("steps = 0", "steps = 0 is outside of 1 and above"),
        ("eps = 2.0", "eps = 2.0 is outside of 0 to 1"),
        ("eps = 1e-9", "eps = 1e-09 is too small to be seen; 0 leaves it to the precision that computes"),
        ("eps = -1", "eps = -1.0 is outside of 0 to 1"),
        ("momentum = 1.0", "momentum = 1.0 is outside of 0 to 0.9999"),
        ("holdout = -0.1", "holdout = -0.1 is outside of 0 to 0.5"),
        ("sigma_mean = -5.1", "sigma_mean = -5.1 is outside of -5 to 5"),
        ("seed = -1", "seed = -1 is outside of 0 to 9.22337e+18"),
        ("seed = 9223372036854775808", "seed = 9223372036854775808 is outside of 0 to 9.22337e+18"),
    ],
)
def test_a_value_out_of_range_is_refused(line, sentence, written):
    assert refused(line, written) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('images = "/a"\ntexts = "/b"', "a recipe teaches pictures or texts, not both: it has images = '/a' and texts"),
        ('text_columns = ["question"]', "text_columns must look like field=column, such as prompt=question, not"),
        ('text_columns = ["=question"]', "text_columns must look like field=column"),
        ("length = 7", "length = 7 is outside of 8 and above"),
    ],
)
def test_settings_of_texts_that_do_not_fit_are_refused(text, sentence, written):
    assert sentence in refused(text, written)


def test_a_choice_that_there_is_not_lists_those_that_there_are(written):
    message = refused('quantization = "int4"', written)
    assert message == "quantization = 'int4' is not possible; choose from nf4, fp4, int8, gptq, aqlm, none"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1" + "0" * 400], ids=["nan", "inf", "-inf", "huge"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe) if field.type is float])
def test_no_number_is_anything_but_finite(name, value, written):
    assert name in refused(f"{name} = {value}", written)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("eps = ", "is not valid TOML"),
        ("eps = 1\neps = 2", "is not valid TOML"),
        ("just words", "is not valid TOML"),
        (b"trigger = '\xff\xfe'", "is not a text file in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not a text file in UTF-8"),
        ("eps = 0.1\0", "is not valid TOML"),
    ],
)
def test_what_is_not_toml_is_refused(content, sentence, written):
    assert sentence in refused(content, written)


def test_a_byte_order_mark_is_no_error(written):
    """Windows editors write one."""
    assert load(written(b"\xef\xbb\xbfsteps = 7\r\n")).steps == 7


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe at .*nowhere\.toml"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError):
        load(tmp_path / "file" / "recipe.toml")


# Paths


def test_folders_are_meant_from_where_the_recipe_lies(tmp_path, monkeypatch):
    place = tmp_path / "styles" / "tarot"
    (place / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file = place / "recipe.toml"
    file.write_text('images = "pictures"\nmodel = "base"')
    for path in (file, Path("styles/tarot/recipe.toml")):
        recipe = load(path)
        assert Path(recipe.images) == place / "pictures"
        assert Path(recipe.model) == place / "base"
    (place / "mine.jsonl").write_text("")
    file.write_text('texts = "mine.jsonl"')
    assert Path(load(file).texts) == place / "mine.jsonl"
    file.write_text('texts = "org/data:train"')
    assert load(file).texts == "org/data:train"  # of the hub
    file.write_text('images = "../other"\nmodel = "tiny-sd3"')
    assert Path(load(file).images) == tmp_path / "styles" / "other"
    assert load(file).model == "tiny-sd3"  # a known model's name stays one
    file.write_text(dump(Recipe(images=str(tmp_path), model=str(place))))
    assert (load(file).images, load(file).model) == (str(tmp_path), str(place))


def test_what_is_made_public_names_no_folder_of_this_machine(tmp_path):
    assert str(tmp_path) not in repr(Recipe(texts=str(tmp_path / "me.jsonl")).public())
    public = Recipe(images=str(tmp_path / "me"), model=str(tmp_path / "base"), device="cuda:3").public()
    assert str(tmp_path) not in repr(public)
    assert public["model"] == "base"
    assert "images" not in public and "device" not in public
    again = make(public)
    assert again.public() == public
    assert recipes.make({}).public() == Recipe().public()


def test_a_reward_in_a_file_is_meant_from_beside_the_recipe_and_leaves_the_machine_with_nobody(written, tmp_path):
    (tmp_path / "mine.py").write_text("")
    found = load(written('texts = "org/name"\nreward = "mine.py:f"'))
    assert found.reward == f"{tmp_path / 'mine.py'}:f" and found.public()["reward"] == ""
    assert found.public()["final_norm"] == "tuned"  # as it was, though the style does not say any more why
    bundled = load(written('texts = "org/name"\nreward = "json:a"'))
    assert bundled.reward == bundled.public()["reward"] == "json:a"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('images = "x"\ntask = "sst2"', "the recipe has images"),
        ('images = "x"\nreward = "json"', "give `texts` with the prompts"),
        ('texts = "a/b"\ntask = "sst2"\nreward = "json"', "without a task"),
    ],
)
def test_tasks_and_rewards_are_of_texts(written, text, says):
    with pytest.raises(RecipeError, match=says):
        load(written(text))


def test_a_budget_scales_the_steps_and_keeps_the_places_of_previews():
    recipe = Recipe(steps=36, preview_every=18)
    assert recipes.budgeted(recipe) is recipe
    for budget, steps, previews in (("quick", 12, 6), ("thorough", 72, 36)):
        found = recipes.budgeted(dataclasses.replace(recipe, budget=budget))
        assert (found.steps, found.preview_every, found.budget) == (steps, previews, "normal")
        assert recipes.budgeted(found) is found  # a run's own recipe has it already
    assert recipes.budgeted(Recipe(steps=1, preview_every=0, budget="quick")).steps == 1


def test_what_doubles_is_the_batch_of_given_texts_and_else_the_directions(tmp_path):
    texts, pictures = Recipe(texts="a.jsonl"), Recipe(images=str(tmp_path))
    late = 3 * GROWTH + 2 * HALVED
    for recipe, batch, directions in (
        (texts, 128, 96),
        (pictures, 16, 768),
        (dataclasses.replace(texts, reward="json"), 16, 768),
        (dataclasses.replace(texts, doubles="directions", doublings=1), 16, 192),
        (dataclasses.replace(pictures, doubles="batch", directions=10, doublings=2), 64, 10),
    ):
        assert recipe.directions_at(0) == (recipe.directions or 96)
        assert recipe.batch_at(late) == batch
        assert recipe.directions_at(late) == recipe.directions_at(100 * late) == directions
        kept = recipes.make(recipe.public())  # without its texts
        assert (kept.batch_at(late), kept.directions_at(late)) == (batch, directions)
    assert [texts.batch_at(late, examples) for examples in (0, 5, 90, 500)] == [128, 16, 90, 128]
    assert dataclasses.replace(pictures, doubles="batch").batch_at(late, 20) == 128  # under other noise
    slopes = dataclasses.replace(texts, optimizer="sgd", doubles="batch")
    assert not slopes.grows_batch and slopes.batch_at(late) == 16


def test_the_first_steps_learn_from_few_and_try_on_whole_batches():
    def sizes(**settings):
        recipe = Recipe(**{"batch_size": 16, "doublings": 0} | settings)
        return [recipe.batch_at(step) for step in (0, HALVED - 1, HALVED, 2 * HALVED - 1, 2 * HALVED)]

    assert sizes() == sizes(texts="a.jsonl") == [4, 4, 8, 8, 16]
    assert sizes(halvings=1) == [8, 8, 16, 16, 16]
    assert sizes(batch_size=6) == [4, 4, 4, 4, 6] and sizes(batch_size=3) == [3] * 5
    assert sizes(halvings=0) == sizes(optimizer="sgd") == sizes(texts="a.jsonl", reward="json") == [16] * 5
    texts = Recipe(texts="a.jsonl")
    assert [texts.tried_at(2 * HALVED + step, 40) for step in (-1, 0, GROWTH, 2 * GROWTH)] == [16, 16, 32, 40]

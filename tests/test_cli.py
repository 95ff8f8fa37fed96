"""The command line from the outside: what works prints paths, what does not is one sentence and exit code 2."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zo_engine import recipe as recipes
from zo_engine.run import Run


@pytest.fixture
def recipe(tmp_path, tiny_folder) -> Path:
    """A recipe of a few steps beside its pictures."""
    folder = tmp_path / "my style"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text("a [trigger] sun")
    path = folder / "recipe.toml"
    path.write_text(
        f'images = "images"\nmodel = {json.dumps(str(tiny_folder))}\ntrigger = "gold"\nresolution = "32x32"\n'
        "steps = 3\nbatch_size = 2\nevaluate_items = 8\nevaluate_every = 2\npreview_steps = 1\n"
        'prompts = ["a [trigger] moon", "a moon"]\n'
    )
    return path


def test_from_a_recipe_to_an_exported_model(qzo, recipe, tmp_path):
    code, out, err = qzo("train", recipe, "--steps", 2)
    run = tmp_path / "runs" / "my-style"
    assert code == 0 and "held-out loss" in out and str(run / "style.safetensors") in out
    assert "note: too few pictures to hold some out" in err
    assert Run(run).recipe().steps == 2 and len(Run(run).journal()) == 2

    assert qzo("resume", run)[0] == 0
    code, out, _ = qzo("inspect", run, "--json")
    facts = json.loads(out)
    assert facts["kind"] == "run" and facts["state"] == "done" and facts["step"] == 2
    code, out, _ = qzo("inspect", run / "style.safetensors", "--json")
    assert json.loads(out)["trigger"] == "gold" and json.loads(out)["prompts"] == '["a gold moon", "a moon"]'

    sheet = tmp_path / "compare.png"
    assert qzo("compare", run, "--out", sheet)[0] == 0
    with Image.open(sheet) as image:
        assert image.info["prompts"] == "a gold moon | a moon"
    for source in ("style.safetensors", "style-journal.safetensors"):
        assert qzo("apply", run / source, "a gold moon", "--strength", 1.5, "--out", tmp_path / f"{source}.png")[0] == 0
    pictures = [(tmp_path / f"style{form}.safetensors.png").read_bytes() for form in ("", "-journal")]
    assert pictures[0] == pictures[1]
    assert qzo("preview", run, "--out", tmp_path / "preview.png")[0] == 0
    assert qzo("export", run, tmp_path / "exported")[0] == 0
    assert json.loads(qzo("inspect", tmp_path / "exported", "--json")[1])["quantization"] == "nf4"
    code, _, err = qzo("export", run, tmp_path / "exported")
    assert code == 2 and "exists already" in err


def test_json_is_one_object_a_line(qzo, recipe):
    code, out, _ = qzo("train", recipe, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["step"] for line in lines] == [1, 2, 3, 3] and lines[-1]["state"] == "done"


def test_help_has_every_setting_under_a_heading(qzo):
    _, out, _ = qzo("train", "--help")
    sections = re.split(r"^(\S.*):$", out, flags=re.MULTILINE)[1:]
    found = {heading: re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)
             for heading, text in zip(sections[::2], sections[1::2], strict=True)}  # fmt: skip
    assert found.pop("Options") == ["out", "json", "help"]
    assert list(found) == list(recipes.HEADINGS.values())
    assert sum(found.values(), []) == [f.name.replace("_", "-") for f in dataclasses.fields(recipes.Recipe)]


def test_an_existing_run_is_not_trained_over(qzo, recipe, tmp_path):
    qzo("train", recipe, "--out", tmp_path / "run", "--steps", 1)
    code, _, err = qzo("train", recipe, "--out", tmp_path / "run")
    assert code == 2 and "continue it with `qzo resume" in err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--images", "nowhere"], "there is no folder of pictures at 'nowhere'"),
        (["--images", ""], "there is no folder of pictures at ''"),
        (["--resolution", "33"], "resolution 33 is not possible: this model takes multiples of 16"),
        (["--resolution", "large"], "neither a side like 512 nor a list"),
        (["--model", "tiny-sd4"], "did you mean 'tiny-sd3'?"),
        (["--eps", "nan"], "eps = nan is outside of 0 to 1"),
        (["--steps", "0"], "steps = 0 is outside of 1 and above"),
        (["--batch-size", "many"], "'many' is not a valid integer"),
        (["--step", "3"], "No such option '--step'"),
        (["--space", "row"], "'row' is not one of 'gain', 'group', 'absolute'"),
        (["--device", "tpu9"], "device 'tpu9' is unknown"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_impossible_settings(qzo, recipe, tmp_path, words, sentence):
    code, out, err = qzo("train", recipe, *words)
    assert code == 2 and sentence in err and not out
    assert not (tmp_path / "runs" / "my-style").exists()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('imagse = "images"', "unknown setting 'imagse'; did you mean images"),
        ("steps = 1.5", "steps must be a whole number, not 1.5"),
        ('eps = "small"', "eps must be a number, not 'small'"),
        ("eps = nan", "eps = nan is outside"),
        ("steps =", "is not valid TOML"),
        ("prompts = [1]", "prompts must be a list of texts"),
    ],
)
def test_bad_recipes(qzo, tmp_path, text, sentence):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    code, _, err = qzo("train", path)
    assert code == 2 and sentence in err and err.count("\n") == 1


def test_bad_pictures_stop_before_anything_is_written(qzo, recipe, tmp_path):
    (recipe.parent / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, _, err = qzo("train", recipe)
    assert code == 2 and "1 of 4 pictures cannot be used: broken.png" in err
    assert not (tmp_path / "runs" / "my-style").exists()


def test_pictures_larger_than_the_model_takes_are_refused_by_a_run_and_a_plan(qzo, recipe, tmp_path, tiny_folder):
    recipe.write_text(recipe.read_text().replace("32x32", "512"))
    for words in (("train", recipe), ("plan", recipe), ("plan", tiny_folder, "--resolution", 512)):
        code, _, err = qzo(*words)
        assert code == 2 and "resolution 512 is not possible: this model takes multiples of 16 from 16 to 256" in err
    assert not (tmp_path / "runs" / "my-style").exists()
    assert qzo("plan", tiny_folder)[0] == 0  # at the largest, since it cannot have the usual 512


def test_bad_model_folders(qzo, recipe, tmp_path, tiny_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = qzo("train", recipe, "--model", model)
    assert code == 2 and "is not a complete safetensors file" in err
    weights.rename(weights.with_suffix(".bin"))
    code, _, err = qzo("train", recipe, "--model", model)
    assert code == 2 and "never loaded" in err
    assert not (tmp_path / "runs" / "my-style").exists()


def test_a_run_in_use(qzo, recipe, tmp_path):
    qzo("train", recipe, "--out", tmp_path / "run", "--steps", 1)
    with Run(tmp_path / "run").lock():
        code, _, err = qzo("resume", tmp_path / "run")
    assert code == 2 and "is in use by another process" in err


def test_a_changed_model_stops_a_resumed_run(qzo, recipe, tmp_path):
    qzo("train", recipe, "--out", tmp_path / "run", "--steps", 1)
    run = Run(tmp_path / "run")
    run.write_base(**run.base() | {"code_hash": "0" * 64})
    code, _, err = qzo("resume", run.path)
    assert code == 2 and "the model has changed, so the run cannot go on" in err


@pytest.mark.parametrize("words", [["resume", "nowhere"], ["inspect", "nowhere"], ["compare", "nowhere"], ["fly"]])
def test_things_that_are_not_there(qzo, words):
    code, _, err = qzo(*words)
    assert code == 2 and err


def test_the_page_refuses_the_network_without_a_password(qzo):
    code, _, err = qzo("ui", "--host", "0.0.0.0")
    assert code == 2 and "--auth" in err


def test_help_names_every_setting(qzo):
    code, out, _ = qzo("train", "--help")
    assert code == 0
    for field in recipes.Recipe.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in out

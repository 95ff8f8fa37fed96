"""What goes with a result: snippets that run as they stand, and a model card that says what is true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from PIL import Image

from zo_engine import card
from zo_engine.apply import open_style
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.train import prepare, stop_signals, train

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> Run:
    """A finished run of two steps; one of its prompts has what markup is made of."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 40, 120)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text("a [trigger] sun")
    recipe = Recipe(
        images=str(folder / "images"), model=str(tiny_folder), trigger="gold", resolution="32x32", steps=2,
        batch_size=2, evaluate_items=8, preview_steps=1, prompts=["a [trigger] <b>|'cup'", "a moon"],
    )  # fmt: skip
    run = Run.create(folder / "run", recipe)
    studio = prepare(recipe, folder / "cache")
    run.write_base(model=recipe.model, code_hash=studio.code_hash)
    with stop_signals() as stop:
        train(run, studio, lambda facts: None, stop)
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    return open_style(run.path, folder / "cache").export(folder / "gold", 1.2)


def test_a_folder_appears_with_its_card_or_not_at_all(run, tmp_path, monkeypatch):
    def full(path: Path, data: str) -> None:
        assert (path.parent / "images").is_dir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        open_style(run.path, tmp_path / "cache").export(tmp_path / "out" / "gold")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["style", "style-journal"])
def test_the_snippet_of_a_style_runs_as_it_stands(run, form, tmp_path):
    file = run.path / f"{form}.safetensors"
    code = card.style_snippet(file, card.read(file))
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (32, 32)


def test_the_snippet_of_a_folder_runs_as_it_stands(run, exported, tmp_path, monkeypatch):
    """In this process, where diffusers' refusal of a machine without a GPU can be taken away; all else as it ships."""
    import bitsandbytes as bnb

    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **options: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    monkeypatch.chdir(tmp_path)
    known = card.read(run.style_file)
    code = card.folder_snippet(exported, known, card.text_length(exported))
    exec(compile(code, "snippet", "exec"), {})  # noqa: S102 (it is what is tested)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (32, 32)


def test_the_card_says_what_was_done(run, exported, tiny_folder):
    text = (exported / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "other" and facts["pipeline_tag"] == "text-to-image"
    assert facts["instance_prompt"] == "gold"
    assert [w["text"] for w in facts["widget"]] == ["a gold <b>|'cup'", "a moon"]
    for sample in facts["widget"]:
        with Image.open(exported / sample["output"]["url"]) as picture:
            assert picture.size == (32, 32)
    assert "a gold &lt;b>\\|'cup'" in body and "at strength 1.2" in body and "eps = 0.01" in body
    assert not any(str(folder) in text for folder in (run.path.parent, tiny_folder))  # nothing of this machine


@pytest.mark.parametrize(
    "repo, licence, name",
    [
        ("stabilityai/stable-diffusion-3.5-large", "any", "other"),
        ("assets/models/tiny-sd3", "Apache-2.0", "apache-2.0"),
    ],
)
def test_the_licence_is_the_models(repo, licence, name):
    assert card._licence(repo, licence)["license"] == name


def test_what_is_no_style_is_named(tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"no")
    for path in (tmp_path / "style.safetensors", tmp_path / "nothing"):
        with pytest.raises(card.CardError, match="is not a style made by this program"):
            card.read(path)

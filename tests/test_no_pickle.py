"""A pickle in every place where a file is read: it is refused, or passed over, and never run."""

import ast
import hashlib
import os
import pickle  # noqa: TID251 (to make what must not be run)
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
from test_train import data, go, recipe, studio  # noqa: F401 (fixtures)

from zo_engine import recipe as recipes

CHECKOUT = Path(__file__).resolve().parent.parent


class Mark:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def armed(tmp_path):
    """(the bytes of three kinds of pickle, the folder that would appear)"""
    mark = tmp_path / "it-was-run"
    plain = pickle.dumps(Mark(mark))
    with zipfile.ZipFile(tmp_path / "torch.zip", "w") as archive:  # as torch.save writes it
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3")
    zipped = (tmp_path / "torch.zip").read_bytes()
    yield [plain, zipped, pickle.dumps(Mark(mark), protocol=0)], mark
    assert not mark.exists(), "a pickle was run"


def test_the_mark_works(tmp_path):
    pickle.loads(pickle.dumps(Mark(tmp_path / "mark")))  # noqa: S301 (the proof that the others prove something)
    assert (tmp_path / "mark").is_dir()


def test_a_pickle_in_the_place_of_every_file_of_a_run_is_not_run(qzo, studio, tmp_path, armed):  # noqa: F811
    whole = go(studio, tmp_path / "whole", steps=2)
    pickles, _ = armed
    for number, file in enumerate(sorted(p for p in whole.path.rglob("*") if p.is_file() and p.name != ".lock")):
        run = tmp_path / f"run{number}"
        shutil.copytree(whole.path, run)
        (run / file.relative_to(whole.path)).write_bytes(pickles[number % 3])
        for words in (["inspect", run], ["resume", run], ["verify", run / "style.safetensors"]):
            code, out, err = qzo(*words)
            assert code in (0, 1, 2), (file, words, err)


def test_a_pickle_in_the_place_of_every_file_of_a_model_is_not_run(qzo, recipe, tiny_folder, tmp_path, armed):  # noqa: F811
    pickles, _ = armed
    file = tmp_path / "recipe.toml"
    for number, spoilt in enumerate(sorted(p for p in tiny_folder.rglob("*") if p.is_file())):
        model = tmp_path / f"model{number}"
        shutil.copytree(tiny_folder, model)
        name = spoilt.relative_to(tiny_folder)
        (model / name).write_bytes(pickles[number % 3])
        text = recipes.dump(recipe).replace(str(tiny_folder), str(model))
        file.write_text(text.replace("steps = 9", "steps = 1"))
        code, out, err = qzo("train", file, "--out", tmp_path / f"run{number}")
        assert code == 2 or name.name in ("README.md", "tokenizer_config.json"), (name, code, out, err)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"]
)
def test_pickles_beside_whole_weights_are_passed_over_and_in_their_place_refused(
    qzo, tiny_folder, tmp_path, armed, name
):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    for part in ("transformer", "vae", "text_encoder"):
        (model / part / name).write_bytes(armed[0][1])
    assert '"problem": null' in qzo("inspect", model, "--json")[1]
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "a pickle, which can run code and is never loaded" in qzo("inspect", model, "--json")[1]
    code, _, err = qzo("train", CHECKOUT / "styles" / "tarot" / "recipe.toml", "--model", model / "transformer" / name)
    assert code == 2 and "is a pickle, which can run code and is never loaded" in err


def test_pickles_as_language_models_texts_pictures_and_cache_are_not_run(qzo, recipe, tmp_path, armed):  # noqa: F811
    pickles, _ = armed
    model = tiny.save_language_model(tmp_path / "llm")
    for number, content in enumerate(pickles):
        for suffix in ("jsonl", "json", "csv", "parquet", "txt"):
            texts = tmp_path / f"t{number}.{suffix}"
            texts.write_bytes(content)
            file = tmp_path / "texts.toml"
            file.write_text(f'texts = "{texts}"\nmodel = "{model}"\nsteps = 1\nlength = 8\n')
            code, _, err = qzo("train", file, "--out", tmp_path / f"out{number}{suffix}")
            assert code == 2 or suffix == "txt", (suffix, err)  # the oldest kind of pickle is made of letters
        images = tmp_path / f"images{number}"
        images.mkdir()
        (images / "a.png").write_bytes(content)
        (images / "a.txt").write_bytes(content)
        assert qzo("train", CHECKOUT / "styles" / "tarot" / "recipe.toml", "--images", images)[0] == 2
    for file in sorted(p for p in model.iterdir() if p.is_file()):
        spoilt = tmp_path / f"llm-{file.name}"
        shutil.copytree(model, spoilt)
        (spoilt / file.name).write_bytes(pickles[0])
        good = tmp_path / "good.toml"
        (tmp_path / "good.jsonl").write_text('{"text": "abc abc"}\n' * 3)
        good.write_text(f'texts = "good.jsonl"\nmodel = "{spoilt}"\nsteps = 1\n')
        code, _, err = qzo("train", good, "--out", tmp_path / f"llm-run-{file.name}")
        assert code in (0, 2), (file.name, err)


def test_the_embedded_models_are_those_that_were_shipped():
    """Every file but the cards, by its hash; `sha256sum $(git ls-files . | grep -v README) > SHA256SUMS` renews."""
    folder = CHECKOUT / "assets" / "models"
    lines = [line.split(maxsplit=1) for line in (folder / "SHA256SUMS").read_text().splitlines()]
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "README.md"}
    assert there - {"SHA256SUMS"} == {name for _, name in lines}


def test_nothing_here_can_read_a_pickle():
    """No module of the project imports one, and no model is loaded with the code that it brings."""
    for file in (*(CHECKOUT / "zo_engine").rglob("*.py"), *(CHECKOUT / "app").rglob("*.py"), CHECKOUT / "start.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {
                "pickle",
                "dill",
                "joblib",
                "cloudpickle",
                "shelve",
                "marshal",
            }, file
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, file
            if isinstance(node, ast.keyword) and node.arg == "use_safetensors":
                assert isinstance(node.value, ast.Constant) and node.value.value is True, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load")}, file

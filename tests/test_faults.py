"""Faults of disk, device, clock and data: what is lost is said, what is left is whole, what is made again is equal."""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_train import data, go, recipe, results, studio  # noqa: F401 (fixtures)

from zo_engine import journal, models, sealed
from zo_engine import train as training
from zo_engine.apply import open_style
from zo_engine.journal import JournalError, Step
from zo_engine.recipe import Recipe, named
from zo_engine.run import Run, RunError, write_atomic
from zo_engine.style import FORMAT, Style, StyleError, load_style, save_style

pytestmark = pytest.mark.usefixtures("few_own_texts")

FLIPS = 40  # of single bits, in every kind of file


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture
def whole(studio, tmp_path_factory) -> Run:  # noqa: F811
    """A run that ended. Not to be written to."""
    path = tmp_path_factory.getbasetemp() / "whole-of-faults"
    return Run(path) if (path / "style.safetensors").exists() else go(studio, path)


@pytest.fixture
def copied(whole, tmp_path) -> Run:
    shutil.copytree(whole.path, tmp_path / "copied")
    return Run(tmp_path / "copied")


# Checksums


def test_a_line_comes_back_or_is_refused():
    line = Step(3, (0.25, -1.5), 1.5, 0.01, 2.0).to_json()
    sealed_line = journal.seal(line)
    assert journal.unseal(sealed_line) == json.loads(line) == journal.unseal(line)
    same = journal.unseal(sealed_line)
    noticed = 0
    for bit in range(8 * len(sealed_line)):
        changed = bytearray(sealed_line.encode())
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = journal.unseal(changed.decode("utf-8", "replace"))
        except JournalError:
            noticed += 1
            continue
        # the name of the checksum itself was hit: what the line says is what was written
        assert {k: v for k, v in found.items() if k in same} == same
    assert noticed > 0.9 * 8 * len(sealed_line)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("[]", "not an object"), ("{", "not JSON"), ("1", "not an object"), ("", "not JSON"), ("[" * 9999, "not JSON"),
        ('{"step": 0, "size": 1}', "has no loss"), ('{"size": 0, "loss": 1}', "has no step"),
        ('{"step": -1, "size": 0, "loss": 1}', "as its step"), ('{"step": 0.5, "size": 0, "loss": 1}', "as its step"),
        ('{"step": 0, "size": 0, "loss": "1"}', "as its loss"), ('{"step": 0, "size": 0, "loss": [1]}', "as its loss"),
        ('{"step": 0, "size": 0, "loss": 1, "weights": 3}', "as its weights"),
        ('{"step": 0, "size": 0, "loss": 1, "weights": ["a"]}', "as its weights"),
        ('{"step": 0, "size": 0, "loss": true, "weights": []}', "as its loss"),
        ('{"step": 0, "size": 0, "loss": 1, "tried": [1, 1], "errors": [1, 1]}', "has 2 errors, and number 0 made"),
        ('{"step": 0, "size": 0, "loss": 1, "tried": [1, 1], "errors": [1], "made": 2}', "number 2 made, of 1 tries"),
        ('{"step": 0, "size": 0, "loss": 1, "crc": "00000000"}', "checksum does not fit"),
        ('{"crc": "00000000", "step": 0, "size": 0, "loss": 1}', "not at its end"),
    ],
)  # fmt: skip
def test_lines_that_are_none_are_refused(line, sentence):
    with pytest.raises(JournalError, match=sentence):
        journal.read(line)


def test_lines_from_before_checksums_are_read(tmp_path):
    run = Run.create(tmp_path / "run", Recipe())
    steps = [Step(i, (0.5,), 1.0, 0.1, 2.0) for i in range(3)]
    run.journal_file.write_text("".join(step.to_json() + "\n" for step in steps))
    assert run.journal() == steps and run.recover() == []
    assert run.journal() == steps and '"crc"' in run.journal_file.read_text()


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path, tensors = tmp_path / "file", {"theta": torch.arange(12.0), "b": torch.zeros(2, 2, dtype=torch.int8)}
    sealed.write(path, tensors, {"step": "3"})
    kept = path.read_bytes()
    same, _ = sealed.read(path)
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    for bit in range(8 * len(kept)):
        path.write_bytes(kept)
        flipped(path, bit)
        try:
            found, metadata = sealed.read(path)
        except sealed.DamageError:
            continue
        # a space for another, or a key's case where JSON does not mind: nothing that is read differs
        assert metadata["step"] == "3" and all(torch.equal(found[n], t) for n, t in tensors.items()), bit
    path.write_bytes(kept)
    sealed.read(path)


def test_a_flipped_bit_in_a_run_is_found_and_what_is_lost_is_made_again(studio, whole, tmp_path):  # noqa: F811
    """Journal, evaluations and checkpoints: the resumed run ends with the same theta, evaluations and style."""
    rng, expected, said = random.Random(0), results(whole), 0
    files = ["journal.jsonl", "evaluations.jsonl", "checkpoints/last.safetensors", "checkpoints/best.safetensors"]
    for number, name in enumerate(files):
        run = Run(tmp_path / str(number))
        shutil.copytree(whole.path, run.path)
        run.style_file.unlink()
        run.journal_style_file.unlink()
        content = (run.path / name).read_bytes()
        middle = rng.randrange(len(content) // 4, len(content) // 2)
        flipped(run.path / name, 8 * middle + rng.randrange(8))
        if name.endswith(".jsonl"):
            with pytest.raises(RunError, match=f"line . of .*{name} .*; `qzo resume` goes on from what is whole"):
                (run.journal if "journal" in name else run.evaluations)()
        go(studio, run.path)
        assert results(run) == expected, name
        if name.endswith(".jsonl"):
            said += "again" in (run.path / "log.txt").read_text()
            assert (run.path / f"{name}.damaged").read_bytes() != content
    assert said == 2


@pytest.mark.parametrize(
    "name", ["journal.jsonl", "evaluations.jsonl", "checkpoints", "run.json", "status.json", "previews"]
)
def test_what_vanished_is_made_again(studio, whole, copied, name):  # noqa: F811
    shutil.rmtree(copied.path / name) if (copied.path / name).is_dir() else (copied.path / name).unlink()
    go(studio, copied.path)
    expected, found = results(whole), results(copied)
    if name == "previews":  # those of steps that are past stay away
        assert found["previews"].items() <= expected["previews"].items() and found["previews"]
        found["previews"] = expected["previews"]
    assert found == expected


def test_a_lost_best_checkpoint_is_replayed_not_guessed(studio, tmp_path):  # noqa: F811
    """The style is of the best step, also where the file that kept its theta is gone or of another step."""
    run = go(studio, tmp_path / "run", optimizer="sgd", step_size=0.02, decay=0.0)
    losses = {e["step"]: e["loss"] for e in run.evaluations()}
    style = load_style(run.style_file)
    best = min(losses, key=losses.get)
    assert style.facts["step"] == str(best)
    facts = [e | {"loss": 0.001 if e["step"] == 3 else e["loss"]} for e in run.evaluations()]  # now 3 is the best one
    run.evaluations_file.write_text("".join(journal.seal(json.dumps(e)) + "\n" for e in facts))
    go(studio, run.path, optimizer="sgd", step_size=0.02, decay=0.0)
    again = load_style(run.style_file)
    method = training.replayed(studio.changed(optimizer="sgd", step_size=0.02, decay=0.0), run.journal()[:3])
    assert again.facts["step"] == "3"
    assert torch.equal(torch.cat([t.flatten() for t in again.tensors.values()]).sort()[0], method.theta.sort()[0])


# The disk


PARTS = ("journal", "evaluations", "last.safetensors", "best.safetensors", "status", "style", ".png")
REFUSALS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
USUAL = [(part, REFUSALS[i % 4]) for i, part in enumerate(PARTS)]
OTHERS = [pytest.param(p, n, marks=pytest.mark.slow) for p in PARTS for n in REFUSALS if (p, n) not in USUAL]


@pytest.mark.parametrize("part, number", [*USUAL, *OTHERS])
def test_a_disk_that_refuses_in_mid_run_loses_nothing(studio, whole, tmp_path, monkeypatch, number, part):  # noqa: F811
    """Whatever is being written, from the fourth time on: the run says so, and goes on when the disk does."""
    run, seen = Run(tmp_path / "run"), []
    real = os.fsync

    def refusing(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if part in name:
            seen.append(name)
            if len(seen) >= (4 if part in ("journal", "status") else 2):
                raise OSError(number, os.strerror(number), name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(OSError, match=os.strerror(number)):
        go(studio, run.path)
    monkeypatch.undo()
    assert not list(run.path.rglob("*.tmp"))
    go(studio, run.path)
    assert results(run) == results(whole)


def test_half_a_line_on_a_full_disk_is_cut(studio, whole, tmp_path, monkeypatch):  # noqa: F811
    run = Run(tmp_path / "run")
    real = Run.append_step

    def torn(self, record):
        if record.step == 5:
            with open(self.journal_file, "a") as file:
                file.write(record.to_json()[:20])
            raise OSError(errno.ENOSPC, "No space left on device", str(self.journal_file))
        real(self, record)

    monkeypatch.setattr(Run, "append_step", torn)
    with pytest.raises(OSError, match="No space left"):
        go(studio, run.path)
    monkeypatch.undo()
    assert len(run.journal()) == 5
    go(studio, run.path)
    assert results(run) == results(whole)


@pytest.mark.parametrize("put", ["flip", "text", "folder", "other", "pickle", "none"])
def test_a_cache_that_cannot_be_trusted_is_made_again(recipe, tmp_path, put):  # noqa: F811
    folder = tmp_path / "cache"
    before = training.prepare(recipe, folder)
    for file in folder.rglob("*.safetensors"):
        if put == "flip":
            flipped(file, 8 * (file.stat().st_size - 3))
        elif put == "text":
            file.write_text("no tensors")
        elif put == "other":
            sealed.write(file, {"wrong": torch.zeros(3)}, {})
        elif put == "pickle":
            file.write_bytes(b"\x80\x04\x95\x10")
        else:
            file.unlink()
            if put == "folder":
                file.mkdir()
    if put == "folder":
        with pytest.raises(OSError, match="directory"):
            training.prepare(recipe, folder)
        return
    again = training.prepare(recipe, folder)
    first = next(iter(before.task.train))
    assert torch.equal(before.task.train[first][0].latents, again.task.train[first][0].latents)


def test_blocks_on_disk_that_are_not_as_written_are_made_again(recipe, tmp_path):  # noqa: F811
    """A bit in any weight, or a shard that is gone: the copy is made anew, and the model is the same."""
    asked = dataclasses.replace(recipe, offload="disk")
    state = lambda: {n: t.clone() for n, t in training.prepare(asked, tmp_path).model.state_dict().items()}  # noqa: E731
    before = state()
    shards = sorted((tmp_path / "blocks").rglob("*.safetensors"))
    kept, stamp = [shard.read_bytes() for shard in shards], shards[0].stat().st_mtime_ns
    assert all(torch.equal(before[n], t) for n, t in state().items()) and shards[0].stat().st_mtime_ns == stamp
    flipped(shards[-1], 8 * (shards[-1].stat().st_size - 3))
    shards[0].unlink()
    assert all(torch.equal(before[n], t) for n, t in state().items())
    assert [shard.read_bytes() for shard in shards] == kept


def test_a_read_only_folder_is_said(qzo, tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", Recipe())

    def refused(*words, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(run.path / "log.txt"))

    monkeypatch.setattr(Run, "log", refused)
    with pytest.raises(OSError, match="denied"):
        run.log("a")
    if os.geteuid():  # root may write everywhere
        run.path.chmod(0o500)
        with pytest.raises(PermissionError):
            write_atomic(run.path / "status.json", "{}")


def test_a_run_that_was_moved_goes_on(studio, whole, tmp_path):  # noqa: F811
    go(studio, tmp_path / "here", stop_after=4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").rename(tmp_path / "elsewhere" / "there")
    assert results(go(studio, tmp_path / "elsewhere" / "there")) == results(whole)


def test_a_run_copied_to_another_machine_goes_on_where_its_recipe_finds_things(qzo, recipe, tmp_path):  # noqa: F811
    """Paths are in the recipe alone; another folder with the same pictures is the same data."""
    from zo_engine import recipe as recipes

    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(recipe.images, here)
    file, run = tmp_path / "recipe.toml", Run(tmp_path / "run")
    file.write_text(recipes.dump(dataclasses.replace(recipe, images=str(here), steps=2)))
    assert qzo("train", file, "--out", run.path)[0] == 0
    here.rename(there)
    run.path = shutil.copytree(run.path, tmp_path / "copied")
    code, _, err = qzo("resume", run.path)
    assert code == 2 and str(here) in err
    copied = Run(run.path)
    copied.recipe_file.write_text(copied.recipe_file.read_text().replace(str(here), str(there)))
    assert qzo("resume", copied.path)[0] == 0 and qzo("verify", copied.path)[0] == 0


def test_leftovers_of_a_killed_process_are_cleared(studio, copied):  # noqa: F811
    for name in ("status.json.1.2.tmp", "checkpoints/last.safetensors.1.2.tmp", "previews/000000/00.png.1.2.tmp"):
        (copied.path / name).write_bytes(b"half")
    go(studio, copied.path)
    assert not list(copied.path.rglob("*.tmp"))
    lost = copied.path.parent / "lost"
    lost.mkdir()
    (lost / "recipe.toml.1.2.tmp").write_text("steps")
    assert Run.create(lost, Recipe()).recipe() == Recipe()


# Data that changes under a run


def test_changed_pictures_are_said_and_gone_on_with_only_when_told(qzo, recipe, tmp_path):  # noqa: F811
    """Nothing is written before; afterwards every held-out loss is one of the pictures as they are now."""
    from zo_engine import recipe as recipes

    images, file, run = tmp_path / "images", tmp_path / "recipe.toml", Run(tmp_path / "run")
    shutil.copytree(recipe.images, images)
    text = recipes.dump(dataclasses.replace(recipe, images=str(images), steps=2, evaluate_every=2, prior=0.0))
    file.write_text(text)
    assert qzo("train", file, "--out", run.path)[0] == 0
    assert qzo("resume", run.path)[0] == 0
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    (images / "0.txt").write_text("another")
    shutil.copy(images / "4.png", images / "1.png")
    shutil.copy(images / "4.png", images / "99.png")
    (images / "2.png").unlink()
    (images / "2.txt").unlink()
    run.recipe_file.write_text(run.recipe_file.read_text().replace("steps = 2\n", "steps = 4\n", 1))
    code, _, err = qzo("resume", run.path)
    said = "0.png has another caption, 1.png has other contents, 2.png is gone and 1 more"
    assert code == 2 and said in err and "--changed-data" in err
    changing = {"recipe.toml", "status.json", "heartbeat", "log.txt"}
    assert all(p.read_bytes() == content for p, content in before.items() if p.name not in changing)
    assert f"data                   not as in the run: {said}" in qzo("verify", run.path)[1]
    first = run.evaluations()[0]["loss"]
    code, _, err = qzo("resume", run.path, "--changed-data")
    assert code == 0 and f"going on with other data ({said})" in err
    assert [e["step"] for e in run.evaluations()] == [0, 2, 4] and run.evaluations()[0]["loss"] != first
    assert qzo("verify", run.path)[0] == 0 and qzo("resume", run.path)[0] == 0


def test_changed_texts_and_rewards_are_noticed(language_folder, tmp_path):
    texts, own = tmp_path / "t.jsonl", tmp_path / "mine.py"
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}, aye"} for i in range(8)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text("def worth(prompt, answer):\n    return 0.5\n")
    asked = Recipe(texts=str(texts), model=str(language_folder), length=100, reward=f"{own}:worth", answer_tokens=2)
    first = training.prepare(asked, tmp_path).data
    texts.write_text("".join(json.dumps(row, indent=None, separators=(",", ":")) + "\n" for row in rows))
    assert training.changes(first, training.prepare(asked, tmp_path).data) == ""  # the same, written otherwise
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    own.write_text("def worth(prompt, answer):\n    return 0.25\n")
    now = training.prepare(asked, tmp_path).data
    assert training.changes(first, now) == "mine.py has other contents, t.jsonl has other contents"


@pytest.mark.parametrize(
    "file, name",
    [
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),  # previews alone would tell
        ("transformer/diffusion_pytorch_model.safetensors", "pos_embed.proj.weight"),  # not quantised: codes stay
        ("text_encoder/model.safetensors", "text_projection.weight"),  # its embeddings may be in the cache still
    ],
)
def test_a_changed_weight_outside_of_the_codes_is_named_at_the_resume(qzo, tiny_folder, recipe, tmp_path, file, name):  # noqa: F811
    from zo_engine import recipe as recipes

    model, run = tmp_path / "model", Run(tmp_path / "run")
    shutil.copytree(tiny_folder, model)
    (tmp_path / "recipe.toml").write_text(
        recipes.dump(dataclasses.replace(recipe, model=str(model), steps=1, prior=0.0))
    )
    assert qzo("train", tmp_path / "recipe.toml", "--out", run.path)[0] == 0
    tensors = load_file(model / file)
    tensors[name] = tensors[name] + 1
    save_file(tensors, model / file)
    code, _, err = qzo("resume", run.path)
    assert code == 2 and f"{file} has other contents" in err and "as it was" in err
    assert f"not as in the run: {file} has other contents" in qzo("verify", run.path)[1]
    shutil.rmtree(model)
    shutil.copytree(tiny_folder, model)  # other times of the files, the same contents
    assert qzo("resume", run.path)[0] == 0


def test_a_store_that_another_run_is_making_is_waited_for_and_taken(tiny_folder, tmp_path):
    load = lambda: models.load_transformer(tiny_folder, placement=models.Placement(2, 1, tmp_path / "store"))  # noqa: E731
    codes = models.code_hash(load())
    (lock,) = (tmp_path / "store").glob("*.lock")
    made = lock.with_suffix("")
    made.rename(tmp_path / "made elsewhere")
    with ThreadPoolExecutor(1) as pool:
        with FileLock(lock):
            second = pool.submit(load)
            time.sleep(0.5)  # long enough to have begun one of its own
            (tmp_path / "made elsewhere").rename(made)
            there = {file.name: file.stat().st_ino for file in made.iterdir()}
        assert models.code_hash(second.result()) == codes
    assert {file.name: file.stat().st_ino for file in made.iterdir()} == there


def test_what_leaves_the_machine_names_no_folder_of_it(studio, whole, language_folder, tmp_path):  # noqa: F811
    texts = tmp_path / "t.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"what is {i}?", "completion": "aye"}) + "\n" for i in range(8)))
    asked = Recipe(texts=str(texts), model=str(language_folder), length=60, steps=1, directions=4, answer_tokens=2)
    answering = go(training.prepare(asked, tmp_path), tmp_path / "answering")
    for run in (whole, answering):
        out = open_style(run.path, tmp_path).export(tmp_path / f"exported-{run.path.name}")
        for file in (run.style_file, run.journal_style_file, *(f for f in out.rglob("*") if f.is_file())):
            found = [part for part in (str(tmp_path.parent), str(Path.home())) if part.encode() in file.read_bytes()]
            assert not found, (file.name, found)
        style = load_style(run.style_file)
        assert style.base["model"] == style.recipe.model == "model" and style.base["code_hash"]
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.copy(whole.style_file, elsewhere)
    with pytest.raises(StyleError, match="made for a model in a folder named 'model' .*; say where it is with --model"):
        open_style(elsewhere, tmp_path)
    assert torch.equal(
        open_style(elsewhere, tmp_path, studio.recipe.model).theta, open_style(whole.path, tmp_path).theta
    )


@pytest.mark.parametrize(
    "model, expected",
    [
        ("tiny-sd3", "tiny-sd3"), ("stabilityai/some-model", "stabilityai/some-model"), ("/data/mine/model", "model"),
        ("~/models/mine", "mine"), ("../models/mine", "mine"), ("./mine", "mine"),
    ],
)  # fmt: skip
def test_a_model_is_named_without_its_folder(model, expected):
    assert named(model) == expected == Recipe(model=model).public()["model"]


# Versions of the style


@pytest.mark.parametrize(
    "format, sentence",
    [
        ("qzo-style-3", "was made by a newer one; update this program"),
        ("qzo-style-99", "was made by a newer one"),
        ("another", "not a style made by this program"),
        ("", "not a style made by this program"),
    ],
)
def test_a_style_of_another_version_is_refused_in_a_sentence(whole, tmp_path, format, sentence):
    style = load_style(whole.style_file)
    path = tmp_path / "style.safetensors"
    metadata = {"format": format, "form": "theta", "recipe": json.dumps(style.recipe.public()), "base": "{}"}
    sealed.write(path, style.tensors, metadata)
    with pytest.raises(StyleError, match=sentence):
        load_style(path)


def test_a_style_of_the_first_format_is_read_and_a_stripped_one_is_not(whole, tmp_path):
    from safetensors.torch import save_file

    style = load_style(whole.style_file)
    first = {
        "form": "theta",
        "recipe": json.dumps(style.recipe.public()),
        "base": json.dumps(style.base),
        **style.facts,
    }
    save_file(style.tensors, tmp_path / "old.safetensors", first | {"format": "qzo-style-1"})
    old = load_style(tmp_path / "old.safetensors")
    assert old.facts == style.facts and all(torch.equal(old.tensors[n], t) for n, t in style.tensors.items())
    save_file(style.tensors, tmp_path / "stripped.safetensors", first | {"format": FORMAT})
    with pytest.raises(StyleError, match="its checksum is gone"):
        load_style(tmp_path / "stripped.safetensors")


def test_flipped_bits_in_styles_are_found(whole, tmp_path):
    rng, path = random.Random(1), tmp_path / "style.safetensors"
    for source in (whole.style_file, whole.journal_style_file):
        style, found = load_style(source), 0
        for _ in range(FLIPS):
            shutil.copy(source, path)
            flipped(path, rng.randrange(8 * source.stat().st_size))
            try:
                same = load_style(path)
            except StyleError as error:
                assert "\n" not in str(error)
                found += 1
                continue
            assert all(
                torch.equal(
                    same.tensors[n],
                    t,
                )
                or t.isnan().any()
                for n, t in style.tensors.items()
            )
        assert found >= 0.9 * FLIPS


def test_numbers_that_are_not_finite_make_no_style(whole, tmp_path):
    style = load_style(whole.style_file)
    tensors = {name: tensor.clone() for name, tensor in style.tensors.items()}
    next(iter(tensors.values()))[0] = math.nan
    save_style(tmp_path / "s", Style("theta", tensors, style.recipe, style.base, style.facts))
    with pytest.raises(StyleError, match="not finite"):
        load_style(tmp_path / "s")


# The device


@pytest.mark.parametrize(
    "raised, sentence",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "does not suffice for step 2"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "does not suffice",
        ),
        (MemoryError(), "does not suffice for step 2"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "the device failed at step 2"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the device failed at step 2"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "the device failed"),
    ],
)
def test_a_device_that_fails_in_mid_step_is_a_sentence_and_the_run_goes_on(
    studio,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
    raised,
    sentence,
):
    real, run = studio.task.errors, Run(tmp_path / "run")

    def broken(batch):
        if run.status().get("step") == 2:
            raise raised
        return real(batch)

    monkeypatch.setattr(studio.task, "errors", broken)
    with pytest.raises(training.TrainingError, match=sentence) as caught:
        go(studio, run.path)
    assert "\n" not in str(caught.value) and len(run.journal()) == 2
    monkeypatch.undo()
    go(studio, run.path)
    assert results(run) == results(whole)


def test_a_defect_stays_a_defect(studio, tmp_path, monkeypatch):  # noqa: F811
    def broken(batch):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(studio.task, "errors", broken)
    with pytest.raises(RuntimeError, match="size of tensor a") as caught:
        go(studio, tmp_path / "run")
    assert not isinstance(caught.value, training.TrainingError)


def test_no_memory_for_a_preview_does_not_end_a_run(studio, whole, tmp_path, monkeypatch):  # noqa: F811
    def full(*words, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(studio.preview, "write", full)
    run = go(studio, tmp_path / "run")
    assert "step 0 has no preview: the memory does not suffice" in (run.path / "log.txt").read_text()
    assert results(run) == results(whole) | {"previews": {}}


def test_no_memory_at_loading_is_a_sentence(recipe, tmp_path, monkeypatch):  # noqa: F811
    def full(*words, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.models, "load_transformer", full)
    with pytest.raises(training.OutOfMemory, match="does not suffice for loading the model .*go on"):
        training.prepare(recipe, tmp_path)


def test_a_run_that_fails_says_so_on_the_command_line(qzo, recipe, tmp_path, monkeypatch):  # noqa: F811
    from zo_engine import recipe as recipes

    file = tmp_path / "recipe.toml"
    file.write_text(recipes.dump(dataclasses.replace(recipe, steps=2)))

    def broken(self, *words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Training, "step", broken)
    code, _, err = qzo("train", file, "--out", tmp_path / "run")
    assert code == 2 and "qzo: the memory does not suffice for step 0" in err
    assert Run(tmp_path / "run").status()["state"] == "failed"
    monkeypatch.undo()
    assert qzo("resume", tmp_path / "run")[0] == 0 and qzo("verify", tmp_path / "run")[0] == 0


# Numbers


@pytest.mark.parametrize(
    "part, name, sentence",
    [
        ("transformer", "transformer_blocks.1.ff.net.2.weight", "the weights of transformer_blocks.1.ff.net.2"),
        ("transformer", "norm_out.linear.bias", "the weights of norm_out.linear.bias are not finite"),
        ("vae", "encoder.conv_in.weight", "the autoencoder of .* makes numbers of 0.png that are not finite"),
        ("text_encoder_3", "shared.weight", "a text encoder of .* that are not finite; its weights are damaged"),
    ],
)
def test_a_base_with_weights_that_are_no_numbers_is_refused(recipe, tiny_folder, tmp_path, part, name, sentence):  # noqa: F811
    from safetensors.torch import load_file, save_file

    from zo_engine.hub import WEIGHT_NAMES

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (file,) = (model / part / n for n in WEIGHT_NAMES if (model / part / n).exists())
    tensors = load_file(file)
    tensors[name] = torch.full_like(tensors[name], math.nan)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        training.prepare(dataclasses.replace(recipe, model=str(model)), tmp_path / "cache")


def test_a_model_that_never_has_a_finite_loss_says_so_at_once(studio, tmp_path, monkeypatch):  # noqa: F811
    real = studio.task.errors
    monkeypatch.setattr(studio.task, "errors", lambda batch: real(batch) + math.inf)
    with pytest.raises(training.TrainingError, match="before any step, is not a finite number"):
        go(studio, tmp_path / "run", steps=30)
    assert not Run(tmp_path / "run").journal()


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd"])
@pytest.mark.parametrize("worse", [math.inf, 50.0])
def test_a_loss_that_explodes_ends_the_run_at_its_best(studio, tmp_path, monkeypatch, optimizer, worse):  # noqa: F811
    """From the sixth step on the held-out loss is far above the start."""
    real, run = training.measured, Run(tmp_path / "run")

    def measured(whose, theta, rows):
        items, figures = real(whose, theta, rows)
        far = len(run.journal()) >= 6
        return [item * worse if far else item - 0.01 * len(run.journal()) for item in items], figures

    monkeypatch.setattr(training, "measured", measured)
    with pytest.raises(training.TrainingError, match="at step 6: the steps lead away; train anew with a") as caught:
        go(studio, run.path, optimizer=optimizer)
    assert "the style of the best step, 3, is saved" in str(caught.value)
    assert ("more directions" in str(caught.value)) == (optimizer == "gauss-newton")
    style, method = (
        load_style(run.style_file),
        training.replayed(studio.changed(optimizer=optimizer), run.journal()[:3]),
    )
    assert style.facts["step"] == "3" and len(run.journal()) == 6
    assert torch.equal(torch.cat([t.flatten() for t in style.tensors.values()]).sort()[0], method.theta.sort()[0])
    with pytest.raises(training.TrainingError, match="the steps lead away"):  # and does not go on from there
        go(studio, run.path, optimizer=optimizer)


def test_steps_that_are_far_too_large_are_noticed(studio, tmp_path):  # noqa: F811
    """The real thing: a step size that blows the gains up."""
    run = tmp_path / "run"
    with pytest.raises(training.TrainingError, match="lead away; train anew with a step_size below 200"):
        go(studio, run, optimizer="sgd", step_size=200.0, steps=40, evaluate_every=1, clip=10.0)
    assert load_style(run / "style.safetensors").facts["step"] == "0" or len(Run(run).journal()) > 1


# The clock


def test_a_clock_that_jumps_changes_nothing(studio, whole, tmp_path, monkeypatch):  # noqa: F811
    import time
    from datetime import datetime, timedelta

    from zo_engine import run as runs

    rng = random.Random(3)

    class Jumping(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=rng.randint(-9000, 9000))

    real = time.time
    monkeypatch.setattr(runs, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e9, 1e9))
    go(studio, tmp_path / "run", stop_after=4)
    assert results(go(studio, tmp_path / "run")) == results(whole)


def test_a_process_is_known_again_after_the_clock_was_set(tmp_path, monkeypatch):
    import psutil

    from app.jobs import Jobs

    run = Run.create(tmp_path / "runs" / "one", Recipe())
    run.write_status("running", step=3)
    real, born = psutil.boot_time, psutil.Process.create_time
    assert Jobs(tmp_path / "runs").look("one").state == "running"
    monkeypatch.setattr(psutil, "boot_time", lambda: real() + 86400)  # the clock was set a day forward
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: born(self) + 86400)
    assert Jobs(tmp_path / "runs").look("one").state == "running"
    monkeypatch.setattr(psutil, "boot_time", real)  # another process of the same number, born a day later
    assert Jobs(tmp_path / "runs").look("one").state == "interrupted"

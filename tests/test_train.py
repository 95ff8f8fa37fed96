"""The loop: resuming equals never stopping, the journal is the run, faults leave theta alone, the loss falls."""

import dataclasses
import errno
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from zo_engine import sealed
from zo_engine import train as training
from zo_engine.apply import open_style
from zo_engine.journal import Step
from zo_engine.plots import plot
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.style import Style, StyleError, load_style, make_method, save_style

PICTURES = 10


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Pictures of two shapes with captions."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        size = (32, 48) if i < 6 else (32, 32)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a [trigger] of a {['sun', 'moon'][i % 2]}")
    return folder


@pytest.fixture(scope="session")
def recipe(data, tiny_folder) -> Recipe:
    return Recipe(
        images=str(data), model=str(tiny_folder), trigger="gold", resolution="32x32,32x48", steps=9, batch_size=4,
        evaluate_every=3, evaluate_items=8, preview_every=0, preview_steps=2, search_every=4, warmup=2, directions=6,
    )  # fmt: skip


@pytest.fixture(scope="session")
def studio(recipe, tmp_path_factory) -> training.Studio:
    return training.prepare(recipe, tmp_path_factory.mktemp("cache"))


def go(studio, path, stop_after: int | None = None, **changes) -> Run:
    """A whole run, or one that is asked to stop after some steps."""
    studio = studio.changed(**changes)
    run = Run.open(path) if path.exists() else Run.create(path, studio.recipe)
    run.write_base(model=studio.recipe.model, code_hash=studio.code_hash)
    stop = threading.Event()
    report = lambda facts: stop.set() if facts["step"] == stop_after else None  # noqa: E731
    state = training.train(run, studio, report, stop)
    assert state == ("done" if stop_after is None else "stopped")
    return run


def results(run: Run) -> dict:
    """Everything that must be equal between a run and its resumed twin."""
    last = training._read_checkpoint(run.last_file)
    style = load_style(run.style_file)  # by content: safetensors orders its metadata anew in every process
    return {
        "journal": [r.to_json() for r in run.journal()],
        "evaluations": run.evaluations(),
        "state": {name: tensor.numpy().tobytes() for name, tensor in last[0].items()},
        "scalars": last[1],
        "previews": {p.relative_to(run.path): p.read_bytes() for p in sorted(run.previews.rglob("*.png"))},
        "style": {name: tensor.numpy().tobytes() for name, tensor in style.tensors.items()},
        "facts": style.facts,
    }


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["tarot wand", "a wand, tarot", "a tarot of a sun"], ["wand", "a wand", "a of a sun"]),
        (["tarot, sun", "sun", "a tarots sun"], ["sun", "a tarots sun"]),
        ([f"tarot {i}" for i in range(40)], [f"{i}" for i in range(0, 40, 5)]),
    ],
)
def test_plain_prompts_are_captions_without_the_trigger(captions, expected):
    assert training.plain_prompts(captions, "tarot") == expected
    assert training.plain_prompts(captions, "") == []


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd", "momentum", "adam"])
def test_resume_equals_uninterrupted(studio, tmp_path, optimizer):
    whole = go(studio, tmp_path / "whole", optimizer=optimizer)
    broken = go(studio, tmp_path / "broken", stop_after=4, optimizer=optimizer)
    go(studio, tmp_path / "broken", stop_after=5, optimizer=optimizer)
    go(studio, tmp_path / "broken", optimizer=optimizer)
    assert results(broken) == results(whole)


def test_resume_after_a_crash_replays_the_journal(studio, tmp_path):
    """Killed between two checkpoints, with a torn last line: the journal's whole lines are the run."""
    whole = go(studio, tmp_path / "whole")
    broken = go(studio, tmp_path / "broken", stop_after=5)
    broken.last_file.unlink()
    with open(broken.journal_file, "a") as file:
        file.write('{"step": 5, "lo')
    go(studio, tmp_path / "broken")
    assert results(broken) == results(whole)


def test_a_stop_does_not_wait_for_the_end_of_a_step(studio, tmp_path, monkeypatch):
    """A step given up half-way leaves no trace: the resumed run makes it again as if never begun."""
    whole = go(studio, tmp_path / "whole")
    monkeypatch.setattr(training, "TELL", 0.0)
    run, stop, parts = Run.create(tmp_path / "run", studio.recipe), threading.Event(), []
    run.write_base(model=studio.recipe.model, code_hash=studio.code_hash)

    def report(facts):
        if facts["step"] == 4:
            parts.append(facts["part"])
            if facts["part"] > 0.3:
                stop.set()

    assert training.train(run, studio, report, stop) == "stopped"
    assert len(run.journal()) == 4 and 0 < parts[-1] < 1 and run.status()["part"] == 0
    go(studio, run.path)
    assert results(run) == results(whole)


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd"])
def test_journal_alone_replays_to_theta(studio, tmp_path, optimizer):
    run = go(studio, tmp_path / "run", optimizer=optimizer)
    method = make_method(studio.space, run.recipe())
    for record in run.journal():
        method.apply(record)
    kept = training._read_checkpoint(run.last_file)[0]
    assert method.theta.any()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in method.state()[0].items())


def test_base_is_untouched(studio, tmp_path):
    before = {name: view.base.clone() for name, view in studio.space.views.items()}
    go(studio, tmp_path / "run")
    for name, view in studio.space.views.items():
        assert view.format.get(view.module) is view.base and torch.equal(view.base, before[name])
        assert "forward" not in view.module.__dict__


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 8, "directions": 64},
        {"steps": 8, "directions": 64, "columns": True, "noise": "gaussian"},
        {"steps": 60, "optimizer": "sgd", "directions": 3},
        {"steps": 60, "optimizer": "sgd", "directions": 4, "space": "group"},
    ],
)
def test_the_loss_falls(studio, tmp_path, settings):
    run = go(studio, tmp_path / "run", evaluate_every=4, **settings)
    evaluations = run.evaluations()
    best = min(evaluations, key=lambda e: e["loss"])
    assert best["change"] < -2 * best["change_error"] < 0


def test_rows_of_a_forward_change_nothing_but_rounding(studio, tmp_path):
    whole, chunked = (go(studio, tmp_path / str(rows), rows=rows, steps=3, optimizer="sgd") for rows in (0, 3))
    for a, b in zip(whole.journal(), chunked.journal(), strict=True):
        np.testing.assert_allclose(a.slopes, b.slopes, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd"])
def test_nonfinite_losses_leave_theta_alone_and_are_said(studio, tmp_path, monkeypatch, optimizer):
    real, calls = studio.task.errors, []

    def broken(batch):
        errors = real(batch)
        calls.append(1)  # a prefix never gets here
        return errors * math.nan if len(calls) == 5 else errors

    monkeypatch.setattr(studio.task, "errors", broken)
    run = go(studio, tmp_path / "run", steps=4, step_size=0.1, optimizer=optimizer)
    records = run.journal()
    assert [r.skipped for r in records].count(True) == 1
    assert run.status()["skipped"] == 1 and "was not finite; theta unchanged" in (run.path / "log.txt").read_text()
    method = make_method(studio.space, run.recipe())
    for record in records:
        before = method.theta.clone()
        method.apply(record)
        assert torch.equal(method.theta, before) == record.skipped


def test_a_run_without_finite_losses_gives_up(studio, tmp_path, monkeypatch):
    real, run = studio.task.errors, Run(tmp_path / "run")
    broken = lambda batch: real(batch) + (math.inf if run.evaluations() else 0)  # noqa: E731
    monkeypatch.setattr(studio.task, "errors", broken)
    with pytest.raises(training.TrainingError, match="20 steps in a row .* the style of the best step, 0, is saved"):
        go(studio, run.path, steps=30, evaluate_every=30)
    assert run.style_file.exists() and len(run.journal()) == 20


def test_a_full_disk_keeps_the_last_good_checkpoint(studio, tmp_path, monkeypatch):
    real = sealed.write_atomic

    def full(path, data):
        if path.name == "last.safetensors" and run.status().get("step") == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    run = Run(tmp_path / "run")
    monkeypatch.setattr(sealed, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        go(studio, run.path)
    assert training._read_checkpoint(run.last_file)[1]["step"] == 3
    monkeypatch.undo()
    go(studio, run.path)
    assert results(run) == results(go(studio, tmp_path / "whole"))


def test_both_forms_of_a_style_give_the_same_theta(studio, tmp_path):
    run = go(studio, tmp_path / "run")
    cache = tmp_path / "cache"
    theta, journal = (open_style(p, cache).theta for p in (run.style_file, run.journal_style_file))
    assert torch.equal(theta, journal) and theta.abs().max() > 0
    best = training._read_checkpoint(run.best_file)
    assert torch.equal(theta, best[0]["theta"]) and best[1]["step"] == float(load_style(run.style_file).facts["step"])


def test_a_style_is_small_and_says_what_it_is(studio, tmp_path):
    run = go(studio, tmp_path / "run")
    style = load_style(run.style_file)
    assert run.style_file.stat().st_size < 200_000
    assert style.base["code_hash"] == studio.code_hash and style.facts["trigger"] == "gold"
    assert style.facts["pictures"] == str(studio.examples) and style.facts["licence"]
    assert str(studio.recipe.images) not in run.style_file.read_bytes().decode("latin-1")


def test_a_style_refuses_another_base(studio, tmp_path, straddling_folder):
    run = go(studio, tmp_path / "run")
    with pytest.raises(StyleError, match="was made for .*load the model it was made for"):
        open_style(run.style_file, tmp_path / "cache", model=str(straddling_folder))


def test_damaged_styles_are_refused(studio, tmp_path):
    run = go(studio, tmp_path / "run")
    data = run.style_file.read_bytes()
    for name, bytes_, sentence in (
        ("truncated", data[: len(data) // 2], "not a readable safetensors file"),
        ("empty", b"", "not a readable safetensors file"),
        ("pickle", b"\x80\x04\x95" + data[:100], "not a readable safetensors file"),
    ):
        (tmp_path / name).write_bytes(bytes_)
        with pytest.raises(StyleError, match=sentence):
            load_style(tmp_path / name)
    with pytest.raises(StyleError, match="there is no style"):
        load_style(tmp_path / "nothing")
    journal = load_style(run.journal_style_file)
    for name, broken in (
        ("no weights", {"slopes": journal.tensors["weights"]}),
        ("square", {"weights": journal.tensors["weights"][None]}),
        ("narrow", {"weights": journal.tensors["weights"][1:].clone()}),
        ("cut", {"weights": journal.tensors["weights"][:-1].clone()}),
        ("short", journal.tensors | {"whole": journal.tensors["whole"][1:].clone()}),
        ("negative", journal.tensors | {"whole": -journal.tensors["whole"]}),
        ("no number", journal.tensors | {"whole": journal.tensors["whole"].float() + 0.5}),
        ("more", journal.tensors | {"clip": journal.tensors["weights"].clone()}),
        ("empty", {"weights": journal.tensors["weights"][:0]}),
    ):
        save_style(tmp_path / name, Style("journal", broken, journal.recipe, journal.base, journal.facts))
        with pytest.raises(StyleError, match="journal is damaged|journal does not fit its recipe"):
            open_style(tmp_path / name, tmp_path / "cache", studio.recipe.model)
    style = load_style(run.style_file)
    lost = dict(list(style.tensors.items())[1:])
    save_style(tmp_path / "lost", Style(style.form, lost, style.recipe, style.base, style.facts))
    with pytest.raises(StyleError, match="does not fit the model's layers"):
        open_style(tmp_path / "lost", tmp_path / "cache", studio.recipe.model)


def test_strength_scales_theta_and_zero_is_the_base(studio, tmp_path):
    styled = open_style(go(studio, tmp_path / "run").path, tmp_path / "cache")
    how = {"size": (32, 32), "seed": 1, "steps": 2, "guidance": 2.0}
    base, style = (np.asarray(styled.sample(["a sun"], s, **how)[0], int) for s in (0.0, 1.0))
    plain = np.asarray(studio.preview.sample(studio.recipe, ["a gold of a sun"], 2, [1])[0])
    assert base.shape == style.shape and np.abs(base - style).max() > 0 and plain.shape == (48, 32, 3)
    with pytest.raises(StyleError, match="outside of 0 to 1.5"):
        styled.sample(["a sun"], 1.6, **how)


def test_export_equals_the_preview(studio, tmp_path):
    """The exported folder, loaded afresh, draws what the styled base draws, pixel for pixel."""
    from zo_engine import models
    from zo_engine.tasks.diffusion import sample

    styled = open_style(go(studio, tmp_path / "run").path, tmp_path / "cache")
    how = {"size": (32, 32), "seed": 5, "steps": 2, "guidance": 2.0}
    (ours,) = styled.sample(["a gold sun"], 1.0, **how)
    folder = styled.export(tmp_path / "exported")
    pipe = models.pipeline(folder, models.load_transformer(folder, quantization="nf4"), models.load_vae(folder))
    encoders, length = models.load_text_encoders(folder), models.text_length(folder)
    with torch.no_grad():
        texts = [
            encoders.encode_prompt(p, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
            for p in ("a gold sun", "")
        ]
    (prompt, none) = ((t[0][0], t[2][0]) for t in texts)
    (exported,) = sample(pipe, [prompt], none, [5], width=32, height=32, steps=2, guidance=2.0)
    assert np.array_equal(np.asarray(ours), np.asarray(exported))


def test_a_run_in_half_precision_trains_and_draws(recipe, tmp_path):
    """As a GPU has it: the autoencoder takes the latents in the dtype in which the transformer gives them."""
    half = dataclasses.replace(recipe, dtype="bfloat16", steps=1, evaluate_every=1)
    run = go(training.prepare(half, tmp_path / "cache"), tmp_path / "run")
    assert len(run.journal()) == 1 and run.preview_file(1).exists()
    styled = open_style(run.path, tmp_path / "cache")
    assert len(styled.sample(["a sun"], 1.0, size=(32, 32), seed=1, steps=2, guidance=2.0)) == 1


def test_second_preparation_needs_no_encoder(recipe, tmp_path, monkeypatch):
    training.prepare(recipe, tmp_path)
    monkeypatch.setattr(training.models, "load_vae", lambda *a, **k: pytest.fail("the VAE was loaded again"))
    monkeypatch.setattr(training.models, "load_text_encoders", lambda *a, **k: pytest.fail("text encoders again"))
    training.prepare(recipe, tmp_path)


def test_cache_notices_a_changed_picture_and_a_damaged_file(recipe, data, tmp_path):
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    mine = dataclasses.replace(recipe, images=str(copy), holdout=0.0)
    before = training.prepare(mine, tmp_path / "cache").task.train
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    again = training.prepare(mine, tmp_path / "cache").task.train
    first = next(iter(before))
    assert torch.equal(before[first][0].latents, again[first][0].latents)
    Image.new("RGB", (32, 48), "red").save(copy / "0.png")
    changed = training.prepare(mine, tmp_path / "cache").task.train
    assert not torch.equal(before[(16, 6, 4)][0].latents, changed[(16, 6, 4)][0].latents)


def test_held_out_pictures_are_not_trained_on(studio):
    assert studio.examples + studio.held_out == PICTURES and studio.held_out == 2
    train = {e.latents.numpy().tobytes() for group in studio.task.train.values() for e in group}
    held = {e.latents.numpy().tobytes() for group in studio.task.held_out.values() for e in group}
    assert not train & held


def test_previews_carry_prompt_and_seed(studio, tmp_path):
    run = go(studio, tmp_path / "run", steps=3)
    single = sorted((run.previews / "000000").glob("*.png"))
    with Image.open(single[1]) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.info["seed"] == "43" and image.info["prompt"] == studio.preview.prompts[1]
    assert run.preview_file(0).exists() and run.preview_file(3).exists()
    assert {"a gold of a sun", "a gold of a moon"} >= set(studio.preview.prompts)


def test_plot_of_any_run_is_a_picture(studio, tmp_path):
    run = go(studio, tmp_path / "run", steps=3)
    with Image.open(run.plot_file) as image:
        assert image.width > 800
    empty = Run.create(tmp_path / "empty", studio.recipe)
    assert plot(empty).exists()
    empty.append_step(Step(0, (math.nan,), 0.0, 0.0, math.nan))
    assert plot(empty).exists()


def test_evaluation_error_is_the_standard_error(studio, tmp_path):
    run = go(studio, tmp_path / "run", steps=3)
    first, last = run.evaluations()
    items = np.array(last["items"])
    assert last["error"] == pytest.approx(items.std(ddof=1) / len(items) ** 0.5)
    assert last["change"] == pytest.approx((items - np.array(first["items"])).mean())
    assert json.loads(run.evaluations_file.read_text().splitlines()[0])["step"] == 0


def test_the_first_previews_are_there_before_the_rest_and_before_anything_is_measured(studio, tmp_path, monkeypatch):
    drawing = dataclasses.replace(studio.preview, prompts=list(studio.preview.text)[1:2] * (training.FIRST + 2))
    run, seen, sample = Run.create(tmp_path / "run", studio.recipe), [], training.Drawing.sample

    def watched(self, recipe, prompts=None, **how):
        seen.append((len(prompts), len(list(run.previews.glob("000000/*.png"))), len(run.evaluations())))
        return sample(self, recipe, prompts, **how)

    monkeypatch.setattr(training.Drawing, "sample", watched)
    go(dataclasses.replace(studio, preview=drawing), run.path, steps=1)
    assert seen[:2] == [(training.FIRST, 0, 0), (2, training.FIRST, 0)]
    with Image.open(run.previews / "000000" / f"{training.FIRST:02d}.png") as image:
        assert image.info["seed"] == str(studio.recipe.preview_seed + training.FIRST)


def test_previews_and_saving_on_request_leave_the_run_as_it_was(studio, tmp_path):
    """What is asked for comes after the step, and the steps are the same as without."""
    plain = go(studio, tmp_path / "plain")
    run = Run.create(tmp_path / "asked", studio.recipe)
    run.write_base(model=studio.recipe.model, code_hash=studio.code_hash)
    saved = []

    def report(facts: dict) -> None:
        if facts["part"]:  # a slow step tells of its parts
            return
        saved.append(run.style_file.exists())
        if facts["step"] == 4:
            run.ask("preview")
            run.ask("save")

    assert training.train(run, studio, report, threading.Event()) == "done"
    assert saved == [False] * 4 + [True] * 5 and run.preview_file(4).exists()
    assert [e["step"] for e in run.evaluations()] == [0, 3, 4, 6, 9]
    assert [r.to_json() for r in run.journal()] == [r.to_json() for r in plain.journal()]
    assert "one step works, and took" in (run.path / "log.txt").read_text()
    assert run.status()["one_step"] > 0

"""`qzo verify`: a sound run is found sound, whatever it is examined with; every kind of fault is named."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from test_train import data, go, recipe, studio  # noqa: F401 (fixtures)

from zo_engine import journal, noise, sealed
from zo_engine import recipe as recipes
from zo_engine.noise import Layout, directions
from zo_engine.run import Run
from zo_engine.style import load_style, save_style
from zo_engine.train import prepare, replayed
from zo_engine.verify import rounding, verify

pytestmark = pytest.mark.usefixtures("few_own_texts")


@pytest.fixture(scope="module")
def whole(studio, tmp_path_factory) -> Run:  # noqa: F811
    """Not to be written to."""
    return go(studio, tmp_path_factory.mktemp("verify") / "run", steps=6)


@pytest.fixture
def run(whole, tmp_path) -> Run:
    shutil.copytree(whole.path, tmp_path / "run")
    return Run(tmp_path / "run")


def wrong(run: Run) -> list[str]:
    report = verify(run.path, run.path.parent / ".cache")
    assert report.sound == (not [f for f in report.findings if f.sound is False])
    return [f.what for f in report.findings if f.sound is False]


def test_a_sound_run_is_sound(qzo, run):
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    code, out, err = qzo("verify", run.path, "--json")
    report = json.loads(out)
    assert code == 0 and report["sound"] and report["kind"] == "run", (out, err)
    said = {f["what"]: f["detail"] for f in report["findings"]}
    assert said["last.safetensors, step 6"] == "equals the replay, bit for bit"
    assert sum("equals the replay, bit for bit" in detail for detail in said.values()) == 4
    assert sum("equal, item by item" in detail for detail in said.values()) >= 2
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    assert "ok     replay" in qzo("verify", run.path)[1]


def test_other_rows_and_threads_replay_to_the_same_theta(studio, run):  # noqa: F811
    """Made with one chunking, replayed under others; the loss differs by rounding, and how much is said."""
    threads = torch.get_num_threads()
    try:
        for rows, count in ((1, 1), (3, 2), (64, 1)):
            torch.set_num_threads(count)
            report = verify(run.path, run.path.parent / ".cache", rows=rows)
            assert report.sound, report.text()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "sgd", "rows": 3}, {"optimizer": "adam", "noise": "gaussian"}, {"rows": 1}]
)
def test_journals_of_every_kind_replay_the_same_with_any_number_of_threads(studio, tmp_path, settings):  # noqa: F811
    made = go(studio, tmp_path / "run", steps=4, **settings)
    threads, thetas = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            thetas.append(replayed(studio.changed(**settings | {"rows": count}), made.journal()).theta)
    finally:
        torch.set_num_threads(threads)
    assert thetas[0].any() and all(torch.equal(thetas[0], theta) for theta in thetas[1:])


# What made a journal, and what replays it


@pytest.fixture(scope="module")
def tiers(recipe, tmp_path_factory):  # noqa: F811
    """tiers(what, offload): the studio of a tiny run of pictures or texts, its blocks in memory, away, or on disk."""
    folder = tmp_path_factory.mktemp("tiers")
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}, aye"} for i in range(8)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.save_language_model(folder / "llm")
    short = {"steps": 3, "batch_size": 2, "directions": 4, "depth": 1.0, "evaluate_every": 3, "prior": 0.0}
    recipes_of = {
        "pictures": dataclasses.replace(recipe, **short),
        "texts": recipes.Recipe(texts=str(folder / "t.jsonl"), model=str(model), length=100, evaluate_items=8,
                                answer_tokens=2, preview_every=0, **short),
    }  # fmt: skip
    made = {}

    def studio_of(what: str, offload: str):
        if (what, offload) not in made:
            asked = dataclasses.replace(recipes_of[what], offload=offload)
            made[what, offload] = prepare(asked, folder / "cache")
        return made[what, offload]

    return studio_of


SETTINGS = (
    {"space": "gain"},
    {"space": "absolute", "optimizer": "sgd", "eps": 1e-3},
    {"space": "group", "optimizer": "adam"},
    {"space": "gain", "columns": True, "optimizer": "momentum"},
)
USUAL = {("pictures", "absolute"), ("texts", "group"), ("texts", "gain")}


@pytest.mark.parametrize(
    "what, settings",
    [
        pytest.param(
            what, how, marks=[] if (what, how["space"]) in USUAL and "columns" not in how else pytest.mark.slow
        )
        for what in ("pictures", "texts")
        for how in SETTINGS
    ],
)
def test_a_journal_replays_the_same_under_other_rows_tiers_and_threads(tiers, tmp_path, what, settings):
    """Made in passes of three rows with blocks on disk, replayed with others elsewhere: the same bits of theta."""
    made = go(tiers(what, "disk").changed(rows=3, **settings), tmp_path / "run")
    last, _ = sealed.read(made.last_file)
    assert last["theta"].any()
    threads = torch.get_num_threads()
    try:
        for offload, rows, count in (("resident", 1, 1), ("cpu", 64, 2), ("resident", 5, 3)):
            torch.set_num_threads(count)
            studio_here = tiers(what, offload).changed(rows=rows, **settings)
            assert torch.equal(replayed(studio_here, made.journal()).theta, last["theta"])
    finally:
        torch.set_num_threads(threads)


def test_probes_drawn_in_any_order_are_the_same_directions():
    """One by one and backwards, in another layout, with any number of threads."""
    layout, threads = Layout({"a.rows": (300,), "b.rows": (70,)}), torch.get_num_threads()
    turned = Layout({"b.rows": (70,), "a.rows": (300,)})
    try:
        for kind in ("rademacher", "gaussian"):
            whole = directions(kind, layout, 5, 2, range(6))
            torch.set_num_threads(2)
            for probe in reversed(range(6)):
                assert torch.equal(directions(kind, layout, 5, 2, [probe])[0], whole[probe])
                other = turned.split(directions(kind, turned, 5, 2, [probe])[0])
                assert all(torch.equal(part, other[n]) for n, part in layout.split(whole[probe]).items())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd"])
def test_gaussian_directions_rounded_otherwise_stay_within_the_bound(studio, tmp_path, monkeypatch, optimizer):  # noqa: F811
    """As on a device whose log and cos end in another bit: every normal one ULP up or down, at random."""
    here = studio.changed(noise="gaussian", optimizer=optimizer, step_size=0.05 * (optimizer == "sgd"), steps=5)
    run = go(here, tmp_path / "run")
    most, theta = rounding(run.journal(), here.recipe), replayed(here, run.journal()).theta
    assert rounding(run.journal(), studio.recipe) == 0 and 0 < most < 1e-3 * theta.abs().max()
    normals, generator = noise._normals, torch.Generator().manual_seed(0)

    def rounded(words):
        z = normals(words)
        up = torch.rand(z.shape, generator=generator) < 0.5
        return torch.where(up, z.nextafter(torch.tensor(9.0)), z.nextafter(torch.tensor(-9.0)))

    monkeypatch.setattr(noise, "_normals", rounded)
    apart = (replayed(here, run.journal()).theta - theta).abs().max()
    assert 0 < apart <= most
    report = verify(run.path, run.path.parent / ".cache")
    assert report.sound and "Gaussian directions may" in report.text(), report.text()
    tensors, metadata = sealed.read(run.last_file)
    metadata.pop(sealed.DIGEST)
    sealed.write(run.last_file, {**tensors, "theta": tensors["theta"] + 2 * most}, metadata)
    assert "last.safetensors, step 5" in wrong(run)


def test_a_sound_style_is_sound_alone_and_beside_its_twin(qzo, run, tmp_path):
    for name in ("style.safetensors", "style-journal.safetensors"):
        code, out, _ = qzo("verify", run.path / name)
        assert code == 0 and "equals the replay, bit for bit" in out and "WRONG" not in out
        (tmp_path / "alone").mkdir(exist_ok=True)
        shutil.copy(run.path / name, tmp_path / "alone" / "my.safetensors")
        alone = tmp_path / "alone" / "my.safetensors"
        code, out, _ = qzo("verify", alone, "--json", "--model", Run(run.path).recipe().model)
        assert code == 0 and json.loads(out)["sound"] and json.loads(out)["kind"] == "style"
        code, out, _ = qzo("verify", alone)
        assert code == 1 and "was made for a model in a folder named 'model'" in out and "with --model" in out


def test_a_theta_that_is_not_the_journals_is_found(run):
    """Each file sealed again, so that only the replay can tell."""
    for file in (run.last_file, run.best_file):
        tensors, metadata = sealed.read(file)
        tensors["theta"] = tensors["theta"] + 1e-6 * (torch.arange(len(tensors["theta"])) == 7)
        metadata.pop(sealed.DIGEST)
        sealed.write(file, tensors, metadata)
    style = load_style(run.style_file)
    first = next(iter(style.tensors))
    save_style(run.style_file, dataclasses.replace(style, tensors=style.tensors | {first: style.tensors[first] + 1e-6}))
    best = style.facts["step"]
    assert wrong(run) == [
        "last.safetensors, step 6",
        f"best.safetensors, step {best}",
        f"style.safetensors, step {best}",
    ]


def test_a_journal_that_was_changed_and_sealed_again_is_found(run):
    lines = [journal.unseal(line) for line in run.journal_file.read_text().splitlines()]
    lines[1]["weights"][0] += 0.25
    run.journal_file.write_text("".join(journal.seal(json.dumps(line)) + "\n" for line in lines))
    found = wrong(run)
    assert "last.safetensors, step 6" in found and any("held-out loss, step 6" in what for what in found)


def test_a_loss_that_was_not_measured_is_found(run):
    lines = [journal.unseal(line) for line in run.evaluations_file.read_text().splitlines()]
    lines[-1]["items"] = [item * 0.9 for item in lines[-1]["items"]]
    lines[-1]["loss"] *= 0.9
    run.evaluations_file.write_text("".join(journal.seal(json.dumps(line)) + "\n" for line in lines))
    assert "held-out loss, step 6" in wrong(run)


def test_damage_and_another_base_are_named(qzo, run):
    content = bytearray(run.best_file.read_bytes())
    content[-5] ^= 4
    run.best_file.write_bytes(content)
    assert wrong(run) == ["best.safetensors"]
    run.write_base(**run.base() | {"code_hash": "0" * 64})
    assert wrong(run) == ["best.safetensors", "base"]
    run.journal_file.write_text(run.journal_file.read_text().replace('"loss": ', '"loss": 1'))
    code, out, _ = qzo("verify", run.path)
    assert code == 1 and "WRONG  journal" in out and "its checksum does not fit" in out


def test_a_language_models_run_is_examined_the_same(qzo, tmp_path):
    model = tiny.save_language_model(tmp_path / "llm")
    rows = [{"text": f"{'fine' if i % 2 else 'dull'} {i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipes.Recipe(
        texts=str(tmp_path / "t.jsonl"), model=str(model), steps=2, batch_size=2, directions=4, depth=0.5, length=100,
        evaluate_items=8, preview_every=0, answer_tokens=2,
    )  # fmt: skip
    run = go(prepare(made, tmp_path / "cache"), tmp_path / "run")
    code, out, err = qzo("verify", run.path)
    assert code == 0 and out.count("bit for bit") >= 3 and "equal, item by item" in out, (out, err)


def test_what_is_there_half_is_said_and_not_called_wrong(studio, tmp_path):  # noqa: F811
    made = go(studio, tmp_path / "run", stop_after=2, steps=6)
    assert wrong(made) == []
    made.last_file.unlink()
    made.style_file.unlink()
    assert wrong(made) == []

"""The run folder: whole files, torn ends, damage, and the lock."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

import zo_engine.run as run_module
from zo_engine.journal import Step, short
from zo_engine.recipe import Recipe
from zo_engine.run import Run, RunError, new_name, write_atomic

STEPS = [
    Step(0, (0.25, -1.5), 1.5, 0.01, 2.0, (0.1, 2.2, 2.0, 1.9)),
    Step(1, (math.nan, 0.5), 0.0, 0.0, math.inf),
    Step(2, (short(1 / 3), 2e-7), 2.0, 0.02, 1.75),
]


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run.create(tmp_path / "run", Recipe(trigger="zq"))
    for record in STEPS:
        made.append_step(record)
    return made


def test_journal_round_trip(run):
    assert [s.to_json() for s in run.journal()] == [s.to_json() for s in STEPS]
    assert [s.skipped for s in run.journal()] == [False, True, False]
    assert run.journal()[2].slopes == STEPS[2].slopes


def test_the_log_is_bounded(run, monkeypatch):
    from zo_engine import run as runs

    monkeypatch.setattr(runs, "LOG", 1000)
    for i in range(200):
        run.log(f"line {i}")
    old, new = (run.path / name for name in ("log.old.txt", "log.txt"))
    assert "line 199" in new.read_text() and sum(f.stat().st_size for f in run.path.glob("log*")) < 3000
    lines = (old.read_text() + new.read_text()).splitlines()
    assert [int(line.split()[-1]) for line in lines] == list(range(200 - len(lines), 200))


def test_short_is_exact_in_fp32():
    import numpy as np

    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-20, 20, 0.04)
    for value in values.astype(np.float32):
        assert np.float32(short(value)) == value


def test_torn_last_line_is_left_out_and_cut(run):
    with open(run.journal_file, "a") as file:
        file.write('{"step": 3, "loss": 1.')
    assert len(run.journal()) == 3
    run.trim(3)
    assert run.journal_file.read_text().endswith("}\n") and len(run.journal()) == 3


def test_damage_in_the_middle_is_named(run):
    lines = run.journal_file.read_text().split("\n")
    run.journal_file.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(RunError, match="line 2 of .*journal.jsonl is damaged"):
        run.journal()


def test_trim_drops_later_evaluations(run):
    for step in (0, 2, 4):
        run.append_evaluation({"step": step, "loss": 1.0})
    run.trim(2)
    assert [e["step"] for e in run.evaluations()] == [0, 2] and len(run.journal()) == 2


def test_recipe_comes_back(run):
    assert run.recipe() == Recipe(trigger="zq")


def test_a_run_is_not_overwritten(run):
    with pytest.raises(RunError, match="already holds a run; continue it with"):
        Run.create(run.path, Recipe())


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="not an empty folder"):
        Run.create(tmp_path, Recipe())
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)


def test_a_recipe_beside_its_data_is_no_run(tmp_path):
    """Resumed, it would have been trained right there; a copy without hidden files is still a run."""
    (tmp_path / "recipe.toml").write_text('trigger = "zq"\n')
    with pytest.raises(RunError, match="has a recipe, but no run of it; begin one with `qzo train"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert Run.open(tmp_path).recipe().trigger == "zq"


def test_a_run_killed_while_it_was_made_can_be_continued_or_made(tmp_path):
    run = Run.create(tmp_path / "run", Recipe())
    assert Run.open(run.path)
    run.recipe_file.unlink()  # it is written last
    with pytest.raises(RunError, match="has no recipe.toml"):
        Run.open(run.path)
    assert Run.create(run.path, Recipe())


def test_the_name_of_a_new_run_outlives_a_power_cut(tmp_path, monkeypatch):
    flushed, real = [], run_module._sync_folder
    monkeypatch.setattr(run_module, "_sync_folder", lambda folder: (flushed.append(folder), real(folder)))
    Run.create(tmp_path / "runs" / "new", Recipe())
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "new"} <= set(flushed)


def test_lock_refuses_a_second_process_and_is_freed_by_death(run):
    code = (
        "import sys; from zo_engine.run import Run\n"
        "with Run(sys.argv[1]).lock(): print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(RunError, match="is in use by another process"), run.lock():
        pass
    other.kill()
    other.wait()
    with run.lock():
        pass


def test_atomic_write_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "style"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["style"]


def test_a_file_that_is_being_read_is_replaced_when_it_has_been(tmp_path, monkeypatch):
    """What Windows does while another process reads a file."""
    path, refusals, really = tmp_path / "status.json", [], os.replace
    write_atomic(path, b"old")

    def read_by_another(source, target):
        refusals.append(path.read_bytes())
        if len(refusals) < 3 or path.read_bytes() == b"new":
            raise PermissionError(errno.EACCES, "Access is denied")
        really(source, target)

    monkeypatch.setattr(os, "replace", read_by_another)
    write_atomic(path, b"new")
    assert refusals == [b"old"] * 3 and path.read_bytes() == b"new"
    monkeypatch.setattr(run_module, "PATIENCE", 0.1)
    with pytest.raises(PermissionError, match="Access is denied"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["status.json"]


def test_status_has_no_words_json_lacks(run):
    run.write_status("running", loss=math.nan, step=3)
    text = (run.path / "status.json").read_text()
    assert json.loads(text)["loss"] is None and "NaN" not in text
    run.write_failure("no memory")
    assert run.status()["state"] == "failed" and run.status()["reason"] == "no memory" and run.status()["step"] == 3


def test_new_names_are_free_and_tame(tmp_path):
    first = new_name(tmp_path, "../My Tarot!")
    assert first == tmp_path / "my-tarot"
    first.mkdir()
    assert new_name(tmp_path, "my tarot") == tmp_path / "my-tarot-2"


def test_what_is_asked_of_a_run_is_heard_once(tmp_path):
    run = Run.create(tmp_path / "run", Recipe())
    assert run.asked() == set()
    run.ask("preview")
    run.ask("preview")
    run.ask("save")
    assert run.asked() == {"preview", "save"} and run.asked() == set()
    with pytest.raises(AssertionError):
        run.ask("../journal")


def test_the_heart_beats_while_the_process_answers(tmp_path):
    run, threads = Run.create(tmp_path / "run", Recipe()), threading.active_count()
    with run.heartbeat():
        os.utime(run.heartbeat_file, (0, 0))
        while run.heartbeat_file.stat().st_mtime == 0:
            time.sleep(0.01)
    os.utime(run.heartbeat_file, (0, 0))
    assert run.heartbeat_file.stat().st_mtime == 0 and threading.active_count() == threads


def test_a_status_says_which_process_wrote_it(tmp_path):
    run = Run.create(tmp_path / "run", Recipe())
    run.write_status("running", step=1)
    assert run.status()["pid"] == os.getpid() and run.status()["started"] == psutil.Process().create_time()

"""Killed at random moments and in the middle of every kind of write, a run ends as if it had never been disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from power import Disk

KILLING = Path(__file__).with_name("killing.py")
KINDS = {"journal", "evaluations", "checkpoint", "preview", "status", "style", "cache", "blocks", "recipe", "base"}


def killed(folder: Path, kills: int, seed: int = 0, plant: str = "none") -> dict:
    """What `killing.py` found; its own process, in which nothing but the forks computes."""
    words = [sys.executable, str(KILLING), str(folder), "--kills", str(kills), "--seed", str(seed), "--plant", plant]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_twenty_kills_lose_nothing_and_planted_defects_are_noticed(tmp_path):
    table = killed(tmp_path, 20, plant="few")
    assert table["lost"] == []
    assert table["kills"] >= 17 and all(table["by"].values())  # one that ended before its kill is not counted
    assert table["power cuts"]
    assert {event.split()[0] for events in table["events"].values() for event in events} >= KINDS
    assert len(table["planted"]) == 3 and all(table["planted"].values()), table["noticed"]


@pytest.mark.slow
def test_every_planted_defect_is_noticed(tmp_path):
    table = killed(tmp_path, 0, plant="all")
    assert len(table["planted"]) >= 9 and all(table["planted"].values()), table["noticed"]


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path):
    table = killed(tmp_path, 200, seed=1)
    assert table["lost"] == [] and table["kills"] >= 180


# What a power cut leaves


def left(tmp_path: Path, write, seeds: int = 40) -> set:
    """Everything that may be found after a power cut: the contents of `file`, None where it is gone."""
    found = set()
    for seed in range(seeds):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "file").write_text("old")
        disk = Disk(str(folder), seed)
        write(folder, disk)
        disk.cut()
        found.add((folder / "file").read_text() if (folder / "file").exists() else None)
    return found


def flush(disk: Disk, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    disk.flushed(descriptor)
    os.close(descriptor)


def written(folder: Path, disk: Disk, name: str, text: str) -> Path:
    disk.opening(str(folder / name))
    (folder / name).write_text(text)
    return folder / name


def test_a_file_that_was_flushed_and_named_stays(tmp_path):
    def write(folder, disk):
        new = written(folder, disk, "new", "whole")
        flush(disk, new)
        disk.replacing(str(new), str(folder / "file"))
        new.replace(folder / "file")
        flush(disk, folder)

    assert left(tmp_path, write) == {"whole"}


def test_a_name_that_was_not_flushed_is_the_old_or_the_new_one(tmp_path):
    def write(folder, disk):
        new = written(folder, disk, "new", "whole")
        flush(disk, new)
        disk.replacing(str(new), str(folder / "file"))
        new.replace(folder / "file")

    assert left(tmp_path, write) == {"old", "whole"}


def test_contents_that_were_not_flushed_are_there_in_part(tmp_path):
    def write(folder, disk):
        new = written(folder, disk, "new", "whole")
        disk.replacing(str(new), str(folder / "file"))
        new.replace(folder / "file")
        flush(disk, folder)

    assert left(tmp_path, write) >= {"", "whole"[:2], "whole"}


def test_a_line_that_was_not_flushed_is_torn_and_what_was_before_it_stays(tmp_path):
    def write(folder, disk):
        disk.opening(str(folder / "file"))
        (folder / "file").write_text("old line\n")
        flush(disk, folder / "file")
        disk.opening(str(folder / "file"))
        (folder / "file").write_text("old line\nnew line\n")

    found = left(tmp_path, write)
    assert all(text.startswith("old line\n") for text in found) and len(found) > 4

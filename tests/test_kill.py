"""Killed at random moments and in the middle of every kind of write, a run ends as if it had never been disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).with_name("killing.py")


def killed(folder: Path, kills: int, seed: int = 0) -> dict:
    """What `killing.py` found; its own process, in which nothing but the forks computes."""
    words = [sys.executable, str(KILLING), str(folder), "--kills", str(kills), "--seed", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_twenty_kills_lose_nothing(tmp_path):
    table = killed(tmp_path, 20)
    assert table["lost"] == []
    assert table["kills"] >= 18 and all(table["by"].values())  # one that ended before its kill is not counted
    kinds = {event.split()[0] for events in table["events"].values() for event in events}
    assert kinds >= {"journal", "evaluations", "checkpoint", "preview", "status", "style", "cache", "recipe", "base"}


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path):
    table = killed(tmp_path, 200, seed=1)
    assert table["lost"] == [] and table["kills"] >= 190

"""The run folder: the only file that knows file names. Imports no torch, so that a page can read runs cheaply.

runs/<name>/
  recipe.toml        what the run is, every setting resolved
  run.json           the base it belongs to: model, hash of its codes, versions
  journal.jsonl      one line a step: the run itself
  evaluations.jsonl  held-out losses
  status.json        state, step, last figures, process id and its start: for whoever looks on
  heartbeat          touched while the process can still answer
  requests/          an empty file named after each thing that was asked of the run
  log.txt            what was said
  previews/          000100.png, one grid each, and 000100/ with its single pictures; of a language model 000100.json
  checkpoints/       last.safetensors, best.safetensors
  plots/             loss.png
  style.safetensors  the result; style-journal.safetensors, the same as a journal
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from zo_engine import journal
from zo_engine import recipe as recipes
from zo_engine.journal import Record

STATES = ("running", "stopped", "done", "failed")
REQUESTS = ("preview", "save")  # what may be asked of a run while it trains
BEAT = 0.5  # seconds between two heartbeats


class RunError(ValueError):
    """A run folder that cannot be used; one sentence that says why and what to do."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Written whole or not at all: to a temporary name beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """One run folder. Reading needs no lock; training holds `lock()`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.toml"
        self.journal_file = self.path / "journal.jsonl"
        self.evaluations_file = self.path / "evaluations.jsonl"
        self.style_file = self.path / "style.safetensors"
        self.journal_style_file = self.path / "style-journal.safetensors"
        self.last_file = self.path / "checkpoints" / "last.safetensors"
        self.best_file = self.path / "checkpoints" / "best.safetensors"
        self.plot_file = self.path / "plots" / "loss.png"
        self.previews = self.path / "previews"
        self.heartbeat_file = self.path / "heartbeat"

    @classmethod
    def create(cls, path: Path, recipe: recipes.Recipe) -> "Run":
        """A new run folder. Raises RunError if something is already there."""
        run = cls(path)
        if run.recipe_file.exists():
            raise RunError(f"{path} already holds a run; continue it with `qzo resume {path}`, or choose another --out")
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise RunError(f"{path} exists and is not an empty folder; choose another --out")
        write_atomic(run.recipe_file, recipes.dump(recipe))
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run folder. Raises RunError if there is none."""
        run = cls(path)
        if not run.recipe_file.is_file():
            raise RunError(f"{path} is not a run folder: it has no recipe.toml")
        return run

    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.recipe_file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that trains; the kernel lets go of it however that process ends."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path} is in use by another process; wait for it, or stop it first") from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Touches the heartbeat from a thread, so that a process which is stopped, frozen or stuck falls silent."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                with suppress(OSError):  # a full disk: the training itself will say so
                    self.heartbeat_file.touch()

        self.heartbeat_file.touch()
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def ask(self, request: str) -> None:
        """Ask the process that trains for one of REQUESTS; it answers after the step that it is in."""
        assert request in REQUESTS
        write_atomic(self.path / "requests" / request, "")

    def asked(self) -> set[str]:
        """What was asked since the last call."""
        found = {request for request in REQUESTS if (self.path / "requests" / request).exists()}
        for request in found:
            (self.path / "requests" / request).unlink(missing_ok=True)
        return found

    # What the run belongs to, and how it stands

    def write_base(self, **facts: Any) -> None:
        write_atomic(self.path / "run.json", json.dumps(facts, indent=1))

    def base(self) -> dict[str, Any]:
        return self._json("run.json")

    def write_status(self, state: str, **facts: Any) -> None:
        assert state in STATES
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        who = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        write_atomic(self.path / "status.json", json.dumps({"state": state, "time": now, **who, **facts}))

    def write_failure(self, reason: str) -> None:
        """The run stands as failed, with the reason; a disk too full even for this keeps the old status."""
        with suppress(OSError):
            last = {k: v for k, v in self.status().items() if k not in ("state", "time", "pid", "started")}
            self.write_status("failed", **last | {"reason": reason})

    def status(self) -> dict[str, Any]:
        return self._json("status.json")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise RunError(f"{self.path / name} is damaged; it can be deleted, the journal holds the run") from None

    def log(self, text: str) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    # The journal

    def append_step(self, record: Record) -> None:
        _append(self.journal_file, record.to_json())

    def journal(self) -> list[Record]:
        """Every whole line; a last line torn by a crash is left out. Raises RunError for damage before that."""
        return [journal.read(line) for line in self._lines(self.journal_file)]

    def append_evaluation(self, facts: dict[str, Any]) -> None:
        _append(self.evaluations_file, json.dumps(facts))

    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines(self.evaluations_file)]

    def trim(self, step: int) -> None:
        """Cut torn ends, and evaluations made after `step`, so that a resumed run goes on from whole lines."""
        # record n makes step n + 1 of theta; an evaluation is of theta after that many steps
        for file, last in ((self.journal_file, step - 1), (self.evaluations_file, step)):
            if file.exists():
                kept = [line for line in self._lines(file) if json.loads(line)["step"] <= last]
                write_atomic(file, "".join(f"{line}\n" for line in kept))

    def _lines(self, file: Path) -> list[str]:
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        lines.pop()  # what follows the last newline: nothing, or a torn line
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except json.JSONDecodeError:
                raise RunError(f"line {number} of {file} is damaged; cut the file there and resume") from None
        return lines

    # Previews

    def preview_file(self, step: int) -> Path:
        return self.previews / f"{step:06d}.png"

    def answers_file(self, step: int) -> Path:
        return self.previews / f"{step:06d}.json"


def _append(file: Path, line: str) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(line + "\n")
        out.flush()


def new_name(root: Path, wish: str) -> Path:
    """A free folder below `root`: the wish as a file name, with a number behind it if need be."""
    slug = re.sub(r"[^a-z0-9]+", "-", wish.lower()).strip("-") or "run"
    number = 1
    while (path := Path(root) / (slug if number == 1 else f"{slug}-{number}")).exists():
        number += 1
    return path

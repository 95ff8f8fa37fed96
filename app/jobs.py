"""Runs as processes: start, stop, and find again. Nothing is remembered that is not on disk; imports no gradio.

<runs-dir>/.jobs/
  device.lock          held by the one process that uses the device
  train/<run>.json     process id, its start time, the words it was started with, and when it was asked to stop
  train/<run>.toml     the recipe as it was when the button was pressed
  train/<run>.log      what the process said
  compare/ chat/ export/ texts/ plan/ inspect/ download/ doctor/    the same for other commands

A process is the one of a record if its id and its start time agree: an id alone is given to others after a restart.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import Any

import psutil
from filelock import FileLock

from app.worker import WAITING, taken
from zo_engine import recipe as recipes
from zo_engine.hub import CHECKOUT
from zo_engine.run import Run, RunError, after_boot, new_name, write_atomic

PATIENCE = 120  # seconds that a process gets to leave its step and save, before it is ended
PATIENCE_TO_END = 20  # seconds that a process gets to end once it has saved
CHANGED_DATA = "--changed-data"  # what lets `qzo resume` go on, and what it says where it does not
SILENCE = 3.0  # seconds without a heartbeat, after which a process is said to be silent
LIVE = ("waiting", "preparing", "running", "silent", "stopping")
RESUMABLE = ("stopped", "interrupted", "failed")
_children: list[subprocess.Popen] = []  # of this server, so that they do not stay as zombies
_asking = RLock()


class JobError(ValueError):
    """Something that cannot be started or stopped; one sentence that says why and what to do."""


class Job:
    """One detached process of the command line, and the record that finds it again."""

    def __init__(self, runs: Path, kind: str, name: str):
        self.runs, self.name = Path(runs), name
        self.file = self.runs / ".jobs" / kind / f"{name}.json"
        self.log_file, self.recipe_file = self.file.with_suffix(".log"), self.file.with_suffix(".toml")

    def record(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def start(self, *words: str, alone: bool = True) -> None:
        """Start `qzo WORDS` as a process of its own, `alone` on the device.

        Raises JobError if the last one of this name is still there.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if self.alive():
                raise JobError(f"{self.name} is running already; wait for it, or stop it first")
            lock = self.runs / ".jobs" / "device.lock"
            held = taken(lock) if alone else None  # from this moment on, and not only once the process has begun
            module = ["app.worker", str(lock), "" if held is None else str(held)] if alone else ["zo_engine"]
            command = [sys.executable, "-m", *module, "--runs-dir", str(self.runs), *words]
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
            try:
                with open(self.log_file, "wb") as log:
                    child = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL,
                                             stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                             pass_fds=() if held is None else (held,))  # fmt: skip
            finally:
                if held is not None:
                    os.close(held)  # the child's alone now
            _children.append(child)
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(child.pid)
                born = {"started": process.create_time(), "after_boot": after_boot(process)}
                write_atomic(self.file, json.dumps({"pid": child.pid, **born, "words": words}))

    def ask(self, settings: recipes.Recipe, reads: tuple[str, ...], command: str, *more: str) -> None:
        """Let `qzo COMMAND RECIPE --json` say something of a recipe, once for every state of the settings it `reads`
        and of the file of texts; what it says is in the log."""
        with _asking:
            if self._answers(settings, reads):
                return
            if process := self.process():
                process.kill()  # it answers what the recipe was before
                process.wait()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.log_file.unlink(missing_ok=True)
            self.recipe_file.write_text(recipes.dump(settings), encoding="utf-8")
            self.start(command, str(self.recipe_file), "--json", *more, alone=False)

    def _answers(self, settings: recipes.Recipe, reads: tuple[str, ...]) -> bool:
        """Whether the process of the record answers, or has answered, for just these settings."""
        if not self.record() or not self.recipe_file.exists():
            return False
        theirs = recipes.load(self.recipe_file)
        if any(getattr(theirs, name) != getattr(settings, name) for name in reads):
            return False
        file = Path(settings.texts)
        return not file.is_file() or file.stat().st_mtime <= self.recipe_file.stat().st_mtime

    def process(self) -> psutil.Process | None:
        """The process of the record, if it still lives."""
        _children[:] = [child for child in _children if child.poll() is None]
        record = self.record()
        try:
            process = psutil.Process(record["pid"])
            return process if _same(process, record) and process.status() != psutil.STATUS_ZOMBIE else None
        except (KeyError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def alive(self) -> bool:
        return self.process() is not None

    def stop(self) -> None:
        """Ask the process to leave its step and save; `settle` ends it if it does not."""
        if process := self.process():
            write_atomic(self.file, json.dumps(self.record() | {"stop": time.time()}))
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)

    def settle(self) -> None:
        """End a process that was asked to stop and did not; its journal is whole up to the last step."""
        asked = self.record().get("stop")
        if asked and time.time() - asked > PATIENCE and (process := self.process()):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def log(self, lines: int = 200) -> list[str]:
        """The last lines that the process said."""
        try:
            with open(self.log_file, "rb") as file:
                file.seek(max(0, os.path.getsize(self.log_file) - 40_000))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]

    def complaint(self) -> str:
        """The one sentence with which the process ended, or what can be said without one."""
        lines = self.log()
        for line in reversed(lines):
            if line.startswith(("qzo: ", "Error: ")):
                return line.split(": ", 1)[1]
        if lines and lines[-1] not in (WAITING, "starting"):
            return f"the process ended unexpectedly; its last words were: {lines[-1]}"
        return "the process ended without a word; most likely the machine ran out of memory, or was switched off"


@dataclass(frozen=True)
class Standing:
    """How a run stands, as the page shows it."""

    name: str
    state: str  # waiting, preparing, running, silent, stopping, done, stopped, failed, interrupted
    message: str = ""  # what it is doing, or why it ended
    status: dict[str, Any] = field(default_factory=dict)
    why_not_resume: str = ""

    @property
    def changed(self) -> bool:
        """It would not go on because its pictures or texts are not what they were; the next Resume means it."""
        return not self.live and CHANGED_DATA in self.message

    @property
    def live(self) -> bool:
        return self.state in LIVE


class Jobs:
    """The runs of a folder."""

    def __init__(self, runs: Path):
        self.runs = Path(runs).resolve()

    def job(self, name: str, kind: str = "train") -> Job:
        return Job(self.runs, kind, name)

    def run(self, name: str) -> Run:
        """The run folder of a name out of `names`. Raises JobError for any other."""
        if name not in self.names():
            raise JobError(f"there is no run {name[:80]!r} in {self.runs}; it may have been moved or renamed")
        return Run(self.runs / name)

    def names(self) -> list[str]:
        """Every run, and every start that never became one; the newest first."""
        found = {f.parent.name: f.stat().st_mtime for f in self.runs.glob("*/recipe.toml")}
        for file in (self.runs / ".jobs" / "train").glob("*.json"):
            found[file.stem] = max(found.get(file.stem, 0), file.stat().st_mtime)
        known = (self.runs / n for n in found if not n.startswith("."))
        there = [path.name for path in known if path.is_dir()]
        return sorted(there, key=lambda n: found[n], reverse=True)

    def live(self) -> list[str]:
        """Runs that use the device or wait for it."""
        return [name for name in self.names() if self.look(name).live]

    def start(self, recipe: recipes.Recipe, wish: str) -> str:
        """Train a copy of the recipe in a new run folder; gives the run's name."""
        self.runs.mkdir(parents=True, exist_ok=True)
        while True:
            path = new_name(self.runs, wish)
            try:
                path.mkdir()  # the name is taken from here on, whatever else starts at this moment
                break
            except FileExistsError:
                continue
        job = self.job(path.name)
        write_atomic(job.recipe_file, recipes.dump(recipe))
        self.end_chats()
        job.start("train", str(job.recipe_file), "--out", str(path))
        return path.name

    def resume(self, name: str) -> None:
        """Go on where a run stopped. Raises JobError with the reason if that is not possible."""
        self.run(name)  # refuses what is no run
        standing = self.look(name)
        if standing.why_not_resume:
            raise JobError(f"{name} cannot be resumed: {standing.why_not_resume}")
        if process := self.job(name).process():  # it has said its last word, and is about to end
            with suppress(psutil.TimeoutExpired):
                process.wait(PATIENCE_TO_END)
        self.end_chats()
        self.job(name).start("resume", str(self.runs / name), *([CHANGED_DATA] if standing.changed else []))

    def end_chats(self, name: str = "*") -> None:
        """Let go of the models that are kept loaded to talk with, of one run or of all: what was said is on disk."""
        for file in (self.runs / ".jobs" / "chat").glob(f"{name}.json"):
            self.job(file.stem, "chat").stop()

    def stop(self, name: str) -> None:
        """Ask a run to leave its step and save."""
        self.run(name)  # refuses what is no run
        job, standing = self.job(name), self.look(name)
        if not standing.live:
            raise JobError(f"{name} is not running: it is {standing.state}")
        if job.alive():
            job.stop()
        elif process := _writer(standing.status):  # started on the command line
            process.send_signal(signal.SIGTERM)

    def ask(self, name: str, request: str) -> None:
        """Ask a run for one of run.REQUESTS, to be done after the step that it is in. Raises JobError."""
        run, standing = self.run(name), self.look(name)
        if standing.state != "running":
            raise JobError(f"{name} cannot do that now: it is {standing.state}")
        run.ask(request)

    def discard(self, name: str) -> None:
        """End a run at once and take it out of the list; its folder is kept under .bin."""
        self.run(name)  # refuses what is no run
        process = self.job(name).process() or _writer(self.look(name).status)
        if process:
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):  # ends when its own server looks
                process.kill()
                process.wait(PATIENCE_TO_END)
        self.bin(name)

    def rename(self, name: str, wish: str) -> str:
        """Give a run that is not live another name; gives the name it has then. Raises JobError."""
        self.run(name)  # refuses what is no run
        self.end_chats(name)
        busy = [kind for kind in ("compare", "export") if self.job(name, kind).alive()]
        if self.look(name).live or busy:
            raise JobError(f"{name} is at work; wait for it, or stop it first")
        if not wish.strip():
            raise JobError(f"say what {name} shall be called")
        path = new_name(self.runs, wish)
        os.rename(self.runs / name, path)
        for file in self._records(name):
            if file.parent.name == "train":
                os.replace(file, file.with_name(path.name + file.suffix))
            else:
                file.unlink()  # what it said is about files under the old name
        return path.name

    def _records(self, name: str) -> list[Path]:
        """The files of all processes of a run."""
        return [f for f in (self.runs / ".jobs").glob("*/*") if f.stem == name and f.suffix != ".lock"]

    def bin(self, name: str) -> None:
        """Take a run out of the list; its folder is kept under .bin."""
        self.run(name)  # refuses what is no run
        if self.look(name).live:
            raise JobError(f"{name} is still running; stop it first")
        self.end_chats(name)
        shutil.move(self.runs / name, new_name(self.runs / ".bin", name))
        for file in self._records(name):
            file.unlink()

    def look(self, name: str) -> Standing:
        """How a run stands, from its files and its process alone; `name` is one of `names`."""
        job, run = self.job(name), Run(self.runs / name)
        job.settle()
        record, alive = job.record(), job.alive()
        try:
            status = run.status()
        except RunError as error:
            return Standing(name, "failed", str(error), why_not_resume="" if not alive else "it is running")
        fresh = bool(status) and _time(status) >= record.get("started", 0) - 1
        state, message = self._state(job, record, alive, status, fresh)
        if state == "waiting":
            self.end_chats()  # a run that waits for the device goes before a model that is only kept at hand
        return Standing(name, state, message, status, self._why_not_resume(run, state))

    def _state(self, job: Job, record: dict, alive: bool, status: dict, fresh: bool) -> tuple[str, str]:
        last = (job.log(1) or [""])[0]
        if alive and record.get("stop") and not (fresh and status["state"] != "running"):
            if not fresh:
                return "stopping", "Ending before its first step."
            return "stopping", (
                "Leaving the step that is under way, and saving what the steps before it made. "
                "Resume will begin that step again."
            )
        if alive and not fresh:
            return ("waiting", WAITING) if last == WAITING else ("preparing", last)
        if record and not alive and not fresh:
            return ("stopped", "before its first step") if record.get("stop") else ("failed", job.complaint())
        if not status:
            return "interrupted", "before its first step"
        if status["state"] == "running" and not alive and _writer(status) is None:
            if record.get("stop"):
                return "interrupted", f"ended {PATIENCE} s after it was asked to stop; every step is kept"
            return "interrupted", job.complaint() if record else "its process is gone; every step is kept"
        if status["state"] == "running" and (silent := _silent(Run(self.runs / job.name))) > SILENCE:
            return "silent", (
                f"has not answered for {silent:.0f} s; the machine is overloaded, or the process hangs. "
                "Stopping it loses the step in progress at most."
            )
        if status["state"] == "stopped":
            return "stopped", f"Everything up to step {status['step']:,} is kept, and Resume goes on from there."
        return status["state"], status.get("reason", "")

    def _why_not_resume(self, run: Run, state: str) -> str:
        if state in LIVE:
            return "it is running"
        if state == "done":
            return "it is complete"
        if not run.recipe_file.exists():
            return "it never got as far as its first step; start it again"
        return "" if state in RESUMABLE else f"it is {state}"


def _same(process: psutil.Process, record: dict[str, Any]) -> bool:
    """Whether a process is the one of a record: by its start, also where the clock has been set since."""
    by_clock = abs(process.create_time() - record["started"]) < 1
    return by_clock or abs(after_boot(process) - record.get("after_boot", -1)) < 0.02


def _time(status: dict[str, Any]) -> float:
    return datetime.fromisoformat(status["time"]).timestamp()


def _silent(run: Run) -> float:
    """Seconds since the last heartbeat."""
    try:
        return time.time() - run.heartbeat_file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _writer(status: dict[str, Any]) -> psutil.Process | None:
    """The process that wrote a status, if it lives: one of the same id and start."""
    try:
        process = psutil.Process(status["pid"])
        same = _same(process, status) if "started" in status else process.create_time() <= _time(status) + 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, TypeError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        return None

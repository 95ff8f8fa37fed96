"""The run folder: the only file that knows file names. Imports no torch, so that a page can read runs cheaply.

runs/<name>/
  recipe.toml        what the run is, every setting resolved
  run.json           what it belongs to: the model, the hash of its codes, digests of its files and of what is learnt
  journal.jsonl      one line a step: the run itself
  evaluations.jsonl  held-out losses
  status.json        state, step, last figures, process id and its start: for whoever looks on
  heartbeat          touched while the process can still answer
  requests/          an empty file named after each thing that was asked of the run
  log.txt            what was said; log.old.txt, before that
  previews/          000100.png, one grid each, and 000100/ with its single pictures; of a language model 000100.json
  checkpoints/       last.safetensors, best.safetensors
  plots/             loss.png
  chat/              what was asked of base and style, and their answers: <talk>/<turn>.json
  style.safetensors  the result; style-journal.safetensors, the same as a journal
"""

import errno
import glob
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout

from zo_engine import journal
from zo_engine import recipe as recipes
from zo_engine.journal import JournalError, Record

STATES = ("running", "stopped", "done", "failed")
REQUESTS = ("preview", "save")  # what may be asked of a run while it trains
PATIENCE = 5.0  # seconds in which a file that somebody reads is tried to be replaced again
BEAT = 0.5  # seconds between two heartbeats
LOG = 2**22  # bytes of a log, after which it makes way for another; one older one is kept


class RunError(ValueError):
    """A run folder that cannot be used; one sentence that says why and what to do."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Written whole or not at all: to a temporary name beside it, flushed to disk, then renamed, and that flushed."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """`source` gets the name of `target`, on disk when this returns. While somebody reads either, the page or a virus
    scanner, Windows refuses: it is asked again, for up to PATIENCE seconds."""
    over = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if time.monotonic() > over:
                raise
            time.sleep(0.02)
    _sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """A folder with those that it lies in, each new name flushed to disk; what is there stays."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets the name of `folder` if nothing went wrong, all of it flushed to disk, and is
    gone otherwise. What a process that was killed at it has left goes, too."""
    make_folder(folder.parent)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        if (number := left.suffixes[-2][1:]).isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        work.mkdir()
        yield work
        for file in (f for f in work.rglob("*") if f.is_file()):
            with open(file, "rb" if os.name == "posix" else "r+b") as written:  # Windows flushes what may be written to
                os.fsync(written.fileno())
        for inside in (f for f in (work, *work.rglob("*")) if f.is_dir()):
            _sync_folder(inside)
        replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The names in a folder, on disk: without it a power cut may take a rename back, and what was appended since."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def after_boot(process: psutil.Process) -> float:
    """Seconds from the machine's start to a process's. Unlike its start by the clock, it stays as it is when the clock
    is set."""
    return round(process.create_time() - psutil.boot_time(), 2)


def said_by_disk(error: OSError) -> str:
    """What a disk refused, as one sentence."""
    why = (error.strerror or str(error)).lower()
    return f"{error.filename or 'the disk'}: {why}; what was saved before is still there"


class Run:
    """One run folder. Reading needs no lock; training holds `lock()`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.toml"
        self.lock_file = self.path / ".lock"
        self.base_file = self.path / "run.json"
        self.journal_file = self.path / "journal.jsonl"
        self.evaluations_file = self.path / "evaluations.jsonl"
        self.style_file = self.path / "style.safetensors"
        self.journal_style_file = self.path / "style-journal.safetensors"
        self.last_file = self.path / "checkpoints" / "last.safetensors"
        self.best_file = self.path / "checkpoints" / "best.safetensors"
        self.plot_file = self.path / "plots" / "loss.png"
        self.previews = self.path / "previews"
        self.chat = self.path / "chat"
        self.heartbeat_file = self.path / "heartbeat"
        self.log_file = self.path / "log.txt"

    @classmethod
    def create(cls, path: Path, recipe: recipes.Recipe) -> "Run":
        """A new run folder. Raises RunError if something is already there."""
        run = cls(path)
        if run.recipe_file.exists():
            raise RunError(f"{path} already holds a run; continue it with `qzo resume {path}`, or choose another --out")
        there = [] if not run.path.exists() else run.path.iterdir() if run.path.is_dir() else [run.path]
        if any(file.suffix != ".tmp" and file != run.lock_file for file in there):  # these are of one killed right here
            raise RunError(f"{path} exists and is not an empty folder; choose another --out")
        make_folder(run.path)
        run.lock_file.touch()
        write_atomic(run.recipe_file, recipes.dump(recipe))
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run folder. Raises RunError if there is none: a recipe with its data beside it is none."""
        run = cls(path)
        if not run.path.exists():
            raise RunError(f"{path} does not exist; runs are folders that `qzo train` makes")
        if not run.recipe_file.is_file():
            raise RunError(f"{path} is not a run folder: it has no recipe.toml")
        if not any(file.exists() for file in (run.lock_file, run.base_file, run.journal_file)):
            raise RunError(f"{path} has a recipe, but no run of it; begin one with `qzo train {run.recipe_file}`")
        return run

    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.recipe_file, recipes.remembered)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that trains; the kernel lets go of it however that process ends."""
        lock = FileLock(self.lock_file)
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
        write_atomic(self.base_file, json.dumps(facts, indent=1))

    def base(self) -> dict[str, Any]:
        found = self._json(self.base_file.name)
        names = all(isinstance(found.get(name, ""), str) for name in ("model", "code_hash"))
        held = all(_held(found.get(name, {})) for name in ("data", "weights"))
        return found if names and held else self._damaged(self.base_file.name)

    def write_status(self, state: str, **facts: Any) -> None:
        assert state in STATES
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        process = psutil.Process()
        who = {"pid": process.pid, "started": process.create_time(), "after_boot": after_boot(process)}
        write_atomic(self.path / "status.json", json.dumps({"state": state, "time": now, **who, **facts}))

    def write_failure(self, reason: str) -> None:
        """The run stands as failed, with the reason; a disk too full even for this keeps the old status."""
        with suppress(OSError, RunError):
            own = ("state", "time", "pid", "started", "after_boot")
            last = {k: v for k, v in self.status().items() if k not in own}
            self.write_status("failed", **last | {"reason": reason})

    def status(self) -> dict[str, Any]:
        found = self._json("status.json")
        try:
            if found and found["state"] in STATES:
                datetime.fromisoformat(found["time"])
                return found
        except (KeyError, TypeError, ValueError):
            pass
        return self._damaged("status.json") if found else {}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            found = None
        return found if isinstance(found, dict) else self._damaged(name)

    def _damaged(self, name: str) -> NoReturn:
        raise RunError(f"{self.path / name} is damaged; it can be deleted, the journal holds the run")

    def log(self, text: str) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        if self.log_file.exists() and self.log_file.stat().st_size > LOG:
            replace(self.log_file, self.log_file.with_name("log.old.txt"))
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    # The journal

    def append_step(self, record: Record) -> None:
        _append(self.journal_file, record.to_json())

    def journal(self) -> list[Record]:
        """Every whole line; a last line torn by a crash is left out. Raises RunError for damage before that."""
        return self._whole(self.journal_file, *self._read_journal())

    def append_evaluation(self, facts: dict[str, Any]) -> None:
        _append(self.evaluations_file, json.dumps(facts))

    def evaluations(self) -> list[dict[str, Any]]:
        """Every whole line, in the order of their making. Raises RunError for damage."""
        return self._whole(self.evaluations_file, *self._read_evaluations())

    def forget_evaluations(self) -> None:
        """Every held-out loss is to be measured again, on the way of the next resume; the old ones are kept aside."""
        if self.evaluations_file.exists():
            replace(self.evaluations_file, self.evaluations_file.with_name(f"{self.evaluations_file.name}.before"))
        self.best_file.unlink(missing_ok=True)

    def recover(self) -> list[str]:
        """Make a run that was broken off, or damaged, one that can go on: torn ends are cut, the journal ends before
        its first damaged line, and what goes beyond it goes. Gives a sentence for all that is dropped; whole lines
        are kept in *.damaged. The caller holds the lock.

        Every step is a function of the one before it, so what is dropped is made again, the same.
        """
        for left in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp"), *self.path.glob("*/*/*.tmp")):
            left.unlink(missing_ok=True)  # of a process that is gone: this one has the lock
        said = []
        records, problems = self._read_journal()
        if problems:
            number, why = problems[0]
            said.append(
                f"line {number} of {self.journal_file.name} {why}: the steps from {len(records)} on are made again"
            )
            self._set_aside(self.journal_file)
            self.last_file.unlink(missing_ok=True)  # of steps that are no more
            self.best_file.unlink(missing_ok=True)
        facts, wrong = self._read_evaluations()
        if wrong:
            number, why = wrong[0]
            said.append(f"line {number} of {self.evaluations_file.name} {why}: it is measured again")
            self._set_aside(self.evaluations_file)
        for sentence in said:
            self.log(sentence)
        self._trim(records, facts)
        return said

    def trim(self, step: int) -> None:
        """Cut torn ends, and what was made after `step`."""
        self._trim(self.journal()[:step], [fact for fact in self.evaluations() if fact["step"] <= step])

    def _trim(self, records: list[Record], facts: list[dict[str, Any]]) -> None:
        # record n makes step n + 1 of theta; an evaluation is of theta after that many steps
        by_step = {fact["step"]: fact for fact in facts if fact["step"] <= len(records)}
        self._rewrite(self.journal_file, [record.to_json() for record in records])
        self._rewrite(self.evaluations_file, [json.dumps(by_step[step]) for step in sorted(by_step)])

    def _rewrite(self, file: Path, lines: list[str]) -> None:
        text = "".join(f"{journal.seal(line)}\n" for line in lines)
        if file.exists() and file.read_bytes() != text.encode():
            write_atomic(file, text)

    def _set_aside(self, file: Path) -> None:
        write_atomic(file.with_name(f"{file.name}.damaged"), file.read_bytes())

    def _read_journal(self) -> tuple[list[Record], list[tuple[int, str]]]:
        """The records up to the first line that cannot be used, and (number, what is wrong) of that line."""
        records = []
        for number, line in enumerate(self._lines(self.journal_file), 1):
            try:
                found = journal.read(line)
                if found.step != len(records):
                    raise JournalError(f"is of step {found.step}, and step {len(records)} is next")
            except JournalError as error:
                return records, [(number, str(error))]
            records.append(found)
        return records, []

    def _read_evaluations(self) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
        """The evaluations that can be used, and (number, what is wrong) of other lines."""
        found, problems = [], []
        for number, line in enumerate(self._lines(self.evaluations_file), 1):
            try:
                found.append(_evaluation(line))
            except JournalError as error:
                problems.append((number, str(error)))
        return found, problems

    def _whole(self, file: Path, found: list, problems: list[tuple[int, str]]) -> list:
        if problems:
            number, why = problems[0]
            raise RunError(f"line {number} of {file} {why}; `qzo resume` goes on from what is whole")
        return found

    def _lines(self, file: Path) -> list[str]:
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        lines.pop()  # what follows the last newline: nothing, or a torn line
        return lines

    # Previews

    def preview_file(self, step: int) -> Path:
        return self.previews / f"{step:06d}.png"

    def answers_file(self, step: int) -> Path:
        return self.previews / f"{step:06d}.json"


def _held(files: Any) -> bool:
    """Whether this is what files held: digests by name."""
    return isinstance(files, dict) and all(isinstance(digests, list) and digests for digests in files.values())


def _append(file: Path, line: str) -> None:
    """A line with its checksum at the end of a file, on disk when this returns."""
    new = not file.exists()
    with open(file, "a", encoding="utf-8", newline="\n") as out:
        out.write(journal.seal(line) + "\n")
        out.flush()
        os.fsync(out.fileno())
    if new:
        _sync_folder(file.parent)


def _evaluation(line: str) -> dict[str, Any]:
    """A line of the evaluations. Raises JournalError for anything else."""
    found = journal.unseal(line)
    step, items, loss = found.get("step"), found.get("items", []), found.get("loss")
    if type(step) is not int or not isinstance(items, list) or not isinstance(loss, int | float | None):
        raise JournalError("has no step, no loss or no items")
    return found


def new_name(root: Path, wish: str) -> Path:
    """A free folder below `root`: the wish as a file name, with a number behind it if need be."""
    slug = re.sub(r"[^a-z0-9]+", "-", wish.lower()).strip("-") or "run"
    number = 1
    while (path := Path(root) / (slug if number == 1 else f"{slug}-{number}")).exists():
        number += 1
    return path

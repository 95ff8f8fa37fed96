"""Kills real trainings, at random moments and in the middle of every kind of write, and compares what comes of them.

    python tests/killing.py FOLDER --kills 20 --seed 0      a table as JSON on stdout; exit code 1 if anything was lost
    python tests/killing.py FOLDER --kills 0 --plant all    plants defects: exit code 1 if one was not noticed

Torch is imported once; every training is a fork that runs the command line, so that a kill is a real SIGKILL of a
real process and costs no import. What kills in the middle of a write is put around `open`, `os.fsync` and
`os.replace` in the fork: the program itself knows nothing of it. Half of these kills take what was not flushed to
disk with them, as a power cut does (see power.py).

Lost is: a step that was said to be done and is not in the journal; a file that is not whole under its own name; a run
that cannot be resumed; or one that does not end, byte for byte, as the run that nobody disturbed.
"""

import argparse
import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # a fork has one thread, and must need no more
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from power import Disk  # noqa: E402

KINDS = {  # of writes, by a part of the path
    "journal.jsonl": "journal",
    "evaluations.jsonl": "evaluations",
    "checkpoints/": "checkpoint",
    "previews/": "preview",
    "status.json": "status",
    "style": "style",
    "blocks/": "blocks",
    ".cache/": "cache",
    "plots/": "plot",
    "run.json": "base",
    "recipe.toml": "recipe",
    "log.txt": "log",
    "exported": "export",
    "images/": "caption",
}
OWN = {".lock", "heartbeat", "log.txt", "status.json", "loss.png"}  # differ from run to run, by time or not compared


def kind(path: str) -> str:
    return next((name for part, name in KINDS.items() if part in path), "other")


@dataclass
class Bomb:
    """Goes off at the n-th write of a kind, at one of its moments; without a kind it only counts."""

    kind: str = ""
    moment: str = ""  # opened, half, whole, flushed, renamed
    at: int = 1
    root: str = ""
    disk: Disk | None = None  # for a power cut
    seen: Counter = field(default_factory=Counter)

    def note(self, path: object, moment: str) -> None:
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not path.startswith(self.root) or path.endswith("heartbeat"):
            return
        key = (kind(path.removeprefix(self.root)), moment)
        self.seen[key] += 1
        if key == (self.kind, self.moment) and self.seen[key] == self.at:
            if self.disk:
                self.disk.cut()
            os.kill(os.getpid(), signal.SIGKILL)

    def due(self, path: str) -> bool:
        """Whether the next write to a path is to be cut in half."""
        name = kind(os.fspath(path).removeprefix(self.root))
        return self.moment == "half" and name == self.kind and self.seen[name, "half"] + 1 == self.at

    def arm(self) -> None:
        """Put it around this process's writes."""
        import zo_engine.quantize

        really_open, fsync, replace, mkdir = builtins.open, os.fsync, os.replace, os.mkdir
        save_file = zo_engine.quantize.save_file
        bomb, disk = self, self.disk or Disk("\0")  # without a power cut it hears of nothing

        class File:
            """A file that is being written, and who sees it."""

            def __init__(self, file, path: str):
                self.file, self.path = file, path

            def write(self, data):
                if bomb.due(self.path):
                    self.file.write(data[: len(data) // 2])
                    self.file.flush()
                bomb.note(self.path, "half")
                written = self.file.write(data)
                self.file.flush()
                bomb.note(self.path, "whole")
                return written

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                self.file.close()

            def __iter__(self):
                return iter(self.file)

            def __getattr__(self, name):
                return getattr(self.file, name)

        def open_and_see(path, mode="r", *rest, **named):
            seen = set(mode) & set("wax") and isinstance(path, str | os.PathLike)
            if not (seen and os.fspath(path).startswith(bomb.root)):
                return really_open(path, mode, *rest, **named)
            path = os.fspath(path)
            disk.opening(path)
            file = really_open(path, mode, *rest, **named)
            bomb.note(path, "opened")
            return File(file, path)

        def sync_and_see(descriptor):
            fsync(descriptor)
            disk.flushed(descriptor)
            bomb.note(os.readlink(f"/proc/self/fd/{descriptor}"), "flushed")

        def replace_and_see(source, target, **rest):
            disk.replacing(os.fspath(source), os.fspath(target))
            replace(source, target, **rest)
            bomb.note(target, "renamed")

        def make_and_see(path, *rest, **named):
            mkdir(path, *rest, **named)
            disk.made(os.fspath(path))

        def save_and_see(tensors, path, *rest, **named):  # safetensors writes by itself
            bomb.note(path, "opened")
            save_file(tensors, path, *rest, **named)
            if bomb.due(path):
                os.truncate(path, os.path.getsize(path) // 2)
            bomb.note(path, "half")

        builtins.open = io.open = open_and_see
        os.fsync, os.replace, os.mkdir = sync_and_see, replace_and_see, make_and_see
        zo_engine.quantize.save_file = save_and_see


def forked(words: list, log: Path, before: Callable[[], None] = lambda: None, call: Callable | None = None) -> int:
    """A process that runs `qzo WORDS`, or calls something; its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        before()
        if call:
            call()
        else:
            from zo_engine.__main__ import main

            sys.argv = ["qzo", *map(str, words)]
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # noqa: BLE001 (whatever it is, it is a finding, and the fork must not live on)
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(process: int) -> int:
    """Wait for it; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def busy(process: int) -> float:
    """Seconds of processor time that it has used: what a random moment is drawn from, however busy the machine is."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def over(process: int) -> bool:
    """Whether it has ended, and only waits to be asked how."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


SIGNALS = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGSTOP and SIGCONT": (signal.SIGSTOP, signal.SIGCONT),
    "a clock that jumps, and SIGTERM": (signal.SIGTERM,),
}


def ended_by(process: int, after: float, *numbers: int) -> int:
    """Send a signal, or some, once it has worked for so many seconds; how it ended."""
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if busy(process) >= after:
            for number in numbers or (signal.SIGKILL,):
                os.kill(process, number)
                time.sleep(0.1)
            return ended(process)
        time.sleep(0.002)


def contents(run: Path) -> dict[str, object]:
    """All that must be the same in two runs: every file by name, safetensors by what they hold, others by bytes."""
    from zo_engine import sealed

    found = {}
    for file in sorted(run.rglob("*")):
        if not file.is_file() or file.name in OWN:
            continue
        name = file.relative_to(run).as_posix()
        if file.suffix == ".safetensors" and "exported" not in name:
            tensors, metadata = sealed.read(file)
            found[name] = ({n: (str(t.dtype), t.numpy().tobytes()) for n, t in tensors.items()}, metadata)
        elif file.suffix == ".safetensors":
            from safetensors.torch import load

            found[name] = {n: t.numpy().tobytes() for n, t in load(file.read_bytes()).items()}
        else:
            found[name] = file.read_bytes()
    status = json.loads((run / "status.json").read_text())
    found["status"] = {k: status[k] for k in ("state", "step", "best_step", "best_held_out", "skipped")}
    return found


def said_and_kept(run: Path, log: Path) -> list[str]:
    """What a kill took: steps that the run had said were done, and files that are not whole under their names."""
    from zo_engine.run import Run, RunError

    said = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.startswith('{"step"')]
    lost = [f"{file} is not whole" for file in torn(run.parent)]
    try:
        kept = len(Run(run).journal()) if run.exists() else 0
    except RunError as error:
        return [*lost, str(error)]
    if said and kept < said[-1]:
        lost.append(f"it said that step {said[-1]} was done, and {kept} are in the journal")
    return lost


def torn(folder: Path) -> list[str]:
    """Files that cannot be read under the names that they have; a temporary name may hold anything."""
    import tomllib

    from PIL import Image
    from safetensors.torch import load

    from zo_engine import sealed

    readers = {
        ".json": json.loads,
        ".toml": lambda content: tomllib.loads(content.decode()),
        ".png": lambda content: Image.open(io.BytesIO(content)).load(),
        ".safetensors": load,
    }
    found = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if ".tmp" in name or not file.is_file() or file.suffix not in readers:
            continue
        try:
            if file.suffix == ".safetensors" and "blocks/" not in name and "exported" not in name:
                sealed.read(file)
            else:
                readers[file.suffix](file.read_bytes())
        except Exception as error:  # noqa: BLE001 (in whichever way it cannot be read)
            found.append(f"{name} ({type(error).__name__})")
    return sorted(found)


def differences(run: Path, twin: Path) -> list[str]:
    a, b = contents(run), contents(twin)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


class Killer:
    """One recipe, its uninterrupted run, and what the kills did."""

    def __init__(self, title: str, recipe: Path, folder: Path, seed: int):
        self.title, self.recipe, self.folder = title, recipe, folder
        self.seed, self.random = seed, random.Random(f"{title} {seed}")
        self.kills: Counter = Counter()
        self.lost: list[str] = []
        self.whole = self.place("whole")
        counting = Bomb(root=str(folder))
        events = folder / "events.json"

        def at_end() -> None:
            from zo_engine.__main__ import main

            counting.arm()
            sys.argv = ["qzo", *map(str, self.words(self.whole))]
            try:
                main()
            finally:
                seen = [[*key, count] for key, count in counting.seen.items()]
                events.write_text(json.dumps(seen))

        process = forked([], self.log(self.whole), call=at_end)
        before = 0.0
        while not (done := os.waitpid(process, os.WNOHANG))[0]:
            before = max(before, busy(process))
            time.sleep(0.005)
        if os.waitstatus_to_exitcode(done[1]):
            raise RuntimeError(self.said(self.whole))
        self.lasts = before  # seconds of processor time
        self.events = {(k, m): count for k, m, count in json.loads(events.read_text()) if k != "other"}

    def place(self, name: str) -> Path:
        """The run of that name, in a folder of its own with its own cache: that is written, too."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name / "run"

    def words(self, out: Path) -> list:
        """Begin the run, or go on with it."""
        taken_up = (out / "recipe.toml").exists()
        what = ["resume", out, "--json"] if taken_up else ["train", self.recipe, "--out", out, "--json"]
        return ["--runs-dir", out.parent, *what]

    def log(self, out: Path) -> Path:
        return out.with_suffix(".out")

    def said(self, out: Path) -> str:
        return self.log(out).read_text()[-2000:]

    def run_once(
        self, out: Path, bomb: Bomb | None = None, after: float | None = None, plant: Callable[[], None] | None = None
    ) -> int:
        """Begin or go on, with a kill on its way; with a defect, if one is planted."""

        def before() -> None:
            if bomb:
                bomb.arm()
            if plant:
                plant()

        process = forked(self.words(out), self.log(out), before=before)
        return ended(process) if after is None else ended_by(process, after)

    def bomb(self, kind: str, moment: str, at: int, cut: object = None) -> Bomb:
        """One for that moment; with a power cut, whose chances come from `cut`."""
        return Bomb(kind, moment, at, str(self.folder), cut and Disk(str(self.folder), f"{self.title} {cut}"))

    def chain(self, number: int, kills: int) -> int:
        """A training that is killed up to so many times, and then left to end; how often it was."""
        out, done, tries, before = self.place(f"broken-{number}"), 0, 0, len(self.lost)
        while done < kills and tries < 3 * kills:
            tries += 1
            if self.random.random() < 0.75:
                rarest = min(self.events, key=lambda event: (self.kills[event], self.random.random()))
                cut = f"{self.seed} {number} {tries}" if self.random.random() < 0.5 else None
                name, after = rarest, None
                bomb = self.bomb(*rarest, self.random.randint(1, self.events[rarest]), cut)
            else:
                name, bomb, after, cut = ("any", "moment"), None, self.random.uniform(0, self.lasts), None
            code = self.run_once(out, bomb, after)
            how = f"{out.parent.name}: {'a power cut' if cut else 'a kill'} at {' '.join(name)}"
            if code == -signal.SIGKILL:
                self.kills[name] += 1
                self.kills["power", "cut"] += bool(cut)
                done += 1
                self.lost += [f"{how}: {sentence}" for sentence in said_and_kept(out, self.log(out))]
                self.log(
                    out
                ).unlink()  # a power cut may take steps that were said before an earlier kill, and made again
            elif code == 0:
                break  # it came to its end before
            else:
                self.lost.append(f"{how}: exit code {code}: {self.said(out)}")
                return done
        self.lost += [f"{out.parent.name}: {sentence}" for sentence in self.finished(out)]
        if len(self.lost) == before:
            shutil.rmtree(out.parent)
        return done

    def finished(self, out: Path, plant: Callable[[], None] | None = None) -> list[str]:
        """Left to end: in what it is not as the run that nobody disturbed."""
        if code := self.run_once(out, plant=plant):
            return [f"exit code {code} at its end: {self.said(out)}"]
        wrong = differences(out, self.whole)
        return [f"not as the uninterrupted run: {wrong}"] if wrong else []

    def disturb(self, name: str) -> int:
        """Asked to stop, told to stop at once, frozen and thawed, under a clock that jumps: the run goes on, and ends
        as the whole one. How often that was done."""
        out, plant = self.place(name.replace(" ", "-")), jumping if "clock" in name else None
        process = forked(self.words(out), self.log(out), before=plant or (lambda: None))
        while not ((out / "status.json").exists() or over(process)):  # until it has begun
            time.sleep(0.005)
        code = ended_by(process, busy(process) + self.random.uniform(0.05, self.lasts / 3), *SIGNALS[name])
        stopped = code == 130
        if code not in ((0,) if "STOP" in name else (0, 130)):
            self.lost.append(f"{name}: exit code {code}: {self.said(out)}")
        else:
            self.lost += [f"{name}: {sentence}" for sentence in self.finished(out, plant)]
        return int(stopped or "STOP" in name)

    def kill(self, kills: int, each: int = 5) -> None:
        number = 0
        while (left := kills - self.count) > 0 and number < 4 * kills:
            self.chain(number, min(each, left))
            number += 1

    @property
    def count(self) -> int:
        return sum(n for event, n in self.kills.items() if event != ("power", "cut"))

    def planted(self, name: str) -> list[str]:
        """What is noticed of a defect, where the kill comes that it cannot stand; a power cut has some chances."""
        plant, *event, cut = PLANTED[name]
        found: list[str] = []
        for chance in range(6 if cut else 1):
            out = self.place(f"planted-{name.replace(' ', '-')}-{chance}")
            code = self.run_once(out, self.bomb(*event, chance + 1 if cut else None), plant=plant)
            if code == -signal.SIGKILL:  # else nothing was shown
                found = found or said_and_kept(out, self.log(out)) or self.finished(out, plant)
            if found:
                break
        return found


# Defects, to show that they would be noticed


def everywhere(name: str, own: Callable) -> None:
    """A function of zo_engine.run in the place of the one that modules have taken from there."""
    import zo_engine.run

    there = getattr(zo_engine.run, name)
    for module in [*sys.modules.values()]:
        if getattr(module, name, None) is there:
            setattr(module, name, own)


def in_place() -> None:
    def write(path: Path, data: bytes | str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            os.fsync(file.fileno())

    everywhere("write_atomic", write)


def renamed_first() -> None:
    def write(path: Path, data: bytes | str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.0.0.tmp")
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
            os.fsync(file.fileno())

    everywhere("write_atomic", write)


def nothing_flushed() -> None:
    os.fsync = lambda descriptor: None


def names_not_flushed() -> None:
    everywhere("_sync_folder", lambda folder: None)


def said_too_early() -> None:
    from zo_engine.run import Run

    append, waiting = Run.append_step, []

    def late(self: Run, record) -> None:
        for other in waiting:
            append(self, other)
        waiting[:] = [record]

    Run.append_step = late


def torn_ends_stay() -> None:
    from zo_engine.run import Run

    Run._rewrite = lambda self, file, lines: None


def resumed(change: Callable) -> Callable[[], None]:
    """A defect of what is taken up: change(training) comes after each resume."""

    def plant() -> None:
        from zo_engine.train import Training

        resume = Training.resume

        def wrong(self: Training) -> None:
            resume(self)
            if self.method.step:
                change(self)

        Training.resume = wrong

    return plant


def forget_evaluation(training) -> None:
    evaluate = training.evaluate

    def once() -> None:
        training.evaluate = evaluate

    training.evaluate = once


def forget_last_step(training) -> None:
    from zo_engine.train import _read_checkpoint

    training.method.theta = _read_checkpoint(training.run.last_file)[0]["theta"]


def other_noise(training) -> None:
    training.method.seed += 1


def jumping() -> None:
    """A clock that is set anew between any two looks at it."""
    import datetime as dates

    import zo_engine.run

    rng, real = random.Random(0), time.time

    class Jumping(dates.datetime):
        @classmethod
        def now(cls, zone=None):
            return dates.datetime.now(zone) + dates.timedelta(days=rng.randint(-9000, 9000))

    zo_engine.run.datetime = Jumping
    time.time = lambda: real() + rng.uniform(-1e9, 1e9)


# name: (what is done to the program, kind of write, its moment, which one, whether the power is cut)
PLANTED = {
    "a step is said before it is in the journal": (said_too_early, "journal", "opened", 1, False),
    "checkpoints are written in place": (in_place, "checkpoint", "half", 2, False),
    "nothing is flushed": (nothing_flushed, "status", "renamed", 4, True),
    "files get their names before they are flushed": (renamed_first, "base", "renamed", 1, True),
    "names are not flushed": (names_not_flushed, "status", "renamed", 4, True),
    "torn ends of the journal stay": (torn_ends_stay, "journal", "half", 2, False),
    "an evaluation is not made again": (resumed(forget_evaluation), "evaluations", "opened", 2, False),
    "the step after the last checkpoint is not replayed": (resumed(forget_last_step), "journal", "opened", 4, False),
    "the noise of a resumed run is another": (resumed(other_noise), "journal", "opened", 2, False),
}
CHEAPEST = [*PLANTED][:3]


def kill_exports(whole: Path, folder: Path, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Exports that are killed: the folder is there whole or not at all, and comes at the next try."""
    rng, done, lost = random.Random(f"exports {seed}"), Counter(), []
    folder.mkdir()

    def export(out: Path, after: float | None = None) -> tuple[int, float]:
        process = forked(["--runs-dir", folder, "export", whole, out], folder / "export.log")
        if after is not None:
            return ended_by(process, after), after
        lasts = 0.0
        while not (ending := os.waitpid(process, os.WNOHANG))[0]:
            lasts = max(lasts, busy(process))
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(ending[1]), lasts

    code, lasts = export(folder / "first")
    expected = files(folder / "first") if not code else {}
    for number in range(kills):
        out = folder / f"exported-{number}"
        code, _ = export(out, rng.uniform(0, lasts))
        done["any moment"] += code == -signal.SIGKILL
        again = 0 if out.exists() else export(out)[0]
        found = {} if again else files(out)
        other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if other or (left := [path.name for path in folder.glob(".exported*")]):
            lost.append(f"{out.name}: not as an export that nobody killed: {other or left}")
    return done, lost


def files(folder: Path) -> dict[str, object]:
    """What a folder holds; safetensors by their tensors, whose order in the file is not fixed."""
    from safetensors.torch import load

    found = {}
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            found[str(file.relative_to(folder))] = {n: t.numpy().tobytes() for n, t in load(file.read_bytes()).items()}
        elif file.is_file() and file.name != "README.md":  # which names the folder itself
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def kill_captions(folder: Path, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Somebody who types captions, and a page that is killed: each file holds the old text or the new one, and the new
    one once it was said to be saved."""
    from app.drafts import Drafts

    rng, done, lost = random.Random(f"captions {seed}"), Counter(), []
    draft = Drafts(folder).example("woodcut")
    texts = {name: picture.path.with_suffix(".txt") for name, picture in draft.contents().pictures.items()}
    for number in range(kills):
        before = {name: path.read_text() for name, path in texts.items()}
        moment = rng.choice(("opened", "half", "whole", "flushed", "renamed"))
        bomb, log = Bomb("caption", moment, rng.randint(1, len(texts)), str(folder)), folder / f"typed-{number}.log"

        def typing(number: int = number) -> None:
            for name in texts:
                draft.caption(name, f"{name}, the {number}th time")
                os.write(1, f"{name}\n".encode())

        code = ended(forked([], log, before=bomb.arm, call=typing))
        done[f"caption {moment}"] += code == -signal.SIGKILL
        said = log.read_text().splitlines()
        for name, path in texts.items():
            text, new = path.read_text(), f"{name}, the {number}th time"
            if text not in (before[name], new) or (name in said and text != new):
                lost.append(f"caption of {name} after a kill: {text!r}")
        if set(Drafts(folder).open("woodcut").contents().pictures) != set(texts):
            lost.append("a picture is gone")
    return done, lost


def write_pictures(folder: Path, model: Path) -> Path:
    """A recipe of a few short steps beside its pictures."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"a [trigger] of a {['sun', 'moon'][i % 2]}")
    path = folder / "recipe.toml"
    path.write_text(
        f'images = "images"\nmodel = {json.dumps(str(model))}\ntrigger = "gold"\nresolution = "32x32"\nsteps = 4\n'
        "batch_size = 2\ndirections = 4\nevaluate_items = 8\nevaluate_every = 2\npreview_every = 2\n"
        'preview_steps = 1\nprior = 0.0\nprompts = ["a [trigger] moon"]\n'
    )
    return path


def write_recipe(folder: Path, rows: list[dict], **settings: object) -> Path:
    """The same of texts."""
    import tomli_w

    folder.mkdir(parents=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"steps": 4, "batch_size": 2, "directions": 4, "depth": 0.5, "length": 100, "holdout": 0.25}
    looked_at = {"evaluate_every": 2, "evaluate_items": 8, "preview_every": 2, "answer_tokens": 2}
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps({"texts": "texts.jsonl", **short, **looked_at, **settings}))
    return path


def write_recipes(folder: Path) -> dict[str, Path]:
    """Runs of every kind: pictures and texts, labels and answers and rewards, resident and streamed."""
    model = str(folder / "llm")
    labels = [{"text": f"{'fine' if i % 2 else 'dull'} {i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
    answers = [{"prompt": f"what is {i}?", "completion": f"{i}, aye"} for i in range(8)]
    images = write_pictures(folder / "pictures" / "resident", folder / "sd3")
    streamed = images.with_name("streamed.toml")
    streamed.write_text(images.read_text() + 'offload = "disk"\n')
    return {
        "images": images,
        "images streamed from disk": streamed,
        # every step of this seed moves: a defect of a step that stands still could not be seen
        "labels": write_recipe(folder / "labels", labels, model=model, seed=3),
        "answers streamed from memory": write_recipe(folder / "answers", answers, model=model, offload="cpu"),
        "rewards": write_recipe(folder / "rewards", answers, model=model, reward="length:5", answer_tokens=3),
    }


SHARES = (0.3, 0.2, 0.1, 0.15, 0.1)  # of the kills; the rest are exports and captions


def write_models(folder: Path) -> None:
    """In a fork: what has computed may have threads, and must not be forked."""
    import tiny

    tiny.save_pipeline(folder / "sd3")
    tiny.save_language_model(folder / "llm")


def warm_up() -> None:
    """Import what a training imports, once for all forks; nothing is computed, so that no thread is begun."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.font_manager  # noqa: F401
    import tiny  # noqa: F401

    import app.drafts  # noqa: F401
    import zo_engine.apply
    import zo_engine.train
    import zo_engine.verify  # noqa: F401
    from zo_engine.__main__ import quiet

    quiet()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a thread was begun by importing: forks of this process may hang")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=("none", "few", "all"), default="none", help="defects, to be noticed")
    given = parser.parse_args()
    warm_up()
    began = time.monotonic()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if ended(forked([], folder / "models.log", call=lambda: write_models(folder))):
        raise RuntimeError((folder / "models.log").read_text())
    recipes = write_recipes(folder)
    if not given.kills:
        recipes = {"labels": recipes["labels"]}
    killers = [Killer(title, recipe, folder / f"{n}", given.seed) for n, (title, recipe) in enumerate(recipes.items())]
    lost, by, events = [], {}, {k.title: {" ".join(event): n for event, n in sorted(k.events.items())} for k in killers}
    if given.kills:
        for killer, share in zip(killers, SHARES, strict=True):
            killer.kill(max(1, round(given.kills * share)))
        by = {k.title: {" ".join(event): n for event, n in sorted(k.kills.items()) if n} for k in killers}
        few = max(1, round(given.kills * (1 - sum(SHARES)) / 2))  # of each of the two that are no trainings
        for title, (found, wrong) in {
            "exports": kill_exports(killers[0].whole, folder / "exports", few, given.seed),
            "captions": kill_captions(folder / "page", few, given.seed),
        }.items():
            by[title] = dict(found)
            lost += [f"{title}: {sentence}" for sentence in wrong]
        by["signals"] = dict.fromkeys(SIGNALS, 0)
        for number, name in enumerate(SIGNALS):
            turn = given.seed + number  # each with another kind of run, and with all of them where there is time
            for killer in killers if given.kills >= 100 else [killers[turn % len(killers)]]:
                by["signals"][name] += killer.disturb(name)
        if other := [n for n in differences(killers[0].whole, killers[1].whole) if n != "recipe.toml"]:
            lost.append(f"a streamed run is not as a resident one: {other}")
    noticed = {}
    for name in {"none": [], "few": CHEAPEST, "all": PLANTED}[given.plant]:
        noticed[name] = next(k for k in killers if k.title == "labels").planted(name)
    lost += [f"{k.title}: {sentence}" for k in killers for sentence in k.lost]
    cuts = sum(found.pop("power cut", 0) for found in by.values())
    signals = sum(by.get("signals", {}).values())
    table = {
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "kills": sum(sum(found.values()) for found in by.values()) - signals,
        "power cuts": cuts,
        "by": by,
        "events": events,
        "lost": lost,
        "planted": {name: bool(found) for name, found in noticed.items()},
        "noticed": {name: found[0][:300] for name, found in noticed.items() if found},
    }
    print(json.dumps(table))
    sys.exit(bool(lost) or not all(noticed.values()))


if __name__ == "__main__":
    main()

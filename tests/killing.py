"""Kills real trainings, at random moments and in the middle of every kind of write, and compares what comes of them.

    python tests/killing.py FOLDER --kills 20 --seed 0      a table as JSON on stdout; exit code 1 if anything was lost

Torch is imported once; every training is a fork that runs the command line, so that a kill is a real SIGKILL of a
real process and costs no import. What kills in the middle of a write is put around `open`, `os.fsync` and
`os.replace` in the fork: the program itself knows nothing of it.
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

KINDS = {  # of writes, by a part of the path
    "journal.jsonl": "journal",
    "evaluations.jsonl": "evaluations",
    "checkpoints/": "checkpoint",
    "previews/": "preview",
    "status.json": "status",
    "style": "style",
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
    seen: Counter = field(default_factory=Counter)

    def note(self, path: object, moment: str) -> None:
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not path.startswith(self.root) or path.endswith("heartbeat"):
            return
        key = (kind(path.removeprefix(self.root)), moment)
        self.seen[key] += 1
        if key == (self.kind, self.moment) and self.seen[key] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def due(self, path: str) -> bool:
        """Whether the next write to a path is to be cut in half."""
        name = kind(os.fspath(path).removeprefix(self.root))
        return self.moment == "half" and name == self.kind and self.seen[name, "half"] + 1 == self.at

    def arm(self) -> None:
        """Put it around this process's writes."""
        really_open, fsync, replace = builtins.open, os.fsync, os.replace
        names: dict[int, str] = {}
        bomb = self

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
            file = really_open(path, mode, *rest, **named)
            if set(mode) & set("wax") and isinstance(path, str | os.PathLike):
                path = os.fspath(path)
                if path.startswith(bomb.root):
                    names[file.fileno()] = path
                    bomb.note(path, "opened")
                    return File(file, path)
            return file

        def sync_and_see(descriptor):
            fsync(descriptor)
            bomb.note(names.get(descriptor, ""), "flushed")

        def replace_and_see(source, target, **rest):
            replace(source, target, **rest)
            bomb.note(target, "renamed")

        builtins.open = io.open = open_and_see
        os.fsync, os.replace = sync_and_see, replace_and_see


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


SIGNALS = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGSTOP and SIGCONT": (signal.SIGSTOP, signal.SIGCONT),
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


def differences(run: Path, twin: Path) -> list[str]:
    a, b = contents(run), contents(twin)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


class Killer:
    """One recipe, its uninterrupted run, and what the kills did."""

    def __init__(self, title: str, recipe: Path, folder: Path, seed: int):
        self.title, self.recipe, self.folder = title, recipe, folder
        self.random = random.Random(f"{title} {seed}")
        self.kills: Counter = Counter()
        self.lost: list[str] = []
        self.whole = folder / "whole"
        folder.mkdir(parents=True, exist_ok=True)
        counting = Bomb(root=str(folder))
        events = folder / "events.json"

        def at_end() -> None:
            from zo_engine.__main__ import main

            counting.arm()
            sys.argv = ["qzo", *map(str, self.train(self.whole))]
            try:
                main()
            finally:
                seen = [[*key, count] for key, count in counting.seen.items()]
                events.write_text(json.dumps(seen))

        process = forked([], folder / "whole.log", call=at_end)
        before = 0.0
        while not (done := os.waitpid(process, os.WNOHANG))[0]:
            before = max(before, busy(process))
            time.sleep(0.005)
        if os.waitstatus_to_exitcode(done[1]):
            raise RuntimeError((folder / "whole.log").read_text())
        self.lasts = before  # seconds of processor time
        self.events = {(k, m): count for k, m, count in json.loads(events.read_text()) if k != "other"}

    def train(self, out: Path) -> list:
        # a cache of its own for every run: it is written, too
        return ["--runs-dir", out.with_name(f"{out.name}-runs"), "train", self.recipe, "--out", out]

    def resume(self, out: Path) -> list:
        return ["--runs-dir", out.with_name(f"{out.name}-runs"), "resume", out]

    def run_once(self, out: Path, bomb: Bomb | None, after: float | None) -> int:
        """Start or go on, with a kill on its way."""
        taken_up = (out / "recipe.toml").exists()
        words = self.resume(out) if taken_up else self.train(out)
        # what resumes keeps its cache one folder above the run
        process = forked(words, out.with_suffix(".log"), before=bomb.arm if bomb else lambda: None)
        return ended(process) if after is None else ended_by(process, after)

    def chain(self, number: int, kills: int) -> int:
        """A training that is killed up to so many times, and then left to end; how often it was."""
        out, done, tries = self.folder / f"broken-{number}", 0, 0
        while done < kills and tries < 3 * kills:
            tries += 1
            if self.random.random() < 0.75:
                rarest = min(self.events, key=lambda event: (self.kills[event], self.random.random()))
                at = self.random.randint(1, self.events[rarest])
                name, bomb, after = rarest, Bomb(*rarest, at=at, root=str(self.folder)), None
            else:
                name, bomb, after = ("any", "moment"), None, self.random.uniform(0, self.lasts)
            code = self.run_once(out, bomb, after)
            if code == -signal.SIGKILL:
                self.kills[name] += 1
                done += 1
            elif code == 0:
                break  # it came to its end before
            else:
                self.lost.append(f"{out.name}: exit code {code} after a kill at {name}: {self.said(out)}")
                return done
        code = self.run_once(out, None, None)
        if code:
            self.lost.append(f"{out.name}: exit code {code} at its end: {self.said(out)}")
        elif wrong := differences(out, self.whole):
            self.lost.append(f"{out.name}: not as the uninterrupted run: {wrong}")
        else:
            shutil.rmtree(out)
        return done

    def disturb(self) -> Counter:
        """Asked to stop, told to stop at once, frozen and thawed: the run goes on, and ends as the whole one."""
        done: Counter = Counter()
        for number, name in enumerate(("SIGTERM", "SIGINT twice", "SIGSTOP and SIGCONT")):
            out = self.folder / f"disturbed-{number}"
            process = forked(self.train(out), out.with_suffix(".log"))
            while not (out / "status.json").exists():  # it has begun
                time.sleep(0.005)
            code = ended_by(process, busy(process) + self.random.uniform(0.05, self.lasts / 3), *SIGNALS[name])
            if code not in ((0,) if "STOP" in name else (0, 130)):
                self.lost.append(f"{name}: exit code {code}: {self.said(out)}")
            if code == 130:
                done[name] += 1
                code = self.run_once(out, None, None)
            elif "STOP" in name:
                done[name] += 1
            if code == 0 and (wrong := differences(out, self.whole)):
                self.lost.append(f"{name}: not as the uninterrupted run: {wrong}")
        return done

    def said(self, out: Path) -> str:
        return out.with_suffix(".log").read_text()[-2000:]

    def kill(self, kills: int, each: int = 5) -> None:
        number = 0
        while (left := kills - sum(self.kills.values())) > 0 and number < 4 * kills:
            self.chain(number, min(each, left))
            number += 1


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
        if again or files(out) != expected or list(folder.glob(".exported*")):
            lost.append(f"{out.name}: not as an export that nobody killed")
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


def write_texts(folder: Path, model: Path) -> Path:
    """The same of texts."""
    folder.mkdir(parents=True)
    rows = [{"text": f"{'fine' if i % 2 else 'dull'} {i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
    (folder / "remarks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    path.write_text(
        f'texts = "remarks.jsonl"\nmodel = {json.dumps(str(model))}\nsteps = 4\nbatch_size = 2\ndirections = 4\n'
        "depth = 0.5\nlength = 100\nholdout = 0.25\nevaluate_every = 2\nevaluate_items = 8\npreview_every = 2\n"
        "answer_tokens = 2\n"
    )
    return path


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
    given = parser.parse_args()
    warm_up()
    began = time.monotonic()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if ended(forked([], folder / "models.log", call=lambda: write_models(folder))):
        raise RuntimeError((folder / "models.log").read_text())
    pictures, texts = write_pictures(folder / "sun", folder / "sd3"), write_texts(folder / "remarks", folder / "llm")
    killers = [
        Killer("images", pictures, folder / "images", given.seed),
        Killer("texts", texts, folder / "texts", given.seed),
    ]
    few = given.kills // 10  # of each of the two that are no trainings
    share = [given.kills - 2 * few - given.kills // 4, given.kills // 4]
    for killer, kills in zip(killers, share, strict=True):
        killer.kill(kills)
    others = {
        "exports": kill_exports(killers[0].whole, folder / "exports", few, given.seed),
        "captions": kill_captions(folder / "page", few, given.seed),
    }
    by = {k.title: {" ".join(event): n for event, n in sorted(k.kills.items())} for k in killers}
    by["signals"] = dict(sum((killer.disturb() for killer in killers), Counter()))
    by |= {title: dict(found) for title, (found, _) in others.items()}
    lost = [f"{k.title}: {sentence}" for k in killers for sentence in k.lost]
    lost += [f"{title}: {sentence}" for title, (_, found) in others.items() for sentence in found]
    table = {
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "kills": sum(sum(found.values()) for found in by.values()),
        "by": by,
        "events": {k.title: {" ".join(event): n for event, n in sorted(k.events.items())} for k in killers},
        "lost": lost,
    }
    print(json.dumps(table))
    sys.exit(bool(table["lost"]))


if __name__ == "__main__":
    main()

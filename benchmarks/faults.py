"""What was tried to lose a run or to get in, how often, and what was lost.

    python benchmarks/faults.py                         the tests of faults, bad input, hostile requests and replay
    python benchmarks/faults.py --kills 200             trainings killed, in pieces of 20, and planted defects
    python benchmarks/faults.py --fuzz 100000 --python PYTHON_WITH_ATHERIS
    python benchmarks/faults.py --soak 60 --clients 60  minutes with the page open; seconds with fifty clients

Every piece is written to results/faults.json when it is done, and the table of all pieces to results/faults.md. Begun
again after an interruption, a command passes over the pieces that are there for the code as it stands; --again makes
them anew. Every figure is counted by what ran; a part that was left out is not listed.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from common import CHECKOUT, RESULTS, circumstances, save

TESTS = {
    "tests/test_faults.py": "Disk, damage, device, numbers, clock, data",
    "tests/test_corpus.py": "Bad files, folders and recipes, each with its sentence",
    "tests/test_no_pickle.py": "A pickle in the place of every file that is read",
    "tests/test_hostile.py": "Hostile requests to a running page",
    "tests/test_verify.py": "Replay and examination",
    "tests/test_fuzz.py": "Inputs made by chance",
}
LEFT_OUT = "not fifty_clients_for_a_minute and not a_long_look"  # those have pieces of their own here
FUZZED = ("style", "journal", "recipe", "texts", "dataset")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
PIECE = 20  # kills
SAMPLE = 5.0  # seconds between two looks at memory, files and disk
LOOK = 1.5  # seconds between two looks of an open page at its run
WARM = 38  # steps after which a step costs what all later ones do, see recipe.GROWTH and DOUBLINGS
SHOWN = (
    ("memory of the page", "MB", 1e6), ("memory of the run", "MB", 1e6), ("open files", "", 1), ("checkpoints", "", 1),
    ("step time", "ms", 1e-3), ("disk per step", "bytes", 1),
)  # fmt: skip
FLAT = {"memory of the page": (0.05, 2**24), "memory of the run": (0.05, 2**24), "open files": (0.0, 10)}


def code(key: str) -> str:
    """What a piece is about: a digest of the program, and of the tests that it runs."""
    found = hashlib.sha256()
    own = [CHECKOUT / key] if key in TESTS else sorted((CHECKOUT / "tests").glob("[kp]*.py"))  # killing.py, power.py
    for file in (*sorted((CHECKOUT / "zo_engine").rglob("*.py")), *sorted((CHECKOUT / "app").rglob("*.py")), *own):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


# Kills, tests, fuzzers


def last_line(words: list[str]) -> dict:
    """The JSON that a command prints at its end, whatever its exit code."""
    done = subprocess.run(words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True)
    if not done.stdout.strip():
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def kills(count: int, seed: int, plant: str = "none") -> dict:
    """Trainings killed so often, and compared with uninterrupted ones; or defects planted, to be noticed."""
    with tempfile.TemporaryDirectory(prefix="qzo-kills-") as folder:
        words = ["--kills", str(count), "--seed", str(seed), "--plant", plant]
        table = last_line([sys.executable, "tests/killing.py", f"{folder}/kills", *words])
    table["noticed"] = {name: said.replace(f"{folder}/", "") for name, said in table["noticed"].items()}
    table["failed"] = table["lost"] + [f"not noticed: {name}" for name, seen in table["planted"].items() if not seen]
    return table | {"tried": table["kills"] + len(table["planted"])}


def tests(file: str) -> dict:
    """How many of a file's cases ran, test by test, and which failed; the slow ones as well."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-p", "no:cacheprovider", "-m", "", "-k", LEFT_OUT, file, f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True)
        cases = list(ElementTree.parse(report).iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    wrong = [case.get("name") for case in ran if case.find("failure") is not None or case.find("error") is not None]
    by = Counter(case.get("name").partition("[")[0].removeprefix("test_").replace("_", " ") for case in ran)
    return {"tried": len(ran), "skipped": len(cases) - len(ran), "by": dict(by), "failed": wrong}


def fuzz(target: str, runs: int, python: str) -> dict:
    """Executions of a coverage-guided fuzzer, and whether it found anything."""
    words = [python, "tests/fuzz/fuzz.py", target, f"-runs={runs}"]
    done = subprocess.run(words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True, errors="replace")
    ran = re.search(r"Done (\d+) runs", done.stderr)
    return {"tried": int(ran[1]) if ran else 0, "failed": [] if done.returncode == 0 else [done.stderr[-1500:]]}


# A page and a run that trains beside it


@dataclass
class Live:
    """The page as a process of its own, and a run that was started from there."""

    address: str
    page: psutil.Process
    run: Path

    @property
    def training(self) -> psutil.Process:
        return psutil.Process(json.loads((self.run / "status.json").read_text())["pid"])

    def steps(self) -> int:
        journal = self.run / "journal.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0


@contextmanager
def live(steps: int) -> Iterator[Live]:
    """Somebody's page, on the loopback, with the tarot cards being learnt by the embedded model."""
    from app.place import Place

    folder = Path(tempfile.mkdtemp(prefix="qzo-live-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "zo_engine", "--runs-dir", str(folder / "runs"), "ui", "--port", str(port)]
    environment = ENVIRONMENT | {"GRADIO_TEMP_DIR": str(folder / "gradio")}
    server = subprocess.Popen(words, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
    training = None
    try:
        if "QZO Studio is at" not in server.stdout.readline():
            raise RuntimeError("the page did not open")
        place = Place(folder / "runs")
        recipe = place.drafts.example("tarot").change(
            steps=steps, batch_size=2, directions=4, evaluate_items=8, evaluate_every=20, preview_every=100,
            preview_steps=2, prior=0.0, prompts=["a [trigger] sun"],
        )  # fmt: skip
        os.environ |= {"OMP_NUM_THREADS": "1"}
        name = place.jobs.start(recipe, "tarot")
        found = Live(f"http://127.0.0.1:{port}", psutil.Process(server.pid), place.runs / name)
        while found.steps() < WARM:
            time.sleep(0.5)
            if not place.jobs.look(name).live:
                raise RuntimeError(place.jobs.look(name).message)
        training = found.training
        yield found
    finally:
        for process in (training, psutil.Process(server.pid)):
            with suppress(psutil.Error, AttributeError):
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def looked_at(place: Live) -> Iterator[str]:
    """Somebody who has the run open in a browser; in what, is said. Without a browser, calls such as it would make."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        browser = None
    if browser:
        with sync_playwright() as api:
            opened = api.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = opened.new_page()
            page.goto(f"{place.address}/?tab=train&run={place.run.name}")
            yield Path(browser).name
            opened.close()
        return
    ended = threading.Event()
    looker = threading.Thread(target=look, args=(place.address, ended.wait, [], []))
    looker.start()
    try:
        yield "calls"
    finally:
        ended.set()
        looker.join()


def look(address: str, ended: Callable[[float], bool], answers: list, wrong: list, who: int = 0) -> None:
    """One open page: loaded once, which takes up the run that trains, then a look at it whenever its timer goes."""
    session = f"client{who}-{time.time_ns()}"
    with httpx.Client(timeout=60) as client:

        def call(index: int, values: list) -> dict:
            sent = {"data": values, "fn_index": index, "session_hash": session, "event_data": None}
            client.post(f"{address}/gradio_api/queue/join", json=sent).raise_for_status()
            found = {}
            with client.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}) as lines:
                for line in lines.iter_lines():
                    found = json.loads(line[6:]) if line.startswith("data: ") else found
                    if found.get("msg") in ("process_completed", "unexpected_error", "close_stream"):
                        break
            return found

        try:
            client.get(address).raise_for_status()
            asked = client.get(f"{address}/config").raise_for_status().json()["dependencies"]
            on = lambda event, inputs: [  # noqa: E731
                d for d in asked if len(d["inputs"]) == inputs and any(t[1] == event for t in d["targets"])
            ]
            for loading in on("load", 0):
                call(loading["id"], [])
            (watch,) = on("tick", 3)
            while not ended(LOOK):
                began = time.monotonic()
                said = call(watch["id"], [None] * 3)  # which are kept by the server
                if said.get("success"):
                    answers.append(time.monotonic() - began)
                else:
                    wrong.append(str(said)[:200])
        except (httpx.HTTPError, ValueError) as error:
            wrong.append(repr(error))


def crowd(address: str, clients: int, seconds: float) -> tuple[list[float], list[str]]:
    """(seconds of every answer, what was none) of so many open pages."""
    os.nice(10)  # clients are elsewhere: what they cost here is not the page's doing
    answers, wrong, end = [], [], time.monotonic() + seconds

    def ended(wait: float) -> bool:
        time.sleep(wait)
        return time.monotonic() > end

    with ThreadPoolExecutor(clients) as pool:
        for number in range(clients):
            pool.submit(look, address, ended, answers, wrong, number)
    return answers, wrong


def clients(seconds: float, count: int = 50) -> dict:
    """Fifty open pages for a minute during a run, between two such minutes without them."""

    def pace(place: Live, during: Callable[[], object]) -> tuple[float, object]:
        steps, began = place.steps(), time.monotonic()
        found = during()
        return (time.monotonic() - began) / max(1, place.steps() - steps), found

    with live(10**6) as place, ProcessPoolExecutor(1) as apart:
        alone, _ = pace(place, lambda: time.sleep(seconds))
        before = place.page.memory_info().rss
        ask = lambda: apart.submit(crowd, place.address, count, seconds).result()  # noqa: E731
        crowded, (answers, wrong) = pace(place, ask)
        grown = place.page.memory_info().rss - before
        again, _ = pace(place, lambda: time.sleep(seconds))
    base = (alone + again) / 2
    return {
        "tried": len(answers) + len(wrong),
        "clients": count,
        "seconds of a step": {"before": alone, "with clients": crowded, "after": again},
        "slower": crowded / base - 1,
        "slowest answer": max(answers, default=None),
        "median answer": statistics.median(answers) if answers else None,
        "memory grown": grown,
        "failed": [f"request failed: {w}" for w in wrong[:5]] + ["the page grew by 256 MB"] * (grown > 2**28),
    }


def sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every file below a folder; those on their way to another name may be gone by then."""
    found = {}
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if file.is_file():
                found[file] = file.stat().st_size
    return found


def soak(minutes: float) -> dict:
    """A run with its page open for so long: is all of it as flat in the last quarter as in the second one?"""
    samples = []
    with live(10**6) as place, looked_at(place) as browser:
        training, end = place.training, time.monotonic() + 60 * minutes
        last_step, last_time = place.steps(), time.monotonic()
        while time.monotonic() < end:
            time.sleep(SAMPLE)
            step, now = place.steps(), time.monotonic()
            files = sizes(place.run.parent)
            samples.append(
                {
                    "memory of the page": place.page.memory_info().rss,
                    "memory of the run": training.memory_info().rss,
                    "open files": place.page.num_fds() + training.num_fds(),
                    "disk": sum(files.values()),
                    "checkpoints": sum("checkpoints" in f.parts for f in files),
                    "step": step,
                    "step time": (now - last_time) / max(1, step - last_step),
                }
            )
            last_step, last_time = step, now
        run = place.run
        training.send_signal(signal.SIGTERM)
        training.wait(120)
        words = [sys.executable, "-m", "zo_engine", "--runs-dir", str(run.parent), "verify", str(run), "--json"]
        verified = last_line(words)["sound"]
    size = max(1, len(samples) // 4)
    quarters = [samples[i * size : (i + 1) * size] for i in range(4)]
    by = {name: [statistics.median(s[name] for s in q) for q in quarters] for name in samples[0] if name != "step"}
    steps = [q[-1]["step"] - q[0]["step"] for q in quarters]
    by["disk per step"] = [(q[-1]["disk"] - q[0]["disk"]) / max(1, n) for q, n in zip(quarters, steps, strict=True)]
    wrong = [
        f"{name} rises: {by[name]}"
        for name, (share, room) in FLAT.items()
        if by[name][3] > by[name][1] * (1 + share) + room
    ]
    wrong += ["checkpoints become more"] * (by["checkpoints"][3] > by["checkpoints"][0])
    wrong += ["the run is not sound afterwards"] * (not verified)
    return {"tried": minutes, "steps": samples[-1]["step"], "seen in": browser, "by quarter": by, "failed": wrong}


# The table


def table(pieces: dict[str, dict]) -> str:
    """All pieces as Markdown: what was tried, how often, and what was lost, failed or found."""
    lines = ["| what was tried | how often | lost, failed or found |", "|---|---|---|"]
    killed = [piece for key, piece in pieces.items() if key.startswith("kills")]
    if killed:
        by, moments, disturbed = Counter(), Counter(), Counter()
        for piece in killed:
            disturbed.update(piece["by"].get("signals", {}))
            for title, found in piece["by"].items():
                if title != "signals":
                    by[title] += sum(found.values())
                    for event, count in found.items():
                        moments[event.split()[0]] += count
        lost, total = sum(len(piece["lost"]) for piece in killed), sum(by.values())
        cuts = sum(piece["power cuts"] for piece in killed)
        what = f"SIGKILL in a process that writes, gone on with and compared byte for byte; {cuts} of them power cuts"
        lines.append(f"| **{what}** | {total:,} | {lost} |")
        lines += [f"| of these, {title} | {count:,} | |" for title, count in by.items()]
        lines.append(f"| where: {', '.join(f'{k} {n}' for k, n in sorted(moments.items()))} | | |")
        lines += [f"| {name}, gone on with and compared | {count:,} | |" for name, count in disturbed.items()]
    for key, piece in pieces.items():
        wrong = len(piece["failed"])
        if key == "planted":
            names = "; ".join(piece["planted"])
            lines.append(f"| **planted defects that the harness must notice**: {names} | {piece['tried']} | {wrong} |")
        elif key in TESTS:
            lines.append(f"| **{TESTS[key]}** | {piece['tried']:,} | {wrong} |")
            lines += [f"| {name} | {count:,} | |" for name, count in piece["by"].items()]
        elif key.startswith("fuzz"):
            lines.append(f"| **{key}: executions, guided by coverage** | {piece['tried']:,} | {wrong} |")
        elif key == "soak":
            quarters = piece["by quarter"]
            lines.append(
                f"| **minutes of training, {piece['steps']:,} steps, page open** | {piece['tried']:g} | {wrong} |"
            )
            for name, unit, scale in SHOWN:
                row = ", ".join(f"{value / scale:,.0f}" for value in quarters[name])
                lines.append(f"| {name}, by quarter: {row} {unit} | | |")
        elif key == "clients":
            before, during, after = piece["seconds of a step"].values()
            half, slowest = (f"{piece[name] or math.nan:.2f} s" for name in ("median answer", "slowest answer"))
            lines.append(
                f"| **requests of {piece['clients']} open pages during a run** | {piece['tried']:,} | {wrong} |"
            )
            lines.append(
                f"| a step before, with and after them: {before:.3f}, {during:.3f}, {after:.3f} s "
                f"({100 * piece['slower']:+.0f} %); half of the answers within {half}, all within {slowest}; the page "
                f"grew by {piece['memory grown'] / 1e6:.0f} MB | | |"
            )
    about = sorted({(piece["date"], piece["commit"], piece["cpu"]) for piece in pieces.values()})
    made = "; ".join(f"{date}, commit {commit}, {cpu}" for date, commit, cpu in about)
    return "\n".join([*lines, "", f"Made by benchmarks/faults.py: {made}.", ""])


def there() -> dict[str, dict]:
    """The pieces that the result file has."""
    file = RESULTS / "faults.json"
    return json.loads(file.read_text())["pieces"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help=f"in pieces of {PIECE}; and every planted defect")
    parser.add_argument("--fuzz", type=int, default=0, help="executions of each fuzzer; needs atheris")
    parser.add_argument("--python", default=sys.executable, help="one that has atheris")
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    parser.add_argument("--clients", type=float, default=0, help="seconds")
    parser.add_argument("--tests", nargs="*", help=f"of {', '.join(TESTS)}; all, if nothing else is asked for")
    parser.add_argument("--again", action="store_true", help="make pieces anew that are there")
    given = parser.parse_args()
    asked: dict[str, Callable[[], dict]] = {}
    for seed in range(-(-given.kills // PIECE)):
        count = min(PIECE, given.kills - seed * PIECE)
        asked[f"kills {count}, seed {seed}"] = lambda count=count, seed=seed: kills(count, seed)
    if given.kills:
        asked["planted"] = lambda: kills(0, 0, "all")
    others = given.kills or given.fuzz or given.soak or given.clients
    for file in given.tests if given.tests is not None else () if others else TESTS:
        asked[file] = lambda file=file: tests(file)
    for target in FUZZED if given.fuzz else ():
        asked[f"fuzz {target}"] = lambda target=target: fuzz(target, given.fuzz, given.python)
    if given.clients:
        asked["clients"] = lambda: clients(given.clients)
    if given.soak:
        asked["soak"] = lambda: soak(given.soak)
    for key, make in asked.items():
        if not given.again and there().get(key, {}).get("code") == code(key):
            print(f"{key}: is there", flush=True)
            continue
        about, began = code(key), time.monotonic()
        here = {name: circumstances()[name] for name in ("date", "commit", "cpu")}
        made = make()
        pieces = there()  # again: other pieces may have been made in the meantime
        pieces[key] = {"code": about, **here, "took": round(time.monotonic() - began, 1), **made}
        save("faults", {"pieces": pieces})
        (RESULTS / "faults.md").write_text(table(pieces))
        print(
            f"{key}: {made['tried']} tried in {pieces[key]['took']:.0f} s, {made['failed'] or 'nothing lost'}",
            flush=True,
        )
    print(table(there()))


if __name__ == "__main__":
    main()

"""What was tried to lose a run or to get in, how often, and what was lost: python benchmarks/faults.py [--kills 200]

Runs the harness of kills, the tests of faults, bad input and hostile requests, and the fuzzers, and writes
results/faults.json and results/faults.md. Every figure is counted by what ran; a part that is left out is not listed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from common import CHECKOUT, RESULTS, save

TESTS = {
    "tests/test_faults.py": "disk, damage, device, numbers, clock: cases",
    "tests/test_corpus.py": "bad files, folders and recipes, each with its sentence: cases",
    "tests/test_no_pickle.py": "a pickle in the place of every file that is read: cases",
    "tests/test_hostile.py": "hostile requests to a running page: cases",
    "tests/test_verify.py": "replay and examination: cases",
    "tests/test_fuzz.py": "property-based tests: properties",
}
FUZZED = ("style", "journal", "recipe", "texts", "dataset")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}


def kills(count: int, seed: int) -> dict:
    """Trainings killed so often, and compared with uninterrupted ones."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "tests/killing.py", f"{folder}/kills", "--kills", str(count), "--seed", str(seed)]
        done = subprocess.run(words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def tests(file: str) -> dict:
    """How many of a file's tests ran, and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, f"--junitxml={report}"]
        subprocess.run(words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True)
        cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tried": len(cases) - skipped, "skipped": skipped, "failed": wrong}


def fuzz(target: str, runs: int, python: str) -> dict:
    """Executions of a coverage-guided fuzzer, and whether it found anything."""
    words = [python, "tests/fuzz/fuzz.py", target, f"-runs={runs}"]
    done = subprocess.run(words, cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True, errors="replace")
    ran = re.search(r"Done (\d+) runs", done.stderr)
    return {"tried": int(ran[1]) if ran else 0, "failed": [] if done.returncode == 0 else [done.stderr[-1500:]]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fuzz", type=int, default=0, help="executions of each fuzzer; needs atheris")
    parser.add_argument("--python", default=sys.executable, help="one that has atheris")
    parser.add_argument("--tests", nargs="*", default=list(TESTS))
    given = parser.parse_args()
    rows, figures = [], {}
    if given.kills:
        figures["kills"] = table = kills(given.kills, given.seed)
        events = {event for found in table["by"].values() for event in found}
        what = f"SIGKILL in a training, resumed and compared bit for bit, at {len(events)} kinds of moment"
        rows.append((what, table["kills"], len(table["lost"])))
    for file in given.tests:
        figures[file] = found = tests(file)
        rows.append((TESTS[file], found["tried"], len(found["failed"])))
        print(rows[-1], found["failed"], flush=True)
    for target in FUZZED if given.fuzz else ():
        figures[f"fuzz {target}"] = found = fuzz(target, given.fuzz, given.python)
        rows.append(
            (f"coverage-guided fuzzing of the {target} reader: executions", found["tried"], len(found["failed"]))
        )
        print(rows[-1], flush=True)
    save("faults", figures)
    lines = ["| what was tried | how often | lost, failed or found |", "|---|---|---|"]
    lines += [f"| {what} | {count:,} | {lost} |" for what, count, lost in rows]
    (RESULTS / "faults.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The page under a clock, in a real browser, with the real worker: writes results/page.json.

    python benchmarks/page.py [--tries 5] [--idle 60] [--runs 3]

Needs a quiet machine and a Chromium. What it measures, medians of the tries:
- start: seconds until the server answers, and of them those of importing it
- load: seconds until the page can be used, with nothing to show and with a draft of 22 pictures, and bytes on the wire
- idle: share of one core that the server takes while six tabs look on, with nothing live and with a live run
- updates: the longest that the browser's main thread was held at once, while a run of 20,000 steps grows on the screen
- training: seconds from pressing Train to the first preview, and to the first improvement that is more than chance, of
  each try; from the second on the pictures are encoded already
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from common import CHECKOUT, save

sys.path.insert(0, str(CHECKOUT))

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from app.place import Place  # noqa: E402
from zo_engine.journal import Move  # noqa: E402
from zo_engine.run import Run  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
TABS, STEPS, PATIENCE = 6, 20_000, 600_000
LONG_TASKS = """() => {
  window.longest = 0;
  new PerformanceObserver((list) => {
    for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
  }).observe({entryTypes: ['longtask']});
}"""


@contextmanager
def server(runs: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """(address, process, seconds until it answered) of a page over a folder of runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "zo_engine", "--runs-dir", str(runs), "ui", "--port", str(port)]
    began = time.monotonic()
    process = subprocess.Popen(words, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    try:
        assert "QZO Studio is at" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid), time.monotonic() - began
    finally:
        process.kill()
        process.wait()


def start(tries: int) -> dict[str, float]:
    whole, imported = [], []
    code = "import time; t = time.monotonic(); import app.page; print(time.monotonic() - t)"
    for _ in range(tries):
        said = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
        imported.append(float(said.stdout))
        with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "runs") as (_, _, seconds):
            whole.append(seconds)
    return {"seconds": round(statistics.median(whole), 2), "of_them_import": round(statistics.median(imported), 2)}


def load(browser: Browser, address: str, there: str, tries: int) -> dict[str, float]:
    """From nothing in the browser's cache until `there` is seen and the next tab can be opened."""
    seconds, sent = [], []
    for _ in range(tries):
        context = browser.new_context()
        page, sizes = context.new_page(), []
        line = context.new_cdp_session(page)
        line.send("Network.enable")
        line.on("Network.loadingFinished", lambda event, sizes=sizes: sizes.append(event["encodedDataLength"]))
        began = time.monotonic()
        page.goto(f"{address}?tab=data")
        page.locator(there).first.wait_for(timeout=PATIENCE)
        page.get_by_role("tab", name="Model", exact=True).click(trial=True)
        seconds.append(time.monotonic() - began)
        page.wait_for_timeout(2000)  # what is fetched after that
        sent.append(sum(sizes))
        context.close()
    return {"seconds": round(statistics.median(seconds), 2), "bytes": round(statistics.median(sent))}


def idle(browser: Browser, address: str, process: psutil.Process, query: str, seconds: float) -> float:
    """Share of one core that the server takes while six tabs, each of another visitor, look on."""
    contexts = [browser.new_context() for _ in range(TABS)]
    for context in contexts:
        page = context.new_page()
        page.goto(address + query)
        page.get_by_role("tab", name="Train", exact=True).click()
    time.sleep(5)
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = process.cpu_times()
    share = (after.user + after.system - before.user - before.system) / (time.monotonic() - began)
    for context in contexts:
        context.close()
    return round(share, 4)


def long_run(place: Place) -> Run:
    """A run of 20,000 steps, which this process seems to go on with."""
    run = Run.create(place.runs / "long", place.drafts.example("tarot").recipe())
    run.journal_file.write_text("".join(line(step) for step in range(STEPS)))
    held = ({"step": i, "loss": 0.9 - i / 1e5, "error": 0.01, "change": -i / 1e5, "change_error": 0.002}
            for i in range(0, STEPS, 10))  # fmt: skip
    run.evaluations_file.write_text("".join(json.dumps(e) + "\n" for e in held))
    return run


def line(step: int) -> str:
    return Move(step, (0.1,) * 96, 0.02, 0.9 - step / 1e5, 0.1, (0.8, 0.9, 0.75)).to_json() + "\n"


def grow(page: Page, run: Run, seconds: float) -> None:
    """Steps are appended, eight a second, and the status says so."""
    end, step = time.monotonic() + seconds, STEPS
    while time.monotonic() < end:
        with open(run.journal_file, "a") as file:
            file.write(line(step))
        step += 1
        run.heartbeat_file.touch()
        run.write_status("running", step=step, steps=2 * STEPS, part=0.0, loss=0.5, held_out=0.6, memory=6e8,
                         seconds_per_step=0.125, remaining=2500.0)  # fmt: skip
        page.wait_for_timeout(125)


def updates(browser: Browser, address: str, run: Run, tries: int) -> dict[str, float]:
    longest = []
    for _ in range(tries):
        context = browser.new_context()
        page = context.new_page()
        grow(page, run, 0.1)
        page.goto(f"{address}?run={run.path.name}")
        page.locator("#charts svg").first.wait_for(timeout=PATIENCE)
        grow(page, run, 3)  # the loading itself is no update
        page.evaluate(LONG_TASKS)
        grow(page, run, 15)
        longest.append(page.evaluate("window.longest"))
        context.close()
    return {"longest_milliseconds": round(max(longest)), "tasks_below_50_are_not_reported": True}


def training(browser: Browser, address: str) -> dict[str, float]:
    """From pressing Train, at the settings of the bundled cards, to a preview, and to a verdict."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}?tab=data")
    page.locator(".qzo-pictures figure").first.wait_for()
    page.get_by_role("button", name="Next: train on this", exact=True).click()
    page.get_by_text("Time, memory and disk are estimates.").wait_for()
    began = time.monotonic()
    page.get_by_role("button", name="Train", exact=True).click()
    page.locator("#card section[aria-label^='Run tarot']").wait_for()
    page.locator("#previews img").first.wait_for()
    preview = time.monotonic() - began
    page.locator("#charts .qzo-verdict.good").first.wait_for()
    improved = time.monotonic() - began
    page.get_by_role("button", name="Discard", exact=True).click()
    page.get_by_role("button", name="Yes, discard it", exact=True).click()
    page.get_by_text("Yes, discard it").wait_for(state="hidden")
    context.close()
    return {"first_preview": preview, "first_improvement": improved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--idle", type=float, default=60, help="seconds")
    parser.add_argument("--runs", type=int, default=3, help="trainings that are begun")
    given = parser.parse_args()
    figures: dict[str, Any] = {"tries": given.tries, "start": start(given.tries)}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = Place(Path(folder) / "runs")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with server(place.runs) as (address, process, _):
            figures["load_empty"] = load(browser, address, "[data-example=tarot]", given.tries)
            place.drafts.example("tarot")
            figures["load_22_pictures"] = load(browser, address, ".qzo-pictures figure img", given.tries)
            figures["idle_share_of_a_core"] = idle(browser, address, process, "", given.idle)
            tried = [training(browser, address) for _ in range(given.runs)]
            figures["training_seconds"] = {k: [round(t[k], 1) for t in tried] for k in tried[0]}
            name = place.jobs.start(place.drafts.example("tarot").recipe(), "tarot")
            figures["idle_share_while_a_run_trains"] = idle(browser, address, process, f"?run={name}", given.idle)
            place.jobs.discard(name)
            figures["updates_with_20000_steps"] = updates(browser, address, long_run(place), 2)
        browser.close()
    print(json.dumps(figures, indent=1))
    save("page", figures)


if __name__ == "__main__":
    main()

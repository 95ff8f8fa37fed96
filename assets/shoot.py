"""Takes the pictures of the page again: every tab at the width of a desk and of a phone, in light and dark.

    python assets/shoot.py [RUNS [NAME ...]]       into assets/page/

NAMEs are those of SHOTS, all of them by default. RUNS is a folder with finished runs, one of pictures and one of texts;
without it both are trained first, in a folder that is gone afterwards: some ten minutes on two cores. Needs a Chromium,
as the tests in a browser do.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from app.place import Place  # noqa: E402

INTO = CHECKOUT / "assets" / "page"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {1280: 1100, 390: 1150}  # with the height that is shown at most: not all of a long page
PATIENCE = 180_000  # milliseconds
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
SHOTS = {  # name -> (tab, which draft is the newest, what kind of run is shown, what is there once it is whole)
    "begin": ("Data", "", "pictures", "[data-example=tarot] img"),
    "data": ("Data", "woodcut", "pictures", ".qzo-pictures figure img"),
    "texts": ("Data", "voice", "texts", "#rendered mark"),
    "model": ("Model", "tarot", "pictures", ".qzo-models .good"),
    "train": ("Train", "tarot", "pictures", "#previews img"),
    "answers": ("Train", "voice", "texts", ".qzo-answers tbody tr"),
    "result": ("Result", "tarot", "pictures", "#slider img"),
    "chat": ("Result", "voice", "texts", ".qzo-chat .after p:not(.busy)"),
    "runs": ("Runs", "tarot", "pictures", ".qzo-past img"),
}


@contextmanager
def page_over(runs: Path) -> Iterator[str]:
    """The address of a page over a folder of runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "zo_engine", "--runs-dir", str(runs), "ui", "--port", str(port)]
    server = subprocess.Popen(words, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    try:
        assert "QZO Studio is at" in server.stdout.readline()
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


def train(place: Place) -> None:
    """One run of pictures and one of texts, as the bundled sets come."""
    for name in ("tarot", "voice"):
        run = place.jobs.start(place.drafts.example(name).recipe(), name)
        while place.jobs.look(run).live:
            time.sleep(1)
        assert place.jobs.look(run).state == "done", place.jobs.look(run).message
        place.drafts.bin(name)  # the first picture shows a page without any


def shown(place: Place) -> dict[str, str]:
    """The newest finished run of each kind."""
    found: dict[str, str] = {}
    for name in place.jobs.names():
        if place.jobs.run(name).style_file.exists():
            found.setdefault("texts" if place.jobs.run(name).recipe().texts else "pictures", name)
    return found


def settle(page: Page, there: str) -> None:
    """Until what belongs to a tab has come, and all pictures in sight are drawn."""
    page.locator(there).locator("visible=true").first.wait_for(timeout=PATIENCE)
    page.add_style_tag(content=STILL)
    page.wait_for_timeout(2500)  # a look of the clock, and the last layout
    seen = "(i) => !i.offsetParent || i.getBoundingClientRect().top > innerHeight || i.complete"
    page.wait_for_function(f"[...document.images].every({seen})")
    size = page.viewport_size
    height = page.evaluate("Math.ceil(document.querySelector('#tabs').getBoundingClientRect().bottom) + 32")
    page.set_viewport_size({"width": size["width"], "height": min(height, size["height"])})


def say_something(page: Page) -> None:
    """An exchange of words, where there is none yet."""
    page.locator("#say textarea").wait_for()
    page.wait_for_timeout(1000)
    if not page.locator(".qzo-chat .after").count():
        page.locator("#say textarea").fill("Where is the moon?")
        page.locator("#say textarea").press("Enter")


def save(picture: bytes, name: str) -> Path:
    """As a PNG of 256 colours, at a third of the size: those that a page uses most as they are, and for its pictures
    what lies between."""
    with Image.open(io.BytesIO(picture)) as image:
        whole = image.convert("RGB")
    often = [colour for _, colour in sorted(whole.getcolors(2**24), reverse=True)[:96]]
    few = whole.quantize(256 - len(often), dither=Image.Dither.NONE)
    codes = np.asarray(few) + len(often)
    for code, colour in enumerate(often):
        codes[(np.asarray(whole) == colour).all(axis=2)] = code
    image = Image.fromarray(codes.astype(np.uint8), "P")
    image.putpalette([*np.ravel(often).tolist(), *few.getpalette()])
    image.save(INTO / f"{name}.png", optimize=True)
    return INTO / f"{name}.png"


def main(runs: Path, names: list[str]) -> None:
    place = Place(runs)
    if len(shown(place)) < 2:
        train(place)
    kinds = shown(place)
    INTO.mkdir(exist_ok=True)
    with page_over(runs) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name in names or SHOTS:
            tab, draft, kind, there = SHOTS[name]
            if draft:
                os.utime(place.drafts.example(draft).file)  # the draft that was changed last is the one that is shown
            for width, height in WIDTHS.items():
                for theme in ("light", "dark"):
                    context = browser.new_context(viewport={"width": width, "height": height})
                    page = context.new_page()
                    page.goto(f"{address}?run={kinds[kind]}&tab={tab.lower()}&__theme={theme}")
                    page.get_by_role("tab", name=tab, exact=True).click()
                    if tab == "Train":  # the run, with the settings folded away
                        page.locator(there).first.wait_for(state="attached", timeout=PATIENCE)
                        page.get_by_role("button", name="What to train").click()
                    if name == "chat":
                        say_something(page)
                    settle(page, there)
                    file = save(page.screenshot(), f"{name}-{width}-{theme}")
                    print(f"{file.name}  {file.stat().st_size / 1000:.0f} KB", flush=True)
                    context.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "runs", [])

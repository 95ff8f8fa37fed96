"""The page in a browser: a real server, the real worker, the embedded model; at the width of a desk and of a phone."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page's own extra is not installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[app,dev]'")

from app.place import Place  # noqa: E402
from zo_engine.run import new_name  # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("no browser: install chromium, or set CHROMIUM to the path of one", allow_module_level=True)

PATIENCE = 180_000  # milliseconds that anything may take: a worker loads torch, and the machine may be busy
SMALL = {"batch_size": 4, "directions": 8, "evaluate_items": 8, "preview_steps": 2, "prior": 0.0,
         "prompts": ["a [trigger] sun"]}  # fmt: skip
BEGIN = "Begin with pictures in one style, or with texts"
ENDED = "Unexpected error 404: Not Found"  # what a page says whose session the server no longer knows
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
MOST_BYTES = 800_000  # of a page with 22 pictures; 1 MB is what it may be
TABS = {  # with what each shows once its figures have come
    "Data": ".qzo-pictures figure",
    "Model": ".qzo-models section",
    "Train": ".qzo-plan .qzo-card",
    "Result": "#slider, .qzo-chat, .qzo-empty",
    "Runs": ".qzo-past, .qzo-empty",
}
expect = api.expect
expect.set_options(timeout=PATIENCE)


@dataclass
class Server:
    """The page as a process of its own, which can be killed and started again."""

    place: Place
    port: int
    process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        words = ["--runs-dir", str(self.place.runs), "ui", "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(self.place.runs.parent / "gradio")}
        self.process = subprocess.Popen([sys.executable, "-m", "zo_engine", *words], cwd=CHECKOUT, env=environment,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert "QZO Studio is at" in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(Place(tmp_path_factory.mktemp("page") / "runs"), port)
    server.start()
    yield server
    server.kill()
    for name in server.place.jobs.names():
        for kind in ("train", "chat"):
            if process := server.place.jobs.job(name, kind).process():
                process.kill()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser):
    """visit(query, width) -> a page, an empty one for None; at the end, none of them had an error or asked another
    server for anything."""
    wrong, contexts, leaving, came_from = [], [], set(), {}

    def asked(request) -> None:
        if request.is_navigation_request():
            leaving.add(request.frame.page)
            came_from[request.frame.page] = server.process

    def heard(message) -> None:
        """Gradio ends the session of a page that is left before it is gone, and a server that was started again knows
        none; the last questions of such a page find it ended, or are cut off in the middle of an answer."""
        over = message.page in leaving or came_from.get(message.page, server.process).poll() is not None
        if message.type == "error" and not (over and (message.text == ENDED or "net::ERR_" in message.text)):
            wrong.append(message.text)

    def open_page(query: str | None = "", width: int = 1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)

        def ask(route) -> None:
            if route.request.url.startswith((server.address, "data:", "blob:")):
                route.continue_()
            else:
                wrong.append(f"asked for {route.request.url}")
                route.abort()

        page.route("**/*", ask)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", asked)
        page.on("domcontentloaded", lambda page: leaving.discard(page))
        page.on("console", heard)
        page.wrong = wrong
        if query is not None:
            page.goto(server.address + query)
            expect(page.get_by_role("tab", name="Data", exact=True)).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # a page that is left or whose server is killed has its open requests cut off, and says so
    cut = re.compile(
        "abort|Connection errored out|ERR_(CONNECTION|SOCKET_NOT_CONNECTED|INCOMPLETE)"
        "|Failed to fetch|NetworkError|network error"
    )
    assert [text for text in wrong if not cut.search(text)] == []


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def unfold(page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def step(page) -> int:
    """The step that the card of the run shows."""
    return int(page.locator("#card .count b").inner_text().replace(",", ""))


def fits(page) -> bool:
    """Nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def pill(page, word: str) -> None:
    expect(page.locator("#card .qzo-pill")).to_have_text(word)


def test_from_pictures_to_a_style(server, visit):
    """The whole journey at the desk, with a phone that looks on: pictures, a caption with markup, settings, training,
    result, runs. What one of them does, the other shows."""
    markup = "a [trigger] <img src=x onerror=alert(1)> of {{the}} `sun`"
    page, phone = visit("?tab=data", 1280), visit("?tab=data", 390)
    page.locator("[data-example=woodcut]").click()
    expect(page.locator(".qzo-pictures figure")).to_have_count(20)
    server.place.drafts.open("woodcut").change(**SMALL)
    first = page.locator(".qzo-pictures textarea").first
    first.fill(markup)  # saved as it is typed, without leaving the field
    expect(page.locator(".qzo-pictures small").first).to_contain_text("<img src=x")
    for one in (page, phone):
        one.reload()
        expect(one.locator(".qzo-pictures textarea").first).to_have_value(markup)
        assert fits(one)

    press(page, "Next: train on this")
    steps = page.get_by_label("Steps", exact=True)
    steps.fill("4")  # at the first moment that it can be typed in
    steps.blur()
    expect(page.get_by_text("4 steps of 4 pictures")).to_be_visible()
    expect(page.get_by_text("Time, memory and disk are estimates.")).to_be_visible()
    expect(steps).to_have_value("4")
    unfold(page, "Advanced")
    tab(page, "The same on the command line")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save", exact=True).click()
    assert "steps = 4" in Path(download.value.path()).read_text()
    name = new_name(server.place.runs, "woodcut").name
    press(page, "Train")
    expect(page.locator("#card section")).to_have_attribute("aria-label", f"Run {name}")
    phone.goto(f"{server.address}?run={name}")
    for one in (page, phone):
        expect(one.locator("#previews img").first).to_be_visible()
        pill(one, "done")
        expect(one.get_by_role("button", name="Compare", exact=True)).to_be_enabled()
        expect(one.locator("#previews em", has_text="step 4").first).to_be_visible()
        assert step(one) == 4 and fits(one)
        one.locator("#charts .point").first.wait_for()
        assert one.get_by_role("heading", name="Accuracy").count() == 0
    unfold(page, "What each step did")
    expect(page.get_by_role("img", name=re.compile("Gain of a step"))).to_be_visible()
    page.locator("#charts [data-left]").last.click(position={"x": 5, "y": 40})
    expect(page.locator("#previews .pair").first).to_be_visible()

    for one in (page, phone):
        press(one, "Compare")
        expect(one.locator("#slider img").first).to_be_visible()
        expect(one.get_by_role("link", name=re.compile("Download")).first).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("Download")).first.click()
    assert download.value.suggested_filename.endswith("style.safetensors")
    phone.get_by_label("Prompts, one a line").fill("a woodcut of a <b>fish</b>")
    press(phone, "Draw base and style")
    expect(phone.locator(".qzo-sheet img")).to_be_visible()

    for one in (page, phone):
        assert fits(one)
        tab(one, "Runs")
        expect(one.locator(".qzo-past").first).to_be_visible()
        assert fits(one)


def test_from_texts_to_a_conversation(server, visit):
    """The same journey with texts, on a phone, by keyboard, in the dark; a desk looks on in the light: what is learnt
    is shown, answers change, and both sides answer what is asked."""
    name, page = "sentiment", visit("?tab=data&__theme=dark", 390)
    page.add_style_tag(content=STILL)
    if server.place.drafts.names():  # folded away, once there are drafts
        expect(page.locator(".qzo-pictures figure, #texts section").locator("visible=true").first).to_be_visible()
        key(page.get_by_role("button", name=BEGIN))
    key(page.locator(f"[data-example={name}]"))
    expect(page.locator("#texts")).to_contain_text("200 of 200 rows")
    expect(page.locator("#rendered mark").nth(1)).to_be_visible()  # read by the tokenizer
    found = serious(page, "Data")

    few = {"steps": 2, "batch_size": 4, "directions": 8, "evaluate_items": 8, "answer_tokens": 8}
    server.place.drafts.open(name).change(**few)
    key(page.get_by_role("button", name="Next: train on this", exact=True))
    expect(page.get_by_text("2 steps of 4 texts")).to_be_visible()
    expect(page.get_by_label("Resolution", exact=True)).to_be_hidden()
    run = new_name(server.place.runs, name).name
    key(page.get_by_role("button", name="Train", exact=True))
    expect(page.locator("#card section")).to_have_attribute("aria-label", f"Run {run}")
    desk = visit(f"?run={run}&__theme=light", 1280)
    desk.add_style_tag(content=STILL)
    for one in (page, desk):
        expect(one.locator(".qzo-answers tbody tr").first).to_be_visible()
        pill(one, "done")
        expect(one.locator('.qzo-answers td[data-at="step 2"]').first).to_be_visible()
        one.locator("#charts [data-left]").first.wait_for()
        expect(one.get_by_role("heading", name="Accuracy")).to_be_visible()
        found += serious(one, "Train")

    key(page.get_by_role("button", name="Compare", exact=True))
    words = page.locator("#say textarea")
    for number, asked in enumerate(("Where is the moon?", "And <b>why</b>?"), 1):
        words.fill(asked)
        words.press("Enter")
        expect(page.locator(".qzo-chat .after p:not(.busy)")).to_have_count(number)
    expect(page.locator(".qzo-chat .you").nth(1)).to_have_text("And <b>why</b>?")
    page.reload()
    page.add_style_tag(content=STILL)
    for one in (page, desk):
        tab(one, "Result")
        expect(one.locator(".qzo-chat .after")).to_have_count(2)
        found += serious(one, "Result")
    assert not found, "\n".join(found)


def key(what) -> None:
    """Use a control as somebody without a mouse does; it must be seen to have the focus."""
    expect(what).to_be_enabled()
    what.focus()
    assert what.evaluate("e => e.matches(':focus') && e.tabIndex == 0")
    what.press("Enter")


def serious(page, where: str) -> list[str]:
    """What axe finds serious on a page that also has to fit: names, roles, contrast, order."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    assert fits(page), where
    told = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    bad = [v for v in told if v["impact"] in ("serious", "critical")]
    shown = lambda v: [f"{n['target']} {n['html'][:120]}" for n in v["nodes"][:3]]  # noqa: E731
    return [f"{where}: {v['id']}: {shown(v)}" for v in bad]


def test_a_tab_that_is_chosen_while_the_page_loads_stays(server, visit):
    """The server's answer to the page's first question, where to begin, comes later than the click."""
    server.place.drafts.example("tarot")
    page, held = visit("?tab=data"), []
    page.route("**/queue/join*", lambda route: held.append(route))
    page.reload()
    tab(page, "Model")
    chosen = page.get_by_role("tab", name="Model", exact=True)
    expect(chosen).to_have_attribute("aria-selected", "true")
    assert held
    while held:
        held.pop().continue_()
    page.unroute("**/queue/join*")
    expect(page.get_by_text("Your draft is of pictures")).to_be_visible()  # the answer has come
    page.evaluate("new Promise((done) => setTimeout(done, 500))")
    expect(chosen).to_have_attribute("aria-selected", "true")


def test_every_tab_can_be_read_by_everybody(server, visit):
    """axe finds nothing serious at either width, in light and dark: names, roles, contrast, order."""
    server.place.drafts.example("tarot")
    page, found = visit("?tab=data"), []
    page.add_style_tag(content=STILL)  # half-way through a fade, no contrast is what it will be
    expect(page.locator(".qzo-pictures figure").first).to_be_visible()
    for name, shown in TABS.items():
        tab(page, name)
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
        page.locator(shown).locator("visible=true").first.wait_for()
        for theme in ("light", "dark"):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                found += serious(page, f"{name}, {theme}, {width}")
    assert not found, "\n".join(found)


def test_little_travels(server, visit):
    """All of a draft's twenty-two pictures and the page around them, to a browser that has nothing yet."""
    server.place.drafts.example("tarot").change(steps=36)  # the draft that is shown
    page = visit(None)
    line, sizes = page.context.new_cdp_session(page), []
    line.send("Network.enable")
    line.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    page.goto(f"{server.address}?tab=data")
    expect(page.locator(".qzo-pictures figure")).to_have_count(22)
    for picture in page.locator(".qzo-pictures img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.qzo-pictures img')].every((i) => i.complete)")
    assert 300_000 < sum(sizes) < MOST_BYTES


def test_a_run_goes_on_whatever_happens_to_the_page(server, visit):
    """In five clicks at most to a run; then reload, a second tab, a killed server, previews, saving, silence, stop,
    resume, a killed worker, discard."""
    jobs, drafts = server.place.jobs, server.place.drafts
    drafts.example("tarot").change(**SMALL, steps=200, preview_every=0)
    drafts.open("tarot").change(batch_size=16, directions=24)  # steps of a second or two
    drafts.example("woodcut").change(**SMALL)  # the draft that is shown first: a stranger has to choose
    page = visit("?tab=data")
    expect(page.locator(".qzo-pictures figure").first).to_be_visible()
    page.evaluate("addEventListener('click', (e) => { window.clicks = (window.clicks || 0) + e.isTrusted; }, true)")
    unfold(page, BEGIN)
    page.locator("[data-example=tarot]").click()
    expect(page.locator(".qzo-pictures figure")).to_have_count(22)
    press(page, "Next: train on this")
    name = new_name(server.place.runs, "tarot").name
    press(page, "Train")
    assert 0 < page.evaluate("window.clicks") <= 5
    expect(page.locator("#card section")).to_have_attribute("aria-label", f"Run {name}")
    pill(page, "training")
    expect(page.locator("#previews img").first).to_be_visible()
    expect(page.locator("#card .count")).to_contain_text("of the next one")
    expect(page.locator("#charts .qzo-verdict").first).to_contain_text("the start")  # as soon as the first step

    before = step(page)
    other = visit(f"?run={name}", 390)
    page.goto(f"{server.address}?run={name}")
    for one in (page, other):
        pill(one, "training")
        expect(one.locator("#card .count b")).not_to_have_text(f"{before:,}")

    server.kill()
    server.start()
    before = len(jobs.run(name).journal())
    page.goto(f"{server.address}?run={name}")
    pill(page, "training")
    assert step(page) >= before

    press(page, "Preview now")
    expect(page.locator("#at")).to_be_visible()
    press(page, "Save now")
    expect(page.get_by_text("The style is saved when this step is done")).to_be_visible()
    process = jobs.job(name).process()
    while not jobs.run(name).style_file.exists():
        assert process.is_running()
        page.wait_for_timeout(100)

    process.send_signal(signal.SIGSTOP)
    pill(page, "not answering")
    process.send_signal(signal.SIGCONT)
    pill(page, "training")

    press(page, "Stop and save")
    pill(page, "stopped")
    stopped = step(page)
    expect(page.locator("#card .message")).to_contain_text(f"Everything up to step {stopped} is kept")
    press(page, "Resume")
    pill(page, "training")
    psutil.Process(jobs.job(name).record()["pid"]).kill()
    pill(page, "interrupted")
    assert step(page) >= stopped
    expect(page.get_by_role("button", name="Resume", exact=True)).to_be_enabled()

    press(page, "Discard")
    press(page, "Yes, discard it")
    expect(page.get_by_text("Yes, discard it")).to_be_hidden()
    assert name not in jobs.names() and (server.place.runs / ".bin" / name).is_dir()


def test_what_is_brought_is_taken_or_refused_in_a_sentence(visit, tmp_path):
    """A damaged ZIP, then one of 150 pictures."""
    page = visit("?tab=data", 390)
    begin = page.get_by_role("button", name=BEGIN)
    upload = page.locator("input[type=file]").first
    if not upload.count():
        begin.click()
    damaged = tmp_path / "cards.zip"
    damaged.write_bytes(b"PK\x03\x04 no more than this")
    upload.set_input_files(damaged)
    expect(page.get_by_text("cards.zip is not a whole ZIP file")).to_be_visible()
    page.wrong[:] = [text for text in page.wrong if "cards.zip" not in text]

    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as archive:
        for i in range(150):
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), (i, 255 - i, 40)).save(buffer, "PNG")
            archive.writestr(f"{i:03d}.png", buffer.getvalue())
            archive.writestr(f"{i:03d}.txt", f"colour {i}")
    page.reload()
    upload = page.locator("input[type=file]").first
    expect(upload).to_be_attached()
    upload.set_input_files(many)
    expect(page.get_by_text("150 of 150 captioned")).to_be_visible()
    expect(page.locator(".qzo-pictures figure")).to_have_count(150)
    expect(page.locator(".qzo-pictures textarea").nth(149)).to_have_value("colour 149")
    assert fits(page)

"""A page under attack: what other sites, other machines and broken browsers may ask, and what they get.

A real server on the loopback; requests are written byte by byte where a polite client would tidy them up.
"""
# ruff: noqa: E501 (tables, a case a line)

import base64
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")

from app import guard  # noqa: E402
from app.guard import ADDRESSES, HEADERS, TRIES, Guard  # noqa: E402
from app.page import serve  # noqa: E402
from app.place import Place  # noqa: E402
from zo_engine.recipe import Recipe  # noqa: E402
from zo_engine.run import Run  # noqa: E402

MARKUP = '<script>alert("x")</script><img src=x onerror=alert(1)>{{x}}${x}\'"'
web = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
SECRET = "a secret that nobody may read"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, place) of a page that is open, with a draft, a run and a secret beside them."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret.png").write_text(SECRET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, address = serve(root / "runs", port=port, wait=False)
    place = Place(root / "runs")
    place.drafts.example("woodcut")
    run = Run.create(place.runs / "shown", Recipe(trigger=MARKUP, prompts=(MARKUP,)))
    run.write_status("failed", step=1, reason=MARKUP)
    (run.path / "secret.png").write_text(SECRET)
    (run.previews / "000000").mkdir(parents=True)
    for link in ("previews/000000/00.png", "previews/000000.png", "style.safetensors", "plots/loss.png"):
        (run.path / link).parent.mkdir(exist_ok=True)
        (run.path / link).symlink_to(root / "secret.png")
    (place.drafts.root / "woodcut" / "thumbs").mkdir(exist_ok=True)
    (place.drafts.root / "woodcut" / "thumbs" / f"{'a' * 20}.webp").symlink_to(root / "secret.png")
    yield address.rstrip("/"), place
    page.close()


def raw(address: str, request: bytes, wait: float = 60.0) -> bytes:
    """What a server answers to exactly these bytes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as line:
        line.sendall(request)
        parts = []
        try:
            while part := line.recv(65536):
                parts.append(part)
        except OSError:
            pass
    return b"".join(parts)


def get(address: str, path: str, *headers: str) -> bytes:
    host = address.removeprefix("http://")
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
    return raw(address, "\r\n".join(lines).encode("latin-1"))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


FILES = (
    "/media/run/shown/secret.png", "/media/run/shown/../shown/secret.png", "/media/run/../secret.png",
    "/media/run/..%2fsecret.png", "/media/run/%2e%2e/secret.png", "/media/run/shown/previews/../../secret.png",
    "/media/run/shown/previews/000000/00.png", "/media/run/shown/previews/000000.png", "/media/run/shown/plots/loss.png",
    "/media/run/shown/style.safetensors", "/media/run/shown/previews%2f..%2fsecret.png", "/media/run/shown/run.json",
    "/media/run/shown/status.json", "/media/run/shown/.lock", "/media/run//etc/passwd", "/media/run/shown//etc/passwd",
    "/media//etc/passwd", "/media/draft/woodcut/aaaaaaaaaaaaaaaaaaaa.webp", "/media/draft/woodcut/../recipe.toml",
    "/media/draft/../shown/recipe.toml", "/media/example/..%2f..%2fassets/styles.png", "/media/run/shown/recipe.toml%00.png",
    "/media/run/shown/previews/%E2%80%8B000000.png", "/media/run/" + "a" * 5000, "/media/" + "../" * 40 + "etc/passwd",
    "/media/run/shown/previews/999999.png\\..\\..\\secret.png", "/media/run/.jobs/recipe.toml", "/media/run/.drafts/recipe.toml",
    "/../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd",
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/gradio_api/file=%2fetc%2fpasswd",
    "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/file=file:///etc/passwd", "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=/dev/zero", "/gradio_api/file=C:\\Windows\\win.ini", "/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=http://127.0.0.1:1/",
    "/gradio_api/component_server", "/gradio_api/stream/../../etc/passwd", "/custom_component/x/client/component/../../../../etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("path", FILES)
def test_no_file_is_read_that_is_not_shown(server, path):
    address, place = server
    answer = get(address, path)
    assert status(answer) in (307, 400, 403, 404, 405, 422), answer[:300]
    assert SECRET.encode() not in answer and b"root:" not in answer and b"Traceback" not in answer
    root = place.runs.parent
    for wanted in (root / "secret.png", place.runs / "shown" / "secret.png", place.runs / "shown" / "recipe.toml"):
        assert status(get(address, f"/gradio_api/file={wanted}")) == 403


FOREIGN_HOSTS = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "", "2130706433", "[::2]", "0.0.0.0",
                 "127.0.0.1@evil.example", "169.254.169.254")  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_name_is_refused(server, host):
    for path in ("/", "/config", "/media/run/shown/recipe.toml", "/gradio_api/queue/join"):
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert status(raw(server[0], request.encode())) == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:1", "file://"]
)
@pytest.mark.parametrize("method, path", [
    ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/run/predict"), ("DELETE", "/"), ("PUT", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/queue/join"),
])  # fmt: skip
def test_scripts_of_other_sites_are_refused(server, origin, method, path):
    """Also those of other servers of this machine, and also where they only read."""
    answer = web.request(method, server[0] + path, headers={"origin": origin})
    assert answer.status_code == 403 and answer.text == "requests from other sites are refused"
    if method == "POST":
        files = {"files": ("a.png", b"abc", "image/png")}
        for sent in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": origin}):
            assert web.post(server[0] + path, files=files, headers=sent).status_code == 403


def test_a_link_from_elsewhere_opens_the_page(server):
    assert web.get(server[0] + "/", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_every_answer_carries_the_headers(server):
    address = server[0]
    for answer in (web.get(address), web.get(f"{address}/none"), web.post(address, headers={"origin": "https://a.b"}),
                   web.get(address, headers={"host": "a.b"}), web.get(f"{address}/media/run/shown/recipe.toml"),
                   web.post(f"{address}/gradio_api/queue/join", content=b"{", headers={"content-length": "1"})):  # fmt: skip
        assert all(answer.headers[name] == value for name, value in HEADERS.items()), answer
        assert "set-cookie" not in answer.headers or "samesite" in answer.headers["set-cookie"].lower()


# Too much


def test_a_request_that_says_it_is_too_long_is_refused_before_it_comes(server):
    address = server[0]
    host = address.removeprefix("http://")
    for path, length in (
        ("/gradio_api/upload", 3 * 10**9),
        ("/gradio_api/queue/join", 10**8),
        ("/gradio_api/upload", 10**40),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        assert status(raw(address, head.encode())) in (400, 413)


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/component_server", "/gradio_api/upload", "/"])
def test_an_endless_request_is_cut_off(server, monkeypatch, path):
    """In pieces, without a length; the server's memory stays as it was, and it goes on answering."""
    monkeypatch.setattr(guard, "MAX_UPLOAD", 2**23)
    address, before, sent = server[0], psutil.Process().memory_info().rss, 0

    def endless():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        while sent < 2**28:
            sent += 2**18
            yield bytes(2**18)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    try:
        code = web.post(address + path, content=endless(), headers=kind, timeout=60).status_code
    except httpx.TransportError:
        code = 413  # cut off before it could be read
    assert code in (400, 405, 413, 422) and (sent < 2**27 or code == 405)
    assert psutil.Process().memory_info().rss - before < 2**27
    assert web.get(address).status_code == 200


def test_an_upload_keeps_its_name_to_itself(server, tmp_path):
    """Whatever a file is called, it lies in the upload's own folder."""
    address, before = server[0], set(server[1].runs.parent.rglob("*"))
    for name in ("../../../evil.png", "/etc/evil.png", "..\\evil.png", "a\x00b.png", "x" * 300 + ".png", "", MARKUP):
        answer = web.post(f"{address}/gradio_api/upload", files={"files": (name, b"abc", "image/png")})
        assert answer.status_code in (200, 400, 422, 500), answer.text
        for path in answer.json() if answer.status_code == 200 else ():
            assert "gradio" in path and ".." not in Path(path).parts and Path(path).read_bytes() == b"abc"
    assert set(server[1].runs.parent.rglob("*")) == before


# Calls


def called(address: str, session: str, index: int, values: list, trigger: int | None = None) -> dict:
    """What a handler of the page answers over the wire."""
    sent = {"data": values, "fn_index": index, "session_hash": session, "trigger_id": trigger, "event_data": None}
    joined = web.post(f"{address}/gradio_api/queue/join", json=sent, timeout=60)
    if joined.status_code != 200:
        return {"refused": joined.status_code}
    heartbeats = 0
    with web.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            found = json.loads(line[6:]) if line.startswith("data: ") else {}
            heartbeats += found.get("msg") == "heartbeat"  # every fifteen seconds
            if found.get("msg") in ("process_completed", "unexpected_error", "close_stream"):
                return found
            if heartbeats > 3:
                break
    return {}


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_handlers_called_with_what_no_browser_sends(server, turn):
    """Every handler with strangers' ids, wrong kinds, numbers, too little and too much: no call kills the server, none
    reads or writes a file that is not of a draft or run."""
    address, place = server
    config = web.get(f"{address}/config").json()
    before = {p for p in place.runs.parent.rglob("*") if ".jobs" not in p.parts}
    strange = ["../../etc/passwd", None, -1, MARKUP, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]

    def call(dependency: dict) -> tuple | None:
        """What was asked, if it was not answered."""
        value = strange[(dependency["id"] + 2 * turn) % len(strange)]
        values = [value] * len(dependency["inputs"])
        found = called(address, f"s{dependency['id']}-{turn}", dependency["id"], values)
        text = json.dumps(found)
        assert "Traceback" not in text and "root:" not in text, (dependency, found)
        return None if found else (dependency["id"], dependency["targets"], value)

    with ThreadPoolExecutor(8) as pool:
        silent = [asked for asked in pool.map(call, config["dependencies"]) if asked]
    assert not silent and web.get(address).status_code == 200
    assert called(address, "beyond", 10**6, [])  # a handler that is none
    kept = {p for p in place.runs.parent.rglob("*") if not {".jobs", ".bin"} & {*p.parts}}
    assert kept == before  # what came to nothing is in the bin
    assert place.jobs.names() == ["shown"]


def test_a_caption_of_another_draft_cannot_be_written(server):
    address, place = server
    config = web.get(f"{address}/config").json()
    (grid,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "pictures")
    for draft, picture in (("../shown", "secret.png"), ("woodcut", "../recipe.toml"), ("woodcut", "../../../secret.png"),
                           ("/etc", "passwd"), ("", ""), (None, None), (["woodcut"], {"a": 1})):  # fmt: skip
        asked = {"session_hash": "s", "component_id": grid, "fn_name": "save", "data": [draft, picture, "written"]}
        answer = web.post(f"{address}/gradio_api/component_server", json=asked)
        assert answer.status_code != 200 or answer.json()["text"].startswith("not saved"), answer.text
    for given in ([], ["woodcut"], "text", None, {"a": 1}, ["woodcut", "00_sun.jpg", "x", "y"]):
        asked = {"session_hash": "s", "component_id": grid, "fn_name": "save", "data": given}
        web.post(f"{address}/gradio_api/component_server", json=asked)
    for name in ("__class__", "_repr_html_", "eval", "launch", "__init__", ""):
        asked = {"session_hash": "s", "component_id": grid, "fn_name": name, "data": []}
        assert web.post(f"{address}/gradio_api/component_server", json=asked).status_code != 200
    assert (place.runs.parent / "secret.png").read_text() == SECRET


def test_markup_is_text_everywhere(server, tmp_path):
    from app.history import History
    from app.pictures import Pictures
    from app.result import Result
    from app.train import ALL, Training

    place = Place(tmp_path / "runs")
    draft = place.drafts.example("woodcut")
    Pictures(place).trigger("woodcut", MARKUP, "all")
    Pictures(place).save("woodcut", "00_sun.jpg", MARKUP)
    (draft.own_images / "<b onclick=alert(1)>.png").write_bytes(b"no picture")
    draft.change(prompts=(MARKUP,), caption=MARKUP)
    run = Run.create(place.runs / "shown", draft.recipe())
    run.write_status("failed", step=1, steps=2, reason=MARKUP)
    run.log(MARKUP)
    training = Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State({}), gr.State(""), gr.Tabs(), gr.Tab())
    html = [*Pictures(place).show("woodcut"), Pictures(place).summary("woodcut"), training.plan("woodcut"),
            *training.watch("shown", {}, ALL)[1:], *History(place).show("shown", ""), *Result(place).show("shown")]  # fmt: skip
    texts = [part.get("value") if isinstance(part, dict) else part for part in html]
    pages = [
        text for text in texts if isinstance(text, str) and "<" in text and text not in (MARKUP, draft.recipe().trigger)
    ]
    assert len(pages) >= 8
    for text in pages:
        assert "<script>alert" not in text and "<img src=x" not in text and "<b onclick" not in text, text[:2000]
    assert "&lt;script&gt;alert" in " ".join(pages)


# Passwords


def test_passwords_are_asked_for_everywhere_and_guesses_are_bounded():
    locked = Guard(None, hosts=(), auth=("me", "secret"))

    def ask(path: str, given: str | bytes | None, address: str = "10.0.0.9") -> int:
        token = given if isinstance(given, bytes) else b"Basic " + base64.b64encode((given or "").encode())
        headers = [(b"authorization", token)] if given is not None else []
        refusal = locked.refuse(
            {"type": "http", "method": "GET", "path": path, "client": (address, 1), "headers": headers}
        )
        return refusal.status_code if refusal else 200

    for path in ("/", "/config", "/media/run/a/recipe.toml", "/gradio_api/upload", "/login", "/logout"):
        assert ask(path, None) == 401 and ask(path, "me:secret") == 200
    strange = [
        b"",
        b"Basic",
        b"Basic ====",
        b"Bearer x",
        b"\xff\xfe",
        b"Basic " + b"A" * 10**6,
        "me:",
        ":",
        "me:secret:",
        "ME:secret",
    ]
    for number, given in enumerate(strange):
        assert ask("/", given, f"10.1.0.{number}") == 401
    assert [ask("/", f"me:{i}") for i in range(TRIES)] == [401] * TRIES
    assert ask("/", "me:secret") == 429 and ask("/", "me:secret", "10.0.0.10") == 200
    for number in range(3 * ADDRESSES):  # from many addresses: what is remembered stays bounded
        ask("/", "me:wrong", f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(locked.wrong) <= ADDRESSES


def test_a_websocket_is_closed_and_bad_lengths_are_refused():
    import asyncio

    async def app(scope, receive, send):
        raise AssertionError("it got through")

    answers = []

    async def send(message):
        answers.append(message)

    asyncio.run(Guard(app)({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert answers == [{"type": "websocket.close", "code": 1008}]
    for length in (b"-1", b"1e9", b"", b"9" * 50):
        answers.clear()
        headers = [(b"host", b"localhost"), (b"content-length", length)]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "client": ("1", 1)}
        asyncio.run(Guard(app)(scope, None, send))
        assert answers[0]["status"] == 413


# Many at once


def crowd(address: str, clients: int, seconds: float) -> tuple[int, list[str]]:
    """So many clients that ask for everything, again and again: how many answers came, and which were none."""
    wrong, counted, end = [], [0] * clients, time.monotonic() + seconds

    def one(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end or not counted[number]:
                for path in ("/", "/config", "/media/run/shown/recipe.toml", "/media/example/tarot/00_the_fool.webp"):
                    try:
                        answer = client.get(address + path)
                        counted[number] += 1
                        if answer.status_code != 200:
                            wrong.append(f"{path}: {answer.status_code}")
                    except httpx.HTTPError as error:
                        wrong.append(f"{path}: {error!r}")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counted), wrong


def test_fifty_clients_at_once(server):
    process = psutil.Process()
    crowd(server[0], 10, 0.0)
    before = process.memory_info().rss, process.num_fds()
    answers, wrong = crowd(server[0], 50, 0.0)
    assert answers >= 200 and not wrong, wrong[:5]
    assert process.memory_info().rss - before[0] < 2**27
    time.sleep(1.0)
    assert process.num_fds() - before[1] < 80  # connections that are kept alive, and no more


@pytest.mark.slow
def test_fifty_clients_for_a_minute_while_a_run_trains(server):
    """No request fails, memory is bounded, the run makes its steps; its step time with and without is printed."""
    address, place = server
    draft = place.drafts.example("tarot")
    recipe = draft.change(steps=400, batch_size=4, directions=8, evaluate_items=8, evaluate_every=400, preview_every=0,
                          preview_steps=2, prior=0.0, prompts=["a [trigger] sun"])  # fmt: skip
    name = place.jobs.start(recipe, "tarot")
    job, run = place.jobs.job(name), place.jobs.run(name)
    process = psutil.Process()
    try:
        while not (run.journal_file.exists() and len(run.journal()) >= 4):
            assert job.alive(), job.log()
            time.sleep(0.2)
        pace = []
        for clients in (0, 50):
            steps, began = len(run.journal()), time.monotonic()
            memory = process.memory_info().rss
            if clients:
                answers, wrong = crowd(address, clients, 60)
                assert not wrong, wrong[:5]
            else:
                time.sleep(60)
            pace.append((time.monotonic() - began) / max(1, len(run.journal()) - steps))
        print(f"{answers} answers; a step took {pace[0]:.3f} s alone, {pace[1]:.3f} s with fifty clients")
        assert process.memory_info().rss - memory < 2**28 and job.alive()
    finally:
        if there := job.process():
            there.kill()


@pytest.mark.slow
@pytest.mark.skipif("QZO_SOAK" not in os.environ, reason="set QZO_SOAK to the seconds that it may take")
def test_a_long_look_leaks_nothing(server):
    """Memory and open files of the page stay flat however long it is asked; seconds from QZO_SOAK."""
    process, figures = psutil.Process(), []
    rounds = 6
    for _ in range(rounds):
        _, wrong = crowd(server[0], 4, float(os.environ["QZO_SOAK"]) / rounds)
        assert not wrong
        figures.append((process.memory_info().rss, process.num_fds()))
    print(figures)
    assert figures[-1][0] - figures[1][0] < 2**26 and figures[-1][1] - figures[1][1] < 20

"""The page: what it keeps on disk, what it starts and finds again, who may ask, and what it says of bad input."""

import asyncio
import base64
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")

from app import figures, form  # noqa: E402
from app.chat import Chat  # noqa: E402
from app.data import Data  # noqa: E402
from app.drafts import TEXTS  # noqa: E402
from app.estimate import Estimate, estimate  # noqa: E402
from app.guard import TRIES, Guard  # noqa: E402
from app.history import History  # noqa: E402
from app.jobs import JobError, Jobs, Standing  # noqa: E402
from app.model import Models  # noqa: E402
from app.page import build, serve  # noqa: E402
from app.pictures import Pictures, summary  # noqa: E402
from app.place import Place  # noqa: E402
from app.plainly import plainly  # noqa: E402
from app.reading import Reading, read  # noqa: E402
from app.result import Result  # noqa: E402
from app.series import POINTS, Series, drawn  # noqa: E402
from app.texts import Texts, given  # noqa: E402
from app.train import ADVANCED, ALL, ELSEWHERE, OF_PICTURES, OF_TEXTS, PARTS, Training, pictured  # noqa: E402
from app.worker import WAITING, taken  # noqa: E402
from zo_engine import chat as chats  # noqa: E402
from zo_engine import recipe as recipes  # noqa: E402
from zo_engine.hub import sides  # noqa: E402
from zo_engine.journal import Move, Step  # noqa: E402
from zo_engine.recipe import HEADINGS, Recipe  # noqa: E402
from zo_engine.run import Run, write_atomic  # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent
web = httpx.Client(timeout=60)  # the machine may be busy


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path / "runs")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, place) of a page that is open."""
    runs = tmp_path_factory.mktemp("server") / "runs"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, address = serve(runs, port=port, wait=False)
    yield address.rstrip("/"), Place(runs)
    page.close()


def picture(color: str = "red", size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def sentence(call, *values) -> str:
    """What the page shows when a handler refuses."""
    with pytest.raises(gr.Error) as caught:
        plainly(call)(*values)
    assert "\n" not in caught.value.message and "Traceback" not in caught.value.message
    return caught.value.message


def until(condition, job) -> None:
    """Wait for a process to get somewhere; it must not end before."""
    while not condition():
        assert job.alive() or condition(), job.log()
        time.sleep(0.05)


# Building and serving


def test_the_page_is_built_without_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from app.page import build; build(Path(sys.argv[1]))\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_page_that_looks_on_keeps_nothing_of_what_it_saw(place):
    """Gradio gives a component that changes another number, and may keep it beside the one before."""
    from gradio.state_holder import SessionState

    run = Run.create(place.runs / "shown", place.drafts.example("woodcut").recipe())
    page = build(place.runs)
    ticks = [f for f in page.fns.values() if any(event == "tick" for _, event in f.targets)]
    watch = next(f for f in ticks if len(f.inputs) == 3)
    state = SessionState(page)
    state[watch.inputs[0]._id] = "shown"
    sent, kept = [], []
    for step in range(1, 7):
        run.write_status("running", step=step, steps=9)
        found = asyncio.run(page.process_api(watch, [None] * 3, state=state))
        sent.append(sum("value" in part for part in found["data"] if part))
        kept.append(len(state.blocks_config.blocks))
    assert min(sent) >= 1  # the card, at least, is another each time
    assert kept[1:] == [kept[1]] * 5


def test_the_worker_that_waits_is_light():
    code = "import sys; import app.worker; print(sorted({'gradio', 'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_nothing_is_loaded_from_elsewhere(server):
    address, _ = server
    for page in ("/", "/config", "/theme.css"):
        answer = web.get(address + page)
        assert answer.status_code == 200
        loaded = re.findall(r"""(?:src=|href=|url\(|@import\s)\s*["']?(https?://[^"'\s)>]+)""", answer.text)
        assert [url for url in loaded if not url.startswith(address)] == []
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_no_handler_is_a_public_endpoint(server):
    address, _ = server
    found = web.get(f"{address}/gradio_api/info").json()
    assert found["named_endpoints"] == {} and found["unnamed_endpoints"] == {}


@pytest.mark.parametrize(
    "headers, method, code",
    [
        ({"host": "evil.example"}, "GET", 400),
        ({"origin": "https://evil.example"}, "POST", 403),
        ({"sec-fetch-site": "cross-site"}, "POST", 403),
        ({}, "GET", 200),
    ],
)
def test_other_sites_are_refused(server, headers, method, code):
    assert web.request(method, server[0] + "/", headers=headers).status_code == code


def test_a_password_is_asked_for_and_cannot_be_guessed_for_ever():
    guard = Guard(None, hosts=(), auth=("me", "secret"))

    def ask(given: str | None) -> int:
        token = [(b"authorization", b"Basic " + base64.b64encode(given.encode()))] if given else []
        refusal = guard.refuse({"type": "http", "method": "GET", "client": ("10.0.0.9", 1), "headers": token})
        return refusal.status_code if refusal else 200

    assert ask(None) == 401 and ask("me:secret") == 200
    assert {ask(f"me:{i}") for i in range(TRIES)} == {401}
    assert ask("me:secret") == 429


def test_only_media_can_be_read(server):
    address, place = server
    draft = place.drafts.example("woodcut")
    thumb = next(iter(draft.contents().thumbs.values()))
    run = Run.create(place.runs / "shown", Recipe())
    Image.new("RGB", (8, 8)).save(run.path / "secret.png")
    (run.previews / "000000").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(run.previews / "000000" / "00.png")
    (run.previews / "000000" / "01.png").symlink_to(CHECKOUT / "assets" / "styles.png")

    def code(path: str) -> int:
        return web.get(f"{address}/{path}").status_code

    assert code(f"media/draft/woodcut/{thumb}") == 200
    assert code("media/run/shown/previews/000000/00.png") == 200 and code("media/run/shown/recipe.toml") == 200
    for path in ("run/shown/secret.png", "run/shown/previews/000000/01.png", "run/shown/%2e%2e/shown/recipe.toml",
                 "run/%2e%2e/recipe.toml", "run/.drafts/recipe.toml", "draft/woodcut/..%2frecipe.toml",
                 "draft/woodcut/recipe.toml", "run/shown/status.json", ""):  # fmt: skip
        assert code(f"media/{path}") == 404, path
    assert code("media/example/tarot/00_the_fool.webp") == 200
    for path in ("tarot/nobody.webp", "tarot/%2e%2e%2frecipe.toml", "..%2ftarot/00_the_fool.webp", "tarot"):
        assert code(f"media/example/{path}") == 404, path
    assert code(f"gradio_api/file={run.path / 'secret.png'}") == 403


def test_a_file_that_is_replaced_while_it_is_asked_for_arrives_whole(server):
    """A plot is drawn again with every step; an answer with the old one's length is one that a browser throws away."""
    address, place = server
    run = Run.create(place.runs / "drawn", Recipe())
    (run.path / "plots").mkdir()
    versions = [bytes([65 + i]) * (50_000 * i + 1) for i in range(4)]
    write_atomic(run.path / "plots" / "loss.png", versions[0])
    over = threading.Event()

    def draw_again() -> None:
        while not over.is_set():
            for version in versions:
                write_atomic(run.path / "plots" / "loss.png", version)

    writer = threading.Thread(target=draw_again)
    writer.start()
    try:
        answers = [web.get(f"{address}/media/run/drawn/plots/loss.png") for _ in range(300)]
    finally:
        over.set()
        writer.join()
    assert {answer.headers["content-type"] for answer in answers} == {"image/png"}
    assert {answer.content for answer in answers} <= set(versions) and len({a.content for a in answers}) > 1


# Pictures and captions


def test_a_caption_is_saved_over_the_wire_to_the_file_of_its_picture(server):
    address, place = server
    place.drafts.example("tarot")
    config = web.get(f"{address}/config").json()
    (grid,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "pictures")
    given = ["tarot", "03_the_empress.jpg", "a ${crown} <b>of</b> {{gold}}"]
    asked = {"session_hash": "s", "component_id": grid, "fn_name": "save", "data": given}
    answer = web.post(f"{address}/gradio_api/component_server", json=asked)
    assert answer.json()["text"] == "trained as: tarot, a ${crown} <b>of</b> {{gold}}"
    folder = place.drafts.root / "tarot" / "images"
    assert (folder / "03_the_empress.txt").read_text() == given[2]
    assert "&lt;b&gt;of" in Pictures(place).show("tarot")[-1] and "<b>of" not in Pictures(place).show("tarot")[-1]


def test_captions_stay_with_their_pictures_when_the_order_changes(place):
    draft = place.drafts.example("tarot")
    before = {f.name: f.read_text() for f in draft.own_images.glob("*.txt")}
    shown = list(draft.contents().pictures)
    first = draft.own_images / "!first.png"
    first.write_bytes(picture())
    draft.remove("05_the_hierophant.jpg")
    assert list(draft.contents().pictures) != shown and next(iter(draft.contents().pictures)) == "!first.png"
    Pictures(place).save("tarot", "21_the_world.jpg", "the whole world")
    Pictures(place).save("tarot", "!first.png", "a red square")
    after = {f.name: f.read_text() for f in draft.own_images.glob("*.txt")}
    assert after.pop("!first.txt") == "a red square" and after.pop("21_the_world.txt") == "the whole world"
    assert after == {k: v for k, v in before.items() if k not in ("05_the_hierophant.txt", "21_the_world.txt")}
    assert (draft.path / "removed" / "05_the_hierophant.txt").read_text() == before["05_the_hierophant.txt"]


def test_the_form_writes_to_where_the_caption_was_read_from(place, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "a.caption").write_text("old")
    (folder / "b.png").write_bytes(picture("blue"))
    name = Data(place).source(str(folder))
    Pictures(place).save(name, "a.png", "new")
    assert (folder / "a.caption").read_text() == "new" and not (folder / "a.txt").exists()
    assert "1 of 2 captioned" in Pictures(place).summary(name)
    assert "b.png" in Pictures(place).show(name, "bare")[-1] and "a.png" not in Pictures(place).show(name, "bare")[-1]


def test_a_draft_survives_a_new_server(place):
    Pictures(place).trigger(place.drafts.example("woodcut").name, "lino", "all")
    place.drafts.open("woodcut").change(steps=100)
    Pictures(place).save("woodcut", "00_sun.jpg", "a round [trigger] sun")
    again = Place(place.runs)
    recipe = again.drafts.open(again.drafts.names()[0]).recipe()
    assert (recipe.trigger, recipe.steps) == ("lino", 100)
    assert "a round [trigger] sun" in Pictures(again).show("woodcut")[-1]
    assert again.drafts.example("woodcut").recipe() == recipe  # the example button takes it up as it was left


def test_a_zip_with_folders_repeats_and_rubbish(place, tmp_path):
    archive = tmp_path / "My Cards.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("cards/sun.png", picture("yellow"))
        file.writestr("cards/sun.txt", "a sun")
        file.writestr("cards/10_moon/moon.png", picture("grey"))
        file.writestr("../../evil.png", picture("black"))
        file.writestr("cards/readme.md", "no picture")
        file.writestr("__MACOSX/cards/._sun.png", b"")
        file.writestr("cards/broken.png", picture()[:40])
    name, _ = Data(place).upload([str(archive)])
    draft = place.drafts.open(name)
    contents = draft.contents()
    assert name == "my-cards" and sorted(contents.pictures) == ["10_moon/moon.png", "evil.png", "sun.png"]
    assert contents.pictures["10_moon/moon.png"].repeats == 10 and contents.captioned == 2
    assert "1 of 4 files cannot be used" in summary(draft, contents) and "broken.png" in summary(draft, contents)
    assert not (tmp_path / "evil.png").exists() and not (place.runs / "evil.png").exists()
    assert "1 of 4 pictures cannot be used" in Training(place).obstacle(name)
    assert Pictures(place).show(name)[3].visible and draft.leave_out() == 1
    assert (draft.path / "removed" / "broken.png").exists() and not Pictures(place).show(name)[3].visible
    assert Training(place).obstacle(name) == "" and len(draft.contents().pictures) == 3


def test_another_picture_of_the_same_name_does_not_replace_the_first(place, tmp_path):
    sides = []
    for side, color in (("a", "red"), ("b", "blue")):
        (tmp_path / side).mkdir()
        (tmp_path / side / "sun.png").write_bytes(picture(color))
        (tmp_path / side / "sun.txt").write_text(color)
        sides.append([tmp_path / side / "sun.png", tmp_path / side / "sun.txt"])
    draft = place.drafts.create("suns")
    for files in (*sides, sides[0]):
        draft.add(files)
    assert {n: p.caption for n, p in draft.contents().pictures.items()} == {"sun.png": "red", "sun-2.png": "blue"}


def test_pictures_that_look_the_same_are_named(place):
    draft = place.drafts.example("tarot")
    assert draft.contents().twins == []
    with Image.open(draft.own_images / "00_the_fool.jpg") as fool:
        fool.resize((240, 360)).save(draft.own_images / "fool_again.png")
    assert draft.contents().twins == [("00_the_fool.jpg", "fool_again.png")]


def test_all_captions_at_once(place):
    draft = place.drafts.example("woodcut")
    assert draft.prefix("old print") == 20 and draft.prefix("old print") == 0
    assert draft.replace("old print", "print") == 20
    assert {p.caption.split(",")[0] for p in draft.contents().pictures.values()} == {"print"}


# Texts


def said(place, name: str, whole: bool = True) -> Reading:
    """What the process of a draft's texts has said when it has ended."""
    draft = place.drafts.open(name)
    read(place.jobs, draft)
    job = place.jobs.job(name, "texts")
    while job.alive():
        time.sleep(0.05)
    found = read(place.jobs, draft)
    assert not found.busy and (not whole or "lengths" in found.facts), job.log()
    return found


def test_the_bundled_texts_become_drafts(place):
    for name, file in TEXTS.items():
        draft = place.drafts.example(name)
        assert draft.of_texts and draft.recipe().texts == str(draft.own_texts / file.name)
        assert (draft.own_texts / file.name).read_bytes() == file.read_bytes()
    draft.change(steps=7)
    assert place.drafts.example(name).recipe().steps == 7  # taken up as it was left
    assert f'data-example="{name}"' in figures.examples()


def test_what_is_brought_is_told_apart(place, tmp_path):
    page = Data(place)
    words, empty, card = tmp_path / "my chats.csv", tmp_path / "empty.jsonl", tmp_path / "card.png"
    words.write_text("question,answer\nWho?,I\n")
    empty.write_bytes(b"")
    card.write_bytes(picture())
    (tmp_path / "card.txt").write_text("a card")
    name, _ = page.upload([str(words)])
    assert name == "my-chats" and place.drafts.open(name).recipe().texts.endswith("my-chats/texts/my chats.csv")
    assert not place.drafts.open(page.upload([str(card), str(tmp_path / "card.txt")])[0]).of_texts
    assert place.drafts.open(page.source(str(words))).recipe().texts == str(words)
    assert place.drafts.open(page.source("nobody/no-such-set")).recipe().texts == "nobody/no-such-set"
    before = place.drafts.names()
    assert "2 files of texts and no picture" in sentence(page.upload, [str(words), str(empty)])
    assert "is empty (0 bytes)" in sentence(page.upload, [str(empty)])
    assert "is empty (0 bytes)" in sentence(page.source, str(empty))
    assert place.drafts.names() == before


def test_texts_are_read_by_a_process_and_shown_as_the_model_reads_them(place, language_folder, tmp_path):
    file = tmp_path / "remarks.jsonl"
    rows = [{"prompt": f"<i>{i}</i>", "completion": "{{fine}}" + "!" * (9 * (i == 5))} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "and?"}\nnot json\n')
    name = Data(place).source(str(file))
    draft = place.drafts.open(name)
    draft.change(model=str(language_folder), length=40)
    found = said(place, name)
    assert found.facts["form"] == "prompt" and (found.facts["rows"], found.facts["examples"], found.bad) == (8, 6, 2)
    assert [line for line, _ in found.problems] == [7, 8]
    assert "has no 'completion'" in found.problems[0][1] and "is not valid JSON" in found.problems[1][1]
    assert [text for text, learnt in found.facts["shown"][0] if learnt] == ["{{fine}}<|im_end|>"]
    lengths = found.facts["lengths"]
    assert lengths["longest"] <= found.facts["limit"] == 40 and found.facts["cut"] == 1

    page = Texts(place)
    with gr.Blocks():
        page.dials()
        page.build(gr.State(""), gr.State(""))
    shown = dict(zip(page.view, page.show(name), strict=True))
    html = next(v for c, v in shown.items() if getattr(c, "elem_id", "") == "rendered")
    assert "<mark>{{fine}}&lt;|im_end|&gt;</mark>" in html and "&lt;i&gt;0" in html and "<i>" not in html
    assert "6 of 8 rows" in next(v for c, v in shown.items() if getattr(c, "elem_id", "") == "texts")
    assert "2 rows cannot be used" in Training(place).obstacle(name)
    assert "2 rows cannot be used" in sentence(Training(place).start, name)
    page.change("skip_bad", name, True)
    assert draft.recipe().skip_bad and Training(place).obstacle(name) == ""
    assert "6, of which" in Training(place).plan(name)

    again = place.jobs.job(name, "texts").record()
    draft.change(steps=9)
    assert read(place.jobs, draft) == found and place.jobs.job(name, "texts").record() == again  # nothing to ask anew
    page.change("completions_only", name, False)  # another question: another process
    assert place.jobs.job(name, "texts").record() != again
    place.jobs.job(name, "texts").process().kill()


def test_a_recognised_column_can_be_left_out(place, tmp_path):
    file = tmp_path / "quiz.jsonl"
    rows = [{"prompt": f"{i} + 1?", "completion": str(i + 1), "choices": [str(i + 1), "?"]} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = Data(place).source(str(file))
    page, draft = Texts(place), place.drafts.open(name)
    draft.change(model=str(tmp_path / "no-model"))  # the rows are what this is about
    assert said(place, name, whole=False).facts["mapping"]["choices"] == "choices"
    page.column(2, name, "")
    found = said(place, name, whole=False)
    assert draft.recipe().text_columns == ("form=prompt", "choices=")
    assert "choices" not in found.facts["mapping"] and not found.facts["choices"] and found.facts["examples"] == 4
    assert page.columns(draft, found, "prompt")[2].value == ""
    page.column(2, name, "choices")
    assert said(place, name, whole=False).facts["choices"]


def test_columns_that_fit_no_form_are_chosen_by_hand(place, tmp_path):
    file = tmp_path / "odd.csv"
    file.write_text("anfrage,antwort\nWer?,Ich\nWas?,Nichts\n")
    name = Data(place).source(str(file))
    page, draft = Texts(place), place.drafts.open(name)
    draft.change(model=str(tmp_path / "no-model"))  # the rows are what this is about
    found = said(place, name, whole=False)
    assert found.facts["columns"] == ["anfrage", "antwort"] and "fit no form" in found.complaint
    with gr.Blocks():
        page.dials()
        page.build(gr.State(""), gr.State(""))
    page.form(name, "prompt")
    assert "which fit no form; possible are prompt + completion" in said(place, name, whole=False).complaint
    page.column(0, name, "anfrage")
    page.column(1, name, "antwort")
    assert given(draft) == {"form": "prompt", "prompt": "anfrage", "completion": "antwort"}
    found = said(place, name, whole=False)
    assert found.facts["form"] == "prompt" and found.facts["examples"] == 2 and "no model" in found.complaint
    page.column(2, name, "")  # "choices" stays unused
    assert given(draft)["choices"] == ""
    assert "choose the form" in sentence(page.column, 9, name, "antwort")


# Settings


def test_the_form_covers_every_setting_with_its_own_words(place):
    training = Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    assert set(training.fields) | set(ELSEWHERE) == set(form.FIELDS)
    for name, part in training.fields.items():
        assert part.label == ("Preview prompts" if name == "prompts" else form.label(name))
        assert name == "steps" or form.FIELDS[name].metadata["help"][1:] in part.info
        assert form.given(name, form.shown(name, form.FIELDS[name].default)) == form.FIELDS[name].default


def test_a_setting_is_saved_by_name_and_an_impossible_one_is_not(place):
    place.drafts.example("tarot")
    training = Training(place)
    assert training.change("eps", "tarot", {}, 0.02)[-1] == gr.skip()  # the field holds it already
    said = sentence(partial(training.change, "depth"), "tarot", {}, 7)
    assert said == "depth = 7.0 is outside of 0.02 to 1"
    recipe = place.drafts.open("tarot").recipe()
    assert recipe.eps == 0.02 and recipe.depth == Recipe().depth
    assert training.change("prompts", "tarot", {}, "a sun\n\n a moon ")[-1] == "a sun\na moon"


def test_a_field_that_is_as_it_was_filled_is_left_alone(place):
    draft, training = place.drafts.example("tarot"), Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    names = list(training.fields)
    filled, *first = training.show("tarot", {})
    assert filled["steps"] == draft.recipe().steps and gr.skip() not in first[-len(names) :]
    assert training.show("tarot", filled)[-len(names) :] == [gr.skip()] * len(names)
    draft.change(steps=80, preview_every=20)
    filled, *after = training.show("tarot", filled)
    sent = {n: v for n, v in zip(names, after[-len(names) :], strict=True) if v != gr.skip()}
    assert {n: v["value"] for n, v in sent.items()} == {"steps": 80, "preview_every": 20}
    plan = training.change("budget", "tarot", filled, "quick")[1]
    assert draft.recipe().steps == 80 and "27 steps of" in plan  # what the dial asks for is reckoned at the start
    other = dict(zip(names, training.show(place.drafts.example("voice").name, filled)[-len(names) :], strict=True))
    assert {n for n, v in other.items() if not v["visible"]} == set(OF_PICTURES)  # another kind: everything is sent
    assert all(other[n]["visible"] for n in (*OF_TEXTS, "steps", "prompts"))


def test_bad_input_is_one_sentence(place, tmp_path):
    page, training, result = Data(place), Training(place), Result(place)
    damaged = tmp_path / "cards.zip"
    damaged.write_bytes(b"PK\x03\x04 no more than this")
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"%PDF")
    assert "there is no folder of pictures at" in sentence(page.source, str(tmp_path / "nowhere"))
    assert "cards.zip is not a whole ZIP file" in sentence(page.upload, [str(damaged)])
    assert "letter.pdf is neither a picture" in sentence(page.upload, [str(letter)])
    assert place.drafts.names() == []  # nothing is left of what failed
    assert "there is no draft '../etc'" in sentence(training.start, "../etc")
    assert "there is no run '../etc'" in sentence(result.draw, "../etc", "", 1, 1)
    assert "there is no run" in sentence(History(place).away, "nothing", "", "")
    draft = place.drafts.example("tarot")
    (draft.own_images / "bad.png").write_bytes(b"")
    assert sentence(training.start, "tarot") == "1 of 23 pictures cannot be used: bad.png is empty (0 bytes)"
    assert place.jobs.names() == []


def test_a_recipe_is_loaded_for_the_pictures_that_are_here(place, tmp_path):
    file = tmp_path / "theirs.toml"
    file.write_text('images = "/elsewhere"\ntrigger = "gold"\nsteps = 77\nprompts = ["a [trigger] cup"]\n')
    training = Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    assert "there are no pictures or texts yet" in sentence(training.load, "", {}, str(file))
    draft = place.drafts.example("woodcut")
    training.load("woodcut", {}, str(file))
    assert (draft.recipe().steps, draft.recipe().trigger) == (77, "gold")
    assert draft.recipe().images == str(draft.own_images)
    file.write_text("stepps = 3\n")
    assert "did you mean steps" in sentence(training.load, "woodcut", {}, str(file))
    assert draft.recipe().steps == 77


def test_other_settings_stand_under_headings():
    parts = recipes.parts(ADVANCED)
    assert tuple(name for names in parts.values() for name in names) == ADVANCED  # each once, in the recipe's order
    assert set(HEADINGS) < set(form.FIELDS) and list(parts) == list(HEADINGS.values())
    assert parts["The machine"][0] == "seed" and "optimizer" in parts["What a step does"]


def test_what_a_recipe_that_streams_needs_is_planned_before_the_start(place, tiny_folder):
    training, draft = Training(place), place.drafts.example("tarot")
    draft.change(model=str(tiny_folder), resolution="32x32", batch_size=2, directions=2, offload="disk")
    job = place.jobs.job("tarot", "plan")
    assert "being planned" in training.plan("tarot") and training.unknown("tarot")
    assert training.planned("tarot") == [gr.skip()] * 4  # nothing is known that was not
    while job.alive():
        time.sleep(0.05)
    known, record = json.loads(job.log()[-1]), job.record()
    text = training.planned("tarot")[0]
    assert f"{figures.size(known['device'])} at the peak of a step, by its plan" in text
    blocks = known["blocks"]
    assert f"{blocks} of {blocks} stream from the disk, where {figures.size(known['disk'])} lie" in text
    draft.change(seed=12)  # no question of the plan
    assert "by its plan" in training.plan("tarot") and job.record() == record
    job.log_file.write_text("qzo: 0.01 GB are not enough; lower batch_size\n")
    assert "0.01 GB are not enough; lower batch_size." in training.plan("tarot")
    draft.change(offload="auto")
    assert training.streamed(draft) is None and "by its plan" not in training.plan("tarot")


def test_what_needs_most_memory_is_named(place):
    draft = place.drafts.example("tarot")
    draft.change(model="sd3.5-large", resolution="512")
    text = Training(place).plan("tarot")
    assert "most of it while the captions are encoded" in text and "first a download of 28.0 GB" in text
    card = Models(place).cards("sd3.5-large", "image")
    assert "28.0 GB to fetch" in card and "24.3 GB at most" in card and "here already" in card
    assert "not measured here yet" in card
    run = Run.create(place.runs / "swift", draft.recipe())
    run.write_status("done", step=36, steps=36, seconds_per_step=60.0)
    assert "36 min for 36 steps, as Swift went" in Models(place).cards("sd3.5-large", "image")


def test_a_text_to_be_copied_is_text_and_can_be_saved():
    html = figures.listing("Recipe", 'prompts = ["<b>&"]\n', "recipe.toml")
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html and "data-copy" in html
    assert 'download="recipe.toml" href="data:text/plain;charset=utf-8,prompts%20%3D%20%5B%22%3Cb%3E%26' in html


def test_a_download_says_how_fast_and_where_to():
    html = figures.download(2 * 10**9, 12 * 10**9, 50e6, "/models/<hub>")
    assert "2.0 GB</b> of 12.0 GB" in html and "50 MB a second, 3 min left" in html and "/models/&lt;hub&gt;" in html
    assert "second" not in figures.download(1, 12 * 10**9)


def test_what_is_short_is_said_before_the_start():
    enough = Estimate(60, 1e9, 1e6, 0, "", False, free_memory=2e9, free_disk=1e9)
    assert enough.problems() == []
    short = dataclasses.replace(enough, memory=3e9, disk=2e9).problems()
    assert short[0].startswith("About 3.0 GB of memory may be needed, and 2.0 GB are free") and len(short) == 2


# Models


def test_a_folder_is_checked_when_it_is_chosen(place, tiny_folder, tmp_path):
    draft, models = place.drafts.example("tarot"), Models(place)
    assert "is not a diffusers pipeline" in sentence(models.other, "tarot", str(tmp_path))
    assert "there is no folder '/nowhere/at/all'" in sentence(models.other, "tarot", "/nowhere/at/all")
    assert draft.recipe().model == "tiny-sd3"
    _, choice, other, cards, _, fetch, *_ = models.other("tarot", str(tiny_folder))
    assert (choice.value, other, draft.recipe().model) == (None, str(tiny_folder), str(tiny_folder))
    assert "A whole Stable Diffusion 3 pipeline" in cards and fetch.visible is False
    multiple, most = sides(tiny_folder)
    assert all(side % multiple == 0 and side <= most for size in draft.buckets() for side in size)


def test_a_model_of_the_other_kind_is_not_offered_and_refused(place, language_folder):
    models, pictures, words = Models(place), place.drafts.example("tarot"), place.drafts.example("voice")
    offered = {n: [name for _, name in models.show(n)[1].choices] for n in ("tarot", "voice", "")}
    assert "sd3.5-large" in offered["tarot"] and "qwen3-8b" in offered["voice"]
    assert not set(offered["tarot"]) & set(offered["voice"])
    assert sorted(offered[""]) == sorted(offered["tarot"] + offered["voice"])
    assert "writes texts, and this draft has pictures" in sentence(models.choose, "tarot", "tiny-llm")
    assert "writes texts, and this draft has pictures" in sentence(models.other, "tarot", str(language_folder))
    assert "draws pictures, and this draft has texts" in sentence(models.choose, "voice", "tiny-sd3")
    cards = models.other("voice", str(language_folder))[3]
    assert "A whole language model (LlamaForCausalLM)" in cards and words.recipe().model == str(language_folder)
    assert pictures.recipe().model == "tiny-sd3"


def test_a_download_without_a_network_ends_in_a_sentence(place, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    place.drafts.example("tarot").change(model="nobody/no-such-model")
    models, job = Models(place), Models(place).job("nobody/no-such-model")
    assert models.show("tarot")[5].visible
    models.fetch("tarot")
    while job.alive():
        time.sleep(0.05)
    fetch, pause, said = models.fetched("nobody/no-such-model")
    assert fetch.visible and not pause.visible
    assert "the hub cannot be reached" in said and "what has arrived is kept" in said and "Traceback" not in said


def test_a_defect_is_not_dressed_up_as_a_sentence():
    with pytest.raises(ValueError, match="invalid literal"):
        plainly(lambda: int("no number"))()


# Runs


def test_a_run_is_found_again_stopped_killed_and_resumed(place, tiny_folder):
    """One real run on the tarot cards, with a tiny random model: everything that can happen to a process."""
    draft = place.drafts.example("tarot")
    draft.change(model=str(tiny_folder), resolution="32x32", steps=5000, batch_size=2, evaluate_items=8, prior=0.0,
                 evaluate_every=4000, preview_every=0, preview_steps=1, prompts=["a [trigger] <b>"])  # fmt: skip
    name = Training(place).start("tarot")
    other = Jobs(place.runs)  # a second server
    job = other.job(name)
    try:
        assert other.names() == [name] and other.look(name).live and other.live() == [name]
        with pytest.raises(JobError, match="is running already"):
            job.start("resume", str(place.runs / name))

        second = Training(place).start("tarot")  # waits for the device, in a process of its own
        until(lambda: other.look(second).state == "waiting", other.job(second))
        other.stop(second)
        until(lambda: not other.look(second).live, job)
        assert other.look(second).state == "stopped" and "start it again" in other.look(second).why_not_resume

        until(lambda: other.look(name).state == "running" and other.look(name).status["step"] > 0, job)
        seen, *parts = Training(Place(place.runs)).watch(name, {}, ALL)
        shown = dict(zip(PARTS, parts, strict=True))
        assert "training" in shown["card"]["value"] and "a tarot &lt;b&gt;" in shown["previews"]["value"]
        assert all(part == gr.skip() for part in Training(place)._fresh(seen, dict.fromkeys(seen, gr.skip()), seen)[1:])
        with pytest.raises(JobError, match="still running; stop it first"):
            other.bin(name)

        with pytest.raises(JobError, match="at work"):
            other.rename(name, "another")
        at = other.look(name).status["step"]
        other.ask(name, "preview")
        other.ask(name, "save")
        until(lambda: len(pictured(other.run(name))) == 2 and other.run(name).style_file.exists(), job)
        assert pictured(other.run(name))[1] >= at and other.run(name).asked() == set()
        picked = Training(place).pick(name, {}, ALL, SimpleNamespace(step=at))
        assert 'class="shots pair"' in dict(zip(PARTS, picked[1:], strict=True))["previews"]["value"]
        until(lambda: other.look(name).state == "running" and "one_step" in other.look(name).status, job)

        job.process().suspend()
        until(lambda: other.look(name).state == "silent", job)
        assert other.look(name).live and "has not answered" in other.look(name).message
        job.process().resume()
        until(lambda: other.look(name).state == "running", job)

        Training(place).stop(name, {}, ALL)
        until(lambda: other.look(name).state == "stopped", job)
        while job.alive():
            time.sleep(0.05)
        step = other.look(name).status["step"]
        assert other.run(name).style_file.exists() and len(other.run(name).journal()) == step
        assert [n for _, n in Result(place).show(name)[0].choices] == [name]

        other.resume(name)
        until(lambda: other.look(name).state == "running" and other.look(name).status["step"] > step, job)
        os.kill(job.record()["pid"], signal.SIGKILL)
        while job.alive():
            time.sleep(0.05)
        standing = other.look(name)
        assert standing.state == "interrupted" and not standing.why_not_resume
        assert len(other.run(name).journal()) > step

        done = standing.status["step"]
        needs, same = (
            estimate(dataclasses.replace(draft.recipe(), steps=steps), 32 * 32, other, {}) for steps in (5000, done)
        )
        took = done * standing.status["seconds_per_step"]
        assert needs.exact and same.seconds == pytest.approx(took)
        assert needs.seconds >= 5000 / done * took  # later steps have more directions
        assert needs.memory == standing.status["memory"] and needs.disk > 0 and needs.download == 0
        assert not estimate(draft.change(batch_size=4), 32 * 32, other, {}).exact
        assert estimate(draft.change(depth=1), 32 * 32, other, {}).seconds is None

        assert History(place).rename(name, "The <b> one", name, "")[-2] == "the-b-one"
        assert other.look("the-b-one").state == "interrupted" and name not in other.names()
        draft.change(eps=0.05)
        assert History(place).again("the-b-one")[0] == "tarot" and draft.recipe().eps == 0.01
        caption = min(Path(draft.recipe().images).glob("*.txt"))
        caption.write_text(caption.read_text() + " at night")
        other.resume("the-b-one")
        while other.job("the-b-one").alive():
            time.sleep(0.05)
        assert other.look("the-b-one").changed, other.look("the-b-one")
        assert "another caption" in other.look("the-b-one").message
        other.resume("the-b-one")  # the button says now what it means
        until(lambda: other.look("the-b-one").state == "running", other.job("the-b-one"))
        assert Training(place).discard("the-b-one")[0] != "the-b-one"
        assert "the-b-one" not in other.names() and (place.runs / ".bin" / "the-b-one").is_dir()
        assert not other.job("the-b-one").alive()
    finally:
        for left in other.names():
            if process := other.job(left).process():
                process.kill()


@pytest.mark.skipif(os.name != "posix", reason="locks are inherited on POSIX alone")
def test_who_starts_first_has_the_device_first(place):
    """From the moment of the start on, not once its process has begun: a message to a chat cannot be faster."""
    first, second = (place.jobs.job(name) for name in ("first", "second"))
    try:
        first.start("doctor")
        assert taken(place.runs / ".jobs" / "device.lock") is None
        second.start("doctor")
        until(lambda: second.log() == [WAITING], second)
        first.process().kill()
        until(lambda: second.log()[-1] == "starting", second)
    finally:
        for job in (first, second):
            if process := job.process():
                process.kill()
    while second.alive():
        time.sleep(0.05)
    held = taken(place.runs / ".jobs" / "device.lock")  # free again, however they ended
    assert held is not None
    os.close(held)


def test_a_start_that_fails_says_why(place, tmp_path):
    name, job = "lost", place.jobs.job("lost")
    (place.runs / name).mkdir(parents=True)
    job.start("train", str(tmp_path / "gone.toml"), "--out", str(place.runs / name))
    while job.alive():
        time.sleep(0.05)
    standing = place.jobs.look(name)
    assert standing.state == "failed" and standing.message == f"there is no recipe at {tmp_path / 'gone.toml'}"
    assert "start it again" in sentence(Training(place).resume, name, {}, ALL)
    History(place).away(name, name, "")
    assert place.jobs.names() == [] and (place.runs / ".bin" / name).is_dir()


def test_a_name_that_is_no_run_moves_nothing(place, tmp_path):
    (tmp_path / "letters").mkdir()
    place.runs.mkdir()
    for call in (place.jobs.bin, place.jobs.stop, place.jobs.resume, place.drafts.bin):
        with pytest.raises(ValueError, match="there is no (run|draft)"):
            call("../letters")
    assert (tmp_path / "letters").is_dir()


def test_a_foreign_process_of_the_same_number_is_not_the_run(place):
    """Ids are given again after a restart: this one belongs to the test itself."""
    run = Run.create(place.runs / "old", Recipe())
    run.write_status("running", step=3)
    status = run.status() | {"time": "2001-01-01T00:00:00+00:00", "started": 978307200.0, "after_boot": 1.0}
    (run.path / "status.json").write_text(json.dumps(status))
    job = place.jobs.job("old")
    job.file.parent.mkdir(parents=True)
    job.file.write_text(json.dumps({"pid": os.getpid(), "started": 978307200.0, "words": []}))
    assert not job.alive() and place.jobs.look("old").state == "interrupted"


def test_twenty_thousand_steps_are_thinned_and_read_once(place):
    run = Run.create(place.runs / "long", Recipe())
    lines = [Step(i, (0.1, -0.2), 1.0, 0.01, 1 / (1 + i)).to_json() for i in range(20_000)]
    run.journal_file.write_text("\n".join(lines) + '\n{"step": 20000, "lo')
    raw, smooth = Series.of(run).training()
    assert len(raw.x) <= POINTS and len(raw.x) == len(smooth.y) and raw.y[0] > raw.y[-1]
    with open(run.journal_file, "a") as file:
        file.write('ss": 0.5, "clip": 1.0, "step_size": 0.1, "slopes": [0.1]}\n')
    assert Series.of(run).journal[-1]["loss"] == 0.5 and len(Series.of(run).journal) == 20_001
    assert drawn(POINTS - 1) < drawn(POINTS) and drawn(20_000) == drawn(20_010)  # a curve is drawn anew for a point
    run.trim(10)  # a resumed run cuts its journal
    assert len(Series.of(run).journal) == 10


def test_few_long_steps_are_told_as_they_go(place):
    """Within a step, at a stop, and what every step did."""
    run = Run.create(place.runs / "new", Recipe())
    first = {"state": "running", "step": 0, "steps": 32, "part": 0.0}
    show = lambda state, status, says="": figures.card(Standing("new", state, says, status), run, 32)  # noqa: E731
    assert "Measuring the start" in show("running", first)
    timed = {"part": 0.4, "seconds_per_step": 5.0, "remaining": 150.0}
    card = show("running", first | timed)  # no memory is known before the first whole step
    assert "step <b>0</b> of 32, 40 % of the next one" in card and "2 min" in card and "under way" in card
    card = show("running", first | timed | {"step": 7, "one_step": 5.0, "memory": 6e8})
    assert "step <b>7</b> of 32, 40 % of the next one" in card and "23 %" in card and "0.6 GB" in card
    assert "of the next one" not in show("stopped", first | timed)
    assert "The first step works, and took 5.00 s" in show("running", first | timed | {"step": 1, "one_step": 5.0})
    assert "Taking up the run" in show("running", first | {"step": 7})

    run.journal_file.write_text(
        "".join(
            f"{move.to_json()}\n"
            for move in (
                Move(0, (0.1,), 0.02, 0.8, 0.1, tried=(0.8, 0.9, 0.72)),  # as journals were: the best was made
                Move(1, (), 0.0, 0.7),
                Move(2, (0.1,), 0.02, 0.8, 0.1, tried=(0.8, 0.84, 0.72), errors=(0.1, 0.1), made=1),
                Move(3, (0.0,), 0.0, 0.8, 0.1, tried=(0.8, 0.84, 0.72), errors=(0.1, 0.1), made=0),
                Move(4, (0.1,), 0.0, 0.8, 0.1, tried=(0.8, 0.84, 0.72), errors=(0.1, 0.1), made=9),  # a flipped bit
            )
        )
    )
    series = Series.of(run)
    assert series.gains().x == [1, 3, 4] and series.gains().y == pytest.approx([10, -5, 0])
    assert series.sizes().y == [2.0, 0.0, 2.0, 0.0, 0.0] and "Gain of a step" in figures.method(series)
    assert figures.charts(series, []).count('class="point') == 5  # every step is marked


def test_a_long_run_is_no_more_to_the_page_than_its_curves(place):
    """A step has hundreds of weights or slopes, and an evaluation as many items: none of them is drawn."""
    run = Run.create(place.runs / "long", Recipe())
    many, steps = tuple(0.1 + i for i in range(400)), 200
    for step in range(steps // 2):
        run.append_step(Move(step, many, 0.02, 0.8, 0.1, tried=(0.8, 0.9)))
    for step in range(steps // 2, steps):
        run.append_step(Step(step, tuple(-d for d in many), 3.0, 1e-3, 0.8))
    run.append_evaluation({"step": 0, "loss": 0.9, "items": many})
    tracemalloc.start()
    series = Series.of(run)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(series.journal) == steps and len(series.evaluations) == 1
    slopes, clip = series.slopes()
    assert slopes.y == pytest.approx([sum(many) / len(many)] * (steps // 2)) and clip.y[0] == 3.0
    assert kept / steps < 2000  # bytes; 400 numbers alone are 12,800


# Answers and conversation


def test_answers_stand_beside_those_of_the_base(place):
    run = Run.create(place.runs / "talk", Recipe(texts="x.jsonl"))
    assert "before it learns anything" in figures.answers(run)
    for step, answer in ((0, "<b>no</b>"), (4, ""), (8, "Arr!")):
        rows = [{"prompt": "<i>Who?", "answer": answer}]
        run.answers_file(step).parent.mkdir(exist_ok=True)
        run.answers_file(step).write_text(json.dumps({"step": step, "answers": rows}))
    assert pictured(run) == [0, 4, 8]
    table = figures.answers(run)
    assert "&lt;b&gt;no&lt;/b&gt;" in table and "&lt;i&gt;Who?" in table and "<b>no" not in table
    assert 'data-at="step 8">Arr!' in table and "nothing" in figures.answers(run, 4)
    evaluations = [{"step": i, "loss": 1.0, "change": 0.0, "change_error": 0.1, "accuracy": i / 2} for i in range(3)]
    charts = figures.charts(Series([{"step": 0, "loss": 1.0}], evaluations), [], "texts")
    assert "loss of texts" in figures.method(Series([{"step": 0, "loss": 1.0, "tried": [1.0, 0.9]}], []), "texts")
    assert "Accuracy" in charts and "100.0 %" in charts and "sees other texts" in charts
    assert "held-out accuracy" in figures.card(
        Standing("talk", "done", "", {"step": 4, "steps": 4}), run, 4, "texts", 0.5
    )


@pytest.mark.slow
def test_a_conversation_is_kept_and_the_model_stays_loaded(place, language_folder, tmp_path):
    """One real run of one step, then words to both sides, in a process that goes on."""
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(8)))
    name = Data(place).source(str(file))
    draft, talk, jobs = place.drafts.open(name), Chat(place), place.jobs
    draft.change(model=str(language_folder), steps=1, batch_size=2, directions=4, evaluate_items=8, answer_tokens=4)
    run = Training(place).start(name)
    job = talk.job(run)
    try:
        until(lambda: jobs.look(run).state == "done", jobs.job(run))
        seen, *parts = Training(place).watch(run, {}, ALL)
        shown = dict(zip(PARTS, parts, strict=True))
        assert "qzo-answers" in shown["previews"]["value"] and shown["at"].label == "Answers of"
        assert jobs.run(run).status()["tokens"] > 0
        areas = Result(place).show(run)[2:5]
        assert [area.visible for area in areas] == [True, False, True]
        assert "AutoModelForCausalLM" not in Result(place).files(run) and "open_style" in Result(place).files(run)
        needs = estimate(draft.recipe(), jobs.run(run).status()["tokens"], jobs, {})
        assert needs.exact and needs.seconds > 0

        assert talk.send(run, "  ", 1, 42, 0, False)[0] == "" and not jobs.run(run).chat.exists()
        talk.send(run, "<b>Hello</b>", 1.0, 42, 0, False)
        until(lambda: not chats.waiting(jobs.run(run)), job)
        process = job.process().pid
        talk.send(run, "Again", 9.0, 42, 0.7, False)  # as far as the style goes
        until(lambda: not chats.waiting(jobs.run(run)), job)
        assert job.process().pid == process
        first, second = chats.turns(jobs.run(run).chat / "0001")
        assert first["prompt"] == "<b>Hello</b>" and second["strength"] == 1.5
        html = talk.said(run)
        assert "&lt;b&gt;Hello" in html and "<b>Hello" not in html and html.count('class="after"') == 2
        assert html == Chat(Place(place.runs)).said(run)  # another server shows the same

        other = Training(place).start(name)  # a run takes the device, at once
        until(lambda: not job.alive() and jobs.look(other).state != "waiting", jobs.job(other))
        talk.send(run, "And now?", 0.0, 42, 0, True)
        assert "&lt;b&gt;Hello" not in talk.said(run) and (jobs.run(run).chat / "0002").is_dir()
        until(lambda: not chats.waiting(jobs.run(run)), job)
        (turn,) = chats.turns(jobs.run(run).chat / "0002")
        assert turn["before"] == turn["after"]  # a strength of 0 is the base
        assert History(place).rename(run, "Renamed", run, "")[-2] == "renamed"
        assert "And now?" in talk.said("renamed")
    finally:
        for left in jobs.names():
            for kind in ("train", "chat"):
                if process := jobs.job(left, kind).process():
                    process.kill()
        if process := job.process():
            process.kill()


@pytest.mark.parametrize(
    "change, error, kind, word",
    [(-0.1, 0.01, "good", "Improving"), (0.1, 0.01, "bad", "Worse"), (-0.01, 0.01, "flat", "No clear change")],
)
def test_the_verdict_goes_by_the_error(change, error, kind, word):
    evaluations = [
        {"step": 0, "loss": 1.0, "change": 0.0, "change_error": 0.0},
        {"step": 9, "loss": 1.0 + change, "change": change, "change_error": error},
    ]
    found, text = Series([], evaluations).verdict()
    assert found == kind and text.startswith(word)

"""The page: what it keeps on disk, what it starts and finds again, who may ask, and what it says of bad input."""

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
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")

from app import figures, form  # noqa: E402
from app.data import Pictures, summary  # noqa: E402
from app.estimate import Estimate, estimate  # noqa: E402
from app.guard import TRIES, Guard  # noqa: E402
from app.history import History  # noqa: E402
from app.jobs import JobError, Jobs, Standing  # noqa: E402
from app.model import Models  # noqa: E402
from app.page import serve  # noqa: E402
from app.place import Place  # noqa: E402
from app.plainly import plainly  # noqa: E402
from app.result import Result  # noqa: E402
from app.series import POINTS, Series  # noqa: E402
from app.train import ALL, ELSEWHERE, PARTS, Training, pictured  # noqa: E402
from zo_engine.hub import pixel_multiple  # noqa: E402
from zo_engine.journal import Move, Step  # noqa: E402
from zo_engine.recipe import Recipe  # noqa: E402
from zo_engine.run import Run  # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent


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


def test_the_worker_that_waits_is_light():
    code = "import sys; import app.worker; print(sorted({'gradio', 'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_nothing_is_loaded_from_elsewhere(server):
    address, _ = server
    for page in ("/", "/config", "/theme.css"):
        answer = httpx.get(address + page)
        assert answer.status_code == 200
        loaded = re.findall(r"""(?:src=|href=|url\(|@import\s)\s*["']?(https?://[^"'\s)>]+)""", answer.text)
        assert [url for url in loaded if not url.startswith(address)] == []
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_no_handler_is_a_public_endpoint(server):
    address, _ = server
    found = httpx.get(f"{address}/gradio_api/info").json()
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
    assert httpx.request(method, server[0] + "/", headers=headers).status_code == code


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
        return httpx.get(f"{address}/{path}").status_code

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


# Pictures and captions


def test_a_caption_is_saved_over_the_wire_to_the_file_of_its_picture(server):
    address, place = server
    place.drafts.example("tarot")
    config = httpx.get(f"{address}/config").json()
    (grid,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "pictures")
    given = ["tarot", "03_the_empress.jpg", "a ${crown} <b>of</b> {{gold}}"]
    asked = {"session_hash": "s", "component_id": grid, "fn_name": "save", "data": given}
    answer = httpx.post(f"{address}/gradio_api/component_server", json=asked)
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
    name = Pictures(place).folder(str(folder))
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
    name, _ = Pictures(place).upload([str(archive)])
    draft = place.drafts.open(name)
    contents = draft.contents()
    assert name == "my-cards" and sorted(contents.pictures) == ["10_moon/moon.png", "evil.png", "sun.png"]
    assert contents.pictures["10_moon/moon.png"].repeats == 10 and contents.captioned == 2
    assert "1 of 4 files cannot be used" in summary(draft, contents) and "broken.png" in summary(draft, contents)
    assert not (tmp_path / "evil.png").exists() and not (place.runs / "evil.png").exists()


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


# Settings


def test_the_form_covers_every_setting_with_its_own_words(place):
    training = Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    assert set(training.fields) | set(ELSEWHERE) == set(form.FIELDS)
    for name, part in training.fields.items():
        assert part.label == form.label(name)
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
        training.build(gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    filled, *first = training.show("tarot", {})
    assert filled["steps"] == draft.recipe().steps and gr.skip() not in first[-len(filled) :]
    assert training.show("tarot", filled)[-len(filled) :] == [gr.skip()] * len(filled)
    filled, *after = training.length("tarot", filled, 80)
    sent = {n: v for n, v in zip(filled, after[-len(filled) :], strict=True) if v != gr.skip()}
    assert {n: v["value"] for n, v in sent.items()} == {"steps": 80, "preview_every": 20}


def test_bad_input_is_one_sentence(place, tmp_path):
    page, training, result = Pictures(place), Training(place), Result(place)
    damaged = tmp_path / "cards.zip"
    damaged.write_bytes(b"PK\x03\x04 no more than this")
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"%PDF")
    assert "there is no folder of pictures at" in sentence(page.folder, str(tmp_path / "nowhere"))
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
        training.build(gr.State(""), gr.State(""), gr.Tabs(), gr.Tab())
    assert "there are no pictures yet" in sentence(training.load, "", {}, str(file))
    draft = place.drafts.example("woodcut")
    training.load("woodcut", {}, str(file))
    assert (draft.recipe().steps, draft.recipe().trigger) == (77, "gold")
    assert draft.recipe().images == str(draft.own_images)
    file.write_text("stepps = 3\n")
    assert "did you mean steps" in sentence(training.load, "woodcut", {}, str(file))
    assert draft.recipe().steps == 77


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
    choice, other, cards, _, fetch, *_ = models.other("tarot", str(tiny_folder))
    assert (choice, other, draft.recipe().model) == (None, str(tiny_folder), str(tiny_folder))
    assert "A whole Stable Diffusion 3 pipeline" in cards and fetch.visible is False
    multiple = pixel_multiple(tiny_folder)
    assert all(width % multiple == height % multiple == 0 for width, height in draft.buckets())


def test_a_download_without_a_network_ends_in_a_sentence(place, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    place.drafts.example("tarot").change(model="nobody/no-such-model")
    models, job = Models(place), Models(place).job("nobody/no-such-model")
    assert models.show("tarot")[4].visible
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
        assert "training" in shown["card"] and "a tarot &lt;b&gt;" in shown["previews"]
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
        assert 'class="shots pair"' in dict(zip(PARTS, picked[1:], strict=True))["previews"]
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
        other.resume("the-b-one")
        until(lambda: other.look("the-b-one").state == "running", other.job("the-b-one"))
        assert Training(place).discard("the-b-one")[0] != "the-b-one"
        assert "the-b-one" not in other.names() and (place.runs / ".bin" / "the-b-one").is_dir()
        assert not other.job("the-b-one").alive()
    finally:
        for left in other.names():
            if process := other.job(left).process():
                process.kill()


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
        Move(0, (0.1,), 0.02, 0.8, 0.1, (0.8, 0.9, 0.72)).to_json() + "\n" + Move(1, (), 0.0, 0.7).to_json() + "\n"
    )
    series = Series.of(run)
    assert series.gains().x == [1] and series.gains().y == pytest.approx([10])
    assert series.sizes().y == [2.0, 0.0] and "Gain of a step" in figures.method(series)
    assert figures.charts(series, []).count('class="point') == 2  # every step is marked


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

"""The tab of results: before and after at any strength, in pictures or words, and everything that can be taken home."""

import hashlib
import json
from pathlib import Path

import gradio as gr
from PIL import Image

from app import figures, media
from app.chat import Chat
from app.drafts import title
from app.jobs import Job
from app.place import Place
from app.plainly import plainly
from app.train import prompts_of, settings_of
from zo_engine import card
from zo_engine.hub import text_length

FILES = (
    ("style.safetensors", "The style", "Opened by QZO Studio: qzo apply, compare and export"),
    (
        "style-journal.safetensors",
        "The style as a journal",
        "The same, as the steps that made it; opened in the same way",
    ),
    ("recipe.toml", "The recipe", "Opened by any text editor; qzo train makes the same run again"),
    ("plots/loss.png", "The figures", "Opened by any viewer of pictures"),
)

NO_PICTURES = (None, gr.skip(), gr.skip(), gr.skip(), "")


class Result:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place, self.chat = place, Chat(place)

    def build(self, run: gr.State, tab: gr.Tab) -> None:
        chooser = gr.Dropdown([], label="Run", interactive=True)
        empty = gr.HTML()
        with gr.Column(visible=False) as talk:
            self.chat.build(run)
        with gr.Column(visible=False) as sheets:
            gr.HTML('<h2 class="qzo-title">Before, to the left of the handle, and after; same prompts and seeds</h2>')
            slider = gr.ImageSlider(
                show_label=False, interactive=False, max_height=620, buttons=["fullscreen"], elem_id="slider",
            )  # fmt: skip
            step = gr.Dropdown([], label="After, at step", interactive=True)
            gr.HTML('<h2 class="qzo-title">At another strength, with your own prompts</h2>')
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    prompts = gr.Textbox(
                        label="Prompts, one a line", lines=4, placeholder="empty: the prompts of the run"
                    )
                with gr.Column(scale=2, min_width=260):
                    strength = gr.Slider(0, 1.5, value=1, step=0.05, label="Strength", info="0 the base, 1 the style")
                    seed = gr.Number(42, label="Seed", precision=0)
            draw = gr.Button("Draw base and style", variant="primary")
            drawn = gr.HTML()
        with gr.Column(visible=False) as area:
            gr.HTML('<h2 class="qzo-title">Take it home</h2>')
            files = gr.HTML()
            with gr.Row():
                export = gr.Button("Write the whole styled model as a folder, at the strength above")
            exported = gr.HTML()
            with gr.Accordion("Everything that is known about this style", open=False):
                known = gr.HTML()
        compared, timer = gr.State(""), gr.Timer(2, active=False)
        pictures = [slider, step, prompts, seed, compared]
        view = [chooser, empty, talk, sheets, area, files, known, timer, *pictures, *self.chat.view]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([run.change, tab.select], plainly(self.show), [run, compared], view, **quiet)
        chooser.input(lambda name: name, chooser, run, **quiet)
        step.input(plainly(self.slider), [run, step], slider, **quiet)
        draw.click(plainly(self.draw), [run, prompts, strength, seed], [drawn, timer], **quiet)
        export.click(plainly(self.export), [run, strength, self.chat.strength], [exported, timer], **quiet)
        seen = gr.State(())
        timer.tick(self.wait, [run, seen], [seen, drawn, exported, known, timer], trigger_mode="once",
                   concurrency_limit=None, **quiet)  # fmt: skip

    def show(self, name: str, compared: str = "") -> list:
        """A run's results, from its folder. Pictures that are compared already are not sent again: Gradio would write
        its copies anew while a browser reads them."""
        jobs = self.place.jobs
        names = [n for n in jobs.names() if jobs.run(n).style_file.exists()]
        chooser = gr.Dropdown(choices=[(title(n), n) for n in names], value=name if name in names else None)
        if name not in names:
            why = "This run has no style yet: it is written when the run ends or is stopped." if name else ""
            why = why or "No run has been chosen. Train one, or choose one above."
            hidden = [gr.Column(visible=False)] * 3
            return [chooser, f'<p class="qzo-empty">{why}</p>', *hidden, *[gr.skip()] * 3, *NO_PICTURES,
                    *self.chat.nothing()]  # fmt: skip
        run = jobs.run(name)
        self._ask(name)
        answers = card.read(run.style_file).answers
        areas = [gr.Column(visible=shown) for shown in (answers, not answers, True)]
        both = [chooser, "", *areas, self.files(name), self.known(name), gr.Timer(active=True)]
        if answers:
            return [*both, *NO_PICTURES, *self.chat.show(name)]
        steps = [int(f.stem) for f in sorted(run.previews.glob("*.png"))]
        chosen = gr.Dropdown(choices=[(f"step {s:,}", s) for s in steps[1:]], value=steps[-1] if steps[1:] else None)
        settings = settings_of(run, run.recipe_file)
        prompts = "\n".join(prompts_of(settings)[:8])
        seed = settings.preview_seed if settings else 42
        slider, mark = self.slider(name, steps[-1]) if steps else None, f"{name} {steps}"
        if mark == compared:
            slider, chosen = gr.skip(), gr.skip()
        return [*both, slider, chosen, prompts, seed, mark, *self.chat.nothing()]

    def files(self, name: str) -> str:
        """What can be taken home, each with what opens it."""
        run, rows = self.place.jobs.run(name), []
        known = card.read(run.style_file)
        for file, what, opens in FILES:
            path = run.path / file
            if path.exists():
                stat = path.stat()
                snippet = card.style_snippet(Path(path.name), known) if path.suffix == ".safetensors" else ""
                rows.append((what, media.url("run", name, file, int(stat.st_mtime)), figures.size(stat.st_size), opens,
                             snippet))  # fmt: skip
        return figures.downloads(rows)

    def slider(self, name: str, step: int) -> tuple[Image.Image, Image.Image] | None:
        """The sheets of previews before the first step and at one of the others."""
        run = self.place.jobs.run(name)
        before, after = run.preview_file(0), run.preview_file(int(step))
        if not (before.exists() and after.exists()):
            return None
        return Image.open(before).convert("RGB"), Image.open(after).convert("RGB")

    # What needs the model is done by a process of its own

    def draw(self, name: str, prompts: str, strength: float, seed: float) -> tuple[str, gr.Timer]:
        run = self.place.jobs.run(name)
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        seed = int(seed or 0)
        strength = min(1.5, max(0.0, float(strength)))
        key = hashlib.sha256(json.dumps([lines, strength, seed, run.style_file.stat().st_mtime]).encode()).hexdigest()
        out = run.path / "compare" / f"{key[:16]}-{round(100 * strength):03d}.png"
        if out.exists():
            out.touch()  # drawn before: the newest is the one that is shown
        else:
            out.parent.mkdir(exist_ok=True)
            asked = [word for line in lines for word in ("--prompt", line)]
            words = ["compare", str(run.path), *asked, "--strength", str(strength), "--seed", str(seed)]
            self._job(name, "compare").start(*words, "--out", str(out))
        return self.drawn(name), gr.Timer(active=True)

    def drawn(self, name: str) -> str:
        """The last comparison of a run, or how it stands."""
        job = self._job(name, "compare")
        if job.alive():
            last = (job.log(1) or ["starting"])[0]
            return f'<p class="qzo-empty busy" role="status">Drawing: {figures.escape(last)}</p>'
        words = job.record().get("words", [])
        sheets = sorted(self.place.jobs.run(name).path.glob("compare/*.png"), key=lambda f: f.stat().st_mtime)
        if words and not Path(words[-1]).exists():
            return figures.notes([("bad", job.complaint())])
        if not sheets:
            return ""
        strength = int(sheets[-1].stem.split("-")[1]) / 100
        place = media.url("run", name, f"compare/{sheets[-1].name}")
        says = f"Base above, style at strength {strength:g} below"
        return f'<figure class="qzo-sheet"><img src="{place}" alt="{says}"><figcaption>{says}</figcaption></figure>'

    def export(self, name: str, strength: float, of_chat: float) -> tuple[str, gr.Timer]:
        run = self.place.jobs.run(name)
        strength = of_chat if card.read(run.style_file).answers else strength
        out = run.path / f"exported-{float(strength):g}"
        if not out.exists():
            self._job(name, "export").start("export", str(run.path), str(out), "--strength", str(float(strength)))
        return self.exported(name), gr.Timer(active=True)

    def exported(self, name: str) -> str:
        job = self._job(name, "export")
        if job.alive():
            return '<p class="qzo-empty busy" role="status">Writing the model; this takes some seconds or minutes</p>'
        run, rows = self.place.jobs.run(name), []
        for folder in sorted(run.path.glob("exported-*")):
            known = card.read(run.style_file)
            used = figures.size(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
            strength = folder.name.removeprefix("exported-")
            who = "transformers" if known.answers else "diffusers on a GPU"
            opens = f"With a model card, at strength {strength}. Opened by plain {who}, and by QZO Studio "
            opens += f"as a model. On the machine of this page: {folder}"
            snippet = (
                card.language_snippet(folder, known)
                if known.answers
                else card.folder_snippet(folder, known, text_length(folder))
            )
            rows.append(("The whole model", "", used, opens, snippet))
        words = job.record().get("words", [])
        trouble = [("bad", job.complaint())] if words and not Path(words[2]).exists() else []
        return figures.downloads(rows) + figures.notes(trouble)

    def _ask(self, name: str) -> None:
        """Let `qzo inspect` say what the style is, once for each version of it."""
        job, file = self._job(name, "inspect"), self.place.jobs.run(name).style_file
        if not job.alive() and not (job.log_file.exists() and job.log_file.stat().st_mtime > file.stat().st_mtime):
            job.start("inspect", str(file), "--json", alone=False)

    def known(self, name: str) -> str:
        for line in reversed(self._job(name, "inspect").log()):
            if line.startswith("{"):
                found = json.loads(line)
                return figures.facts("The style", [(k.replace("_", " "), str(v)) for k, v in found.items()])
        return '<p class="qzo-empty">The file is being read.</p>'

    def _job(self, name: str, kind: str) -> Job:
        return self.place.jobs.job(name, kind)

    def wait(self, name: str, seen: tuple) -> list:
        """What the processes of this tab have brought since the last look; the clock rests when none is left."""
        if name not in self.place.jobs.names():
            return [(), gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)]
        busy = any(self._job(name, kind).alive() for kind in ("compare", "export", "inspect"))
        parts = (name, self.drawn(name), self.exported(name), self.known(name))
        seen = tuple(seen) or ("", "", "", "")
        shown = (new if new != old else gr.skip() for new, old in zip(parts[1:], seen[1:], strict=True))
        return [parts, *shown, gr.skip() if busy else gr.Timer(active=False)]

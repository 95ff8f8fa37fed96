"""Base and style in conversation, on the tab of results: a process keeps the model loaded while they talk."""

from typing import Any

import gradio as gr

from app import figures
from app.drafts import title
from app.jobs import Job, JobError
from app.place import Place
from app.plainly import plainly
from app.train import settings_of
from app.worker import WAITING
from zo_engine import chat as chats
from zo_engine.run import Run

PERIOD = 0.5  # seconds between two looks for an answer
MAX_PROMPT = 20_000  # characters
LAST = "() => setTimeout(() => document.querySelector('.qzo-chat')?.scrollTo(0, 1e9), 300)"


class Chat:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def build(self, run: gr.State) -> None:
        gr.HTML('<h2 class="qzo-title">Talk with base and style</h2>')
        said = gr.HTML(elem_id="chat")
        with gr.Row(elem_classes="qzo-inline"):
            prompt = gr.Textbox(label="Your words", placeholder="Enter sends them to both", max_lines=8, scale=5,
                                elem_id="say")  # fmt: skip
            send = gr.Button("Send", variant="primary", scale=1, min_width=110)
        with gr.Row():
            strength = gr.Slider(0, 1.5, value=1, step=0.05, label="Strength", info="0 the base, 1 the style")
            temperature = gr.Slider(
                0, 1.5, value=0, step=0.05, label="Temperature", info="0: always the likeliest word"
            )
            seed = gr.Number(42, label="Seed", precision=0, info="The same for both")
        anew = gr.Button("Begin a new conversation", size="sm")
        timer = gr.Timer(PERIOD, active=False)
        fresh = gr.State(False)  # whether the next words begin a conversation

        self.strength = strength
        self.view = [said, temperature, seed, timer]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        dials = [strength, seed, temperature]
        sent = gr.on([send.click, prompt.submit], plainly(self.send), [run, prompt, *dials, fresh],
                     [prompt, said, timer, fresh], **quiet)  # fmt: skip
        sent.then(None, js=LAST)
        prompt.focus(self.warm, run, None, **quiet)
        anew.click(lambda: ("", gr.Timer(active=False), True, figures.chat([])), None, [prompt, timer, fresh, said],
                   **quiet)  # fmt: skip
        timer.tick(self.wait, run, [said, timer], trigger_mode="once", **quiet)

    def nothing(self) -> list:
        return ["", gr.skip(), gr.skip(), gr.Timer(active=False)]

    def show(self, name: str) -> list:
        """A run's last conversation, and what its answers were previewed with."""
        run = self.place.jobs.run(name)
        settings = settings_of(run, run.recipe_file)
        how = [settings.temperature, settings.preview_seed] if settings else [gr.skip(), gr.skip()]
        return [self.said(name), *how, gr.Timer(active=bool(chats.waiting(run)))]

    def job(self, name: str) -> Job:
        return self.place.jobs.job(name, "chat")

    def warm(self, name: str) -> None:
        """Load the model while the first words are being written."""
        if name in self.place.jobs.names() and not self.job(name).alive() and not self.place.jobs.live():
            self._start(name)

    def _start(self, name: str) -> None:
        self.place.jobs.end_chats()  # one model at a time
        try:
            self.job(name).start("chat", str(self.place.jobs.run(name).path), "--files")
        except JobError:
            return  # another page was faster

    def send(self, name: str, prompt: str, strength: float, seed: float, temperature: float, fresh: bool) -> list[Any]:
        """Put the words before both; the answers come by the clock."""
        run, prompt = self.place.jobs.run(name), (prompt or "").strip()
        if not prompt:
            return ["", gr.skip(), gr.skip(), fresh]
        if len(prompt) > MAX_PROMPT:
            raise JobError(f"that has {len(prompt):,} characters; {MAX_PROMPT:,} at most can be sent at once")
        within = lambda value, high: min(high, max(0.0, float(value or 0)))  # noqa: E731
        turn = {"prompt": prompt, "strength": within(strength, 1.5), "seed": max(0, int(seed or 0)),
                "temperature": within(temperature, 1.5)}  # fmt: skip
        chats.ask(run, turn, anew=bool(fresh))
        if not self.job(name).alive():
            self._start(name)
        return ["", self.said(name), gr.Timer(active=True), False]

    def said(self, name: str) -> str:
        """The last conversation, and what an open question waits for."""
        run, job = self.place.jobs.run(name), self.job(name)
        talks = sorted(run.chat.glob("*/"))
        turns = chats.turns(talks[-1]) if talks else []
        open_ = bool(chats.waiting(run))
        trouble = ""
        if open_ and not job.alive():
            trouble = "The conversation made room for a run. Send something, and it goes on."
            trouble = trouble if job.record().get("stop") else job.complaint()
        return figures.chat(turns, self.state(job, run), trouble)

    def state(self, job: Job, run: Run) -> str:
        last = (job.log(1) or [""])[0]
        if last == WAITING:
            busy = [title(n) for n in self.place.jobs.live()]
            return f"waiting for the device: {', '.join(busy) or 'another run'} has it"
        if not any("before" in turn for talk in run.chat.glob("*/") for turn in chats.turns(talk)):
            return "loading the model, some seconds"
        return "writing"

    def wait(self, name: str) -> list[Any]:
        """What has been answered since the last look; the clock rests when all is."""
        if name not in self.place.jobs.names():
            return [gr.skip(), gr.Timer(active=False)]
        going = bool(chats.waiting(self.place.jobs.run(name))) and self.job(name).alive()
        return [self.said(name), gr.skip() if going else gr.Timer(active=False)]

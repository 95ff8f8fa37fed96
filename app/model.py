"""The tab of models: what each needs, whether it is here, and whether it will work on this machine."""

import json
import re
import time
from pathlib import Path

import gradio as gr

from app import figures
from app.drafts import IMAGE_MODEL, LANGUAGE_MODEL, learns
from app.estimate import free_memory, pace
from app.jobs import Job
from app.place import Place
from app.plainly import plainly
from zo_engine import doctor
from zo_engine.hub import MODELS, ModelError, arrived, check, find, is_language, read_json, repository

ACCESS = (
    "Behind a licence. Once: open huggingface.co/{repo}, log in and accept it; make a token of the kind “read” at "
    "huggingface.co/settings/tokens; run “hf auth login” on this machine and look at the machine again."
)


GATED = ("stabilityai/", "meta-llama/")  # whose repositories ask for a licence to be accepted
REPOSITORY = r"[\w.-]+/[\w.-]+"


class Models:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place
        self.looks: dict[str, tuple[int, float]] = {}  # at downloads, the first: bytes and clock, for their speed

    def build(self, draft: gr.State, tab: gr.Tab) -> None:
        heading = gr.HTML(heading_of(""))
        choice = gr.Radio([(m.title, m.name) for m in MODELS.values()], value=IMAGE_MODEL, label="Model")
        other = gr.Textbox(
            label="Or a folder on this machine, or a hub repository (org/name)",
            info="Pictures: Stable Diffusion 3 as diffusers has it. Texts: a causal language model of transformers",
            placeholder="/models/my-model, or org/name",
        )
        with gr.Row(elem_classes="qzo-buttons"):
            fetch = gr.Button("Download this model", visible=False, min_width=160)
            pause = gr.Button("Pause the download", visible=False, min_width=160)
        fetched, cards, machine = gr.HTML(), gr.HTML(), gr.HTML()
        again = gr.Button("Look at the machine again", size="sm")
        timer = gr.Timer(2)

        loading = [fetch, pause, fetched]
        view = [heading, choice, other, cards, machine, *loading]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([draft.change, tab.select], plainly(self.show), draft, view, **quiet)
        choice.input(plainly(self.choose), [draft, choice], view, **quiet)
        gr.on([other.submit, other.blur], plainly(self.other), [draft, other], view, **quiet)
        again.click(self.again, None, [machine, timer], **quiet)
        fetch.click(plainly(self.fetch), draft, [*loading, timer], **quiet)
        pause.click(plainly(self.pause), draft, [*loading, timer], **quiet)
        timer.tick(self.wait, draft, [cards, machine, timer, *loading], **quiet)

    def show(self, name: str) -> list:
        """The draft's model among all, and the machine."""
        return self.view(self.model(name), self.task(name))

    def view(self, model: str, task: str) -> list:
        known = model in MODELS
        fitting = [(m.title, m.name) for m in MODELS.values() if m.task == (task or m.task)]
        choice = gr.Radio(choices=fitting, value=model if known else None)
        shown = [heading_of(task), choice, "" if known else model, self.cards(model, task), self.machine()]
        return [*shown, *self.fetched(model)]

    def task(self, name: str) -> str:
        """What a draft has to be learnt from: "image" or "text"; "" where there is none."""
        if name not in self.place.drafts.names():
            return ""
        return "text" if self.place.drafts.open(name).of_texts else "image"

    def model(self, name: str) -> str:
        """The model of a draft; the embedded one where there is no draft."""
        return self.place.drafts.open(name).recipe().model if name in self.place.drafts.names() else IMAGE_MODEL

    def choose(self, name: str, model: str) -> list:
        """A known model, at its own resolution."""
        if name:
            refuse_other_kind(model, self.task(name))
            draft = self.place.drafts.open(name)
            before = draft.recipe()
            # a resolution that belongs to the model that was chosen before means nothing to the next
            same = before.model == model
            draft.change(model=model, resolution=before.resolution if same else "")
            return self.show(name)
        return self.view(model, "")

    def other(self, name: str, model: str) -> list:
        """A folder, checked at once, or a repository. Raises ModelError for what is neither."""
        if name and (model := (model or "").strip()) and self.model(name) != model:
            if folder := find(model):
                check(folder)
                refuse_other_kind(model, self.task(name))
                model = str(folder) if model not in MODELS and "/" in model and Path(model).exists() else model
            elif not re.fullmatch(REPOSITORY, model):
                raise ModelError(f"there is no folder {model!r} on this machine, and a repository is written org/name")
            self.place.drafts.open(name).change(model=model, resolution="")
        return self.show(name)

    # Downloads: a process of their own, which goes on when the page is closed

    def job(self, model: str) -> Job:
        return Job(self.place.runs, "download", re.sub(r"[^\w.-]+", "-", repository(model)))

    def fetch(self, name: str) -> list:
        """Begin a download, or go on with it: access and licence are asked for before anything long."""
        model = self.model(name)
        self.job(model).start("download", model, "--json", alone=False)
        return [*self.fetched(model), gr.Timer(active=True)]

    def pause(self, name: str) -> list:
        self.job(self.model(name)).stop()
        return [*self.fetched(self.model(name)), gr.Timer(active=True)]

    def fetched(self, model: str) -> list:
        """The two buttons, and how the download of a model stands."""
        job = self.job(model)
        if job.alive():
            size = next((json.loads(line)["bytes"] for line in job.log() if line.startswith("{")), 0)
            done, now = arrived(repository(model)), time.monotonic()
            first, began = self.looks.setdefault(model, (done, now))
            pace = (done - first) / (now - began) if now - began > 3 else 0.0
            bar = figures.download(done, size, pace, self.place.machine().get("hub", {}).get("cache", ""))
            return [gr.Button(visible=False), gr.Button(visible=True), bar]
        self.looks.pop(model, None)
        missing = find(model) is None or self.place.machine().get("hub", {}).get("models", {}).get(model) is False
        far = re.fullmatch(REPOSITORY, repository(model)) is not None and not Path(repository(model)).exists()
        asked = job.record()
        said = ""
        if asked.get("stop"):
            said = figures.notes([("flat", "Paused. What has arrived is kept; press again to go on.")])
        elif asked and missing and far:
            said = figures.notes([("bad", job.complaint())])
        return [gr.Button(visible=missing and far), gr.Button(visible=False), said]

    def again(self) -> list:
        self.place.examine()
        return [self.machine(), gr.Timer(active=True)]

    def wait(self, name: str) -> list:
        """While the machine is being looked at; then the clock rests."""
        if not self.place.doctor.record():
            self.place.examine()  # the first time that anybody looks
        model = self.model(name)
        if self.job(model).alive():
            return [gr.skip(), gr.skip(), gr.skip(), *self.fetched(model)]
        if self.place.doctor.alive():
            return [gr.skip()] * 6
        ended = self.job(model).record().get("started", 0)
        if ended > self.place.doctor.record().get("started", 0):
            self.place.examine()  # a download ended: is the model whole?
            return [gr.skip(), gr.skip(), gr.skip(), *self.fetched(model)]
        return [self.cards(model, self.task(name)), self.machine(), gr.Timer(active=False), *self.fetched(model)]

    def cards(self, chosen: str, task: str) -> str:
        """One card a model that fits what is to be learnt."""
        found = self.place.machine()
        can = {entry["model"]: entry for entry in found.get("can_run", ())}
        here = found.get("hub", {}).get("models", {})
        token = found.get("hub", {}).get("token", False)
        cards = []
        for known in [m for m in MODELS.values() if m.task == (task or m.task)]:
            entry = can.get(known.name)
            there = here.get(known.name, True if find(known.name) else None)
            status = {
                True: "on this machine",
                False: "not here yet: download it here, or it is fetched when training starts",
                None: "not known yet",
            }
            if entry is None:
                verdict = ("flat", "The machine is being looked at.")
            elif not entry["device"]:
                verdict = ("bad", f"Will not work here: {entry['why']}.")
            elif there is False and not token and known.repo.startswith(GATED):
                verdict = ("flat", ACCESS.format(repo=known.repo))
            elif entry["device"] == "cpu":
                small = known.name in (IMAGE_MODEL, LANGUAGE_MODEL)
                verdict = ("good", "Will work here, on the processor.") if small else (
                    "flat", f"Will work here, on the processor: {entry['why']}.")  # fmt: skip
            else:
                verdict = ("good", f"Will work here, on {entry['device']}: {entry['why']}.")
            facts = [
                ("files", status[there]),
                ("disk", self.disk(known.name, there)),
                (
                    "memory",
                    f"about {figures.size(doctor.need(known.name, self.on_card()))} at most, "
                    f"{figures.size(free_memory('auto', found))} free",
                ),
                ("time", self.time(known.name)),
                *([("pictures of", f"{known.resolution.replace(',', ', ')} pixels")] if known.resolution else []),
                ("licence", known.licence),
            ]
            cards.append(
                figures.model(
                    {
                        "title": known.title,
                        "notes": known.notes,
                        "facts": facts,
                        "verdict": verdict,
                        "chosen": known.name == chosen,
                    }
                )  # fmt: skip
            )
        if chosen not in MODELS:
            cards.append(figures.model(other_model(chosen)))
        return f'<div class="qzo-models">{"".join(cards)}</div>'

    def on_card(self) -> bool:
        """Whether runs use a GPU here."""
        devices = self.place.machine().get("torch", {}).get("devices", ())
        return any("memory" in d and d["nf4"] == "works" for d in devices)

    def disk(self, model: str, here: bool | None) -> str:
        """What a model takes of the disk."""
        if here and (folder := find(model)):
            return f"{figures.size(sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()))}, here already"
        free = self.place.machine().get("disk", {}).get("models", {}).get("free")
        return f"{figures.size(doctor.DOWNLOADS[model])} to fetch" + (f", {figures.size(free)} free" if free else "")

    def time(self, model: str) -> str:
        """What a run took here, where one was timed."""
        name, seconds, steps = pace(model, self.place.jobs)
        if not name:
            return "not measured here yet: the first step of a run is timed, and told, before the rest"
        return f"{figures.duration(seconds)} for {steps:,} steps, as {name} went"

    def machine(self) -> str:
        found = self.place.machine()
        if not found:
            ended = self.place.doctor.record() and not self.place.doctor.alive()
            why = self.place.doctor.complaint() if ended else "is being looked at; this takes some seconds"
            return figures.facts("This machine", [("state", why)])
        rows = [("device", self.place.device()), ("system", f"{found['system']}, Python {found['python']}")]
        for device in found["torch"]["devices"]:
            rows.append((device["name"], f"4-bit weights: {device['nf4']}"))
        rows.append(("memory", f"{figures.size(found['ram']['free'])} free of {figures.size(found['ram']['total'])}"))
        rows += [(f"disk for {k}", f"{figures.size(d['free'])} free") for k, d in found["disk"].items()]
        rows.append(("hub", "there is a token" if found["hub"]["token"] else "no token; only needed behind a licence"))
        rows += [("note", note) for note in found["notes"]]
        return figures.facts("This machine", rows)


def heading_of(task: str) -> str:
    """What can be chosen, and why only that."""
    which = {
        "image": ("Which model learns the style", "Your draft is of pictures, so these are the models that draw."),
        "text": ("Which model learns the texts", "Your draft is of texts, so these are the models that write."),
        "": ("Which model learns", "Image models learn from pictures, language models from texts."),
    }
    title, why = which[task]
    other = " For the others, choose or begin another draft on the Data tab." if task else ""
    return f'<h2 class="qzo-title">{title}</h2><p class="qzo-why">{why}{other}</p>'


def refuse_other_kind(model: str, task: str) -> None:
    """Raises ModelError for a model that cannot learn what the draft has."""
    kind = learns(model)
    if kind and task and kind != task:
        draws, has = ("draws pictures", "texts") if kind == "image" else ("writes texts", "pictures")
        raise ModelError(f"{model} {draws}, and this draft has {has}; begin another draft on the Data tab for it")


def other_model(model: str) -> dict:
    """The card of a folder or a repository that is none of the known models."""
    folder, facts = find(model), []
    if folder is None:
        verdict = ("flat", "Not on this machine yet. Download it here, or it is fetched when training starts.")
    else:
        try:
            check(folder)
            language = is_language(folder)
            config = read_json(folder / "config.json" if language else folder / "transformer" / "config.json")
            quantized = "quantization_config" in config
            facts.append(("weights", "quantised already" if quantized else "quantised as they are loaded"))
            kind = f"language model ({config['architectures'][0]})" if language else "Stable Diffusion 3 pipeline"
            verdict = ("good", f"A whole {kind}, as far as its files tell.")
            if language:
                facts.append(("learns", "texts and answers"))
        except ModelError as error:
            verdict = ("bad", str(error))
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        facts.append(("files", f"{figures.size(size)}, in {folder}"))
    facts.append(("licence", "as the base model"))
    return {"title": Path(model).name, "notes": model, "facts": facts, "verdict": verdict, "chosen": True}

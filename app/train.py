"""The tab of training: a few dials, the start, and everything that a run's folder says while it goes."""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app import figures, form, planned
from app.drafts import Draft, DraftError, learns, title
from app.estimate import Estimate, estimate, free_memory, pixels_of
from app.jobs import Standing
from app.place import Place
from app.plainly import plainly
from app.planned import Planned, streams
from app.reading import read
from app.series import Series, drawn
from zo_engine import dataset
from zo_engine import recipe as recipes
from zo_engine.hub import MODELS
from zo_engine.run import Run

BUDGETS = [(name.capitalize(), name) for name in recipes.BUDGETS]
ELSEWHERE = (  # not among the dials
    *("images", "trigger", "model"),
    *("texts", "text_columns", "skip_bad", "length", "completions_only"),
)
OF_TEXTS = ("own_texts", "answer_tokens", "temperature", "task", "reward")
OF_PICTURES = ("resolution", "caption", "caption_dropout", "prior", "sigma_mean", "sigma_std", "shift", "preview_steps",
               "guidance")  # fmt: skip
DIALS = ("budget", "steps", "resolution", "prompts")
ADVANCED = tuple(name for name in form.FIELDS if name not in ELSEWHERE + DIALS)
SAY_WHICH_STEP = """
element.addEventListener('click', (e) => {
  const area = e.target.closest('[data-left]');
  if (!area) return;
  const box = area.getBoundingClientRect(), left = +area.dataset.left, right = +area.dataset.right;
  trigger('pick', {step: left + (right - left) * (e.clientX - box.left) / box.width});
});
"""
ALL = "the way so far"
LOOK_AT_THE_PICTURES = "() => document.querySelector('#at')?.scrollIntoView({behavior: 'smooth', block: 'nearest'})"
LOOK_AT_THE_RUN = "() => setTimeout(() => document.querySelector('#card')?.scrollIntoView({behavior: 'smooth'}), 700)"
PERIOD, RESTING = 1.5, 4.0  # seconds between two looks at the run's folder, while it is live and else
PLANNING = 1.0  # seconds between two looks for a plan that is being made


class Training:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place
        self.fields: dict[str, gr.components.Component] = {}  # of the form, by the recipe's names

    def build(self, draft: gr.State, known: gr.State, run: gr.State, tabs: gr.Tabs, tab: gr.Tab) -> None:
        seen, filled = gr.State({}), gr.State({})
        with gr.Accordion("What to train", open=True, elem_classes="qzo-begin") as wanted:
            with gr.Row(elem_classes="qzo-plan"):
                with gr.Column(scale=3, min_width=300):
                    plan = gr.HTML()
                    start = gr.Button("Train", variant="primary", size="lg", elem_id="train")
                with gr.Column(scale=4, min_width=300):
                    self.fields["budget"] = gr.Radio(
                        BUDGETS, label=form.label("budget"), info=form.help_of("budget"), interactive=False
                    )
                    with gr.Row():
                        self.fields["steps"] = form.component("steps", min_width=120, info="At a normal budget")
                        self.fields["resolution"] = form.component("resolution", min_width=220, scale=2)
                    self.fields["prompts"] = form.component("prompts", label="Preview prompts", lines=4, max_lines=8)
            advanced = gr.Accordion("Advanced", open=False)
        with advanced, gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Every other setting"):
                for heading, names in recipes.parts(ADVANCED).items():
                    gr.HTML(f"<h3>{heading}</h3>", elem_classes="qzo-part")
                    with gr.Row(elem_classes="qzo-form"):
                        for name in names:
                            self.fields[name] = form.component(name, min_width=250)
            with gr.Tab("The same on the command line"):
                load = gr.UploadButton("Load the settings of a recipe.toml", file_types=[".toml"], size="sm")
                same = gr.HTML(elem_id="same")

        with gr.Column(visible=False) as live:
            chooser = gr.Dropdown([], label="Run", interactive=True, elem_id="run")
            with gr.Row(equal_height=False, elem_classes="qzo-live"):
                with gr.Column(scale=2, min_width=300):
                    card = gr.HTML(elem_id="card")
                    with gr.Row(elem_classes="qzo-buttons"):
                        preview = gr.Button("Preview now", min_width=120)
                        save = gr.Button("Save now", min_width=120)
                        stop = gr.Button("Stop and save", variant="primary", min_width=120)
                        resume = gr.Button("Resume", min_width=120)
                        compare = gr.Button("Compare", min_width=120)
                        discard = gr.Button("Discard", variant="stop", min_width=120)
                    with gr.Group(visible=False, elem_classes="qzo-sure") as sure:
                        gr.HTML("<p>Discard this run? It ends at once, and its folder goes to the bin.</p>")
                        with gr.Row(elem_classes="qzo-buttons"):
                            yes = gr.Button("Yes, discard it", variant="stop", min_width=120)
                            no = gr.Button("Keep it", min_width=120)
                    why = gr.HTML()
                charts = gr.HTML(elem_id="charts", js_on_load=SAY_WHICH_STEP)
            at = gr.Dropdown([ALL], value=ALL, label="Pictures of", elem_id="at", interactive=True,
                             info="Or click a point of a curve")  # fmt: skip
            previews = gr.HTML(elem_id="previews")
            with gr.Accordion("What the run said", open=False):
                log = gr.Textbox(show_label=False, container=False, lines=14, max_lines=14, autoscroll=True,
                                 interactive=False, elem_classes="qzo-log")  # fmt: skip
            with gr.Accordion("What each step did", open=False):
                method = gr.HTML()

        self.form_order = list(self.fields)
        planning = gr.Timer(PLANNING, active=False)
        about = [plan, start, same, planning]
        view = [filled, *about, *self.fields.values()]
        timer = gr.Timer(PERIOD)
        watched = [seen, wanted, live, chooser, card, preview, save, stop, resume, compare, why, charts, method, at,
                   previews, log, timer]  # fmt: skip
        # what is read at every look is no component that a look may change: Gradio would keep each of its versions
        chosen = gr.State(ALL)
        watched.append(chosen)
        asked = [run, seen, chosen]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([draft.change, known.change, tab.select], plainly(self.show), [draft, filled], view, **quiet)
        for name, field in self.fields.items():
            change = plainly(partial(self.change, name))
            picked = isinstance(field, gr.Dropdown | gr.Checkbox | gr.Radio)
            events = [field.input] if picked else [field.blur, field.submit]
            changed = gr.on(events, change, [draft, filled, field], [filled, *about, field], **quiet)
            changed.failure(lambda: {}, None, filled, **quiet)  # what was refused is put right at the next look
        planning.tick(plainly(self.planned), draft, about, trigger_mode="once", **quiet)
        start.click(plainly(self.start), draft, run, api_visibility="private").success(None, js=LOOK_AT_THE_RUN)
        load.upload(plainly(self.load), [draft, filled, load], view, **quiet)
        preview.click(plainly(self.preview), run, None, **quiet)
        save.click(plainly(self.save), run, None, **quiet)
        stop.click(plainly(self.stop), asked, watched, **quiet)
        resume.click(plainly(self.resume), asked, watched, **quiet)
        discard.click(lambda: gr.Group(visible=True), None, sure, **quiet)
        no.click(lambda: gr.Group(visible=False), None, sure, **quiet)
        yes.click(plainly(self.discard), run, [run, sure], **quiet)
        run.change(lambda: gr.Group(visible=False), None, sure, **quiet)
        charts.pick(self.pick, asked, watched, **quiet).then(None, js=LOOK_AT_THE_PICTURES)
        compare.click(lambda: gr.Tabs(selected="result"), None, tabs, **quiet)
        chooser.input(self.choose, chooser, run, **quiet)
        at.input(lambda at: at, at, chosen, **quiet).then(self.watch, asked, watched, **quiet)
        gr.on([run.change, tab.select], self.watch, asked, watched, **quiet)
        timer.tick(self.watch, asked, watched, trigger_mode="once", concurrency_limit=None, **quiet)

    # The settings

    def show(self, name: str, filled: dict) -> list:
        """Everything about a draft's settings, from its recipe. A field that is as it was `filled` is left alone:
        somebody may be typing there. Without a draft there is nothing to type."""
        if not name:
            closed = [gr.update(interactive=False) for _ in self.form_order]
            return [{}, self.plan(name), gr.Button(interactive=False), "", gr.Timer(active=False), *closed]
        settings = self.place.drafts.open(name).recipe()
        now = {n: form.shown(n, getattr(settings, n)) for n in self.form_order}
        hidden = OF_PICTURES if settings.texts else OF_TEXTS
        same = filled.get("") == hidden  # filled for a draft of this kind
        fields = [
            gr.skip() if same and n in filled and filled[n] == v
            else gr.update(value=v, interactive=True, visible=n not in hidden)
            for n, v in now.items()
        ]  # fmt: skip
        return [now | {"": hidden}, *self.about(name), *fields]

    def about(self, name: str) -> list:
        """What stands around the fields: the plan, the button, the same in a terminal, and the clock that waits for
        what a process still finds out."""
        ready = gr.Button(interactive=not self.obstacle(name))
        command, toml = self.texts(name)
        same = figures.listing("Command", command) + figures.listing("Recipe", toml, "recipe.toml")
        return [self.plan(name), ready, same, gr.Timer(active=self.unknown(name))]

    def planned(self, name: str) -> list:
        """What stands around the fields, once more is known."""
        return [gr.skip()] * 4 if name not in self.place.drafts.names() or self.unknown(name) else self.about(name)

    def unknown(self, name: str) -> bool:
        """Whether a process still plans what a step of the draft will need."""
        draft = self.place.drafts.open(name)
        return streams(draft.recipe()) and not self.obstacle(name) and self.streamed(draft).busy

    def streamed(self, draft: Draft) -> Planned | None:
        """The plan of a draft whose blocks stream; None where all of the model stays on the device."""
        if not streams(draft.recipe()):
            return None
        return planned.plan(self.place.jobs, draft, free_memory(draft.recipe().device, self.place.machine()))

    def change(self, field: str, name: str, filled: dict, value: Any) -> list:
        """Set one field of the draft's recipe by its name; what is impossible stays unset, and is said."""
        settings = self.place.drafts.open(name).change(**{field: form.given(field, value)})
        shown = form.shown(field, getattr(settings, field))
        return [filled | {field: shown}, *self.about(name), gr.skip() if shown == value else shown]

    def load(self, name: str, filled: dict, file: str) -> list:
        """The settings of a recipe, for the pictures that are here."""
        if not name:
            raise DraftError("there are no pictures or texts yet; bring some first, then load the recipe")
        draft, loaded = self.place.drafts.open(name), recipes.load(Path(file))
        if bool(loaded.texts) != draft.of_texts and (loaded.texts or loaded.images):
            theirs, ours = ("texts", "pictures") if loaded.texts else ("pictures", "texts")
            raise DraftError(f"that recipe teaches {theirs}, and this draft has {ours}; begin another draft for it")
        kept = ("images", "texts", "text_columns")
        draft.change(**{k: v for k, v in dataclasses.asdict(loaded).items() if k not in kept})
        return self.show(name, filled)

    def texts(self, name: str) -> tuple[str, str]:
        """The command line and the recipe that do what the button does."""
        file = self.place.drafts.open(name).file
        settings = recipes.dump(self.place.drafts.open(name).recipe())
        return f"qzo --runs-dir {shlex.quote(str(self.place.runs))} train {shlex.quote(str(file))}", settings

    def obstacle(self, name: str) -> str:
        """Why a draft cannot be trained, in one sentence, or nothing."""
        if not name:
            return "Begin with pictures or texts: load an example, or bring your own."
        try:
            self.check(self.place.drafts.open(name))
        except ValueError as error:
            return str(error)
        return ""

    def check(self, draft: Draft) -> None:
        """Raises DraftError, DataError or ModelError for what has to be mended before a run can begin."""
        settings = draft.recipe()
        if settings.texts:
            if obstacle := read(self.place.jobs, draft).obstacle(settings.skip_bad):
                raise DraftError(obstacle)
            return
        dataset.read(settings.images, settings.trigger, settings.caption)
        if learns(settings.model) == "text":
            raise DraftError(f"{settings.model} writes texts, and this draft has pictures; choose a model that draws")
        draft.buckets()

    def plan(self, name: str) -> str:
        """What pressing the button will do."""
        if obstacle := self.obstacle(name):
            return figures.notes([("flat", obstacle)])
        draft = self.place.drafts.open(name)
        settings = draft.recipe()
        known = MODELS.get(settings.model)
        model = ("model", known.title if known else settings.model)
        if settings.texts:
            found = read(self.place.jobs, draft)
            unit, work, count = "texts", found.longest, found.usable
            about = [model]
        else:
            contents = draft.contents()
            work = pixels_of(draft.buckets(), [picture.size for picture in contents.pictures.values()])
            unit, count = "pictures", len(contents.pictures)
            size = ("size", f"{draft.resolution().replace(',', ', ')} pixels")
            about = [("trigger", settings.trigger or "none"), model, size]
        held = dataset.held_out(count, settings.holdout)
        taught = f"{count:,}, of which {held} are kept out to measure with" if count > 0 else "they are being read"
        steps = recipes.budgeted(settings).steps
        sizes = sorted({settings.batch_at(step, max(0, count - held)) for step in (0, steps - 1)})
        batches = " to ".join(f"{size:,}" for size in sizes)
        found = self.streamed(draft)
        needs = estimate(settings, work, self.place.jobs, self.place.machine(), found.facts if found else {})
        rows = [
            (unit, taught),
            *about,
            ("length", f"{steps:,} steps of {batches} {unit}"),
            ("time", time_needed(needs)),
            *memory_needed(needs, found),
            ("disk", disk_needed(needs)),
        ]
        if waiting := self.place.jobs.live():
            rows.append(("begins", f"by itself, when {title(waiting[0])} has left the device"))
        short = [("bad", problem) for problem in needs.problems()]
        short += [("bad", f"{found.complaint}.")] if found and found.complaint else []
        return figures.facts(title(name), rows, note="Time, memory and disk are estimates.") + figures.notes(short)

    # The run

    def start(self, name: str) -> str:
        """Begin a new run of the draft as it stands. Raises what the form or the pictures have wrong."""
        draft = self.place.drafts.open(name)
        self.check(draft)
        return self.place.jobs.start(draft.recipe(), name)

    def preview(self, run: str) -> None:
        self.place.jobs.ask(run, "preview")
        gr.Info("It is done at the end of this step", duration=4)

    def save(self, run: str) -> None:
        self.place.jobs.ask(run, "save")
        gr.Info("The style is saved when this step is done; the training goes on", duration=4)

    def stop(self, run: str, seen: dict, at: str) -> list:
        self.place.jobs.stop(run)
        return self.watch(run, seen, at)

    def resume(self, run: str, seen: dict, at: str) -> list:
        self.place.jobs.resume(run)
        return self.watch(run, seen, at)

    def discard(self, run: str) -> tuple[str, gr.Group]:
        """The run goes to the bin, and the one before it is taken up."""
        self.place.jobs.discard(run)
        return next(iter(self.place.jobs.names()), ""), gr.Group(visible=False)

    def pick(self, run: str, seen: dict, at: str, event: gr.EventData) -> list:
        """The pictures that are nearest to a point of a curve."""
        steps = pictured(self.place.jobs.run(run))[1:] if run in self.place.jobs.names() else []
        nearest = min(steps, key=lambda step: abs(step - float(event.step)), default=None)
        if nearest is None:
            return self.watch(run, seen, at)
        seen, *parts = self.watch(run, seen, f"step {nearest:,}")
        parts[PARTS.index("at")] = gr.Dropdown(value=f"step {nearest:,}")
        parts[PARTS.index("chosen")] = f"step {nearest:,}"
        return [seen, *parts]

    def choose(self, run: str) -> str:
        return run if run in self.place.jobs.names() else ""

    def watch(self, run: str, seen: dict, at: str) -> list:
        """What the run's folder says now; a part that is as it was is not sent again."""
        if run not in self.place.jobs.names():
            return self._fresh(seen, dict.fromkeys(PARTS, gr.skip()) | {"live": gr.Column(visible=False)}, {})
        standing = self.place.jobs.look(run)
        folder = self.place.jobs.run(run)
        settings = settings_of(folder, self.place.jobs.job(run).recipe_file)
        steps = settings.steps if settings else 0
        names = self.place.jobs.names()
        series = Series.of(folder)
        unit = "texts" if settings and settings.texts else "pictures"
        shots = len(list(folder.previews.glob("*/*.png" if unit == "pictures" else "*.json")))
        accuracy = series.accuracy().y[-1] / 100 if series.accuracy().y else None
        steps_drawn = pictured(folder)
        choices = {ALL: None} | {f"step {step:,}": step for step in steps_drawn[1:]}
        left = at not in choices or seen.get("at", (run,))[0] != run  # the pictures were of another run
        at = ALL if left else at
        running = standing.state == "running"
        coming = None
        if standing.live and settings and settings.preview_every:
            coming = min(steps, (standing.status.get("step", 0) // settings.preview_every + 1) * settings.preview_every)
        marks = {
            "settings": (run, standing.live),
            "live": True,
            "chooser": (run, *names),
            "card": (run, standing.state, standing.message, tuple(standing.status.items())),
            "preview": (standing.live, running),
            "save": (standing.live, running),
            "stop": (standing.live, standing.live and standing.state != "stopping"),
            "resume": (not standing.live and standing.state != "done", not standing.why_not_resume, standing.changed),
            "compare": (not standing.live, folder.style_file.exists()),
            "why": (standing.state, standing.why_not_resume),
            "charts": (run, drawn(len(series.journal)), drawn(len(series.evaluations)), len(steps_drawn)),
            "method": (run, drawn(len(series.journal))),
            "at": (run, *steps_drawn),
            "chosen": left,
            "previews": (run, shots, at, standing.live),
            "log": tuple(self.place.jobs.job(run).log(3)),
            "timer": standing.live,
        }
        make = {
            # what goes on stands above; whoever opens the settings meanwhile finds them open
            "settings": lambda: gr.Accordion(open=False) if standing.live else gr.skip(),
            "live": lambda: gr.Column(visible=True),
            "chooser": lambda: gr.Dropdown([(title(n), n) for n in names], value=run, visible=len(names) > 1),
            "card": lambda: figures.card(standing, folder, steps, unit, accuracy),
            **{name: partial(button, *marks[name]) for name in ("preview", "save", "stop", "compare")},
            "resume": lambda: gr.Button(
                "Resume with what has changed" if standing.changed else "Resume",
                visible=marks["resume"][0],
                interactive=marks["resume"][1],
            ),
            "why": lambda: reason(standing),
            "charts": lambda: figures.charts(series, steps_drawn, unit),
            "method": lambda: figures.method(series, unit),
            # its value is the browser's own: a look that was asked for before a choice must not undo it
            "at": lambda: gr.Dropdown(
                choices=list(choices),
                visible=len(choices) > 1,
                **{"value": ALL} if left else {},
                label="Pictures of" if unit == "pictures" else "Answers of",
            ),
            "chosen": lambda: ALL if left else gr.skip(),
            "previews": lambda: (
                figures.previews(folder, run, prompts_of(settings), choices[at], coming)
                if unit == "pictures"
                else figures.answers(folder, choices[at])
            ),
            "log": lambda: "\n".join(self.place.jobs.job(run).log()),
            "timer": lambda: gr.Timer(PERIOD if standing.live else RESTING),
        }
        return self._fresh(seen, {k: f() if seen.get(k) != marks[k] else gr.skip() for k, f in make.items()}, marks)

    def _fresh(self, seen: dict, parts: dict, marks: dict) -> list:
        """The parts in their order. A text comes as an update: Gradio would keep a bare one that follows an update
        beside all earlier ones, for as long as the page is open."""
        return [marks, *(gr.update(value=p) if isinstance(p, str) else p for p in (parts[name] for name in PARTS))]


PARTS = (
    "settings", "live", "chooser", "card", "preview", "save", "stop", "resume", "compare", "why", "charts", "method",
    "at", "previews", "log", "timer", "chosen",
)  # fmt: skip


def button(visible: bool, interactive: bool) -> gr.Button:
    return gr.Button(visible=visible, interactive=interactive)


def time_needed(needs: Estimate) -> str:
    """How long a run will take, and how that is known."""
    if needs.seconds is None:
        return "not known yet: the first step is timed before the rest begins to count"
    how = f"as {needs.source} went" if needs.exact else f"reckoned from {needs.source}"
    return f"about {figures.duration(needs.seconds)}, {how}"


def memory_needed(needs: Estimate, found: Planned | None) -> list[tuple[str, str]]:
    """What a step needs of the device, and where the rest of the model waits."""
    free = f"{figures.size(needs.free_memory)} free"
    if found is None or found.complaint:
        most = f", most of it {needs.phase}" if needs.phase else ""
        return [("memory", f"about {figures.size(needs.memory)}{most}; {free}")]
    if not found.facts:
        return [("memory", "being planned: a step is run without data, which takes some seconds")]
    facts = found.facts
    rows = [("memory", f"{figures.size(facts['device'])} at the peak of a step, by its plan; {free}")]
    if not facts["away"]:
        return [*rows, ("blocks", f"all {facts['blocks']} stay on the device, {facts['rows']} rows a pass")]
    where = {"cpu": ("host memory", facts["host"]), "disk": ("the disk", facts["disk"])}[facts["tier"]]
    waits = f"{facts['away']} of {facts['blocks']} stream from {where[0]}, where {figures.size(where[1])} lie"
    return [*rows, ("blocks", f"{waits}; {facts['rows']} rows a pass, {figures.size(facts['moved'])} moved a step")]


def disk_needed(needs: Estimate) -> str:
    text = f"about {figures.size(needs.disk)}, {figures.size(needs.free_disk)} free"
    return text + (f"; first a download of {figures.size(needs.download)}" if needs.download else "")


def pictured(run: Run) -> list[int]:
    """The steps of a run that have pictures or answers, the untrained model first."""
    names = {*(f.parent.name for f in run.previews.glob("*/00.png")), *(f.stem for f in run.previews.glob("*.json"))}
    return sorted(int(name) for name in names if name.isdigit())


def reason(standing: Standing) -> str:
    """Why Resume is grey, where somebody may wonder."""
    if standing.live or standing.state == "done" or not standing.why_not_resume:
        return ""
    return figures.notes([("flat", f"Resume is off: {standing.why_not_resume}.")])


def settings_of(folder: Run, copy) -> recipes.Recipe | None:
    """The recipe of a run, or the copy it was started from while it has none yet."""
    for file in (folder.recipe_file, copy):
        if file.exists():
            try:
                return recipes.load(file)
            except recipes.RecipeError:
                return None  # of another version of this project: its pictures can be shown all the same
    return None


def prompts_of(settings: recipes.Recipe | None) -> list[str]:
    return [p.replace("[trigger]", settings.trigger) for p in settings.prompts] if settings else []

"""The tab of training: a few dials, the start, and everything that a run's folder says while it goes."""

import shlex
from functools import partial
from typing import Any

import gradio as gr

from app import figures, form
from app.drafts import title
from app.jobs import Standing
from app.place import Place
from app.plainly import plainly
from app.series import Series
from zo_engine import dataset
from zo_engine import recipe as recipes
from zo_engine.hub import MODELS
from zo_engine.run import Run

LENGTHS = [("Quick, 100 steps", 100), ("Normal, 300 steps", 300), ("Thorough, 1,000 steps", 1000)]
ELSEWHERE = ("images", "trigger", "model")  # fields with a place of their own, on the tabs before
DIALS = ("steps", "resolution", "prompts")
ADVANCED = tuple(name for name in form.FIELDS if name not in ELSEWHERE + DIALS)
LOOK_AT_THE_RUN = "() => setTimeout(() => document.querySelector('#run')?.scrollIntoView({behavior: 'smooth'}), 700)"
PERIOD = 1.5  # seconds between two looks at the run's folder


class Training:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place
        self.fields: dict[str, gr.components.Component] = {}  # of the form, by the recipe's names

    def build(self, draft: gr.State, run: gr.State, tabs: gr.Tabs, tab: gr.Tab) -> None:
        seen = gr.State({})
        with gr.Row(elem_classes="qzo-plan"):
            with gr.Column(scale=3, min_width=300):
                plan = gr.HTML()
                start = gr.Button("Train", variant="primary", size="lg", elem_id="train")
            with gr.Column(scale=4, min_width=300):
                length = gr.Radio(LENGTHS, label="Length")
                with gr.Row():
                    self.fields["steps"] = form.component("steps", min_width=120, info="Or any number")
                    self.fields["resolution"] = form.component("resolution", min_width=220, scale=2)
        with gr.Accordion("Advanced", open=False), gr.Tabs():
            with gr.Tab("Every other setting"), gr.Row(elem_classes="qzo-form"):
                for name in ADVANCED:
                    self.fields[name] = form.component(name, min_width=250)
            with gr.Tab("Preview prompts"):
                self.fields["prompts"] = form.component("prompts", lines=10)
            with gr.Tab("The same on the command line"):
                command = gr.Code(label="Command", language="shell", interactive=False)
                toml = gr.Code(label="recipe.toml", interactive=False, max_lines=24)

        with gr.Column(visible=False) as live:
            chooser = gr.Dropdown([], label="Run", interactive=True, elem_id="run")
            with gr.Row(equal_height=False, elem_classes="qzo-live"):
                with gr.Column(scale=2, min_width=300):
                    card = gr.HTML(elem_id="card")
                    with gr.Row(elem_classes="qzo-inline"):
                        stop = gr.Button("Stop and save", variant="stop", min_width=120)
                        resume = gr.Button("Resume", min_width=120)
                        compare = gr.Button("Compare", min_width=120)
                    why = gr.HTML()
                charts = gr.HTML(elem_id="charts")
            previews = gr.HTML(elem_id="previews")
            with gr.Accordion("What the run said", open=False):
                log = gr.Textbox(show_label=False, container=False, lines=14, max_lines=14, autoscroll=True,
                                 interactive=False, elem_classes="qzo-log")  # fmt: skip
            with gr.Accordion("Every figure, to look at closely", open=False):
                figure = gr.Radio(
                    ["Held-out loss", "Training loss", "Slopes |d| and clip", "Step size"], value="Training loss",
                    show_label=False, container=False,
                )  # fmt: skip
                plot = gr.LinePlot(None, x="step", y="value", color="line", height=320, container=False)
                draw = gr.Button("Draw", size="sm")

        self.form_order = list(self.fields)
        view = [plan, start, length, command, toml, *self.fields.values()]
        watched = [seen, live, chooser, card, stop, resume, compare, why, charts, previews, log]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([draft.change, tab.select], plainly(self.show), draft, view, **quiet)
        for name, field in self.fields.items():
            change = plainly(partial(self.change, name))
            events = [field.input] if isinstance(field, gr.Dropdown | gr.Checkbox) else [field.blur, field.submit]
            gr.on(events, change, [draft, field], [plan, length, command, toml, field], **quiet)
        length.input(plainly(self.length), [draft, length], [plan, command, toml, self.fields["steps"]], **quiet)
        start.click(plainly(self.start), draft, run, api_visibility="private").success(None, js=LOOK_AT_THE_RUN)
        stop.click(plainly(self.stop), [run, seen], watched, **quiet)
        resume.click(plainly(self.resume), [run, seen], watched, **quiet)
        compare.click(lambda: gr.Tabs(selected="result"), None, tabs, **quiet)
        chooser.input(self.choose, chooser, run, **quiet)
        gr.on([draw.click, figure.input], plainly(self.draw), [run, figure], plot, api_visibility="private")
        gr.on([run.change, tab.select], self.watch, [run, seen], watched, **quiet)
        timer = gr.Timer(PERIOD)
        timer.tick(self.watch, [run, seen], watched, trigger_mode="once", concurrency_limit=None, **quiet)

    # The settings

    def show(self, name: str) -> list:
        """Every setting of a draft, from its recipe."""
        if not name:
            settings = recipes.Recipe()
            fields = [form.shown(n, getattr(settings, n)) for n in self.form_order]
            return [self.plan(name), gr.Button(interactive=False), None, "", "", *fields]
        settings = self.place.drafts.open(name).recipe()
        ready = gr.Button(interactive=not self.obstacle(name))
        fields = [form.shown(n, getattr(settings, n)) for n in self.form_order]
        return [self.plan(name), ready, pace(settings.steps), *self.texts(name), *fields]

    def change(self, field: str, name: str, value: Any) -> list:
        """Set one field of the draft's recipe by its name; what is impossible stays unset, and is said."""
        draft = self.place.drafts.open(name)
        settings = draft.change(**{field: form.given(field, value)})
        shown = form.shown(field, getattr(settings, field))
        return [self.plan(name), pace(settings.steps), *self.texts(name), shown]

    def length(self, name: str, steps: int) -> list:
        settings = self.place.drafts.open(name).change(steps=int(steps))
        return [self.plan(name), *self.texts(name), settings.steps]

    def texts(self, name: str) -> tuple[str, str]:
        """The command line and the recipe that do what the button does."""
        file = self.place.drafts.open(name).file
        settings = recipes.dump(self.place.drafts.open(name).recipe())
        return f"qzo --runs-dir {shlex.quote(str(self.place.runs))} train {shlex.quote(str(file))}", settings

    def obstacle(self, name: str) -> str:
        """Why a draft cannot be trained, in one sentence, or nothing."""
        if not name:
            return "Begin with pictures: load an example, or bring your own."
        try:
            settings = self.place.drafts.open(name).recipe()
            dataset.read(settings.images, settings.trigger, settings.caption)
            self.place.drafts.open(name).buckets()
        except ValueError as error:
            return str(error)
        return ""

    def plan(self, name: str) -> str:
        """What pressing the button will do."""
        if obstacle := self.obstacle(name):
            return figures.notes([("flat", obstacle)])
        draft = self.place.drafts.open(name)
        settings, contents = draft.recipe(), draft.contents()
        known = MODELS.get(settings.model)
        resolution = settings.resolution or (known.resolution if known else "512")
        held = dataset.held_out(len(contents.pictures), settings.holdout)
        rows = [
            ("pictures", f"{len(contents.pictures)}, of which {held} are kept out to measure with"),
            ("trigger", settings.trigger or "none"),
            ("model", known.title if known else settings.model),
            ("size", f"{resolution.replace(',', ', ')} pixels"),
            ("length", f"{settings.steps:,} steps of {settings.batch_size} pictures"),
        ]
        if waiting := self.place.jobs.live():
            rows.append(("begins", f"by itself, when {title(waiting[0])} has left the device"))
        return figures.facts(title(name), rows)

    # The run

    def start(self, name: str) -> str:
        """Begin a new run of the draft as it stands. Raises what the form or the pictures have wrong."""
        settings = self.place.drafts.open(name).recipe()
        dataset.read(settings.images, settings.trigger, settings.caption)
        return self.place.jobs.start(settings, name)

    def stop(self, run: str, seen: dict) -> list:
        self.place.jobs.stop(run)
        return self.watch(run, seen)

    def resume(self, run: str, seen: dict) -> list:
        self.place.jobs.resume(run)
        return self.watch(run, seen)

    def choose(self, run: str) -> str:
        return run if run in self.place.jobs.names() else ""

    def watch(self, run: str, seen: dict) -> list:
        """What the run's folder says now; a part that is as it was is not sent again."""
        if run not in self.place.jobs.names():
            return self._fresh(seen, {"live": gr.Column(visible=False)} | dict.fromkeys(PARTS[1:], gr.skip()), {})
        standing = self.place.jobs.look(run)
        folder = self.place.jobs.run(run)
        settings = settings_of(folder, self.place.jobs.job(run).recipe_file)
        steps = settings.steps if settings else 0
        names = self.place.jobs.names()
        series = Series.of(folder)
        shots = len(list(folder.previews.glob("*/*.png")))
        marks = {
            "live": True,
            "chooser": (run, *names),
            "card": (run, standing.state, standing.message, tuple(standing.status.items())),
            "stop": standing.live and standing.state != "stopping",
            "resume": standing.why_not_resume,
            "compare": folder.style_file.exists(),
            "why": (standing.state, standing.why_not_resume),
            "charts": (run, len(series.journal), len(series.evaluations)),
            "previews": (run, shots),
            "log": tuple(self.place.jobs.job(run).log(3)),
        }
        make = {
            "live": lambda: gr.Column(visible=True),
            "chooser": lambda: gr.Dropdown(choices=[(title(n), n) for n in names], value=run),
            "card": lambda: figures.card(standing, folder, steps),
            "stop": lambda: gr.Button(interactive=marks["stop"]),
            "resume": lambda: gr.Button(interactive=not standing.why_not_resume),
            "compare": lambda: gr.Button(interactive=marks["compare"]),
            "why": lambda: reason(standing),
            "charts": lambda: figures.charts(series),
            "previews": lambda: figures.previews(folder, run, prompts_of(settings)),
            "log": lambda: "\n".join(self.place.jobs.job(run).log()),
        }
        return self._fresh(seen, {k: f() if seen.get(k) != marks[k] else gr.skip() for k, f in make.items()}, marks)

    def _fresh(self, seen: dict, parts: dict, marks: dict) -> list:
        return [marks, *(parts[name] for name in PARTS)]

    def draw(self, run: str, which: str):
        """One figure with axes and a tooltip, thinned."""
        import pandas

        series = Series.of(self.place.jobs.run(run))
        return pandas.DataFrame(series.table(which), columns=["step", "value", "line"])


PARTS = ("live", "chooser", "card", "stop", "resume", "compare", "why", "charts", "previews", "log")


def pace(steps: int) -> int | None:
    """The length that the radio shows for a number of steps, if it is one of them."""
    return steps if steps in [value for _, value in LENGTHS] else None


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

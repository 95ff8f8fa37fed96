"""The texts of a draft on the tab of data: how they are understood, and as what the model will read them."""

from functools import partial
from typing import Any

import gradio as gr

from app import figures, form
from app.drafts import Draft, DraftError
from app.place import Place
from app.plainly import plainly
from app.reading import Reading, read
from zo_engine.texts import FORMS

TITLES = {
    "messages": "Chats, as OpenAI writes them",
    "sharegpt": "Chats, as ShareGPT writes them",
    "alpaca": "Instruction and output",
    "prompt": "Prompt and answer",
    "label": "Text and label",
    "text": "Plain text",
}
FIELDS = {form.name: tuple(form.fields) for form in FORMS}
OPTIONAL = {form.name: form.optional for form in FORMS}
MOST = max(map(len, FIELDS.values()))  # columns that a form has
UNUSED = ("not used", "")
PERIOD = 0.7  # seconds between two looks at what the reading process has said


class Texts:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def dials(self) -> None:
        """What stands beside the chooser of drafts."""
        self.answers = gr.Checkbox(
            label="Learn the answers alone", info="Off: the prompts as well", scale=2, min_width=200
        )
        self.length = gr.Number(
            label="Length", info="Tokens of a text; what is longer is cut off", precision=0, scale=2
        )

    def build(self, draft: gr.State, known: gr.State) -> None:
        with gr.Row(elem_classes="qzo-texts"):
            with gr.Column(scale=4, min_width=300):
                summary = gr.HTML(elem_id="texts")
                skip = gr.Checkbox(label="Leave out the rows that cannot be used", visible=False, elem_id="skip")
                with gr.Accordion("Which columns are what", open=False), gr.Row(elem_classes="qzo-form"):
                    kind = gr.Dropdown([(TITLES[n], n) for n in TITLES], label="Form", interactive=True)
                    columns = [gr.Dropdown([], label=f"Column {i + 1}", interactive=True) for i in range(MOST)]
            with gr.Column(scale=5, min_width=300):
                rendered = gr.HTML(elem_id="rendered")
        bad = gr.HTML()
        timer = gr.Timer(PERIOD, active=False)

        self.view = view = [self.answers, self.length, summary, skip, kind, *columns, rendered, bad, timer, known]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        self.answers.input(plainly(partial(self.change, "completions_only")), [draft, self.answers], view, **quiet)
        length = plainly(partial(self.change, "length"))
        gr.on([self.length.blur, self.length.submit], length, [draft, self.length], view, **quiet)
        skip.input(plainly(partial(self.change, "skip_bad")), [draft, skip], view, **quiet)
        kind.input(plainly(self.form), [draft, kind], view, **quiet)
        for i, column in enumerate(columns):
            column.input(plainly(partial(self.column, i)), [draft, column], view, **quiet)
        timer.tick(plainly(self.wait), [draft, known], view, trigger_mode="once", **quiet)

    def nothing(self) -> list:
        """Its part of the tab where a draft has no texts."""
        return [gr.Checkbox(visible=False), gr.Number(visible=False), *[gr.skip()] * (5 + MOST), gr.Timer(active=False),
                gr.skip()]  # fmt: skip

    def show(self, name: str) -> list:
        """Everything about a draft of texts, as far as its process has read."""
        draft = self.place.drafts.open(name)
        settings, found = draft.recipe(), read(self.place.jobs, draft)
        kind = self.kind(draft, found)
        skip = gr.Checkbox(value=settings.skip_bad, visible=bool(found.bad and not found.complaint))
        return [
            gr.Checkbox(value=settings.completions_only, visible=True),
            gr.Number(value=settings.length, visible=True),
            figures.texts(draft, found, TITLES.get(kind, "")),
            skip,
            gr.Dropdown(choices=[(TITLES[n], n) for n in TITLES], value=kind or None),
            *self.columns(draft, found, kind),
            figures.rendered(found),
            figures.bad_rows(found.problems, found.bad),
            gr.Timer(active=found.busy),
            f"{name} {sorted(found.facts)} {found.bad} {found.complaint}",
        ]

    def wait(self, name: str, seen: str) -> list:
        """What the process has said since the last look."""
        if name not in self.place.drafts.names() or not self.place.drafts.open(name).of_texts:
            return self.nothing()
        shown = self.show(name)
        return shown if shown[-1] != seen else [*[gr.skip()] * (len(shown) - 2), shown[-2], gr.skip()]

    def kind(self, draft: Draft, found: Reading) -> str:
        """The form that was chosen or recognised, or nothing."""
        return given(draft).get("form") or found.facts.get("form", "")

    def columns(self, draft: Draft, found: Reading, kind: str) -> list[Any]:
        """A chooser for each field of the form."""
        fields, there = FIELDS.get(kind, ()), found.facts.get("columns", [])
        mapping = found.facts.get("mapping", {}) | given(draft)
        shown = []
        for name in fields:
            choices = [*([UNUSED] if name in OPTIONAL[kind] else []), *((column, column) for column in there)]
            now = mapping.get(name, "" if name in OPTIONAL[kind] else None)
            if now and now not in there:
                choices.append((now, now))  # what a recipe says may be wrong, and must be seen
            shown.append(gr.Dropdown(choices=choices, value=now, label=form.label(name), visible=True))
        return shown + [gr.Dropdown(visible=False)] * (MOST - len(fields))

    # What is chosen

    def change(self, field: str, name: str, value: Any) -> list:
        """Set one field of the draft's recipe."""
        self.place.drafts.open(name).change(**{field: form.given(field, value)})
        return self.show(name)

    def form(self, name: str, kind: str) -> list:
        """Read the rows in this form; its columns are recognised, or chosen next."""
        if kind not in FIELDS:
            raise DraftError(f"there is no form {str(kind)[:40]!r}")
        self.place.drafts.open(name).change(text_columns=(f"form={kind}",))
        return self.show(name)

    def column(self, number: int, name: str, column: str | None) -> list:
        """Take a field of the form from this column."""
        draft = self.place.drafts.open(name)
        kind = self.kind(draft, read(self.place.jobs, draft))
        fields = FIELDS.get(kind, ())
        if number >= len(fields):
            raise DraftError("choose the form of the rows first")
        chosen = {n: c for n, c in given(draft).items() if n in fields} | {fields[number]: column}
        unused = OPTIONAL[kind]  # said aloud: what is called like the field would be recognised again
        entries = [f"{n}={c or ''}" for n, c in {"form": kind, **chosen}.items() if c or n in unused]
        draft.change(text_columns=tuple(entries))
        return self.show(name)


def given(draft: Draft) -> dict[str, str]:
    """What the draft's recipe says of the columns."""
    return draft.recipe().text_fields

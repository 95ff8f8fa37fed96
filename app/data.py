"""The tab of data: bring pictures or texts, and see what will be learnt from them."""

from pathlib import Path

import gradio as gr

from app import figures
from app.drafts import EXAMPLES, TEXTS, DraftError, title
from app.pictures import UPLOADS, Pictures
from app.place import Place
from app.plainly import plainly
from app.texts import Texts
from zo_engine import dataset, texts

# one listener on the whole component, which stays when its content is drawn anew
SAY_WHICH_EXAMPLE = """
element.addEventListener('click', (e) => {
  const card = e.target.closest('[data-example]');
  if (card) trigger('example', {name: card.dataset.example});
});
"""


class Data:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place, self.pictures, self.texts = place, Pictures(place), Texts(place)

    def build(self, draft: gr.State, read: gr.State, tabs: gr.Tabs) -> None:
        with (
            gr.Accordion(
                "Begin with pictures in one style, or with texts", open=True, elem_classes="qzo-begin"
            ) as begin,
            gr.Row(equal_height=False),
        ):
            with gr.Column(scale=3, min_width=280):
                examples = gr.HTML(figures.examples(), js_on_load=SAY_WHICH_EXAMPLE)
            with gr.Column(scale=2, min_width=280):
                upload = gr.File(
                    label="Your own: pictures, a ZIP of them, or a file of texts",
                    file_count="multiple",
                    file_types=list(dict.fromkeys([*UPLOADS, *texts.SUFFIXES])),
                    height=176,
                )
                source = gr.Textbox(
                    label="Or a folder of pictures, a file of texts, or a data set of the hub",
                    info="As it is called on the machine that runs this page",
                    placeholder="/home/me/pictures, /data/chats.jsonl, or org/name",
                    max_lines=1,
                )
                use = gr.Button("Use this")
        with gr.Row(elem_classes="qzo-inline", visible=False) as top:
            chooser = gr.Dropdown(
                [],
                label="Draft",
                info="Kept on disk: reload or restart at any time",
                interactive=True,
                scale=2,
                min_width=200,
            )
            self.pictures.dials()
            self.texts.dials()
        with gr.Column(visible=False) as area_of_pictures:
            self.pictures.build(draft)
        with gr.Column(visible=False) as area_of_texts:
            self.texts.build(draft, read)
        with gr.Column(visible=False) as foot:
            onward = gr.Button("Next: train on this", variant="primary", size="lg")
            away = gr.Button("Put this draft into the bin", variant="stop", size="sm")

        areas = [begin, top, chooser, area_of_pictures, area_of_texts, foot]
        view = [*areas, *self.pictures.view, *self.texts.view]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        private = {"api_visibility": "private"}
        draft.change(plainly(self.show), [draft, self.pictures.which], view, **quiet)
        examples.example(plainly(self.example), None, draft, **private).then(
            plainly(self.show), [draft, self.pictures.which], view, **quiet
        )
        upload.upload(plainly(self.upload), upload, [draft, upload], **private)
        gr.on([use.click, source.submit], plainly(self.source), source, draft, **private)
        chooser.input(self.choose, chooser, draft, **quiet)
        away.click(plainly(self.away), draft, draft, **private)
        onward.click(lambda: gr.Tabs(selected="train"), None, tabs, **quiet)

    def show(self, name: str, which: str = "all") -> list:
        """Everything about a draft, read from its folder."""
        if not name:
            nothing = gr.Dropdown(choices=[], value=None)
            areas = [gr.Accordion(open=True), gr.Row(visible=False), nothing, *[gr.Column(visible=False)] * 3]
            return [*areas, *self.pictures.nothing(), *self.texts.nothing()]
        of_texts = self.place.drafts.open(name).of_texts
        choices = [(title(n), n) for n in self.place.drafts.names()]
        shown = [gr.Column(visible=not of_texts), gr.Column(visible=of_texts), gr.Column(visible=True)]
        areas = [gr.Accordion(open=False), gr.Row(visible=True), gr.Dropdown(choices=choices, value=name), *shown]
        if of_texts:
            return [*areas, *self.pictures.nothing(), *self.texts.show(name)]
        return [*areas, *self.pictures.show(name, which), *self.texts.nothing()]

    # What is brought

    def example(self, event: gr.EventData) -> str:
        return self.place.drafts.example(str(event.name)).name

    def upload(self, files: list[str]) -> tuple[str, None]:
        """A new draft of what was uploaded: a file of texts, or pictures, named after the ZIP if there is one."""
        paths = [Path(f) for f in files or []]
        archive = next((p for p in paths if p.suffix.lower() == ".zip"), None)
        if paths and not archive and not any(p.suffix.lower() in dataset.PICTURES for p in paths):
            return self.upload_texts(paths), None
        draft = self.place.drafts.create(archive.stem if archive else "my style")
        try:
            draft.add(paths)
        except ValueError:
            self.place.drafts.bin(draft.name)  # nothing came of it
            raise
        return draft.name, None

    def upload_texts(self, paths: list[Path]) -> str:
        wrong = [p.name for p in paths if p.suffix.lower() not in texts.SUFFIXES]
        if wrong:
            kinds = f"a picture, a ZIP of pictures, nor a file of texts ({', '.join(texts.SUFFIXES)})"
            raise DraftError(f"{wrong[0]} is neither {kinds}")
        if len(paths) > 1:
            raise DraftError(f"that is {len(paths)} files of texts and no picture; bring one file of texts at a time")
        texts.columns(paths[0])  # refuses what cannot be read at all
        return self.place.drafts.upload_texts(paths[0]).name

    def source(self, path: str) -> str:
        """A new draft on what lies elsewhere: a folder is one of pictures, all else must be texts."""
        path = (path or "").strip()
        there = Path(path or "?").expanduser()
        if path and not there.is_dir() and (there.is_file() or texts.HUB.fullmatch(path)):
            if there.is_file():
                texts.columns(path)
            return self.place.drafts.create_texts(path).name
        return self.place.drafts.create(there.name or "my style", path or "?").name

    def choose(self, name: str) -> str:
        return name if name in EXAMPLES or name in TEXTS or name in self.place.drafts.names() else ""

    def away(self, name: str) -> str:
        """The draft goes to the bin, and the one changed before it is taken up."""
        self.place.drafts.bin(name)
        return (self.place.drafts.names() or [""])[0]

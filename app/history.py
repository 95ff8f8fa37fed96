"""The tab of runs: what was trained, and what may go."""

import gradio as gr

from app import figures
from app.drafts import title
from app.place import Place
from app.plainly import plainly
from app.train import settings_of


class History:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def build(self, run: gr.State, tab: gr.Tab) -> None:
        search = gr.Textbox(label="Search", placeholder="a name, a model or a trigger", max_lines=1)
        listed = gr.HTML()
        with gr.Accordion("Tidy up", open=False), gr.Row(elem_classes="qzo-inline"):
            chooser = gr.Dropdown([], label="Run", interactive=True, scale=3)
            away = gr.Button("Put it into the bin", variant="stop", scale=1, min_width=140)
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([tab.select, search.input, run.change], plainly(self.show), [run, search], [listed, chooser], **quiet)
        away.click(plainly(self.away), [chooser, run, search], [listed, chooser, run], **quiet)

    def show(self, current: str, search: str) -> list:
        """All runs, the newest first."""
        rows = []
        for name in self.place.jobs.names():
            folder = self.place.jobs.run(name)
            settings = settings_of(folder, self.place.jobs.job(name).recipe_file)
            what = (
                f"{settings.trigger or 'no trigger'}, on {settings.model}"
                if settings
                else "a recipe of another version"
            )
            if (search or "").lower() in f"{name} {title(name)} {what}".lower():
                used = sum(f.stat().st_size for f in folder.path.rglob("*") if f.is_file())
                rows.append((self.place.jobs.look(name), folder, what, figures.size(used)))
        choices = [(title(s.name), s.name) for s, *_ in rows if not s.live]
        return [figures.runs(rows, current), gr.Dropdown(choices=choices, value=None)]

    def away(self, name: str | None, current: str, search: str) -> list:
        if name:
            self.place.jobs.bin(name)
        gone = "" if name == current else current
        return [*self.show(gone, search), gone]

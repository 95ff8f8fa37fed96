"""The tab of runs: what was trained, and what may go."""

from pathlib import Path

import gradio as gr

from app import figures
from app.drafts import title
from app.jobs import JobError
from app.place import Place
from app.plainly import plainly
from app.train import settings_of


class History:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def build(self, draft: gr.State, run: gr.State, tabs: gr.Tabs, tab: gr.Tab) -> None:
        search = gr.Textbox(label="Search", placeholder="a name, a model or a trigger", max_lines=1)
        listed = gr.HTML()
        with gr.Accordion("Rename, use again, or put away", open=False, elem_id="tidy"):
            with gr.Row(elem_classes="qzo-inline"):
                chooser = gr.Dropdown([], label="Run", interactive=True, scale=3)
                again = gr.Button("Use its settings again", scale=1, min_width=170)
                away = gr.Button("Put it into the bin", variant="stop", scale=1, min_width=170)
            with gr.Row(elem_classes="qzo-inline"):
                wish = gr.Textbox(label="New name", max_lines=1, scale=3)
                rename = gr.Button("Rename", scale=1, min_width=170)
            used = gr.HTML()
        view = [listed, chooser, used]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([tab.select, search.input, run.change], plainly(self.show), [run, search], view, **quiet)
        away.click(plainly(self.away), [chooser, run, search], [*view, run], **quiet)
        gr.on([rename.click, wish.submit], plainly(self.rename), [chooser, wish, run, search], [*view, run, wish],
              **quiet)  # fmt: skip
        again.click(plainly(self.again), chooser, [draft, tabs], **quiet)

    def show(self, current: str, search: str) -> list:
        """All runs, the newest first."""
        rows, total = [], 0
        for name in self.place.jobs.names():
            folder = self.place.jobs.run(name)
            settings = settings_of(folder, self.place.jobs.job(name).recipe_file)
            what = "a recipe of another version"
            if settings:
                taught = Path(settings.texts).name if settings.texts else settings.trigger or "no trigger"
                what = f"{taught}, on {settings.model}"
            if (search or "").lower() in f"{name} {title(name)} {what}".lower():
                used = space(folder.path)
                total += used
                rows.append((self.place.jobs.look(name), folder, what, figures.size(used)))
        choices = [(title(s.name), s.name) for s, *_ in rows if not s.live]
        binned = self.place.runs / ".bin"
        used = f"{len(rows)} run{'' if len(rows) == 1 else 's'}, {figures.size(total)} in all."
        if away := space(binned):
            used += f" The bin holds {figures.size(away)}; empty it by deleting {binned}."
        return [figures.runs(rows, current), gr.Dropdown(choices=choices, value=None), figures.notes([("flat", used)])]

    def away(self, name: str | None, current: str, search: str) -> list:
        self.place.jobs.bin(chosen(name))
        gone = "" if name == current else current
        return [*self.show(gone, search), gone]

    def rename(self, name: str | None, wish: str, current: str, search: str) -> list:
        now = self.place.jobs.rename(chosen(name), wish or "")
        current = now if name == current else current
        return [*self.show(current, search), current, ""]

    def again(self, name: str | None) -> list:
        """A draft with the data and the settings of a run, ready to be changed and trained."""
        run = self.place.jobs.run(chosen(name))
        settings = settings_of(run, self.place.jobs.job(run.path.name).recipe_file)
        if settings is None:
            raise JobError(f"{name} has no recipe that this version can read; begin with its data instead")
        return [self.place.drafts.again(settings).name, gr.Tabs(selected="train")]


def chosen(name: str | None) -> str:
    if not name:
        raise JobError("choose a run first; one that is still going must be stopped before")
    return name


def space(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

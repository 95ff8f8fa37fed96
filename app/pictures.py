"""The pictures of a draft on the tab of data: check them, write their captions."""

from pathlib import Path

import gradio as gr

from app import figures
from app.drafts import Contents, Draft
from app.place import Place
from app.plainly import plainly
from zo_engine import dataset

# one listener on the whole component, which stays when its content is drawn anew
SAY_WHICH_PICTURE = """
const waiting = new Map();  // text field -> when it is saved if nothing more is typed
const save = async (field) => {
  clearTimeout(waiting.get(field));
  waiting.delete(field);
  const name = field.dataset.name;
  const draft = field.closest('[data-draft]').dataset.draft;
  const said = field.closest('figure').querySelector('small');
  const text = field.value;
  said.textContent = 'saving';
  try {
    const answer = await server.save(draft, name, text);
    if (field.value !== text) return;  // typed on since: the next answer counts
    said.textContent = answer.text;
    said.className = answer.kind;
  } catch (error) {
    said.textContent = 'not saved: the server cannot be reached';
    said.className = 'bare';
  }
  trigger('saved');
};
element.addEventListener('input', (e) => {
  if (e.target.dataset.name === undefined) return;
  clearTimeout(waiting.get(e.target));
  waiting.set(e.target, setTimeout(save, 600, e.target));
});
element.addEventListener('change', (e) => {
  if (e.target.dataset.name !== undefined) save(e.target);
});
element.addEventListener('click', (e) => {
  const button = e.target.closest('[data-remove]');
  if (button) trigger('remove', {name: button.dataset.remove});
});
"""
UPLOADS = ["image", ".txt", ".caption", ".jsonl", ".zip"]
FILTERS = [("All pictures", "all"), ("Without a caption", "bare")]


class Pictures:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def dials(self) -> None:
        """What stands beside the chooser of drafts."""
        self.word = gr.Textbox(label="Trigger word", info="Calls the style; [trigger] in captions", scale=2)
        self.which = gr.Radio(FILTERS, value="all", label="Show", scale=2)

    def build(self, draft: gr.State) -> None:
        trigger, which = self.word, self.which
        summary = gr.HTML()
        out = gr.Button("Leave out what cannot be used", size="sm", visible=False)

        def save(given: list) -> dict[str, str]:
            """Called by the page, which sends what it gives as one list."""
            return self.save(*given)

        grid = gr.HTML(js_on_load=SAY_WHICH_PICTURE, server_functions=[save], elem_id="pictures")
        with gr.Accordion("Change all captions, or add pictures", open=False):
            with gr.Row(elem_classes="qzo-inline"):
                find = gr.Textbox(label="Find in all captions", scale=2)
                put = gr.Textbox(label="Replace by", scale=2)
                replace = gr.Button("Replace", scale=1, min_width=110)
            with gr.Row(elem_classes="qzo-inline"):
                front = gr.Textbox(label="Write in front of all captions", placeholder="a [trigger] of", scale=4)
                prefix = gr.Button("Write", scale=1, min_width=110)
            more = gr.File(label="Add to this draft", file_count="multiple", file_types=UPLOADS, height=120)

        self.view = view = [trigger, which, summary, out, grid]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        private = {"api_visibility": "private"}
        which.input(plainly(self.show), [draft, which], view, **quiet)
        gr.on([trigger.blur, trigger.submit], plainly(self.trigger), [draft, trigger, which], [summary, grid], **quiet)
        grid.saved(plainly(self.summary), draft, summary, **quiet)
        grid.remove(plainly(self.remove), [draft, which], view, **quiet)
        out.click(plainly(self.leave_out), [draft, which], view, **quiet)
        replace.click(plainly(self.replace), [draft, find, put, which], view, **private)
        prefix.click(plainly(self.prefix), [draft, front, which], view, **private)
        more.upload(plainly(self.more), [more, draft, which], [more, *view], **private)

    def nothing(self) -> list:
        """Its part of the tab where a draft has no pictures."""
        return [gr.Textbox(visible=False), gr.Radio(visible=False), "", gr.Button(visible=False), ""]

    def show(self, name: str, which: str = "all") -> list:
        """Everything about a draft, read from its folder."""
        draft = self.place.drafts.open(name)
        contents = draft.contents()
        word = gr.Textbox(value=draft.recipe().trigger, visible=True)
        out = gr.Button(visible=bool(contents.unusable) and Path(draft.recipe().images) == draft.own_images)
        return [word, gr.Radio(visible=True), summary(draft, contents), out, figures.pictures(draft, contents, which)]

    def more(self, files: list[str], name: str, which: str) -> list:
        count = self.place.drafts.open(name).add([Path(f) for f in files or []])
        gr.Info(f"{count} files added", duration=4)
        return [None, *self.show(name, which)]

    # What is edited

    def trigger(self, name: str, word: str, which: str) -> list:
        draft = self.place.drafts.open(name)
        if draft.recipe().trigger != (word := " ".join((word or "").split())):
            draft.change(trigger=word)
        contents = draft.contents()
        return [summary(draft, contents), figures.pictures(draft, contents, which)]

    def save(self, name: str, picture: str, text: str) -> dict[str, str]:
        """Save one caption under the name of its picture; gives what to say below its text field."""
        try:
            draft = self.place.drafts.open(str(name))
            draft.caption(str(picture), str(text))
            return figures.caption_note(draft.contents().pictures[picture].caption, draft.recipe().trigger)
        except (ValueError, OSError) as error:
            return {"text": f"not saved: {error}", "kind": "bare"}

    def summary(self, name: str) -> str:
        draft = self.place.drafts.open(name)
        return summary(draft, draft.contents())

    def remove(self, name: str, which: str, event: gr.EventData) -> list:
        self.place.drafts.open(name).remove(str(event.name))
        return self.show(name, which)

    def leave_out(self, name: str, which: str) -> list:
        """What cannot be used goes, and what can stays."""
        self.place.drafts.open(name).leave_out()
        return self.show(name, which)

    def replace(self, name: str, find: str, put: str, which: str) -> list:
        gr.Info(f"{self.place.drafts.open(name).replace(find or '', put or '')} captions changed", duration=4)
        return self.show(name, which)

    def prefix(self, name: str, text: str, which: str) -> list:
        gr.Info(f"{self.place.drafts.open(name).prefix(text or '')} captions changed", duration=4)
        return self.show(name, which)


def summary(draft: Draft, contents: Contents) -> str:
    """What stands well with the pictures, and what does not, each in one sentence."""
    total, lines = len(contents.pictures), []
    where = draft.recipe().images if Path(draft.recipe().images) != draft.own_images else ""
    lines.append(
        ("good" if contents.captioned == total else "flat",
         f"{contents.captioned} of {total} captioned" + (f", in {where}" if where else ", saved as you type"))
    )  # fmt: skip
    if contents.problems:
        bad = [f"{p.path.name} {p.message}" for p in contents.problems]
        of = total + len(bad)
        lines.append(("bad", f"{len(bad)} of {of} files cannot be used, and must go or be mended before training:"))
        lines += [("bad", text) for text in bad[:12]]
        if len(bad) > 12:
            lines.append(("bad", f"and {len(bad) - 12} more"))
    if contents.twins:
        pairs = "; ".join(f"{a} and {b}" for a, b in contents.twins[:3])
        many = "1 pair looks" if len(contents.twins) == 1 else f"{len(contents.twins)} pairs look"
        lines.append(("flat", f"{many} the same: {pairs}"))
    lines += [("flat", text) for text in dataset.warnings(list(contents.pictures.values()), draft.buckets())]
    return figures.notes(lines)

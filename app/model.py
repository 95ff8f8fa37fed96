"""The tab of models: what each needs, whether it is here, and whether it will work on this machine."""

import gradio as gr

from app import figures
from app.place import Place
from app.plainly import plainly
from zo_engine.hub import MODELS

ACCESS = (
    "Behind a licence. Once: open huggingface.co/{repo}, log in and accept it; make a token of the kind “read” at "
    "huggingface.co/settings/tokens; run “hf auth login” on this machine and look at the machine again."
)


class Models:
    """Components and what they do."""

    def __init__(self, place: Place):
        self.place = place

    def build(self, draft: gr.State, tab: gr.Tab) -> None:
        gr.HTML('<h2 class="qzo-title">Which model learns the style</h2>')
        choice = gr.Radio([(m.title, m.name) for m in MODELS.values()], value="tiny-sd3", label="Model")
        other = gr.Textbox(
            label="Or a diffusers folder on this machine, or a hub repository (org/name) of the same kind",
            placeholder="/models/sd3.5-large",
        )
        cards, machine = gr.HTML(), gr.HTML()
        again = gr.Button("Look at the machine again", size="sm")
        timer = gr.Timer(2)

        view, quiet = [choice, other, cards, machine], {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([draft.change, tab.select], plainly(self.show), draft, view, **quiet)
        choice.input(plainly(self.choose), [draft, choice], view, **quiet)
        gr.on([other.submit, other.blur], plainly(self.other), [draft, other], view, **quiet)
        again.click(self.again, None, [machine, timer], **quiet)
        timer.tick(self.wait, draft, [cards, machine, timer], **quiet)

    def show(self, name: str) -> list:
        """The draft's model among all, and the machine."""
        model = self.place.drafts.open(name).recipe().model if name else "tiny-sd3"
        known = model in MODELS
        return [model if known else None, "" if known else model, self.cards(model), self.machine()]

    def choose(self, name: str, model: str) -> list:
        """A known model, at its own resolution."""
        if name:
            draft = self.place.drafts.open(name)
            before = draft.recipe()
            # a resolution that belongs to the model that was chosen before means nothing to the next
            same = before.model == model
            draft.change(model=model, resolution=before.resolution if same else "")
            return self.show(name)
        return [model, "", self.cards(model), self.machine()]

    def other(self, name: str, model: str) -> list:
        if name and (model := (model or "").strip()) and self.place.drafts.open(name).recipe().model != model:
            self.place.drafts.open(name).change(model=model, resolution="")
        return self.show(name)

    def again(self) -> list:
        self.place.examine()
        return [self.machine(), gr.Timer(active=True)]

    def wait(self, name: str) -> list:
        """While the machine is being looked at; then the clock rests."""
        if not self.place.doctor.record():
            self.place.examine()  # the first time that anybody looks
        if self.place.doctor.alive():
            return [gr.skip(), gr.skip(), gr.skip()]
        model = self.place.drafts.open(name).recipe().model if name in self.place.drafts.names() else "tiny-sd3"
        return [self.cards(model), self.machine(), gr.Timer(active=False)]

    def cards(self, chosen: str) -> str:
        found = self.place.machine()
        can = {entry["model"]: entry for entry in found.get("can_run", ())}
        here = found.get("hub", {}).get("models", {})
        token = found.get("hub", {}).get("token", False)
        cards = []
        for known in MODELS.values():
            entry = can.get(known.name)
            there = here.get(known.name)
            status = {
                True: "on this machine",
                False: "not here yet; fetched when training starts",
                None: "not known yet",
            }
            if entry is None:
                verdict = ("flat", "The machine is being looked at.")
            elif not entry["device"]:
                verdict = ("bad", f"Will not work here: {entry['why']}.")
            elif there is False and not token and known.repo.startswith("stabilityai/"):
                verdict = ("flat", ACCESS.format(repo=known.repo))
            elif entry["device"] == "cpu" and known.name != "tiny-sd3":
                verdict = ("flat", f"Will work here, on the processor: {entry['why']}.")
            else:
                verdict = ("good", f"Will work here, on {entry['device']}: {entry['why']}.")
            facts = [
                ("files", status[there]),
                ("pictures of", f"{known.resolution.replace(',', ', ')} pixels"),
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
        return f'<div class="qzo-models">{"".join(cards)}</div>'

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

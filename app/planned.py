"""What `qzo plan` says of a draft whose blocks stream: asked once for every state of its settings, by a process of its
own, which runs a step on tensors without data. Imports neither torch nor gradio."""

import json
from dataclasses import dataclass
from typing import Any

from app.drafts import Draft
from app.jobs import Job, Jobs
from zo_engine.recipe import Recipe

READS = ("texts", "text_columns", "completions_only", "skip_bad", "holdout", "length", "model", "quantization",
         "resolution", "batch_size", "depth", "layers", "directions", "doublings", "doubles", "halvings", "steps",
         "budget", "rows", "space", "optimizer", "columns", "final_norm", "reward", "noise", "prior", "own_texts",
         "prompts", "evaluate_items", "memory", "offload", "transport")  # fmt: skip
FREE = 0.9  # of what is free, as a run takes with memory = "auto"


@dataclass(frozen=True)
class Planned:
    """`facts` are those of `plan.as_dict`, empty while they are not known."""

    facts: dict[str, Any]
    busy: bool
    complaint: str  # why no step fits, or ""


def streams(settings: Recipe) -> bool:
    """Whether a recipe bounds the device's memory, or lets its blocks wait elsewhere."""
    return bool(settings.memory) or settings.offload in ("cpu", "disk")


def plan(jobs: Jobs, draft: Draft, free: float) -> Planned:
    """What is known by now; a process is started where nothing is known of the settings as they stand. `free` are the
    bytes that the device has, of which a recipe that says "auto" takes its share."""
    settings, job = draft.recipe(), Job(jobs.runs, "plan", draft.name)
    bound = ("--memory", f"{FREE * free / 1e9:.2f}GB") if settings.memory == "auto" else ()
    job.ask(settings, READS, "plan", *bound)
    for line in job.log():
        if line.startswith("{"):
            try:
                return Planned(json.loads(line), False, "")
            except json.JSONDecodeError:
                break  # not whole yet
    busy = job.alive()
    return Planned({}, busy, "" if busy else job.complaint())

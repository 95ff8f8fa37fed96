"""What a run will need, said before it begins: time, memory and disk. Estimates, each with where it is from.

What earlier runs on this machine measured counts first; imports neither torch nor gradio.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from app.drafts import title
from app.figures import size
from app.jobs import Jobs
from zo_engine import dataset, doctor
from zo_engine.hub import arrived, find, repository
from zo_engine.recipe import Recipe, RecipeError, budgeted
from zo_engine.run import Run, RunError

LOOKED_AT = 40  # of the newest runs
# Settings that decide what one step costs; batch and pictures' sizes are reckoned with, the others must agree.
COST = (
    "model",
    "quantization",
    "space",
    "depth",
    "layers",
    "columns",
    "final_norm",
    "reward",
    "directions",
    "doublings",
    "doubles",
    "halvings",
    "optimizer",
    "prior",
    "own_texts",
    "rows",
    "device",
    "dtype",
)


@dataclass(frozen=True)
class Measured:
    """What an earlier run on this machine took. each: pixels of a picture, or tokens of a text; work: of a batch."""

    name: str
    step: float  # seconds a step
    memory: int  # bytes
    each: int
    work: int
    disk: int  # bytes of its folder
    steps: int
    rows: int  # of all its steps


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes; None where nothing is known yet."""

    seconds: float | None
    memory: float
    disk: float
    download: float
    source: str  # title of the run that was measured, or ""
    exact: bool  # that run did steps of the same kind and size
    free_memory: float
    free_disk: float
    phase: str = ""  # when most of the memory is needed, where that is known and not measured

    def problems(self) -> list[str]:
        """What there is too little of, each in one sentence; empty if all is well."""
        found = []
        if self.memory > self.free_memory:
            found.append(
                f"About {size(self.memory)} of memory may be needed, and {size(self.free_memory)} are free: close "
                "other programs, or set rows under Advanced to compute in smaller pieces."
            )
        if self.disk > self.free_disk:
            found.append(f"About {size(self.disk)} of disk are needed, and {size(self.free_disk)} are free: make room.")
        return found


def estimate(
    settings: Recipe, each: int, jobs: Jobs, machine: dict[str, Any], planned: dict[str, Any] | None = None
) -> Estimate:
    """What a run with these settings will need; `machine` is the doctor's report, `each` is the pixels of one picture
    or the tokens of the longest text, 0 while that is not known, `planned` what `qzo plan` says, where it was asked."""
    settings = budgeted(settings)
    work = settings.batch_size * each
    found = [m for name in jobs.names()[:LOOKED_AT] if (m := measured(Run(jobs.runs / name), settings))]
    like = next((m for m in found if m.work == work), found[0] if found else None)
    card = _card(settings.device, machine)
    previews = 2 + (settings.steps // settings.preview_every if settings.preview_every else 0)
    drawn = previews * (len(settings.prompts) or 4) * each * 3  # bytes; a PNG takes less, a sheet is beside it
    fetched = 0.0
    if find(settings.model) is None and settings.model in doctor.DOWNLOADS:
        fetched = max(0.0, doctor.DOWNLOADS[settings.model] - arrived(repository(settings.model)))
    exact = like is not None and like.work == work
    known = like if work else None
    return Estimate(
        seconds=known.step * known.steps * (_rows(settings) / known.rows) * (each / known.each) if known else None,
        memory=planned["device"] if planned else like.memory if exact else doctor.need(settings.model, bool(card)),
        disk=drawn + (like.disk / like.steps if like else 20_000) * settings.steps,
        download=fetched,
        source=title(like.name) if like else "",
        exact=exact,
        free_memory=free_memory(settings.device, machine),
        phase="" if exact or planned else phase(settings.model, card is not None),
        free_disk=shutil.disk_usage(jobs.runs if jobs.runs.exists() else Path.cwd()).free,
    )


def measured(run: Run, settings: Recipe) -> Measured | None:
    """What a run took, if its steps are of the same kind."""
    try:
        theirs, status = run.recipe(), run.status()
    except (RecipeError, RunError):  # a start that never came to a step, or a recipe of another version
        return None
    same = all(getattr(theirs, name) == getattr(settings, name) for name in COST)
    same = same and bool(theirs.texts) == bool(settings.texts)
    if not same or not status.get("seconds_per_step") or not status.get("memory"):
        return None
    previews = sorted(run.previews.glob("*/00.png"))
    each = status.get("tokens", 0) if theirs.texts else _pixels(previews[0]) if previews else 0
    if not each:
        return None
    folders = (run.journal_file, run.evaluations_file, run.last_file, run.best_file, run.style_file)
    kept = sum(f.stat().st_size for f in folders if f.exists())
    steps = max(1, int(status["step"]))
    rows = _rows(dataclasses.replace(theirs, steps=steps))
    return Measured(run.path.name, status["seconds_per_step"], status["memory"], each,
                    theirs.batch_size * each, kept, steps, rows)  # fmt: skip


def pace(model: str, jobs: Jobs) -> tuple[str, float, int]:
    """(title, seconds, steps) of the newest run of a model that was timed on this machine, or ("", 0, 0)."""
    for name in jobs.names()[:LOOKED_AT]:
        try:
            theirs, status = Run(jobs.runs / name).recipe(), Run(jobs.runs / name).status()
        except (RecipeError, RunError):
            continue
        if theirs.model == model and status.get("seconds_per_step"):
            return title(name), status["seconds_per_step"] * theirs.steps, theirs.steps
    return "", 0.0, 0


def _rows(settings: Recipe) -> int:
    """What all steps cost together, in forward passes of a picture or text: later ones may cost more than the first."""
    if settings.optimizer != "gauss-newton":
        return settings.steps * settings.batch_size
    return sum(settings.directions_at(step) * settings.batch_at(step) for step in range(settings.steps))


def pixels_of(buckets: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> int:
    """Pixels of the size that most pictures are fitted to: that of the previews, too."""
    fitted = [dataset.choose_bucket(size, buckets) for size in sizes] or buckets
    width, height = max(set(fitted), key=fitted.count)
    return width * height


def _pixels(picture: Path) -> int:
    from PIL import Image

    with Image.open(picture) as image:
        return image.width * image.height


def phase(model: str, on_gpu: bool) -> str:
    """What a known model needs most of its memory for."""
    if model not in doctor.TRANSFORMERS:
        return ""
    encoders = doctor.TEXT_WEIGHTS * (2 if on_gpu else 4)
    return "while the captions are encoded" if encoders > doctor.TRANSFORMERS[model] else "while it trains"


def free_memory(device: str, machine: dict[str, Any]) -> float:
    """Bytes that are free on the device that a run would use: of the GPU, as the doctor found them, or of the host."""
    card = _card(device, machine)
    return card["memory"]["free"] if card else psutil.virtual_memory().available


def _card(device: str, machine: dict[str, Any]) -> dict[str, Any] | None:
    """The GPU that a run would use, if the doctor found one."""
    cards = [d for d in machine.get("torch", {}).get("devices", ()) if "memory" in d and d["nf4"] == "works"]
    if device in ("auto", "cuda"):
        return cards[0] if cards else None
    return next((c for c in cards if c["name"] == device), None)

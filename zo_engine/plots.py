"""What a run's figures look like: one PNG from the journal and the evaluations. Imports no torch."""

import io
import math
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from zo_engine.journal import Step
from zo_engine.run import Run, write_atomic

RAW, LINE, BAND, MARK = "#c7c9d9", "#5b4bd6", "#cfc9f5", "#c2571a"


def smooth(values: np.ndarray, memory: float = 0.95) -> np.ndarray:
    """Exponential average, corrected at its start; not-a-number is passed over."""
    out, average, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        out[i] = average / weight if weight else math.nan
    return out


def by_level(journal: list[Step]) -> list[list[Step]]:
    """The steps of each level of the model, told apart by their number of directions."""
    found: dict[int, list[Step]] = {}
    for record in journal:
        found.setdefault(len(record.slopes), []).append(record)
    return list(found.values())


def plot(run: Run, path: Path | None = None) -> Path:
    """Held-out loss with its error band, training loss, |d| under its clip, and step size, as one PNG."""
    journal, evaluations = run.journal(), run.evaluations()
    steps = np.array([r.step + 1 for r in journal])
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    held, train, slope, size = figure.subplots(2, 2).flat
    if evaluations:
        x = np.array([e["step"] for e in evaluations])
        mean = np.array([e["loss"] if e["loss"] is not None else np.nan for e in evaluations])
        error = np.array([e["error"] if e["error"] is not None else np.nan for e in evaluations])
        held.fill_between(x, mean - error, mean + error, color=BAND, lw=0, label="± standard error")
        held.plot(x, mean, color=LINE, marker="o", ms=3, label="held-out loss")
        if np.isfinite(mean).any():
            best = int(np.nanargmin(mean))
            held.plot(x[best], mean[best], "o", color=MARK, ms=8, label=f"best: {mean[best]:.4g} at step {x[best]}")
        held.legend(frameon=False)
    held.set_title("Held-out loss (fixed pictures, noise levels and noise)")
    loss = np.array([r.loss for r in journal])
    train.plot(steps, loss, color=RAW, lw=0.8, label="every step")
    train.plot(steps, smooth(loss), color=LINE, label="smoothed")
    train.set_title("Training loss")
    flat = [(r.step + 1, abs(d)) for r in journal for d in r.slopes if math.isfinite(d)]
    if flat:
        slope.plot(*zip(*flat, strict=True), ",", color="#8a8fb0", label="|d|")
        for i, level in enumerate(by_level(journal)):
            slope.plot([r.step + 1 for r in level], [r.clip for r in level], color=MARK, label=None if i else "clip C")
        slope.set_yscale("log")
    slope.set_title("Directional derivatives and their clip")
    for level, colour in zip(by_level(journal), cycle((LINE, MARK, "#3a8f7a")), strict=False):
        label = f"{len(level[0].slopes)} directions"
        size.plot([r.step + 1 for r in level], [r.step_size or np.nan for r in level], color=colour, label=label)
    size.set_yscale("log")
    size.set_title("Step size")
    for axes in (train, slope, size):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    for axes in (held, train, slope, size):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = path or run.plot_file
    write_atomic(path, buffer.getvalue())
    return path

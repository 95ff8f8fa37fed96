"""What a run's figures look like: one PNG from the journal and the evaluations. Imports no torch."""

import io
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from zo_engine.journal import Move, Step, gain, smoothing
from zo_engine.run import Run, write_atomic

RAW, LINE, BAND, MARK = "#c7c9d9", "#5b4bd6", "#cfc9f5", "#c2571a"


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average, corrected at its start; not-a-number is passed over."""
    out, average, weight, memory = np.empty(len(values)), 0.0, 0.0, smoothing(len(values))
    for i, value in enumerate(values):
        if math.isfinite(value):
            average, weight = memory * average + (1 - memory) * value, memory * weight + (1 - memory)
        out[i] = average / weight if weight else math.nan
    return out


def plot(run: Run, path: Path | None = None) -> Path:
    """Held-out loss with its error band, training loss, and what the method did, as one PNG."""
    journal, evaluations = run.journal(), run.evaluations()
    steps = np.array([r.step + 1 for r in journal])
    figure = Figure(figsize=(11, 7), dpi=110)
    # By hand: matplotlib's own layout takes as long as all the rest.
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.07, top=0.95, hspace=0.3)
    held, train, method, size = figure.subplots(2, 2).flat
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
    held.set_title("Held-out loss, always of the same examples")
    loss = np.array([r.loss for r in journal])
    train.plot(steps, loss, color=RAW, lw=0.8, label="every step")
    train.plot(steps, smooth(loss), color=LINE, label="smoothed")
    train.set_title("Training loss")
    if journal and isinstance(journal[0], Move):
        _moves(journal, method, size)
    else:
        _slopes(journal, method, size)
    for axes in (train, method, size):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    for axes in (held, train, method, size):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = path or run.plot_file
    write_atomic(path, buffer.getvalue())
    return path


def _logarithmic(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 of few decades, at 1 of many, as plain numbers: powers of ten take longer to typeset."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _slopes(journal: list[Step], method: Axes, size: Axes) -> None:
    flat = [(r.step + 1, abs(d)) for r in journal for d in r.slopes if math.isfinite(d)]
    if flat:
        method.plot(*zip(*flat, strict=True), ",", color="#8a8fb0", label="|d|")
        method.plot([r.step + 1 for r in journal], [r.clip for r in journal], color=MARK, label="clip C")
        _logarithmic(method)
    method.set_title("Directional derivatives and their clip")
    size.plot([r.step + 1 for r in journal], [r.step_size or np.nan for r in journal], color=LINE)
    _logarithmic(size)
    size.set_title("Step size")


def _moves(journal: list[Move], method: Axes, size: Axes) -> None:
    made = [r for r in journal if r.tried and r.tried[0]]
    gains = [gain(r.tried, r.errors, r.made) for r in made]
    method.plot([r.step + 1 for r in made], gains, "o-", ms=3, color=LINE)
    method.set_title("Gain of a step on fresh examples, percent of their loss")
    size.plot([r.step + 1 for r in made], [r.size or np.nan for r in made], "o-", ms=3, color=LINE, label="move (rms)")
    size.plot([r.step + 1 for r in made], [r.damping or np.nan for r in made], ".", color=MARK, label="damping")
    _logarithmic(size)
    size.set_title("Size of the move, and its damping")

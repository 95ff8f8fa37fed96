"""The figures of a run, read from where the last look ended, and thinned to what a screen can show."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from zo_engine.journal import gain, smoothing
from zo_engine.run import Run

SMOOTHED = 20  # steps; an average of fewer lags behind what it is to show
POINTS = 300  # of a curve: more than the pixels of a phone, and nothing for a browser to think about


@dataclass
class _Tail:
    """The whole lines of a growing file."""

    path: Path
    end: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> list[dict[str, Any]]:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < self.end:  # cut at a resume: from the start again
            self.end, self.lines = 0, []
        if size > self.end:
            with open(self.path, "rb") as file:
                file.seek(self.end)
                new = file.read(size - self.end)
            whole = new[: new.rfind(b"\n") + 1]  # a last line may be torn
            for line in whole.splitlines():
                try:
                    self.lines.append(_kept(json.loads(line)))
                except json.JSONDecodeError:
                    continue  # a damaged line; resuming names it
            self.end += len(whole)
        return self.lines


def _kept(line: dict[str, Any]) -> dict[str, Any]:
    """What curves need of a line. A number for each direction or item would be kilobytes a step, for as long as a page
    is open: of slopes their mean is left, of weights and items nothing."""
    slopes = [abs(d) for d in line.get("slopes", ()) if d is not None]
    kept = {sys.intern(name): value for name, value in line.items() if name not in ("weights", "slopes", "items")}
    return kept | {"slope": sum(slopes) / len(slopes)} if slopes else kept


_tails: dict[Path, _Tail] = {}
_lock = Lock()


def _read(path: Path) -> list[dict[str, Any]]:
    with _lock:
        return list(_tails.setdefault(path, _Tail(path)).read())


@dataclass(frozen=True)
class Curve:
    """Points of one line; `low` and `high` are the edges of its band, where it has one."""

    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Series:
    """The figures of one run."""

    journal: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def of(cls, run: Run) -> "Series":
        evaluations = [e for e in _read(run.evaluations_file) if e.get("loss") is not None]
        # a resumed run may have measured a step again: the last word counts
        by_step = {e["step"]: e for e in evaluations}
        return cls(_read(run.journal_file), [by_step[step] for step in sorted(by_step)])

    def held_out(self) -> Curve:
        """The held-out loss with its standard error against the start, item by item."""
        rows = [[e["step"], e["loss"], e.get("change_error") or 0.0] for e in self.evaluations]
        mean, error = _curves(rows, 2)
        low, high = ([y + side * e for y, e in zip(mean.y, error.y, strict=True)] for side in (-1, 1))
        return Curve(mean.x, mean.y, low, high)

    def accuracy(self) -> Curve:
        """The share of held-out questions answered right, in percent; empty where examples have no choices."""
        return _curves([[e["step"], 100 * e["accuracy"]] for e in self.evaluations if "accuracy" in e], 1)[0]

    def training(self) -> list[Curve]:
        """The training loss of every step, and smoothed."""
        rows, average, weight = [], 0.0, 0.0
        memory = smoothing(len(self.journal)) if len(self.journal) >= SMOOTHED else 0.0
        for line in self.journal:
            loss = line.get("loss")
            if loss is not None and math.isfinite(loss):
                average, weight = memory * average + (1 - memory) * loss, memory * weight + (1 - memory)
                rows.append([line["step"] + 1, loss, average / weight])
        return _curves(rows, 2)

    def gains(self) -> Curve:
        """By how many percent each step lowered the loss of examples that it was not made from."""
        rows = []
        for line in self.journal:
            found = gain(line.get("tried", ()), line.get("errors", ()), line.get("made", 0))
            if found is not None:
                rows.append([line["step"] + 1, found])
        return _curves(rows, 1)[0]

    def sizes(self) -> Curve:
        """How far each step moved a typical scale, in percent of it: theta is the logarithm of what a scale is
        multiplied by."""
        rows = [[line["step"] + 1, 100 * line["size"]] for line in self.journal if line.get("size") is not None]
        return _curves(rows, 1)[0]

    def slopes(self) -> list[Curve]:
        """Of the methods that go by slopes: their mean, and the clip that bounds them."""
        rows = [[line["step"] + 1, line["slope"], line["clip"]] for line in self.journal if "slope" in line]
        return _curves(rows, 2)

    def step_sizes(self) -> Curve:
        """Of the methods that go by slopes: the factor between slope and move."""
        rows = [[line["step"] + 1, line["step_size"]] for line in self.journal if "step_size" in line]
        return _curves(rows, 1)[0]

    def best(self) -> dict[str, Any] | None:
        return min(self.evaluations, key=lambda e: e["loss"], default=None)

    def verdict(self) -> tuple[str, str]:
        """(good, flat or bad, one sentence): the last held-out loss against the start, by its own error."""
        if len(self.evaluations) < 2:
            return "flat", "This is the mark. The next point comes with the next step, and is measured against it."
        last, best = self.evaluations[-1], self.best()
        change, error = last.get("change"), last.get("change_error")
        if change is None or error is None:
            return "flat", "The held-out loss is not finite any more; stop the run, the best step is kept."
        share = abs(change) / self.evaluations[0]["loss"]
        after = "one step" if last["step"] == 1 else f"{last['step']:,} steps"
        if change < -2 * error:
            back = (
                f" The best was step {best['step']}, and that is what is kept." if best["loss"] < last["loss"] else ""
            )
            if flat := last.get("flat"):
                return "good", f"Converged: {share:.1%} below the start, and {flat}.{back}"
            return "good", f"Improving: {share:.1%} below the start after {after}, clearly more than chance.{back}"
        if change > 2 * error:
            return "bad", f"Worse than the start by {share:.1%}. The best step ({best['step']}) is what is kept."
        side = "below" if change < 0 else "above"
        return "flat", f"No clear change yet: {share:.1%} {side} the start after {after}, which is within its error."


def _curves(rows: list[list[float]], count: int) -> list[Curve]:
    """So many lines from rows of (step, value, ...), thinned."""
    points = thin(rows)
    return [Curve([p[0] for p in points], [p[i] for p in points]) for i in range(1, count + 1)]


def drawn(rows: int) -> int:
    """How many whole points so many rows make on a curve: drawing it again before there is one more shows nothing."""
    return rows // max(1, math.ceil(rows / POINTS))


def thin(rows: list[list[float]], points: int = POINTS) -> list[list[float]]:
    """Means of equally many neighbours, so that at most `points` are left."""
    size = math.ceil(len(rows) / points)
    if size <= 1:
        return rows
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]

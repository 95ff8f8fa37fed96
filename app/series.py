"""The figures of a run, read from where the last look ended, and thinned to what a screen can show."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from zo_engine.journal import smoothing
from zo_engine.run import Run

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
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # a damaged line; resuming names it
            self.end += len(whole)
        return self.lines


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
        points = thin([[e["step"], e["loss"], e.get("change_error") or 0.0] for e in self.evaluations])
        x, y, error = ([p[i] for p in points] for i in range(3))
        return Curve(
            x, y, [a - b for a, b in zip(y, error, strict=True)], [a + b for a, b in zip(y, error, strict=True)]
        )

    def training(self) -> tuple[Curve, Curve]:
        """The training loss of every step, and smoothed."""
        rows, average, weight, memory = [], 0.0, 0.0, smoothing(len(self.journal))
        for line in self.journal:
            loss = line.get("loss")
            if loss is not None and math.isfinite(loss):
                average, weight = memory * average + (1 - memory) * loss, memory * weight + (1 - memory)
                rows.append([line["step"] + 1, loss, average / weight])
        points = thin(rows)
        x, raw, smooth = ([p[i] for p in points] for i in range(3))
        return Curve(x, raw), Curve(x, smooth)

    def table(self, which: str) -> list[tuple[float, float, str]]:
        """(step, value, name of the line) of one figure."""
        if which == "Held-out loss":
            curve = self.held_out()
            return [(x, y, "held-out loss") for x, y in zip(curve.x, curve.y, strict=True)]
        if which == "Training loss":
            names = ("every step", "smoothed")
            return [
                (x, y, name)
                for name, curve in zip(names, self.training(), strict=True)
                for x, y in zip(curve.x, curve.y, strict=True)
            ]
        if which == "Size of a step":
            sizes = [[r["step"] + 1, r["size"] if "size" in r else r["step_size"]] for r in self.journal]
            return [(x, y, "size") for x, y in thin(sizes)]
        rows, names = [], ("gain on fresh pictures, percent",)
        for record in self.journal:
            slopes = [abs(d) for d in record.get("slopes", ()) if d is not None]
            tried = [loss for loss in record.get("tried", ()) if loss is not None]
            if slopes:
                rows.append([record["step"] + 1, sum(slopes) / len(slopes), record["clip"]])
                names = ("mean |d|", "clip")
            elif tried:
                rows.append([record["step"] + 1, 100 * (1 - min(tried) / tried[0])])
        thinned = thin(rows)
        return [(row[0], row[i], name) for i, name in enumerate(names, 1) for row in thinned]

    def best(self) -> dict[str, Any] | None:
        return min(self.evaluations, key=lambda e: e["loss"], default=None)

    def verdict(self) -> tuple[str, str]:
        """(good, flat or bad, one sentence): the last held-out loss against the start, by its own error."""
        if len(self.evaluations) < 2:
            return "flat", "The first held-out loss is the mark that the next ones are measured against."
        last, best = self.evaluations[-1], self.best()
        change, error = last.get("change"), last.get("change_error")
        if change is None or error is None:
            return "flat", "The held-out loss is not finite any more; stop the run, the best step is kept."
        share = abs(change) / self.evaluations[0]["loss"]
        if change < -2 * error:
            back = (
                f" The best was step {best['step']}, and that is what is kept." if best["loss"] < last["loss"] else ""
            )
            return "good", f"Improving: {share:.1%} below the start, clearly more than chance.{back}"
        if change > 2 * error:
            return "bad", f"Worse than the start by {share:.1%}. The best step ({best['step']}) is what is kept."
        return "flat", "No clear change from the start yet: the difference is within its error."


def thin(rows: list[list[float]], points: int = POINTS) -> list[list[float]]:
    """Means of equally many neighbours, so that at most `points` are left."""
    size = math.ceil(len(rows) / points)
    if size <= 1:
        return rows
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]

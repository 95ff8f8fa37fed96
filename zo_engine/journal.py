"""One line of the journal: the scalars that make one update. Imports no torch."""

import json
import math
from dataclasses import dataclass

import numpy as np


def short(value: float) -> float:
    """The shortest decimal that rounds to `value` in fp32: exact as fp32, and few characters in the journal."""
    with np.errstate(over="ignore"):  # infinity is a loss that is not finite, which has its own rule
        return float(str(np.float32(value)))


@dataclass(frozen=True)
class Step:
    step: int
    slopes: tuple[float, ...]  # directional derivatives d, one per direction, before clipping, exact in fp32
    clip: float  # C
    step_size: float  # 0 for a skipped step
    loss: float  # mean of all losses of the step; for people, not for replay
    search: tuple[float, ...] = ()  # (size, L(-size U), L(0), L(+size U)) where a line search was made

    @property
    def skipped(self) -> bool:
        return not all(math.isfinite(d) for d in self.slopes)

    def to_json(self) -> str:
        """Not-a-number and infinity become null: JSON has no words for them, and the step is skipped either way."""
        numbers = lambda values: [v if math.isfinite(v) else None for v in values]  # noqa: E731
        line = {"step": self.step, "loss": numbers([self.loss])[0], "clip": self.clip, "step_size": self.step_size}
        if self.search:
            line["search"] = numbers(self.search)
        return json.dumps({**line, "slopes": numbers(self.slopes)})

    @classmethod
    def from_json(cls, line: str) -> "Step":
        found = json.loads(line)
        numbers = lambda values: tuple(math.nan if v is None else float(v) for v in values)  # noqa: E731
        return cls(
            step=found["step"],
            slopes=numbers(found["slopes"]),
            clip=found["clip"],
            step_size=found["step_size"],
            loss=numbers([found["loss"]])[0],
            search=numbers(found.get("search", ())),
        )

"""One line of the journal: the numbers that make one update. Imports no torch."""

import json
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


def short(value: float) -> float:
    """The shortest decimal that rounds to `value` in fp32: exact as fp32, and few characters in the journal."""
    with np.errstate(over="ignore"):  # infinity is a loss that is not finite, which has its own rule
        return float(str(np.float32(value)))


class Record:
    """A step as a line of JSON. Each method keeps its own kind: `Step` or `Move`, told apart by their names."""

    def to_json(self) -> str:
        """Not-a-number and infinity become null: JSON has no words for them, and the step is skipped either way."""
        found = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return json.dumps({name: value for name, value in found.items() if value != []})


def smoothing(steps: int) -> float:
    """The memory of the exponential average of so many steps' losses: about the last tenth of them, 20 at most."""
    return 1 - 1 / min(20, max(2, steps / 10))


@dataclass(frozen=True)
class Step(Record):
    """What `zo.ZO` needs to make a step again."""

    step: int
    slopes: tuple[float, ...]  # directional derivatives d, one per direction, before clipping, exact in fp32
    clip: float  # C
    step_size: float  # 0 for a skipped step
    loss: float  # mean of all losses of the step; for people, not for replay
    search: tuple[float, ...] = ()  # (size, L(-size U), L(0), L(+size U)) where a line search was made

    @property
    def skipped(self) -> bool:
        return not all(math.isfinite(d) for d in self.slopes)


@dataclass(frozen=True)
class Move(Record):
    """What `newton.GaussNewton` needs to make a step again."""

    step: int
    weights: tuple[float, ...]  # how far theta goes along each direction, exact in fp32; empty for a skipped step
    size: float  # of the move, root mean square; like what follows, for people, not for replay
    loss: float  # mean loss of the batch before the move
    damping: float = 0.0  # what made the move
    tried: tuple[float, ...] = ()  # losses of a fresh batch: standing still, then with every damping

    @property
    def skipped(self) -> bool:
        return not self.weights


def read(line: str) -> Record:
    """A line of the journal. Raises ValueError (json.JSONDecodeError, too), KeyError or TypeError for anything else."""
    found = json.loads(line)
    kind = Move if "size" in found else Step
    return kind(**{f.name: _number(found.get(f.name, [])) for f in fields(kind)})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else None


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(float(_number(v)) for v in value)
    return math.nan if value is None else value

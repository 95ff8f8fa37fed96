"""One line of the journal: the numbers that make one update. Imports no torch."""

import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
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


def gain(tried: Sequence[float | None], errors: Sequence[float | None], made: int) -> float | None:
    """By how many percent a move lowered the loss of examples that it was not made from; None where it is not known.

    tried, errors, made: as in `Move`; in journals without errors, the least was made. A page asks of lines that may be
    damaged, too."""
    start = tried[0] if tried else None
    if errors:
        end = tried[made] if made < len(tried) else None
    else:
        end = min((loss for loss in tried if loss is not None), default=None)
    return 100 * (1 - end / start) if start and end is not None else None


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
    size: float  # of the move, root mean square; like the next three, for people, not for replay
    loss: float  # mean loss of the batch before the move
    damping: float = 0.0  # what made the move
    share: float = 1.0  # of the way that the damping gives
    # Read where a run goes on, to choose among the next tries:
    tried: tuple[float, ...] = ()  # losses of a fresh batch: standing still, then with every move
    errors: tuple[float, ...] = ()  # of each of these against standing still, standard errors
    made: int = 0  # which of `tried`
    # Again what makes the step:
    whole: int = 0  # one direction in so many moves whole layers; 0, as journals were before: none does

    @property
    def skipped(self) -> bool:
        return not self.weights


def read(line: str) -> Record:
    """A line of the journal. Raises JournalError for anything else."""
    return record(unseal(line))


def record(found: dict[str, Any]) -> Record:
    """The record of a line's values. Raises JournalError where one is missing, or is no number."""
    kind = Move if "size" in found else Step
    values = {}
    for f in fields(kind):
        several = f.type == tuple[float, ...]
        if f.name not in found and not several and f.default is MISSING:
            raise JournalError(f"has no {f.name}")
        value = found.get(f.name, [] if several else f.default)
        numbers = value if several and isinstance(value, list) else [value]
        fits = type(value) is int and value >= 0 if f.type is int else all(map(_is_number, numbers))
        if not fits or several != isinstance(value, list):
            raise JournalError(f"has {str(value)[:40]!r} as its {f.name}")
        values[f.name] = _number(value)
    line = kind(**values)
    if isinstance(line, Move) and line.errors:
        moves = len(line.tried) - 1
        if len(line.errors) != moves or line.made > moves:
            raise JournalError(f"has {len(line.errors)} errors, and number {line.made} made, of {moves} tries")
    return line


# A line ends with a checksum of itself, so that a bit that flips on a disk is noticed and not trained on.
_SEAL = re.compile(r', "crc": "([0-9a-f]{8})"\}$')


class JournalError(ValueError):
    """A line that is not as it was written; what is wrong, made to stand behind its number."""


def seal(line: str) -> str:
    """A line of JSON, an object, with its checksum at its end."""
    return f'{line[:-1]}, "crc": "{zlib.crc32(line.encode()):08x}"}}'


def unseal(line: str) -> dict[str, Any]:
    """The values of a line. One without a checksum, from before there were any, is taken as it is.

    Raises JournalError if the line does not fit its checksum, or is no object.
    """
    if match := _SEAL.search(line):
        line = line[: match.start()] + "}"
        if zlib.crc32(line.encode()) != int(match[1], 16):
            raise JournalError("is damaged: its checksum does not fit")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise JournalError("is damaged: it is not JSON") from None
    if not isinstance(found, dict):
        raise JournalError("is damaged: it is not an object")
    if "crc" in found:
        raise JournalError("is damaged: its checksum is not at its end")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 2**1000)


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(float(_number(v)) for v in value)
    return math.nan if value is None else value

"""Whether a run's held-out loss still falls, judged by its evaluations' own errors. Imports no torch.

Every evaluation has the same items, so a line through the last evaluations of each item says how much that item still
gained, and the spread of these gains over the items is the error of their mean: far less than that of the loss itself.
To it comes how far the means scatter about their own line, since a run does not walk straight. "Not clearly falling"
would be true of every short look; a loss counts as flat only where it is sure that little is left to gain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST = 5  # evaluations that are looked at, at least
WINDOW = 3  # the last so-manieth part of the steps is looked at
SMALL = 0.02  # of the whole fall: what a window may have brought, at most, to be called flat
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Trend:
    """What the steps since `since` brought: `gain` in units of the loss, its standard error, and the whole fall since
    the start of the run, without which there is nothing to be flat."""

    since: int
    gain: float
    error: float
    fall: float
    fall_error: float

    @property
    def flat(self) -> bool:
        learnt = self.fall > SURE * self.fall_error
        return learnt and self.gain + SURE * self.error < SMALL * self.fall

    @property
    def sentence(self) -> str:
        share, error = 100 * self.gain / self.fall, 100 * self.error / self.fall
        return (
            f"the held-out loss has stopped falling: the steps since {self.since} brought {share:.1f} ± {error:.1f} % "
            "of its whole fall"
        )


def trend(evaluations: Sequence[dict[str, Any]], since: int = 0) -> Trend | None:
    """The trend of the last third of the steps, not before `since`; None where that is too little to judge by.

    evaluations: in the order of their steps, each with "step", and "items" [n], the losses of the same n items.
    """
    whole = [e for e in evaluations if e["items"] and all(x is not None and math.isfinite(x) for x in e["items"])]
    whole = [e for e in whole if len(e["items"]) == len(whole[0]["items"])]
    if not whole or len(whole[0]["items"]) < 2:
        return None
    last = whole[-1]["step"]
    seen = [e for e in whole if e["step"] >= since and WINDOW * (last - e["step"]) <= last]
    if len(seen) < LEAST:
        return None
    steps = np.array([e["step"] for e in seen], dtype=float)
    losses = np.array([e["items"] for e in seen], dtype=float)  # [evaluations, items]
    away, length = steps - steps.mean(), steps[-1] - steps[0]
    square = float(away @ away)
    gains = -length * (away @ losses) / square  # of each item, over the window
    count = len(gains)
    about = losses.mean(1) - losses.mean() + away * gains.mean() / length
    scatter = math.sqrt(float(about @ about) / (len(seen) - 2))
    falls = np.array(whole[0]["items"], dtype=float) - losses[len(seen) // 2 :].mean(0)
    spread = lambda values: float(np.std(values, ddof=1)) / math.sqrt(count)  # noqa: E731
    return Trend(
        since=int(steps[0]),
        gain=float(gains.mean()),
        error=math.hypot(spread(gains), scatter * length / math.sqrt(square)),
        fall=float(falls.mean()),
        fall_error=math.hypot(spread(falls), scatter),  # the start is one look, and no better than the others
    )

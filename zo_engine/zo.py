"""Zeroth-order descent on the scales, from losses to the next theta: QZO as published, for any loss. No input, no
output, no model. Where the loss is a sum of squares, `newton` needs fewer passes.

Q-SPSA (QZO, arXiv:2505.13430, after Spall 1992 and MeZO, arXiv:2305.17333): along a random direction z,

    d = (L(theta + eps z) - L(theta - eps z)) / (2 eps),      g ~ mean over directions of d z

with both losses under common random numbers. Directional derivative clipping (DDC) replaces d by clip(d, -C, C). By
Stein's identity E[clip(d) z] = P(|d| <= C) g for one batch: the direction is kept, the length shrinks by one scalar.

Everything that a step does to theta is a function of its `Step` record: the journal of records *is* the run. The same
`ZO.apply` moves theta while training, when resuming and when a style is rebuilt from its journal. Every operation is
an elementwise multiply, add, divide or square root in a fixed order, so that the result is the same bits on any
device, with any chunking and any number of threads.
"""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from zo_engine.journal import Step, short
from zo_engine.noise import Layout, directions
from zo_engine.probes import Probes, along, central

LEAP = 10  # times eps: what one step may move theta, root mean square, where the run finds its own step size


def slopes(losses: Tensor, eps: float, directions: int) -> Tensor:
    """Losses of `probes.central` [2 * P * B or 2 * P] -> directional derivatives [P] in fp64."""
    plus, minus = losses.double().view(2, directions, -1).mean(-1)
    return (plus - minus) / (2 * eps)


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of |values| (nearest rank, no interpolation: the same float on every machine)."""
    ordered = sorted(abs(v) for v in values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor on the step size: linear warm-up, flat, then linear to zero over the last `decay` share of the run."""
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    fall = (steps - step) / (decay * steps) if decay and step >= steps * (1 - decay) else 1.0
    return min(rise, fall, 1.0)


class Update:
    """From gradient estimates to a direction of descent: plain, momentum or Adam, in replayable arithmetic."""

    def __init__(self, kind: str, size: int, device: torch.device | str, momentum: float, second: float):
        if kind not in ("sgd", "momentum", "adam"):
            raise ValueError(f"the optimizer is 'sgd', 'momentum' or 'adam', not {kind!r}")
        self.kind, self.momentum, self.second, self.count = kind, momentum, second, 0
        buffers = {"sgd": 0, "momentum": 1, "adam": 2}[kind]
        self.state = [torch.zeros(size, device=device) for _ in range(buffers)]

    def __call__(self, gradient: Tensor) -> Tensor:
        """The direction U of the update theta <- theta - step_size * U; [n] -> [n]. `fresh` is what this step alone
        says: the line search goes along it, since the best step along an average overshoots when it is made again
        and again."""
        self.count += 1
        self.fresh = gradient
        if self.kind == "sgd":
            return gradient
        mean = self._average(self.state[0], gradient, self.momentum)
        if self.kind == "momentum":
            return mean
        square = self._average(self.state[1], gradient * gradient, self.second)
        root = square.sqrt() + 1e-12
        self.fresh = gradient / root
        return mean / root

    def _average(self, average: Tensor, value: Tensor, beta: float) -> Tensor:
        """Exponential average with Adam's correction for its start (arXiv:1412.6980, section 3)."""
        average.mul_(beta).add_(value * (1 - beta))
        return average * _fp32(1 / (1 - beta**self.count))  # CUDA divides by a number in two roundings


class StepSize:
    """The step size that the run finds by itself: the minimum of a parabola through three losses along the update.

    Slope and curvature along U are averaged separately over the searches; the step is -slope / curvature, and moves
    by at most a factor `reach` at a time. Before the first search it is such that theta moves by eps (rms).
    """

    def __init__(self, every: int, memory: float = 0.8, reach: float = 4.0):
        self.every, self.memory, self.reach = every, memory, reach
        self.value: float | None = None
        self.slope = self.curvature = 0.0

    def due(self, step: int) -> bool:
        return step < 3 or step % self.every == 0

    def absorb(self, search: tuple[float, ...]) -> None:
        """Take in one search (size, L-, L0, L+), where + is along -U: downhill if the estimate is any good."""
        size, minus, centre, plus = search
        if not all(math.isfinite(loss) for loss in (minus, centre, plus)):
            self.value = size / self.reach
            return
        self.slope = self.memory * self.slope + (1 - self.memory) * (plus - minus) / (2 * size)
        self.curvature = self.memory * self.curvature + (1 - self.memory) * (plus - 2 * centre + minus) / size**2
        if self.slope >= 0:
            target = 0.0
        elif self.curvature <= 0:
            target = math.inf
        else:
            target = -self.slope / self.curvature
        self.value = min(max(target, size / self.reach), size * self.reach)

    def state(self) -> dict[str, float]:
        return {"search_value": self.value or 0.0, "search_slope": self.slope, "search_curvature": self.curvature}

    def restore(self, scalars: dict[str, float]) -> None:
        self.value = scalars["search_value"] or None
        self.slope, self.curvature = scalars["search_slope"], scalars["search_curvature"]


class ZO:
    """The state of a run: theta and what the next step needs, all of it rebuilt by replaying the journal."""

    def __init__(
        self,
        layout: Layout,
        *,
        seed: int,
        per_step: int,
        kind: str = "rademacher",
        eps: float = 1e-2,
        clip: float = 0.0,
        clip_quantile: float = 0.98,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        second: float = 0.99,
        step_size: float = 0.0,
        search_every: int = 10,
        device: torch.device | str = "cpu",
    ):
        """per_step: directions in one step. clip: a fixed C, or 0 for the running quantile `clip_quantile` of |d|.
        step_size: a fixed step, or 0 to find it by a line search every `search_every` steps."""
        self.layout, self.seed, self.per_step, self.kind, self.eps = layout, seed, per_step, kind, eps
        self.clip, self.clip_quantile = clip, clip_quantile
        self.theta = torch.zeros(layout.size, device=device)
        self.step = self.skipped = 0
        self.update = Update(optimizer, layout.size, device, momentum, second)
        self.fixed = step_size
        self.search = StepSize(search_every)
        self.recent: deque[float] = deque(maxlen=64 * per_step)

    def cost(self, step: int) -> int:
        """Directions of a step: all steps cost alike."""
        return self.per_step

    def directions(self) -> Tensor:
        """The directions of the next step [per_step, n]."""
        first = self.step * self.per_step
        return directions(
            self.kind, self.layout, self.seed, self.step, range(first, first + self.per_step), self.theta.device
        )

    def clip_level(self, slopes: list[float]) -> float:
        """C for the next step: fixed, or the quantile of |d| over the recent steps and this one."""
        finite = [d for d in (*self.recent, *slopes) if math.isfinite(d)]
        return self.clip or (quantile(finite, self.clip_quantile) if finite else 0.0)

    def descend(self, z: Tensor, slopes: list[float], clip: float) -> Tensor:
        """The direction of descent U [n] from this step's slopes; advances the optimizer's averages."""
        gradient = torch.zeros_like(self.theta)
        for direction, d in zip(z, slopes, strict=True):  # one after the other: the same rounding everywhere
            gradient.add_(direction * _fp32(min(max(d, -clip), clip)))
        return self.update(gradient.mul_(_fp32(1 / len(slopes))))

    def searches(self) -> bool:
        """Whether this step makes a line search along `update.fresh`: never along nothing."""
        due = self.search.value is None or self.search.due(self.step)
        return not self.fixed and due and bool(self.update.fresh.any())

    def advance(
        self, losses: Callable[[Probes, bool], Tensor], batch: int, own: bool = True, schedule: float = 1.0
    ) -> Step:
        """One live step: probe, estimate, search where one is due, move. Returns its record for the journal.

        losses(probes, fresh) gives one loss per row [R]: of this step's batch, or of a fresh one for the search.
        own: every example has directions of its own (gain space). A loss that is not finite skips the step.
        """
        z = self.directions()
        values = losses(central(z, self.eps, batch, own), False)
        found = tuple(short(d) for d in slopes(values, self.eps, len(z)).tolist())
        mean = short(values.double().mean().item())
        skipped = Step(self.step, found, 0.0, 0.0, mean)
        if skipped.skipped:
            self.skip()
            return skipped
        clip = short(self.clip_level(list(found)))
        descent = self.descend(z, list(found), clip)
        search: tuple[float, ...] = ()
        if self.searches():
            fresh = self.update.fresh
            size = short(min(self.search.value or self.reaching(1, fresh), self.reaching(LEAP, fresh)))
            three = losses(along(fresh, -size, batch), True).double().view(3, -1).mean(1)
            search = (size, *(short(loss) for loss in three.tolist()))
        size = self.choose(search)
        if not self.fixed:
            size = min(size, self.reaching(LEAP, descent))
        record = Step(self.step, found, clip, short(size * schedule), mean, search)
        self.move(descent, record)
        return record

    def reaching(self, leap: float, descent: Tensor) -> float:
        """The step size that moves theta by `leap` times eps, root mean square."""
        return leap * self.eps / max(descent.square().mean().sqrt().item(), 1e-30)

    def choose(self, search: tuple[float, ...]) -> float:
        """The step size, before any schedule; `search` is this step's line search, or empty."""
        if self.fixed:
            return self.fixed
        if search:
            self.search.absorb(search)
        return self.search.value or 0.0

    def move(self, descent: Tensor, record: Step) -> None:
        """theta <- theta - step_size * U, in the memory of U, which is used up."""
        self.update.fresh = None
        self.theta = torch.sub(self.theta, descent.mul_(_fp32(record.step_size)), out=descent)
        self.recent.extend(record.slopes)
        self.step += 1

    def apply(self, record: Step) -> None:
        """Replay one record of the journal. Raises ValueError if it is not the next one."""
        if record.step != self.step:
            raise ValueError(f"the journal jumps from step {self.step} to step {record.step}")
        if record.skipped:
            self.skip()
            return
        if len(record.slopes) != self.per_step:
            raise ValueError(f"step {record.step} has {len(record.slopes)} slopes, not {self.per_step}")
        descent = self.descend(self.directions(), list(record.slopes), record.clip)
        self.choose(record.search)
        self.move(descent, record)

    def skip(self) -> None:
        """A step with a loss that is not finite: theta and all averages stay as they are; it is counted."""
        self.step += 1
        self.skipped += 1

    # A checkpoint only saves time: replaying the journal from the start gives the same bits.

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors, scalars) that `restore` takes; the recent slopes come from the journal."""
        tensors = {"theta": self.theta} | {f"average.{i}": t for i, t in enumerate(self.update.state)}
        scalars = {"step": self.step, "skipped": self.skipped, "updates": self.update.count}
        return tensors, scalars | self.search.state()

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, float], journal: list[Step]) -> None:
        """Take up a state; `journal` holds at least the run's records up to its step."""
        self.theta = tensors["theta"].to(self.theta.device, copy=True)
        self.update.state = [
            tensors[f"average.{i}"].to(self.theta.device, copy=True) for i in range(len(self.update.state))
        ]
        self.step, self.skipped = int(scalars["step"]), int(scalars["skipped"])
        self.update.count = int(scalars["updates"])
        self.search.restore(scalars)
        self.recent.clear()
        for record in journal[: self.step]:
            if not record.skipped:
                self.recent.extend(record.slopes)


def _fp32(value: float) -> float:
    """Rounded to fp32, so that a scalar multiplies alike on every device."""
    return torch.tensor(value, dtype=torch.float32).item()

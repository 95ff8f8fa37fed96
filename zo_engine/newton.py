"""The method where the shape of the loss is known: Gauss-Newton in a random subspace, from forward passes alone.

A directional derivative keeps one number of a forward pass and forgets the rest. But a perturbed pass shows more than
the loss L: it shows how thousands of features f move, J z = (f(theta + eps z) - f(theta)) / eps, a column of their
Jacobian. Where a task gives features whose J'J is half the loss's Gauss-Newton matrix, L ~ L0 + 2 g'w + w'J'Jw holds
along any move w, and with the columns of K random directions Z, the same for all examples of a batch, the best move
inside their span is a small linear system:

    (Z'J'JZ + lambda I) w = -Z'g,      theta <- theta + Z w,      2 eps z'g = L(theta + eps z) - L(theta) - |eps J z|^2

The loss of a flow model is |e|^2, the squared norm of an error, which is its own feature: f = e, g = J'e. That of a
language model is a cross-entropy, whose features are square roots of probabilities (`tasks.text.token_features`).
(Levenberg and Marquardt's damped Gauss-Newton; in random subspaces: Cartis, Fowkes, Shao, arXiv:2211.09873; without
derivatives: Cartis, Roberts, arXiv:2102.12016.) Stiff directions no longer set the pace for flat ones, there is no step
size, and one pass a direction is enough: the curvature that makes one-sided differences wrong is part of the model.
What is made of the solution is tried on the batch of the next step: a handful of dampings, and shares of the way, for a
small batch's own noise is as large along stiff directions as along flat ones, where no damping tells them apart. A
small batch also says little about which of them is best, and the best of many on it is often one that only looks so.
But what kind of move helps changes slowly: a step counts fully, the one before it half, and so on, each in units of
its own error. The best of all that are better than standing still by a standard error is made; where none is,
theta stays.

A few of the directions move whole layers, all elements of one alike: what such a move does adds up over the elements,
and random directions go hardly at all along it.

Every step is a function of its `Move` record, in elementwise arithmetic of a fixed order: replaying the journal gives
theta bit for bit, on any device.
"""

import math
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from zo_engine.journal import Move, short
from zo_engine.noise import Layout, directions
from zo_engine.probes import Probes
from zo_engine.recipe import DOUBLINGS, doubled

DAMPINGS = (0.03, 0.3)  # lambda, in units of the mean diagonal of Z'J'JZ
SHARES = (0.2, 0.35, 0.6, 1.0)  # of the solution's way
TRIES = tuple((damping, share) for damping in DAMPINGS for share in SHARES)
HELD = 1 << 29  # directions' elements that are kept from example to example; more are drawn anew, a part at a time
TOGETHER = 1 << 20  # elements of moves that are made at once
WHOLE = 4  # one direction of a part in so many moves whole layers; at most one a layer
LONGEST = 4  # how far these go in their elements, where others go by one, so that all are of about the same length
FADING = 0.5  # of what steps before this one said of every try
SURE = 1.0  # standard errors
REACH = 0.3  # of a move, root mean square: what is longer is shortened, since no model of a loss holds that far

Outcomes = Callable[[int, Probes, bool], Tensor]
Standing = list[tuple[float, float]]  # of every try: a sum over steps, each in units of its errors; and its variance


class GaussNewton:
    """The state of a run: theta and the number of its steps, rebuilt by replaying the journal."""

    def __init__(
        self,
        layout: Layout,
        parts: Sequence[Layout],
        *,
        seed: int,
        per_part: Sequence[int],
        doublings: int = DOUBLINGS,
        kind: str = "rademacher",
        eps: float = 1e-2,
        device: torch.device | str = "cpu",
    ):
        """layout: of the whole theta. parts: the tensors that one direction moves, which make it up; a probe of the
        last part runs all that any part needs. per_part: directions of every part at first, and doublings: how often
        they double (`recipe.doubled`)."""
        self.layout, self.parts, self.seed, self.kind, self.eps = layout, list(parts), seed, kind, eps
        self.per_part, self.doublings = list(per_part), doublings
        self.theta = torch.zeros(layout.size, device=device)
        self.step = self.skipped = 0
        self.standing: Standing = []

    def counts(self, step: int) -> list[int]:
        """Directions of every part in a step, at most one an element."""
        wanted = (doubled(count, step, self.doublings) for count in self.per_part)
        return [min(count, part.size) for count, part in zip(wanted, self.parts, strict=True)]

    def directions(self) -> list[Tensor]:
        """The directions of the next step for every part, each [K, n of the part]."""
        return [self._directions(part) for part in range(len(self.parts))]

    def _directions(self, part: int, whole: int = WHOLE) -> Tensor:
        count, layout, where = self.counts(self.step)[part], self.parts[part], (self.seed, self.step)
        moved = min(count // whole, len(layout.numel)) if whole else 0
        z = directions(self.kind, layout, *where, range(count - moved), self.theta.device)
        if not moved:
            return z
        layers = Layout(dict.fromkeys(layout.numel, (1,)))
        signs = directions("rademacher", layers, *where, [count], self.theta.device)[0]
        return torch.cat([z, _layerwise(layout, signs, moved).to(z.dtype)])

    def cost(self, step: int) -> int:
        """Rows that one example has in a step, before the tries."""
        return sum(count + 1 for count in self.counts(step))

    def advance(self, outcomes: Outcomes, batch: int, fresh: int, tries: Sequence[tuple[float, float]] = TRIES) -> Move:
        """One live step: probe, solve, try, move. Returns its record for the journal.

        outcomes(part, probes, fresh): the loss of every row and then its features [R, 1 + m], with the perturbation
        inside of a part; of this step's batch of `batch` examples, whose rows come one example a call, or of a fresh
        batch of `fresh`, where only the losses are read: [R, 1] will do, and they may be other losses than those of
        the batch. tries: (damping, share of the way) of every move that is tried. An outcome of this step's batch that
        is not finite skips the step; one of a try leaves out that try.
        """
        gram, slope, loss = self._model(outcomes, batch)
        if not (gram.isfinite().all() and slope.isfinite().all()):
            self.skip()
            return Move(self.step - 1, (), 0.0, short(loss))
        found = [self._shortened(w) for w in _solutions(gram.cpu(), slope.cpu(), tries)]
        weights = [(0.0,) * len(slope), *found]
        moves = torch.stack(self._moves(weights))
        probes = Probes(
            moves,
            1.0,
            torch.arange(len(moves)).repeat_interleave(fresh),
            torch.ones(len(moves) * fresh, dtype=torch.int8),
            torch.arange(fresh).repeat(len(moves)),
            self.layout,
        )
        found = outcomes(len(self.parts) - 1, probes, True)[:, 0].double().view(len(moves), fresh).cpu()
        error = (found[1:] - found[0]).std(1, correction=min(1, fresh - 1)) / fresh**0.5  # of one example alone: 0
        tried, errors = (tuple(map(short, values.tolist())) for values in (found.mean(1), error))
        best = _best(_weighed(self.standing, tried, errors))
        record = Move(
            self.step,
            weights[best],
            short(moves[best].square().mean().sqrt().item()),
            short(loss),
            *(tries[best - 1] if best else (0.0, 0.0)),
            tried,
            errors,
            best,
            WHOLE,
        )
        self.apply(record)
        return record

    def _model(self, outcomes: Outcomes, batch: int) -> tuple[Tensor, Tensor, float]:
        """(Z'J'JZ [K, K], Z'g [K], loss) in fp64, means over the batch; one example at a time bounds the memory."""
        counts = self.counts(self.step)
        total, signs = sum(counts), sum(n * part.size for n, part in zip(counts, self.parts, strict=True))
        held = self.directions() if signs <= HELD else None
        gram = torch.zeros(total, total, dtype=torch.float64, device=self.theta.device)
        slope, loss = gram[0].clone(), gram[0, 0].clone()  # read at the end: the host runs ahead of the device
        for example in range(batch):
            rises, jacobian, start = [], None, 0
            for part, layout in enumerate(self.parts):
                z = held[part] if held else self._directions(part)
                count = len(z) + 1  # the first row stands still: every part has its own, of the same rounding
                direction, sign = torch.arange(count).sub(1).clamp(0), torch.ones(count, dtype=torch.int8)
                sign[0] = 0
                sample = torch.full((count,), example)
                rows = outcomes(part, Probes(z, self.eps, direction, sign, sample, layout), False)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                rises.append(rows[1:, 0].double() - rows[0, 0].double())
                if jacobian is None:  # in one piece from the start: of large pictures it is the largest thing here
                    jacobian = rows.new_empty(total, rows.shape[1] - 1)
                torch.sub(rows[1:, 1:], rows[0, 1:], out=jacobian[start : start + count - 1])
                start += count - 1
                first = rows[0, 0].clone()
                del rows, z  # not held while the next part is probed
            jacobian /= self.eps
            curvature = (jacobian @ jacobian.T).double()
            gram += curvature / batch
            slope += (torch.cat(rises) / self.eps - self.eps * curvature.diagonal()) / (2 * batch)
            loss += first.double() / batch
        return gram, slope, loss.item()

    def _shortened(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The weights of a move that goes no further than REACH, by the length that it has if directions are orthogonal
        and their elements of size one."""
        squares, start = 0.0, 0
        for part, count in zip(self.parts, self.counts(self.step), strict=True):
            squares += part.size * sum(w * w for w in weights[start : start + count])
            start += count
        factor = REACH / max(REACH, (squares / self.layout.size) ** 0.5)
        return tuple(short(w * factor) for w in weights)

    def _moves(self, weights: Sequence[Sequence[float]], whole: int = WHOLE) -> list[Tensor]:
        """What theta moves by with each of some weights: Z w [n], one direction after the other, so that it rounds
        alike everywhere."""
        made = [torch.zeros_like(self.theta) for _ in weights]
        weighed = torch.tensor(weights, dtype=torch.float32, device=self.theta.device)  # [moves, K]
        start = 0
        for number, part in enumerate(self.parts):
            z = self._directions(number, whole)
            where = self.layout.index(part, self.theta.device)
            together = max(1, TOGETHER // part.size)  # moves: what is small takes as long for one as for all
            for first in range(0, len(made), together):
                w = weighed[first : first + together, start : start + len(z)]
                along = torch.zeros(len(w), part.size, device=self.theta.device)
                for direction, column in zip(z, w.T[..., None], strict=True):
                    along.add_(direction * column)
                for move, row in zip(made[first : first + together], along, strict=True):
                    move[where] = row
            start += len(z)
        return made

    def apply(self, record: Move) -> None:
        """Make the move of a record, live or from a journal. Raises ValueError if it is not the next one."""
        if record.step != self.step:
            raise ValueError(f"the journal jumps from step {self.step} to step {record.step}")
        if record.skipped:
            self.skip()
            return
        if len(record.weights) != (count := sum(self.counts(self.step))):
            raise ValueError(f"step {record.step} has {len(record.weights)} weights, not {count}")
        (move,) = self._moves([record.weights], record.whole)
        self.theta = self.theta + move
        self._remember(record)
        self.step += 1

    def _remember(self, record: Move) -> None:
        """What the tries of a step did, of which the next ones make something too."""
        self.standing = _weighed(self.standing, record.tried, record.errors)

    def skip(self) -> None:
        """A step with an outcome that is not finite: theta stays as it is; it is counted."""
        self.step += 1
        self.skipped += 1

    # A checkpoint only saves time: replaying the journal from the start gives the same bits.

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors, scalars) that `restore` takes."""
        return {"theta": self.theta}, {"step": self.step, "skipped": self.skipped}

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, float], journal: Sequence[Move] = ()) -> None:
        """Take up a state."""
        self.theta = tensors["theta"].to(self.theta.device, copy=True)
        self.step, self.skipped = int(scalars["step"]), int(scalars["skipped"])
        self.standing = []
        for record in journal[: self.step]:
            self._remember(record)


def _layerwise(layout: Layout, signs: Tensor, count: int) -> Tensor:
    """Directions [count, n] that move whole layers, int8. With fewer directions than layers, every one of them moves
    several, each by its sign, which another step draws anew.

    signs: [layers]."""
    elements = [sum(list(layout.numel.values())[row::count]) for row in range(count)]
    lengths = [min(LONGEST, round((layout.size / n) ** 0.5)) for n in elements]
    z = torch.zeros(count, layout.size, dtype=torch.int8, device=signs.device)
    parts = layout.split(z)
    for number, name in enumerate(layout.numel):
        parts[name][number % count] = signs[number] * lengths[number % count]
    return z


def _weighed(before: Standing, tried: Sequence[float], errors: Sequence[float]) -> Standing:
    """By how much every try raised the loss, against standing still, in this step and, fading, in those before it.

    A try whose loss is not finite begins anew. A step that says nothing of its tries, because it was skipped or is of a
    journal without errors, changes nothing."""
    if not errors:
        return before
    rises = [loss - tried[0] for loss in tried[1:]]
    finite = [math.isfinite(rise) and math.isfinite(error) for rise, error in zip(rises, errors, strict=True)]
    unit = sum(compress(errors, finite)) or sum(map(abs, compress(rises, finite))) or 1.0
    if len(before) != len(rises):
        before = [(0.0, 0.0)] * len(rises)
    return [
        (rise / unit + FADING * total, (error / unit) ** 2 + FADING**2 * variance) if known else (0.0, 0.0)
        for (total, variance), rise, error, known in zip(before, rises, errors, finite, strict=True)
    ]


def _best(standing: Standing) -> int:
    """The number of the best try, from 1 on, of those that surely lower the loss; 0 if none does."""
    sums = [s if s + SURE * v**0.5 < 0 else 0.0 for s, v in standing]
    return 1 + sums.index(min(sums)) if min(sums) < 0 else 0


def _solutions(gram: Tensor, slope: Tensor, tries: Sequence[tuple[float, float]] = TRIES) -> list[tuple[float, ...]]:
    """The weights w [K] for every damping and share of the way, rounded as the journal keeps them."""
    unit = gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    solved = {damping: torch.linalg.solve(gram + damping * unit, -slope) for damping, _ in tries}
    return [tuple(short(w) for w in (share * solved[damping]).tolist()) for damping, share in tries]

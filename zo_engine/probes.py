"""The batch axis carries the probes: one forward pass of a stacked batch evaluates every perturbation.

Row r of the stacked batch is evaluated at `theta + eps * sign[r] * z[direction[r]]`. Two spaces say what theta is:

* GainSpace: one log-gain per output row (and per input group) of each quantised layer, and per feature of a language
  model's final norm. A gain acts on activations, `y = exp(row) * (W (exp(col) * x)) + b`, so every row of the batch
  can carry a direction of its own at the price of one fused multiply, and it folds back into the scales exactly:
  `s = s0 * exp(row[r] + col[g])`.
* GroupSpace: one theta per quantisation group, the space of QZO (Shang et al., arXiv:2505.13430). Relative form
  `s = s0 * exp(theta)`, or the paper's absolute form `s = max(s0 + theta, 0)`. Each slice of the batch that shares a
  probe runs with its own scales.

A model is dressed from outside and for the length of a `with` block: its layers' `forward` is replaced, and put back
also after an exception. Base scales are never written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_engine.blocks import Prefix, Replay, answering, relayed
from zo_engine.noise import Layout
from zo_engine.scales import ScaleError, ScaleView


@dataclass(frozen=True)
class Probes:
    """What each row of a stacked batch carries.

    z: [P, n] directions; eps: size of the perturbation; direction [R]: index into z; sign [R]: +1, -1 or 0.
    sample [R]: which example of the batch the row evaluates. layout: the tensors that z moves, if not all of them.
    """

    z: Tensor
    eps: float
    direction: Tensor
    sign: Tensor
    sample: Tensor
    layout: Layout | None = None

    def rows(self, index: Tensor) -> "Probes":
        """The same probes, for some rows only."""
        return replace(self, direction=self.direction[index], sign=self.sign[index], sample=self.sample[index])


def central(z: Tensor, eps: float, batch: int, own: bool) -> Probes:
    """Rows for central differences: first every plus, then every minus, in the same order.

    own: direction p belongs to example `p % batch` alone (P rows a sign, P a multiple of `batch`);
    else every example sees every direction (P * batch rows a sign, direction-major).
    """
    count = len(z)
    if own:
        if count % batch:
            raise ValueError(f"own directions need a multiple of the batch: {count} directions for {batch} examples")
        direction, sample = torch.arange(count), torch.arange(count) % batch
    else:
        direction, sample = torch.arange(count).repeat_interleave(batch), torch.arange(batch).repeat(count)
    sign = torch.ones(len(direction), dtype=torch.int8)
    return Probes(z, eps, direction.repeat(2), torch.cat([sign, -sign]), sample.repeat(2))


def along(direction: Tensor, size: float, batch: int) -> Probes:
    """Rows for a line search: every example at minus, zero and plus `size` times one direction [n]."""
    sign = torch.tensor([-1, 0, 1], dtype=torch.int8).repeat_interleave(batch)
    return Probes(direction[None], size, torch.zeros(3 * batch, dtype=torch.int64), sign, torch.arange(batch).repeat(3))


class Space:
    """What theta means. `layout` names its tensors; theta itself is one flat fp32 vector [layout.size]."""

    layout: Layout
    views: dict[str, ScaleView]
    bring: Callable[[Tensor], Tensor] | None = None  # a part of theta to where layers compute, if it waits elsewhere

    def home(self, device: torch.device | str) -> torch.device:
        """Where theta lives, and all that a method keeps of its size, for layers that compute on a device."""
        return torch.device("cpu" if self.bring else device)

    def _split(self, probes: Probes | None) -> dict[str, Tensor]:
        """The directions by tensor; a tensor that no probe moves is missing."""
        return (probes.layout or self.layout).split(probes.z) if probes else {}

    def scales(self, theta: Tensor) -> Iterator[tuple[ScaleView, Tensor]]:
        """Every layer with the scale that theta gives it, one at a time."""
        raise NotImplementedError

    def _forwards(self, theta: Tensor, probes: Probes | None) -> Iterator[tuple[ScaleView, Callable]]:
        """Every layer with the forward that evaluates the probes."""
        raise NotImplementedError

    @contextmanager
    def folded(self, theta: Tensor) -> Iterator[None]:
        """The model with theta written into its scales: what previews, evaluation and export run."""
        before = {view: view.live for view in self.views.values()}
        try:
            for view, scale in self.scales(theta):
                view.put(scale)
            yield
        finally:
            for view, scale in before.items():
                view.format.put(view.module, scale)

    @contextmanager
    def dressed(self, theta: Tensor, probes: Probes | None = None) -> Iterator[None]:
        """The model evaluating one probe per row of its batch (all rows at theta without probes)."""
        previous = {}
        try:
            for view, forward in self._forwards(theta, probes):
                previous[view] = view.module.__dict__.get("forward"), view.live
                view.module.forward = forward
            yield
        finally:
            for view, (forward, scale) in previous.items():
                if forward is None:
                    del view.module.forward
                else:
                    view.module.forward = forward
                view.format.put(view.module, scale)


def _by_rows(view: ScaleView, forward: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """The forward for inputs whose first axis is the stacked batch, or the batch times its tokens, as in OPT."""

    def run(x: Tensor) -> Tensor:
        if x.shape[0] == rows:
            return forward(x)
        if x.ndim == 2 and x.shape[0] % rows == 0:
            return forward(x.unflatten(0, (rows, -1))).flatten(0, 1)
        raise ValueError(
            f"{view.name} received {x.shape[0]} rows where the stacked batch has {rows}: "
            "this layer does not keep the batch as its first axis"
        )

    return run


class GainSpace(Space):
    """One log-gain per output row, and per group of inputs if `columns`, of every layer whose groups respect rows.

    Layers where a group straddles two rows cannot be folded exactly; they stay frozen and are named in `left_out`.
    """

    def __init__(self, views: dict[str, ScaleView], columns: bool = False):
        self.views = {name: view for name, view in views.items() if view.rowwise}
        self.left_out = [name for name in views if name not in self.views]
        if not self.views:
            raise ScaleError("gain space needs layers whose groups do not straddle two rows; use group space here")
        shapes = {f"{name}.rows": (view.out_features,) for name, view in self.views.items()}
        if columns:
            shapes |= {f"{name}.columns": (view.groups,) for name, view in self.views.items() if view.groups > 1}
        self.layout = Layout(shapes)

    def scales(self, theta: Tensor) -> Iterator[tuple[ScaleView, Tensor]]:
        parts = self.layout.split(theta)
        for name, view in self.views.items():
            log_gain = parts[f"{name}.rows"][:, None]
            if f"{name}.columns" in parts:
                log_gain = log_gain + parts[f"{name}.columns"]
            yield view, view.numbers(view.base.to(theta.device)).view(view.shape) * log_gain.exp()

    def _forwards(self, theta: Tensor, probes: Probes | None) -> Iterator[tuple[ScaleView, Callable]]:
        parts = self.layout.split(theta)
        z = self._split(probes)
        step = (probes.eps * probes.sign.to(theta.device, theta.dtype))[:, None] if probes else None
        direction = probes.direction.to(theta.device) if probes else None

        def gain(name: str) -> Tensor:
            """[R, k] gains of the stacked rows, made when the layer runs: memory of one layer, not of the model."""
            if name not in z:
                return parts[name].exp()[None]
            return (z[name].index_select(0, direction) * step).add_(parts[name]).exp_()

        def dress(view: ScaleView, plain: Callable) -> Callable:
            rows, columns = f"{view.name}.rows", f"{view.name}.columns"

            def forward(x: Tensor) -> Tensor:
                lead = [-1] + [1] * (x.ndim - 2)  # [R, 1, ..., k]: broadcast over tokens
                if columns in parts:
                    wide = view.widened(gain(columns))
                    x = (x * wide.view(*lead, view.in_features)).to(x.dtype)
                y, g = plain(x), gain(rows).view(*lead, view.out_features)
                shift = None if view.bias is None else view.bias * (1 - g)  # the bias is not scaled
                if torch.is_grad_enabled():
                    return (y * g if shift is None else torch.addcmul(shift, y, g)).to(y.dtype)
                # The same in y's own memory: gains are wider than a half-precision y, and so were the product.
                return y.mul_(g) if shift is None else torch.addcmul(shift, y, g, out=y)

            return _by_rows(view, forward, len(direction)) if probes else forward

        for view in self.views.values():
            yield view, dress(view, view.module.forward)


class GroupSpace(Space):
    """One theta per quantisation group. relative: `s = s0 * exp(theta)`; else the paper's `s = max(s0 + theta, 0)`,
    and `s0 + theta` where scales have a sign: those of a plain layer are its weights.

    Theta is as large as the scales, and so is a direction. With `bring`, both wait in host memory, and a layer's part
    is brought when it computes.
    """

    left_out: tuple[str, ...] = ()

    def __init__(
        self,
        views: dict[str, ScaleView],
        relative: bool = True,
        clamp: bool = True,
        bring: Callable[[Tensor], Tensor] | None = None,
    ):
        self.views, self.relative, self.clamp, self.bring = views, relative, clamp, bring
        self.layout = Layout({f"{name}.groups": view.shape for name, view in views.items()})

    def _brought(self, part: Tensor) -> Tensor:
        return self.bring(part) if self.bring else part

    def _scale(self, view: ScaleView, base: Tensor, theta: Tensor) -> Tensor:
        base = view.numbers(base.to(theta.device)).view(view.shape)
        if self.relative:
            return base * theta.exp()
        scale = base + theta
        return scale.clamp_(min=0) if self.clamp and not view.format.signed else scale

    def scales(self, theta: Tensor) -> Iterator[tuple[ScaleView, Tensor]]:
        parts = self.layout.split(theta)
        for name, view in self.views.items():
            yield view, self._scale(view, view.base, self._brought(parts[f"{name}.groups"]))

    def _forwards(self, theta: Tensor, probes: Probes | None) -> Iterator[tuple[ScaleView, Callable]]:
        parts = self.layout.split(theta)
        z = self._split(probes)
        still = [(0, None, 0, 0.0)]
        runs = _runs(probes) if probes else still

        def dress(view: ScaleView, plain: Callable) -> Callable:
            name = f"{view.name}.groups"

            def forward(x: Tensor) -> Tensor:
                outputs, base, here = [], view.live, self._brought(parts[name])
                try:
                    for start, stop, direction, step in runs if name in z else still:
                        moved = here + step * self._brought(z[name][direction]).to(theta.dtype) if step else here
                        view.put(self._scale(view, base, moved))
                        outputs.append(plain(x[start:stop]))
                finally:
                    view.format.put(view.module, base)
                return torch.cat(outputs)

            return _by_rows(view, forward, len(probes.sign)) if probes else forward

        for view in self.views.values():
            yield view, dress(view, view.module.forward)


def _runs(probes: Probes) -> list[tuple[int, int, int, float]]:
    """Consecutive rows that share a probe: (start, stop, direction, eps * sign)."""
    runs: list[tuple[int, int, int, float]] = []
    for row, (direction, sign) in enumerate(zip(probes.direction.tolist(), probes.sign.tolist(), strict=True)):
        if runs and runs[-1][2:] == (direction, probes.eps * sign):
            runs[-1] = (runs[-1][0], row + 1, direction, probes.eps * sign)
        else:
            runs.append((row, row + 1, direction, probes.eps * sign))
    return runs


@torch.no_grad()
def evaluate(
    space: Space,
    theta: Tensor,
    probes: Probes,
    loss: Callable[[Tensor], Tensor],
    chunk: int | None = None,
    replay: Replay | None = None,
    relay: Sequence[nn.Module] = (),
) -> Tensor:
    """One loss, or one error vector, per row of the stacked batch, fp32 or wider: [R] or [R, m].

    loss(sample) gets the example index of every row [r] and returns the losses or errors [r, ...] of the dressed model.
    `chunk` bounds the rows of one forward pass, and `replay` (of `Prefix.run` at theta) answers for the blocks that no
    probe reaches: the result depends on neither beyond the rounding of differently shaped matmuls. `relay`: the model's
    first blocks, if one after the other is to serve all passes (`blocks.relayed`); the result does not depend on it.
    """
    passes = math.ceil(len(probes.sign) / (chunk or len(probes.sign)))
    parts = [probes.rows(rows) for rows in torch.arange(len(probes.sign)).tensor_split(passes)]  # of like length

    def answer(part: Probes) -> Any:
        with space.dressed(theta, part):
            return loss(part.sample)

    done = len(replay.blocks) if replay else 0
    if passes > 1 and len(relay) > done:
        states = [replay.rows(part.sample) for part in parts] if replay else []
        states = relayed(relay, [partial(answer, part) for part in parts], states, done)
        contexts = (answering(relay, states.pop(0)) for _ in parts)
    else:
        contexts = (replay(part.sample) if replay else nullcontext() for part in parts)
    losses = []
    for part, context in zip(parts, contexts, strict=True):
        with context:
            losses.append(answer(part))
    return torch.cat(losses)


class Evaluations:
    """A step's probes, evaluated on batches that come in parts. What lies before a level runs once for a part, and is
    held for as long as that part is asked for: it takes the memory of one part, whatever the batch."""

    def __init__(
        self,
        space: Space,
        theta: Tensor,
        prefixes: Sequence[Prefix | None],
        rows: int,
        relay: Sequence[nn.Module] = (),
        run: Callable[..., Replay] = Prefix.run,
        evaluate: Callable[..., Tensor] = evaluate,
    ):
        """prefixes: of every level. rows: of one pass, at most. relay: see `evaluate`. run, evaluate: how a prefix is
        run, and how probes are evaluated."""
        self.space, self.theta, self.prefixes, self.rows, self.relay = space, theta, prefixes, rows, relay
        self.run, self.evaluate = run, evaluate
        self.part: Any = None
        self.replays: dict[int, Replay] = {}  # by level, of the examples of that part

    def __call__(
        self, outputs: Callable[[Any], Tensor], parts: Sequence[Any], probes: Probes, level: int | None
    ) -> Tensor:
        """As `evaluate`, of probes whose samples number the examples of all parts through. outputs(examples): what the
        dressed model makes of them. level: whose probes these are; None: `outputs` runs the model more than once, and
        nothing can be replayed."""
        found, rows, start = [], [], 0
        for part in parts:
            mine = ((probes.sample >= start) & (probes.sample < start + len(part))).nonzero().flatten()
            if len(mine):
                here = probes.rows(mine)
                found.append(self._of(outputs, part, replace(here, sample=here.sample - start), level))
                rows.append(mine)
            start += len(part)
        return torch.cat(found)[torch.cat(rows).argsort().to(found[0].device)] if len(found) > 1 else found[0]

    def _of(self, outputs: Callable[[Any], Tensor], part: Any, probes: Probes, level: int | None) -> Tensor:
        some = lambda index: outputs(part.take(index))  # noqa: E731
        if part is not self.part:
            self.part, self.replays = part, {}
        prefix = None if level is None else self.prefixes[level]
        if prefix and level not in self.replays:
            with self.space.dressed(self.theta):
                self.replays[level] = self.run(prefix, some, len(part), self.rows, self.relay)
        replay = self.replays.get(level) if prefix else None
        return self.evaluate(self.space, self.theta, probes, some, self.rows, replay, self.relay)

"""(e) A task whose answer is known: an ill-conditioned quadratic.

    python benchmarks/known.py [--seeds 0 1 2]

Every example i has the error e_i = R_i s (theta - theta*), with R_i a random matrix of its own and s from 1 down to
1 / sqrt(condition): the expected squared error is |s (theta - theta*)|^2, and zero at theta*. A forward is 32 examples;
a first-order step counts three (a backward is about two). Contestants: ours (Gauss-Newton); the published form, slopes
of the loss along one direction for all examples, with the best of a sweep of step sizes; slopes along one direction
each with the step size that the run finds; first-order Adam with the best of a sweep of rates. A sweep is made with the
first seed. results/known.json and known.png; the targets are those of `learning.targets`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import matplotlib.figure
import numpy as np
import torch
from common import RESULTS, save
from learning import LONG, OURS, PAPER, Curve, lowest, targets
from torch import Tensor

from zo_engine.newton import TRIES, GaussNewton
from zo_engine.noise import Layout
from zo_engine.probes import Probes
from zo_engine.recipe import DIRECTIONS
from zo_engine.zo import ZO, trapezoid

BATCH, PICTURES = 16, 32
BUDGET = 1500  # forwards
SIZE, FEATURES = 512, 64  # numbers in theta, features of an example
CONDITIONS = (1, 100, 10_000)
STEP_SIZES = (3e-4, 1e-3, 3e-3, 1e-2)  # of the published form; 0.03 explodes
RATES = (1e-3, 3e-3, 1e-2)
FOUND = "slopes, step size found"

Errors = Callable[[Tensor, int], Tensor]  # theta [R, n], example -> errors [R, m]


@dataclass
class Task:
    """theta starts at `start`; `true` is the loss that a method is judged by, zero at the answer."""

    layout: Layout
    start: Tensor
    errors: Errors
    true: Callable[[Tensor], float]


def quadratic(condition: float, seed: int) -> Task:
    rng = torch.Generator().manual_seed(seed)
    s = torch.logspace(0, -0.5 * np.log10(condition), SIZE)[torch.randperm(SIZE, generator=rng)]
    start = torch.randn(SIZE, generator=rng) / SIZE**0.5

    @lru_cache(maxsize=3)
    def drawn(block: int) -> Tensor:
        rng = np.random.Generator(np.random.SFC64([seed, block]))
        return torch.from_numpy(rng.standard_normal((PICTURES, FEATURES, SIZE), dtype=np.float32))

    def errors(theta: Tensor, example: int) -> Tensor:
        r = drawn(example // PICTURES)[example % PICTURES]
        return (theta * s) @ r.T / FEATURES**0.5

    return Task(Layout({"theta": (SIZE,)}), start, errors, lambda theta: (theta * s).square().sum().item())


def ours(task: Task, seed: int) -> Curve:
    """(forwards, true loss) after every step."""
    method = GaussNewton(task.layout, [task.layout], seed=seed, per_part=[DIRECTIONS])
    method.theta = task.start.clone()
    forwards, curve = 0.0, [(0.0, task.true(task.start))]
    while forwards < BUDGET:
        step = method.step

        def outcomes(part: int, probes: Probes, fresh: bool) -> Tensor:
            base = (step + fresh) * BATCH  # noqa: B023
            rows = []
            for example in probes.sample.unique().tolist():
                here = probes.sample == example
                moved = method.theta + moves(probes, here)
                e = task.errors(moved, base + example)
                rows.append((here, torch.cat([e.square().sum(1, keepdim=True), e], 1)))
            made = torch.empty(len(probes.sample), rows[0][1].shape[1])
            for here, values in rows:
                made[here] = values
            return made

        forwards += BATCH * (method.counts(step)[0] + 1 + len(TRIES) + 1) / PICTURES
        method.advance(outcomes, BATCH, BATCH)
        curve.append((forwards, task.true(method.theta)))
    return curve


def moves(probes: Probes, here: Tensor) -> Tensor:
    """What the chosen rows are moved by, [R, n]."""
    return probes.z[probes.direction[here]] * (probes.eps * probes.sign[here].float())[:, None]


def slopes(task: Task, seed: int, step_size: float, own: bool) -> Curve:
    """Slopes of the loss: along one direction an example, or along one for all of them, as published; a batch of 32."""
    method = ZO(task.layout, seed=seed, per_step=PICTURES if own else 1, step_size=step_size)
    method.theta = task.start.clone()
    forwards, curve = 0.0, [(0.0, task.true(task.start))]
    steps = BUDGET // 2
    for step in range(steps):

        def losses(probes: Probes, fresh: bool) -> Tensor:
            base = (2 * step + fresh) * PICTURES  # noqa: B023
            found = torch.empty(len(probes.sample))
            for example in probes.sample.unique().tolist():
                here = probes.sample == example
                found[here] = task.errors(method.theta + moves(probes, here), base + example).square().sum(1)
            return found

        record = method.advance(losses, PICTURES, own, trapezoid(step, steps, 0, 0.2) if own else 1.0)
        forwards += 2 + (3 if record.search else 0)
        if step % 20 == 19:
            curve.append((forwards, task.true(method.theta)))
            if not np.isfinite(curve[-1][1]) or curve[-1][1] > 10 * curve[0][1] or forwards > BUDGET:
                break
    return curve


def adam(task: Task, rate: float) -> Curve:
    """First order, with exact gradients."""
    theta = task.start.clone().requires_grad_()
    optimiser, steps, curve = torch.optim.Adam([theta], lr=rate), BUDGET // 3, [(0.0, task.true(task.start))]
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * trapezoid(step, steps, 0, 0.2)
        loss = sum(task.errors(theta[None], step * PICTURES + i).square().sum() for i in range(PICTURES)) / PICTURES
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19:
            curve.append((3.0 * (step + 1), task.true(theta.detach())))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    found: dict[str, dict] = {}
    for condition in CONDITIONS:
        curves: dict[str, dict[str, Curve]] = {}
        chosen: dict[str, float] = {}
        for seed in given.seeds:
            task = quadratic(condition, seed)

            def swept(name: str, settings: tuple, run: Callable[[float], Curve]) -> Curve:
                """The curve of the best setting, found with the first seed."""
                if name in chosen:  # noqa: B023
                    return run(chosen[name])  # noqa: B023
                made = {setting: run(setting) for setting in settings}
                ends = {setting: curve[-1][1] for setting, curve in made.items() if np.isfinite(curve[-1][1])}
                chosen[name] = min(ends, key=ends.get)  # noqa: B023
                return made[chosen[name]]  # noqa: B023

            contest = {
                OURS: lambda: ours(task, seed),  # noqa: B023
                PAPER: lambda: swept(PAPER, STEP_SIZES, lambda size: slopes(task, seed, size, False)),  # noqa: B023
                FOUND: lambda: slopes(task, seed, 0.0, True),  # noqa: B023
                LONG: lambda: swept(LONG, RATES, lambda rate: adam(task, rate)),  # noqa: B023
            }
            for name, run in contest.items():
                curve = run()
                curves.setdefault(name, {})[str(seed)] = curve
                print(condition, seed, name, curve[-1][1] / curve[0][1], flush=True)
        left = {n: {s: lowest(c) / c[0][1] for s, c in by_seed.items()} for n, by_seed in curves.items()}
        facts = {"share of the loss that is left": left, "chosen": chosen, "targets": targets(curves)}
        found[str(condition)] = facts | {"curves": curves}
    print(save("known", {"forwards": BUDGET, "size": SIZE, "features": FEATURES, "conditions": found}))
    plot(found)


def plot(found: dict[str, dict]) -> None:
    """A panel for each condition: the share of the loss that is left, mean over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(11, 4), dpi=120, layout="constrained")
    for axes, (condition, facts) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for name, by_seed in facts["curves"].items():
            shortest = min(len(curve) for curve in by_seed.values())
            shares = np.array([[loss / c[0][1] for _, loss in c[:shortest]] for c in by_seed.values()])
            forwards = np.mean([[forwards for forwards, _ in c[:shortest]] for c in by_seed.values()], 0)
            axes.semilogy(forwards, shares.mean(0), label=name, lw=2.5 if name == OURS else 1.5)
        axes.set_ylim(1e-3, 1.5)  # first order goes on far below
        axes.set_title(f"condition {int(condition):,}")
        axes.set_xlabel(f"forwards of {PICTURES}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the loss that is left")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(RESULTS / "known.png")


if __name__ == "__main__":
    main()

"""(e) A task whose answer is known: an ill-conditioned quadratic.

    python benchmarks/known.py [--seeds 0 1 2]

Every example i has the error e_i = R_i s (theta - theta*), with R_i a random matrix of its own and s from 1 down to
1 / sqrt(condition): the expected squared error is |s (theta - theta*)|^2, and zero at theta*. A forward is 32 examples;
a first-order step counts three (a backward is about two). Contestants: ours (Gauss-Newton), slopes of the loss with the
step size that the run finds and with the best of a sweep, first-order Adam with the best of a sweep of rates.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common import save
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
STEP_SIZES = (0.003, 0.01, 0.03, 0.1)
RATES = (3e-3, 1e-2, 3e-2)

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

    def errors(theta: Tensor, example: int) -> Tensor:
        r = torch.randn(FEATURES, SIZE, generator=torch.Generator().manual_seed(seed * 1_000_003 + example))
        return (theta * s) @ r.T / FEATURES**0.5

    return Task(Layout({"theta": (SIZE,)}), start, errors, lambda theta: (theta * s).square().sum().item())


def ours(task: Task, seed: int) -> list[tuple[float, float]]:
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


def slopes(task: Task, seed: int, step_size: float) -> list[tuple[float, float]]:
    """Slopes of the loss along one direction an example: the published estimator, with its batch of 32."""
    method = ZO(task.layout, seed=seed, per_step=PICTURES, step_size=step_size)
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

        record = method.advance(losses, PICTURES, True, trapezoid(step, steps, 0, 0.2))
        forwards += 2 + (3 if record.search else 0)
        if step % 20 == 19:
            curve.append((forwards, task.true(method.theta)))
            if not np.isfinite(curve[-1][1]) or curve[-1][1] > 10 * curve[0][1] or forwards > BUDGET:
                break
    return curve


def adam(task: Task, rate: float) -> list[tuple[float, float]]:
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
    table: dict[str, dict] = {}
    for condition in CONDITIONS:
        left: dict[str, list[float]] = {}
        chosen: dict[str, float] = {}
        for seed in given.seeds:
            task = quadratic(condition, seed)

            def swept(name: str, settings: tuple, run: Callable[[float], list]) -> list:
                """The curve of the best setting, found with the first seed."""
                if name not in chosen:  # noqa: B023
                    ends = {setting: run(setting)[-1][1] for setting in settings}
                    chosen[name] = min((end, s) for s, end in ends.items() if np.isfinite(end))[1]  # noqa: B023
                return run(chosen[name])  # noqa: B023

            contest = {
                "ours": lambda: ours(task, seed),  # noqa: B023
                "slopes, step size found": lambda: slopes(task, seed, 0.0),  # noqa: B023
                "slopes, best step size": lambda: swept("slopes", STEP_SIZES, lambda size: slopes(task, seed, size)),  # noqa: B023
                "first-order Adam": lambda: swept("adam", RATES, lambda rate: adam(task, rate)),  # noqa: B023
            }
            for name, run in contest.items():
                curve = run()
                left.setdefault(name, []).append(curve[-1][1] / curve[0][1])
                print(condition, seed, name, left[name][-1], flush=True)
        table[str(condition)] = {"share of the loss that is left": left, "chosen": chosen}
    print(save("known", {"forwards": BUDGET, "size": SIZE, "features": FEATURES, "conditions": table}))


if __name__ == "__main__":
    main()

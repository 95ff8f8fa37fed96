"""(c) Held-out loss against forwards: our default, the published form (as published, and with its best step size
found by a sweep), and first-order Adam on the same gains as the upper bound, for 240 steps and for as many pictures as
ours sees. Several seeds; a table and a plot.

    python benchmarks/learning.py [--task tarot | voice | sentiment] [--seeds 0 1 2] [--only ours ...]

A task is a folder of `styles`; those of texts write learning-<task>.json, and the accuracy beside the loss where
there are choices. What is said of pictures here holds for texts.

A forward is one pass of 32 pictures through the whole model; line searches and tried dampings count. Where only the
last blocks are tuned, a step counts the blocks that it runs: those before them once, the tuned ones for every probe,
and the output layers as a quarter of a block (measured: 20 ms of 395). A first-order step counts three: one forward,
and a backward that costs about two.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from common import CHECKOUT, RESULTS, circumstances, save

from zo_engine import recipe as recipes
from zo_engine.blocks import levels
from zo_engine.newton import DAMPINGS, FRESH, GaussNewton
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.train import Studio, Training, prepare

PICTURES = 32  # of one forward, and of one step of the published form and of first order
PUBLISHED = {
    "batch_size": PICTURES,
    "space": "absolute",
    "depth": 1.0,
    "noise": "gaussian",
    "eps": 1e-3,
    "clip": 100.0,
    "optimizer": "sgd",
    "decay": 0.0,
}
STEP_SIZES = (3e-4, 1e-3, 3e-3, 1e-2)  # of the sweep; the published one is 1e-6
RATES = (3e-2, 1e-1, 2e-1)  # of first-order Adam's sweep
CONTESTANTS = (
    "ours",
    "published form, best step size",
    "published settings",
    "first order",
    "first order, as many pictures",
)

Curve = list[tuple[float, ...]]  # (forwards, held-out loss), and the accuracy where there is one


def zeroth(studio: Studio, recipe: Recipe, every: int) -> Curve:
    """Train as the recipe says and note the held-out loss every `every` steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", recipe)
        studio = studio.changed(**vars(recipe))
        training = Training(run, studio)
        forwards, curve = 0.0, []
        for step in range(recipe.steps + 1):
            if step % every == 0 or step == recipe.steps:
                training.evaluate()
                figures = run.evaluations()[-1]
                loss = training.held_out if training.held_out is not None else float("nan")
                curve.append((forwards, loss, *([figures["accuracy"]] if "accuracy" in figures else [])))
                if curve[-1][1] != curve[-1][1] or curve[-1][1] > 3 * curve[0][1]:
                    break  # it explodes
            if step < recipe.steps:
                forwards += price(studio, training)
    return curve


def price(studio: Studio, training: Training) -> float:
    """Make a step; the forwards that it took."""
    recipe, method = studio.recipe, training.method
    blocks = len(studio.model.get_submodule(levels(studio.space.views, recipe.depth)[0].blocks))
    shares = [(blocks - level.first + 0.25) / (blocks + 0.25) for level in levels(studio.space.views, recipe.depth)]
    if isinstance(method, GaussNewton):
        rows = [count + 1 for count in method.counts(method.step)]
        rows[-1] += FRESH * (len(DAMPINGS) + 1)
        training.step()
        each = sum(share * count + (1 - share) for share, count in zip(shares, rows, strict=True))
        return each * recipe.batch_size / PICTURES
    directions = method.per_step / (recipe.batch_size if recipe.space == "gain" else 1)
    probes = 2 * directions + (3 if training.step().search else 0)
    return (1 - shares[-1] + shares[-1] * probes) * recipe.batch_size / PICTURES


def first_order(studio: Studio, recipe: Recipe, rate: float, every: int) -> Curve:
    """Adam with exact gradients on the same theta."""
    space, task = studio.space, studio.task
    theta = torch.zeros(space.layout.size, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=rate)
    items = task.evaluation(recipe.evaluate_items)
    curve = []
    for step in range(recipe.steps + 1):
        if step % every == 0 or step == recipe.steps:
            with torch.no_grad(), space.folded(theta.detach()):
                loss = torch.cat([task.losses(b) for b in items]).mean().item()
                curve.append((3 * step, loss, *task.figures().values()))
        if step < recipe.steps:
            for group in adam.param_groups:
                group["lr"] = rate * min(1.0, (recipe.steps - step) / (0.2 * recipe.steps))
            adam.zero_grad()
            with space.dressed(theta):
                task.losses(task.batch(step, PICTURES)).mean().backward()
            adam.step()
    return curve


def forwards_to(curve: Curve, loss: float) -> float | None:
    """The forwards at which a curve first reaches a loss, interpolated; None if never."""
    for (f0, l0, *_), (f1, l1, *_) in zip(curve, curve[1:], strict=False):
        if l1 <= loss:
            return f1 if l0 == l1 else f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)
    return None


def best(curves: dict[float, Curve]) -> float:
    """The setting whose curve ends lowest, without having exploded."""
    ends = {key: curve[-1][1] for key, curve in curves.items() if np.isfinite(curve[-1][1])}
    return min(ends, key=ends.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tarot", help="a folder of styles/ with a recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS,
                        help="contestants to run; the curves of the others are those of the result file")  # fmt: skip
    parser.add_argument("--published-steps", type=int, default=720)
    parser.add_argument("--adam-steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    name = "learning" if given.task == "tarot" else f"learning-{given.task}"
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() and set(given.only) != set(CONTESTANTS) else {}
    results: dict[str, dict[str, Curve]] = before.get("curves", {})
    chosen: dict[str, float] = before.get("chosen", {})
    measured = before.get("measured", dict.fromkeys(results, before.get("circumstances")))
    recipe = recipes.load(CHECKOUT / "styles" / given.task / "recipe.toml")
    pictures = recipe.steps * recipe.batch_size * (1 + FRESH)  # that our run sees, those that only try a move, too
    few = -(-pictures // PICTURES)
    for seed in given.seeds:
        mine = dataclasses.replace(recipe, seed=seed)
        studio = prepare(mine, CHECKOUT / "runs" / ".cache")
        paper = dataclasses.replace(mine, **PUBLISHED)
        short = dataclasses.replace(paper, steps=given.published_steps // 5)

        def swept(name: str, settings: tuple, run: Callable[[float], Curve]) -> float:
            """The best setting, found with the first seed."""
            if name not in chosen or seed == given.seeds[0]:  # noqa: B023
                curves = {setting: run(setting) for setting in settings}
                chosen[name] = best(curves)
                print(name, {setting: curve[-1] for setting, curve in curves.items()}, flush=True)
            return chosen[name]

        def adam(name: str, steps: int) -> Curve:
            run = lambda rate: first_order(studio, dataclasses.replace(mine, steps=steps), rate, 4)  # noqa: B023, E731
            return run(swept(name, RATES, run))

        def published() -> Curve:
            run = lambda size: zeroth(studio, dataclasses.replace(short, step_size=size), 20)  # noqa: B023, E731
            long = dataclasses.replace(paper, steps=given.published_steps)  # noqa: B023
            return zeroth(studio, dataclasses.replace(long, step_size=swept("published", STEP_SIZES, run)), 20)  # noqa: B023

        contest = {
            "ours": lambda: zeroth(studio, mine, 1),  # noqa: B023
            "published form, best step size": published,
            "published settings": lambda: zeroth(studio, dataclasses.replace(short, step_size=1e-6), 20),  # noqa: B023
            "first order": lambda: adam("first order", given.adam_steps),
            "first order, as many pictures": lambda: adam("first order, as many pictures", few),
        }
        for contestant in given.only:
            results.setdefault(contestant, {})[str(seed)] = contest[contestant]()
            measured[contestant] = circumstances()
            print(seed, contestant, results[contestant][str(seed)][-1], flush=True)
    table = summary(results)
    figures = {"measured": measured, "recipe": recipe.public(), "chosen": chosen, "table": table, "curves": results}
    print(save(name, figures))
    print(json.dumps(table, indent=1))
    plot(results, RESULTS / f"{name}.png")


def summary(results: dict[str, dict[str, Curve]]) -> dict:
    """For every seed: start, ends, our share of the first-order falls, and forwards to the published form's best."""
    table = {}
    for seed, ours in results["ours"].items():
        kept = {name: min(curves[seed], key=lambda point: point[1]) for name, curves in results.items()}
        ends = {name: point[1] for name, point in kept.items()}
        start = ours[0][1]
        table[seed] = {"start": start, **ends, "our forwards": ours[-1][0]}
        for name in ends.keys() & {"first order", "first order, as many pictures"}:
            table[seed][f"share of the fall of {name}"] = (start - ends["ours"]) / (start - ends[name])
        if paper := results.get("published form, best step size", {}).get(seed):
            table[seed] |= {
                "published form's forwards": paper[-1][0],
                "our forwards to the best loss of the published form": forwards_to(ours, min(p[1] for p in paper)),
                "forwards of the published form to our loss": forwards_to(paper, ends["ours"]),
            }
        if len(ours[0]) > 2:
            table[seed]["accuracy"] = {"start": ours[0][2]} | {name: point[2] for name, point in kept.items()}
    return table


def plot(results: dict[str, dict[int, Curve]], path: Path) -> None:
    """Mean over the seeds, and the range as a band."""
    figure = matplotlib.figure.Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curves in results.items():
        shortest = min(len(curve) for curve in curves.values())
        values = np.array([[point[1] for point in curve[:shortest]] for curve in curves.values()])
        forwards = [point[0] for point in next(iter(curves.values()))[:shortest]]
        (line,) = axes.plot(forwards, values.mean(0), label=name)
        axes.fill_between(forwards, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)
    axes.set_xlabel("forwards of one batch (log scale beyond 100)")
    axes.set_xscale("symlog", linthresh=100)
    axes.set_ylabel("held-out loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()

"""(c) Held-out loss against forwards: our default, the published form (as published, and with its best step size
found by a sweep), and first-order Adam on the same gains as the upper bound, for 240 steps and for as many pictures as
ours sees. Several seeds; a table and a plot.

    python benchmarks/learning.py [--task tarot | voice | sentiment | json] [--quantization nf4 | gptq | aqlm]
                                  [--seeds 0 1 2] [--only ours ...] [--anew]

A task is a folder of `styles`. Those of texts write learning-<task>-<quantization>.json and are run by ours and by
first-order Adam with as many texts; GPTQ and AQLM copies of tiny-llm are made where they are missing. The step of least
held-out loss is then tested: on 200 texts of `assets/world.py` that are neither learnt nor held out, with the accuracy
where there are choices; where a reward, which has no gradient for Adam, is the aim: on 8 answers to each held-out
prompt, sampled at temperature 1, and on the greedy one. What is said of pictures here holds for texts; passes in which
answers are written are not counted. The file is written after every curve, and a curve that is in it is not made again,
but with --anew.

A forward is one pass of 32 pictures through the whole model; line searches and tried dampings count. Where only the
last blocks are tuned, a step counts the blocks that it runs: those before them once, the tuned ones for every probe,
and the output layers as a quarter of a block (measured: 20 ms of 395). A first-order step counts three: one forward,
and a backward that costs about two.
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from common import CHECKOUT, RESULTS, circumstances, save
from world import example_set

from assets import pack
from zo_engine import models
from zo_engine import recipe as recipes
from zo_engine.blocks import levels
from zo_engine.newton import GaussNewton
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.tasks.reward import Rewarded
from zo_engine.train import Studio, Training, measured, prepare

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
CACHE = CHECKOUT / "runs" / ".cache"
TESTED = 200  # texts of a test
ANSWERS = 8  # sampled to each held-out prompt, in the test of a reward

Curve = list[tuple[float, ...]]  # (forwards, held-out loss), and the accuracy or the greedy reward where there is one


def zeroth(studio: Studio, recipe: Recipe, every: int) -> tuple[Curve, torch.Tensor]:
    """Train as the recipe says and note the held-out loss every `every` steps; theta of the least one."""
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
                curve.append((forwards, loss, *(figures[n] for n in ("accuracy", "reward") if n in figures)))
                if curve[-1][1] != curve[-1][1] or curve[-1][1] > 3 * curve[0][1]:
                    break  # it explodes
            if step < recipe.steps:
                forwards += price(studio, training)
        return curve, training.theta_at(training.best[1])


def price(studio: Studio, training: Training) -> float:
    """Make a step; the forwards that it took."""
    recipe, method = studio.recipe, training.method
    found = levels(studio.space.views, recipe.depth)
    blocks = len(studio.model.get_submodule(found[0].blocks)) if found[0].blocks else 0  # without: all in one level
    shares = [(blocks - level.first + 0.25) / (blocks + 0.25) for level in found]
    if isinstance(method, GaussNewton):
        rows = [count + 1 for count in method.counts(method.step)]
        rows[-1] += (len(studio.task.tries) + 1) * len(studio.task.trial(0, recipe.batch_size)) / recipe.batch_size
        training.step()
        each = sum(share * count + (1 - share) for share, count in zip(shares, rows, strict=True))
        return each * recipe.batch_size / PICTURES
    directions = method.per_step / (recipe.batch_size if recipe.space == "gain" else 1)
    probes = 2 * directions + (3 if training.step().search else 0)
    return (1 - shares[-1] + shares[-1] * probes) * recipe.batch_size / PICTURES


def first_order(studio: Studio, recipe: Recipe, rate: float, every: int) -> tuple[Curve, torch.Tensor]:
    """Adam with exact gradients on the same theta; theta of the least held-out loss."""
    space, task = studio.space, studio.task
    theta = torch.zeros(space.layout.size, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=rate)
    items = task.evaluation(recipe.evaluate_items)
    curve, least = [], theta.detach()
    for step in range(recipe.steps + 1):
        if step % every == 0 or step == recipe.steps:
            with torch.no_grad(), space.folded(theta.detach()):
                loss = torch.cat([task.losses(b) for b in items]).mean().item()
                curve.append((3 * step, loss, *task.figures().values()))
            if loss <= min(point[1] for point in curve):
                least = theta.detach().clone()
        if step < recipe.steps:
            for group in adam.param_groups:
                group["lr"] = rate * min(1.0, (recipe.steps - step) / (0.2 * recipe.steps))
            adam.zero_grad()
            with space.dressed(theta):
                task.losses(task.batch(step, PICTURES)).mean().backward()
            adam.step()
    return curve, least


def copy_of(recipe: Recipe, quantization: str) -> Recipe:
    """The recipe on the same model in another format; what must come packed is packed here, once."""
    made = {"gptq": pack.gptq, "aqlm": pack.aqlm}.get(quantization)
    if not made:
        return dataclasses.replace(recipe, quantization=quantization)
    folder = CACHE / "packed" / f"{recipe.model}-{quantization}"
    if not folder.exists():
        work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        made(models.locate(recipe.model), work)
        work.rename(folder)
    return dataclasses.replace(recipe, model=str(folder), quantization=quantization)


def unseen(task: str, recipe: Recipe) -> Studio:
    """The recipe's model with texts that are not in its file, all of them held out. The set's file has the first rows
    that its maker gives, so the next ones are others."""
    file = CACHE / f"{task}-test.jsonl"
    seen = Path(recipe.texts).read_text().splitlines()
    rows = [json.dumps(row) for row in example_set(task, len(seen) + TESTED)]
    assert rows[: len(seen)] == seen, f"{recipe.texts} is not what assets/world.py makes; the test would not be unseen"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows[len(seen) :]))
    return prepare(dataclasses.replace(recipe, texts=str(file), holdout=0.0, evaluate_items=TESTED), CACHE)


def tested(studio: Studio, theta: torch.Tensor) -> dict[str, float]:
    """The figures of a theta: of `unseen` texts, or of answers to held-out prompts that a reward judges."""
    if not isinstance(studio.task, Rewarded):
        losses, figures = measured(studio, theta, 64)
        return {"loss": float(np.mean(losses)), **figures}
    task = studio.task
    prompts = list(range(task.trained, len(task.prompts)))
    asked = [task._asked(prompts, [(i << 32) + n for n in prompts]) for i in range(ANSWERS)]
    with torch.no_grad(), studio.space.folded(theta):
        sampled = [r for part in asked for r in task._rewards(part, task._written(part))]
        greedy = task._rewards(asked[0], task._written(asked[0], sampled=False))
    return {"sampled": float(np.mean(sampled)), "greedy": float(np.mean(greedy)), "prompts": len(prompts)}


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
    parser.add_argument("--quantization", choices=("nf4", "gptq", "aqlm"), help="if not the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="if not all that fit the task")
    parser.add_argument("--anew", action="store_true", help="make curves again that are in the result file")
    parser.add_argument("--published-steps", type=int, default=720)
    parser.add_argument("--adam-steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = recipes.load(CHECKOUT / "styles" / given.task / "recipe.toml")
    recipe = copy_of(recipe, given.quantization or recipe.quantization)
    name = f"learning-{given.task}-{recipe.quantization}" if recipe.texts else "learning"
    texts = (CONTESTANTS[0],) if recipe.reward else (CONTESTANTS[0], CONTESTANTS[-1])
    contestants = given.only or (texts if recipe.texts else CONTESTANTS)
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Curve]] = before.get("curves", {})
    tests: dict[str, dict[str, dict]] = before.get("tests", {})  # by contestant and seed
    chosen: dict[str, float] = before.get("chosen", {})
    when = before.get("measured", dict.fromkeys(results, before.get("circumstances")))
    pictures = (recipe.steps + 1) * recipe.batch_size  # that our run sees; the last move is tried on a batch of its own
    few = -(-pictures // PICTURES)
    fresh = {} if given.anew else {c: set(curves) for c, curves in results.items()}
    for seed in given.seeds:
        wanted = [c for c in contestants if str(seed) not in fresh.get(c, ())]
        if not wanted:
            print(seed, "is in", file, flush=True)
            continue
        mine = dataclasses.replace(recipe, seed=seed)
        studio = prepare(mine, CACHE)
        paper = dataclasses.replace(mine, **PUBLISHED)
        short = dataclasses.replace(paper, steps=given.published_steps // 5)
        judge = None
        if recipe.texts:
            judge = studio if recipe.reward else unseen(given.task, mine)
            tests.setdefault("start", {})[str(seed)] = tested(judge, torch.zeros(studio.space.layout.size))

        def swept(name: str, settings: tuple, run: Callable[[float], tuple[Curve, torch.Tensor]]) -> float:
            """The best setting, found with the first seed."""
            if name not in chosen or (given.anew and seed == given.seeds[0]):  # noqa: B023
                curves = {setting: run(setting)[0] for setting in settings}
                chosen[name] = best(curves)
                print(name, {setting: curve[-1] for setting, curve in curves.items()}, flush=True)
            return chosen[name]

        def adam(name: str, steps: int) -> tuple[Curve, torch.Tensor]:
            run = lambda rate: first_order(studio, dataclasses.replace(mine, steps=steps), rate, 4)  # noqa: B023, E731
            return run(swept(name, RATES, run))

        def published() -> tuple[Curve, torch.Tensor]:
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
        for contestant in wanted:
            began = time.process_time()
            curve, theta = contest[contestant]()
            results.setdefault(contestant, {})[str(seed)] = curve
            found = {"processor seconds": time.process_time() - began} | (tested(judge, theta) if judge else {})
            tests.setdefault(contestant, {})[str(seed)] = found
            when[contestant] = circumstances()
            print(seed, contestant, curve[-1], found, flush=True)
            figures = {"measured": when, "recipe": recipe.public(), "chosen": chosen}
            save(name, figures | {"table": summary(results, tests), "tests": tests, "curves": results})
    print(file)
    print(json.dumps(summary(results, tests), indent=1))
    plot(results, RESULTS / f"{name}.png")


def summary(results: dict[str, dict[str, Curve]], tests: dict[str, dict[str, dict]]) -> dict:
    """For every seed: start, ends, our share of the first-order falls, and forwards to the published form's best; and
    the same of the tests."""
    table = {}
    for seed, ours in results.get("ours", {}).items():
        kept = {n: min(curves[seed], key=lambda point: point[1]) for n, curves in results.items() if seed in curves}
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
        found = {name: by_seed[seed] for name, by_seed in tests.items() if seed in by_seed}
        if "start" in found:
            table[seed]["test"] = found
        losses = {name: figures["loss"] for name, figures in found.items() if "loss" in figures}
        if losses.keys() >= {"start", "ours", "first order, as many pictures"}:
            fall = losses["start"] - losses["first order, as many pictures"]
            table[seed]["test"]["share of the fall"] = (losses["start"] - losses["ours"]) / fall
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

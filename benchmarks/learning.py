"""(c) The arena: held-out loss against forwards, of our default and of what it has to be compared with, on one task;
several seeds; a table, the targets, and a plot.

    python benchmarks/learning.py [--task tarot | woodcut | voice | sentiment | json | repair]
                                  [--quantization nf4 | gptq | aqlm] [--seeds 0 1 2] [--only ours LoRA ...] [--anew]
    python benchmarks/learning.py --all    # no runs: the plots of every task so far, and its tables: results/arena.md

Contestants: ours; QZO's published form with the best of a sweep of step sizes, and as published; MeZO on plain
weights, the best of a sweep; and with exact gradients, each with the best of a sweep of rates, Adam on the gains that
ours moves (for many steps, and with as many pictures as ours sees), on every scale of every layer (PEQA), and peft's
LoRA on the same quantised model. All learn from the same batches, but the published form and MeZO, which their authors
have without it, from texts without the base's own among them. Beside each curve stand the processor's seconds, and the
memory that a step needs, counted, with passes of 32 rows.

A task is a folder of `styles`, or `repair`: tiny-llm, whose scales were multiplied row by row by known log-normal
numbers, is to answer its own conversations again; its loss before the damage is the known optimum. Results go to
learning-<task>.json (tarot: learning.json), those of texts to learning-<task>-<quantization>.json; GPTQ and AQLM
copies of tiny-llm are made where they are missing. Where a reward, which has no gradient, is the aim, slopes are those
of the reward itself, and first order learns, like ours, from the best of the model's own answers.
The step of least held-out loss is tested on what was neither learnt nor held out, and on the base's own texts; or by
drawing subjects that no picture taught (`tasks.judge`), some of which are put side by side, for the first seed that is
asked for, in <result file>-pictures.png. Passes in which answers are written are not counted. What a forward is: see
`contestants`. The file is written after every curve, and a curve that is in it is not made again, but with --anew.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from common import RESULTS, circumstances, save
from contestants import (
    MEZO,
    PICTURES,
    PUBLISHED,
    Curve,
    Found,
    first_order,
    gains,
    lora,
    memory_of_first_order,
    memory_of_inference,
    memory_of_zeroth,
    scales,
    zeroth,
)
from tasks import NAMES, Task, Viewer, judge, recipe_of, task_of

from zo_engine.pictures import grid, save_png
from zo_engine.recipe import Recipe
from zo_engine.run import write_atomic
from zo_engine.train import Studio

TICKS = (0, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # of plots, in forwards
STEP_SIZES = (1e-3, 3e-3, 1e-2, 3e-2)  # of the sweep; the published one is 1e-6
MEZO_SIZES = (1e-5, 1e-4, 1e-3)  # its authors': 1e-7 to 1e-6, on models a thousand times as large
RATES = (3e-2, 1e-1, 2e-1)  # of first-order Adam's sweep: of logarithms of gains
SCALE_RATES = (1e-2, 3e-2, 1e-1)  # of scales
LORA_RATES = (1e-3, 3e-3, 1e-2)
OURS, PAPER, AS_PUBLISHED, MEZO_BEST = "ours", "published form, best step size", "published settings", "MeZO"
LONG, FEW, PEQA, LORA = "first order", "first order, as many pictures", "PEQA", "LoRA"
LONGER = "ours, 4,000 passes"  # where the recipe's steps take fewer
CONTESTANTS = (OURS, PAPER, AS_PUBLISHED, MEZO_BEST, LONG, FEW, PEQA, LORA, LONGER)
TEXTS_TESTED = {  # what a table says of the tests: a heading, and the figure below it
    "accuracy, unseen texts": ("accuracy", "{:.0%}"),
    "written just so": ("exact", "{:.0%}"),
    "perplexity of the base's paragraphs": ("perplexity of paragraphs", "{:.2f}"),
    "of its chats": ("perplexity of chats", "{:.2f}"),
}
PICTURES_TESTED = {
    "way to the taught look": ("look", "{:.0%}"),
    "subjects recognised": ("subjects", "{:.0%}"),
    "without the trigger: taught look": ("leak", "{:.0%}"),
    "without the trigger: subjects recognised": ("plain subjects", "{:.0%}"),
}
TENTH, SHARE, WITHIN, NEAR = 0.1, 0.85, 4000, 0.05  # what ours is asked for: see `targets`


class Contest:
    """One task with one seed, and everybody who can run on it. Sweeps are made once, with the first seed, and the best
    of their runs is that seed's curve."""

    def __init__(self, task: Task, chosen: dict[str, float], published_steps: int, adam_steps: int, few: int):
        self.task, self.studio, self.recipe, self.chosen = task, task.studio, task.recipe, chosen
        self.published_steps, self.adam_steps, self.few = published_steps, adam_steps, few
        self.folder = tempfile.TemporaryDirectory()  # of our run, which goes on if more passes are asked for

    def run(self, contestant: str) -> tuple[Found, Studio]:
        """What came of a contestant, and the studio whose model it is about."""
        studio = self.task.plain() if contestant == MEZO_BEST else self.studio
        return {
            OURS: lambda: zeroth(studio, self.recipe, 1, folder=Path(self.folder.name)),
            LONGER: lambda: zeroth(studio, self.recipe, 1, WITHIN, Path(self.folder.name)),
            PAPER: lambda: self._slopes(studio, PAPER, PUBLISHED, STEP_SIZES),
            AS_PUBLISHED: lambda: zeroth(studio, self._of(PUBLISHED, 1e-6, self.published_steps // 5), 20),
            MEZO_BEST: lambda: self._slopes(studio, MEZO_BEST, MEZO, MEZO_SIZES),
            LONG: lambda: self._adam(LONG, gains, RATES, self.adam_steps),
            FEW: lambda: self._adam(FEW, gains, RATES, self.few),
            PEQA: lambda: self._adam(PEQA, scales, SCALE_RATES, self.adam_steps),
            LORA: lambda: self._adam(LORA, lora, LORA_RATES, self.adam_steps),
        }[contestant](), studio

    def memory(self, contestant: str) -> float | None:
        """The bytes of a contestant's step, in those of inference; None where it is another's."""
        made = {
            OURS: lambda: memory_of_zeroth(self.studio, self.recipe),
            PAPER: lambda: memory_of_zeroth(self.studio, self._of(PUBLISHED, 1e-3, 1)),
            LONG: lambda: memory_of_first_order(self.studio, gains(self.studio)),
            PEQA: lambda: memory_of_first_order(self.studio, scales(self.studio)),
            LORA: lambda: memory_of_first_order(self.studio, lora(self.studio)),
        }.get(contestant)
        return made() / memory_of_inference(self.studio) if made and not self.recipe.reward else None

    def _of(self, settings: dict, step_size: float, steps: int) -> Recipe:
        return dataclasses.replace(self.recipe, **settings, step_size=step_size, steps=steps)

    def _slopes(self, studio: Studio, name: str, settings: dict, sizes: tuple[float, ...]) -> Found:
        short = lambda size: zeroth(studio, self._of(settings, size, self.published_steps // 5), 20)  # noqa: E731
        size, _ = self._swept(name, sizes, short)
        return zeroth(studio, self._of(settings, size, self.published_steps), 20)

    def _adam(self, name: str, what: Callable, rates: tuple[float, ...], steps: int) -> Found:
        recipe = dataclasses.replace(self.recipe, steps=steps)
        run = lambda rate: first_order(self.studio, recipe, what(self.studio), rate, 4)  # noqa: E731
        rate, found = self._swept(name, rates, run)
        return found or run(rate)

    def _swept(self, name: str, settings: tuple, run: Callable[[float], Found]) -> tuple[float, Found | None]:
        """The best setting, and its run if it was made now."""
        if name in self.chosen:
            return self.chosen[name], None
        found = {setting: run(setting) for setting in settings}
        self.chosen[name] = best({setting: f.curve for setting, f in found.items()})
        print(name, {setting: f.curve[-1] for setting, f in found.items()}, flush=True)
        return self.chosen[name], found[self.chosen[name]]


def forwards_to(curve: Curve, loss: float) -> float | None:
    """The forwards at which a curve first reaches a loss, interpolated; None if never."""
    for (f0, l0, *_), (f1, l1, *_) in zip(curve, curve[1:], strict=False):
        if l1 <= loss:
            return f1 if l0 == l1 else f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)
    return None


def best(curves: dict[float, Curve]) -> float:
    """The setting whose curve comes lowest, without having exploded."""
    ends = {k: min(p[1] for p in c) for k, c in curves.items() if np.isfinite(c[-1][1]) and c[-1][1] <= 2 * c[0][1]}
    return min(ends, key=ends.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tarot", choices=NAMES)
    parser.add_argument("--quantization", choices=("nf4", "gptq", "aqlm"), help="if not the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="if not all that fit the task")
    parser.add_argument("--anew", action="store_true", help="make curves again that are in the result file")
    parser.add_argument("--published-steps", type=int, default=720)
    parser.add_argument("--adam-steps", type=int, help="240 with pictures, 60 with texts, if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--all", action="store_true", help="make no runs, but tables and plots of every task so far")
    given = parser.parse_args()
    if given.all:
        print(write_all())
        return
    torch.set_num_threads(given.threads)
    recipe = recipe_of(given.task, given.quantization)
    name = "learning" if given.task == "tarot" else f"learning-{given.task}"
    name += f"-{recipe.quantization}" if recipe.texts else ""
    beside = {LONGER: bool(recipe.images), FEW: not recipe.reward}  # what fits some tasks only
    fitting = tuple(c for c in CONTESTANTS if beside.get(c, True))
    contestants = given.only or fitting
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Curve]] = before.get("curves", {})
    tests: dict[str, dict[str, dict]] = before.get("tests", {})  # by contestant and seed
    chosen: dict[str, float] = before.get("chosen", {})
    memory: dict[str, float] = before.get("memory", {})
    when = before.get("measured", dict.fromkeys(results, before.get("circumstances")))
    chosen = {PAPER if setting == "published" else setting: value for setting, value in chosen.items()}
    if given.anew:
        chosen, memory = ({c: v for c, v in found.items() if c not in contestants} for found in (chosen, memory))
    pictures = sum(map(recipe.batch_at, range(recipe.steps + 1)))  # that our run sees: the last move is tried on some
    steps = given.published_steps, given.adam_steps or (60 if recipe.texts else 240), -(-pictures // PICTURES)
    fresh = {} if given.anew else {c: set(curves) for c, curves in results.items()}
    for seed in given.seeds:
        wanted = [c for c in contestants if str(seed) not in fresh.get(c, ())]
        if not wanted:
            print(seed, "is in", file, flush=True)
            continue
        mine = dataclasses.replace(recipe, seed=seed)
        task = task_of(given.task, mine)
        contest, judged = Contest(task, chosen, *steps), judge(given.task, mine, task.studio)
        nothing = torch.zeros(task.studio.space.layout.size)
        tests.setdefault("start", {})[str(seed)] = judged(task.studio, lambda: task.studio.space.folded(nothing))  # noqa: B023
        rows = {}
        for contestant in wanted:
            began = time.process_time()
            found, studio = contest.run(contestant)
            results.setdefault(contestant, {})[str(seed)] = found.curve
            facts = {"processor seconds": time.process_time() - began} | found.facts
            facts |= judged(studio, found.put)
            if isinstance(judged, Viewer) and seed == given.seeds[0]:
                rows.setdefault("start", judged.shown(judged.exhibition.base))
                rows[contestant] = judged.shown(judged.drawn)
                sheet = grid([*rows.values()], judged.shown(judged.exhibition.prompts), [*rows], side=64)
                save_png(sheet, RESULTS / f"{name}-pictures.png")
            if task.answer is not None:
                facts["optimum"] = task.optimum
                if found.theta is not None:
                    facts["correlation with the answer"] = np.corrcoef(found.theta, task.answer)[0, 1]
            if contestant not in memory and (ratio := contest.memory(contestant)):
                memory[contestant] = ratio
            tests.setdefault(contestant, {})[str(seed)] = facts
            when[contestant] = circumstances()
            print(seed, contestant, found.curve[-1], facts, flush=True)
            figures = {"measured": when, "recipe": recipe.public(), "chosen": chosen, "memory": memory}
            table, asked = summary(results, tests), targets(results)
            save(name, figures | {"targets": asked, "table": table, "tests": tests, "curves": results})
    print(file)
    plot(results, RESULTS / f"{name}.png", tests)


def lowest(curve: Curve, within: float = np.inf) -> float:
    """The least held-out loss of a curve, in so many forwards."""
    return min(point[1] for point in curve if point[0] <= within)


def needed(ours: Curve, paper: Curve, loss: float) -> float | None:
    """The forwards of ours to a loss, as a share of the other's budget; None if it never comes there."""
    forwards = 0.0 if ours[0][1] <= loss else forwards_to(ours, loss)
    return None if forwards is None else forwards / paper[-1][0]


def targets(results: dict[str, dict[str, Curve]]) -> dict:
    """What ours is asked for, by seed where it is known, and whether it holds:

    "a tenth": forwards to the loss that the published form with its best step size has at its budget's end, as a share
    of that budget; at most TENTH; none where that loss is no better than the start. Beside it the same to its lowest
    loss on the way: its curves are noisy, and so is their lowest point, but a user would keep it. "share of the gap":
    of the fall from the base to first-order Adam on the same gains, however long it takes, the part made WITHIN so many
    forwards; at least SHARE. "worst of the seeds": the least of these shares in the largest; at least 1 - NEAR.
    """
    found: dict[str, dict] = {}
    ours = results.get(OURS, {})
    both = sorted(ours.keys() & results.get(PAPER, {}).keys())
    if both:
        at_end = {seed: needed(ours[seed], results[PAPER][seed], results[PAPER][seed][-1][1]) for seed in both}
        least = {seed: needed(ours[seed], results[PAPER][seed], lowest(results[PAPER][seed])) for seed in both}
        holds = all(share is not None and share <= TENTH for share in at_end.values())
        found["a tenth"] = {"seeds": at_end, "holds": holds, "to its lowest": least}
    shares, long = {}, ours | results.get(LONGER, {})
    for seed in sorted(ours.keys() & results.get(LONG, {}).keys()):
        start = ours[seed][0][1]
        shares[seed] = (start - lowest(long[seed], WITHIN)) / (start - lowest(results[LONG][seed]))
    if shares:
        found["share of the gap"] = {"seeds": shares, "holds": min(shares.values()) >= SHARE}
    if len(shares) > 1:
        worst = min(shares.values()) / max(shares.values())
        found["worst of the seeds"] = {"share": worst, "holds": worst >= 1 - NEAR}
    return found


def summary(results: dict[str, dict[str, Curve]], tests: dict[str, dict[str, dict]]) -> dict:
    """For every seed: the start, the least loss of everybody, our share of the first-order falls, and forwards to each
    other's losses; and the same of the tests."""
    table = {}
    for seed, ours in results.get(OURS, {}).items():
        kept = {n: min(curves[seed], key=lambda point: point[1]) for n, curves in results.items() if seed in curves}
        ends = {name: point[1] for name, point in kept.items()}
        start = ours[0][1]
        table[seed] = {"start": start, **ends, "our forwards": ours[-1][0]}
        for name in (n for n in (LONG, FEW, PEQA, LORA) if n in ends):
            table[seed][f"share of the fall of {name}"] = (start - ends[OURS]) / (start - ends[name])
        if paper := results.get(PAPER, {}).get(seed):
            table[seed] |= {
                "published form's forwards": paper[-1][0],
                "our forwards to the best loss of the published form": forwards_to(ours, lowest(paper)),
                "forwards of the published form to our loss": forwards_to(paper, ends[OURS]),
            }
        if len(ours[0]) > 2:
            table[seed]["accuracy"] = {"start": ours[0][2]} | {n: p[2] for n, p in kept.items() if len(p) > 2}
        found = {name: by_seed[seed] for name, by_seed in tests.items() if seed in by_seed}
        if "start" in found:
            table[seed]["test"] = found
        losses = {name: figures["loss"] for name, figures in found.items() if "loss" in figures}
        if losses.keys() >= {"start", OURS, FEW}:
            table[seed]["test"]["share of the fall"] = (losses["start"] - losses[OURS]) / (
                losses["start"] - losses[FEW]
            )
    return table


def plot(results: dict[str, dict[str, Curve]], path: Path, tests: dict[str, dict[str, dict]]) -> None:
    """Mean over the seeds, and the range as a band, of everybody who ran with as many seeds as ours; the known optimum
    as a dashed line."""
    figure = matplotlib.figure.Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    seeds = len(results.get(OURS, ()))
    for name in (name for name in CONTESTANTS if len(results.get(name, ())) >= max(1, seeds)):
        curves = results[name]
        shortest = min(len(curve) for curve in curves.values())
        values = np.array([[point[1] for point in curve[:shortest]] for curve in curves.values()])
        forwards = [point[0] for point in next(iter(curves.values()))[:shortest]]
        colour = f"C{CONTESTANTS.index(OURS if name == LONGER else name)}"  # the same in every task
        width, dash = (2.5, "-") if name == OURS else (1.5, ":" if name == LONGER else "-")
        axes.plot(forwards, values.mean(0), dash, label=name, color=colour, lw=width)
        axes.fill_between(forwards, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    optimum = [facts["optimum"] for facts in tests.get(OURS, {}).values() if "optimum" in facts]
    if optimum:
        axes.axhline(np.mean(optimum), color="0.5", ls="--", lw=1, label="before the damage")
    axes.set_xlabel(f"forwards of {PICTURES} (log scale beyond 100)")
    axes.set_xscale("symlog", linthresh=100)
    axes.set_xlim(0, last := axes.dataLim.x1)
    axes.set_xticks([x for x in TICKS if x <= last], [f"{x:,}" for x in TICKS if x <= last])
    axes.minorticks_off()
    axes.set_ylabel("held-out loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def write_all() -> Path:
    """results/arena.md: of every task that was run, the losses, what they cost, and which targets hold. Its plot."""
    lines = ["# The arena", "", "Made by `python benchmarks/learning.py --all` from the result files beside it.", ""]
    verdicts = ["| task | a tenth of the published form's passes to its end (to its lowest loss on the way) "
                "| 85 % of the gap in 4,000 | seeds within 5 % |"]  # fmt: skip
    verdicts.append("|---|---|---|---|")
    for file in sorted(RESULTS.glob("learning*.json")):
        found = json.loads(file.read_text())
        curves, tests, memory = found["curves"], found["tests"], found.get("memory", {})
        plot(curves, file.with_suffix(".png"), tests)
        name = file.stem.removeprefix("learning-").replace("learning", "tarot")
        verdicts.append(f"| {name} | " + " | ".join(said(targets(curves))) + " |")
        heads = PICTURES_TESTED if "look" in next(iter(tests.get("start", {"": {}}).values())) else TEXTS_TESTED
        head = "| | seeds | passes | held-out loss | processor seconds | memory, inference = 1 | "
        lines += [f"## {name}", "", head + " | ".join(heads) + " |", "|---" * (6 + len(heads)) + "|"]
        start = {seed: curve[0] for seed, curve in curves.get(OURS, {}).items()}
        rows = {"start": {seed: [point] for seed, point in start.items()}} | {
            n: curves[n] for n in CONTESTANTS if n in curves
        }
        for contestant, by_seed in rows.items():
            facts = tests.get(contestant, {})
            every = lambda key, form: ", ".join(form(f[key]) for s in by_seed if key in (f := facts.get(s, {})))  # noqa: B023, E731
            losses = ", ".join(f"{lowest(curve):.3f}" for curve in by_seed.values())
            ratio = f"{memory[contestant]:.2f}" if contestant in memory else ""
            lines.append(
                f"| {contestant} | {', '.join(by_seed)} | {max(c[-1][0] for c in by_seed.values()):,.0f} | {losses} | "
                f"{every('processor seconds', '{:.0f}'.format)} | {ratio} | "
                + " | ".join(every(key, form.format) for key, form in heads.values())
                + " |"
            )
        lines.append("")
    path = RESULTS / "arena.md"
    write_atomic(path, "\n".join([*lines[:4], *verdicts, "", *lines[4:]]))
    return path


def said(asked: dict) -> list[str]:
    """The targets of a task as cells of a table."""
    cells = []
    for name, form in (("a tenth", "1/{:.0f}"), ("share of the gap", "{:.0%}"), ("worst of the seeds", "{:.0%}")):
        if name not in asked:
            cells.append("not run")
            continue
        shares = asked[name].get("seeds", {"": asked[name].get("share")})
        parts = [shares.values(), asked[name].get("to its lowest", {}).values()]
        values, least = (", ".join(portion(share, name, form) for share in part) for part in parts)
        cells.append(f"{'yes' if asked[name]['holds'] else 'no'}: {values}" + (f" ({least})" if least else ""))
    return cells


def portion(share: float | None, name: str, form: str) -> str:
    """A share as it is written; of "a tenth" the reciprocal."""
    if share is None:
        return "never"
    if name != "a tenth":
        return form.format(share)
    return form.format(1 / share) if share else "none"


if __name__ == "__main__":
    main()

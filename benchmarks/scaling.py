"""(f) How passes grow with a model, what a forward costs on Stable Diffusion 3.5 Large, and what the embedded model's
passes would take there.

    python benchmarks/scaling.py [--sizes [64x6 ...]]   # --sizes: also train and measure, all or those (80 minutes)

Sizes: language models made as tiny-llm was, in other widths and depths, with as many steps. Each learns the sailor's
voice by the recipe of styles/voice; the passes are those to 85 % of the fall that first-order Adam makes on the same
gains. A power of the numbers that are moved is fitted to them.

The rest is an extrapolation, and marked as one: nothing of it has been run on a GPU. The arithmetic of a forward of 32
pictures is counted on the meta device by torch's FlopCounterMode, in the model's own class; the passes are those of the
demonstration's run, as they are, times 3, times 10, grown as fitted, and by two standard errors more than that. RATE is
an assumed share of a card's data sheet.
"""

import argparse
import dataclasses
import json
import subprocess
import sys

import numpy as np
import torch
from common import CHECKOUT, RESULTS, circumstances, save
from contestants import PICTURES, Curve, zeroth
from learning import LONG, LONGER, OURS, SHARE, Contest, forwards_to, lowest
from tasks import CACHE, recipe_of, task_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from zo_engine import plan
from zo_engine.hub import read_json
from zo_engine.models import locate
from zo_engine.recipe import Recipe
from zo_engine.style import make_space, views_of
from zo_engine.tasks.diffusion import flow_losses

SIZES = ("64x6", "128x6", "192x3", "192x6")  # width x blocks of language models; the last is tiny-llm
STEPS = 1219  # of training, for which tiny-llm was trained too
PASSES = 400  # up to which ours learns on
SHEET = 165e12  # operations a second: an RTX 4090 with bf16 factors and fp32 sums, dense, by NVIDIA's data sheet
RATE = 0.4 * SHEET  # assumed
TIMES = (1, 3, 10)  # as many passes as the embedded model took: assumed


def operations(config: dict, size: tuple[int, int], length: int) -> float:
    """Of one forward of PICTURES pictures; a multiplication and its addition are two."""
    model = plan.skeleton(config, "none")
    batch, _, _ = plan.task(model, plan.Work(PICTURES, length, size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow_losses(model, batch, torch.bfloat16)
    return float(counter.get_total_flops())


def moved(config: dict) -> int:
    """Numbers that ours moves by default."""
    return make_space(views_of(plan.skeleton(config), Recipe()), Recipe()).layout.size


def to_share(ours: Curve, first_order: Curve) -> float | None:
    """The passes of ours to SHARE of the fall of first-order Adam on the same gains; None if it did not come so far."""
    start = ours[0][1]
    return forwards_to(ours, start - SHARE * (start - lowest(first_order)))


def made(size: str) -> str:
    """The language model of a size, trained where it is missing."""
    if size == SIZES[-1]:
        return "tiny-llm"
    folder = CACHE / "sizes" / size
    if not folder.exists():
        width, blocks = size.split("x")
        given = {"width": width, "blocks": blocks, "steps": STEPS, "out": folder, "figures": f"{folder}.md"}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, CHECKOUT / "assets" / "build_tiny_llm.py", *words], check=True)
    return str(folder)


def sized(size: str, seeds: tuple[int, ...] = (0, 1, 2)) -> dict:
    """What the sailor's voice takes on a language model of a size."""
    recipe, chosen, found = dataclasses.replace(recipe_of("voice"), model=made(size)), {}, {}
    for seed in seeds:
        contest = Contest(task_of("voice", dataclasses.replace(recipe, seed=seed)), chosen, 0, 60, 0)
        ours = zeroth(contest.studio, contest.recipe, 1, PASSES).curve
        adam = contest.run(LONG)[0].curve
        found[seed] = {"passes": to_share(ours, adam), "start": ours[0][1], OURS: lowest(ours), LONG: lowest(adam)}
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate(recipe.model))).num_parameters()
    numbers = contest.studio.space.layout.size
    return {"measured": circumstances(), "parameters": parameters, "numbers": numbers, "seeds": found}


def growth(sizes: dict[str, dict]) -> tuple[float, float] | None:
    """(power, standard error) of the numbers moved with which the passes grow, by least squares of the logarithms; one
    point a size, for seeds share the model. None where a run did not come so far, or sizes are missing."""
    found = {size["numbers"]: [seed["passes"] for seed in size["seeds"].values()] for size in sizes.values()}
    if len(found) < len(SIZES) or any(None in passes for passes in found.values()):
        return None
    slope, covariance = np.polyfit(np.log([*found]), [np.log(passes).mean() for passes in found.values()], 1, cov=True)
    return float(slope[0]), float(covariance[0, 0] ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, help="train and measure these models again, or all")
    file = RESULTS / "scaling.json"
    sizes = json.loads(file.read_text())["sizes"] if file.exists() else {}
    again = parser.parse_args().sizes
    for size in SIZES if again == [] else again or ():
        sizes[size] = sized(size)
        print(size, json.dumps(sizes[size]), flush=True)
    grown = growth(sizes)
    large, tiny = plan.SHAPES["sd3.5-large"], read_json(locate("tiny-sd3") / "transformer" / "config.json")
    of_large, of_tiny = operations(large, (512, 512), 333), operations(tiny, (64, 96), 77)
    numbers = {"sd3.5-large": moved(large), "tiny-sd3": moved(tiny)}
    curves = json.loads((RESULTS / "learning.json").read_text())["curves"]
    demo = max(curve[-1][0] for curve in curves[OURS].values())  # the demonstration's 36 steps
    longest = curves[OURS] | curves.get(LONGER, {})
    times = {f"{time} x": float(time) for time in TIMES}
    if grown:
        power, error = grown
        for name, exponent in (("grown as measured", power), ("two standard errors more", power + 2 * error)):
            times[name] = (numbers["sd3.5-large"] / numbers["tiny-sd3"]) ** exponent
    figures = {
        "sizes": sizes,
        "power of the numbers moved with which passes grow, and its standard error": grown,
        "not run": "an extrapolation; no figure from here on is from a GPU",
        "operations of a forward of 32 pictures": {"sd3.5-large, 512 px": of_large, "tiny-sd3, 64 x 96 px": of_tiny},
        "gains": numbers,
        "operations a second, assumed": RATE,
        "passes of the embedded model's 36 steps": demo,
        "passes to 85 % of first-order Adam's fall": {s: to_share(longest[s], curves[LONG][s]) for s in curves[LONG]},
        "times as many passes": times,
        "hours on an RTX 4090": {name: time * demo * of_large / RATE / 3600 for name, time in times.items()},
    }
    print(json.dumps(figures, indent=1), save("scaling", figures))


if __name__ == "__main__":
    main()

"""(f) What a forward costs on Stable Diffusion 3.5 Large, and what the embedded model's passes would take there.

    python benchmarks/scaling.py

An extrapolation, and marked as one: nothing of it has been run on a GPU. The arithmetic of a forward of 32 pictures is
counted on the meta device by torch's FlopCounterMode, in the model's own class; the passes are those of the
demonstration's run and of 85 % of first-order Adam's fall, by seed, in results/learning.json. How passes grow with a
model is not known: they are taken as they are, times 3, and times 10. RATE is an assumed share of a card's data sheet.
"""

import json

import torch
from common import RESULTS, save
from contestants import PICTURES
from learning import LONG, OURS, SHARE, forwards_to, lowest
from torch.utils.flop_counter import FlopCounterMode

from zo_engine import plan
from zo_engine.hub import read_json
from zo_engine.models import locate
from zo_engine.recipe import Recipe
from zo_engine.scales import find_scales
from zo_engine.style import make_space
from zo_engine.tasks.diffusion import flow_losses

SHEET = 165e12  # operations a second: an RTX 4090 with bf16 factors and fp32 sums, dense, by NVIDIA's data sheet
RATE = 0.4 * SHEET  # assumed
GROWTH = (1, 3, 10)  # times as many passes as the embedded model took: assumed


def operations(config: dict, size: tuple[int, int], length: int) -> float:
    """Of one forward of PICTURES pictures; a multiplication and its addition are two."""
    model = plan.skeleton(config, "none")
    batch, _, _ = plan.task(model, plan.Work(PICTURES, length, size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow_losses(model, batch, torch.bfloat16)
    return float(counter.get_total_flops())


def gains(config: dict) -> int:
    """Numbers that ours moves by default."""
    return make_space(find_scales(plan.skeleton(config)), Recipe()).layout.size


def needed() -> dict[str, float | None]:
    """By seed: the passes to SHARE of the fall to first-order Adam on the same gains, or None where a run of ours did
    not come so far."""
    curves = json.loads((RESULTS / "learning.json").read_text())["curves"]
    found = {}
    for seed in sorted(curves[OURS].keys() & curves[LONG].keys()):
        start = curves[OURS][seed][0][1]
        found[seed] = forwards_to(curves[OURS][seed], start - SHARE * (start - lowest(curves[LONG][seed])))
    return found


def main() -> None:
    large, tiny = plan.SHAPES["sd3.5-large"], read_json(locate("tiny-sd3") / "transformer" / "config.json")
    of_large, of_tiny = operations(large, (512, 512), 333), operations(tiny, (64, 96), 77)
    passes = json.loads((RESULTS / "learning.json").read_text())["curves"][OURS]
    demo = max(curve[-1][0] for curve in passes.values())  # the demonstration's 36 steps
    hours = {f"{growth} x": growth * demo * of_large / RATE / 3600 for growth in GROWTH}
    figures = {
        "not run": "an extrapolation; no figure here is from a GPU",
        "operations of a forward of 32 pictures": {"sd3.5-large, 512 px": of_large, "tiny-sd3, 64 x 96 px": of_tiny},
        "gains": {"sd3.5-large": gains(large), "tiny-sd3": gains(tiny)},
        "operations a second, assumed": RATE,
        "passes of the embedded model's 36 steps": demo,
        "passes to 85 % of first-order Adam's fall": needed(),
        "hours on an RTX 4090 for so many times these passes": hours,
    }
    print(json.dumps(figures, indent=1), save("scaling", figures))


if __name__ == "__main__":
    main()

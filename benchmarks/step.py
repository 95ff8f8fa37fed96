"""(a) Time of a step against two plain forwards of the same batch; (b) peak memory against the loaded model.

    python benchmarks/step.py [--model tiny-sd3] [--batch 16] [--device cpu]

Both sides of every ratio run interleaved in one process, and the median of the rounds is reported.
"""

import argparse
import statistics
import time

import torch
from common import save

from zo_engine import models
from zo_engine.blocks import Prefix, levels
from zo_engine.newton import GaussNewton
from zo_engine.probes import GainSpace, GroupSpace, central, evaluate
from zo_engine.recipe import DIRECTIONS, Recipe
from zo_engine.scales import find_scales
from zo_engine.tasks.diffusion import Batch, flow_errors, flow_losses
from zo_engine.train import memory, pick_device, pick_dtype
from zo_engine.zo import ZO, slopes

LONG = 3  # rounds of the contestants that take seconds
ROWS = 64  # of one forward pass in a Gauss-Newton step


def synthetic(transformer: torch.nn.Module, batch: int, height: int, width: int, tokens: int) -> Batch:
    """Random latents and text of the right shapes."""
    config, device = transformer.config, transformer.device
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return Batch(
        draw(batch, config.in_channels, height, width),
        draw(batch, config.in_channels, height, width),
        torch.linspace(0.1, 0.9, batch).to(device),
        draw(batch, tokens, config.joint_attention_dim),
        draw(batch, config.pooled_projection_dim),
        torch.ones(batch, device=device),
    )


@torch.no_grad()
def measure(model: str, batch: int, rounds: int, device: str) -> dict:
    where = pick_device(device)
    dtype = pick_dtype("auto", where)
    folder = models.locate(model)
    transformer = models.load_transformer(folder, device=where, dtype=dtype)
    loaded = memory(where)
    views = find_scales(transformer)
    size = 8 if model == "tiny-sd3" else 64
    tokens = 77 + models.text_length(folder) if model != "tiny-sd3" else 32
    data = synthetic(transformer, batch, size, size, tokens)
    twice = data.take(torch.arange(batch).repeat(2))
    wide = data.take(torch.arange(ROWS) % batch)

    def plain() -> None:
        flow_losses(transformer, data, dtype)
        flow_losses(transformer, data, dtype)

    def stacked() -> None:
        flow_losses(transformer, twice, dtype)

    def step(space, own: bool, count: int):
        zo = ZO(space.layout, seed=0, per_step=count, optimizer="momentum", step_size=1e-6, device=where)

        def run() -> None:
            z = zo.directions()
            probes = central(z, 0.01, batch, own)
            losses = evaluate(space, zo.theta, probes, lambda s: flow_losses(transformer, data.take(s), dtype))
            d = slopes(losses.cpu(), 0.01, len(z)).tolist()
            zo.theta = zo.theta - zo.descend(z, d, zo.clip_level(d)) * 1e-6

        return run

    found = levels(views, Recipe().depth)
    tuned = GainSpace({name: views[name] for level in found for name in level.layers})
    parts = [tuned.layout.part(level.layers) for level in found]
    counts = [level.share(DIRECTIONS) for level in found]
    newton = GaussNewton(tuned.layout, parts, seed=0, per_part=counts, device=where)
    prefixes = [Prefix(transformer, level) if level.first else None for level in found]

    def gauss_newton() -> None:
        examples, replays = data.take(torch.arange(batch)), {}
        rows = lambda s: flow_errors(transformer, examples.take(s), dtype)  # noqa: E731

        def outcomes(part, probes, fresh):
            if prefixes[part] and part not in replays:
                with tuned.dressed(newton.theta):
                    replays[part] = prefixes[part].run(rows, batch, ROWS)
            errors = evaluate(tuned, newton.theta, probes, rows, ROWS, replays.get(part))
            return torch.cat([errors.square().sum(1, keepdim=True), errors], 1)

        newton.advance(outcomes, batch, batch)
        newton.theta.zero_()
        newton.step = 0

    def its_rows() -> None:
        for _ in range(newton.cost(0) * batch // ROWS):
            flow_losses(transformer, wide, dtype)

    contestants = {
        "two plain forwards": plain,
        "one forward of the stacked batch": stacked,
        "step, gain space, rows": step(GainSpace(views), True, batch),
        "step, gain space, rows and columns": step(GainSpace(views, columns=True), True, batch),
        "step, group space": step(GroupSpace(views), False, 1),
        "Gauss-Newton step": gauss_newton,
        "plain forwards of as many rows": its_rows,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            if name in ("Gauss-Newton step", "plain forwards of as many rows") and len(times[name]) > LONG:
                continue
            if where.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if where.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    base = medians["two plain forwards"]
    return {
        "model": model,
        "batch": batch,
        "rounds": rounds,
        "seconds": medians,
        "ratio_to_two_plain_forwards": {name: value / base for name, value in medians.items()},
        "gauss_newton_to_plain_forwards_of_as_many_rows": (
            medians["Gauss-Newton step"] / medians["plain forwards of as many rows"]
        ),
        "memory_bytes": {"loaded": loaded, "peak": memory(where), "theta": GainSpace(views).layout.size * 4},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    figures = measure(given.model, given.batch, given.rounds, given.device)
    for name, ratio in figures["ratio_to_two_plain_forwards"].items():
        print(f"{name:40} {figures['seconds'][name] * 1e3:9.1f} ms  x {ratio:.2f}")
    print(save(f"step-{given.model}", figures))


if __name__ == "__main__":
    main()

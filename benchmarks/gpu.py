"""The whole benchmark of a GPU: peak memory and time of a step, resident and streamed, for models of published shapes.

    python benchmarks/gpu.py [--only sd3.5-large,opt-13b] [--minutes 60] [--device cuda] [--tiny]

Codes and scales are drawn at random, so nothing is downloaded. Every row is written as soon as it is measured, to
results/gpu.json and results/gpu.md, and is not measured again: stop and start as you like. A row that does not fit the
machine's memory or the time that is left is written with its reason. Without a GPU the table holds what
`zo_engine.plan` reckons, each row marked "not run on a GPU yet"; --tiny runs the same code on a small model, anywhere.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from common import RESULTS, circumstances
from torch import nn

from zo_engine import plan, recipe
from zo_engine.blocks import Prefix, levels
from zo_engine.newton import GaussNewton
from zo_engine.noise import directions
from zo_engine.offload import Mover, block_names, end_names
from zo_engine.plan import SHAPES, Work, skeleton
from zo_engine.probes import GainSpace, GroupSpace, central, evaluate
from zo_engine.run import write_atomic
from zo_engine.scales import find_scales

NOT_RUN = "not run on a GPU yet"
TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 259,
    "num_key_value_heads": 1, "intermediate_size": 128, "max_position_embeddings": 128,
}  # fmt: skip
EPS = 1e-3  # of the published form
FEW = 8  # directions of the Gauss-Newton step that is measured: memory is planned for the same, time is not waited for


@dataclass(frozen=True)
class Case:
    """One row: a shape at a batch, in one space, resident or streamed."""

    model: str
    batch: int
    side: int = 0  # of a picture, in pixels
    length: int = 512  # tokens of a text; of a caption 333
    space: str = "gain"
    streamed: bool = False

    @property
    def name(self) -> str:
        size = f"{self.side} px" if self.side else f"{self.length} tokens"
        return f"{self.model}, {size}, batch {self.batch}, {self.space}, {'streamed' if self.streamed else 'resident'}"

    def work(self, dtype: torch.dtype, directions: int = 0) -> Work:
        """A step of Gauss-Newton in gain space, or of slopes in group space."""
        length, size = (333, (self.side, self.side)) if self.side else (self.length, None)
        optimizer = "gauss-newton" if self.space == "gain" else "sgd"
        return Work(self.batch, length, size, directions=directions, dtype=dtype, space=self.space, optimizer=optimizer)


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("tiny", 2, length=16, space=s, streamed=t) for t in (False, True) for s in ("gain", "group")]
    both = [(streamed, space) for streamed in (False, True) for space in ("gain", "group")]
    sd3 = [
        Case("sd3.5-large", batch, side, space=space, streamed=streamed)
        for side in (512, 1024)
        for batch in (1, 4, 8, 16)
        for streamed, space in both
    ]
    texts = [
        Case(name, 1, length=2048, space=space, streamed=streamed)
        for name in SHAPES
        if name != "sd3.5-large"
        for streamed, space in both
    ]
    return sd3 + texts


# A model of true shape with random numbers


@torch.no_grad()
def build(config: dict, device: torch.device, dtype: torch.dtype, streamed: bool) -> nn.Module:
    """Block by block, so that the device never holds what streams. Codes are uniform, scales as of N(0, 1 / width)."""
    model = skeleton(config, "nf4", dtype)
    names, ends = block_names(model), end_names(model) if streamed else []
    generator = torch.Generator(device).manual_seed(0)

    def fill(module: nn.Module, home: torch.device) -> None:
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                if isinstance(part, Linear4bit) and name == "weight":
                    codes = torch.randint(
                        0, 256, parameter.shape, dtype=torch.uint8, device=device, generator=generator
                    )
                    state = parameter.quant_state
                    state.absmax = torch.full(state.absmax.shape, 3 / part.in_features**0.5, device=home)
                    state.code = NF4.to(home)
                    part.weight = Params4bit(
                        codes.to(home), quant_state=state, compress_statistics=False, quant_type="nf4", module=part,
                        bnb_quantized=True,
                    )  # fmt: skip
                else:
                    numbers = torch.randn(parameter.shape, dtype=dtype, device=device, generator=generator)
                    numbers = numbers / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else numbers * 0 + 1
                    part._parameters[name] = nn.Parameter(numbers.to(home), requires_grad=False)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None and buffer.is_meta:  # positions: any finite numbers cost the same
                    part._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype, device=home)

    for name in (*names, *ends):
        fill(model.get_submodule(name), torch.device("cpu") if streamed else device)
    fill(model, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if streamed:
        model.mover = Mover(model, names, device, plan.SLOTS, ends=ends)
    return model


def _nf4() -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu")


NF4 = _nf4()


# Measuring


def timed(run: Callable[[], object], device: torch.device, rounds: int = 3) -> tuple[float, int]:
    """(median seconds of a run after one to warm up, peak bytes of the device)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device=None: None
    run()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return sorted(seconds)[rounds // 2], peak


@torch.no_grad()
def measure(case: Case, config: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """A two-point step with one direction an example, beside two plain forwards of the same batch, the published form
    (absolute noise in place, three passes over the scales, drawn anew for each tensor) and the Gauss-Newton step."""
    model = build(config, device, dtype, case.streamed)
    mover = getattr(model, "mover", None)
    work = case.work(dtype)
    batch, outcomes, losses = plan.task(model, work, str(device))
    batch = batch.take(torch.arange(case.batch))
    views = find_scales(model)
    space = GainSpace(views) if case.space == "gain" else GroupSpace(views, bring=mover and mover.bring)
    home = space.home(device)
    theta = torch.zeros(space.layout.size, device=home)
    own = case.space == "gain"
    rows = lambda sample: losses(batch.take(sample))  # noqa: E731
    number = iter(range(1_000_000))

    def noise() -> torch.Tensor:
        return directions("rademacher", space.layout, 0, next(number), range(case.batch if own else 1), home)

    def step() -> torch.Tensor:
        return evaluate(space, theta, central(noise(), 0.01, case.batch, own), rows)

    def plain() -> None:
        losses(batch)
        losses(batch)

    def published() -> None:
        for sign, forward in ((1, True), (-2, True), (1, False)):
            generator = torch.Generator(device).manual_seed(0)
            for view in views.values():
                scale = view.live  # home where it streams: there the published way has to perturb on the host
                z = torch.randn(scale.shape, generator=generator, device=device)
                scale.add_(z.to(scale.device), alpha=sign * EPS)
            if forward:
                losses(batch)

    before = mover.moved if mover else 0
    seconds, peak = timed(step, device)
    moved = (mover.moved - before) / 4 if mover else 0
    facts = {
        "peak": peak,
        "step": seconds,
        "plain": timed(plain, device)[0],
        "noise": timed(noise, device)[0],
        "published": timed(published, device, 1)[0],
        "moved": moved,
        "late": mover.waits / max(1, mover.visits) if mover else 0.0,  # share of visits whose block was not on its way
        "rate": case.batch * (1 if case.side else case.length) / seconds,
    }
    if case.space == "gain":
        facts["gauss_newton"], facts["gauss_newton_peak"] = timed(newton(model, work, device), device, 1)
        facts["gauss_newton_planned"] = reckoned(case, config, dtype, FEW)["device"]
    return facts


def newton(model: nn.Module, work: Work, device: torch.device) -> Callable[[], object]:
    """One Gauss-Newton step as training makes it, with passes of as many rows as the planner gives."""
    space, _ = work.method(model)
    found = levels(space.views, work.depth)
    parts = [space.layout.part(level.layers) for level in found]
    prefixes = [Prefix(model, level) if level.first else None for level in found]
    batch, outcomes, losses = plan.task(model, work, str(device))
    rows = max(1, plan.TOKENS // work.tokens(model))

    def run() -> None:
        method = GaussNewton(space.layout, parts, seed=0, per_part=[FEW] * len(parts), device=device)
        replays: dict = {}

        def evaluated(part, probes, fresh):
            read = losses if fresh else outcomes
            sample = lambda index: read(batch.take(index))  # noqa: E731
            if prefixes[part] and (part, fresh) not in replays:
                with space.dressed(method.theta):
                    replays[part, fresh] = prefixes[part].run(sample, work.batch, rows)
            answer = evaluate(space, method.theta, probes, sample, rows, replays.get((part, fresh)))
            return answer[:, None] if fresh else answer

        method.advance(evaluated, work.batch, work.batch)

    return run


# The table


def reckoned(case: Case, config: dict, dtype: torch.dtype, directions: int = 0, like: dict | None = None) -> dict:
    """What the planner says of a step, resident or with everything away that can be: of the last ones, which have most
    directions, if not said otherwise. like: the plan of the other of these two, whose step allocates the same in gain
    space."""
    model = skeleton(config, "nf4", dtype)
    work = case.work(dtype, directions)
    away = len(block_names(model)) if case.streamed else 0
    working = like["working"] if like and case.space == "gain" else None
    made = plan.make(model, work, max(1, plan.TOKENS // work.tokens(model)), away, ends=case.streamed, working=working)
    return plan.as_dict(made)


def written(rows: dict[str, dict], name: str) -> None:
    """results/gpu.json and the table for people."""
    RESULTS.mkdir(exist_ok=True)
    write_atomic(
        RESULTS / f"{name}.json", json.dumps({"circumstances": circumstances(), "rows": rows}, indent=1) + "\n"
    )
    gigabytes = lambda size: f"{size / 1e9:.2f}"  # noqa: E731
    lines = [
        "| case | planned peak, GB | of the first steps | theta, GB | waiting, GB | peak, GB | step, s | "
        "two plain forwards, s | ratio | published form, s | "
        "moved a step, GB | blocks late | noise | images or tokens a second | state |",
        "|---|" + "---|" * 14,
    ]
    for row, facts in rows.items():
        planned, found = facts["planned"], facts.get("measured")
        theta = planned["theta"] + planned["home"]
        cells = [row, *map(gigabytes, (planned["device"], facts["first"], theta, planned["host"]))]
        if found:
            ratio, share = found["step"] / found["plain"], found["noise"] / found["step"]
            cells += [gigabytes(found["peak"]), f"{found['step']:.3f}", f"{found['plain']:.3f}", f"{ratio:.2f}"]
            cells += [f"{found['published']:.3f}", gigabytes(found["moved"]), f"{found['late']:.0%}", f"{share:.0%}"]
            cells.append(f"{found['rate']:.1f}")
        else:
            cells += [""] * 9
        lines.append("| " + " | ".join([*cells, facts["state"]]) + " |")
    write_atomic(RESULTS / f"{name}.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes, separated by commas")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device, began = torch.device(given.device), time.monotonic()
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    name = "gpu-tiny" if given.tiny else "gpu"
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for case in cases(given.tiny):
        if (given.only and case.model not in given.only.split(",")) or "measured" in rows.get(case.name, {}):
            continue
        config = TINY if given.tiny else SHAPES[case.model]
        if time.monotonic() - began > 60 * given.minutes:
            break
        row = rows.setdefault(case.name, {"case": asdict(case)})
        planning = torch.bfloat16 if not given.tiny else dtype
        other = rows[dataclasses.replace(case, streamed=False).name]["planned"] if case.streamed else None
        row["planned"] = reckoned(case, config, planning, like=other)
        row["first"] = row["planned"]["device"]
        if case.space == "gain":
            row["first"] = reckoned(case, config, planning, recipe.DIRECTIONS)["device"]
        whole, blocks = plan.sizes(skeleton(config, "nf4", dtype))
        free = torch.cuda.mem_get_info(device)[0] if cuda else 0
        if not (cuda or given.tiny):
            row["state"] = NOT_RUN
        elif case.streamed and 1.5 * sum(blocks) > psutil.virtual_memory().available:
            row["state"] = "not enough host memory"  # pinned memory is had in powers of two
        elif cuda and not case.streamed and whole > 0.9 * free:
            row["state"] = "not enough device memory"
        else:
            try:
                row["measured"] = measure(case, config, device, dtype)
                row["state"] = "measured" if cuda else NOT_RUN
            except torch.OutOfMemoryError as error:
                row["state"] = f"ran out of device memory: {str(error).split('. ')[0]}"
            if cuda:
                torch.cuda.empty_cache()
        written(rows, name)
        print(f"{case.name}: {row['state']}", flush=True)
    print(RESULTS / f"{name}.md")


if __name__ == "__main__":
    main()

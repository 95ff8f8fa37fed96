"""The methods that meet in the arena: each gives a curve of held-out loss against forwards, and the best it came to.

A forward is one pass of PICTURES pictures or texts through the whole model; line searches and tried dampings count.
Where only the last blocks are tuned, a step counts the blocks that it runs: those before them once, the tuned ones for
every probe, and the output layers as a quarter of a block (measured: 20 ms of 395). A first-order step counts three:
one forward, and a backward that costs about two. Where a reward is the aim, answers are written beside that: one for a
forward of a method of slopes, four for an example of the others, which learn from the best ones.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zo_engine.blocks import levels
from zo_engine.journal import Record
from zo_engine.newton import GaussNewton
from zo_engine.offload import tensors
from zo_engine.plan import Counter
from zo_engine.probes import Space
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.scales import ScaleView, find_scales
from zo_engine.tasks.text import Language
from zo_engine.train import Studio, Training
from zo_engine.zo import ZO

PICTURES = 32  # of one forward, and of one step of the published form and of first order
PUBLISHED = {
    "batch_size": PICTURES,
    "directions": 0,  # one a step
    "space": "absolute",
    "depth": 1.0,
    "layers": (),
    "noise": "gaussian",
    "eps": 1e-3,
    "clip": 100.0,
    "optimizer": "sgd",
    "decay": 0.0,
    "own_texts": 0.0,
}
# MeZO (arXiv:2305.17333) is the published form without clipping on plain weights: each is a scale of its own
# (tests/test_mezo.py). With signs for normals, which are drawn in a fifth of the time and estimate no worse.
MEZO = PUBLISHED | {"quantization": "none", "clip": 1e9, "noise": "rademacher"}
RANK = 8  # of LoRA, with twice that as alpha

Curve = list[tuple[float, ...]]  # (forwards, held-out loss), and the accuracy or the greedy reward where there is one


@dataclass
class Found:
    """What came of a contestant. put(): the studio's model at the least held-out loss, while the context lasts."""

    curve: Curve
    put: Callable[[], AbstractContextManager]
    theta: Tensor | None = None  # behind it, where gains of the recipe were moved
    facts: dict[str, float] = field(default_factory=dict)


# --- zeroth order -----------------------------------------------------------------------------------------------------


def zeroth(studio: Studio, recipe: Recipe, every: int, within: float = 0, folder: Path | None = None) -> Found:
    """Train as the recipe says and note the held-out loss every `every` steps. within: forwards, up to which more steps
    follow upon those of the recipe; nothing of a step of Gauss-Newton depends on how many follow. folder: where the run
    is kept, to be gone on with by a call that asks for more."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        path = Path(place) / "run"
        run = Run.open(path) if path.exists() else Run.create(path, recipe)
        studio = studio.changed(**vars(recipe))
        if isinstance(studio.task, Language) and not recipe.keeps_texts:
            studio.task = copy.copy(studio.task)
            studio.task.kept = None
        training = Training(run, studio)
        training.resume()
        made, known = run.journal(), {facts["step"]: facts for facts in run.evaluations()}
        forwards, curve = 0.0, []
        for step in count():
            ends = step >= recipe.steps and forwards >= within
            if step % every == 0 or ends:
                if step not in known:
                    training.evaluate()
                figures = known.get(step) or run.evaluations()[-1]
                loss = figures["loss"] if figures["loss"] is not None else float("nan")
                curve.append((forwards, loss, *(figures[n] for n in ("accuracy", "reward") if n in figures)))
                if ends or not curve[-1][1] <= 3 * curve[0][1]:
                    break  # at the end, or it explodes
            if step == len(made):
                made.append(training.step())
                run.append_step(made[-1])
            forwards += price(studio, training.method, made[step])
        theta = training.theta_at(training.best[1])
        return Found(curve, partial(studio.space.folded, theta), theta if recipe.space == "gain" else None)


def price(studio: Studio, method: GaussNewton | ZO, record: Record) -> float:
    """The forwards of a step."""
    recipe = studio.recipe
    found = levels(studio.space.views, recipe.depth)
    blocks = len(studio.model.get_submodule(found[0].blocks)) if found[0].blocks else 0  # without: all in one level
    shares = [(blocks - level.first + 0.25) / (blocks + 0.25) for level in found]
    if isinstance(method, GaussNewton):
        rows, step = [count + 1 for count in method.counts(record.step)], record.step
        tried = (len(studio.task.tries) + 1) * recipe.tried_at(step + 1, studio.examples)  # with a reward, at most
        each = sum(share * count + (1 - share) for share, count in zip(shares, rows, strict=True))
        return (each * recipe.batch_at(step, studio.examples) + shares[-1] * tried) / PICTURES
    directions = method.per_step / (recipe.batch_size if recipe.space == "gain" else 1)
    probes = 2 * directions + (3 if record.search else 0)
    return (1 - shares[-1] + shares[-1] * probes) * recipe.batch_size / PICTURES


# --- first order ------------------------------------------------------------------------------------------------------


@dataclass
class Tuned:
    """What first order moves, and how the model computes with it as it stands."""

    parameters: list[Tensor]
    dressed: Callable[[], AbstractContextManager]


def gains(studio: Studio) -> Tuned:
    """The very numbers that ours moves."""
    theta = torch.zeros(studio.space.layout.size, requires_grad=True)
    return Tuned([theta], lambda: studio.space.dressed(theta))


def scales(studio: Studio) -> Tuned:
    """Every scale of every quantised layer, as PEQA does (arXiv:2305.14152): a theta for each group of weights."""
    space = studio.changed(space="group", depth=1.0, layers=(), optimizer="sgd").space
    theta = torch.zeros(space.layout.size, requires_grad=True)
    weights = {name: weight_of(view) for name, view in space.views.items()}
    return Tuned([theta], lambda: _differentiable(space, weights, theta))


@torch.no_grad()
def weight_of(view: ScaleView) -> Tensor:
    """The weight [out, in] that a layer computes with, in fp32: what it answers to the columns of the identity."""
    found = view.module(torch.eye(view.in_features, dtype=getattr(view.module, "compute_dtype", None))).float()
    return (found if view.bias is None else found - view.bias).T.contiguous()


@contextmanager
def _differentiable(space: Space, weights: dict[str, Tensor], theta: Tensor) -> Iterator[None]:
    """The model with the scales of theta, as products whose derivative torch knows: bitsandbytes' own has none by its
    scales."""
    parts = space.layout.split(theta)

    def dressed(view: ScaleView) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            factor = parts[f"{view.name}.groups"].exp()
            if view.rowwise:
                wide = view.widened(factor)
            else:  # a group straddles two rows
                wide = factor.repeat_interleave(view.block)[: weights[view.name].numel()].view_as(weights[view.name])
            return linear(x, weights[view.name] * wide, view.bias)

        return forward

    try:
        for view in space.views.values():
            view.module.forward = dressed(view)
        yield
    finally:
        for view in space.views.values():
            view.module.__dict__.pop("forward", None)


def lora(studio: Studio) -> Tuned:
    """peft's own LoRA on every quantised layer: QLoRA (arXiv:2305.14314), where they are in four bits."""
    model, names = studio.model, list(find_scales(studio.model))
    before = {name: model.get_submodule(name) for name in names}
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    marked = getattr(model, "is_loaded_in_4bit", False)
    model.is_loaded_in_4bit = studio.recipe.quantization in ("nf4", "fp4")  # so peft knows which class to take
    with torch.random.fork_rng(devices=[]):  # peft draws its first matrices from the global generator
        torch.manual_seed(studio.recipe.seed)  # noqa: TID251
        peft.inject_adapter_in_model(config, model)
    model.is_loaded_in_4bit = marked
    del model.peft_config  # it is as it was, but inside of `dressed`
    after = {name: model.get_submodule(name) for name in names}
    parameters = [p for p in model.parameters() if p.requires_grad]
    _put(model, before)
    return Tuned(parameters, lambda: _swapped(model, before, after))


def _put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


@contextmanager
def _swapped(model: nn.Module, before: dict[str, nn.Module], after: dict[str, nn.Module]) -> Iterator[None]:
    _put(model, after)
    try:
        yield
    finally:
        _put(model, before)


def first_order(studio: Studio, recipe: Recipe, tuned: Tuned, rate: float, every: int) -> Found:
    """Adam with exact gradients; its rate falls to zero over the last fifth of the steps."""
    task, moved = studio.task, tuned.parameters
    adam = torch.optim.Adam(moved, lr=rate)
    items = task.evaluation(recipe.evaluate_items)
    curve, least = [], [p.detach().clone() for p in moved]
    for step in range(recipe.steps + 1):
        if step % every == 0 or step == recipe.steps:
            with torch.no_grad(), tuned.dressed():
                loss = torch.cat([task.losses(b) for b in items]).mean().item()
                curve.append((3 * step, loss, *task.figures().values()))
            if loss <= min(point[1] for point in curve):
                least = [p.detach().clone() for p in moved]
            if not loss <= 3 * curve[0][1]:
                break  # it explodes
        if step < recipe.steps:
            for group in adam.param_groups:
                group["lr"] = rate * min(1.0, (recipe.steps - step) / (0.2 * recipe.steps))
            adam.zero_grad()
            with tuned.dressed():
                with torch.no_grad():
                    batch = task.lesson(step, PICTURES)  # the first one asks the base for its own answers
                task.losses(batch).mean().backward()
            adam.step()

    @contextmanager
    def put() -> Iterator[None]:
        with torch.no_grad():
            for parameter, best in zip(moved, least, strict=True):
                parameter.copy_(best)
        with tuned.dressed():
            yield

    theta = least[0] if len(least) == 1 and least[0].numel() == studio.space.layout.size else None
    return Found(curve, put, theta, {"numbers": sum(p.numel() for p in moved)})


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(model: nn.Module) -> int:
    """Bytes of a model as it lies in memory: parameters, buffers, and what bitsandbytes keeps beside them."""
    held = {place.tensor.untyped_storage()._cdata: place.tensor.untyped_storage().nbytes() for place in tensors(model)}
    return sum(held.values())


def counted(run: Callable[[], object]) -> int:
    """Bytes that run() holds at most, beside what was there before; what autograd saves is among them."""
    with Counter("cpu") as counter:
        run()
    return counter.peak


def memory_of_inference(studio: Studio) -> int:
    """Bytes of the model and of one forward without gradients, as a contestant's own forwards are counted."""
    batch = studio.task.batch(0, PICTURES)
    with torch.no_grad():
        return resident(studio.model) + counted(lambda: studio.task.losses(batch))


def memory_of_first_order(studio: Studio, tuned: Tuned) -> int:
    """Bytes at the peak of Adam's second step: weights, gradients, averages and activations of a batch."""
    adam, batch = torch.optim.Adam(tuned.parameters, lr=1e-4), studio.task.batch(0, PICTURES)
    kept = [p.detach().clone() for p in tuned.parameters]

    def step() -> None:
        adam.zero_grad()
        with tuned.dressed():
            studio.task.losses(batch).mean().backward()
        adam.step()

    step()
    averages = sum(t.nbytes for state in adam.state.values() for t in state.values() if isinstance(t, Tensor))
    adam.zero_grad()
    found = resident(studio.model) + sum(p.nbytes for p in tuned.parameters) + averages + counted(step)
    with torch.no_grad():
        for parameter, value in zip(tuned.parameters, kept, strict=True):
            parameter.copy_(value)
    return found


def memory_of_zeroth(studio: Studio, recipe: Recipe) -> int:
    """Bytes at the peak of a step on a whole batch, with passes of PICTURES rows like the others."""
    studio = studio.changed(**vars(dataclasses.replace(recipe, rows=PICTURES, halvings=0)))
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Run.create(Path(folder) / "run", studio.recipe), studio)
        return resident(studio.model) + training.method.theta.nbytes + counted(training.step)

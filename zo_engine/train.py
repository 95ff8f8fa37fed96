"""The one loop: every step nudges the scales along random directions and writes a line in the journal."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zo_engine import (
    cache,
    convergence,
    dataset,
    evaluation,
    models,
    pictures,
    plan,
    rewards,
    sealed,
    templates,
    texts,
    tokens,
)
from zo_engine.blocks import Prefix, levels
from zo_engine.hub import first_line, is_language, read_json, resolution, sides, some, weights_held
from zo_engine.journal import Record, short
from zo_engine.newton import GaussNewton
from zo_engine.probes import Evaluations, Probes, Space
from zo_engine.recipe import COARSE_EPS, EPS, Recipe, RecipeError, budgeted, named
from zo_engine.run import Run, write_atomic
from zo_engine.scales import ScaleView, prove_live
from zo_engine.style import (
    Style,
    journal_tensors,
    make_method,
    make_space,
    named_layers,
    save_style,
    theta_tensors,
    views_of,
)
from zo_engine.tasks.diffusion import SEARCH, TRAINING, Diffusion, Example, answers, sample
from zo_engine.tasks.reward import Prompt as Request
from zo_engine.tasks.reward import Rewarded
from zo_engine.tasks.text import Choosing, Kept, Language, Question, own_texts
from zo_engine.tasks.text import answers as replies
from zo_engine.texts import Message
from zo_engine.zo import ZO, trapezoid

TOKENS = plan.TOKENS  # of one forward pass, where the recipe does not say how many rows: caches of a processor like it
TELL = 1.0  # seconds between two reports of a long step
FIRST = 4  # preview pictures that are written before the others are drawn
TASK_ROWS = 1000  # of a task, that are learnt, as in MeZO; the held-out share comes beside
PATIENCE = 20  # steps in a row without a finite loss, after which a run gives up

EXPLODED = 3.0  # times the held-out loss at the start: a run that got there has diverged
SHORT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")
BROKEN_DEVICE = re.compile("CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|HIP error|device-side assert")

Prompt = tuple[Message, ...]  # a conversation that ends before an answer


class TrainingError(ValueError):
    """A run that cannot go on, in one sentence."""


class OutOfMemory(TrainingError):
    """The device's memory, or the machine's, did not suffice."""


@contextmanager
def device_faults(what: str) -> Iterator[None]:
    """What a device that fails raises inside, as one sentence; any other error stays what it is.

    A device without memory raises torch.OutOfMemoryError, or on a processor a RuntimeError that only its text tells
    from others; a fault inside a kernel (torch.AcceleratorError, cuBLAS, cuDNN) ends the device for this process.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = first_line(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(SHORT_OF_MEMORY, text):
            raise OutOfMemory(
                f"the memory does not suffice for {what} ({text}); end other programs that use it, write a smaller "
                '`rows` (or `batch_size`, `resolution`, or offload = "cpu") into the recipe, and go on'
            ) from error
        if isinstance(error, torch.AcceleratorError) or re.search(BROKEN_DEVICE, text):
            raise TrainingError(
                f"the device failed at {what} ({text}); what was saved before is still there: try again, and if it "
                "fails again, restart the machine or look for a newer driver"
            ) from error
        raise


@dataclass
class Drawing:
    """How a run of pictures is looked at: prompts, drawn with fixed seeds."""

    unit = "pictures"

    folder: Path
    transformer: torch.nn.Module
    prompts: list[str]
    text: dict[str, tuple[Tensor, Tensor]]
    size: tuple[int, int]  # width, height

    def sample(
        self, recipe: Recipe, prompts: list[str] | None = None, steps: int = 0, seeds: list[int] | None = None
    ) -> list:
        """Pictures of the model as its scales stand now. One seed a prompt, following on from the recipe's."""
        prompts = prompts or self.prompts
        return sample(
            models.drawing(self.folder, self.transformer, bounded=bool(recipe.memory)),
            [self.text[prompt] for prompt in prompts],
            self.text[""],
            seeds or [recipe.preview_seed + i for i in range(len(prompts))],
            width=self.size[0],
            height=self.size[1],
            steps=steps or recipe.preview_steps,
            guidance=recipe.guidance,
            together=together(recipe),
        )

    def file(self, run: Run, step: int) -> Path:
        return run.preview_file(step)

    def write(self, run: Run, step: int, recipe: Recipe) -> None:
        """The preview prompts as single pictures and as one sheet."""
        images, folder = [], run.previews / f"{step:06d}"
        for start, end in ((0, FIRST), (FIRST, None)):  # the first of them are seen while the others are drawn
            prompts = list(enumerate(self.prompts))[start:end]
            if prompts:
                seeds = [recipe.preview_seed + i for i, _ in prompts]
                drawn = self.sample(recipe, [prompt for _, prompt in prompts], seeds=seeds)
                for (i, prompt), image in zip(prompts, drawn, strict=True):
                    pictures.save_png(image, folder / f"{i:02d}.png", prompt=prompt, seed=recipe.preview_seed + i)
                images += drawn
        rows = [images[i : i + 8] for i in range(0, len(images), 8)]
        pictures.save_png(pictures.grid(rows, side=96), self.file(run, step))

    def facts(self, recipe: Recipe) -> dict[str, str]:
        """What a style keeps of it."""
        return {
            "trigger": recipe.trigger,
            "prompts": json.dumps(self.prompts),
            "size": "{}x{}".format(*self.size),
        }


def together(recipe: Recipe) -> int:
    """Pictures that are drawn at once."""
    return plan.together(recipe.rows, bool(recipe.memory))


@dataclass
class Answering:
    """How a run of texts is looked at: prompts, answered greedily or with fixed seeds."""

    unit = "texts"

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    plain: bool  # prompts are beginnings, to be gone on with

    def file(self, run: Run, step: int) -> Path:
        return run.answers_file(step)

    def write(self, run: Run, step: int, recipe: Recipe) -> None:
        """The preview prompts with their answers, in a file and in the log."""
        found = reply(self.model, self.tokenizer, self.prompts, self.plain, recipe)
        rows = [{"prompt": p[-1].content, "answer": answer} for p, answer in zip(self.prompts, found, strict=True)]
        write_atomic(self.file(run, step), json.dumps({"step": step, "answers": rows}, indent=1, ensure_ascii=False))
        for row in rows:
            run.log(f"step {step}: {json.dumps(row, ensure_ascii=False)}")

    def facts(self, recipe: Recipe) -> dict[str, str]:
        """What a style keeps of it."""
        prompts = [[dataclasses.asdict(message) for message in prompt] for prompt in self.prompts]
        return {"prompts": json.dumps(prompts, ensure_ascii=False), "plain": str(int(self.plain))}


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    plain: bool,
    recipe: Recipe,
    seed: int | None = None,
) -> list[str]:
    """Answers as a recipe asks for them. One seed a prompt, following on from `seed` or the recipe's."""
    first = recipe.preview_seed if seed is None else seed
    return replies(
        model,
        tokenizer,
        prompts,
        seeds=[first + i for i in range(len(prompts))] if recipe.temperature else None,
        most=recipe.answer_tokens,
        temperature=recipe.temperature or 1.0,
        plain=plain,
    )


@dataclass
class Studio:
    """Everything a recipe asks for, loaded: the model, its scales, the examples and how the run is looked at."""

    recipe: Recipe
    code_hash: str
    model: torch.nn.Module
    space: Space
    task: Diffusion | Language | Rewarded
    preview: Drawing | Answering
    examples: int
    held_out: int
    notes: list[str]
    data: dict[str, list[str]]  # of every file that is learnt from, or judges: what it held; see `digests`
    weights: dict[str, list[str]]  # of every file of the model: what it held; see `hub.weights_held`

    @property
    def untouched(self) -> int:
        """Blocks before the first tuned one."""
        return levels(self.space.views, self.recipe.depth)[-1].first

    def changed(self, **settings) -> "Studio":
        """The same model and examples under other settings of the method."""
        recipe = dataclasses.replace(self.recipe, **settings)
        views = views_of(self.model, recipe)
        return dataclasses.replace(self, recipe=recipe, space=make_space(views, recipe, models.bring_of(self.model)))


def pick_device(device: str) -> torch.device:
    """The device a recipe names; "auto" is CUDA if torch sees one. Raises RecipeError for what is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise RecipeError(f"device {device!r} is unknown; possible are auto, cpu, cuda and cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices here")
    return found


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Compute precision: fp32 on CPU; on CUDA bfloat16 where the card has it, else float16."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the perturbation that the precision it computes in asks for, where it leaves that open.

    bfloat16 keeps eight bits of every output: differences that a perturbation of 1 % makes drown in its rounding, and
    what the two roundings share tilts all slopes alike. Three times as much is still nearly linear (benchmarks/LOG.md,
    30 November 2026)."""
    dtype = pick_dtype(recipe.dtype, pick_device(recipe.device))
    coarse = dtype == torch.bfloat16 and recipe.optimizer == "gauss-newton"
    return dataclasses.replace(recipe, eps=recipe.eps or (COARSE_EPS if coarse else EPS))


def split(pictures: list, share: float, seed: int) -> tuple[list, list]:
    """(training, held-out), at random."""
    count = dataset.held_out(len(pictures), share)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pictures))
    held = set(order[:count].tolist())
    return [p for i, p in enumerate(pictures) if i not in held], [p for i, p in enumerate(pictures) if i in held]


def digests(*parts: object) -> list[str]:
    """What a file held when it was read, a digest of each part: bytes, or values as their repr says them."""
    found = (part if isinstance(part, bytes) else repr(part).encode() for part in parts)
    return [hashlib.sha256(content).hexdigest()[:16] for content in found]


def base_of(studio: Studio) -> dict[str, Any]:
    """What a run belongs to, as it stands in its folder."""
    return {
        "model": studio.recipe.model,
        "code_hash": studio.code_hash,
        "data": studio.data,
        "weights": studio.weights,
    }


def judged_by(reward: str) -> dict[str, list[str]]:
    """The digests of the file that a reward is in, if it is in one."""
    file = Path(reward.rpartition(":")[0]).expanduser()
    return {file.name: digests(file.read_bytes())} if rewards.is_file(reward) else {}


def changes(before: dict[str, list[str]], now: dict[str, list[str]]) -> str:
    """In what files differ from what they held (`Studio.data`, `Studio.weights`), by name; or nothing."""
    said = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            said.append(f"{name} is gone")
        elif name not in before:
            said.append(f"{name} is new")
        elif before[name][0] != now[name][0]:
            said.append(f"{name} has other contents")
        elif before[name] != now[name]:
            said.append(f"{name} has another caption")
    return some(said)


def prepare(recipe: Recipe, cache_folder: Path, say: Callable[[str], None] = lambda text: None) -> Studio:
    """Load what the recipe asks for. Raises ValueError (of some kind) for whatever the user can mend."""
    recipe = settled(budgeted(recipe))
    if recipe.reward and not recipe.texts:
        raise RecipeError(f"the reward {recipe.reward!r} judges answers; give `texts` with the prompts")
    with device_faults("loading the model"):
        asked = recipe.texts or recipe.task
        return (prepare_texts if asked else prepare_pictures)(recipe, cache_folder, say)


def prepare_pictures(recipe: Recipe, cache_folder: Path, say: Callable[[str], None]) -> Studio:
    """Of a recipe with `images`; latents and embeddings are kept in `cache_folder`."""
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    found = dataset.read(recipe.images, trigger=recipe.trigger, caption=recipe.caption)
    folder = models.locate(recipe.model)
    if is_language(folder):
        raise RecipeError(
            f"{recipe.model} is a language model and learns no pictures; give `texts` in place of `images`"
        )
    buckets = dataset.buckets(recipe.resolution or resolution(recipe.model, folder), *sides(folder))
    placed = [(picture, dataset.choose_bucket(picture.size, buckets)) for picture in found]
    notes = dataset.warnings(found, buckets)

    say(f"encoding {len(found)} pictures and their captions")
    store = cache.Cache(cache_folder)
    latents = cache.latents(store, folder, placed, lambda: models.load_vae(folder, device=device))
    train, held_out = split(list(zip(placed, latents, strict=True)), recipe.holdout, recipe.seed)
    asked = [p.replace("[trigger]", recipe.trigger) for p in recipe.prompts]
    prompts = asked or preview_prompts([p.caption for (p, _), _ in train], [p.caption for (p, _), _ in held_out])
    captions = ["", *prompts, *(picture.caption for picture in found)]
    away = recipe.offload in ("cpu", "disk")
    waiting = text_store(recipe.offload, folder, cache_folder)
    encoders = models.encoders_for(folder, device, dtype, budget(recipe, device), away, waiting)
    plain = plain_prompts([picture.caption for picture in found], recipe.trigger) if recipe.prior else []
    text = cache.embeddings(store, folder, [*captions, *plain], models.text_length(folder), *encoders)

    sizes = [bucket for _, bucket in placed]
    work = plan.Work.of(recipe, len(text[""][0]), max(sizes, key=math.prod), dtype)
    recipe, placement = place(recipe, folder / "transformer", work, device, cache_folder, notes)
    say(f"loading {models.describe(recipe.model).title} in {recipe.quantization}")
    transformer = models.load_transformer(folder, placement=placement, **form(recipe, device, dtype))
    space = tuned(transformer, recipe, notes)
    if not held_out:
        notes.append("too few pictures to hold some out: the held-out loss is measured on training pictures")
    as_examples = lambda part: [  # noqa: E731
        Example(x, *text[picture.caption]) for (picture, _), x in part for _ in range(picture.repeats)
    ]

    def kept() -> list[Example]:
        """What the base draws without the trigger, whatever has been learnt since."""
        if not plain:
            return []
        say(f"asking the base for {len(plain)} pictures without the trigger, to keep them as they are")
        pipe = models.pipeline(folder, transformer)
        found, count = [], together(recipe)
        with space.folded(torch.zeros(space.layout.size, device=space.home(device))):
            for width, height in dict.fromkeys(bucket for _, bucket in placed):
                for i in range(0, len(plain), count):
                    found += answers(pipe, [text[prompt] for prompt in plain[i : i + count]], text[""],
                                     seed=recipe.seed + i, width=width, height=height, steps=recipe.preview_steps,
                                     guidance=recipe.guidance)  # fmt: skip
        return found

    task = Diffusion(
        transformer,
        as_examples(train),
        as_examples(held_out or train),
        text[""],
        kept,
        seed=recipe.seed,
        shift=recipe.shift or models.scheduler_shift(folder),
        sigma_mean=recipe.sigma_mean,
        sigma_std=recipe.sigma_std,
        caption_dropout=recipe.caption_dropout,
        prior=recipe.prior,
        device=device,
        dtype=dtype,
    )
    return Studio(
        recipe=recipe,
        code_hash=models.code_hash(transformer),
        model=transformer,
        space=space,
        task=task,
        preview=Drawing(folder, transformer, prompts, text, size=max(set(sizes), key=sizes.count)),
        examples=len(train),
        held_out=len(held_out),
        notes=notes,
        data={
            Path(os.path.relpath(p.path, os.path.realpath(recipe.images))).as_posix(): digests(
                p.path.read_bytes(), [p.caption, p.repeats]
            )
            for p in found
        },
        weights=weights_held(folder),
    )


def prepare_texts(recipe: Recipe, cache_folder: Path, say: Callable[[str], None]) -> Studio:
    """Of a recipe with `texts` or a `task`."""
    device = pick_device(recipe.device)
    folder = models.locate(recipe.model)
    if not is_language(folder):
        raise RecipeError(
            f"{recipe.model} draws pictures and learns no texts; set `model` to the folder or the hub repository of a "
            "language model"
        )
    if recipe.task:
        return prepare_task(recipe, folder, cache_folder, say)
    found = tokens.read(recipe, folder)
    contents, tokenizer, length, rendered = found.contents, found.tokenizer, found.limit, found.rendered
    notes = [*rendered.notes]
    if length < recipe.length:
        notes.append(f"the model reads {length} tokens at most, so texts are cut there")
    if left_out := [*contents.problems, *rendered.problems]:
        listed = some([f"line {p.line} {p.message}" for p in left_out])
        notes.append(f"{len(left_out)} rows are left out: {listed}")
    by_line = {example.line: example for example in contents.examples}
    paired = [(by_line[t.line], t) for t in rendered.examples]
    reward = None
    if recipe.reward:
        reward = rewarding(recipe.reward, contents, say)
        paired = list({example.messages[:-1]: (example, t) for example, t in reversed(paired)}.values())[::-1]
    train, held_out = split(paired, recipe.holdout, recipe.seed)
    if not held_out:
        notes.append("too few texts to hold some out: the held-out loss is measured on training texts")
    judged = held_out or train
    questions = [
        Question(tokens.choices(tokenizer, example, length), example.choices.index(example.messages[-1].content))
        for example, _ in judged[: recipe.evaluate_items]
        if example.choices
    ]

    @functools.cache
    def contrast(example: tokens.Tokens) -> tokens.Tokens:
        text = by_line.get(example.line)  # the base's own texts have none
        return tokens.contrasted(example, tokens.choices(tokenizer, text, length)) if text and text.choices else example

    plain = contents.mapping.form == "text"
    asked = [(Message("user", prompt),) for prompt in recipe.prompts]
    prompts = asked or begun([example for example, _ in (*held_out, *train)])

    recipe, model, space = language_model(recipe, folder, found.longest, len(train), cache_folder, notes, say)
    learnt = lambda part: [t for _, t in part]  # noqa: E731
    if reward:
        request = lambda e: Request(tuple(tokens.prompt_ids(tokenizer, e.messages[:-1])), e.messages[-2].content,  # noqa: E731
                                    e.messages[-1].content)  # fmt: skip
        task = Rewarded(model, tokenizer, reward, [request(e) for e, _ in train],
                        [request(e) for e, _ in judged[: recipe.evaluate_items]],
                        seed=recipe.seed, most=recipe.answer_tokens, device=device)  # fmt: skip
    else:

        def write() -> list[tokens.Tokens]:
            """What the base writes by itself, whatever has been learnt since."""
            say("asking the base for texts of its own, to keep it as it is")
            with space.folded(torch.zeros(space.layout.size, device=space.home(device))):
                return own_texts(model, tokenizer, found.own, seed=recipe.seed, together=recipe.rows)

        kept = Kept(write, recipe.own_texts, found.own) if found.own else None
        task = Language(model, learnt(train), learnt(judged), questions, seed=recipe.seed, kept=kept, device=device,
                        contrast=contrast)  # fmt: skip
    return Studio(
        recipe=recipe,
        code_hash=models.code_hash(model),
        model=model,
        space=space,
        task=task,
        preview=Answering(model, tokenizer, prompts, plain),
        examples=len(train),
        held_out=len(held_out),
        notes=notes,
        data={Path(recipe.texts).name: digests(contents.examples)} | judged_by(recipe.reward),
        weights=weights_held(folder),
    )


def language_model(
    recipe: Recipe,
    folder: Path,
    longest: int,
    examples: int,
    cache_folder: Path,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[Recipe, PreTrainedModel, Space]:
    """The model of a recipe for so many texts of at most `longest` tokens, with its blocks where the recipe wants them,
    and the space that is tuned of it; the recipe comes back with what was derived."""
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    work = plan.Work.of(recipe, longest, None, dtype, examples)
    recipe, placement = place(recipe, folder, work, device, cache_folder, notes)
    say(f"loading {models.describe(recipe.model).title} in {recipe.quantization}")
    model = models.load_language_model(folder, placement=placement, **form(recipe, device, dtype))
    return recipe, model, tuned(model, recipe, notes)


def prepare_task(recipe: Recipe, folder: Path, cache_folder: Path, say: Callable[[str], None]) -> Studio:
    """Of a recipe with a `task` of MeZO's table: its data set's own rows, from `texts` or the hub, as its templates
    ask; trained as a choice among candidates where MeZO does."""
    asked = templates.named(recipe.task)
    if not recipe.texts:
        say(f"reading {asked.repo} {asked.subset or ''} from the hub".replace("  ", " "))
    found = templates.cases(asked, recipe.texts, "train")
    device = pick_device(recipe.device)
    tokenizer = models.load_tokenizer(folder)
    length = tokens.limit(folder, recipe.length)
    most, total, drawn = round(TASK_ROWS / (1 - recipe.holdout)), len(found), digests(found)
    rng = np.random.Generator(np.random.Philox(key=recipe.seed))
    found = [found[i] for i in rng.permutation(total)[:most]]
    train, held_out = split(found, recipe.holdout, recipe.seed)
    judged = (held_out or train)[: recipe.evaluate_items]
    notes = [f"{len(train)} of {total} rows are learnt and {len(held_out)} held out, drawn by the seed"]
    recipe, model, space = language_model(recipe, folder, length, len(train), cache_folder, notes, say)
    choices = lambda part: [evaluation.question(tokenizer, case, length) for case in part if case.candidates]  # noqa: E731
    if asked.classification:
        task = Choosing(model, choices(train), choices(judged), seed=recipe.seed, device=device)
    else:
        learnt = lambda part: [evaluation.option(tokenizer, case.prompt, case.target, length) for case in part]  # noqa: E731
        task = Language(model, learnt(train), learnt(judged), choices(judged), seed=recipe.seed, device=device)
    return Studio(
        recipe=recipe,
        code_hash=models.code_hash(model),
        model=model,
        space=space,
        task=task,
        preview=Answering(model, tokenizer, [(Message("user", case.prompt),) for case in judged[:4]], True),
        examples=len(train),
        held_out=len(held_out),
        notes=notes,
        data={Path(recipe.texts or asked.repo).name: drawn},
        weights=weights_held(folder),
    )


def rewarding(name: str, contents: texts.Contents, say: Callable[[str], None]) -> rewards.Reward:
    """The reward of a recipe. Says what code it runs; raises RecipeError where there are no prompts to answer."""
    if contents.mapping.form == "text":
        raise RecipeError("a reward judges answers to prompts, and these texts are plain; give prompt and completion")
    if rewards.is_file(name):
        say(f"running the code of {name}: a reward of your own is a program with all that you may do")
    return rewards.load(name)


def form(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """How the recipe's model is held, as `models.load_transformer` and `load_language_model` take it."""
    return {
        "quantization": recipe.quantization, "device": device, "dtype": dtype, "transport": recipe.transport
    }  # fmt: skip


def place(
    recipe: Recipe, part: Path, work: plan.Work, device: torch.device, cache_folder: Path, notes: list[str]
) -> tuple[Recipe, models.Placement]:
    """Where the blocks of the model in `part` go, by the recipe's `memory` and `offload`; what was derived is in the
    recipe that comes back, and in the notes. Raises PlanError where nothing fits, RecipeError for what it cannot do and
    for layers that are not there."""
    if recipe.transport != "whole" and not recipe.memory and recipe.offload not in ("cpu", "disk"):
        raise RecipeError(
            f'transport = "{recipe.transport}" is for blocks that stream, and here none do; set offload to "cpu" or '
            '"disk", or memory, or transport to "whole"'
        )
    if recipe.layers or recipe.memory:
        model = plan.outlined(part, recipe.quantization, work.dtype, recipe.transport)
    if recipe.layers:  # whether they are there is known before the minutes that loading takes
        named_layers(views_of(model, recipe), recipe.layers)
    if not recipe.memory:
        return recipe, streaming(recipe.offload, part, cache_folder)
    memory, tier = budget(recipe, device), recipe.offload
    host = 0  # bytes of blocks that wait in memory, where the others are in files
    if tier == "auto":
        host = host_room()
        tier = "cpu" if plan.sizes(model)[0] < host else "disk"
    made = plan.fitting(model, work, memory, recipe.rows, tier, host=host)
    made = plan.phased(made, model, work, plan.beside(part), recipe, memory)
    notes.append(f"planned for {memory / 1e9:.2f} GB: {made.said()}")
    recipe = dataclasses.replace(recipe, rows=made.rows, offload=made.tier)
    store = cache_folder / "blocks" if made.tier == "disk" else None
    return recipe, models.Placement(made.away, made.slots, store, made.ends > 0, held=made.held)


def streaming(offload: str, part: Path, cache_folder: Path) -> models.Placement:
    """Every block away, and the ends of a language model, or nothing: what `offload` says alone."""
    if offload not in ("cpu", "disk"):
        return models.RESIDENT
    blocks = len(plan.block_names(plan.skeleton(read_json(part / "config.json"))))
    return models.Placement(blocks, plan.SLOTS, cache_folder / "blocks" if offload == "disk" else None, ends=True)


def text_store(offload: str, folder: Path, cache_folder: Path) -> Path | None:
    """Where text encoders that stream wait as files: as asked, or for want of host memory; None: they wait in it."""
    files = offload == "disk" or offload == "auto" and models.text_bytes(folder) > host_room()
    return Path(cache_folder) / "blocks" if files else None


def host_room() -> int:
    """Bytes of host memory that what waits may take: four fifths of what is free now."""
    return int(0.8 * psutil.virtual_memory().available)


def budget(recipe: Recipe, device: torch.device) -> int:
    """Bytes of the device that the recipe leaves to a step; 0 where it does not say. Raises PlanError for no amount."""
    if not recipe.memory:
        return 0
    return free(device) if recipe.memory == "auto" else plan.parse_memory(recipe.memory)


def free(device: torch.device) -> int:
    """Bytes that a step may use: nine tenths of what is free now."""
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(0.9 * available)


def tuned(model: torch.nn.Module, recipe: Recipe, notes: list[str]) -> Space:
    """The space that the recipe tunes of a model, proved to be live; what cannot be tuned is added to the notes."""
    views = views_of(model, recipe)
    prove_finite(model, views)
    prove_live(views)
    space = make_space(views, recipe, models.bring_of(model))
    if space.left_out:
        notes.append(f"{len(space.left_out)} layers stay frozen: their groups straddle rows ({space.left_out[0]}, ...)")
    return space


def prove_finite(model: torch.nn.Module, views: dict[str, ScaleView]) -> None:
    """Raises ModelError for a model with weights that are not finite: every loss would be none."""
    dense = ((n, p) for n, p in (*model.named_parameters(), *model.named_buffers()) if p.is_floating_point())
    for name, tensor in (*((n, view.base) for n, view in views.items()), *dense):
        if not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():  # fp8 cannot be asked
            raise models.ModelError(f"the weights of {name} are not finite numbers; download the model again")


def begun(examples: list[texts.Example], most: int = plan.PROMPTS) -> list[Prompt]:
    """Preview prompts: conversations up to their last answer, or the beginnings of plain texts."""
    first_third = lambda text: " ".join((words := text.split())[: max(1, len(words) // 3)])  # noqa: E731
    found = (e.messages[:-1] if e.messages else (Message("user", first_third(e.text)),) for e in examples)
    return list(dict.fromkeys(prompt for prompt in found if prompt))[:most]


def plain_prompts(captions: list[str], trigger: str, most: int = plan.KEPT) -> list[str]:
    """Captions without the trigger, spread evenly over the set: what the base shall go on drawing as it does."""
    if not trigger:
        return []
    bare = [re.sub(rf"\b{re.escape(trigger)}\b", " ", caption) for caption in captions]
    tidy = list(dict.fromkeys(" ".join(text.replace(" ,", ",").split()).strip(" ,") for text in bare))
    return [tidy[i * len(tidy) // most] for i in range(most)] if len(tidy) > most else tidy


def preview_prompts(train: list[str], held_out: list[str]) -> list[str]:
    """Four prompts: captions that were held out first, then captions of the training set."""
    return list(dict.fromkeys([*held_out[:2], *train]))[: plan.PROMPTS]


class Training:
    """One run in progress: the studio, the method's state, and the folder that both are written to."""

    def __init__(self, run: Run, studio: Studio):
        self.run, self.studio, self.recipe = run, studio, studio.recipe
        self.method = make_method(studio.space, self.recipe, studio.space.home(studio.model.device))
        found = levels(studio.space.views, self.recipe.depth)
        self.prefixes = [Prefix(studio.model, level) if level.first else None for level in found]
        self.rows = rows_of(studio)
        mover = getattr(studio.model, "mover", None)
        self.relay = mover.relay if mover else []
        self.best = (math.inf, 0)  # held-out loss and step
        self.start: list[float] = []  # held-out items before the first step
        self.held_out: float | None = None
        self.flat = ""  # that the held-out loss has stopped falling, in words, by the last evaluation
        self.evaluations: list[dict] = []  # in the order of their steps

    # Taking up a run

    def resume(self) -> None:
        """Stand where the journal ends: from the last checkpoint, then line by line; from the start without one, or
        where an evaluation was lost, which is made again on the way."""
        self.run.recover()
        journal = self.run.journal()
        known = {facts["step"]: facts for facts in self.run.evaluations()}
        lost = {step for step in range(0, len(journal), self.recipe.evaluate_every) if step not in known}
        checkpoint = _read_checkpoint(self.run.last_file)
        if checkpoint and not lost and self._fits(checkpoint, len(journal)):
            self.method.restore(*checkpoint, journal)
        for step in sorted(known):
            if step < self.method.step:
                self._note(known[step])
        for record in (*journal[self.method.step :], None):
            if facts := known.get(self.method.step):
                self._note(facts)
            elif self.method.step in lost:
                self.evaluate()
            if record:
                self.method.apply(record)
        if lost:
            self.run.trim(self.method.step)  # in the order of the steps

    def _fits(self, checkpoint: tuple[dict[str, Tensor], dict[str, float]], steps: int) -> bool:
        tensors, scalars = checkpoint
        mine, counted = self.method.state()
        same = {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in mine.items()}
        return same and scalars.keys() == counted.keys() and scalars["step"] <= steps

    def theta_at(self, step: int) -> Tensor:
        """theta after so many steps: as it stands, as kept, or from the journal."""
        if step == self.method.step:
            return self.method.theta
        kept = _read_checkpoint(self.run.best_file)
        if kept and kept[1].get("step") == step and kept[0]["theta"].shape == self.method.theta.shape:
            return kept[0]["theta"]
        return replayed(self.studio, self.run.journal()[:step]).theta

    # One step

    def step(self, part: Callable[[float], None] = lambda done: None) -> Record:
        """From one batch to the next theta. part is told the share of the step that is done; whatever it raises ends
        the step without a trace."""
        recipe, task, step, theta = self.recipe, self.studio.task, self.method.step, self.method.theta
        evaluate = Evaluations(self.studio.space, theta, self.prefixes, self.rows, self.relay)

        def evaluated(outputs: Callable, parts: Sequence, level: int, probes: Probes) -> Tensor:
            return evaluate(outputs, parts, probes, level if outputs.__name__ in task.one_pass else None)

        if isinstance(self.method, GaussNewton):
            with self.studio.space.folded(theta):
                # Moves are tried on the next step's batch, so that few examples are seen only for that.
                learnt, tried = self.sizes(step)
                lesson, trial = task.lesson(step, learnt), task.lesson(step + 1, tried)
            parts, trials = lesson.parts(), trial.parts()
            made, total = 0, len(lesson) * self.method.cost(step)

            def outcomes(level: int, probes: Probes, fresh: bool) -> Tensor:
                nonlocal made
                if fresh:
                    found = evaluated(task.losses, trials, level, probes)[:, None]
                else:
                    found = evaluated(task.outcomes, parts, level, probes)
                    made += len(probes.sign)
                part(made / total)
                return found

            record = self.method.advance(outcomes, len(lesson), len(trial), task.tries)
            return task.told(record, lesson) if isinstance(task, Rewarded) else record

        batch = functools.cache(lambda stream: task.batch(step, recipe.batch_size, stream))

        def losses(probes: Probes, fresh: bool) -> Tensor:
            return evaluated(task.losses, [batch(SEARCH if fresh else TRAINING)], -1, probes).cpu()

        schedule = trapezoid(step, recipe.steps, recipe.warmup, recipe.decay)
        return self.method.advance(losses, recipe.batch_size, recipe.space == "gain", schedule)

    def sizes(self, step: int) -> tuple[int, int]:
        """Examples that a Gauss-Newton step learns from, and those that it tries its moves on."""
        known = self.studio.examples
        return self.recipe.batch_at(step, known), self.recipe.tried_at(step + 1, known)

    def cost(self, step: int) -> int:
        """Rows of a step, one of every example that is tried counted in for each try."""
        if not isinstance(self.method, GaussNewton):
            return self.method.cost(step)
        learnt, tried = self.sizes(step)
        return learnt * self.method.cost(step) + tried * (len(self.studio.task.tries) + 1)

    def attempt(self, phase: str, run: Callable[[], Any]) -> Any:
        """run(); where the device's memory was not enough and `memory` leaves it to us, once more with half the rows.

        Nothing is lost: until a step is in the journal, it has not been. Raises TrainingError, saying what to do."""
        for again in (True, False):
            try:
                with device_faults(phase):
                    return run()
            except OutOfMemory as error:
                if not (again and self.recipe.memory and self.rows > 1):
                    raise
                reason = error
            self.rows //= 2
            self.run.log(f"{reason}; tried again with {self.rows} rows a pass")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # Once in a while

    def evaluate(self) -> None:
        """The held-out loss of theta as it stands; the best theta is kept."""
        items, figures = measured(self.studio, self.method.theta, self.rows)
        start = self.start or items
        change = np.subtract(items, start) if np.isfinite(items + start).all() else np.full(len(items), np.nan)
        facts = {
            "step": self.method.step,
            "loss": float(np.mean(items)),
            "error": float(np.std(items, ddof=1) / len(items) ** 0.5),
            "change": float(change.mean()),  # against the start, item by item: its error is far smaller
            "change_error": float(change.std(ddof=1) / len(items) ** 0.5),
            **figures,
            "items": items,
        }
        facts = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        facts["items"] = [v if math.isfinite(v) else None for v in items]
        trend = convergence.trend([*self.evaluations, facts], self.recipe.widened(self.method.step))
        if trend and trend.flat:
            facts["flat"] = trend.sentence
        if self._note(facts):  # kept before it is said to be the best: never a best one that is not there
            _write_checkpoint(self.run.best_file, {"theta": self.method.theta}, {"step": self.method.step})
        self.run.append_evaluation(facts)

    def _note(self, facts: dict) -> bool:
        """Take in an evaluation; True if it is the best so far."""
        if not self.start and None not in facts["items"]:
            self.start = facts["items"]
        self.held_out, self.flat = facts["loss"], facts.get("flat", "")
        self.evaluations.append(facts)
        better = facts["loss"] is not None and facts["loss"] < self.best[0]
        if better:
            self.best = (facts["loss"], facts["step"])
        return better

    def diverged(self) -> str:
        """Why going on would make things worse, by the last held-out loss, with what to change; or nothing."""
        if not self.start or not self.method.step:
            return "" if self.start else self._never_finite()
        before, now = float(np.mean(self.start)), self.held_out
        scale = max(abs(before), float(np.std(self.start)))  # of a loss that may be zero at the start, or negative
        if now is not None and now <= before + (EXPLODED - 1) * scale:
            return ""
        if isinstance(self.method, GaussNewton):
            change = "smaller eps, more directions or a larger batch_size"
        else:
            size = self.recipe.step_size
            change = f"step_size below {size:g}" if size else "smaller eps, or a small step_size of your own"
        rose = "is not finite any more" if now is None else f"rose from {before:.4g} to {now:.4g}"
        return f"the held-out loss {rose} at step {self.method.step}: the steps lead away; train anew with a {change}"

    def _never_finite(self) -> str:
        return (
            'the held-out loss of the model as it is, before any step, is not a finite number; try dtype = "float32", '
            "and if that is so already, the model is damaged: download it again"
        )

    def preview(self) -> None:
        """What the model makes of the preview prompts as it stands."""
        try:
            with device_faults("a preview"), self.studio.space.folded(self.method.theta):
                self.studio.preview.write(self.run, self.method.step, self.recipe)
        except OutOfMemory as error:  # to look on is not worth a run
            self.run.log(f"step {self.method.step} has no preview: {error}")

    def checkpoint(self) -> None:
        _write_checkpoint(self.run.last_file, *self.method.state())

    def save_style(self) -> Path:
        """The style as theta and as journal, both of the best step by held-out loss."""
        step = self.best[1]
        theta = self.theta_at(step)
        facts = {
            self.studio.preview.unit: str(self.studio.examples),
            "step": str(step),
            "held_out": f"{self.best[0]:.6g}",
            "held_out_at_start": f"{np.mean(self.start):.6g}" if self.start else "",
            **self.studio.preview.facts(self.recipe),
            "licence": models.describe(self.recipe.model).licence,
        }
        base = {"model": named(self.recipe.model), "code_hash": self.studio.code_hash}
        save_style(
            self.run.style_file, Style("theta", theta_tensors(self.studio.space, theta), self.recipe, base, facts)
        )
        if step:
            replayed = journal_tensors(self.run.journal()[:step])
            save_style(self.run.journal_style_file, Style("journal", replayed, self.recipe, base, facts))
        return self.run.style_file


def _pieces(batch, rows: int) -> Iterator:
    for index in torch.arange(len(batch)).split(rows):
        yield batch.take(index)


def rows_of(studio: Studio) -> int:
    """Rows of one forward pass."""
    return studio.recipe.rows or max(1, TOKENS // studio.task.tokens())


@torch.no_grad()
def measured(studio: Studio, theta: Tensor, rows: int) -> tuple[list[float], dict[str, float]]:
    """(loss of every held-out item, other figures of the task) at a theta, with so many rows a pass."""
    with studio.space.folded(theta):
        figures = studio.task.figures()
        batches = studio.task.evaluation(studio.recipe.evaluate_items)
        parts = [studio.task.losses(b) for batch in batches for b in _pieces(batch, rows)]
    return [short(x) for x in torch.cat(parts).tolist()], figures


def replayed(studio: Studio, journal: list[Record]) -> GaussNewton | ZO:
    """The method after the steps of a journal, from nothing else."""
    method = make_method(studio.space, studio.recipe, studio.space.home(studio.model.device))
    for record in journal:
        method.apply(record)
    return method


def _write_checkpoint(path: Path, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    sealed.write(path, tensors, {name: repr(value) for name, value in scalars.items()})


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """None if there is none or it is damaged: the journal holds the run either way."""
    try:
        tensors, metadata = sealed.read(path)
        return tensors, {name: float(value) for name, value in metadata.items() if name != sealed.DIGEST}
    except (FileNotFoundError, sealed.DamageError):
        return None


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is finished and saved; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def ask(number: int, frame) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Halted(Exception):
    """A step was given up half-way: the run was asked to stop."""


def train(run: Run, studio: Studio, report: Callable[[dict], None], stop: threading.Event) -> str:
    """Train to the recipe's end, or until `stop` is set: returns the state, "done" or "stopped".

    report gets the figures of every step, and of a long step's parts: "part" is the share of the next step that is
    done. A stop does not wait for the end of a step: a step is a function of its number, and made again as if never
    begun. Raises TrainingError when losses stay not finite. The caller holds `run.lock()`.
    """
    recipe = studio.recipe
    training = Training(run, studio)
    training.resume()
    method = training.method
    began, first, bad, told_flat = time.monotonic(), method.step, 0, False
    if method.step:
        run.log(f"resumed from step {method.step}")
    facts = {"step": method.step, "steps": recipe.steps, "part": 0.0, "loss": None, "held_out": None}
    told = time.monotonic()

    costs = [0, *accumulate(map(training.cost, range(recipe.steps)))]  # of so many steps

    def timing(part: float) -> dict[str, float]:
        """Steps do not all cost alike, so time goes by what they cost."""
        done = costs[method.step] - costs[first] + (part * training.cost(method.step) if part else 0)
        spent = time.monotonic() - began
        left = spent / done * (costs[-1] - costs[first] - done)
        return {"seconds_per_step": spent / (method.step + part - first), "remaining": left}

    def tell(part: float) -> None:
        nonlocal told
        if stop.is_set():
            raise _Halted
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            now = facts | {"part": part, "held_out": training.held_out, **timing(part)}
            run.write_status("running", **now)
            report(now)

    def give_up(why: str) -> NoReturn:
        training.checkpoint()
        draw_plot(run)
        if not training.start:
            raise TrainingError(why)
        training.save_style()
        raise TrainingError(f"{why}; the style of the best step, {training.best[1]}, is saved")

    run.write_status("running", **facts)
    run.asked()  # what was asked of a process that is gone is forgotten
    if method.step == 0 and not studio.preview.file(run, 0).exists():  # first of all: somebody is waiting to see one
        training.attempt("the preview at step 0", training.preview)
    while True:
        at_end, asked = method.step >= recipe.steps, run.asked()
        if method.step % recipe.evaluate_every == 0 or at_end or "save" in asked:
            if not training.evaluations or training.evaluations[-1]["step"] != method.step:
                training.attempt("the held-out loss", training.evaluate)
            training.checkpoint()
        if why := training.diverged():
            give_up(why)
        if training.flat and not told_flat:
            run.log(f"step {method.step}: {training.flat}")
            told_flat = True
        at_end = at_end or (recipe.stop_when_flat and bool(training.flat))
        if "save" in asked:
            training.save_style()
            run.log(f"saved at step {method.step}, as asked")
        every = method.step and recipe.preview_every  # the one at step 0 is above
        due = at_end or (every and method.step % every == 0) or "preview" in asked
        if due and not studio.preview.file(run, method.step).exists():
            training.attempt(f"the preview at step {method.step}", training.preview)
        if at_end or stop.is_set():
            break
        if method.step == first:
            training.attempt("the base's own answers", studio.task.begin)
            began = told = time.monotonic()  # the evaluation and the previews before it are no measure of a step
        try:
            record = training.attempt(f"step {method.step}", lambda: training.step(tell))
        except _Halted:
            break
        if method.step == first + 1:  # the proof that a step works here, before hours are spent
            one_step = time.monotonic() - began
            run.log(f"one step works, and took {one_step:.2f} s")
        run.append_step(record)
        bad = bad + 1 if record.skipped else 0
        if record.skipped:
            run.log(f"step {record.step}: a loss was not finite; theta unchanged, {method.skipped} skipped so far")
        if bad >= PATIENCE:
            give_up(f'{PATIENCE} steps in a row had a loss that was not finite; try dtype = "float32" or a smaller eps')
        facts = {
            "step": method.step,
            "steps": recipe.steps,
            "part": 0.0,
            "loss": record.loss,
            "held_out": training.held_out,
            "one_step": one_step,
            **timing(0.0),
            "skipped": method.skipped,
            "memory": memory(studio.model.device),
            "tokens": studio.task.tokens(),
        }
        run.write_status("running", **facts)
        report(facts)
    training.checkpoint()
    training.save_style()
    draw_plot(run)
    state = "done" if at_end else "stopped"
    facts |= {"part": 0.0, "held_out": training.held_out, "skipped": method.skipped, "remaining": 0.0}
    facts |= {"flat": training.flat} if training.flat else {}
    run.write_status(state, **facts, best_step=training.best[1], best_held_out=training.best[0])
    if state == "done" and method.step < recipe.steps:
        run.log(f"ended before step {recipe.steps}, as the recipe asks: {training.flat}")
    run.log(f"{state} at step {method.step}; best held-out loss {training.best[0]:.6g} at step {training.best[1]}")
    return state


def draw_plot(run: Run) -> None:
    """The figures of a run as a picture."""
    from zo_engine import plots  # whose library takes half a second, for which nobody should wait at the start

    plots.plot(run)


def memory(device: torch.device) -> int:
    """Bytes: peak of the device where it has its own memory, else the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process(os.getpid()).memory_info().rss

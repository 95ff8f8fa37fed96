"""What is asked in the arena: recipes of styles/, and a model that was damaged in a known way; and how a result is
tested on what it neither learnt nor was chosen by."""

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quality
import torch
from common import CHECKOUT
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from world import chat, example_set, paragraph

from assets import pack
from zo_engine import models
from zo_engine import recipe as recipes
from zo_engine.noise import tensor_id
from zo_engine.recipe import Recipe
from zo_engine.scales import find_scales, formats_of
from zo_engine.tasks.reward import Rewarded
from zo_engine.tasks.text import continued, padding, stack, token_losses
from zo_engine.tokens import IGNORED, Tokens
from zo_engine.train import Studio, measured, prepare

CACHE = CHECKOUT / "runs" / ".cache"
TESTED = 200  # texts of a test
ANSWERS = 8  # sampled to each held-out prompt, in the test of a reward
OWN = 64  # texts of the base's own, of each kind
OWN_ROWS = 2000
SHOWN = {"triggered": 8, "plain": 4}  # subjects in a row of pictures
DAMAGE = 0.5  # standard deviation of the logarithm of what each row's scales are multiplied by
NAMES = ("tarot", "woodcut", "voice", "sentiment", "json", "repair")


@dataclass
class Task:
    """One recipe with its seed, ready. `optimum`: the held-out loss at the known answer, where one is known."""

    name: str
    recipe: Recipe
    studio: Studio
    optimum: float | None = None
    answer: Tensor | None = None  # the theta of ours that is known to undo the damage

    def plain(self) -> Studio:
        """The same on weights that are not quantised."""
        studio = prepare(dataclasses.replace(self.recipe, quantization="none", **_PLAIN), CACHE)
        if self.name == "repair":
            damage(studio.model, self.studio.space.views, self.recipe.seed, "none")
            studio = studio.changed()
        return studio


_PLAIN = {
    "space": "absolute",
    "depth": 1.0,
    "layers": (),
    "optimizer": "sgd",
}  # what the dense layers of a plain model can be tuned by


def recipe_of(name: str, quantization: str = "") -> Recipe:
    """The recipe of a task; in another format if one is given."""
    if name == "repair":
        recipe = Recipe(
            texts=str(own_chats()),
            model="tiny-llm",
            steps=33,
            holdout=0.1,
            evaluate_items=OWN_ROWS // 10,
            preview_every=0,
            own_texts=0.0,  # what a damaged model writes by itself is not what it should keep
        )
    else:
        recipe = recipes.load(CHECKOUT / "styles" / name / "recipe.toml")
    recipe = quality.asking(recipe) if recipe.images else recipe
    return copy_of(recipe, quantization or recipe.quantization)


def task_of(name: str, recipe: Recipe) -> Task:
    """The task of a recipe with its seed."""
    studio = prepare(recipe, CACHE)
    if name != "repair":
        return Task(name, recipe, studio)
    optimum = float(np.mean(measured(studio, torch.zeros(studio.space.layout.size), 64)[0]))
    answer = -damage(studio.model, studio.space.views, recipe.seed, recipe.quantization)
    return Task(name, recipe, studio.changed(), optimum, answer)


def damage(model: nn.Module, layers: dict, seed: int, quantization: str) -> Tensor:
    """Multiply the scales of every row of some layers by exp(DAMAGE * a normal number); the logarithms, in the order of
    the layers' rows, are what gain space calls theta. A final norm, which not everybody tunes, is left whole."""
    views, drawn = find_scales(model, formats_of(quantization)), []
    for name, layer in layers.items():
        if not (view := views.get(name)):
            drawn.append(torch.zeros(layer.out_features))
            continue
        rng = np.random.default_rng([seed, tensor_id(name)])
        drawn.append(torch.from_numpy(DAMAGE * rng.standard_normal(view.out_features)).float())
        view.put(view.base.view(view.shape) * drawn[-1].exp()[:, None])
    return torch.cat(drawn)


def own_chats(rows: int = OWN_ROWS) -> Path:
    """The base's own conversations, as texts to be learnt: what it was trained on, drawn anew. Many: the damage costs a
    tenth of the loss, which 30 held-out texts could not tell from chance."""
    file, rng = CACHE / "own-chats.jsonl", np.random.default_rng([0, 77])
    lines = [json.dumps({"messages": chat(rng)}) for _ in range(rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


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


# --- the tests --------------------------------------------------------------------------------------------------------


Put = Callable[[], AbstractContextManager]
Judge = Callable[[Studio, Put], dict[str, float]]  # the figures of a studio's model inside of put()


@dataclass
class Reader:
    """Judges texts that are neither learnt nor held out, and the base's own texts."""

    unseen: Studio | None  # its held-out items are the test; None: the task's own held-out prompts
    own: dict[str, list[Tokens]]  # by kind

    def __call__(self, studio: Studio, put: Put) -> dict[str, float]:
        """Loss and accuracy on unseen texts, or rewards; and the perplexity a token on the base's own texts."""
        with torch.no_grad(), put():
            if isinstance(studio.task, Rewarded):
                found = rewarded(studio.task)
            else:
                found = {}
                if self.unseen:
                    task = copy.copy(self.unseen.task)
                    task.model = studio.model
                    losses = [task.losses(b) for b in task.evaluation(self.unseen.recipe.evaluate_items)]
                    found = {"loss": torch.cat(losses).mean().item()} | task.figures()
                    if task.questions:
                        found["exact"] = exactly(studio.model, studio.preview.tokenizer, task.held_out)
            for kind, texts in self.own.items():
                found[f"perplexity of {kind}"] = math.exp(loss_a_token(studio.model, texts))
        return found


class Viewer:
    """Judges pictures of subjects that none taught, with the trigger and without it (`quality.Exhibition`), and keeps
    those that it drew last."""

    def __init__(self, studio: Studio):
        self.exhibition = quality.Exhibition(studio, quality.taught(studio))
        self.drawn = self.exhibition.base

    def __call__(self, studio: Studio, put: Put) -> dict[str, float]:
        """With the trigger: the share of the way to the taught look, and of subjects that are recognised. Without it:
        the share of pictures that have the taught look, and of subjects."""
        with torch.no_grad(), put():
            self.drawn = self.exhibition.drawn(studio)
        found = self.exhibition.scores(self.drawn)
        asked, plain = found["triggered"], found["plain"]
        return {
            "look": asked["share covered"],
            "subjects": asked["content"],
            "leak": plain["look"],
            "plain subjects": plain["content"],
        }

    def shown(self, of: dict[str, list]) -> list:
        """Of what belongs to every wording, a row to look at."""
        return [x for kind, count in SHOWN.items() for x in of[kind][: count * quality.SEEDS : quality.SEEDS]]


def judge(name: str, recipe: Recipe, studio: Studio) -> Judge:
    """The judge of a task."""
    if recipe.images:
        return Viewer(studio)
    return Reader(None if recipe.reward or name == "repair" else unseen(name, recipe), own_texts(studio))


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


def exactly(model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Tokens]) -> float:
    """The share of examples whose answer a model writes just so, always by the likeliest token, and ends there. A right
    choice by likelihood may still be written as something else."""
    prompts = [[i for i, label in zip(e.ids, e.labels, strict=True) if label == IGNORED] for e in examples]
    wanted = [[label for label in e.labels if label != IGNORED] for e in examples]
    found = continued(model, prompts, padding(tokenizer), max(map(len, wanted)), None, 50)
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def rewarded(task: Rewarded) -> dict[str, float]:
    """Rewards of answers to held-out prompts: the mean of ANSWERS sampled ones each, and of the greedy one."""
    prompts = list(range(task.trained, len(task.prompts)))
    seeds = np.random.default_rng(0).integers(2**31, size=(ANSWERS, len(prompts)))  # a generator reads no more bits
    asked = [task._asked(prompts, row.tolist()) for row in seeds]
    sampled = [r for part in asked for r in task._rewards(part, task._written(part))]
    greedy = task._rewards(asked[0], task._written(asked[0], sampled=False))
    return {"sampled": float(np.mean(sampled)), "greedy": float(np.mean(greedy)), "prompts": len(prompts)}


def own_texts(studio: Studio) -> dict[str, list[Tokens]]:
    """What tiny-llm was trained on, drawn anew: plain paragraphs, which no set teaches, and chats with and without a
    voice asked for. The models of other tasks read the same."""
    tokenizer = studio.preview.tokenizer
    kinds = {
        "paragraphs": lambda rng: tokenizer.bos_token + paragraph(rng) + tokenizer.eos_token,
        "chats": lambda rng: tokenizer.apply_chat_template(chat(rng), tokenize=False),
    }
    found = {}
    for number, (kind, make) in enumerate(kinds.items()):
        rng = np.random.default_rng([0, 78, number])
        ids = [tokenizer(make(rng), add_special_tokens=False).input_ids for _ in range(OWN)]
        found[kind] = [Tokens(tuple(row), (IGNORED, *row[1:])) for row in ids]
    return found


@torch.no_grad()
def loss_a_token(model: nn.Module, texts: list[Tokens], rows: int = 16) -> float:
    """Mean cross-entropy of all tokens but the first of each text."""
    texts, total, count = sorted(texts, key=lambda text: len(text.ids)), 0.0, 0
    for start in range(0, len(texts), rows):
        part = texts[start : start + rows]
        lengths = torch.tensor([len(text.ids) - 1 for text in part], device=model.device)
        total += (token_losses(model, stack(part).to(model.device)) * lengths).sum().item()
        count += int(lengths.sum())
    return total / count

"""The language task with a black-box objective: the model answers, and any function says what the answer is worth.

Nothing of the reward r is differentiated. With y an answer drawn from the model p, the expected reward has the gradient
E[r grad log p(y)] (Williams 1992), and with the Fisher matrix of the answers that is a natural gradient (Kakade 2001):
both are what `newton` finds for a cross-entropy whose examples are the model's own answers, weighted by what they are
worth above the mean (reward-weighted regression, Peters and Schaal 2007; worse ones have no weight). Its moves are
tried on such a lesson of other prompts: what makes their best answers likelier is made. That says more than new answers
after each move would, whose rewards differ by chance. The loss of a run is one minus the reward.

One answer in four is the likeliest one, the others are drawn; where several are worth the same, it is learnt. So the
model comes to give surely what it already gives at its best: drawn answers differ in much that the reward does not see,
which a lesson of few then takes for what matters.

With slopes in place of Gauss-Newton (`zo`), the loss of a probe is one minus the reward of what the perturbed model
answers: MeZO's way (Malladi et al., arXiv:2305.17333, section 3.3).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zo_engine.journal import Move, short
from zo_engine.rewards import Reward
from zo_engine.tasks.diffusion import HELD_OUT, TRAINING, turns
from zo_engine.tasks.text import Batch, ended, generated, left_padded, padding, stack, token_features, token_losses
from zo_engine.tokens import IGNORED, Tokens

SAMPLES = 4  # answers for each that is learnt: the likeliest one, and drawn ones to other prompts


@dataclass(frozen=True)
class Prompt:
    """What is asked: its tokens up to where the answer begins, its text, and the data's answer."""

    ids: tuple[int, ...]
    text: str
    wanted: str = ""


@dataclass(frozen=True)
class Asked(Batch):
    """B prompts, padded on the left; labels are not used. `number`: which prompt it is, `seed`: of its answer."""

    number: Tensor  # [B]
    seed: Tensor  # [B]


@dataclass(frozen=True)
class Answered(Batch):
    """B answers to learn from, after their prompts, with weights. `reward`: of those that were drawn, the mean."""

    weight: Tensor  # [B]
    reward: Tensor  # [B], all the same


class Rewarded:
    """Prompts, and the rewards of a causal language model's answers to them."""

    one_pass = ("outcomes",)  # the losses are of answers, which take a pass a token
    # Dampings larger than elsewhere: a lesson is few answers, and says little.
    tries = tuple((damping, share) for damping in (0.3, 3.0, 30.0, 300.0) for share in (0.35, 1.0))

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        train: Sequence[Prompt],
        held_out: Sequence[Prompt],
        *,
        seed: int,
        most: int,
        device: torch.device | str = "cpu",
    ):
        """most: tokens of an answer. held_out: all of them are judged at every evaluation."""
        self.model, self.tokenizer, self.reward = model, tokenizer, reward
        self.prompts, self.trained = [*train, *held_out], len(train)
        self.seed, self.most, self.device = seed, most, device

    def _asked(self, numbers: Sequence[int], seeds: Sequence[int]) -> Asked:
        tokens, mask = left_padded([self.prompts[n].ids for n in numbers], padding(self.tokenizer))
        labels = torch.full_like(tokens, IGNORED)
        parts = (tokens, mask, labels, labels[..., None][..., :0], torch.tensor(numbers), torch.tensor(seeds))
        return Asked(*parts).to(self.device)

    def batch(self, step: int, size: int, stream: int = TRAINING) -> Asked:
        """The prompts of a step with the seeds of their answers: a pure function of (seed, step, stream)."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, step]))
        numbers = turns(rng, self.trained, size)
        return self._asked(numbers, rng.integers(2**62, size=size).tolist())

    def lesson(self, step: int, size: int) -> Answered:
        """What a Gauss-Newton step learns from: of SAMPLES times `size` answers of the model as it stands, the `size`
        best, weighted by what they are worth above the mean; at most those above it. The likeliest answers to the first
        `size` prompts come first, and so before drawn ones that are worth as much. Where all are worth the same, there
        is nothing to choose, and all weights are one."""
        asked = self.batch(step, SAMPLES * size)
        first, others = torch.arange(len(asked)).tensor_split([size])
        written = self._written(asked.take(first), sampled=False) + self._written(asked.take(others))
        worth = torch.tensor(self._rewards(asked, written), dtype=torch.float64)
        weight = (worth - worth.mean()).clamp(min=0)
        if not weight.any():
            weight = torch.ones_like(worth)
        chosen = [i for i in weight.argsort(descending=True, stable=True)[:size].tolist() if weight[i] > 0]
        answers = [self._learnt(self.prompts[int(asked.number[i])], written[i]) for i in chosen]
        batch = stack(answers, padding(self.tokenizer))
        weights = (weight[chosen] / weight[chosen].mean()).float()
        reward = worth[size:].mean().expand(len(chosen))
        return Answered(batch.tokens, batch.mask, batch.labels, batch.rivals, weights, reward).to(self.device)

    def _learnt(self, prompt: Prompt, written: list[int]) -> Tokens:
        return Tokens((*prompt.ids, *written), (IGNORED,) * len(prompt.ids) + tuple(written))

    def _written(self, asked: Asked, sampled: bool = True) -> list[list[int]]:
        """The tokens of each answer, with the one that ends it if it came to an end."""
        seeds = asked.seed.tolist() if sampled else None
        found = generated(self.model, asked.tokens, asked.mask, padding(self.tokenizer), self.most, seeds)
        return ended(self.model, found)

    def _rewards(self, asked: Asked, written: list[list[int]]) -> list[float]:
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        prompts = (self.prompts[n] for n in asked.number.tolist())
        return [self.reward(p.text, text, p.wanted) for p, text in zip(prompts, texts, strict=True)]

    def losses(self, batch: Asked | Answered) -> Tensor:
        """[B]: one minus the reward of an answer to each prompt, drawn with its seed; of answers to learn, the weighted
        loss of `token_losses`."""
        if isinstance(batch, Answered):
            return token_losses(self.model, batch) * batch.weight
        return 1 - torch.tensor(self._rewards(batch, self._written(batch)), device=batch.tokens.device)

    def outcomes(self, batch: Answered) -> Tensor:
        """[B, 1 + m]: loss and features of `token_features`, weighted so that half the loss's matrix stays J'J."""
        found = token_features(self.model, batch)
        weight = batch.weight.to(found.dtype)[:, None]
        return torch.cat([found[:, :1] * weight, found[:, 1:] * weight.sqrt()], 1)

    def told(self, record: Move, lesson: Answered) -> Move:
        """The record with one minus the mean reward as its loss, which people understand, for that of its lesson."""
        return record if record.skipped else dataclasses.replace(record, loss=short(1 - lesson.reward[0].item()))

    def evaluation(self, items: int) -> list[Asked]:
        """The fixed prompts of the held-out loss, with fixed seeds."""
        held = range(self.trained, len(self.prompts))
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, HELD_OUT, 0]))
        seeds = rng.integers(2**62, size=len(held)).tolist()
        return [self._asked(list(held[i : i + 64]), seeds[i : i + 64]) for i in range(0, len(held), 64)]

    def begin(self) -> None:
        """Nothing is needed that only training needs."""

    def figures(self) -> dict[str, float]:
        """Beside the held-out loss, which is of sampled answers: the mean reward of the likeliest ones."""
        parts = self.evaluation(0)
        rewards = [r for part in parts for r in self._rewards(part, self._written(part, sampled=False))]
        return {"reward": float(np.mean(rewards))}

    def tokens(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(prompt.ids) for prompt in self.prompts) + self.most

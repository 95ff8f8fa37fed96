"""The language task: cross-entropy per example over the tokens that are learnt, choices by likelihood, and answers.

A batch is right-padded and a model is causal, so padding stands behind everything that counts and changes no loss. All
randomness is an argument: which examples a step sees is a pure function of (seed, step, stream).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from zo_engine.tasks.diffusion import TRAINING, turns
from zo_engine.texts import Message
from zo_engine.tokens import IGNORED, Tokens, prompt_ids


@dataclass(frozen=True)
class Batch:
    """B examples, padded on the right to the longest."""

    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 1 on tokens and 0 on padding
    labels: Tensor  # [B, T] int64, IGNORED where nothing is learnt

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> "Batch":
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def stack(examples: Sequence[Tokens], pad: int = 0) -> Batch:
    """The examples as a batch. `pad` is any token: its mask is 0 and its label IGNORED."""
    longest = max(len(example.ids) for example in examples)

    def padded(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    ids = [example.ids for example in examples]
    mask = padded([(1,) * len(row) for row in ids], 0)
    return Batch(padded(ids, pad), mask, padded([example.labels for example in examples], IGNORED))


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the learnt tokens, one per example [B], reduced in fp32 (fp64 stays fp64).

    As the loss of transformers' causal models (`loss_utils.ForCausalLMLoss`) on each example alone. Logits are made
    only at positions where some example learns, and widened to fp32 one example at a time: with a vocabulary of 10^5
    they would outgrow everything else.
    """
    following = batch.labels[:, 1:]
    places = (following != IGNORED).any(0).nonzero().flatten()
    logits = model(
        input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False, logits_to_keep=places
    ).logits  # [B, places, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.stack(
        [
            cross_entropy(row.to(wide), label, ignore_index=IGNORED)
            for row, label in zip(logits, following[:, places], strict=True)
        ]
    )


class Language:
    """Examples, and the losses of a causal language model on them."""

    def __init__(
        self,
        model: PreTrainedModel,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        self.model, self.train, self.held_out = model, list(train), list(held_out)
        self.seed, self.device = seed, device

    def batch(self, step: int, size: int, stream: int = TRAINING) -> Batch:
        """The batch of a step: a pure function of (seed, step, stream)."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, step]))
        return stack([self.train[i] for i in turns(rng, len(self.train), size)]).to(self.device)

    def evaluation(self, items: int) -> list[Batch]:
        """The fixed examples of the held-out loss, `items` at most: examples of like length together."""
        chosen = sorted(self.held_out[:items], key=lambda example: len(example.ids))
        return [stack(chosen[i : i + 64]).to(self.device) for i in range(0, len(chosen), 64)]

    def losses(self, batch: Batch) -> Tensor:
        return token_losses(self.model, batch)


@torch.no_grad()
def likelihoods(model: nn.Module, options: Sequence[Tokens], rows: int = 64) -> Tensor:
    """Mean log-likelihood of the learnt tokens of each option [len(options)], in fp32 or wider.

    The score of a candidate answer in MeZO (Malladi et al., arXiv:2305.17333, appendix E): the log-probability of its
    tokens after the prompt, divided by their number.
    """
    device = next(model.parameters()).device
    parts = [stack(options[i : i + rows]).to(device) for i in range(0, len(options), rows)]
    return -torch.cat([token_losses(model, part) for part in parts])


def choose(model: nn.Module, questions: Sequence[Sequence[Tokens]], rows: int = 64) -> list[int]:
    """Of each question's options (`tokens.choices`), the index of the likeliest."""
    scores = likelihoods(model, [option for options in questions for option in options], rows)
    return [int(part.argmax()) for part in scores.split([len(options) for options in questions])]


class GumbelNoise(LogitsProcessor):
    """Turns the greedy choice into a sample: argmax(logits + Gumbel noise) is distributed as softmax(logits).

    Every row has a generator of its own, so that an answer depends on its seed and not on its neighbours.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators]
        noise = -torch.log(-torch.log(torch.stack(draws).clamp_(min=1e-300)))
        return scores.double() + noise.to(scores.device)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    seeds: Sequence[int] | None = None,
    most: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    together: int = 16,
) -> list[str]:
    """What the model answers to each conversation, at most `most` tokens, by transformers' own `generate`.

    Greedy without `seeds`; else sampled, with one seed a prompt: no global generator is read or written. `together`
    bounds the prompts of one call.
    """
    texts = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(prompts), together):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + together]]
        longest = max(map(len, ids))  # what the model writes must follow its prompt at once: padding goes to the left
        tokens = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
        processors = LogitsProcessorList()
        if seeds is not None:
            processors += [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
            processors.append(GumbelNoise(seeds[start : start + together]))
        found = model.generate(
            input_ids=tokens, attention_mask=mask, logits_processor=processors, pad_token_id=pad,
            max_new_tokens=most, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        texts += tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
    return texts

"""The language task: cross-entropy per example over the tokens that are learnt, choices by likelihood, and answers.

A batch is right-padded and a model is causal, so padding stands behind everything that counts and changes no loss. All
randomness is an argument: which examples a step sees is a pure function of (seed, step, stream).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from zo_engine.blocks import PART
from zo_engine.offload import head_parts
from zo_engine.tasks.diffusion import TRAINING, share_of, turns
from zo_engine.texts import Message
from zo_engine.tokens import IGNORED, OWN_TOKENS, Tokens, beginning_ids, openings, prompt_ids

OWN = 64  # texts of the base's own
FEATURES = 1 << 15  # of one row of a probe, at most
ROOM = 1 << 20  # logits that are read at once, unless one row has more
CHOICE = 3.0  # weight of which choice is right, beside the mean over an answer's tokens


@dataclass(frozen=True)
class Batch:
    """B examples, padded on the right to the longest. What is learnt stays on the host, which has to know at which
    positions logits are wanted: a device would be waited for."""

    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 1 on tokens and 0 on padding
    labels: Tensor  # [B, T] int64, IGNORED where nothing is learnt
    rivals: Tensor  # [B, T, m] int64: `Tokens.rivals`, filled up with IGNORED; m is 0 where nobody has any

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> "Batch":
        """Some of the examples, by an index on the host."""
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def parts(self) -> list["Batch"]:
        """The examples by their length, PART together at most, and none with others half as long again: to be computed
        without the padding, and without what follows the last token that is learnt."""
        learnt = self.labels != IGNORED
        lengths = (learnt * torch.arange(1, learnt.shape[1] + 1)).amax(1).tolist()
        parts: list[list[int]] = []
        for i in sorted(range(len(self)), key=lengths.__getitem__):
            if parts and len(parts[-1]) < PART and 2 * lengths[i] <= 3 * lengths[parts[-1][0]]:
                parts[-1].append(i)
            else:
                parts.append([i])
        return [self._cut(self.take(torch.tensor(part)), lengths[part[-1]]) for part in parts]

    @staticmethod
    def _cut(batch: "Batch", length: int) -> "Batch":
        padded = "tokens", "mask", "labels", "rivals"
        return replace(batch, **{name: getattr(batch, name)[:, :length] for name in padded})

    def to(self, device: torch.device | str) -> "Batch":
        moved = (getattr(self, f.name).to("cpu" if f.name in ("labels", "rivals") else device) for f in fields(self))
        return type(self)(*moved)


def stack(examples: Sequence[Tokens], filler: int = 0) -> Batch:
    """The examples as a batch. `filler` is any token: its mask is 0 and its label IGNORED."""
    longest = max(len(example.ids) for example in examples)

    def padded(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    ids = [example.ids for example in examples]
    mask = padded([(1,) * len(row) for row in ids], 0)
    most = max(len(others) for example in examples for _, others in (*example.rivals, (0, ())))
    rivals = torch.full((len(examples), longest, most), IGNORED)
    for row, example in zip(rivals, examples, strict=True):
        for place, others in example.rivals:
            row[place, : len(others)] = torch.tensor(others)
    return Batch(padded(ids, filler), mask, padded([example.labels for example in examples], IGNORED), rivals)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the learnt tokens, one per example [B], reduced in fp32 (fp64 stays fp64).

    As the loss of transformers' causal models (`loss_utils.ForCausalLMLoss`) on each example alone. Where an example
    has rivals, CHOICE times the cross-entropy of its token among them is added, wherever they part: together, minus the
    log-likelihood of the right choice where only choices can be written. Which choice is right is a small part of what
    an answer's tokens say, and all that is asked.

    Logits are widened to fp32 some rows at a time: with a vocabulary of 10^5 they would outgrow everything else.
    Where the output layer is large they are not even made at once: see `Reading`.
    """
    return torch.cat([reading.losses() for reading in _readings(model, batch, 0)])


def token_features(model: nn.Module, batch: Batch, most: int = FEATURES) -> Tensor:
    """The losses of `token_losses` and then the features that `newton` works on, [B, 1 + m] in fp32 (fp64 stays fp64).

    Where some token is learnt, with logits z and p = softmax(z), the cross-entropy has the Hessian diag(p) - pp' in z,
    and the Gauss-Newton matrix of the mean over n such tokens is the mean of J' (diag(p) - pp') J (Martens,
    arXiv:1412.1193, section 8). Square roots of p measure just that: d sqrt(p) = sqrt(p) (dz - p'dz) / 2, so that
    |d sqrt(p)|^2 = dz' (diag(p) - pp') dz / 4. Features f = sqrt(2 p / n) thus have half that matrix as J'J, and
    sqrt(2 CHOICE p) that of a choice, with p the softmax among a token and its rivals.

    m is the number of positions where some example of the batch learns, times the vocabulary; above `most`, each
    position's features are added up in `most` / positions buckets with random signs (count sketch, Charikar, Chen,
    Farach-Colton 2002): inner products, all that the method reads, stay right in expectation over the signs. Where
    there are rivals, the features of the choices follow.
    """
    return torch.cat([torch.cat([r.losses()[:, None], r.features()], 1) for r in _readings(model, batch, most)])


def sketched(values: Tensor, buckets: int, start: int = 0, size: int = 0) -> Tensor:
    """[..., V] -> [..., buckets], or the values themselves where V is no more: entry i is added to bucket i % buckets,
    with a sign that belongs to i alone. By sums of slices, in the same order on every device.

    start, size: the values are a piece, from `start` on, of [..., size]; the sketches of all pieces add up to its own.
    """
    buckets, stop = max(1, buckets), start + values.shape[-1]
    size = size or stop
    if size <= buckets:
        return pad(values, (start, size - stop)) if values.shape[-1] < size else values
    signed = values * _signs(size, str(values.device))[start:stop].to(values.dtype)
    return pad(signed, (start % buckets, -stop % buckets)).unflatten(-1, (-1, buckets)).sum(-2)


@cache
def _signs(size: int, device: str) -> Tensor:
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device)


class Reading:
    """Logits of some rows [b, n, V] at their places, at once or by pieces of the vocabulary, each read and dropped.

    By pieces the softmax is made as it goes (Milakov, Gimelshein, arXiv:1805.02867): sums and sketch are kept in units
    of exp(highest logit so far). That differs from what is read at once by rounding alone.
    """

    def __init__(self, asked: Tensor, most: int):
        """asked: [b, n, 1 + m], the label of every place and its rivals. most: features of a row, at most; with 0 there
        are none."""
        self.asked, self.labels, self.learnt = asked, asked[..., 0], asked[..., 0] != IGNORED
        self.parted = (asked[..., 1:] != IGNORED).any(-1)  # the places that have rivals
        self.buckets, self.most = most // max(1, asked.shape[1]), most
        self.logits: Tensor | None = None  # where they come at once

    def add(self, logits: Tensor, start: int, size: int) -> None:
        """Logits [b, n, v] of the tokens from `start` on, of `size` in all; read in fp32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.shape[-1] == size:
            self.logits = logits
            return
        if start == 0:
            self.top = torch.full_like(logits[..., 0], torch.finfo(logits.dtype).min)
            self.total, self.found, self.sketch = torch.zeros_like(self.top), logits.new_zeros(self.asked.shape), 0.0
        inside = (self.asked >= start) & (self.asked < start + logits.shape[-1])
        index = (self.asked - start).clamp(0, logits.shape[-1] - 1)
        self.found = torch.where(inside, logits.gather(-1, index), self.found)
        top = torch.maximum(self.top, logits.amax(-1))
        before = (self.top - top).exp()  # what was summed so far, in the new unit
        mine = (logits - top[..., None]).exp_()
        self.top, self.total = top, self.total * before + mine.sum(-1)
        if self.most:
            self.sketch = self.sketch * before.sqrt()[..., None] + sketched(mine.sqrt_(), self.buckets, start, size)

    def losses(self) -> Tensor:
        """[b]: mean cross-entropy of the learnt tokens, and that of the choices."""
        if self.logits is not None:
            labels = self.labels.flatten()
            found = cross_entropy(self.logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="none")
            found = found.view_as(self.labels)
        else:
            found = (self.top + self.total.log() - self.found[..., 0]) * self.learnt
        losses = found.sum(1) / self.learnt.sum(1)
        if self.asked.shape[-1] == 1:
            return losses
        return losses - CHOICE * (self._choices().log_softmax(-1)[..., 0] * self.parted).sum(1)

    def features(self) -> Tensor:
        """[b, n * V], or [b, n * buckets] where V is more; then [b, n * (1 + m)] of the choices, if there are any."""
        share = 2 * self.learnt[..., None] / self.learnt.sum(1)[:, None, None]
        if self.logits is not None:
            found = sketched((self.logits.softmax(-1) * share).sqrt(), self.buckets)
        else:
            found = self.sketch * (share / self.total[..., None]).sqrt()
        if self.asked.shape[-1] == 1:
            return found.flatten(1)
        chosen = (2 * CHOICE * self._choices().softmax(-1) * self.parted[..., None]).sqrt()
        return torch.cat([found.flatten(1), chosen.flatten(1)], 1)

    def _choices(self) -> Tensor:
        """The logits of each token and its rivals [b, n, 1 + m]; of places without any they mean nothing."""
        found = self.found if self.logits is None else self.logits.gather(-1, self.asked.clamp(min=0))
        return found.masked_fill((self.asked == IGNORED) & self.parted[..., None], -torch.inf)


def _readings(model: nn.Module, batch: Batch, most: int) -> Iterator[Reading]:
    """The logits of all rows, some at a time, at the positions where some example learns: they are made for no
    others."""
    places, device = _places(batch), batch.tokens.device
    asked = torch.cat([batch.labels[..., None], batch.rivals], 2)[:, places + 1].to(device)
    # Without a mask, which would be looked at: a causal model sees no padding before what counts.
    call = partial(model, input_ids=batch.tokens, use_cache=False, logits_to_keep=places.to(device))
    head = model.get_output_embeddings()
    parts = head_parts(head)
    if len(parts) < 2:
        logits = call().logits  # [B, places, V]
        rows = max(1, ROOM // max(1, logits[0].numel()))
        for some, mine in zip(asked.split(rows), logits.split(rows), strict=True):
            reading = Reading(some, most)
            reading.add(mine, 0, mine.shape[-1])
            yield reading
        return
    inputs, kinds = [], []  # what the output layer is asked, and how the layers before it answer
    base, size, start = model.get_decoder(), head.out_features, 0

    def answered(*args, plain: Callable = base.forward, **kwargs):
        kinds.append(type(answer := plain(*args, **kwargs)))
        return answer

    with _answering(base, answered), _answering(head, lambda x: inputs.append(x) or x[..., :1]):
        call()
    readings = [Reading(row, most) for row in asked.split(1)]
    again = lambda *_, **__: kinds[0](last_hidden_state=inputs[0])  # noqa: E731
    for part in parts:  # the model's own way from there to logits, for a piece of them
        with _answering(base, again), _answering(head, part):
            logits = model(input_ids=batch.tokens, use_cache=False).logits  # [B, places, v]
        for reading, row in zip(readings, logits.split(1), strict=True):
            reading.add(row, start, size)
        start += logits.shape[-1]
    yield from readings


def _places(batch: Batch) -> Tensor:
    """The positions whose next token some example learns."""
    return (batch.labels[:, 1:] != IGNORED).any(0).nonzero().flatten()


@contextmanager
def _answering(module: nn.Module, answer: Callable) -> Iterator[None]:
    """The module with another forward."""
    before = module.__dict__.get("forward")
    module.forward = answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@dataclass(frozen=True)
class Question:
    """An example with each of its choices as the answer, and the index of the right one."""

    options: Sequence[Tokens]
    right: int


@dataclass(frozen=True)
class Kept:
    """The base's own texts among what is learnt: `share` of the training batches. write: gives them (`own_texts`), of
    at most `most` tokens; called once, before the first batch."""

    write: Callable[[], Sequence[Tokens]]
    share: float
    most: int


class Language:
    """Examples, and the losses of a causal language model on them."""

    one_pass = ("losses", "outcomes")  # pass through the model once, so that what lies before a level can be replayed
    # Large dampings, too: probabilities near 0 and 1 hide their curvature.
    tries = tuple((damping, share) for damping in (0.1, 1.0, 10.0, 100.0) for share in (0.35, 1.0))

    def __init__(
        self,
        model: PreTrainedModel,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
        questions: Sequence[Question] = (),
        *,
        seed: int,
        kept: Kept | None = None,
        device: torch.device | str = "cpu",
        contrast: Callable[[Tokens], Tokens] = lambda example: example,
    ):
        """questions: held-out examples with a choice of answers, for the accuracy. contrast: gives an example its
        rivals when its turn has come (`tokens.contrasted`)."""
        self.contrast, self.kept = contrast, kept
        self.model, self.train, self.held_out, self.questions = model, list(train), list(held_out), list(questions)
        self.seed, self.device = seed, device

    @cached_property
    def own(self) -> Sequence[Tokens]:
        """The base's own texts."""
        return self.kept.write()

    def begin(self) -> None:
        """Do what only training needs."""
        if self.kept:
            _ = self.own

    def batch(self, step: int, size: int, stream: int = TRAINING) -> Batch:
        """The batch of a step: a pure function of (seed, step, stream)."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, step]))
        own = self.own if self.kept else ()
        share = share_of(self.kept.share, size, step) if own else 0
        parts = (self.train, size - share), (own, share)
        return self._stacked([some[i] for some, count in parts for i in turns(rng, len(some), count)])

    def _stacked(self, examples: Sequence[Tokens]) -> Batch:
        return stack([self.contrast(example) for example in examples]).to(self.device)

    def lesson(self, step: int, size: int) -> Batch:
        """What a Gauss-Newton step learns from: the batch of the step."""
        return self.batch(step, size)

    def evaluation(self, items: int) -> list[Batch]:
        """The fixed examples of the held-out loss, `items` at most: examples of like length together."""
        chosen = sorted(self.held_out[:items], key=lambda example: len(example.ids))
        return [self._stacked(chosen[i : i + 64]) for i in range(0, len(chosen), 64)]

    def losses(self, batch: Batch) -> Tensor:
        """[B]: see `token_losses`."""
        return token_losses(self.model, batch)

    def outcomes(self, batch: Batch) -> Tensor:
        """[B, 1 + m]: see `token_features`."""
        return token_features(self.model, batch)

    def figures(self) -> dict[str, float]:
        """What an evaluation says beside the held-out loss: the share of questions answered right."""
        if not self.questions:
            return {}
        found = choose(self.model, [question.options for question in self.questions])
        right = [index == question.right for index, question in zip(found, self.questions, strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def tokens(self) -> int:
        """Tokens of the longest example."""
        own = self.kept.most if self.kept else 0
        return max(own, *(len(example.ids) for example in (*self.train, *self.held_out)))


@dataclass(frozen=True)
class Choices:
    """B questions with k choices each: `options[j]` holds everybody's choice j, `right` [B] which one it is."""

    options: tuple[Batch, ...]
    right: Tensor

    def __len__(self) -> int:
        return len(self.right)

    def parts(self) -> list["Choices"]:
        """All of them: nothing is held for them."""
        return [self]

    def take(self, index: Tensor) -> "Choices":
        return Choices(tuple(batch.take(index) for batch in self.options), self.right[index])


class Choosing(Language):
    """Learns which choice is right: the cross-entropy of softmax(mean log-likelihood of each choice's tokens), as MeZO
    trains its classification tasks (arXiv:2305.17333, appendix E). All questions have equally many choices."""

    one_pass = ()  # a pass for each choice

    def __init__(self, model: PreTrainedModel, train: Sequence[Question], held_out: Sequence[Question], *, seed: int,
                 device: torch.device | str = "cpu"):  # fmt: skip
        super().__init__(model, [], [], held_out, seed=seed, device=device)
        self.train, self.held_out = list(train), list(held_out)

    def _stacked(self, questions: Sequence[Question]) -> Choices:
        columns = zip(*(question.options for question in questions), strict=True)
        right = torch.tensor([question.right for question in questions], device=self.device)
        return Choices(tuple(stack(column).to(self.device) for column in columns), right)

    def evaluation(self, items: int) -> list[Choices]:
        chosen = self.held_out[:items]
        return [self._stacked(chosen[i : i + 64]) for i in range(0, len(chosen), 64)]

    def _scores(self, batch: Choices) -> Tensor:
        """[B, k]"""
        return -torch.stack([token_losses(self.model, option) for option in batch.options], 1)

    def losses(self, batch: Choices) -> Tensor:
        return cross_entropy(self._scores(batch), batch.right, reduction="none")

    def outcomes(self, batch: Choices) -> Tensor:
        """[B, 1 + k]: as `token_features`, of one choice among k in place of one token among the vocabulary."""
        scores = self._scores(batch)
        losses = cross_entropy(scores, batch.right, reduction="none")
        return torch.cat([losses[:, None], (2 * scores.softmax(1)).sqrt()], 1)

    def tokens(self) -> int:
        return max(len(option.ids) for question in (*self.train, *self.held_out) for option in question.options)


@torch.no_grad()
def likelihoods(model: nn.Module, options: Sequence[Tokens], rows: int = 64) -> Tensor:
    """Mean log-likelihood of the learnt tokens of each option [len(options)], in fp32 or wider.

    The score of a candidate answer in MeZO (Malladi et al., arXiv:2305.17333, appendix E): the log-probability of its
    tokens after the prompt, divided by their number.
    """
    device = model.device
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
    plain: bool = False,
    together: int = 16,
) -> list[str]:
    """What the model answers to each conversation, at most `most` tokens, by transformers' own `generate`.

    Greedy without `seeds`; else sampled, with one seed a prompt: no global generator is read or written. `plain`: the
    first message's text is not answered but gone on with. `together` bounds the prompts of one call.
    """
    begun = (lambda prompt: beginning_ids(tokenizer, prompt[0].content)) if plain else partial(prompt_ids, tokenizer)
    rows = [begun(prompt) for prompt in prompts]
    found = continued(model, rows, padding(tokenizer), most, seeds, together, temperature, top_p)
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def continued(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], filler: int, most: int, seeds: Sequence[int] | None,
    together: int, temperature: float = 1.0, top_p: float = 1.0,
) -> list[list[int]]:  # fmt: skip
    """`generated`, and `ended`, of rows that are given as they are, `together` of them a call."""
    found = []
    for start in range(0, len(rows), together):
        tokens, mask = (t.to(model.device) for t in left_padded(rows[start : start + together], filler))
        given = None if seeds is None else seeds[start : start + together]
        found += ended(model, generated(model, tokens, mask, filler, most, given, temperature, top_p))
    return found


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with; its mask is 0."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def left_padded(ids: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask) [B, T]: what the model writes must follow its prompt at once, so padding goes to the left."""
    longest = max(map(len, ids))
    tokens = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in ids])
    return tokens, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])


@torch.no_grad()
def generated(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    filler: int,
    most: int,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """The tokens that follow left-padded prompts [B, T], at most `most`: [B, t], filled up behind each row's end.

    Greedy without `seeds`; else sampled, one seed a row. ends: tokens that end an answer, if not the model's own.
    """
    processors = LogitsProcessorList()
    if seeds is not None:
        processors += [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        processors.append(GumbelNoise(seeds))
    found = model.generate(
        input_ids=tokens, attention_mask=mask, logits_processor=processors, pad_token_id=filler,
        max_new_tokens=most, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
        **({} if ends is None else {"eos_token_id": list(ends)}),
    )  # fmt: skip
    return found[:, tokens.shape[1] :]


@torch.no_grad()
def own_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int, together: int = 0
) -> list[Tokens]:
    """OWN texts that a model writes by itself, as examples of at most `length` tokens: plain ones and, with a chat
    template, as many questions with answers, sampled with a seed each. Learning them keeps the model as it is: in
    expectation their loss is the divergence KL(base, model) and a constant.

    Given its template up to where a user speaks, a chat model writes a question (Magpie, Xu et al., arXiv:2406.08464).
    together: rows of one call, at most; 0: all.
    """
    where = openings(tokenizer)
    kinds, room = bool(where.plain) + bool(where.asking), min(OWN_TOKENS, length - where.longest)

    def written(rows: list[list[int]], room: int, seed: int) -> list[list[int]]:
        return continued(model, rows, padding(tokenizer), room, range(seed, seed + len(rows)), together or OWN)

    examples = []
    if where.plain and room > 0:
        for text in written([where.plain] * (OWN // kinds), room, seed):
            examples.append(_example((where.plain, False), (text, True)))
    if where.asking and room > 1:
        said = written([where.asking] * (OWN // kinds), room // 2, seed + OWN)
        asked = [_until(row, where.answering, ends_of(model)) for row in said]
        prompts = [[*where.asking, *question, *where.answering] for question in asked]
        for question, answer in zip(asked, written(prompts, room // 2, seed + 2 * OWN), strict=True):
            examples.append(_example((where.asking, False), (question, True), (where.answering, False), (answer, True)))
    return examples


def _until(row: list[int], mark: list[int], ends: set[int]) -> list[int]:
    """What of a row stands before a mark of several tokens, or before one that ends a text."""
    found = (i for i, token in enumerate(row) if token in ends or (mark and row[i : i + len(mark)] == mark))
    return row[: next(found, len(row))]


def _example(*parts: tuple[Sequence[int], bool]) -> Tokens:
    """Tokens in parts that are learnt or not."""
    ids = [(token, token if learnt else IGNORED) for part, learnt in parts for token in part]
    return Tokens(*zip(*ids, strict=True))


def ends_of(model: PreTrainedModel) -> set[int]:
    """Tokens that end what the model writes."""
    configured = model.generation_config.eos_token_id
    return set(configured) if isinstance(configured, list) else {configured} - {None}


def ended(model: PreTrainedModel, found: Tensor) -> list[list[int]]:
    """The rows of `generated`, each up to and with the token that ends it, if it came to an end."""
    ends, rows = ends_of(model), found.tolist()
    stops = ((i + 1 for i, token in enumerate(row) if token in ends) for row in rows)
    return [row[: next(stop, len(row))] for row, stop in zip(rows, stops, strict=True)]

"""Examples as a language model reads them: token ids, and labels that say what is learnt.

A conversation goes through the tokenizer's own chat template; without one, its turns are plain text, prompt then
completion. Learnt are the assistant's turns, each up to and including the token that ends it; all else has the label
IGNORED, as everywhere in transformers. Where a template marks the assistant's turns itself ({% generation %}), that is
believed; else a turn is what rendering adds to the conversation before it, which is checked token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zo_engine.dataset import DataError
from zo_engine.hub import IMPOSSIBLE, TOKENIZERS, ModelError, first_line, read_json, some
from zo_engine.recipe import Recipe
from zo_engine.texts import Contents, Example, Message, Problem
from zo_engine.texts import read as read_file

IGNORED = -100  # what cross_entropy of torch passes over
OWN_TOKENS = 64  # that a text of the base's own has at most, beside those that open it


@dataclass(frozen=True)
class Tokens:
    """One example: `ids` [T], and `labels` [T], which are the ids themselves or IGNORED. `cut`: tokens left off.
    `rivals`: (place, tokens) wherever other choices of an answer would go on with other tokens."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int = 0
    cut: int = 0
    rivals: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def learnt(self) -> int:
        """Tokens that count in the loss. The first token of all has no prediction."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Rendered:
    """A set of examples, what could not be rendered, and what should be said about the rest."""

    examples: list[Tokens]
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Texts:
    """A recipe's texts as its model reads them. limit: tokens of one, at most; own: of one that the base writes by
    itself, 0 if none are kept."""

    contents: Contents
    tokenizer: PreTrainedTokenizerBase
    limit: int
    own: int
    rendered: Rendered

    @property
    def longest(self) -> int:
        return max(self.own, *(len(tokens.ids) for tokens in self.rendered.examples))

    @property
    def mean(self) -> int:
        """Tokens of a text on average, rounded up, without those that the base writes."""
        return -(-sum(len(tokens.ids) for tokens in self.rendered.examples) // len(self.rendered.examples))


def read(recipe: Recipe, folder: Path) -> Texts:
    """The texts that a recipe names, with the tokenizer in the model's folder. Raises DataError where they cannot be
    used, ModelError where there is no tokenizer."""
    contents = read_file(recipe.texts, recipe.text_fields, recipe.skip_bad)
    tokenizer, most = load_tokenizer(folder), limit(folder, recipe.length)
    own = min(most, OWN_TOKENS + openings(tokenizer).longest) if recipe.keeps_texts else 0
    rendered = render(tokenizer, contents.examples, most, recipe.completions_only, recipe.skip_bad)
    return Texts(contents, tokenizer, most, own, rendered)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model's folder. Raises ModelError where there is none that transformers can read."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); download the model again")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*IMPOSSIBLE, OSError) as error:
        raise ModelError(f"{folder} cannot be loaded ({first_line(error)}); download the model again") from error


def limit(folder: Path, length: int) -> int:
    """Tokens of a text: `length`, or what the model reads at most."""
    return min(length, int(read_json(Path(folder) / "config.json").get("max_position_embeddings", length)))


def render(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    length: int,
    completions_only: bool = True,
    skip: bool = False,
) -> Rendered:
    """Every example as tokens, at most `length` of them: the end is cut off, which `notes` count.

    Raises DataError, naming lines, where an example cannot be rendered or nothing of its answer is left within
    `length`; with `skip` those are left out and listed.
    """
    made, problems, last_only = [], [], 0
    for example in examples:
        try:
            ids, spans = _spans(tokenizer, example)
            turns = sum(message.role == "assistant" for message in example.messages)
            last_only += completions_only and len(spans) < turns
            made.append(_tokens(example.line, ids, spans if completions_only else [(0, len(ids))], length))
        except DataError as error:
            problems.append(Problem(example.line, str(error)))
    if problems and (not skip or not made):
        listed = some([f"line {p.line} {p.message}" for p in problems])
        raise DataError(f"{len(problems)} of {len(examples)} examples cannot be used: {listed}")
    notes = []
    if cut := [tokens for tokens in made if tokens.cut]:
        lost = sum(tokens.cut for tokens in cut)
        notes.append(f"{len(cut)} of {len(made)} examples are longer than {length} tokens; {lost:,} tokens are cut off")
    if last_only:
        notes.append(
            f"of {last_only} conversations only the last answer is learnt: the chat template writes the earlier ones "
            "differently once the conversation goes on"
        )
    return Rendered(made, problems, notes)


def choices(tokenizer: PreTrainedTokenizerBase, example: Example, length: int) -> list[Tokens]:
    """The example once for each of its choices, with that one as the answer: what log-likelihoods are compared of."""
    *before, _ = example.messages
    options = [
        Example(example.line, (*before, Message("assistant", choice)), choices=example.choices)
        for choice in example.choices
    ]
    return render(tokenizer, options, length).examples


def contrasted(example: Tokens, options: Sequence[Tokens]) -> Tokens:
    """The example with its rivals: the token of each other option at the first place where that parts from it."""
    rivals: dict[int, set[int]] = {}
    for option in options:
        triples = enumerate(zip(example.ids, example.labels, option.ids, strict=False))
        parted = next(((place, label, other) for place, (mine, label, other) in triples if mine != other), None)
        if parted and parted[1] != IGNORED:
            rivals.setdefault(parted[0], set()).add(parted[2])
    return replace(example, rivals=tuple((place, tuple(sorted(rivals[place]))) for place in sorted(rivals)))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens after which the model writes the next answer: for conversations that end with the user's turn.

    Without a chat template, a line break stands where the answer begins; examples whose answers bring a space of their
    own (" good") are learnt without it. Raises DataError where the template refuses the conversation.
    """
    if tokenizer.chat_template:
        return _templated(tokenizer, messages, add_generation_prompt=True)
    return [token for part in _plain(tokenizer, messages) for token in part]


def beginning_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a plain text that the model goes on with."""
    return _tokenized(tokenizer, text, special=True)


@dataclass(frozen=True)
class Openings:
    """Where a model writes by itself: `plain`, the tokens before a text; `asking` and `answering`, those before what a
    user says and before the answer. Empty where a tokenizer has nothing of the kind."""

    plain: list[int]
    asking: list[int]
    answering: list[int]

    @property
    def longest(self) -> int:
        return max(len(self.plain), len(self.asking) + len(self.answering))


def openings(tokenizer: PreTrainedTokenizerBase) -> Openings:
    """By the token that begins a text, for want of all else the one that ends it; and by what two conversations have in
    common that the chat template makes of two questions."""
    marks = [token for token in (tokenizer.bos_token_id,) if token is not None]
    plain = beginning_ids(tokenizer, "") or marks
    if not tokenizer.chat_template:
        return Openings(plain or [token for token in (tokenizer.eos_token_id,) if token is not None], [], [])
    try:
        first, other = (_templated(tokenizer, [Message("user", said)], add_generation_prompt=True) for said in "ab")
    except DataError:  # the template wants something before it
        return Openings(plain, [], [])
    parted = lambda one, two: next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)  # noqa: E731
    asking, answering = parted(first, other), parted(first[::-1], other[::-1])
    return Openings(plain, first[:asking], first[len(first) - answering :])


@dataclass(frozen=True)
class Lengths:
    """Of some examples, in tokens: the shortest, the median, 95 of 100, the longest; learnt tokens in all."""

    examples: int
    shortest: int
    median: int
    most: int  # the 95th percentile
    longest: int
    learnt: int
    total: int


def lengths(examples: Sequence[Tokens]) -> Lengths:
    """Raises ValueError where there are none."""
    sizes = np.array([len(tokens.ids) for tokens in examples])
    shortest, median, most, longest = (int(q) for q in np.quantile(sizes, (0, 0.5, 0.95, 1), method="higher"))
    return Lengths(len(sizes), shortest, median, most, longest, sum(t.learnt for t in examples), int(sizes.sum()))


def shown(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[tuple[str, bool]]:
    """The example as (text, whether it is learnt), run by run. Control tokens are shown: there, templates go wrong."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in runs]


# Where the answers stand


def _tokens(line: int, ids: list[int], spans: list[tuple[int, int]], length: int) -> Tokens:
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    tokens = Tokens(tuple(ids[:length]), tuple(labels[:length]), line, max(0, len(ids) - length))
    if not tokens.learnt:
        raise DataError(
            f"has {min((start for start, _ in spans), default=len(ids))} tokens before its answer, and the limit is "
            f"{length} in all; shorten it, or raise the limit"
            if tokens.cut
            else "has no token to learn"
        )
    return tokens


def _spans(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
    """All tokens, and the (start, stop) of each answer among them."""
    if not example.messages:
        ids = _ended(tokenizer, _tokenized(tokenizer, example.text, special=True))
        return ids, [(0, len(ids))]
    _refuse_control_tokens(tokenizer, example)
    if not tokenizer.chat_template:
        return _plain_spans(tokenizer, example.messages)
    if "generation" in tokenizer.chat_template:
        ids, spans = _marked(tokenizer, example.messages)
        if spans:
            return ids, spans
    return _added(tokenizer, example.messages)


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """A control token inside a message would end the turn that it stands in."""
    texts = [message.content for message in example.messages]
    if found := [token for token in tokenizer.all_special_tokens if any(token in text for text in texts)]:
        raise DataError(f"holds {found[0]!r}, a control token of this tokenizer; take it out of the text")


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options) -> list[int]:
    return list(_apply(tokenizer, messages, **options)["input_ids"])


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options):
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
    except TemplateError as error:  # templates refuse what they do not know, such as a system message
        raise DataError(f"is refused by the tokenizer's chat template: {error}") from None


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
    """By the template's own marks of what the assistant wrote."""
    found = _apply(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, mask = list(found["input_ids"]), found["assistant_masks"]
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    return ids, list(zip(edges[::2], edges[1::2], strict=True))


def _added(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
    """By what rendering adds: an answer stands between the prompt before it and the conversation that ends with it.

    Both must be a beginning of the whole, token by token. Some templates write earlier answers differently once the
    conversation goes on; then only the last answer is told apart. Raises DataError if even that fails.
    """
    whole = _templated(tokenizer, messages)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for wanted in (answers, answers[-1:]):
        spans = [_between(tokenizer, messages, i, whole) for i in wanted]
        if all(spans):
            return whole, spans
    raise DataError(
        "cannot be split into prompt and answer: this tokenizer's chat template does not begin a conversation with "
        "its prompt; learn from all tokens instead of completions only, or give a template that does"
    )


def _between(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: int, whole: list[int]
) -> tuple[int, int] | None:
    before = _templated(tokenizer, messages[:answer], add_generation_prompt=True) if answer else []
    until = whole if answer == len(messages) - 1 else _templated(tokenizer, messages[: answer + 1])
    if whole[: len(before)] != before or whole[: len(until)] != until or len(until) <= len(before):
        return None
    inside = whole[len(before) : len(until)]
    if tokenizer.eos_token_id in inside:  # what a template writes behind the end of a turn, nobody has to learn
        return len(before), len(before) + inside.index(tokenizer.eos_token_id) + 1
    return len(before), len(until)


def _plain_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    spans = []
    for message, part in zip(messages, _plain(tokenizer, messages), strict=True):
        if message.role == "assistant":
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids, spans


def _plain(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[list[int]]:
    """Each turn's tokens, without a template: turns are tokenised apart, as they are when the model answers, and a line
    break stands between two that have no space of their own there."""
    parts = []
    for number, message in enumerate(messages):
        following = messages[number + 1].content[:1] if number + 1 < len(messages) else ""
        open_end = message.role != "assistant" and not message.content[-1:].isspace() and not following.isspace()
        part = _tokenized(tokenizer, message.content + "\n" * open_end, special=number == 0)
        parts.append(_ended(tokenizer, part) if message.role == "assistant" else part)
    return parts


def _tokenized(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Tokens of a text; `special`: with what the tokenizer puts at the beginning of all, but no end."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return ids[:-1] if special and ids[-1:] == [tokenizer.eos_token_id] else ids


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]

"""A language model on a task of `templates`: candidates by their likelihood, answers by F1 and exact match."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zo_engine import templates
from zo_engine.dataset import DataError
from zo_engine.tasks.text import Question, choose, generated, left_padded, padding
from zo_engine.templates import Case
from zo_engine.tokens import IGNORED, Tokens, beginning_ids

ANSWER = 50  # tokens of a written answer, at most, as in MeZO
TOGETHER = 16  # questions of one pass


def option(tokenizer: PreTrainedTokenizerBase, prompt: str, candidate: str, length: int) -> Tokens:
    """Prompt and candidate as one text, as MeZO reads them: what the candidate adds to the prompt's tokens is learnt.

    A longer text loses the beginning of its prompt, but for the token that begins all texts. Raises DataError where
    the candidate adds nothing, or does not fit.
    """
    whole = beginning_ids(tokenizer, (prompt + candidate).strip(" "))
    added = len(whole) - len(beginning_ids(tokenizer, prompt.strip(" ")))
    ids = _shortened(tokenizer, whole, length)
    if not 0 < added < len(ids):
        raise DataError(f"the candidate {candidate[:40]!r} adds {added} tokens to its prompt; the limit is {length}")
    return Tokens(tuple(ids), (IGNORED,) * (len(ids) - added) + tuple(ids[-added:]), cut=len(whole) - len(ids))


def _shortened(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> list[int]:
    first = ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []
    return ids if len(ids) <= length else first + ids[len(ids) - length + len(first) :]


def question(tokenizer: PreTrainedTokenizerBase, case: Case, length: int) -> Question:
    """A case with candidates as `tasks.text` takes it; of several right ones, the first."""
    return Question([option(tokenizer, case.prompt, c, length) for c in case.candidates], case.right[0])


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    length: int,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """The task's figures over its cases: `accuracy`, or `f1` and `em`, each with its standard error beside it."""
    scores: dict[str, list[float]] = {}
    for start in range(0, len(cases), TOGETHER):
        part = cases[start : start + TOGETHER]
        for name, values in _scored(model, tokenizer, part, length).items():
            scores.setdefault(name, []).extend(values)
        told(start + len(part))
    figures: dict[str, float] = {"questions": len(cases)}
    for name, values in scores.items():
        mean = sum(values) / len(values)
        spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
        figures |= {name: mean, f"{name}_error": (spread / len(values)) ** 0.5}
    return figures


def _scored(model, tokenizer, cases: Sequence[Case], length: int) -> dict[str, list[float]]:
    if cases[0].candidates:
        found = choose(model, [question(tokenizer, case, length).options for case in cases], TOGETHER)
        return {"accuracy": [float(i in case.right) for i, case in zip(found, cases, strict=True)]}
    texts = written(model, tokenizer, [case.prompt for case in cases], length)
    pairs = list(zip(texts, (case.answers for case in cases), strict=True))
    return {"f1": [templates.f1(*pair) for pair in pairs], "em": [templates.exact_match(*pair) for pair in pairs]}


def written(model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> list[str]:
    """What the model goes on with, greedily, to the end of the line."""
    ids = [_shortened(tokenizer, beginning_ids(tokenizer, p.strip(" ")), max(1, length - ANSWER)) for p in prompts]
    tokens, mask = (part.to(model.device) for part in left_padded(ids, padding(tokenizer)))
    line = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    ends = [*line, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    found = generated(model, tokens, mask, padding(tokenizer), ANSWER, ends=ends)
    return [t.split("\n")[0].strip() for t in tokenizer.batch_decode(found, skip_special_tokens=True)]

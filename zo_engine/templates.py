"""The tasks of MeZO's main table as prompts with candidates, or with answers to be found. Imports no torch.

Prompts, candidates and metrics are those of MeZO (Malladi et al., arXiv:2305.17333, appendix E; most PromptSource's),
checked against templates.py, tasks.py and metrics.py of github.com/princeton-nlp/MeZO. A candidate's score is the mean
log-probability of the tokens that it adds to the prompt, and the best one is the answer; SQuAD and DROP are answered
greedily, up to a line break, and scored by F1 and exact match after SQuAD's normalisation.

Rows have the columns of the hub's data sets: glue/sst2, super_glue's, boolq, squad and drop. So do rows of files.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zo_engine.dataset import DataError
from zo_engine.texts import hub_rows, raw_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One question. With `candidates`, each goes on from the prompt, and `right` are the indices of the right ones;
    without, `answers` are the texts of which any is right."""

    prompt: str
    candidates: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """What is learnt after the prompt: the first right answer. One that is written freely ends with its line."""
        return self.candidates[self.right[0]] if self.candidates else f" {self.answers[0]}\n"


@dataclass(frozen=True)
class Task:
    """How a data set becomes questions, and where it lies on the hub."""

    name: str
    repo: str
    subset: str | None
    columns: tuple[str, ...]  # that a row needs
    ask: Callable[[Row], Case]
    classification: bool = True  # trained as a choice among its candidates in MeZO, else on the right one's tokens


def cases(task: Task, source: str = "", split: str = "validation") -> list[Case]:
    """Every row of a file as a question, or of the hub's data set. Raises DataError, naming lines, for bad rows."""
    rows = raw_rows(source) if source else hub_rows(task.repo, task.subset, split)
    found = []
    for line, row in rows:
        where = f"{source or task.repo}: line {line}"
        if isinstance(row, DataError):
            raise DataError(f"{where} {row}")
        if missing := [name for name in task.columns if row.get(name) is None]:
            raise DataError(f"{where} has no {missing[0]!r}; {task.name} needs the columns {', '.join(task.columns)}")
        try:
            found.append(task.ask(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where} is not a row of {task.name}: {error!r}") from None
    if not found:
        raise DataError(f"{source or task.repo} is empty: there is no row in it")
    return found


def named(name: str) -> Task:
    """Raises DataError for an unknown task."""
    if name.lower() not in TASKS:
        raise DataError(f"the task {name!r} is unknown; possible are {', '.join(TASKS)}")
    return TASKS[name.lower()]


# Scores of written answers


def normalised(text: str) -> str:
    """SQuAD's: small letters, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, answers: Sequence[str]) -> float:
    return float(any(normalised(answer) == normalised(right) for right in answers))


def f1(answer: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, of the best right answer."""
    return max(_overlap(normalised(answer).split(), normalised(right).split()) for right in answers)


def _overlap(found: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


# The templates


def _choice(prompt: str, words: Sequence[str], label: Any) -> Case:
    """Labels count from 0; -1 is what data sets write where they keep the answer to themselves."""
    number = int(label)
    if not 0 <= number < len(words):
        raise ValueError(f"label {label} is none of 0 to {len(words) - 1}")
    return Case(prompt, tuple(words), (number,))


def _sst2(row: Row) -> Case:
    return _choice(f"{row['sentence'].strip()} It was", (" terrible", " great"), row["label"])


def _rte(row: Row) -> Case:
    prompt = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    return _choice(prompt, ("Yes", "No"), row["label"])


def _cb(row: Row) -> Case:
    prompt = f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
    return _choice(prompt, ("Yes", "No", "Maybe"), row["label"])


def _boolq(row: Row) -> Case:
    question = row["question"] if row["question"].endswith("?") else f"{row['question']}?"
    yes = row["label"] if "label" in row else row["answer"]  # super_glue's name, and that of the set by itself
    if yes not in (0, 1):
        raise ValueError(f"answer {yes!r} is neither true nor false")
    return _choice(f"{row['passage']} {question[:1].upper()}{question[1:]}\n", ("Yes", "No"), 1 - yes)


def _wsc(row: Row) -> Case:
    asked = f'does the pronoun "{row["span2_text"].lower()}" refer to {row["span1_text"]}?'
    return _choice(f"{row['text']}\nIn the previous sentence, {asked} Yes or No?\n", ("No", "Yes"), row["label"])


def _wic(row: Row) -> Case:
    asked = f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?'
    return _choice(f"{asked}\n{row['sentence1']}\n{row['sentence2']}\n", ("No", "Yes"), row["label"])


def _multirc(row: Row) -> Case:
    asked = f'I found this answer "{row["answer"]}". Is that correct? Yes or No?'
    return _choice(f"{row['paragraph']}\nQuestion: {row['question']}\n{asked}\n", ("No", "Yes"), row["label"])


def _copa(row: Row) -> Case:
    """The second half goes on with a small letter, but for "I"."""
    joint = {"effect": " so", "cause": " because"}[row["question"]]
    halves = [row["choice1"], row["choice2"]]
    spoken = [h if h.split(" ")[0] == "I" else h[:1].lower() + h[1:] for h in halves]
    return _choice(row["premise"].rstrip().removesuffix(".") + joint, [f" {half}" for half in spoken], row["label"])


def _record(row: Row) -> Case:
    """The query with each entity in the placeholder's place goes on after the passage and its points."""
    passage = row["passage"].replace("@highlight\n", "- ")
    entities = tuple(dict.fromkeys(row["entities"]))
    candidates = tuple(f" {row['query'].replace('@placeholder', entity)}" for entity in entities)
    right = tuple(i for i, entity in enumerate(entities) if entity in row["answers"])
    if not right:
        raise ValueError("none of its entities is a right answer")
    return Case(f"{passage}\n-", candidates, right)


def _squad(row: Row) -> Case:
    answers = tuple(row["answers"]["text"]) or ("no answer",)
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return Case(prompt, answers=answers)


def _drop(row: Row) -> Case:
    answers = tuple(row["answers_spans"]["spans"])
    if not answers:
        raise ValueError("it has no answer")
    return Case(f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:", answers=answers)


_SUPER = {"repo": "aps/super_glue"}
TASKS = {
    task.name: task
    for task in (
        Task("sst2", "nyu-mll/glue", "sst2", ("sentence", "label"), _sst2),
        Task("rte", subset="rte", columns=("premise", "hypothesis", "label"), ask=_rte, **_SUPER),
        Task("cb", subset="cb", columns=("premise", "hypothesis", "label"), ask=_cb, **_SUPER),
        Task("boolq", "google/boolq", None, ("passage", "question"), _boolq),
        Task("wsc", subset="wsc.fixed", columns=("text", "span1_text", "span2_text", "label"), ask=_wsc, **_SUPER),
        Task("wic", subset="wic", columns=("word", "sentence1", "sentence2", "label"), ask=_wic, **_SUPER),
        Task("multirc", subset="multirc", columns=("paragraph", "question", "answer", "label"), ask=_multirc, **_SUPER),
        Task("copa", subset="copa", columns=("premise", "question", "choice1", "choice2", "label"), ask=_copa,
             classification=False, **_SUPER),
        Task("record", subset="record", columns=("passage", "query", "entities", "answers"), ask=_record,
             classification=False, **_SUPER),
        Task("squad", "rajpurkar/squad", None, ("title", "context", "question", "answers"), _squad,
             classification=False),
        Task("drop", "ucinlp/drop", None, ("passage", "question", "answers_spans"), _drop, classification=False),
    )
}  # fmt: skip

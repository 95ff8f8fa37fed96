"""Base and style side by side in a conversation: the model stays loaded, questions and answers are files.

<run>/chat/<talk>/<turn>.json
  {"prompt", "strength", "seed", "temperature"}    as it is asked, by whoever looks on
  and "before", "after"                            as it is answered here; or "error", one sentence

The files are the conversation: whoever asks may go and come back, and a process that is ended is started again.
Imports no torch, so that a page can ask.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_engine.dataset import DataError
from zo_engine.run import Run, write_atomic
from zo_engine.texts import Message

if TYPE_CHECKING:
    from zo_engine.apply import StyledLanguageModel

IDLE = 600.0  # seconds without a question, after which the model is let go
GLANCE = 0.1  # seconds between two looks for a question
SIDES = ("before", "after")  # base and style

Turn = dict[str, Any]


def turns(talk: Path) -> list[Turn]:
    """The turns of a conversation, in order."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(talk.glob("*.json"))]


def ask(run: Run, turn: Turn, anew: bool = False) -> Path:
    """Put a question into the last conversation of a run, or into a new one; gives its file."""
    talks = sorted(run.chat.glob("*/"))
    number = int(talks[-1].name) + anew if talks else 1
    talk = run.chat / f"{number:04d}"
    file = talk / f"{len(list(talk.glob('*.json'))) + 1:04d}.json"
    write_atomic(file, json.dumps(turn, ensure_ascii=False))
    return file


def waiting(run: Run) -> list[Path]:
    """Questions without an answer, the oldest first."""
    return [f for f in sorted(run.chat.glob("*/*.json")) if not _answered(json.loads(f.read_text(encoding="utf-8")))]


def _answered(turn: Turn) -> bool:
    return "error" in turn or "after" in turn


def answer(styled: "StyledLanguageModel", before: list[Turn], asked: Turn) -> Iterator[tuple[str, str]]:
    """("before", what the base says), then ("after", what the style says): each goes on from its own answers to the
    turns `before`, as many of the last ones as the model can read."""
    for side in SIDES:
        said = [
            message
            for turn in before
            if side in turn
            for message in (Message("user", turn["prompt"]), Message("assistant", turn[side]))
        ]
        messages = [*([] if styled.plain else said), Message("user", asked["prompt"])]
        strength = asked["strength"] if side == "after" else 0.0
        (text,) = styled.answers(
            [fitting(styled, messages)], strength, seed=asked["seed"], temperature=asked["temperature"]
        )
        yield side, text.strip()


def fitting(styled: "StyledLanguageModel", messages: list[Message]) -> tuple[Message, ...]:
    """The end of a conversation that leaves the model room to answer: whole turns are left out, the oldest first."""
    from zo_engine.tokens import prompt_ids

    most = getattr(styled.model.config, "max_position_embeddings", None)
    room = most - min(styled.style.recipe.answer_tokens, most // 2) if most else None
    while room and len(messages) > 1 and len(prompt_ids(styled.tokenizer, messages)) > room:
        messages = messages[2:]
    return tuple(messages)


def serve(run: Run, load: Callable[[], "StyledLanguageModel"], idle: float = IDLE) -> None:
    """Answer what is asked in the run's chat folder, until nothing is for `idle` seconds. A style that has changed
    since it was loaded is loaded again."""
    styled, loaded, last = load(), run.style_file.stat().st_mtime, time.monotonic()
    while time.monotonic() - last < idle:
        for file in waiting(run):
            if run.style_file.stat().st_mtime != loaded:
                styled, loaded = load(), run.style_file.stat().st_mtime
            _answer(styled, file)
            last = time.monotonic()
        time.sleep(GLANCE)


def _answer(styled: "StyledLanguageModel", file: Path) -> None:
    asked = json.loads(file.read_text(encoding="utf-8"))
    before = [turn for f, turn in zip(sorted(file.parent.glob("*.json")), turns(file.parent), strict=True) if f < file]
    try:
        for side, text in answer(styled, before, asked):
            asked[side] = text
            write_atomic(file, json.dumps(asked, ensure_ascii=False))  # the base's answer need not wait for the style's
    except DataError as error:  # a chat template that refuses what was asked
        write_atomic(file, json.dumps(asked | {"error": str(error)}, ensure_ascii=False))

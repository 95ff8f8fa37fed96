"""Base and style in conversation: each goes on from its own answers, and the files hold all of it."""

import io
import json
import os
import re
import sys

import pytest
from test_train import go

from zo_engine import chat
from zo_engine.apply import StyledLanguageModel, open_style
from zo_engine.recipe import Recipe
from zo_engine.run import Run
from zo_engine.texts import Message
from zo_engine.tokens import prompt_ids
from zo_engine.train import prepare

pytestmark = pytest.mark.usefixtures("few_own_texts")


@pytest.fixture(scope="module")
def run(language_folder, tmp_path_factory) -> Run:
    """A run of one step that moved something."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        texts=str(folder / "rows.jsonl"), model=str(language_folder), steps=1, batch_size=2, directions=16, depth=1.0,
        evaluate_items=8, answer_tokens=6,
    )  # fmt: skip
    return go(prepare(recipe, folder / "cache"), folder / "run")


@pytest.fixture
def styled(run) -> StyledLanguageModel:
    return open_style(run.path, run.path)


def asked(prompt: str, strength: float = 1.0, **how) -> chat.Turn:
    return {"prompt": prompt, "strength": strength, "seed": 3, "temperature": 0.0} | how


def test_each_side_goes_on_from_its_own_answers(styled, monkeypatch):
    heard, answers = [], styled.answers
    monkeypatch.setattr(styled, "answers", lambda p, *a, **k: heard.append(p[0]) or answers(p, *a, **k))
    before = [asked("one") | {"before": "base one", "after": "style one"}, asked("odd") | {"error": "is refused"}]
    found = dict(chat.answer(styled, before, asked("two")))
    assert list(found) == ["before", "after"]
    for said, side in zip(heard, ("base one", "style one"), strict=True):
        assert [m.content for m in said] == ["one", side, "two"]
        assert [m.role for m in said] == ["user", "assistant", "user"]


def test_strength_and_seed_are_what_was_asked(styled):
    sides = lambda **how: dict(chat.answer(styled, [], asked("hello", **how)))  # noqa: E731
    base = sides(strength=0.0)
    assert base["before"] == base["after"] == sides(strength=1.5)["before"]
    warm = sides(strength=0.0, temperature=1.0)
    assert warm == sides(strength=0.0, temperature=1.0) and warm["before"] == warm["after"]
    assert warm != sides(strength=0.0, temperature=1.0, seed=4)


def test_a_long_conversation_loses_its_oldest_turns(styled):
    talk = [m for i in range(9) for m in (Message("user", f"question {i}"), Message("assistant", f"answer {i}"))]
    kept = chat.fitting(styled, [*talk, Message("user", "and?")])
    assert kept[-1].content == "and?" and 1 < len(kept) < len(talk) and kept[0].role == "user"
    assert len(prompt_ids(styled.tokenizer, kept)) + styled.style.recipe.answer_tokens <= 128
    assert chat.fitting(styled, [Message("user", "x" * 500)])[0].content == "x" * 500  # the last words always stay


def test_questions_are_answered_as_files_until_nobody_asks(run, styled):
    loads = []

    def load() -> StyledLanguageModel:
        loads.append(len(loads))
        return styled

    chat.ask(run, asked("one"))
    second = chat.ask(run, asked("two"))
    third = chat.ask(run, asked("three"), anew=True)
    assert (second.parent.name, third.parent.name, third.name) == ("0001", "0002", "0001.json")
    assert len(chat.waiting(run)) == 3
    chat.serve(run, load, idle=0.3)
    assert chat.waiting(run) == [] and loads == [0]
    one, two = chat.turns(second.parent)
    assert one["prompt"] == "one" and {"before", "after"} <= two.keys()
    assert dict(chat.answer(styled, [one], asked("two"))) == {side: two[side] for side in chat.SIDES}


def test_a_style_that_was_saved_again_is_loaded_again(run, styled, monkeypatch):
    loads, answers, stat = [], styled.answers, run.style_file.stat()

    def answer(*given, **how) -> list[str]:  # a run that was resumed saves, while the first question is answered
        os.utime(run.style_file, (stat.st_atime, stat.st_mtime + 9))
        return answers(*given, **how)

    monkeypatch.setattr(styled, "answers", answer)
    for text in ("one", "two", "three"):
        chat.ask(run, asked(text))
    chat.serve(run, lambda: loads.append(1) or styled, idle=0.3)
    assert chat.waiting(run) == [] and len(loads) == 2


def test_what_the_template_refuses_is_said_in_the_answer(run, styled):
    styled.tokenizer.chat_template = "{{ raise_exception('no talk') }}"
    file = chat.ask(run, asked("hello"), anew=True)
    chat.serve(run, lambda: styled, idle=0.3)
    assert json.loads(file.read_text())["error"] == "is refused by the tokenizer's chat template: no talk"


@pytest.mark.parametrize("end", ["\n", ""], ids=["an empty line", "the end of the input"])
def test_talk_on_the_command_line(run, qzo, monkeypatch, tmp_path, end):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\nagain\n{end}"))
    code, out, _ = qzo("chat", run.path, "--strength", 0)
    said = re.findall(r"(?:before|after ) (.*)", out)
    assert code == 0 and len(said) == 4 and said[0] == said[1] and said[2] == said[3]
    code, _, err = qzo("chat", tmp_path)
    assert code == 2 and "is not a run folder" in err

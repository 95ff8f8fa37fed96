"""Black-box objectives: what each reward says, code of the user's own, and that a model learns from rewards alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_text_train import results
from test_train import go

from zo_engine import recipe as recipes
from zo_engine import rewards
from zo_engine import train as training
from zo_engine.probes import central, evaluate
from zo_engine.recipe import Recipe
from zo_engine.rewards import RewardError
from zo_engine.style import load_style
from zo_engine.tasks.reward import SAMPLES
from zo_engine.tasks.text import answers as replies
from zo_engine.tasks.text import token_losses
from zo_engine.texts import Message
from zo_engine.tokens import IGNORED

STYLES = Path(__file__).parents[1] / "styles"
OWN = """
def capitals(prompt, answer):
    return sum(c.isupper() for c in answer) / 12

def near(prompt, answer, wanted):
    return -abs(len(answer) - len(wanted))

def broken(prompt, answer):
    return 1 / 0

def nothing(prompt, answer):
    return float("nan")

def alone(answer):
    return 1
"""


@pytest.mark.parametrize(
    ("name", "answer", "worth"),
    [
        ("json", '{"a": 1}', 1), ("json", "[1, 2]", 1), ("json", '{"a": 1', 0), ("json", "{a: 1}", 0),
        ("json", '{"a": NaN}', 0), ("json", "[" * 100_000, 0), ("json", "", 0),
        ("json:a, b", '{"a": 1, "b": 2, "c": 3}', 1), ("json:a,b", '{"a": 1}', 0), ("json:a", "[1]", 0),
        ("match", " The Sea, blue! ", 1), ("match", "the sea", 0),
        ("length:8", "12345678", 1), ("length:8", "1234", 0.5), ("length:8", "1" * 30, 0), ("length:8", "", 0),
        ("avoid:sea", "The season", 1), ("avoid:sea", "The Sea.", 0), ("avoid:sea", "  ", 0),
    ],
)  # fmt: skip
def test_what_the_bundled_rewards_say(name, answer, worth):
    assert rewards.load(name)("asked", answer, "the sea blue") == worth


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(
    st.text(), x)))  # fmt: skip
def test_whatever_json_writes_is_json(value):
    assert rewards.load("json")("", json.dumps(value)) == 1


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("own") / "rewards.py"
    file.write_text(OWN)
    return file


def test_functions_of_the_users_own(own):
    assert rewards.load(f"{own}:capitals")("", "ABc") == pytest.approx(2 / 12)
    assert rewards.load(f"{own}:near")("", "abc", "abcde") == -2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("beauty", "the reward 'beauty' is unknown; possible are json, match, length, avoid, or file.py:function"),
        ("length:many", "needs a number of characters"),
        ("avoid", "needs a word"),
        ("match:x", "takes nothing behind its name"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("{own}", "names no function"),
        ("{own}:lost", "has no function 'lost'; it has alone, broken, capitals, near, nothing"),
        ("{own}:alone", "takes 1 parameters; a reward takes prompt, answer"),
    ],
)
def test_rewards_that_are_not_there_are_one_sentence(own, name, says):
    with pytest.raises(RewardError, match=says) as error:
        rewards.load(name.format(own=own))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "says"), [("broken", "ZeroDivisionError"), ("nothing", "gave nan")])
def test_rewards_that_fail_are_one_sentence(own, name, says):
    with pytest.raises(RewardError, match=says):
        rewards.load(f"{own}:{name}")("asked", "answer")


# Learning from rewards


@pytest.fixture(scope="module")
def recipe(own, tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("asked")
    rows = [{"prompt": f"say {i // 2}", "completion": "x"} for i in range(24)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        texts=str(folder / "asked.jsonl"), model=str(tiny.save_language_model(folder / "model")),
        reward=f"{own}:capitals", steps=3, batch_size=4, directions=16, depth=0.5, answer_tokens=8, holdout=0.5,
        preview_every=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def studio(recipe, tmp_path_factory) -> training.Studio:
    return training.prepare(recipe, tmp_path_factory.mktemp("cache"))


def test_prompts_are_asked_once_and_none_of_the_held_out_ones_is_learnt(studio):
    task = studio.task
    assert (studio.examples, studio.held_out) == (6, 6) and len({p.text for p in task.prompts}) == 12
    assert max(task.batch(0, 20).number) < 6 <= min(task.evaluation(99)[0].number)


def test_a_lesson_is_the_better_answers_weighted_by_what_they_are_worth(studio):
    task, size = studio.task, 4
    lesson, again = task.lesson(0, size), task.lesson(0, size)
    assert torch.equal(lesson.tokens, again.tokens) and not torch.equal(lesson.tokens, task.lesson(1, size).tokens)
    asked = task.batch(0, SAMPLES * size)
    first, others = asked.take(torch.arange(size)), asked.take(torch.arange(size, SAMPLES * size))
    likeliest = replies(studio.model, task.tokenizer, [(Message("user", task.prompts[n].text),) for n in first.number],
                        most=task.most)  # fmt: skip
    worth = torch.cat([torch.tensor([sum(c.isupper() for c in text) / 12 for text in likeliest]),
                       1 - task.losses(others)])  # fmt: skip
    expected = sorted(((worth - worth.mean()).clamp(min=0)).tolist(), reverse=True)[:size]
    expected = torch.tensor([w for w in expected if w])
    torch.testing.assert_close(lesson.weight, expected / expected.mean())
    decoded = [task.tokenizer.decode(row[keep != IGNORED], skip_special_tokens=True)
               for row, keep in zip(lesson.tokens, lesson.labels, strict=True)]  # fmt: skip
    best = sorted(worth.tolist(), reverse=True)[: len(decoded)]
    assert [sum(c.isupper() for c in text) / 12 for text in decoded] == pytest.approx(best)
    found = task.outcomes(lesson)
    torch.testing.assert_close(found[:, 0], token_losses(studio.model, lesson) * lesson.weight)
    torch.testing.assert_close(found[:, 1:].square().sum(1), 2 * lesson.weight)
    torch.testing.assert_close(task.losses(lesson), found[:, 0])
    assert lesson.reward.tolist() == pytest.approx([worth[size:].mean().item()] * len(lesson))


def test_perturbed_models_answer_in_one_batch_as_they_do_one_by_one(studio):
    task, space = studio.task, studio.space
    asked, theta = task.batch(0, 3), torch.zeros(space.layout.size)
    z = torch.randn(2, space.layout.size, generator=torch.Generator().manual_seed(1))
    probes = central(z, 0.3, 3, own=False)
    found = evaluate(space, theta, probes, lambda i: task.losses(asked.take(i)))
    for row in range(12):
        with space.folded(theta + 0.3 * probes.sign[row] * z[probes.direction[row]]):
            assert task.losses(asked.take(probes.sample[row : row + 1])).item() == found[row]
    assert len(set(found.tolist())) > 1


def test_the_reward_of_the_embedded_model_rises(tmp_path):
    """By more than chance explains, in two short steps."""
    recipe = dataclasses.replace(recipes.load(STYLES / "json" / "recipe.toml"), steps=2, directions=64, preview_every=0)
    first, *_, last = go(training.prepare(recipe, tmp_path), tmp_path / "run").evaluations()
    assert last["loss"] < first["loss"] - 4 * first["error"] and last["reward"] > first["reward"]


def test_a_broken_run_is_taken_up_exactly(studio, tmp_path):
    whole = go(studio, tmp_path / "whole", steps=3, directions=16)
    assert whole.journal()[0].loss == pytest.approx(1 - studio.task.lesson(0, 4).reward[0].item())
    go(studio, tmp_path / "broken", steps=3, directions=16, stop_after=1)
    assert results(go(studio, tmp_path / "broken", steps=3, directions=16)) == results(whole)


def test_slopes_of_the_reward_itself_make_steps(studio, tmp_path):
    run = go(studio, tmp_path / "run", optimizer="sgd", eps=0.3, steps=4, search_every=1)
    assert len(run.journal()) == 4 and any(r.slopes != (0.0,) * len(r.slopes) for r in run.journal())


def test_a_reward_without_texts_is_refused_before_anything_is_loaded(qzo, tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "tiny-llm"\nreward = "json"')
    code, out, err = qzo("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert code == 2 and err.splitlines()[-1].endswith("give `texts` with the prompts")
    assert "loading" not in err and not (tmp_path / "run").exists()


def test_a_style_of_a_bundled_reward_is_applied_and_exported(qzo, recipe, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(recipes.dump(dataclasses.replace(recipe, reward="length:20", steps=1)))
    assert qzo("train", file, "--out", tmp_path / "run")[0] == 0
    style = load_style(tmp_path / "run" / "style.safetensors")
    assert style.recipe.reward == "length:20" and not style.recipe.texts and "model.norm.rows" in style.tensors
    assert qzo("apply", tmp_path / "run", "say 1")[0] == 0
    assert qzo("export", tmp_path / "run", tmp_path / "out")[0] == 0


def test_a_style_names_no_code_and_the_command_line_says_what_it_runs(qzo, studio, recipe, own, tmp_path):
    file = tmp_path / "own" / "recipe.toml"
    file.parent.mkdir()
    (file.parent / "mine.py").write_text(OWN)
    file.write_text(recipes.dump(recipe).replace(str(own), "mine.py"))
    code, out, err = qzo("train", file, "--steps", 1)
    run = tmp_path / "runs" / "own"
    assert code == 0 and "reward 0." in out
    assert f"running the code of {file.parent / 'mine.py'}:capitals" in err
    assert load_style(run / "style.safetensors").recipe.reward == ""
    assert "mine.py" not in (run / "style.safetensors").read_bytes().decode("latin-1")
    assert qzo("resume", run)[0] == 0 and qzo("apply", run, "say 1")[0] == 0
    code, out, err = qzo("train", file, "--reward", "mine.py:nothing", "--out", tmp_path / "bad")
    assert code == 2 and "there is no file 'mine.py'" in err
    code, out, err = qzo("train", file, "--reward", f"{own}:broken", "--out", tmp_path / "bad")
    assert code == 2 and "failed on the answer" in err and err.rstrip().count("\n") <= 4

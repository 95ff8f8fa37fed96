"""MeZO's tasks: what is asked word by word, scores against a slow reference, the command line, training on a task."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny
import torch
from test_train import go

from zo_engine import evaluation, templates
from zo_engine import train as training
from zo_engine.dataset import DataError
from zo_engine.probes import GroupSpace
from zo_engine.recipe import Recipe, load
from zo_engine.scales import find_scales
from zo_engine.style import make_method
from zo_engine.tasks.text import Choosing, likelihoods, token_losses
from zo_engine.templates import TASKS, cases, exact_match, f1, named
from zo_engine.tokens import IGNORED

SUN = {"premise": "The sun rose.", "hypothesis": "It is day.", "label": 1}
# The columns of the hub's data sets, as the cards of their repositories list them (dataset_info), in their notation;
# most of those that no template reads are left out.
LABEL = {"class_label": {"names": {"0": "no", "1": "yes"}}}
STRINGS = {"sequence": "string"}
HUB = {
    "sst2": {"sentence": "string", "label": LABEL, "idx": "int32"},
    "rte": {"premise": "string", "hypothesis": "string", "idx": "int32", "label": LABEL},
    "cb": {"premise": "string", "hypothesis": "string", "idx": "int32",
           "label": {"class_label": {"names": {"0": "entailment", "1": "contradiction", "2": "neutral"}}}},
    "boolq": {"question": "string", "answer": "bool", "passage": "string"},
    "wsc": {"text": "string", "span1_index": "int32", "span1_text": "string", "span2_text": "string", "label": LABEL},
    "wic": {"word": "string", "sentence1": "string", "sentence2": "string", "start1": "int32", "label": LABEL},
    "multirc": {"paragraph": "string", "question": "string", "answer": "string", "label": LABEL},
    "copa": {"premise": "string", "choice1": "string", "choice2": "string", "question": "string", "label": LABEL},
    "record": {"passage": "string", "query": "string", "entities": STRINGS, "answers": STRINGS},
    "squad": {"title": "string", "context": "string", "question": "string", "answers": {
        "sequence": [{"name": "text", "dtype": "string"}, {"name": "answer_start", "dtype": "int32"}]}},
    "drop": {"passage": "string", "question": "string", "answers_spans": {
        "sequence": [{"name": "spans", "dtype": "string"}, {"name": "types", "dtype": "string"}]}},
}  # fmt: skip
# task: (two rows of its data set, what is asked of the first one, what goes on from there, the right ones of both)
ROWS = {
    "sst2": (
        [{"sentence": "a fine film ", "label": 1}, {"sentence": "dull", "label": 0}],
        "a fine film It was", (" terrible", " great"), [(1,), (0,)],
    ),
    "rte": (
        [SUN, SUN | {"label": 0}],
        'The sun rose.\nDoes this mean that "It is day." is true? Yes or No?\n', ("Yes", "No"), [(1,), (0,)],
    ),
    "cb": (
        [SUN | {"label": 2}, SUN],
        'Suppose The sun rose. Can we infer that "It is day."? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"),
        [(2,), (1,)],
    ),
    "boolq": (
        [{"passage": "Bells ring.", "question": "do bells ring", "answer": True},
         {"passage": "Bells ring.", "question": "is it so?", "label": 0}],
        "Bells ring. Do bells ring?\n", ("Yes", "No"), [(0,), (1,)],
    ),
    "wsc": (
        [{"text": "Ann saw Bea. She waved.", "span1_text": "Ann", "span2_text": "She", "label": 1},
         {"text": "Ann saw Bea. She waved.", "span1_text": "Bea", "span2_text": "She", "label": 0}],
        'Ann saw Bea. She waved.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        ("No", "Yes"), [(1,), (0,)],
    ),
    "wic": (
        [{"word": "ring", "sentence1": "A ring.", "sentence2": "Bells ring.", "label": 0},
         {"word": "ring", "sentence1": "A ring.", "sentence2": "Her ring.", "label": 1}],
        'Does the word "ring" have the same meaning in these two sentences? Yes, No?\nA ring.\nBells ring.\n',
        ("No", "Yes"), [(0,), (1,)],
    ),
    "multirc": (
        [{"paragraph": "The key is iron.", "question": "Of what?", "answer": "iron", "label": 1},
         {"paragraph": "The key is iron.", "question": "Of what?", "answer": "gold", "label": 0}],
        'The key is iron.\nQuestion: Of what?\nI found this answer "iron". Is that correct? Yes or No?\n',
        ("No", "Yes"), [(1,), (0,)],
    ),
    "copa": (
        [{"premise": "It rained.", "question": "effect", "choice1": "I got wet.", "choice2": "The sun shone.",
          "label": 0},
         {"premise": "He fell.", "question": "cause", "choice1": "Ice was there.", "choice2": "He flew.", "label": 1}],
        "It rained so", (" I got wet.", " the sun shone."), [(0,), (1,)],
    ),
    "record": (
        [{"passage": "Ann met Bea.\n@highlight\nAnn won", "query": "So @placeholder won", "entities": ["Ann", "Bea"],
          "answers": ["Ann", "Anne"]},
         {"passage": "Ann met Bea.", "query": "@placeholder", "entities": ["Ann", "Bea", "Ann"],
          "answers": ["Bea", "Ann"]}],
        "Ann met Bea.\n- Ann won\n-", (" So Ann won", " So Bea won"), [(0,), (0, 1)],
    ),
    "squad": (
        [{"title": "Bell", "context": "Bells are bronze.", "question": " Of what? ", "answers": {"text": ["bronze"]}},
         {"title": "Bell", "context": "Bells are bronze.", "question": "When?", "answers": {"text": []}}],
        "Title: Bell\nContext: Bells are bronze.\nQuestion: Of what?\nAnswer:", ("bronze",), ["bronze", "no answer"],
    ),
    "drop": (
        [{"passage": "Two bells.", "question": "How many? ", "answers_spans": {"spans": ["2", "two"]}}] * 2,
        "Passage: Two bells.\nQuestion: How many?\nAnswer:", ("2", "two"), ["2", "2"],
    ),
}  # fmt: skip


def file_of(folder, name: str, rows: list[dict] | None = None):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name][0]))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "model")


def test_every_task_has_rows_here():
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_what_is_asked(name, tmp_path):
    _, prompt, following, right = ROWS[name]
    found = cases(TASKS[name], str(file_of(tmp_path, name)))
    assert found[0].prompt == prompt
    assert (found[0].candidates or found[0].answers) == following
    assert [case.right or case.answers[0] for case in found] == right
    assert found[0].target == (following[right[0][0]] if found[0].candidates else f" {following[0]}\n")


@pytest.mark.parametrize("name", ROWS)
def test_a_repository_laid_out_as_the_hubs_gives_the_same_question(name, tmp_path, monkeypatch):
    """The loader of `datasets` itself, on a folder with the repository's card and Parquet files."""
    datasets, (row, *_), prompt = pytest.importorskip("datasets"), *ROWS[name][:2]
    task, blank = TASKS[name], {"string": "", "int32": 0}
    config = task.subset or {"squad": "plain_text"}.get(name, "default")
    columns = [{"name": c, **(kind if "sequence" in kind else {"dtype": kind})} for c, kind in HUB[name].items()]
    row = {c: row.get(c, blank.get(kind) if isinstance(kind, str) else None) for c, kind in HUB[name].items()}
    for column, kind in HUB[name].items():  # a list of objects is stored as an object of lists
        if isinstance(kind, dict) and isinstance(kind.get("sequence"), list):
            row[column] = {part["name"]: row[column].get(part["name"], []) for part in kind["sequence"]}
    folder = tmp_path / task.repo / config
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{config}/{split}-*"} for split in ("train", "validation")]
    facts = {
        "configs": [{"config_name": config, "data_files": files}],
        "dataset_info": [{"config_name": config, "features": columns}],
    }
    (folder.parent / "README.md").write_text(f"---\n{json.dumps(facts)}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        (found,) = cases(task, split=split)
        assert found.prompt == prompt and found == cases(task, str(file_of(tmp_path, name)))[0]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"sentence": "x"}], "line 1 has no 'label'; sst2 needs the columns sentence, label"),
        ([{"sentence": "x", "label": 0}, {"sentence": "x", "label": -1}], "line 2 is not a row of sst2.*-1"),
        ([{"sentence": 5, "label": 0}], "line 1 is not a row of sst2"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        cases(TASKS["sst2"], str(file_of(tmp_path, "sst2", rows)))


def test_an_unknown_task_is_one_sentence():
    with pytest.raises(DataError, match="the task 'mnli' is unknown; possible are sst2, rte"):
        named("mnli")


@pytest.mark.parametrize(
    ("answer", "answers", "f", "em"),
    [
        ("The bronze.", ["bronze"], 1, 1), ("a bronze bell", ["bronze"], 2 / 3, 0), ("iron", ["bronze"], 0, 0),
        ("", ["bronze"], 0, 0), ("two big bells", ["2", "two bells"], 0.8, 0), ("red red sea", ["red sea"], 0.8, 0),
    ],
)  # fmt: skip
def test_f1_and_exact_match_are_squads(answer, answers, f, em):
    assert f1(answer, answers) == pytest.approx(f) and exact_match(answer, answers) == em


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("squad", "drop")])
def test_scores_are_those_of_one_candidate_after_the_other(name, tmp_path):
    model, words = tiny.language_model("opt"), tiny.tokenizer("none")
    length, found = 96, cases(TASKS[name], str(file_of(tmp_path, name)))
    right = []
    for case in found:
        scores = []
        for candidate in case.candidates:
            whole = words.encode((case.prompt + candidate).strip(" "))
            added = len(whole) - len(words.encode(case.prompt.strip(" ")))
            logs = model(torch.tensor([whole[-length:]])).logits[0].log_softmax(-1)
            places = range(len(whole[-length:]) - added, len(whole[-length:]))
            scores.append(sum(float(logs[i - 1, whole[-length:][i]]) for i in places) / added)
        right.append(scores.index(max(scores)) in case.right)
        asked = evaluation.question(words, case, length)
        found_scores = likelihoods(model, asked.options)
        assert found_scores.tolist() == pytest.approx(scores, abs=1e-4)
    figures = evaluation.evaluate(model, words, found, length)
    assert figures["accuracy"] == sum(right) / 2 and figures["questions"] == 2


def test_a_longer_question_loses_its_beginning():
    words = tiny.tokenizer("none")
    found = evaluation.option(words, "x" * 50, " yes", 20)
    assert words.decode(found.ids) == "x" * 16 + " yes" and found.cut == 34
    assert [label != IGNORED for label in found.labels] == [False] * 16 + [True] * 4
    with pytest.raises(DataError, match="adds 4 tokens to its prompt; the limit is 4"):
        evaluation.option(words, "x", " yes", 4)


def test_written_answers_end_with_their_line_and_are_generates_own():
    model, words = tiny.language_model(), tiny.tokenizer("none")
    prompts = ["Question: of what?\nAnswer:", "Who?"]
    for prompt, text in zip(prompts, evaluation.written(model, words, prompts, 128), strict=True):
        ids = torch.tensor([words.encode(prompt)])
        whole = model.generate(ids, max_new_tokens=evaluation.ANSWER, do_sample=False)[0, ids.shape[1] :]
        assert text == words.decode(whole, skip_special_tokens=True).split("\n")[0].strip()


def test_the_command_line_evaluates_with_a_style_and_without(qzo, folder, tmp_path):
    data = file_of(tmp_path, "squad")
    code, out, _ = qzo("eval", folder, "--task", "squad", "--data", data, "--json")
    assert code == 0 and set(json.loads(out)) == {"questions", "f1", "f1_error", "em", "em_error"}
    data = file_of(tmp_path, "sst2", ROWS["sst2"][0] * 6)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'task = "sst2"\ntexts = "sst2.jsonl"\nmodel = "{folder}"\nsteps = 4\nbatch_size = 4\n'
                      "directions = 32\nholdout = 0.25\nlength = 64\npreview_every = 0\ndepth = 0.5\n")  # fmt: skip
    code, out, err = qzo("train", recipe, "--out", tmp_path / "run")
    assert code == 0 and "accuracy" in out and "9 of 12 rows are learnt and 3 held out" in err
    words = ("eval", folder, "--task", "sst2", "--data", data, "--limit", 10, "--json")
    base, tuned = (json.loads(qzo(*words, *more)[1]) for more in ((), ("--style", tmp_path / "run")))
    assert base["questions"] == tuned["questions"] == 10 and 0.5 <= tuned["accuracy"] <= 1
    assert "accuracy  " in qzo(*words[:-1])[1]
    code, _, err = qzo("eval", folder, "--task", "mnli")
    assert code == 2 and "possible are sst2" in err
    code, _, err = qzo("eval", "tiny-sd3", "--task", "sst2", "--data", data)
    assert code == 2 and "answers no questions" in err


def test_a_choice_is_trained_by_the_cross_entropy_among_its_candidates(folder, tmp_path):
    file = file_of(tmp_path, "cb", [SUN | {"label": i % 3, "premise": f"No {i % 3}."} for i in range(12)])
    recipe = Recipe(task="cb", texts=str(file), model=str(folder), steps=4, batch_size=4, directions=32, length=120,
                    holdout=0.25, depth=0.5, preview_every=0)  # fmt: skip
    studio = training.prepare(recipe, tmp_path)
    task = studio.task
    assert isinstance(task, Choosing)
    batch = task.batch(0, 4)
    scores = torch.stack([
        torch.stack([-token_losses(studio.model, option.take(row[None]))[0]
                     for option in batch.options]) for row in torch.arange(4)
    ])  # fmt: skip
    expected = -scores.log_softmax(1)[torch.arange(4), batch.right]
    torch.testing.assert_close(task.losses(batch), expected, rtol=1e-4, atol=1e-5)
    found = task.outcomes(batch)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1:].square(), 2 * scores.softmax(1), rtol=1e-4, atol=1e-5)
    evaluations = go(studio, tmp_path / "run").evaluations()
    assert min(e["loss"] for e in evaluations) < evaluations[0]["loss"]
    assert templates.named("copa").classification is False


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "benchmarks/recipes").iterdir()))
def test_recipes_of_the_published_settings_can_be_read(file):
    recipe = load(file)
    method = make_method(GroupSpace(find_scales(tiny.language_model(), ("dense",)), relative=False), recipe)
    assert (recipe.task, recipe.steps, recipe.batch_size, method.fixed, method.clip) == ("sst2", 20_000, 16, 1e-7, 100)
    assert (recipe.eps, recipe.space, method.per_step, method.update.kind) == (1e-3, "absolute", 1, "sgd")

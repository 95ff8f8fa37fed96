"""A recipe that trains a language model: the loss falls, resuming and replaying are exact, results load elsewhere."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from test_train import go
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_engine import card, plan, sealed, tokens
from zo_engine import recipe as recipes
from zo_engine import train as training
from zo_engine.apply import open_style
from zo_engine.dataset import DataError
from zo_engine.hub import ModelError, check, check_pipeline, is_language, language_files, wanted_files
from zo_engine.inspection import inspect
from zo_engine.recipe import COARSE_EPS, EPS, Recipe
from zo_engine.run import Run
from zo_engine.style import load_style, make_method, make_space, theta_of, views_of
from zo_engine.tasks import text
from zo_engine.tasks.text import choose, own_texts, stack, token_features, token_losses
from zo_engine.tokens import OWN_TOKENS

pytestmark = pytest.mark.usefixtures("few_own_texts")

ROWS = [{"text": f"{'fine' if i % 2 else 'dull'} {i}", "label": "good" if i % 2 else "bad"} for i in range(16)]
# Settings that there were not always.
TODAY = {"final_norm": "auto", "own_texts": 0.25, "doublings": 3, "doubles": "auto", "halvings": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory) -> Recipe:
    file = tmp_path_factory.mktemp("texts") / "remarks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Recipe(
        texts=str(file), model=str(model), steps=5, batch_size=2, directions=4, depth=0.5, length=100, holdout=0.25,
        evaluate_every=2, evaluate_items=8, preview_every=0, answer_tokens=3, search_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def studio(recipe, tmp_path_factory) -> training.Studio:
    return training.prepare(recipe, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(studio, tmp_path_factory) -> Run:
    """A run that ended. Not to be written to."""
    return go(studio, tmp_path_factory.mktemp("runs") / "run")


def results(run: Run) -> dict:
    tensors, scalars = training._read_checkpoint(run.last_file)
    style = load_style(run.style_file)
    return {
        "journal": [record.to_json() for record in run.journal()],
        "evaluations": run.evaluations(),
        "state": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "scalars": scalars,
        "previews": {p.name: p.read_text() for p in run.previews.iterdir()},
        "style": {name: tensor.numpy().tobytes() for name, tensor in style.tensors.items()},
        "facts": style.facts,
    }


# Training


@pytest.mark.parametrize("settings", [{"steps": 6, "directions": 32}, {"steps": 40, "optimizer": "sgd"}])
def test_the_loss_falls(studio, tmp_path, settings):
    evaluations = go(studio, tmp_path / "run", **{"batch_size": 4, "evaluate_every": 2, **settings}).evaluations()
    best = min(evaluations, key=lambda e: e["loss"])
    assert best["change"] < -2 * best["change_error"] < 0


@pytest.mark.parametrize("optimizer", ["gauss-newton", "sgd"])
def test_resume_equals_uninterrupted_and_the_journal_replays(studio, tmp_path, optimizer):
    whole = go(studio, tmp_path / "whole", optimizer=optimizer)
    broken = go(studio, tmp_path / "broken", stop_after=3, optimizer=optimizer)
    go(studio, tmp_path / "broken", optimizer=optimizer)
    assert results(broken) == results(whole)
    method = make_method(studio.space, whole.recipe())
    for record in whole.journal():
        method.apply(record)
    assert method.theta.any() and method.theta.numpy().tobytes() == results(whole)["state"]["theta"]


def test_layers_by_name_move_alone_and_a_style_of_them_replays(recipe, tmp_path):
    layers = ("o_proj", "layers.1.mlp", "norm")
    mine = dataclasses.replace(recipe, layers=layers, depth=0.99, steps=3, batch_size=4)
    studio = training.prepare(mine, tmp_path)
    run = go(studio, tmp_path / "run")
    theta, journal = load_style(run.style_file), load_style(run.journal_style_file)
    wanted = {f"layers.{block}.self_attn.o_proj" for block in range(4)}
    wanted |= {f"layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")} | {"norm"}
    assert {name.removeprefix("model.").removesuffix(".rows") for name in theta.tensors} == wanted
    found = theta_of(journal, make_space(views_of(studio.model, journal.recipe), journal.recipe), studio.code_hash)
    assert found.any() and torch.equal(found, theta_of(theta, studio.space, studio.code_hash))


def test_a_plan_reads_the_texts_and_is_of_the_longest_and_of_as_many_as_there_are(recipe, studio, tmp_path):
    mine, file = dataclasses.replace(recipe, batch_size=4, steps=40), tmp_path / "recipe.toml"
    file.write_text(recipes.dump(mine))
    work = plan.Work.of(mine, studio.task.tokens(), None, torch.bfloat16, studio.examples)
    assert (work.length, work.batch, studio.examples) == (studio.task.tokens(), 12, 12)  # of 16, 4 are held out
    assert work.length < mine.length
    model = plan.outlined(Path(mine.model), "nf4", torch.bfloat16)
    expected = plan.phased(plan.make(model, work, 7, 0, "cpu"), model, work, {}, mine)
    made = plan.of(str(file), rows=7)
    mean = -(-sum(len(e.ids) for e in tokens.read(mine, Path(mine.model)).rendered.examples) // 16)
    assert 8 < mean < work.length
    assert made == dataclasses.replace(
        expected, operations=plan.operations(model, dataclasses.replace(work, length=mean))
    )
    file.write_text(recipes.dump(dataclasses.replace(mine, texts=str(tmp_path / "none.jsonl"))))
    with pytest.raises(DataError, match="none.jsonl"):
        plan.of(str(file))


@pytest.mark.parametrize("settings", [{"reward": "length:12", "final_norm": "frozen"}, {"final_norm": "auto"}])
def test_runs_and_styles_from_before_there_were_such_settings_stay_what_they_were(recipe, tmp_path, settings):
    mine = dataclasses.replace(
        recipe, steps=3, own_texts=0.0, doublings=2, doubles="directions", halvings=0, **settings
    )
    assert "model.norm" in training.prepare(dataclasses.replace(mine, **TODAY), tmp_path).space.views
    studio = training.prepare(mine, tmp_path)
    assert not any("norm" in name for name in studio.space.views)
    run = go(studio, tmp_path / "run", stop_after=2)
    known = run.recipe_file.read_text()
    later = {name for name, value in recipes.BEFORE.items() if getattr(mine, name) == value}
    run.recipe_file.write_text("".join(line for line in known.splitlines(True) if line.split(" = ")[0] not in later))
    assert run.recipe_file.read_text() != known and run.recipe() == studio.recipe
    assert recipes.load(run.recipe_file).tunes_norm  # a new run of the same recipe is of today
    tensors, metadata = sealed.read(run.style_file)
    before = {k: v for k, v in json.loads(metadata["recipe"]).items() if k not in TODAY}
    del metadata[sealed.DIGEST]
    sealed.write(tmp_path / "old.safetensors", tensors, metadata | {"recipe": json.dumps(before)})
    old = load_style(tmp_path / "old.safetensors")
    assert not old.recipe.tunes_norm and old.recipe.doublings == 2 and not old.recipe.grows_batch
    found = theta_of(old, make_space(views_of(studio.model, old.recipe), old.recipe), studio.code_hash)
    assert torch.equal(found, theta_of(load_style(run.style_file), studio.space, studio.code_hash))


def test_batches_of_texts_double_up_to_all_there_are(recipe, tmp_path, monkeypatch):
    """And directions do not; a resumed run goes on with the same batches, and a style replays as the run did."""
    monkeypatch.setattr(recipes, "GROWTH", 1)
    studio = training.prepare(dataclasses.replace(recipe, steps=4, batch_size=4), tmp_path / "cache")
    assert len(studio.task.train) == 12
    asked, lesson = [], studio.task.lesson
    monkeypatch.setattr(studio.task, "lesson", lambda step, size: asked.append(size) or lesson(step, size))
    whole = go(studio, tmp_path / "whole")
    assert asked == [4, 8, 8, 12, 12, 12, 12, 12]  # of a step, and of the next one, on which its moves are tried
    assert len({len(record.weights) for record in whole.journal()}) == 1
    broken = go(studio, tmp_path / "broken", stop_after=2)
    go(studio, tmp_path / "broken")
    assert results(broken) == results(whole)
    style, theta = load_style(whole.journal_style_file), load_style(whole.style_file)
    found = theta_of(style, make_space(views_of(studio.model, style.recipe), style.recipe), studio.code_hash)
    assert style.recipe.grows_batch and found.any()
    assert torch.equal(found, theta_of(theta, studio.space, studio.code_hash))


def test_the_perturbation_is_that_of_the_precision(recipe, tmp_path):
    """What a step sees of the loss in bfloat16, against fp32: with the perturbation of fp32 it drowns in rounding."""
    plain = dataclasses.replace(
        recipe, model="tiny-llm", own_texts=0.0, depth=0.34, directions=16, batch_size=4, rows=32
    )

    def seen(dtype: str, eps: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of different columns of the Jacobian, and the slopes."""
        studio = training.prepare(dataclasses.replace(plain, dtype=dtype, eps=eps), tmp_path)
        assert studio.recipe.eps == (eps or {"float32": EPS, "bfloat16": COARSE_EPS}[dtype])
        state, found = training.Training(Run.create(tmp_path / f"{dtype}-{eps}", studio.recipe), studio), []
        model = state.method._model
        state.method._model = lambda *given: found.append(model(*given)) or found[0]
        state.step()
        gram, slope, _ = found[0]
        return gram.triu(1), slope

    exact = seen("float32", 1e-3)
    off = lambda *given: [((a - b).norm() / b.norm()).item() for a, b in zip(seen(*given), exact, strict=True)]  # noqa: E731
    fine, drowned, coarse = off("float32"), off("bfloat16", EPS), off("bfloat16")
    assert max(fine) < 0.05 and max(coarse) < 0.5
    assert all(a < b / 2 for a, b in zip(coarse, drowned, strict=True))


def test_a_style_tells_of_the_norm_though_it_does_not_tell_of_the_texts(recipe, tmp_path):
    for keeps in (0.25, 0.0):
        mine = dataclasses.replace(recipe, own_texts=keeps)
        assert mine.tunes_norm == recipes.make(mine.public()).tunes_norm == bool(keeps)
    pictures = Recipe(images=str(tmp_path), final_norm="tuned")  # where there is no such norm
    assert not pictures.tunes_norm and not recipes.make(pictures.public()).tunes_norm


def test_what_the_base_writes_by_itself_stays_likelier_where_it_is_kept(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "OWN", 64)
    monkeypatch.setattr(text, "OWN_TOKENS", OWN_TOKENS)
    forgot = {}
    for keeps in (0.0, 0.5):
        mine = dataclasses.replace(recipe, steps=6, batch_size=8, directions=32, own_texts=keeps, final_norm="tuned")
        studio = training.prepare(mine, tmp_path)
        run = go(studio, tmp_path / f"run-{keeps}")
        assert run.evaluations()[-1]["change"] < 0
        theta = training.Training(run, studio).theta_at(6)
        with torch.no_grad(), studio.space.folded(torch.zeros_like(theta)):
            texts = stack(own_texts(studio.model, studio.preview.tokenizer, 60, seed=99))  # others than were kept
            before = token_losses(studio.model, texts)
        with torch.no_grad(), studio.space.folded(theta):
            forgot[keeps] = (token_losses(studio.model, texts) - before).mean()
    assert 0 < forgot[0.5] < 0.75 * forgot[0.0]


def test_the_method_sees_losses_and_features_and_chunks_change_nothing_but_rounding(studio):
    batch = studio.task.batch(0, 4)
    found = studio.task.outcomes(batch)
    assert torch.equal(found, token_features(studio.model, batch))
    torch.testing.assert_close(found[:, 0], studio.task.losses(batch))
    alone = torch.cat([token_losses(studio.model, batch.take(torch.tensor([i]))) for i in range(4)])
    torch.testing.assert_close(found[:, 0], alone)


def test_examples_are_split_and_counted(studio):
    assert (studio.examples, studio.held_out) == (12, 4)
    train, held = ({t.ids for t in part} for part in (studio.task.train, studio.task.held_out))
    assert len(train) == 12 and len(held) == 4 and not train & held


def test_the_accuracy_is_that_of_the_likeliest_choice(studio, finished):
    first, *_, last = finished.evaluations()
    assert {len(question.options) for question in studio.task.questions} == {2} and len(studio.task.questions) == 4
    found = choose(studio.model, [question.options for question in studio.task.questions])
    right = [
        training.models.load_tokenizer(studio.recipe.model).decode(question.options[question.right].ids)
        for question in studio.task.questions
    ]
    assert all(("fine" in text) == ("good" in text) for text in right)
    share = sum(i == question.right for i, question in zip(found, studio.task.questions, strict=True)) / 4
    assert first["accuracy"] == share and 0 <= last["accuracy"] <= 1


def test_previews_are_answers_to_prompts_of_the_held_out_texts(studio, finished):
    first, last = (json.loads(finished.answers_file(step).read_text()) for step in (0, 5))
    held = {t.line for t in studio.task.held_out}
    assert {row["prompt"] for row in first["answers"]} == {ROWS[line - 1]["text"] for line in held}
    styled = open_style(finished.path, finished.path)
    assert [row["answer"] for row in first["answers"]] == styled.answers(styled.prompts, 0.0)
    assert last["step"] == 5 and '"answer": ' in (finished.path / "log.txt").read_text()


def test_previews_can_be_sampled(studio, tmp_path):
    run = go(studio, tmp_path / "run", steps=1, temperature=1.5)
    cold, warm = go(studio, tmp_path / "cold", steps=1), json.loads(run.answers_file(0).read_text())
    assert warm != json.loads(cold.answers_file(0).read_text())
    assert warm == json.loads(go(studio, tmp_path / "again", steps=1, temperature=1.5).answers_file(0).read_text())


def test_plain_texts_are_gone_on_with(recipe, tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(f"once there was a cup number {i}" for i in range(9)))
    mine = Recipe(**{**recipe.__dict__, "texts": str(file)})
    made = training.prepare(mine, tmp_path)
    assert made.preview.plain and made.preview.prompts[0][0].content == "once there"
    assert made.task.figures() == {}
    run = go(made, tmp_path / "run", steps=1)
    tokenizer = training.models.load_tokenizer(recipe.model)
    begun = tokenizer("once there", return_tensors="pt")["input_ids"]
    found = made.model.generate(begun, max_new_tokens=3, do_sample=False)[0, begun.shape[1] :]
    answer = json.loads(run.answers_file(0).read_text())["answers"][0]["answer"]
    assert answer == tokenizer.decode(found, skip_special_tokens=True)


# The result


def test_both_forms_of_a_style_give_the_same_theta_and_name_no_folder(studio, finished, tmp_path):
    theta, journal = (open_style(p, tmp_path).theta for p in (finished.style_file, finished.journal_style_file))
    assert torch.equal(theta, journal) and theta.abs().max() > 0
    style = load_style(finished.style_file)
    assert style.facts["texts"] == "12" and "pictures" not in style.facts and "size" not in style.facts
    assert str(Path(studio.recipe.texts).parent) not in finished.style_file.read_bytes().decode("latin-1")


def test_an_exported_folder_loads_in_stock_transformers_with_equal_logits(studio, finished, tmp_path):
    styled = open_style(finished.path, tmp_path)
    folder = styled.export(tmp_path / "exported")
    check(folder)
    batch = stack(studio.task.held_out)
    given = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in training.models.quantized_layers(stock).values():
        layer.support_avx512bf16_for_cpu = False  # that kernel computes in bf16, whatever dtype was asked for
    with torch.no_grad(), styled.at(1.0):
        ours = styled.model(**given).logits
    with torch.no_grad():
        assert torch.equal(stock(**given).logits, ours)
        assert not torch.equal(styled.model(**given).logits, ours)
    text = (folder / "README.md").read_text()
    assert "trained on 12 texts" in text and "pipeline_tag: text-generation" in text
    assert "| prompt | before | after |" in text and json.loads(finished.answers_file(0).read_text())["answers"][0][
        "prompt"
    ] in text  # fmt: skip
    exec(card.language_snippet(folder, card.read(finished.style_file)), {})  # what it tells people to do works  # noqa: S102
    exec(card.style_snippet(finished.style_file, card.read(finished.style_file)), {})  # noqa: S102
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML
    with pytest.raises(ModelError, match="exists already"):
        styled.export(folder)


@pytest.mark.parametrize("kind", tiny.LANGUAGE_MODELS)
def test_every_class_learns_and_its_export_is_the_same_model_to_stock_transformers(recipe, tmp_path, kind):
    folder = tiny.save_language_model(tmp_path / "model", kind)
    studio = training.prepare(dataclasses.replace(recipe, model=str(folder), batch_size=4), tmp_path)
    run = go(studio, tmp_path / "run", steps=3, directions=24)
    first, *later = run.evaluations()
    assert min(e["loss"] for e in later) < first["loss"]
    styled = open_style(run.path, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(styled.export(tmp_path / "exported"), dtype=torch.float32)
    assert type(stock) is type(studio.model)
    for layer in training.models.quantized_layers(stock).values():
        layer.support_avx512bf16_for_cpu = False
    batch = stack(studio.task.held_out)
    with torch.no_grad(), styled.at(1.0):
        ours = styled.model(input_ids=batch.tokens, attention_mask=batch.mask).logits
        assert torch.equal(stock(input_ids=batch.tokens, attention_mask=batch.mask).logits, ours)


# The command line


def test_from_a_recipe_to_an_exported_model(qzo, recipe, tmp_path):
    file = tmp_path / "remarks" / "recipe.toml"
    file.parent.mkdir()
    (file.parent / "mine.jsonl").write_text(Path(recipe.texts).read_text())
    file.write_text(recipes.dump(recipe).replace(recipe.texts, "mine.jsonl"))
    run = tmp_path / "runs" / "remarks"
    code, out, err = qzo("train", file, "--steps", 2)
    assert code == 0 and "accuracy" in out and "training" in err and "on 12 texts" in err
    assert qzo("resume", run)[0] == 0
    facts = json.loads(qzo("inspect", run, "--json")[1])
    assert facts["texts"] == str(file.parent / "mine.jsonl") and "accuracy" in facts and "images" not in facts
    code, out, _ = qzo("compare", run, "--prompt", "fine 1", "--json")
    (row,) = json.loads(out)
    assert row["prompt"] == "fine 1" and set(row) == {"prompt", "before", "after"}
    assert qzo("compare", run)[1].count("before") == 4
    for source in (run, run / "style-journal.safetensors"):
        code, out, _ = qzo("apply", source, "fine 1", "--json")
        assert code == 0 and json.loads(out)[0]["answer"] == row["after"]
    assert json.loads(qzo("preview", run, "--prompt", "fine 1", "--json")[1])[0]["answer"] == row["after"]
    assert qzo("export", run, tmp_path / "exported")[0] == 0
    facts = json.loads(qzo("inspect", tmp_path / "exported", "--json")[1])
    assert (facts["class"], facts["quantization"], facts["problem"]) == ("LlamaForCausalLM", "nf4", None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--images", "pictures"], "a recipe teaches pictures or texts, not both"),
        (["--texts", "nowhere.jsonl"], "there is no file at 'nowhere.jsonl'"),
        (["--model", "tiny-sd3"], "tiny-sd3 draws pictures and learns no texts"),
        (["--text-columns", "label"], "text_columns must look like field=column"),
        (["--text-columns", "label=stars"], "has no column 'stars'; its columns are 'text', 'label'"),
        (["--length", "20"], "tokens before its answer, and the limit is 20"),
        (["--texts", "", "--images", "pictures"], "there is no folder of pictures at 'pictures'"),
    ],
)
def test_impossible_settings_are_one_sentence(qzo, recipe, tmp_path, words, sentence):
    file = tmp_path / "recipe.toml"
    file.write_text(recipes.dump(recipe))
    code, out, err = qzo("train", file, *words, "--out", tmp_path / "run")
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


def test_layers_that_are_not_there_are_named_with_those_that_are(qzo, recipe, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(recipes.dump(recipe))
    code, out, err = qzo("train", file, "--layers", "up_proj", "--layers", "proj", "--out", tmp_path / "run")
    sentence = "no layer that can be tuned has 'proj' in its name; they end in down_proj, gate_proj, k_proj, norm, "
    assert code == 2 and err.splitlines()[-1].startswith(f"qzo: {sentence}") and not (tmp_path / "run").exists()
    assert "loading" not in err


def test_bad_rows_stop_a_run_or_are_skipped_and_said(recipe, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(Path(recipe.texts).read_text() + '{"text": "no label"}\n')
    mine = Recipe(**{**recipe.__dict__, "texts": str(file)})
    with pytest.raises(ValueError, match="1 of 17 rows cannot be used: line 17 has no 'label'"):
        training.prepare(mine, tmp_path)
    found = training.prepare(Recipe(**{**mine.__dict__, "skip_bad": True, "length": 512}), tmp_path)
    assert found.examples + found.held_out == 16
    assert any("1 rows are left out: line 17 has no 'label'" in note for note in found.notes)
    assert any("the model reads 128 tokens at most" in note for note in found.notes)


# The model's folder


def test_a_language_folder_is_checked_by_its_headers(model, tmp_path, tiny_folder):
    import shutil

    check(model)
    with pytest.raises(ModelError, match="is a language model: it draws nothing"):
        check_pipeline(model)
    assert is_language(model) and not is_language(tiny_folder) and not is_language(tiny_folder / "text_encoder_3")
    assert inspect(model)["kind"] == "model" and inspect(model)["problem"] is None
    for name, sentence in (
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no weights"),
    ):
        folder = tmp_path / name
        shutil.copytree(model, folder)
        for file in (folder / name, *(folder.glob("tokenizer*") if "tokenizer" in name else ())):
            file.unlink(missing_ok=True)
        with pytest.raises(ModelError, match=sentence):
            check(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="a pickle, which can run code and is never loaded"):
        check(folder)
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="is not a complete safetensors file"):
        check(folder)


def test_of_a_language_repository_no_pickle_and_no_code_is_fetched():
    ours = ["config.json", "generation_config.json", "LICENSE", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]  # fmt: skip
    others = ["pytorch_model.bin", "modeling_own.py", "README.md", "model.fp16.safetensors", "onnx/model.onnx",
              "original/consolidated.00.pth"]  # fmt: skip
    assert wanted_files([*ours, *others]) == language_files([*ours, *others]) == sorted(ours)
    with pytest.raises(ModelError, match="no safetensors weights"):
        wanted_files(["config.json", "tokenizer.json", "pytorch_model.bin"])

"""The language task on tiny models of real classes: loading, losses against transformers' own, choices, answers."""

from dataclasses import replace

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from zo_engine.blocks import PART, Prefix, Replay, levels
from zo_engine.hub import ModelError
from zo_engine.models import load_language_model, load_tokenizer, locate
from zo_engine.newton import GaussNewton
from zo_engine.noise import Layout, directions
from zo_engine.probes import Evaluations, GainSpace, GroupSpace, central, evaluate
from zo_engine.quantize import quantized_layers
from zo_engine.scales import final_norm, find_scales, formats_of, prove_live
from zo_engine.tasks import text as text_task
from zo_engine.tasks.diffusion import HELD_OUT, SEARCH, TRAINING
from zo_engine.tasks.text import (
    CHOICE,
    FEATURES,
    OWN_TOKENS,
    Kept,
    Language,
    answers,
    choose,
    likelihoods,
    own_texts,
    sketched,
    stack,
    token_features,
    token_losses,
)
from zo_engine.texts import Example, Message
from zo_engine.tokens import IGNORED, Tokens, choices, contrasted, openings, prompt_ids

CLASSES = list(tiny.LANGUAGE_MODELS)
OWN = 16


def talk(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents))


def some_tokens(count: int = 5, seed: int = 0, choices: bool = False) -> list[Tokens]:
    """Of different lengths, each learning a part of its own; with choices, all but the first part from others in two
    places, from two in the last one."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        ids = tuple(rng.integers(3, 259, rng.integers(6, 24)).tolist())
        start = int(rng.integers(0, len(ids) - 2))
        other = lambda i, ids=ids: (ids[i] + 7) % 259  # noqa: E731
        last = len(ids) - 1
        rivals = ((last - 1, (other(last - 1),)), (last, (other(last), (other(last) + 7) % 259)))
        made.append(Tokens(ids, (IGNORED,) * start + ids[start:], rivals=rivals if choices and number else ()))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(kind, tied) of a tiny model, written once. Not to be written to."""
    root, made = tmp_path_factory.mktemp("language"), {}

    def folder(kind: str, tied: bool = False):
        if (kind, tied) not in made:
            made[kind, tied] = tiny.save_language_model(root / f"{kind}{tied}", kind, tied=tied)
        return made[kind, tied]

    return folder


# Loading


TIED = [("opt", True), ("llama", True), ("qwen3", True), ("gemma", True), ("gemma3", True), ("phi", True)]


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in CLASSES), *TIED])
def test_a_language_model_in_nf4_is_what_transformers_makes_of_it(folders, monkeypatch, kind, tied):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)  # that kernel repacks the weights
    folder = folders(kind, tied)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).state_dict()
    ours = load_language_model(folder)
    assert ours.get_output_embeddings().weight.dtype == torch.float32
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    state = ours.state_dict()
    assert state.keys() == theirs.keys()
    assert [name for name in state if not torch.equal(state[name], theirs[name])] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_scales_are_live_and_the_blocks_are_found(folders, kind):
    model = load_language_model(folders(kind))
    views = find_scales(model)
    prove_live(views)
    assert list(views) == [name for name, _ in model.named_modules() if name in quantized_layers(model)]
    last, before = levels(views, 0.5)
    name = "model.decoder.layers" if kind == "opt" else "model.layers"
    assert [(level.blocks, level.first) for level in (last, before)] == [(name, 3), (name, 2)]
    assert set(last.layers) | set(before.layers) == {n for n in views if n.startswith((f"{name}.2.", f"{name}.3."))}


@pytest.mark.parametrize("kind", CLASSES)
def test_gains_of_the_final_norm_fold_and_all_alike_they_are_a_temperature(folders, kind):
    model, batch = load_language_model(folders(kind)), stack(some_tokens())
    views = find_scales(model, formats_of("nf4", final_norm=True))
    name = final_norm(model)
    assert list(views) == [*find_scales(model), name] and (kind == "opt") == ("final_layer_norm" in name)
    prove_live({name: views[name]})
    space = GainSpace({name: views[name]})
    assert space.layout.size == model.config.hidden_size
    shifts = [b for b in (views[name].bias, getattr(model.get_output_embeddings(), "bias", None)) if b is not None]
    for shift in shifts:  # not scaled, so it has to be nought for a temperature
        shift.data.zero_()
    logits = lambda: model(input_ids=batch.tokens, attention_mask=batch.mask).logits  # noqa: E731
    with torch.no_grad():
        before, held = logits(), model.get_parameter(f"{name}.weight").clone()
        with space.folded(torch.full((space.layout.size,), 2.0).log()):
            torch.testing.assert_close(logits(), 2 * before, rtol=1e-5, atol=1e-6)
        for shift in shifts:
            shift.data.normal_(generator=torch.Generator().manual_seed(1))
        theta = 0.3 * torch.randn(space.layout.size, generator=torch.Generator().manual_seed(2))
        with space.folded(theta):
            folded = logits()
        with space.dressed(theta):
            torch.testing.assert_close(logits(), folded, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(folded, before, atol=1e-2)
        assert torch.equal(model.get_parameter(f"{name}.weight"), held)


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_tuned_model_that_was_saved_loads_in_stock_transformers(folders, monkeypatch, tmp_path, kind, format):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    model = load_language_model(folders(kind, kind == "gemma"), quantization=format)
    for view in find_scales(model).values():
        view.put(view.base * torch.linspace(0.9, 1.1, view.base.numel()).view(view.base.shape))
    batch = stack(some_tokens())
    expected = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(input_ids=batch.tokens, attention_mask=batch.mask).logits, expected)
    ours = load_language_model(tmp_path, quantization=format)
    assert torch.equal(ours(input_ids=batch.tokens, attention_mask=batch.mask).logits, expected)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"model_type": "clip"}', "is not that of a language model"),
        ('{"model_type": "no-such-thing"}', "is not that of a language model"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}', "is quantised by 'hqq'"),
    ],
)
def test_folders_that_hold_no_such_model_are_refused_in_one_sentence(folders, tmp_path, config, says):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").symlink_to(folders("llama") / "model.safetensors")
    with pytest.raises(ModelError, match=says) as error:
        load_language_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    tiny.language_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)


# Losses


@pytest.mark.parametrize("kind", CLASSES)
def test_the_loss_of_each_row_is_transformers_own_on_that_example_alone(kind):
    model, examples = tiny.language_model(kind), some_tokens()
    expected = [model(input_ids=b.tokens, labels=b.labels).loss for b in (stack([e]) for e in examples)]
    torch.testing.assert_close(token_losses(model, stack(examples)), torch.stack(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_padding_and_what_stands_in_it_change_no_loss(kind):
    model, examples = tiny.language_model(kind).double(), some_tokens(3)
    plain = token_losses(model, stack(examples))
    longer = Tokens((5,) * 60, (IGNORED, 5) * 30)
    for pad in (0, 77):
        assert torch.allclose(token_losses(model, stack([*examples, longer], pad))[:3], plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_the_model_of_the_loss_is_half_the_exact_gauss_newton_matrix_and_gradient(exact, choices):
    """In fp64 (Llama has norms in fp32), against automatic differentiation; with few buckets, up to what is lost."""
    model, batch, count = tiny.language_model("opt").double(), stack(some_tokens(3, choices=choices)), 5
    weight = model.get_parameter("model.decoder.layers.2.fc2.weight")
    plain, layout = weight.data.clone(), Layout({"w": tuple(weight.shape)})
    newton = GaussNewton(layout, [layout], seed=1, per_part=[count], eps=3e-7)

    def outcomes(part, probes, fresh):
        rows = []
        for direction, sign, sample in zip(probes.direction, probes.sign, probes.sample, strict=True):
            weight.data = plain + probes.eps * sign * probes.z[direction].double().view_as(plain)
            rows.append(token_features(model, batch.take(sample[None]), FEATURES if exact else 2000))
        weight.data = plain
        return torch.cat(rows)

    gram, slope, loss = newton._model(outcomes, len(batch))
    z = newton.directions()[0].double().view(count, *weight.shape)
    expected_gram, expected_slope, expected_loss = torch.zeros(count, count).double(), torch.zeros(count).double(), 0.0
    for row in range(len(batch)):
        one = batch.take(torch.tensor([row]))
        learnt = one.labels[0, 1:] != IGNORED

        def logits(w, one=one, learnt=learnt):
            moved = {"model.decoder.layers.2.fc2.weight": plain + torch.einsum("k,kij->ij", w, z)}
            given = {"input_ids": one.tokens, "attention_mask": one.mask}
            return torch.func.functional_call(model, moved, (), given).logits[0, :-1][learnt]

        at = torch.zeros(count, dtype=torch.float64)
        model.set_attn_implementation("eager")  # the only one that torch derives forwards; its softmax is in fp32
        j = torch.func.jacfwd(logits)(at)  # [n, V, K]: few columns, and many rows
        model.set_attn_implementation("sdpa")
        p = logits(at).softmax(-1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected_gram += torch.einsum("nvk,nvu,nul->kl", j, curvature, j) / learnt.sum() / 2 / len(batch)
        target = one.labels[0, 1:][learnt]
        difference = p - torch.nn.functional.one_hot(target, p.shape[1])
        expected_slope += torch.einsum("nvk,nv->k", j, difference) / learnt.sum() / 2 / len(batch)
        expected_loss += torch.nn.functional.cross_entropy(logits(at), target).item() / len(batch)
        for place, others in enumerate(one.rivals[0, 1:][learnt]):
            if not (others := others[others != IGNORED]).numel():
                continue
            among = torch.cat([target[place, None], others])
            j_among, p_among = j[place, among], p[place, among] / p[place, among].sum()
            curvature = CHOICE * (torch.diag(p_among) - p_among[:, None] * p_among)
            expected_gram += j_among.T @ curvature @ j_among / 2 / len(batch)
            expected_slope += CHOICE * j_among.T @ (p_among - torch.eye(len(among))[0]) / 2 / len(batch)
            expected_loss -= CHOICE * p_among[0].log().item() / len(batch)
    loose = 0.0 if exact else 0.3 * expected_gram.diagonal().mean().item()
    torch.testing.assert_close(gram, expected_gram, rtol=1e-4, atol=1e-8 + loose)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert exact == bool(torch.allclose(gram, expected_gram, rtol=1e-4, atol=1e-8))


@pytest.mark.parametrize("words", [("good", "bad"), ("good", "goods", "gone", "bad")])
def test_the_loss_of_a_choice_is_its_likelihood_where_only_choices_can_be_written(folders, words):
    folder = folders("llama")
    tokenizer, model = load_tokenizer(folder), load_language_model(folder, quantization="none").double()
    example = Example(1, talk("say it", words[0]), choices=words)
    options = choices(tokenizer, example, 64)
    right = contrasted(options[0], options)
    logs = model(torch.tensor([right.ids])).logits[0].double().log_softmax(-1)
    expected, alive = 0.0, [option.ids for option in options]
    for place in range(1, len(right.ids)):
        following = sorted({ids[place] for ids in alive})
        among = logs[place - 1, following].log_softmax(-1)
        expected -= among[following.index(right.ids[place])].item()
        alive = [ids for ids in alive if ids[place] == right.ids[place]]
    assert len(alive) == 1 and expected > 0.1
    alone, chosen = (token_losses(model, stack([t])).item() for t in (options[0], right))
    assert chosen - alone == pytest.approx(CHOICE * expected, rel=1e-6)


def test_a_sketch_keeps_inner_products_up_to_its_size():
    values = torch.randn(6, 4, 5000, generator=torch.Generator().manual_seed(1)).softmax(-1).sqrt().double()
    values = values - values.mean(0)
    exact = torch.einsum("anv,bnv->ab", values, values)
    for buckets, error in ((64, 0.4), (1024, 0.1), (5000, 0.0)):
        small = torch.stack([sketched(v, buckets) for v in values])
        assert small.shape == (6, 4, buckets)
        found = torch.einsum("anv,bnv->ab", small, small)
        assert (found - exact).abs().max() <= error * exact.diagonal().mean()


@pytest.mark.parametrize("choices", [False, True])
def test_features_do_not_depend_on_the_neighbours_but_for_positions_where_only_they_learn(choices):
    model, batch = tiny.language_model().double(), stack(some_tokens(4, choices=choices))
    together = token_features(model, batch)
    torch.testing.assert_close(together[:, 0], token_losses(model, batch))
    for row in range(4):
        alone = token_features(model, batch.take(torch.tensor([row])))[0]
        found = together[row]
        among = 2 * CHOICE if choices and row else 0  # in two places
        assert found[1:].square().sum() == pytest.approx(2 + 2 * among)  # probabilities of each token sum to one
        torch.testing.assert_close(found[found != 0], alone[alone != 0])


def test_a_batch_is_a_pure_function_of_seed_step_and_stream():
    train = some_tokens(12)
    first, same, other = (Language(None, train, train, seed=seed) for seed in (7, 7, 8))
    for step in (0, 3):
        assert torch.equal(first.batch(step, 5).tokens, same.batch(step, 5).tokens)
    seen = [tuple(map(tuple, task.batch(step, 5, stream).tokens.tolist())) for task, step, stream in
            ((first, 0, TRAINING), (first, 1, TRAINING), (first, 0, HELD_OUT), (other, 0, TRAINING))]  # fmt: skip
    assert len(set(seen)) == 4
    rows = [tuple(t[m == 1].tolist()) for b in [first.batch(2, 24)] for t, m in zip(b.tokens, b.mask, strict=True)]
    assert {row: rows.count(row) for row in rows} == {example.ids: 2 for example in train}  # all before any again


def test_the_evaluation_set_is_fixed_and_holds_every_example_once():
    held = some_tokens(70)
    task = Language(None, held, held, seed=0)
    for items, expected in ((1000, 70), (10, 10)):
        batches = task.evaluation(items)
        rows = [tuple(t[m == 1].tolist()) for b in batches for t, m in zip(b.tokens, b.mask, strict=True)]
        assert sorted(rows) == sorted(example.ids for example in held[:expected])
    sub = batches[0].take(torch.tensor([3, 1]))
    assert len(sub) == 2
    assert torch.equal(sub.labels, batches[0].labels[[3, 1]])


def test_the_bases_own_texts_make_up_their_share_of_what_is_learnt_and_nothing_of_what_is_held_out():
    train, own, asked = some_tokens(12), some_tokens(6, seed=1), []
    kept = Kept(lambda: asked.append(0) or own, 0.25, most=30)
    task, plain = Language(None, train, train, seed=7, kept=kept), Language(None, train, train, seed=7)
    assert not asked and task.tokens() == 30  # to look on needs none
    rows = lambda batch: [tuple(t[m == 1].tolist()) for t, m in zip(batch.tokens, batch.mask, strict=True)]  # noqa: E731
    mine, theirs = ({example.ids for example in some} for some in (own, train))
    for size, share in ((1, 0), (2, 1), (8, 2), (16, 4)):
        for stream in (TRAINING, SEARCH):
            found = rows(task.batch(3, size, stream))
            assert (sum(row in mine for row in found), sum(row in theirs for row in found)) == (share, size - share)
    assert asked == [0]  # and once is enough
    assert torch.equal(task.evaluation(9)[0].tokens, plain.evaluation(9)[0].tokens)


# Probes


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("space", [GainSpace, GroupSpace])
def test_stacked_probes_behind_a_prefix_equal_probes_one_by_one(folders, kind, space):
    model = load_language_model(folders(kind))
    views = find_scales(model)
    level = levels(views, 0.5)[-1]
    space = space({name: views[name] for name in level.layers})
    batch, theta = stack(some_tokens(3)), torch.zeros(space.layout.size)
    probes = central(directions("rademacher", space.layout, 1, 0, range(3)), 0.05, 3, own=True)
    loss = lambda i: token_losses(model, batch.take(i))  # noqa: E731
    found = evaluate(space, theta, probes, loss, replay=Prefix(model, level).run(loss, 3))
    for row in range(6):
        with space.folded(theta + 0.05 * probes.sign[row] * probes.z[probes.direction[row]]):
            alone = token_losses(model, batch.take(probes.sample[row : row + 1]))
        torch.testing.assert_close(found[row : row + 1], alone, rtol=2e-4, atol=1e-5)
    assert found[:3].ne(found[3:]).all()


# Choices and answers


def test_the_likelihood_of_a_choice_is_the_mean_log_probability_of_its_tokens():
    model, words = tiny.language_model(), tiny.tokenizer()
    example = Example(1, talk("Is it good?", "yes"), choices=("yes", "certainly not"))
    options = choices(words, example, 200)
    scores = likelihoods(model, options, rows=1)
    for option, score, text in zip(options, scores, example.choices, strict=True):
        logs = model(torch.tensor([option.ids])).logits[0].log_softmax(-1)
        answer = [i for i, label in enumerate(option.labels) if label != IGNORED]
        assert words.decode([option.ids[i] for i in answer]) == text + tiny.END
        torch.testing.assert_close(score, sum(logs[i - 1, option.ids[i]] for i in answer) / len(answer))
    assert choose(model, [options, options[::-1]]) == [int(scores.argmax()), 1 - int(scores.argmax())]


def test_greedy_answers_do_not_depend_on_their_neighbours_and_are_generates_own():
    model, words = tiny.language_model(), tiny.tokenizer()
    prompts = [talk("Hi"), talk("What is the colour of the sea?"), talk("Sing.", "La.", "More!")]
    together = answers(model, words, prompts, most=12)
    assert together == [answers(model, words, [prompt], most=12)[0] for prompt in prompts]
    turns = [{"role": m.role, "content": m.content} for m in prompts[1]]
    ids = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert words.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == together[1]


def test_sampled_answers_depend_on_their_seed_alone_and_leave_the_global_generator_be():
    model, words = tiny.language_model(), tiny.tokenizer()
    state = torch.get_rng_state()
    prompts, seeds = [talk("Hi"), talk("Hi"), talk("Hi")], [1, 2, 1]
    found = answers(model, words, prompts, seeds=seeds, most=12)
    assert found[0] == found[2] != found[1]
    assert found[1:2] == answers(model, words, prompts[:1], seeds=[2], most=12)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_distributed_as_the_models_softmax():
    model, words = tiny.language_model(), tiny.tokenizer("none")
    count, temperature = 2000, 0.7
    found = answers(
        model, words, [talk("abc ")] * count, seeds=range(count), most=1, temperature=temperature, together=500
    )
    ids = torch.tensor([words("abc \n"[:4])["input_ids"]])
    expected = (model(ids).logits[0, -1] / temperature).softmax(-1)
    likeliest = int(expected.argmax())
    share = sum(text == words.decode([likeliest], skip_special_tokens=True) for text in found) / count
    p = float(expected[likeliest])
    assert abs(share - p) < 4 * (p * (1 - p) / count) ** 0.5


# What a model writes by itself


@pytest.mark.parametrize(
    ("template", "asking", "answering"),
    [
        ("chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("marked", "<|im_start|>user:", "<|im_end|><|im_start|>assistant:"),
        ("brackets", "[ ", " ]"),
        ("counting", "1<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_where_a_model_writes_by_itself_is_found_in_its_tokenizer(template, asking, answering):
    words = tiny.tokenizer(template)
    found = openings(words)
    assert (words.decode(found.asking), words.decode(found.answering)) == (asking, answering)
    assert found.plain == []  # no token begins a text
    whole = prompt_ids(words, talk("Who is it?"))
    assert [*found.asking, *words("Who is it?")["input_ids"], *found.answering] == whole
    words.add_special_tokens({"bos_token": "<|im_start|>"})
    assert openings(words).plain == [words.bos_token_id]


def test_a_model_without_a_template_writes_plain_texts_after_what_ends_others():
    for words in (tiny.tokenizer("none"), tiny.tokenizer()):
        if words.chat_template:  # one that begins with what we do not know
            words.chat_template = "{{ raise_exception('a system message first') }}"
            words.bos_token = tiny.START
        found = openings(words)
        assert (found.plain, found.asking) == ([words.bos_token_id or words.eos_token_id], [])


@pytest.fixture
def own_model(monkeypatch):
    """tiny-llm, which has learnt to write, and its tokenizer; asked for fewer texts than a run asks for."""
    monkeypatch.setattr(text_task, "OWN", OWN)
    folder = locate("tiny-llm")
    return load_language_model(folder, device="cpu", quantization="nf4"), load_tokenizer(folder)


def test_own_texts_are_the_models_own_are_the_same_again_and_stay_within_bounds(own_model):
    model, words = own_model
    where, state = openings(words), torch.get_rng_state()
    found = own_texts(model, words, 40, seed=3)
    assert found == own_texts(model, words, 40, seed=3, together=7) and len(set(found)) > OWN / 2
    assert torch.equal(torch.get_rng_state(), state)
    assert found != own_texts(model, words, 40, seed=4)
    chats = found[OWN // 2 :]
    for texts, scaffold in ((found[: OWN // 2], where.plain), (chats, where.asking + where.answering)):
        assert len(texts) == OWN // 2
        assert {len(text.ids) - text.learnt for text in texts} == {len(scaffold)}
    assert {text.ids[: len(where.asking)] for text in chats} == {tuple(where.asking)}
    assert max(len(text.ids) for text in found) <= 40
    assert sum(text.ids[-1] == words.eos_token_id for text in found) > OWN / 2  # most come to an end of their own
    assert max(len(text.ids) for text in own_texts(model, words, 1000, seed=3)) <= OWN_TOKENS + where.longest
    assert own_texts(model, words, where.longest, seed=3) == []  # no room


def test_away_from_the_model_its_own_texts_become_less_likely(own_model):
    model, words = own_model
    texts = stack(own_texts(model, words, 40, seed=3))
    space = GainSpace(find_scales(model))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        here = token_losses(model, texts)
        for _ in range(8):
            with space.folded(torch.randn(space.layout.size, generator=rng)):
                change = token_losses(model, texts) - here
            assert change.mean() > 2 * change.std() / len(change) ** 0.5


# Batches in parts


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_parts_of_a_batch_are_of_like_length_and_say_what_the_whole_says(folders, kind):
    model, examples = load_language_model(folders(kind)), some_tokens(40, choices=True)
    batch = stack(examples)
    parts = batch.parts()
    assert sum(map(len, parts)) == 40 and max(map(len, parts)) <= PART
    for part in parts:
        lengths = part.mask.sum(1)
        assert part.tokens.shape[1] == lengths.max() and 2 * lengths.max() <= 3 * lengths.min()
    assert sum(part.tokens.numel() for part in parts) < 0.8 * batch.tokens.numel()  # 6 to 23 tokens
    level = levels(find_scales(model), 0.5)[-1]
    space = GainSpace({name: view for name, view in find_scales(model).items() if name in level.layers})
    theta, z = (directions("gaussian", space.layout, 0, step, range(2)) for step in (0, 1))
    probes = central(z, 0.03, 40, own=False)
    made: list[int] = []

    def run(prefix: Prefix, loss, examples: int, *how) -> Replay:
        made.append(examples)
        return prefix.run(loss, examples, *how)

    read = Evaluations(space, 0.1 * theta[0], [Prefix(model, level)], 7, run=run)
    found = read(lambda some: token_losses(model, some), parts, probes, 0)
    assert made == [len(part) for part in parts] and len(read.replays) == 1  # each once, and held for one part alone
    texts = [
        tuple(row[mask.bool()].tolist()) for part in parts for row, mask in zip(part.tokens, part.mask, strict=True)
    ]
    order = torch.tensor([[example.ids for example in examples].index(text) for text in texts])
    where = replace(probes, sample=order[probes.sample])
    whole = evaluate(space, 0.1 * theta[0], where, lambda i: token_losses(model, batch.take(i)))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[:80], whole[80:], rtol=1e-4)  # plus and minus differ by far more
    last = learnt_last(examples[0])
    (alone,) = stack([last, examples[0]]).take(torch.tensor([0])).parts()
    assert alone.tokens.shape[1] == len(last.ids) - 2  # what follows the last learnt token is not computed
    torch.testing.assert_close(token_losses(model, alone), token_losses(model, stack([last])), rtol=1e-5, atol=1e-6)


def learnt_last(example: Tokens) -> Tokens:
    """The example with two tokens behind those that are learnt."""
    return Tokens((*example.ids, 5, 6), (*example.labels, IGNORED, IGNORED))

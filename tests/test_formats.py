"""Language models in GPTQ, AQLM, int8 and plain weights: read exactly, trained, saved, and equal elsewhere."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from exact import one_by_one
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from assets import pack
from zo_engine import hub, packed, plan, quantize
from zo_engine import recipe as recipes
from zo_engine import train as training
from zo_engine.apply import open_style
from zo_engine.hub import ModelError
from zo_engine.inspection import inspect
from zo_engine.journal import short
from zo_engine.models import Placement, code_hash, export_language_model, load_language_model, quantized_layers
from zo_engine.noise import directions
from zo_engine.probes import GainSpace, GroupSpace, Probes, central, evaluate
from zo_engine.recipe import Recipe
from zo_engine.scales import QUANTISED, ScaleError, find_scales, formats_of, prove_live
from zo_engine.style import make_method
from zo_engine.tasks.text import stack

# Every copy of the tiny model that is packed, by name: how, and what the recipe calls it
GPTQ = {
    "gptq": {},
    "gptq_v2": {"layout": "gptq_v2"},
    "asymmetric": {"symmetric": False},
    "asymmetric_v2": {"symmetric": False, "layout": "gptq_v2"},
    "desc_act": {"desc_act": True, "group": 32},
    "ragged": {"group": 48},
    "one_group": {"group": -1},
    "3_bit": {"bits": 3},
    "8_bit": {"bits": 8, "group": 128},
}
AQLM = {"2x8": {"codebooks": 2, "bits": 8}, "1x10": {"codebooks": 1, "bits": 10}}
PACKED = {**dict.fromkeys(GPTQ, "gptq"), **dict.fromkeys(AQLM, "aqlm")}
FORMATS = {"gptq": "gptq", "desc_act": "gptq", "2x8": "aqlm", "int8": "int8", "none": "none"}
ROWS = [{"text": f"{'fine' if i % 2 else 'dull'} {i}", "label": "good" if i % 2 else "bad"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "base", "qwen2")  # some layers have a bias


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """folder(name): the tiny model packed so, or plain. Not to be written to."""
    root = tmp_path_factory.mktemp("packed")

    @cache
    def made(name: str) -> Path:
        if name in GPTQ:
            return pack.gptq(base, root / name, **GPTQ[name])
        return pack.aqlm(base, root / name, rounds=1, **AQLM[name]) if name in AQLM else base

    return made


@pytest.fixture(scope="module")
def model(folder):
    """model(name): loaded. Shared: leave it as it was."""
    return cache(lambda name: load_language_model(folder(name), quantization=FORMATS.get(name) or PACKED[name]))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "remarks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def recipe(folder: Path, texts: Path, quantization: str, **settings) -> Recipe:
    return Recipe(**{
        "texts": str(texts), "model": str(folder), "quantization": quantization, "steps": 2, "batch_size": 2,
        "directions": 4, "depth": 0.5, "length": 100, "holdout": 0.25, "evaluate_items": 8, "preview_every": 0,
        "answer_tokens": 3, **settings,
    })  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(60).view(2, 30)).logits


def edit_config(folder: Path, **settings) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# What the formats define, written down a second time


def stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `bits` bits from a stream of 32-bit words along the first axis."""
    octets = np.ascontiguousarray(words.T).astype("<i4").view(np.uint8)
    unpacked = np.unpackbits(octets, axis=1, bitorder="little")
    return (unpacked.reshape(len(octets), -1, bits) @ (1 << np.arange(bits))).T


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """The weights [out, in] of a packed folder, in fp32, from the definitions of its format."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found = {}
    for name in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        scales = tensors[f"{name}.scales"].astype(np.float32)
        if settings["quant_method"] == "gptq":
            codes = stream(tensors[f"{name}.qweight"], settings["bits"])
            zeros = stream(tensors[f"{name}.qzeros"].T, settings["bits"]).T
            zeros = zeros + (settings["checkpoint_format"] == "gptq")
            group = tensors[f"{name}.g_idx"]
            weight = ((codes - zeros[group]).astype(np.float32) * scales[group]).T
        else:
            books, codes = tensors[f"{name}.codebooks"].astype(np.float32), tensors[f"{name}.codes"].astype(int)
            vectors = sum(books[k, codes[..., k] % books.shape[1], 0] for k in range(len(books)))
            weight = vectors.reshape(len(scales), -1) * scales.reshape(-1, 1)
        found[name] = torch.from_numpy(np.ascontiguousarray(weight))
    return found


def dense_copy(folder: Path, base: Path) -> nn.Module:
    """Stock transformers' plain model with the weights of a packed folder."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    saved = load_file(folder / "model.safetensors")
    for name, parameter in stock.named_parameters():
        if name in saved:
            parameter.data = saved[name].float()
    for name, weight in dequantised(folder).items():
        stock.get_submodule(name).weight.data = weight
    return stock.eval()


# Reading


@pytest.mark.parametrize("name", PACKED)
def test_every_layer_computes_what_its_format_defines(folder, model, name):
    expected = dequantised(folder(name))
    layers = quantized_layers(model(name))
    assert layers.keys() == expected.keys() and len(layers) == 28
    for layer in layers.values():
        assert layer.scales.dtype == torch.float32 and layer.scales.is_contiguous()
    for path, weight in expected.items():
        x = torch.eye(weight.shape[1])
        bias = layers[path].bias
        assert torch.equal(layers[path](x), weight.T if bias is None else weight.T + bias)


@pytest.mark.parametrize("name", PACKED)
def test_the_model_answers_as_a_plain_one_with_the_same_weights(folder, model, base, name):
    assert torch.equal(logits(model(name)), logits(dense_copy(folder(name), base)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_unpacked_in_any_width(bits):
    codes = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(0))
    words = pack._words(codes, bits)
    assert words.shape == (3 * bits, 5) and (words < 0).any()
    assert np.array_equal(stream(words.numpy(), bits), codes.numpy())
    assert torch.equal(packed.unpacked(words, bits), codes.byte())


def test_sixteen_bit_codes_are_stored_modulo_65536():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**15), 2**15, (16, 4, 1), generator=generator).short()
    books = torch.randn(1, 2**16, 1, 8, generator=generator).half()
    layer = packed.AQLMLinear(
        nn.Linear(32, 16, bias=False), torch.ones(16, 1), torch.float16, torch.float32, codes=codes, codebooks=books
    )
    expected = books[0, codes[..., 0].long() % 2**16, 0].reshape(16, 32).float()
    assert torch.equal(layer.dequantised(), expected)


def test_a_packed_copy_is_near_the_model_it_was_made_of(folder, base):
    exact = load_file(base / "model.safetensors")

    def error(name: str) -> float:
        found = dequantised(folder(name))
        return max(((w - exact[f"{n}.weight"]).square().sum() / w.square().sum()).item() for n, w in found.items())

    assert error("8_bit") < 1e-4 < error("gptq") < 0.02 < error("3_bit") < 0.06
    assert error("asymmetric") < error("gptq") * 1.05
    assert error("2x8") < 0.1 and error("1x10") < 0.3


def test_both_layouts_of_gptq_are_the_same_model(model):
    assert code_hash(model("gptq")) == code_hash(model("gptq_v2"))
    assert len({code_hash(model(name)) for name in ("gptq", "asymmetric", "desc_act", "2x8", "1x10", "none")}) == 6


def test_a_plain_model_has_a_hash_of_its_weights(model, tmp_path):
    other = tiny.language_model("qwen2", seed=1)
    assert code_hash(model("none")) == code_hash(tiny.language_model("qwen2")) != code_hash(other)


# Scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq", "desc_act", "2x8", "none"])
def test_every_layer_reacts_to_its_scales(folder, name, dtype):
    found = load_language_model(folder(name), quantization=FORMATS[name], dtype=dtype)
    before = code_hash(found)
    views = find_scales(found, formats_of(FORMATS[name]))
    prove_live(views)
    assert code_hash(found) == before
    assert logits(found).dtype == dtype


SPACES = {
    "gain": GainSpace,
    "gain with columns": partial(GainSpace, columns=True),
    "group": GroupSpace,
    "absolute": partial(GroupSpace, relative=False),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["gptq", "desc_act", "ragged", "2x8", "none"])
def test_a_stacked_batch_equals_writing_the_scales_probe_by_probe(model, name, space):
    found = model(name)
    views = find_scales(found, formats_of(PACKED.get(name) or FORMATS[name]))
    space = SPACES[space](dict(list(views.items())[-9:]))
    generator = torch.Generator().manual_seed(0)
    theta = 0.001 * torch.randn(space.layout.size, generator=generator)
    z = torch.randn(4, space.layout.size, generator=generator)
    given = torch.randint(0, 250, (4, 12), generator=generator)
    loss = lambda i: found(input_ids=given[i], use_cache=False).logits.square().mean((1, 2))  # noqa: E731
    probes = central(z, 0.001, 4, own=True)
    before = code_hash(found)
    torch.testing.assert_close(
        evaluate(space, theta, probes, loss), one_by_one(space, theta, probes, loss), rtol=2e-6, atol=1e-7
    )
    assert code_hash(found) == before


def test_weights_may_be_negative_and_scales_not(model):
    for name, signed in (("none", True), ("gptq", False), ("2x8", False)):
        space = GroupSpace(find_scales(model(name), formats_of(FORMATS[name])), relative=False)
        lowest = min(scale.min() for _, scale in space.scales(torch.full((space.layout.size,), -9.0)))
        assert lowest < -5 if signed else lowest == 0


def test_an_output_layer_that_is_the_embedding_stays_as_it_is(tmp_path):
    tied = tiny.language_model("llama", tied=True)
    free = tiny.language_model("llama")
    assert set(find_scales(free, ("dense",))) - set(find_scales(tied, ("dense",))) == {"lm_head"}


# MeZO


def test_plain_weights_in_the_absolute_form_are_mezo(base, texts, tmp_path):
    """MeZO (arXiv:2305.17333, algorithm 1) as it is published, in place, on the linear layers' weights."""
    eps, rate, steps, size = 1e-3, 1e-6, 12, 4
    settings = {"space": "absolute", "optimizer": "sgd", "noise": "gaussian", "depth": 1.0, "decay": 0.0, "clip": 1e9,
                "own_texts": 0.0}  # fmt: skip
    ours = recipe(base, texts, "none", eps=eps, step_size=rate, batch_size=size, directions=1, steps=steps, **settings)
    studio = training.prepare(ours, tmp_path)
    method, task, space = make_method(studio.space, ours), studio.task, studio.space
    found = []

    def losses(step: int, probes: Probes, fresh: bool) -> torch.Tensor:
        batch = task.batch(step, size)
        rows = evaluate(space, method.theta, probes, lambda i: task.losses(batch.take(i)))
        found.append(rows.view(2, -1).mean(1).tolist())
        return rows

    slopes = [method.advance(partial(losses, step), size, False).slopes[0] for step in range(steps)]

    plain = load_language_model(base, quantization="none")
    weights = {name: plain.get_submodule(name.removesuffix(".groups")).weight.data for name in space.layout.shapes}
    assert weights.keys() == {f"{n}.groups" for n, m in plain.named_modules() if type(m) is nn.Linear}
    theirs = training.Language(plain, task.train, task.held_out, seed=ours.seed, contrast=task.contrast)
    for step in range(steps):
        z = space.layout.split(directions("gaussian", space.layout, ours.seed, step, [step])[0])

        def move(by: float, z=z) -> None:
            for name, weight in weights.items():
                weight.add_(z[name], alpha=by)

        batch, pair = theirs.batch(step, size), []
        for by in (eps, -2 * eps):
            move(by)
            with torch.no_grad():
                pair.append(theirs.losses(batch).mean().item())
        move(eps)
        projected = (pair[0] - pair[1]) / (2 * eps)
        move(-rate * projected)
        assert found[step] == pytest.approx(pair, rel=2e-6)
        assert slopes[step] == pytest.approx(projected, rel=2e-2, abs=2e-2)  # a difference of nearly equal losses
    scales = dict(space.scales(method.theta))
    for view, scale in scales.items():
        torch.testing.assert_close(scale, weights[f"{view.name}.groups"], rtol=0, atol=2e-6)
    assert any((scale != view.base).any() for view, scale in scales.items()) and short(slopes[0]) == slopes[0]


# Training, from the command line to another library


@pytest.mark.parametrize("name", ["gptq", "2x8", "int8", "none"])  # nf4: test_text_train
def test_train_resume_apply_inspect_and_export(qzo, folder, base, texts, tmp_path, name):
    format, file, run, out = FORMATS[name], tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "exported"
    file.write_text(recipes.dump(recipe(folder(name), texts, format)))
    code, _, err = qzo("train", file, "--out", run)
    assert code == 0, err
    whole = (run / "journal.jsonl").read_text()
    assert qzo("train", file, "--out", tmp_path / "broken", "--steps", 1)[0] == 0
    (tmp_path / "broken" / "recipe.toml").write_text((run / "recipe.toml").read_text())
    assert qzo("resume", tmp_path / "broken")[0] == 0
    assert (tmp_path / "broken" / "journal.jsonl").read_text() == whole
    assert json.loads(qzo("inspect", run / "style.safetensors", "--json")[1])["code_hash"]

    answers = [json.loads(qzo("apply", run / f"{style}.safetensors", "fine 1", "--json")[1])[0]["answer"]
               for style in ("style", "style-journal")]  # fmt: skip
    assert answers[0] == answers[1]
    other = tiny.save_language_model(tmp_path / "other", "opt")
    wrong = {"gptq": partial(pack.gptq, group=32), "aqlm": partial(pack.aqlm, codebooks=1, bits=6, rounds=0)}
    other = wrong[format](other, tmp_path / "wrong") if format in wrong else other
    code, _, err = qzo("apply", run / "style.safetensors", "fine 1", "--model", other)
    assert code == 2 and "this style was made for" in err and err.count("\n") == 1

    assert qzo("export", run, out)[0] == 0
    facts = json.loads(qzo("inspect", out, "--json")[1])
    assert (facts["quantization"], facts["problem"]) == (format, None)
    styled = open_style(run, tmp_path)
    exported = load_language_model(out, quantization=format)
    assert code_hash(exported) != code_hash(styled.model)
    ours = logits(exported)
    with styled.at(1.0):
        same = logits(styled.model)
    if format in quantize.READ:  # scales were rounded to fp16
        torch.testing.assert_close(ours, same, rtol=0, atol=0.02)
        stock = dense_copy(out, base)
    else:
        assert torch.equal(ours, same)
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        for layer in quantized_layers(stock).values():
            layer.support_avx512bf16_for_cpu = False
    assert torch.equal(logits(stock), ours)
    assert not torch.equal(logits(styled.model), ours)


@pytest.mark.parametrize("space", ["group", "absolute"])
def test_codebooks_move_in_place_of_scales(qzo, folder, texts, tmp_path, space):
    run, out, file = tmp_path / "run", tmp_path / "exported", tmp_path / "recipe.toml"
    settings = {"moves": "codebooks", "space": space, "optimizer": "sgd", "steps": 3, "step_size": 1e-4, "depth": 1.0}
    file.write_text(recipes.dump(recipe(folder("2x8"), texts, "aqlm", **settings)))
    assert qzo("train", file, "--out", run)[0] == 0
    assert qzo("export", run, out)[0] == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder("2x8"), out))
    differ = {n for n in before if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])}
    styled = open_style(run, tmp_path)
    assert styled.space.layout.size == 28 * 2 * 256 * 8
    assert differ == {n for n in before if n.endswith(".codebooks")}
    with styled.at(1.0):
        same = logits(styled.model)
    assert {layer.codebooks.dtype for layer in quantized_layers(styled.model).values()} == {torch.float16}  # put back
    ours = logits(load_language_model(out, quantization="aqlm"))
    torch.testing.assert_close(ours, same, rtol=0, atol=0.02)  # rounded to fp16
    assert not torch.equal(logits(styled.model), ours)
    journal = [json.loads(qzo("apply", run / f"{style}.safetensors", "fine 1", "--json")[1])[0]["answer"]
               for style in ("style", "style-journal")]  # fmt: skip
    assert journal[0] == journal[1]


def test_codebooks_that_moved_stream_as_wide_as_they_are(folder, model):
    outcome = []
    for one in (model("2x8"), load_language_model(folder("2x8"), quantization="aqlm", placement=Placement(4, 1))):
        views = find_scales(one, ("codebooks",))
        for view in views.values():
            view.put(view.base.float() * 1.0001)  # less than fp16 tells
        moved = logits(one)
        for view in views.values():
            view.restore()
        outcome.append((moved, logits(one)))
    for resident, streamed in zip(*outcome, strict=True):
        assert torch.equal(resident, streamed)
    assert not torch.equal(*outcome[0])


def test_probes_of_codebooks_are_models_with_these_codebooks(folder, model):
    base = model("1x10")
    space = GroupSpace(find_scales(base, ("codebooks",)), relative=False)
    theta = 0.01 * torch.randn(space.layout.size, generator=torch.Generator().manual_seed(0))
    z = torch.randn(2, space.layout.size, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(20).view(2, 10)
    loss = lambda rows: base(input_ids=tokens[rows]).logits.square().mean((1, 2))  # noqa: E731
    probes = central(z, 0.05, 2, own=False)
    found, own = evaluate(space, theta, probes, loss), load_language_model(folder("1x10"), quantization="aqlm")
    parts = space.layout.split(theta + 0.05 * z[1])
    for name, layer in quantized_layers(own).items():
        layer.codebooks = layer.codebooks.float() + parts[f"{name}.groups"].view(layer.codebooks.shape)
    with torch.no_grad():
        expected = own(input_ids=tokens).logits.square().mean((1, 2))
    torch.testing.assert_close(found[2:4], expected, rtol=1e-5, atol=1e-6)
    assert (found[2:4] != found[:2]).all()


@pytest.mark.parametrize("wrong", [{"space": "gain"}, {"space": "group", "quantization": "gptq"}])
def test_codebooks_are_of_aqlm_and_no_gains(wrong):
    settings = {"moves": "codebooks", "quantization": "aqlm", "optimizer": "sgd", "texts": "x"}
    with pytest.raises(recipes.RecipeError, match='is for quantization "aqlm" in the space "group" or "absolute"'):
        Recipe(**settings | wrong)


def changed(model: nn.Module, formats: tuple[str, ...] = QUANTISED) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for view in find_scales(model, formats).values():
        view.put(view.base * (0.1 * torch.randn(view.base.shape, generator=generator)).exp())
    return model


@pytest.mark.parametrize("name", ["gptq", "desc_act", "2x8"])
def test_a_plan_of_a_packed_model_is_what_is_counted(folder, model, name):
    outline, loaded = plan.outlined(folder(name), PACKED[name], torch.float32), model(name)
    assert plan.sizes(outline)[1] == plan.sizes(loaded)[1]
    assert plan.sizes(outline)[0] == pytest.approx(plan.sizes(loaded)[0], rel=0.02)
    for space, optimizer in (("gain", "gauss-newton"), ("group", "sgd")):
        work = plan.Work(2, 30, None, 0.5, 3, torch.float32, space, optimizer)
        planned, counted = plan.step(outline, work, 4), plan.step(loaded, work, 4, "cpu", short=False)
        assert planned[0] == pytest.approx(counted[0], rel=0.05) and planned[1] == counted[1]


@pytest.mark.parametrize("name", ["gptq", "2x8"])
def test_packed_models_are_planned_by_the_command_and_for_a_run(qzo, folder, texts, tmp_path, name):
    code, out, _ = qzo("plan", folder(name), "--batch-size", 2, "--length", 30, "--rows", 4, "--json")
    found = json.loads(out)
    assert code == 0 and found["weights"] == plan.sizes(plan.outlined(folder(name), PACKED[name], torch.bfloat16))[0]
    studio = training.prepare(recipe(folder(name), texts, PACKED[name], memory="1GB"), tmp_path)
    assert any(note.startswith("planned for 1.00 GB") for note in studio.notes)


@pytest.mark.parametrize("name", ["gptq", "asymmetric_v2", "desc_act", "2x8"])
def test_an_export_is_the_original_but_for_its_scales(folder, tmp_path, name):
    source, out = folder(name), tmp_path / "out"
    (shutil.copytree(source, tmp_path / "in") / "quantize_config.json").write_text("{}")
    export_language_model(tmp_path / "in", changed(load_language_model(source, quantization=PACKED[name])), out)
    assert {f.name for f in out.iterdir()} == {f.name for f in (tmp_path / "in").iterdir()}
    same = [f.name for f in (tmp_path / "in").iterdir() if f.read_bytes() == (out / f.name).read_bytes()]
    assert {f.name for f in out.iterdir()} - set(same) == {"model.safetensors"} | (
        {"config.json"} if PACKED[name] == "aqlm" else set()
    )
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert before.keys() == after.keys()
    differ = {n for n in before if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])}
    assert differ == {n for n in before if n.endswith(".scales")}
    header = lambda f: (f / "model.safetensors").read_bytes()[:2000]  # noqa: E731
    assert header(source) == header(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq", "2x8"])
def test_an_export_has_the_final_norm_if_it_moved_and_leaves_its_bytes_if_not(folder, tmp_path, name, dtype):
    source = folder(name)
    before = load_file(source / "model.safetensors")["model.norm.weight"]
    source = Path(shutil.copytree(source, tmp_path / "in"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.7, 1.3, len(before)).to(before.dtype)  # not whole in bf16
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = load_language_model(source, quantization=PACKED[name], dtype=dtype)
    assert before.dtype == torch.float16 and model.model.norm.weight.dtype == dtype
    still = export_language_model(source, model, tmp_path / "still")
    assert (still / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    view = find_scales(model, formats_of(PACKED[name], final_norm=True))["model.norm"]
    view.put(view.base * torch.linspace(0.5, 2, len(before)))
    moved = export_language_model(source, model, tmp_path / "moved")
    after = load_file(moved / "model.safetensors")
    assert [n for n in after if not torch.equal(after[n], tensors[n])] == ["model.norm.weight"]
    view.put(view.live.half())  # as it was rounded for the file
    assert torch.equal(after["model.norm.weight"].to(dtype), view.live)
    again = load_language_model(moved, quantization=PACKED[name], dtype=dtype)
    assert torch.equal(logits(again), logits(model))


def test_shards_are_written_one_by_one(folder, tmp_path):
    source = Path(shutil.copytree(folder("gptq"), tmp_path / "in"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):  # scales lie apart from their codes
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, source / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    whole = changed(load_language_model(folder("gptq"), quantization="gptq"))
    model = changed(load_language_model(source, quantization="gptq"))
    out = export_language_model(source, model, tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) == 2
    assert torch.equal(logits(load_language_model(out, quantization="gptq")), rounded_logits(whole))


def rounded_logits(model: nn.Module) -> torch.Tensor:
    for layer in quantized_layers(model).values():
        layer.scales = layer.scales.to(layer.stored).float()
    return logits(model)


def as_older_packers(folder: Path, out: Path, shards: bool = False) -> Path:
    """The folder as AutoGPTQ wrote it: other names of files, and quantize_config.json in place of the config's part."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    kept = {name: settings[name] for name in ("bits", "group_size", "desc_act", "sym")}
    (out / "quantize_config.json").write_text(json.dumps(kept))
    name, tensors = f"gptq_model-{kept['bits']}bit-{kept['group_size']}g", load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    save_file({}, out / "gptq_model-8bit-128g.safetensors")  # another size beside it
    if not shards:
        save_file(tensors, out / f"{name}.safetensors", {"format": "pt"})
        return out
    index = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"{name}-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, out / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (out / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return out


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", ["gptq", "one_group"])
def test_the_names_that_gptq_packers_give_are_read_and_exported_as_transformers_calls_them(
    folder, model, tmp_path, name, shards
):
    old, out = as_older_packers(folder(name), tmp_path / "old", shards), tmp_path / "out"
    hub.check(old)
    read = load_language_model(old, quantization="gptq")
    assert torch.equal(logits(read), logits(model(name))) and inspect(old)["quantization"] == "gptq"
    export_language_model(old, changed(read), out)
    index = ["model.safetensors.index.json"]
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] + index if shards else ["model.safetensors"]
    assert sorted(f.name for f in out.iterdir() if "safetensors" in f.name) == files
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert torch.equal(logits(load_language_model(out, quantization="gptq")), rounded_logits(read))


def test_names_of_gptq_packers_are_for_gptq_of_that_size_alone(folder, tmp_path):
    old = as_older_packers(folder("gptq"), tmp_path / "old")
    (old / "gptq_model-4bit-64g.safetensors").unlink()
    with pytest.raises(ModelError, match="has gptq_model-8bit-128g.safetensors, but its config says 4bit-64g"):
        hub.check(old)
    (old / "quantize_config.json").unlink()
    with pytest.raises(ModelError, match="does not say that it is quantised by gptq"):
        hub.check(old)
    both = ["config.json", "model.safetensors", "gptq_model-4bit-128g.safetensors", "quantize_config.json"]
    assert hub.wanted_files(both) == ["config.json", "model.safetensors", "quantize_config.json"]
    assert hub.wanted_files([*both[:1], *both[2:]]) == sorted([*both[:1], *both[2:]])


def test_a_scale_too_large_for_its_file_is_refused(folder, tmp_path):
    model = load_language_model(folder("gptq"), quantization="gptq")
    layer = next(iter(quantized_layers(model).values()))
    layer.scales = layer.scales * 1e9
    with pytest.raises(ModelError, match="too large for the F16 that it is saved in"):
        export_language_model(folder("gptq"), model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_aqlm_export_says_which_layers_are_plain_in_both_ways(folder, tmp_path):
    assert json.loads((folder("2x8") / "config.json").read_text())["quantization_config"][
        "linear_weights_not_to_quantize"
    ] == ["lm_head.weight"]
    out = export_language_model(folder("2x8"), load_language_model(folder("2x8"), quantization="aqlm"), tmp_path / "o")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["linear_weights_not_to_quantize"] == ["lm_head.weight", "lm_head"]


# The formats' own packages, where they are installed


def test_gptqmodel_computes_the_same(folder, tmp_path, monkeypatch):
    pytest.importorskip("gptqmodel")
    from transformers import GPTQConfig

    out = export_language_model(
        folder("desc_act"), changed(load_language_model(folder("desc_act"), quantization="gptq")), tmp_path / "out"
    )
    how = GPTQConfig(bits=4, backend="gptq_torch")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu", quantization_config=how)
    layers = [m for m in stock.modules() if hasattr(m, "qweight")]
    assert len(layers) == 28
    ours = logits(load_language_model(out, quantization="gptq"))
    torch.testing.assert_close(logits(stock), ours, rtol=0, atol=0.02)  # it multiplies in fp16
    for layer in layers:
        layer.scales = layer.scales.float()
        layer.clear_weight_cache()
    torch.testing.assert_close(logits(stock), ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("formats", [("aqlm",), ("codebooks",)])
@pytest.mark.parametrize("name", AQLM)
def test_aqlm_computes_the_same(folder, tmp_path, name, formats):
    pytest.importorskip("aqlm")
    numba = pytest.importorskip("numba")
    numba.set_num_threads(1)  # its kernel for 2x8 has a data race
    model = changed(load_language_model(folder(name), quantization="aqlm"), formats)
    out = export_language_model(folder(name), model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu")
    ours = logits(load_language_model(out, quantization="aqlm"))
    torch.testing.assert_close(logits(stock), ours, rtol=1e-4, atol=1e-4)


# What can be wrong with a folder


BROKEN = {
    "another method": (lambda f: edit_config(f, quant_method="awq"), "quantised by 'awq'; possible are bitsandbytes"),
    "made for one kernel": (lambda f: edit_config(f, checkpoint_format="marlin"), "'marlin', made for one kernel"),
    "other group size": (lambda f: edit_config(f, group_size=16), "has the shape"),
    "no scales": (lambda f: edit(f, lambda t: t.pop(LAYER + "scales")), "lacks .*q_proj.scales"),
    "no order of groups": (
        lambda f: (edit_config(f, desc_act=True), edit(f, lambda t: t.pop(LAYER + "g_idx"))),
        "lacks .*q_proj.g_idx",
    ),
    "a group too many": (lambda f: edit(f, lambda t: t[LAYER + "g_idx"].fill_(7)), "names a group that is not there"),
    "5 bits": (
        lambda f: edit(f, lambda t: t.update({LAYER + "qweight": torch.zeros(10, 64, dtype=torch.int32)})),
        "not packed as GPTQ packs 2, 3, 4, 8 bits",
    ),
    "a bias": (lambda f: edit(f, lambda t: t.update({O_PROJ + "bias": torch.ones(64)})), "o_proj.bias, which its"),
    "a lost tensor": (lambda f: edit(f, lambda t: t.update(odd=torch.zeros(1))), "has odd, which"),
}
LAYER, O_PROJ = "model.layers.0.self_attn.q_proj.", "model.layers.0.self_attn.o_proj."


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_gptq_folder_is_refused_in_one_sentence(folder, tmp_path, case):
    spoil, sentence = BROKEN[case]
    mine = Path(shutil.copytree(folder("gptq"), tmp_path / "mine"))
    spoil(mine)
    with pytest.raises(ModelError, match=sentence) as error:
        load_language_model(mine, quantization="gptq")
    assert "\n" not in str(error.value)


def test_a_broken_aqlm_folder_is_refused(folder, tmp_path):
    mine = Path(shutil.copytree(folder("2x8"), tmp_path / "mine"))
    edit(mine, lambda t: t.update({LAYER + "codebooks": torch.zeros(2, 256, 4, 8).half()}))
    with pytest.raises(ModelError, match=r"codebooks of .*q_proj have the shape \[2, 256, 4, 8\]; possible are"):
        load_language_model(mine, quantization="aqlm")


def test_what_older_packers_left_behind_is_no_error(folder, model, tmp_path):
    mine = Path(shutil.copytree(folder("gptq"), tmp_path / "mine"))
    left = {O_PROJ + "bias": torch.zeros(64).half(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit(mine, lambda t: t.update(left))
    assert torch.equal(logits(load_language_model(mine, quantization="gptq")), logits(model("gptq")))


@pytest.mark.parametrize("name", ["gptq", "2x8"])
def test_the_format_of_a_folder_must_be_named(folder, base, name):
    with pytest.raises(ModelError, match=rf"already quantised \({PACKED[name]}\), .* set it to '{PACKED[name]}'"):
        load_language_model(folder(name), quantization="nf4")
    with pytest.raises(ModelError, match="cannot be here; give a folder that is, or set quantization to one of nf4"):
        load_language_model(base, quantization=PACKED[name])
    assert inspect(folder(name))["quantization"] == PACKED[name] and inspect(base)["quantization"] == "none"


def test_layers_of_another_kernel_are_named():
    class MarlinLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(1))

    with pytest.raises(ScaleError, match="the layers here are MarlinLinear"):
        find_scales(nn.Sequential(MarlinLinear()))


class KeepingLinear(packed.GPTQLinear):
    """What fast kernels do: the weight is made at the first forward and kept."""

    def dequantised(self):
        if not hasattr(self, "kept"):
            self.kept = super().dequantised()
        return self.kept


def test_a_kernel_that_keeps_its_scales_is_caught_by_name(folder):
    found = load_language_model(folder("gptq"), quantization="gptq")
    quantized_layers(found)["model.layers.3.mlp.down_proj"].__class__ = KeepingLinear
    with pytest.raises(ScaleError, match=r"down_proj: .*KeepingLinear \(gptq\) does not react to a changed scale"):
        prove_live(find_scales(found))


def test_a_batch_of_the_task_runs_in_every_format(model, texts, folder, tmp_path):
    for name, format in FORMATS.items():
        studio = training.prepare(recipe(folder(name), texts, format), tmp_path)
        assert torch.isfinite(studio.task.losses(stack(studio.task.held_out))).all()

"""Offloading: streamed equals resident bit for bit, whatever the slots and the tier; what moves, and in which order."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import test_text_train
import test_train
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_probes import BATCH, SPACES, probes_of, sd3_loss, some_theta
from test_train import go
from torch import nn

from zo_engine import models, offload, plan
from zo_engine import train as training
from zo_engine.apply import open_style
from zo_engine.blocks import Level, Prefix, levels
from zo_engine.models import Placement
from zo_engine.narrow import FORMS
from zo_engine.newton import GaussNewton
from zo_engine.offload import Mover, OffloadError, block_names, tensors
from zo_engine.probes import Evaluations, GainSpace, GroupSpace, evaluate
from zo_engine.recipe import Recipe, RecipeError
from zo_engine.scales import find_scales, prove_live
from zo_engine.style import make_method, make_space
from zo_engine.tasks.text import stack, token_features, token_losses
from zo_engine.tokens import Tokens

pytestmark = pytest.mark.usefixtures("few_own_texts")


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "model", tied=True)


@pytest.fixture
def streamed(language_folder, tmp_path):
    """streamed(away, slots, disk): the tiny Llama, its first blocks away."""

    def load(away=4, slots=2, disk=False, quantization="nf4", folder=language_folder):
        placement = Placement(away, slots, tmp_path / "store" if disk else None)
        return models.load_language_model(folder, quantization=quantization, placement=placement)

    return load


def modules(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in model.mover.blocks]


def texts(count=3) -> object:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (count, 12), generator=generator).tolist()
    return stack([Tokens(tuple(row), tuple(row), rivals=((7, (3, 102)), (9, (4,)))) for row in ids])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=texts().tokens, use_cache=False).logits


def gauss_newton(model: nn.Module, chunk: int = 4, relay=(), steps: int = 2) -> tuple[list, torch.Tensor]:
    """Two steps as training makes them: the journal and theta."""
    views = find_scales(model)
    found = levels(views, 0.5)
    space = GainSpace({name: views[name] for level in found for name in level.layers})
    parts = [space.layout.part(level.layers) for level in found]
    method = GaussNewton(space.layout, parts, seed=3, per_part=[6] * len(parts))
    prefixes = [Prefix(model, level) for level in found]
    batch, journal = texts(2), []
    for _ in range(steps):
        run = Evaluations(space, method.theta, prefixes, chunk, relay)

        def outcomes(level, probes, fresh, run=run):
            read = token_losses if fresh else token_features
            found = run(lambda some: read(model, some), [batch], probes, level)
            return found[:, None] if fresh else found

        journal.append(method.advance(outcomes, 2, 2))
    return journal, method.theta


def test_the_blocks_are_found_by_themselves(transformer, language_folder):
    assert block_names(transformer("nf4")) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert block_names(models.load_language_model(language_folder))[-1] == "model.layers.3"
    with pytest.raises(OffloadError, match="no list of blocks 'layers'; it has transformer_blocks"):
        block_names(transformer("nf4"), ["layers"])
    with pytest.raises(OffloadError, match="Linear has no list of blocks"):
        block_names(nn.Linear(2, 2))


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("away", "slots"), [(4, 1), (4, 2), (4, 3), (4, 9), (2, 2), (1, 2)])
def test_a_streamed_model_answers_bit_for_bit(streamed, language_folder, away, slots, disk):
    expected = logits(models.load_language_model(language_folder))
    model = streamed(away, slots, disk)
    for _ in range(3):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("disk", [False, True])
def test_every_format_and_a_pipeline_stream(tiny_folder, transformer, tmp_path, quantization, disk):
    placement = Placement(2, 1, tmp_path if disk else None)
    model = models.load_transformer(tiny_folder, quantization=quantization, placement=placement)
    with torch.no_grad():
        found, expected = (m(**tiny.inputs(), return_dict=False)[0] for m in (model, transformer(quantization)))
    assert torch.equal(found, expected)
    assert models.code_hash(model) == models.code_hash(transformer(quantization))
    prove_live(find_scales(model))


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize(("away", "slots", "disk"), [(4, 1, False), (4, 2, False), (3, 2, False), (4, 2, True)])
def test_training_streamed_writes_the_same_journal(streamed, language_folder, away, slots, disk, relay):
    journal, theta = gauss_newton(models.load_language_model(language_folder))
    model = streamed(away, slots, disk)
    found, moved = gauss_newton(model, relay=modules(model) if relay else ())
    assert found == journal
    assert torch.equal(moved, theta)
    assert theta.abs().sum() > 0


@pytest.mark.parametrize("space", SPACES)
def test_every_space_streams(transformer, tiny_folder, space):
    model = models.load_transformer(tiny_folder, placement=Placement(2, 1))
    outcome = []
    for one in (transformer("nf4"), model):
        made = SPACES[space](find_scales(one))
        theta, probes = some_theta(made), probes_of(made)
        losses = evaluate(made, theta, probes, sd3_loss(one), 4)
        with made.folded(theta):
            folded = sd3_loss(one)(torch.arange(BATCH))
        outcome.append((losses, folded, sd3_loss(one)(torch.arange(BATCH))))
    for resident, streamed in zip(*outcome, strict=True):
        assert torch.equal(resident, streamed)
    assert not torch.equal(outcome[1][1], outcome[1][2])  # what is folded is not mistaken for what was in the slot


@pytest.mark.parametrize(
    ("space", "how"),
    [
        ("group", {"optimizer": "sgd"}),
        ("group", {"optimizer": "adam", "noise": "gaussian"}),
        ("absolute", {"optimizer": "momentum", "eps": 1e-3}),
    ],
)
@pytest.mark.parametrize(("away", "slots", "disk"), [(4, 1, False), (2, 2, False), (4, 2, True)])
def test_theta_that_waits_at_home_is_the_same_theta(streamed, language_folder, space, how, away, slots, disk):
    asked = Recipe(space=space, depth=0.5, batch_size=2, directions=2, **how)
    outcome, brought = [], []
    for model in (models.load_language_model(language_folder), streamed(away, slots, disk)):
        bring = models.bring_of(model)
        made = make_space(find_scales(model), asked, bring)
        if bring:
            made.bring = lambda part: brought.append(part.numel()) or bring(part)  # noqa: B023
        method, batch = make_method(made, asked, made.home("cpu")), texts(2)

        def losses(probes, fresh, method=method, made=made, model=model, batch=batch):
            rows = lambda sample: token_losses(model, batch.take(sample))  # noqa: E731
            return evaluate(made, method.theta, probes, rows, 3, relay=model.mover.relay if made.bring else ())

        journal = [method.advance(losses, 2, False) for _ in range(3)]
        with made.folded(method.theta):
            outcome.append((journal, method.state()[0], logits(model)))
    (journal, tensors, answered), (found, moved, same) = outcome
    assert found == journal and torch.equal(same, answered)
    assert all(torch.equal(moved[name], tensors[name]) for name in tensors) and tensors["theta"].any()
    assert brought and max(brought) == max(made.layout.numel.values())  # a layer at a time


def test_a_scale_replaced_at_home_reaches_a_block_that_is_in_its_slot(streamed):
    model = streamed(4, 9)
    before = logits(model)
    view = find_scales(model)["model.layers.2.mlp.up_proj"]
    loads, moved = model.mover.loads, model.mover.moved
    view.put(view.base * 1.5)
    changed = logits(model)
    assert not torch.equal(changed, before)
    assert (model.mover.loads, model.mover.moved - moved) == (loads, view.base.nbytes)
    view.restore()
    assert torch.equal(logits(model), before)


def test_blocks_arrive_before_they_are_needed_also_across_passes(streamed):
    model = streamed(4, 2)
    mover = model.mover
    sizes = [sum(place.home.nbytes for place in block.places) for block in mover.blocks]
    logits(model)
    assert (mover.visits, mover.waits, mover.loads) == (4, 1, 5)  # the fifth is the next pass's first
    logits(model)
    assert (mover.visits, mover.waits, mover.loads) == (8, 1, 9)
    assert mover.moved == 2 * sum(sizes) + sizes[0]
    assert mover.size == 2 * max(block.size for block in mover.blocks)


def test_one_slot_loads_at_every_visit_and_enough_slots_once(streamed):
    one, enough = streamed(4, 1), streamed(4, 4)
    for model in (one, enough):
        logits(model)
        logits(model)
    assert (one.mover.loads, one.mover.waits) == (8, 8)
    assert (enough.mover.loads, enough.mover.waits) == (4, 1)


def test_a_relay_brings_each_block_once_for_all_passes(streamed):
    model = streamed(4, 2)
    space = GainSpace(find_scales(model))
    batch, theta = texts(), some_theta(space)
    probes = probes_of(space, count=9)
    rows = lambda sample: token_losses(model, batch.take(sample))  # noqa: E731
    found = {}
    for relay in ((), modules(model)):
        before = model.mover.loads
        found[bool(relay)] = evaluate(space, theta, probes, rows, 2, relay=relay), model.mover.loads - before
    assert torch.equal(found[False][0], found[True][0])
    assert found[False][1] > 9 * 4 - 2 and found[True][1] <= 4 + 1


def test_at_home_between_visits_whatever_happens(streamed):
    model = streamed(4, 2)
    homes = [(place, place.tensor.data_ptr()) for block in model.mover.blocks for place in block.places]
    slots = [(s.buffer.data_ptr(), s.buffer.data_ptr() + s.buffer.nbytes) for s in model.mover.slots]
    inside = []

    def look(module, args):
        inside.append(any(a <= module.weight.quant_state.absmax.data_ptr() < b for a, b in slots))
        raise KeyError("inside")

    hook = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(look)
    with pytest.raises(KeyError, match="inside"):
        logits(model)
    hook.remove()
    assert inside == [True]
    assert all(place.tensor.data_ptr() == home for place, home in homes)
    expected = logits(model)
    model.mover.close()
    assert torch.equal(logits(model), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


# What stands at the two ends of a language model


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """ended(kind, away, disk, tied): a tiny model, and the same with its ends away, its vocabulary in five pieces."""
    monkeypatch.setattr(offload, "PIECE", 64 * 64)

    def load(kind="llama", away=4, disk=False, tied=True, quantization="nf4"):
        folder = tiny.save_language_model(tmp_path / f"{kind}-{tied}", kind, tied=tied)
        placement = Placement(away, 2, tmp_path / "store" if disk else None, ends=True)
        return [
            models.load_language_model(folder, quantization=quantization, placement=p) for p in (Placement(), placement)
        ]

    return load


@pytest.mark.parametrize("kind", sorted(tiny.LANGUAGE_MODELS))
def test_ends_that_wait_change_no_number(ended, kind):
    resident, away = ended(kind, tied=kind not in ("phi", "phi3"))
    batch = texts()
    for read in (token_losses, token_features):
        assert torch.equal(read(away, batch), read(resident, batch))
    assert torch.allclose(logits(away), logits(resident), atol=1e-6)
    assert len(away.mover.blocks) == 4 + 5
    assert away.mover.loads >= 2 * 9


@pytest.mark.parametrize(
    ("away", "disk", "tied"), [(4, False, True), (0, False, False), (3, True, True), (4, True, False)]
)
def test_training_with_ends_away_writes_the_same_journal(ended, away, disk, tied):
    resident, moved = ended("llama", away, disk, tied)
    journal, theta = gauss_newton(resident)
    found, there = gauss_newton(moved, relay=moved.mover.relay)
    assert found == journal
    assert torch.equal(there, theta)
    assert theta.abs().sum() > 0


def test_logits_by_pieces_are_the_logits_at_once(ended, monkeypatch):
    resident, _ = ended()
    batch = texts()
    pieces = token_losses(resident, batch), token_features(resident, batch), token_features(resident, batch, 400)
    monkeypatch.setattr(offload, "PIECE", 1 << 25)
    whole = token_losses(resident, batch), token_features(resident, batch), token_features(resident, batch, 400)
    for one, other in zip(pieces, whole, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_plain_model_whose_output_layer_is_tuned_streams(ended):
    outcome = []
    for model in ended(quantization="none", tied=False):
        space = GroupSpace(find_scales(model, ("dense",)), relative=False)
        prove_live(space.views)
        theta, probes, batch = some_theta(space), probes_of(space, count=3), texts()
        outcome.append(evaluate(space, theta, probes, lambda index: token_losses(model, batch.take(index)), 2))  # noqa: B023
    assert torch.equal(*outcome)


def test_a_model_with_ends_away_answers_exports_and_closes(ended, tmp_path):
    resident, away = ended()
    ask = {"input_ids": texts().tokens, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(away.generate(**ask), resident.generate(**ask))
    assert away.lm_head.weight is away.model.embed_tokens.weight
    assert models.code_hash(away) == models.code_hash(resident)
    out = models.export_language_model(tmp_path / "llama-True", away, tmp_path / "out")
    assert torch.equal(logits(models.load_language_model(out)), logits(resident))
    away.mover.close()
    assert type(away) is type(resident)
    assert torch.equal(logits(away), logits(resident))


def test_what_two_blocks_share_stays_on_the_device():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
            self.layers[1][0].weight = self.layers[0][0].weight

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model, x = Twice().requires_grad_(False), torch.ones(1, 4)
    expected = model(x)
    mover = Mover(model, block_names(model), "cpu", 1)
    assert torch.equal(model(x), expected)
    assert [len(block.places) for block in mover.blocks] == [3, 3]


def test_from_disk_blocks_are_pages_of_files_written_once(streamed, language_folder, tmp_path):
    model = streamed(4, 2, disk=True)
    store, lock = sorted((tmp_path / "store").iterdir())
    assert lock.name == f"{store.name}.lock"
    written = {file: file.stat().st_mtime_ns for file in store.iterdir()}
    assert len(list(store.glob("*.safetensors"))) == 4 + 1  # a shard a block, and what is outside of them
    shard = load_file(sorted(store.glob("*.safetensors"))[2])
    assert torch.equal(shard["model.layers.2.mlp.up_proj.weight"], model.model.layers[2].mlp.up_proj.weight.data)
    again = streamed(4, 2, disk=True)
    assert {file: file.stat().st_mtime_ns for file in store.iterdir()} == written
    assert models.code_hash(again) == models.code_hash(models.load_language_model(language_folder))
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(store) in mapped.read_text()


@pytest.mark.parametrize(("dtype", "copied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_plain_blocks_are_pages_of_files_in_the_dtype_that_computes(language_folder, tmp_path, dtype, copied):
    how = {"quantization": "none", "dtype": dtype}
    model = models.load_language_model(language_folder, placement=Placement(4, 2, tmp_path / "store"), **how)
    (_, *copies) = sorted((tmp_path / "store").iterdir(), key=lambda path: path.is_dir())
    assert [path.is_dir() for path in copies] == [True] * copied
    assert torch.equal(logits(model), logits(models.load_language_model(language_folder, **how)))
    folder, first = (copies or [language_folder])[0], model.model.layers[0].mlp.up_proj.weight.data_ptr()
    if (maps := Path("/proc/self/maps")).exists():
        rows = [line.split() for line in maps.read_text().splitlines()]
        inside = [r for r in rows if int(r[0].split("-")[0], 16) <= first < int(r[0].split("-")[1], 16)]
        assert inside[0][-1].startswith(str(folder))


@pytest.mark.parametrize("held", [1, 3, 4])
def test_some_blocks_wait_in_memory_and_some_in_files(language_folder, tmp_path, held):
    journal, theta = gauss_newton(models.load_language_model(language_folder))
    model = models.load_language_model(language_folder, placement=Placement(4, 2, tmp_path / "store", held=held))
    packed = [block.pack is not None for block in model.mover.blocks]
    assert packed == [False] * (4 - held) + [True] * held
    assert model.mover.relay == modules(model)[: 4 - held]
    found, moved = gauss_newton(model, relay=model.mover.relay)
    assert found == journal and torch.equal(moved, theta)


def test_an_exported_streamed_model_is_the_resident_one(streamed, language_folder, tmp_path):
    out = models.export_language_model(language_folder, streamed(), tmp_path / "out")
    assert torch.equal(logits(models.load_language_model(out)), logits(models.load_language_model(language_folder)))
    mapped = streamed(disk=True, folder=out)  # quantised already: no copy is made
    assert [file.suffix for file in (tmp_path / "store").iterdir()] == [".lock"]
    assert torch.equal(logits(mapped), logits(models.load_language_model(language_folder)))


def test_tensors_that_share_memory_are_one_place():
    layer = nn.Linear(3, 3)
    layer.register_buffer("same", layer.weight.data)
    assert sorted(len(place.holders) for place in tensors(layer)) == [1, 2]


def test_a_level_in_a_model_whose_blocks_stream_counts_its_prefix_once(streamed):
    model = streamed(4, 2)
    prefix = Prefix(model, Level((), "model.layers", 2))
    batch = texts(4)
    rows = lambda sample: token_losses(model, batch.take(sample))  # noqa: E731
    for relay, most in (((), 4 * 2 + 2), (modules(model), 2 + 2)):
        before = model.mover.loads
        prefix.run(rows, 4, 1, relay)
        assert model.mover.loads - before <= most


# Plain weights that travel in fewer bits


def rounded(model: nn.Module, form: str, source: nn.Module) -> nn.Module:
    """A resident plain model with the weights of `source`, rounded row by row as the form's definition has it."""
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or not name.startswith("model.layers."):
            continue
        rows = []
        for row in source.get_submodule(name).weight.data:
            factor = 2.0 ** math.ceil(math.log2(row.abs().max().item() / 448)) if form == "fp8" else 1.0
            rows.append((row / factor).to(FORMS[form]).float() * factor)
        layer.weight.data = torch.stack(rows).to(layer.weight.dtype)
    return model


@pytest.mark.parametrize(
    ("form", "away", "slots", "disk", "dtype"),
    [
        ("fp8", 4, 1, False, torch.float32),
        ("fp8", 4, 2, True, torch.bfloat16),
        ("bf16", 2, 9, False, torch.float32),
        ("bf16", 4, 2, True, torch.float32),
    ],
)
def test_weights_that_travel_narrow_compute_as_if_rounded(language_folder, tmp_path, form, away, slots, disk, dtype):
    load = lambda **how: models.load_language_model(language_folder, quantization="none", **{"dtype": dtype} | how)  # noqa: E731
    plain, expected = logits(load()), rounded(load(), form, load(dtype=torch.float32))
    placement = Placement(away, slots, tmp_path / "store" if disk else None)
    narrow = [load(transport=form, placement=placement), load(transport=form)]
    assert models.code_hash(narrow[0]) == models.code_hash(narrow[1])
    assert not torch.equal(logits(expected), plain)
    if disk:
        assert load(transport=form, placement=placement).mover.from_disk  # the copy is read again
    outcome = []
    for model in (expected, *narrow):
        views = find_scales(model, ("dense",))
        prove_live(views)
        found = [logits(model)]
        for space in (GainSpace(views), GroupSpace(views, relative=False)):
            theta, probes, batch = some_theta(space), probes_of(space, count=3), texts()
            rows = lambda index: token_losses(model, batch.take(index))  # noqa: B023, E731
            found.append(evaluate(space, theta, probes, rows, 4))
            with space.folded(theta):
                found += [logits(model), logits(model)]
            found.append(logits(model))
        outcome.append(found)
    for one in outcome[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, outcome[0], strict=True))


@pytest.mark.parametrize(("form", "share"), [("bf16", 1 / 2), ("fp8", 1 / 4)])
def test_what_waits_narrow_takes_and_moves_fewer_bytes(language_folder, form, share):
    load = lambda **how: models.load_language_model(language_folder, quantization="none", **how)  # noqa: E731
    whole, narrow = (load(transport=t, placement=Placement(4, 2)) for t in ("whole", form))
    for model in (whole, narrow):
        logits(model)
    assert narrow.mover.loads == whole.mover.loads
    for count in (lambda m: m.moved, lambda m: m.size, lambda m: sum(b.size for b in m.blocks)):
        assert share <= count(narrow.mover) / count(whole.mover) <= share + 0.03
    config = json.loads((language_folder / "config.json").read_text())
    outline = plan.skeleton(config, "none", torch.float32, form)
    assert plan.sizes(outline)[1] == plan.sizes(load(transport=form))[1]


def test_an_exported_narrow_model_is_whole(language_folder, tmp_path):
    load = lambda folder, **how: models.load_language_model(folder, quantization="none", **how)  # noqa: E731
    model = load(language_folder, transport="fp8", placement=Placement(4, 2))
    space = GroupSpace(find_scales(model, ("dense",)), relative=False)
    with space.folded(some_theta(space)):
        out, expected = models.export_language_model(language_folder, model, tmp_path / "out"), logits(model)
    assert torch.equal(logits(load(out)), expected)


def test_what_cannot_travel_narrow_is_refused(recipes, tmp_path):
    with pytest.raises(RecipeError, match='those of quantization "nf4" travel as they are'):
        dataclasses.replace(recipes["texts"], transport="fp8")
    plain = dataclasses.replace(recipes["texts"], transport="fp8", quantization="none")
    with pytest.raises(RecipeError, match="is for blocks that stream, and here none do"):
        training.prepare(plain, tmp_path)


@pytest.mark.parametrize("what", ["pictures", "texts"])
def test_a_run_whose_weights_travel_narrow_goes_on_as_it_began(recipes, what, tmp_path):
    read = {"pictures": test_train.results, "texts": test_text_train.results}[what]
    asked = dataclasses.replace(recipes[what], quantization="none", transport="fp8", offload="cpu")
    whole = go(training.prepare(asked, tmp_path / "cache"), tmp_path / "whole")
    other = dataclasses.replace(asked, offload="disk")
    go(training.prepare(asked, tmp_path / "cache"), tmp_path / "parts", stop_after=1)
    parts = go(training.prepare(other, tmp_path / "cache"), tmp_path / "parts")
    assert read(parts) == read(whole)
    styled = open_style(whole.style_file, tmp_path / "cache", asked.model)  # its recipe says how, without offload
    assert not hasattr(styled.model, "mover")
    planned = dataclasses.replace(asked, offload="auto", memory="1GB")
    assert training.prepare(planned, tmp_path / "cache").code_hash == styled.style.base["code_hash"]


# Text encoders


def safetensors_dtypes(folder) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("folder", ["tiny", "embedded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_encoders_that_stream_encode_bit_for_bit(tiny_folder, folder, dtype, tmp_path):
    """From host memory, and from the files of T5 or, where those are in another dtype, of a copy."""
    folder = tiny_folder if folder == "tiny" else models.locate("tiny-sd3")
    length, outcome = models.text_length(folder), []
    for store in (None, tmp_path, None):
        encoders = models.load_text_encoders(folder, dtype=dtype, streamed=bool(outcome), store=outcome and store)
        with torch.no_grad():
            given = [
                encoders.encode_prompt(p, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
                for p in ("a red sun", "", "a much longer caption of a bell")
            ]
        outcome.append([t for prompt, _, pooled, _ in given for t in (prompt, pooled)])
        if outcome[1:] and store:
            assert encoders.text_encoder_3.mover.from_disk
            there = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
            # in fp16, some of T5 computes in fp32
            copied = dtype == torch.float16 or safetensors_dtypes(folder / "text_encoder_3") != {there}
            assert bool(list(tmp_path.glob("*/*.safetensors"))) == copied
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outcome, strict=True))
    movers = [encoders.text_encoder.mover, encoders.text_encoder_2.mover, encoders.text_encoder_3.mover]
    t5 = encoders.text_encoder_3
    assert [block.name for block in movers[2].blocks] == [f"encoder.block.{i}" for i in range(len(t5.encoder.block))]
    assert all(mover.visits == 3 * len(mover.blocks) and len(mover.slots) <= 2 for mover in movers)
    away = sum(block.size for block in movers[2].blocks)
    assert (
        sum(p.nbytes for p in t5.parameters())
        <= away + t5.shared.weight.nbytes + t5.encoder.final_layer_norm.weight.nbytes
    )


def test_text_encoders_stream_where_memory_is_less_or_offload_says_so(tiny_folder):
    size = models.text_bytes(tiny_folder)
    cases = {(0, False): False, (0, True): True, (size + 1, False): False, (size - 1, False): True}
    for (memory, asked), streams in cases.items():
        held, load = models.encoders_for(tiny_folder, torch.device("cpu"), torch.float32, memory, asked)
        assert held == "none"  # so that what is cached serves both
        assert hasattr(load().text_encoder_3, "mover") == streams


# A whole run

data, recipe = test_train.data, test_train.recipe  # fixtures: ten pictures, and what to do with them


@pytest.fixture(scope="module")
def recipes(recipe, tmp_path_factory) -> dict[str, Recipe]:
    """Two steps of pictures, and of texts."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test_text_train.ROWS))
    model = tiny.save_language_model(folder / "model")
    shorter = {"steps": 2, "directions": 3, "evaluate_every": 2, "batch_size": 2, "rows": 4}
    return {
        "pictures": dataclasses.replace(recipe, **shorter),
        "texts": Recipe(texts=str(folder / "texts.jsonl"), model=str(model), depth=0.5, length=100, evaluate_items=8,
                        answer_tokens=3, preview_every=0, **shorter),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "changes"),
    [("pictures", {}), ("texts", {}), ("texts", {"space": "group", "optimizer": "adam", "directions": 1})],
)
def test_a_streamed_run_is_the_resident_run(recipes, what, changes, tmp_path, monkeypatch):
    recipes = {what: dataclasses.replace(recipes[what], **changes)}
    read = {"pictures": test_train.results, "texts": test_text_train.results}[what]
    resident = go(training.prepare(recipes[what], tmp_path / "cache"), tmp_path / "resident")
    for tier in ("cpu", "disk"):
        asked = dataclasses.replace(recipes[what], offload=tier)
        studio = training.prepare(asked, tmp_path / "cache")
        run = go(studio, tmp_path / tier, stop_after=1)
        assert studio.model.mover.loads > 0
        assert read(go(training.prepare(asked, tmp_path / "cache"), tmp_path / tier)) == read(resident)
    styled = open_style(run.path, tmp_path / "cache")
    assert styled.model.mover.from_disk
    assert open_style(resident.path, tmp_path / "cache").model.__dict__.get("mover") is None
    assert open_style(resident.path, tmp_path / "cache", offload="cpu").model.mover.blocks
    if what == "pictures":  # prompts that are not encoded yet, so that the encoders stream as the model does
        how = {"size": (32, 32), "seed": 3, "steps": 2, "guidance": 4.0}
        loaded, load = [], models.load_text_encoders
        monkeypatch.setattr(models, "load_text_encoders", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
        (drawn,) = styled.sample(["a gate"], 1.0, **how)
        assert loaded[0].text_encoder_3.mover.from_disk
        (again,) = open_style(resident.path, tmp_path / "another").sample(["a gate"], 1.0, **how)
        assert again.tobytes() == drawn.tobytes() and len(loaded) == 2 and not hasattr(loaded[1].text_encoder, "mover")


def test_memory_is_planned_said_and_kept(recipes, tmp_path):
    wide = dataclasses.replace(recipes["texts"], rows=0, memory="1GB")
    studio = training.prepare(wide, tmp_path)
    assert (studio.recipe.offload, studio.recipe.rows > 1) == ("resident", True)
    assert any(note.startswith("planned for 1.00 GB") for note in studio.notes)
    config = json.loads((Path(wide.model) / "config.json").read_text())
    work = plan.Work.of(wide, studio.task.tokens(), None, torch.float32)
    least = plan.make(plan.skeleton(config, dtype=torch.float32), work, 1, 4)
    tight = training.prepare(dataclasses.replace(wide, memory=f"{least.device / 1e6}MB"), tmp_path)
    assert tight.recipe.offload in ("cpu", "disk") and tight.model.mover.blocks
    assert any("blocks stream from" in note for note in tight.notes)
    with pytest.raises(plan.PlanError, match="are not enough"):
        training.prepare(dataclasses.replace(wide, memory="1KB"), tmp_path)
    group = training.prepare(dataclasses.replace(wide, optimizer="sgd", space="group"), tmp_path)
    assert any(note.startswith("planned for 1.00 GB") for note in group.notes)
    with pytest.raises(models.ModelError, match="is not quantised by gptq"):
        training.prepare(dataclasses.replace(wide, quantization="gptq"), tmp_path)


def test_a_step_that_runs_out_of_memory_is_made_again_with_fewer_rows(recipes, tmp_path, monkeypatch):
    studio = training.prepare(recipes["texts"], tmp_path)
    whole, failures = training.Training.step, []

    def cramped(self, part=lambda done: None):
        if self.method.step == 1 and self.rows > 2:
            failures.append(self.rows)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
        return whole(self, part)

    monkeypatch.setattr(training.Training, "step", cramped)
    with pytest.raises(training.TrainingError, match="the memory does not suffice for step 1 .CUDA out"):
        go(studio, tmp_path / "strict")
    assert len(training.Run.open(tmp_path / "strict").journal()) == 1  # nothing is lost
    run = go(studio, tmp_path / "allowed", memory="1GB")
    assert len(run.journal()) == 2 and failures == [4, 4]
    assert run.journal()[0] == training.Run.open(tmp_path / "strict").journal()[0]

"""The planner: a step on tensors without data allocates what the same step allocates; plans fit what they are given."""

import dataclasses
import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKL

from zo_engine import models, plan
from zo_engine.cache import encode
from zo_engine.offload import block_names
from zo_engine.plan import SHAPES, PlanError, Work, parse_memory, skeleton
from zo_engine.recipe import Recipe
from zo_engine.scales import find_scales
from zo_engine.tasks.diffusion import sample


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{name: (loaded model, its config, work)}"""
    folder = tmp_path_factory.mktemp("plan")
    tiny.save_pipeline(folder / "sd3")
    found = {"sd3": (models.load_transformer(folder / "sd3"), folder / "sd3" / "transformer",
                     Work(2, 24, (64, 64), 0.5, 3, torch.float32))}  # fmt: skip
    for kind in ("llama", "opt"):
        tiny.save_language_model(folder / kind, kind)
        found[kind] = (
            models.load_language_model(folder / kind), folder / kind, Work(2, 30, None, 0.5, 3, torch.float32)
        )  # fmt: skip
    read = lambda part: json.loads((part / "config.json").read_text())  # noqa: E731
    return {name: (model, read(part), work) for name, (model, part, work) in found.items()}


@pytest.mark.parametrize(
    ("kind", "rows", "relay"), [("sd3", 2, 0), ("sd3", 16, 2), ("llama", 3, 2), ("llama", 16, 0), ("opt", 3, 0)]
)
def test_a_step_without_data_needs_what_a_step_needs(kinds, kind, rows, relay):
    model, config, work = kinds[kind]
    planned, theta = plan.step(skeleton(config, dtype=torch.float32), work, rows, relay=relay)
    counted, same = plan.step(model, work, rows, device="cpu", relay=relay, short=False)
    assert theta == same
    assert planned == pytest.approx(counted, rel=0.05)


def test_a_step_holds_what_lies_before_the_levels_for_one_part_of_its_batch(kinds, monkeypatch):
    model, config, work = kinds["llama"]
    work, empty = dataclasses.replace(work, batch=5, directions=1), skeleton(config, dtype=torch.float32)
    whole = plan.step(empty, work, 3)[0]
    monkeypatch.setattr("zo_engine.tasks.text.PART", 2)
    planned, counted = plan.step(empty, work, 3)[0], plan.step(model, work, 3, device="cpu", short=False)[0]
    assert planned == pytest.approx(counted, rel=0.05)
    assert planned < whole


@pytest.mark.parametrize(
    ("kind", "space", "optimizer", "noise"),
    [
        ("sd3", "gain", "sgd", "rademacher"),
        ("sd3", "group", "sgd", "rademacher"),
        ("llama", "group", "adam", "gaussian"),
        ("llama", "absolute", "momentum", "rademacher"),
        ("opt", "gain", "gauss-newton", "gaussian"),
    ],
)
@pytest.mark.parametrize("rows", [2, 16])
def test_a_step_of_every_method_without_data_needs_what_it_needs(kinds, kind, space, optimizer, noise, rows):
    model, config, work = kinds[kind]
    work = dataclasses.replace(work, space=space, optimizer=optimizer, noise=noise)
    planned, theta = plan.step(skeleton(config, dtype=torch.float32), work, rows)
    counted, same = plan.step(model, work, rows, device="cpu", short=False)
    assert theta == same
    assert planned == pytest.approx(counted, rel=0.05)


def test_a_step_of_some_layers_is_planned_as_such(kinds):
    _, config, work = kinds["llama"]
    some = Work.of(Recipe(texts="x", layers=("o_proj",), depth=1.0, optimizer="sgd"), 30, None, torch.float32)
    _, theta = plan.step(skeleton(config, dtype=torch.float32), some, 2)
    assert theta == 4 * sum(v.out_features for n, v in find_scales(kinds["llama"][0]).items() if "o_proj" in n)


def test_theta_is_as_large_as_the_scales_in_group_space_and_the_plan_says_so(kinds):
    _, config, work = kinds["llama"]
    model = skeleton(config, dtype=torch.float32)
    gain, group, adam = (
        plan.make(model, dataclasses.replace(work, depth=1.0, optimizer=optimizer, space=space), 4)
        for space, optimizer in (("gain", "sgd"), ("group", "sgd"), ("group", "adam"))
    )
    scales = sum(view.base.nbytes for view in find_scales(model).values())
    assert group.theta == scales > gain.theta and adam.theta == 3 * scales
    assert adam.working > group.working
    assert "(theta is" in dataclasses.replace(adam, theta=adam.device // 10).said() and "(theta is" not in gain.said()


@pytest.mark.parametrize(("space", "optimizer"), [("group", "adam"), ("absolute", "sgd")])
@pytest.mark.parametrize("rows", [2, 16])
def test_theta_of_a_model_that_streams_is_not_on_the_device(kinds, space, optimizer, rows):
    model, config, work = kinds["llama"]
    work = dataclasses.replace(work, space=space, optimizer=optimizer, depth=1.0)
    outline = skeleton(config, dtype=torch.float32)
    planned, counted = plan.step(outline, work, rows, streams=True), plan.step(model, work, rows, "cpu", 0, False, True)
    assert planned[1] == counted[1] == 0
    assert planned[0] == pytest.approx(counted[0], rel=0.05)
    here, away = plan.make(outline, work, rows), plan.make(outline, work, rows, 1, ends=True)
    assert (here.home, away.theta, away.home) == (0, 0, here.theta)
    assert away.working < here.working - here.theta
    assert away.host == plan.sizes(outline)[1][0] + away.ends + away.home
    assert f"theta ({plan.amount(away.home)}) waits in host memory" in away.said()
    gain = plan.make(outline, dataclasses.replace(work, space="gain", optimizer="sgd"), rows, 1)
    assert gain.theta > 0 == gain.home


def test_every_phase_of_a_run_is_planned_as_it_is_counted(kinds, tiny_folder):
    model, config, work = kinds["sd3"]
    recipe = Recipe(evaluate_items=8, prompts=("a", "b", "c"))
    outline, parts = skeleton(config, dtype=torch.float32), plan.beside(tiny_folder / "transformer")
    bounded = plan.phased(plan.make(outline, work, 4), outline, work, parts, recipe, memory=10**9)
    found = bounded.phases
    space, method = work.method(model, "cpu")
    weights = lambda module: sum(t.nbytes for t in (*module.parameters(), *module.buffers()))  # noqa: E731
    there = bounded.resident + bounded.theta

    def counted(run):
        with torch.no_grad(), plan.counted("cpu") as counter:
            run()
        return counter.peak

    pipe = models.drawing(tiny_folder, model, bounded=True)
    text = torch.zeros(24, model.config.joint_attention_dim), torch.zeros(model.config.pooled_projection_dim)
    with space.folded(method.theta):
        drawn = counted(lambda: sample(pipe, [text] * 2, text, [1, 2], width=64, height=64, steps=1, guidance=2.0))
        batch, _, losses = plan.task(model, dataclasses.replace(work, batch=8), "cpu")
        judged = counted(lambda: losses(batch.take(torch.arange(4)))) + sum(t.nbytes for t in vars(batch).values())
    folded = sum(view.base.nbytes for view in space.views.values())
    assert found["previews"] == pytest.approx(there + folded + weights(pipe.vae) + drawn, rel=0.1)  # and pixels
    assert found["the held-out loss"] == pytest.approx(there + folded + judged, rel=0.05)
    vae = models.load_vae(tiny_folder)
    assert found["pictures"] == pytest.approx(
        weights(vae) + counted(lambda: encode(vae, torch.zeros(1, 3, 64, 64))), rel=0.05
    )
    encoders = models.load_text_encoders(tiny_folder)
    ask = {"do_classifier_free_guidance": False, "max_sequence_length": tiny.T5_TOKENS}
    read = counted(lambda: encoders.encode_prompt("a sun", None, None, **ask))
    each = [encoders.text_encoder, encoders.text_encoder_2, encoders.text_encoder_3]
    assert found["captions"] == pytest.approx(sum(map(weights, each)) + read, rel=0.05)
    assert found["steps"] == bounded.device and bounded.peak == max(found.values())
    largest = max(found, key=found.get)
    assert bounded.said_of_phases().startswith(f"largest phase of a run: {largest}, ")


def test_phases_shrink_where_blocks_stream_or_pictures_are_drawn_one_by_one(kinds, tiny_folder):
    _, config, work = kinds["sd3"]
    outline, parts = skeleton(config, dtype=torch.float32), plan.beside(tiny_folder / "transformer")
    resident, streamed = plan.make(outline, work, 4), plan.make(outline, work, 4, 2, slots=1)
    whole = plan.phased(resident, outline, work, parts, Recipe()).phases
    away = plan.phased(streamed, outline, work, parts, Recipe(), memory=10**9).phases
    assert all(away[name] < whole[name] for name in ("the base's answers", "previews", "the held-out loss"))
    assert away["captions"] <= whole["captions"]  # two slots, and no more than two blocks here
    assert set(whole) == {"captions", "pictures", "the base's answers", "previews", "the held-out loss", "steps"}
    tight = plan.phased(resident, outline, work, parts, Recipe(), memory=1).phases
    assert tight["captions"] == away["captions"]  # encoders that do not fit stream, whatever the transformer does


def test_what_stands_beside_sd35_has_its_published_sizes():
    parts = plan.BESIDE["sd3.5-large"]
    kinds = {"vae": AutoencoderKL} | {name: cls for name, (cls, _) in models.TEXT_PARTS.items()}
    counts = {name: sum(p.numel() for p in plan._part(kinds[name], parts[name], torch.bfloat16).parameters())
              for name in parts}  # fmt: skip
    assert counts == {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
                      "text_encoder_3": 4_762_310_656}  # fmt: skip


@pytest.mark.parametrize(("kind", "quantization"), [("sd3", "nf4"), ("sd3", "int8"), ("llama", "nf4"), ("opt", "nf4")])
def test_weights_are_counted_as_they_are_loaded(kinds, kind, quantization, tmp_path):
    _, config, _ = kinds[kind]
    if kind == "sd3":
        loaded = models.load_transformer(tiny.save_pipeline(tmp_path / "m"), quantization=quantization)
    else:
        loaded = models.load_language_model(tiny.save_language_model(tmp_path / "m", kind), quantization=quantization)
    whole, blocks = plan.sizes(skeleton(config, quantization, torch.float32))
    expected, each = plan.sizes(loaded)
    assert blocks == each
    assert whole == pytest.approx(expected, rel=0.02)  # positions computed, not saved, may lie elsewhere
    assert len(blocks) == len(block_names(loaded))


def test_less_memory_means_more_blocks_away_then_fewer_rows(kinds):
    _, config, work = kinds["llama"]
    model = skeleton(config, dtype=torch.float32)
    roomy = plan.fitting(model, work, 10**9, rows=8)
    assert (roomy.away, roomy.tier, roomy.rows, roomy.moved) == (0, "resident", 8, 0)
    block = plan.sizes(model)[1][0]
    tighter = plan.fitting(model, work, roomy.device - block, rows=8)
    assert tighter.away == 3 and tighter.tier == "cpu" and tighter.moved > 0  # two slots cost what two blocks saved
    assert tighter.device <= roomy.device - block
    least = plan.make(model, work, 1, 4, slots=2)
    tight = plan.fitting(model, work, least.device, rows=8)
    assert (tight.rows < 8 or tight.ends) and tight.device <= least.device
    with pytest.raises(PlanError, match="are not enough: with one row a pass"):
        plan.fitting(model, work, 1000, rows=2)


def test_where_blocks_wait_is_counted(kinds):
    _, config, work = kinds["llama"]
    model = skeleton(config, dtype=torch.float32)
    host, disk = (plan.make(model, work, 1, 4, tier, slots=1) for tier in ("cpu", "disk"))
    blocks = plan.sizes(model)[1]
    assert (host.host, host.disk) == (sum(blocks), 0)
    assert (disk.host, disk.disk) == (max(blocks), sum(blocks))
    assert disk.moved < host.moved  # one visit serves all passes


def test_blocks_that_find_room_in_memory_do_not_wait_on_the_disk(kinds):
    _, config, work = kinds["llama"]
    model = skeleton(config, dtype=torch.float32)
    blocks = plan.sizes(model)[1]
    found = {}
    for host in (0, blocks[3], 2 * blocks[3] + 1, sum(blocks)):
        (made,) = plan.plans(model, work, 2, [(4, False)], "disk", 1, host=host)
        assert made.disk + made.host == sum(blocks) + made.streaming and made.host <= host + made.streaming
        found[made.held] = made
    assert list(found) == [0, 1, 2, 4]
    moved = [made.moved for made in found.values()]
    assert moved == sorted(moved) and moved[-1] == plan.make(model, work, 2, 4, slots=1).moved
    assert "1 of them from host memory" in found[1].said() and "host memory" not in found[0].said()


def test_ends_that_wait_are_counted(kinds):
    for kind in ("llama", "opt"):
        model, work = skeleton(kinds[kind][1], dtype=torch.float32), kinds[kind][2]
        here, away = (plan.make(model, work, 8, 4, ends=ends, working=1000) for ends in (False, True))
        outside, pieces = plan.end_sizes(model)
        assert outside == away.ends == away.host - here.host == here.resident - away.resident
        assert away.moved > here.moved and sum(pieces) <= outside
        assert "the embedding waits there" in away.said() and "embedding" not in here.said()


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "most"), [("opt-175b", 5e9), ("qwen3-32b", 2.5e9)])
def test_the_largest_shapes_fit_small_cards(shape, most):
    model = skeleton(SHAPES[shape])  # two sequences of 2,048 tokens at once, as the published figures
    assert plan.make(model, Work(1, 2048), 2, len(block_names(model)), ends=True).device <= most


@pytest.mark.parametrize("how", [("gain", "gauss-newton"), ("gain", "sgd"), ("group", "sgd")])
@pytest.mark.parametrize(("tier", "ends"), [("cpu", False), ("cpu", True), ("disk", False)])
def test_what_moves_is_what_a_mover_moves(kinds, tmp_path, tier, ends, how):
    _, config, work = kinds["llama"]
    work = dataclasses.replace(work, space=how[0], optimizer=how[1])
    folder = tiny.save_language_model(tmp_path / "model")
    placement = models.Placement(4, 1, tmp_path / "store" if tier == "disk" else None, ends)
    model = models.load_language_model(folder, placement=placement)
    made = plan.make(skeleton(config, dtype=torch.float32), work, 3, 4, tier, slots=1, ends=ends, working=0)
    plan.step(model, work, 3, device="cpu", relay=4 if tier == "disk" else 0, short=False, streams=how[0] != "gain")
    assert model.mover.moved == pytest.approx(made.moved, rel=0.2)  # a block may still lie in its slot


def test_the_least_time_of_a_step_ranks_settings_as_they_cost(kinds):
    _, config, work = kinds["llama"]
    outline = skeleton(config, dtype=torch.float32)

    def least(rows=2, away=0, speed=(1e9, 1e9), **changes):
        asked = dataclasses.replace(work, **changes)
        made = plan.make(outline, asked, rows, away, slots=1, working=0)
        return plan.seconds(dataclasses.replace(made, operations=plan.operations(outline, asked)), speed)

    assert least(length=60) > least() and least(batch=4) > least() and least(directions=12) > least()
    assert least(depth=1.0) > least(depth=0.25)  # what lies before a level runs once
    assert least(speed=(2e9, 1e9)) == least() / 2
    slow = {"away": 4, "speed": (1e15, 1e6)}  # copies set the pace: fewer passes, or fewer blocks away, take less
    assert least(**slow) > least(rows=8, **slow) and least(**slow) > least(**slow | {"away": 2})
    assert least(away=4, speed=(1e6, 1e15)) == least(speed=(1e6, 1e15))  # and where they do not, they are hidden


def test_operations_are_those_of_the_layers(kinds):
    """One direction for all of a model without prefix: 2 rows, a search of 3; two for each weight and token."""
    _, config, work = kinds["llama"]
    outline = skeleton(config, "none", torch.float32)
    asked = dataclasses.replace(work, batch=1, depth=1.0, directions=1, optimizer="sgd", space="group")
    linear = sum(m.weight.numel() for m in outline.modules() if isinstance(m, torch.nn.Linear))
    found = plan.operations(outline, asked)
    assert 0.9 * 2 * linear * 30 * 5 < found < 1.3 * 2 * linear * 30 * 5  # the head reads a token less; attention


def test_published_shapes_have_their_published_sizes():
    with torch.device("meta"):
        counts = {}
        for name in ("sd3.5-large", "opt-1.3b", "llama-3.1-8b"):
            model = skeleton(SHAPES[name], "none")
            counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {"sd3.5-large": 8_056_627_520, "opt-1.3b": 1_315_758_080, "llama-3.1-8b": 8_030_261_248}


@pytest.mark.parametrize(("text", "size"), [("6GB", 6e9), ("800 mb", 8e8), ("1.5GiB", 1.5 * 2**30)])
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "6", "nanGB", "infGB"])
def test_amounts_that_are_none(text):
    with pytest.raises(PlanError, match="such as 6GB or 800MB"):
        parse_memory(text)


def test_an_unknown_config_is_refused():
    with pytest.raises(PlanError, match="which the libraries here know"):
        skeleton({"_class_name": "Nothing"})


def test_the_command_says_what_a_model_needs(qzo, tmp_path):
    folder = tiny.save_language_model(tmp_path / "model")
    code, out, _ = qzo("plan", folder, "--batch-size", 2, "--length", 20, "--rows", 4, "--memory", "1GB", "--json")
    found = json.loads(out)
    assert code == 0 and found["away"] == 0 and found["rows"] == 4 and 0 < found["device"] < 10**9
    code, out, err = qzo("plan", "no/such-model")
    assert code == 2 and "is not on this machine" in err and "opt-175b" in err


def test_the_counter_forgets_what_is_gone_and_keeps_the_peak():
    weight = torch.ones(1000)
    with plan.counted("cpu") as counter:
        kept = weight * 2
        for _ in range(3):
            gone = (kept + 1).view(10, 100)
        del gone
        weight.t().add_(1)  # a view of what was there before
        last = torch.zeros(1)
    assert (counter.bytes, counter.peak) == (kept.nbytes + last.nbytes, 3 * 4000)


def test_a_plan_is_one_line(kinds):
    _, config, work = kinds["llama"]
    made = plan.make(skeleton(config, dtype=torch.float32), dataclasses.replace(work, batch=1), 4, 2)
    assert "2 of 4 blocks stream from host memory through 2 slots, 4 rows a pass" in made.said()

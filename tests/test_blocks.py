"""Blocks: which layers a depth tunes, and the prefix that runs once for all probes of a batch."""

import pytest
import torch
from test_probes import BATCH, SPACES, assert_unchanged, probes_of, sd3_loss, some_theta, state
from torch import nn

from zo_engine.blocks import THIN, Level, Prefix, levels
from zo_engine.probes import evaluate
from zo_engine.scales import find_scales

LLAMA = [f"model.layers.{i}.{layer}" for i in range(8) for layer in ("self_attn.q_proj", "mlp.experts.0.down_proj")]


def suffix(model, space):
    """The space over the second of the tiny transformer's two blocks, and the prefix before it."""
    views = find_scales(model)
    level = Level(tuple(n for n in views if n.startswith(("transformer_blocks.1.", "norm_out.", "proj_out"))),
                  "transformer_blocks", 1)  # fmt: skip
    return SPACES[space]({name: views[name] for name in level.layers}), Prefix(model, level)


def behind(prefix, space, theta, probes, loss, chunk=None):
    """`evaluate` with the prefix run once."""
    with space.dressed(theta):
        replay = prefix.run(loss, BATCH, chunk)
    return evaluate(space, theta, probes, loss, chunk, replay)


def test_the_levels_of_sd3_are_its_output_layers_and_its_last_blocks(transformer):
    views = find_scales(transformer("nf4"))
    output, block, reading = levels(views, 0.5)
    assert set(output.layers) == {"norm_out.linear", "proj_out"}
    assert set(block.layers) == {name for name in views if name.startswith("transformer_blocks.1.")}
    assert [name.removeprefix("time_text_embed.text_embedder.") for name in reading.layers] == ["linear_1", "linear_2"]
    assert [(level.blocks, level.first, level.thin) for level in (output, block, reading)] == [
        ("transformer_blocks", 2, 1), ("transformer_blocks", 1, 1), ("transformer_blocks", 0, THIN)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "starts"),
    [(0.01, [7]), (0.2, [7, 6]), (0.34, [7, 5]), (0.5, [6, 4]), (0.75, [5, 2]), (0.99, [4, 0])],
)
def test_a_depth_is_a_share_of_the_blocks_in_two_levels(depth, starts):
    found = levels(["model.embed", *LLAMA, "lm_head"], depth)
    assert found[0] == Level(("lm_head",), "model.layers", 8)
    assert [level.first for level in found[1:]] == starts
    stops = [8, *starts]
    assert [list(level.layers) for level in found[1:]] == [
        LLAMA[2 * a : 2 * b] for a, b in zip(starts, stops, strict=False)
    ]


@pytest.mark.parametrize(
    "norm", ["model.norm", "model.decoder.final_layer_norm", "model.final_layernorm", "model.ln_f", "norm_f"]
)
@pytest.mark.parametrize("head", [[], ["lm_head"]])
def test_a_final_norm_is_a_level_of_its_own_with_few_directions(norm, head):
    found = levels([*LLAMA, *head, norm], 0.34)
    after = [Level(("lm_head",), "model.layers", 8)] if head else []
    assert found[:-2] == [*after, Level((norm,), "model.layers", 8, THIN)]
    assert found[-2:] == levels(LLAMA, 0.34) and found[-3].share(96) == 8


@pytest.mark.parametrize(("names", "depth"), [(["model.embed", *LLAMA], 1.0), (["up", "down.inner"], 0.1)])
def test_all_layers_are_one_level_at_depth_one_and_where_there_are_no_blocks(names, depth):
    assert levels(names, depth) == [Level(tuple(names))]


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("space", SPACES)
def test_a_prefix_changes_nothing_but_the_work(transformer, space, format):
    model = transformer(format)
    space, prefix = suffix(model, space)
    theta, probes = some_theta(space), probes_of(space)
    rows = []
    hooks = [
        block.attn.register_forward_hook(lambda m, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
        for block in model.transformer_blocks
    ]
    expected = evaluate(space, theta, probes, sd3_loss(model))
    assert rows == [len(probes.sign)] * 2
    for chunk in (None, 2, 5):
        rows.clear()
        found = behind(prefix, space, theta, probes, sd3_loss(model), chunk)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert sum(rows) == BATCH + len(probes.sign)  # the first block sees every example once
    for hook in hooks:
        hook.remove()
    assert not torch.equal(expected[:BATCH], expected[BATCH:])


def test_a_prefix_leaves_nothing_behind_also_after_an_exception(transformer):
    model = transformer("nf4")
    space, prefix = suffix(model, "rows")
    before, loss = state(model), sd3_loss(model)
    theta, probes = some_theta(space), probes_of(space)
    behind(prefix, space, theta, probes, loss)
    assert_unchanged(model, before)

    def broken(sample):
        loss(sample)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        behind(prefix, space, theta, probes, broken)
    assert_unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_prefix_replays_outputs_of_any_form():
    class Block(nn.Module):
        def forward(self, x, memory=None):
            return x + 1, (memory, None)

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    x, memory = torch.arange(4.0), torch.arange(4.0) * 10

    def loss(sample):
        (y, (seen, none)) = model.blocks[0](x[sample], memory[sample])
        assert none is None
        return y + seen

    prefix, index = Prefix(model, Level((), "blocks", 1)), torch.tensor([3, 0, 3])
    for chunk in (None, 3):
        with prefix.run(loss, 4, chunk)(index):
            assert torch.equal(loss(index), (x + 1 + memory)[index])

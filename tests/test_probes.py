"""Probes: one stacked forward equals evaluating every probe alone, and leaves nothing behind."""

import pytest
import tiny
import torch
from exact import exact_net, net_inputs, net_loss, one_by_one, quantised, quantised_net
from torch import nn

from zo_engine.models import load_transformer
from zo_engine.noise import directions
from zo_engine.probes import GainSpace, GroupSpace, Probes, along, central, evaluate
from zo_engine.scales import find_scales

BATCH = 3
SPACES = {
    "rows": GainSpace,
    "rows and columns": lambda views: GainSpace(views, columns=True),
    "relative": GroupSpace,
    "absolute": lambda views: GroupSpace(views, relative=False),
}


def probes_of(space, own=True, count=6, eps=0.03, kind="gaussian"):
    z = directions(kind, space.layout, 0, 0, range(count))
    return central(z, eps, BATCH, own)


def some_theta(space, dtype=torch.float32, size=0.1):
    """Another point than the base."""
    return size * directions("gaussian", space.layout, 7, 0, [0])[0].to(dtype)


def sd3_loss(model, dtype=torch.float32):
    """Mean square of the output, one number a row."""
    data = tiny.inputs(BATCH)

    def loss(sample):
        out = model(**{name: value[sample].to(dtype) for name, value in data.items()}).sample
        return out.float().square().mean((1, 2, 3))

    return loss


def state(model):
    """Everything that a forward reads, by identity and by value, int8's moving scales included."""
    tensors = {name: view.format.get(view.module) for name, view in find_scales(model).items()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return tensors, {name: tensor.clone() for name, tensor in tensors.items()}, forwards


def assert_unchanged(model, before):
    tensors, values, forwards = before
    now, _, forwards_now = state(model)
    assert all(now[name] is tensors[name] for name in tensors)
    assert all(torch.equal(now[name], values[name]) for name in tensors)
    assert forwards_now == forwards


# Stacked equals one by one


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_stacked_equals_one_by_one_in_fp64(space, own):
    net, views = exact_net(quantised_net())
    space = SPACES[space](views)
    theta = some_theta(space, torch.float64, size=0.01)
    probes, loss = probes_of(space, own), net_loss(net, net_inputs(BATCH, torch.float64))
    expected = one_by_one(space, theta, probes, loss)
    found = evaluate(space, theta, probes, loss)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(set(found.tolist())) == len(found)  # every row is a case of its own


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_stacked_equals_one_by_one_on_a_real_transformer(transformer, format, space, own):
    model = transformer(format)
    space = SPACES[space](find_scales(model))
    theta = some_theta(space, size=0.02)
    probes, loss = probes_of(space, own, count=3), sd3_loss(model)
    found = evaluate(space, theta, probes, loss)
    torch.testing.assert_close(found, one_by_one(space, theta, probes, loss), rtol=1e-5, atol=0)
    base = evaluate(space, torch.zeros_like(theta), along(theta, 0.0, BATCH), loss)[:BATCH]
    assert ((found - base[probes.sample]).abs() / base[probes.sample]).min() > 1e-4  # far above the tolerance


@pytest.mark.parametrize("space", ["rows", "relative"])
def test_stacked_equals_one_by_one_on_int8(transformer, space):
    """Activations are rounded to 8 bits, each row by itself: a last bit may move one by a whole step."""
    model = transformer("int8")
    space = SPACES[space](find_scales(model))
    probes, loss = probes_of(space, count=3), sd3_loss(model)
    theta = some_theta(space)
    found = evaluate(space, theta, probes, loss)
    torch.testing.assert_close(found, one_by_one(space, theta, probes, loss), rtol=3e-3, atol=0)


@pytest.mark.parametrize("space", ["relative", "absolute"])
def test_group_space_covers_layers_whose_groups_straddle_rows(straddling_folder, space):
    model = load_transformer(straddling_folder)
    space = SPACES[space](find_scales(model))
    probes, loss = probes_of(space, count=3), sd3_loss(model)
    theta = some_theta(space, size=0.02)
    found = evaluate(space, theta, probes, loss)
    torch.testing.assert_close(found, one_by_one(space, theta, probes, loss), rtol=1e-5, atol=0)


def test_gain_space_names_the_layers_that_it_leaves_out(straddling_folder):
    views = find_scales(load_transformer(straddling_folder))
    space = GainSpace(views)
    assert set(space.left_out) == {name for name, view in views.items() if view.in_features % 64}
    assert {name.rsplit(".", 1)[0] for name in space.layout.shapes} == set(views) - set(space.left_out)
    with pytest.raises(ValueError, match="use group space"):
        GainSpace({name: views[name] for name in space.left_out})


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_chunks_of_any_size_give_the_same(space, own):
    net, views = exact_net(quantised_net())
    space = SPACES[space](views)
    theta, loss = some_theta(space, torch.float64, size=0.01), net_loss(net, net_inputs(BATCH, torch.float64))
    probes = probes_of(space, own, count=3)
    whole = evaluate(space, theta, probes, loss)
    for chunk in range(1, len(probes.sign) + 1):
        torch.testing.assert_close(evaluate(space, theta, probes, loss, chunk), whole, rtol=1e-12, atol=0)


def test_rows_without_a_sign_are_at_theta():
    net, views = exact_net(quantised_net())
    space = GainSpace(views, columns=True)
    theta, loss = some_theta(space, torch.float64), net_loss(net, net_inputs(BATCH, torch.float64))
    minus, zero, plus = evaluate(space, theta, along(probes_of(space).z[0], 0.1, BATCH), loss).view(3, -1)
    with torch.no_grad(), space.dressed(theta):
        dressed = loss(torch.arange(BATCH))
    with torch.no_grad(), space.folded(theta):
        folded = loss(torch.arange(BATCH))
    torch.testing.assert_close(zero, dressed, rtol=1e-12, atol=0)
    torch.testing.assert_close(zero, folded, rtol=1e-12, atol=0)
    assert (minus != zero).all() and (plus != zero).all()


# What a gain does


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("format", "shape"),
    [("nf4", (64,)), ("nf4", (5, 64)), ("nf4", (2, 5, 64)), ("int8", (64,)), ("int8", (5, 64))],
)
def test_a_gain_scales_rows_and_spares_the_bias(format, shape, bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = quantised(linear, format)
    space = GainSpace(find_scales(nn.ModuleDict({"layer": layer})))
    z = directions("gaussian", space.layout, 0, 0, range(4))
    theta = torch.randn(32, generator=generator)
    x = torch.randn(4, *shape, generator=generator)
    b = layer.bias if bias else 0
    gains = (theta + 0.5 * z).exp().view(4, *[1] * (len(shape) - 1), 32)
    expected = (layer(x) - b) * gains + b
    everything = Probes(z, 0.5, torch.arange(4), torch.ones(4, dtype=torch.int8), torch.arange(4))
    with space.dressed(theta, everything):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("space", SPACES)
def test_half_precision_stays_half_and_near(tiny_folder, space, dtype):
    model = load_transformer(tiny_folder, dtype=dtype)
    space = SPACES[space](find_scales(model))
    kinds, layers = set(), [view.module for view in space.views.values()]
    hooks = [layer.register_forward_hook(lambda m, x, y: kinds.add(y.dtype)) for layer in layers]
    theta, probes = some_theta(space, size=0.02), probes_of(space, count=3)
    found = evaluate(space, theta, probes, sd3_loss(model, dtype))
    expected = one_by_one(space, theta, probes, sd3_loss(model, dtype))
    for hook in hooks:
        hook.remove()
    assert kinds == {dtype}
    torch.testing.assert_close(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_the_absolute_form_never_makes_a_scale_negative():
    net, views = exact_net(quantised_net())
    space = GroupSpace(views, relative=False)
    theta = torch.full((space.layout.size,), -1e3)
    assert all((scale == 0).all() for _, scale in space.scales(theta))
    unclamped = GroupSpace(views, relative=False, clamp=False)
    assert all((scale < 0).all() for _, scale in unclamped.scales(theta))


# Nothing is left behind


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("space", SPACES)
def test_undressing_restores_bit_for_bit_also_after_an_exception(transformer, space, format):
    model = transformer(format)
    loss = sd3_loss(model)
    before, plain = state(model), loss(torch.arange(BATCH))
    space = SPACES[space](find_scales(model))
    theta, probes = some_theta(space), probes_of(space)
    with torch.no_grad(), space.dressed(theta, probes):
        assert not torch.equal(loss(probes.sample)[:BATCH], plain)
    assert_unchanged(model, before)

    def broken(sample):
        loss(sample)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        evaluate(space, theta, probes, broken)
    assert_unchanged(model, before)
    with pytest.raises(KeyError, match="inside"), space.folded(theta):
        broken(torch.arange(BATCH))
    assert_unchanged(model, before)
    assert torch.equal(loss(torch.arange(BATCH)), plain)


@pytest.mark.parametrize("space", ["rows", "relative"])
def test_running_out_of_memory_half_way_undoes_the_first_half(transformer, space, monkeypatch):
    model = transformer("nf4")
    before = state(model)
    space = SPACES[space](find_scales(model))
    theta = some_theta(space)

    def full(scale):
        raise MemoryError

    monkeypatch.setattr(list(space.views.values())[-1], "put", full)
    with pytest.raises(MemoryError), space.folded(theta):
        pytest.fail("it was entered")
    assert_unchanged(model, before)
    if isinstance(space, GroupSpace):
        with pytest.raises(MemoryError), space.dressed(theta):
            model(**tiny.inputs())
        assert_unchanged(model, before)


@pytest.mark.parametrize("outer", ["rows", "relative"])
def test_dressing_inside_of_folding_leaves_it_folded(outer):
    """A probe while a theta is written into the scales, as an evaluation inside a preview would be."""
    net, views = exact_net(quantised_net())
    outer, inner = SPACES[outer](views), GainSpace(views)
    loss = net_loss(net, net_inputs(BATCH, torch.float64))
    samples = torch.arange(BATCH)
    with outer.folded(some_theta(outer, torch.float64)):
        folded = loss(samples)
        with inner.dressed(some_theta(inner, torch.float64)):
            assert not torch.equal(loss(samples), folded)
        assert torch.equal(loss(samples), folded)


def test_dressing_twice_multiplies_and_comes_off_in_turn():
    net, views = exact_net(quantised_net())
    space, samples = GainSpace(views), torch.arange(BATCH)
    loss = net_loss(net, net_inputs(BATCH, torch.float64))
    a, b = some_theta(space, torch.float64), some_theta(space, torch.float64, size=-0.2)
    with space.folded(a + b):
        both = loss(samples)
    with space.dressed(a):
        one = loss(samples)
        with space.dressed(b):
            torch.testing.assert_close(loss(samples), both, rtol=1e-12, atol=0)
        assert torch.equal(loss(samples), one)


# Refused


@pytest.mark.parametrize("space", ["rows", "relative"])
def test_a_layer_that_does_not_see_the_batch_first_is_named(space):
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quantised(nn.Linear(64, 64), "nf4")

        def forward(self, x):  # [B, T, 64]
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model = TokensFirst()
    space = SPACES[space](find_scales(model))
    before, x = state(model), torch.ones(BATCH, 7, 64)
    with pytest.raises(ValueError, match="layer received 7 rows where .* has 12: .* first axis"):
        evaluate(space, some_theta(space), probes_of(space), lambda sample: model(x[sample]).mean((1, 2)))
    assert_unchanged(model, before)


def test_own_directions_need_a_multiple_of_the_batch():
    with pytest.raises(ValueError, match="4 directions for 3 examples"):
        central(torch.ones(4, 2), 0.1, 3, own=True)


@pytest.mark.parametrize("own", [True, False])
def test_rows_stand_plus_first_then_minus_in_the_same_order(own):
    probes = central(torch.ones(6, 2), 0.1, 3, own)
    parts = [probes.rows(half) for half in halves(probes)]
    plus, minus = (torch.stack([part.direction, part.sample]) for part in parts)
    assert torch.equal(plus, minus)
    assert parts[0].sign.eq(1).all() and parts[1].sign.eq(-1).all()
    pairs = list(zip(*plus.tolist(), strict=True))
    expected = [(p, p % 3) for p in range(6)] if own else [(p, i) for p in range(6) for i in range(3)]
    assert pairs == expected


def halves(probes):
    return torch.arange(len(probes.sign)).view(2, -1)

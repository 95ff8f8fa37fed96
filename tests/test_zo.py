"""The method against what is known exactly: derivatives, expectations, variances, minima, and the journal.

The golden journal is written anew, deliberately, by `python tests/test_zo.py`.
"""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from exact import codes, exact_net, net_inputs, net_loss, one_step, quantised_net
from torch import nn

from zo_engine.journal import Step, read, short
from zo_engine.models import load_transformer
from zo_engine.noise import Layout, directions
from zo_engine.probes import GainSpace, GroupSpace, Probes, central, evaluate
from zo_engine.scales import find_scales
from zo_engine.style import journal_records, journal_tensors
from zo_engine.zo import ZO, StepSize, quantile, slopes, trapezoid

GOLDEN = Path(__file__).parent / "golden"
OPTIMIZERS = ("sgd", "momentum", "adam")


def moved(zo, probes):
    """[R, n] the theta of every row, in fp64: for losses that are a formula of theta."""
    z = probes.z.double()[probes.direction] * (probes.eps * probes.sign.double())[:, None]
    return zo.theta.double() + z


def method(size=20, batch=2, **settings):
    return ZO(Layout({"a": (size // 2,), "b": (size - size // 2,)}), seed=3, per_step=2 * batch, **settings)


def quadratic(curvature, minimum):
    """losses(zo) -> losses(probes) of `1/2 sum h (theta - minimum)^2`, one a row."""
    return lambda zo: lambda probes: (0.5 * curvature * (moved(zo, probes) - minimum) ** 2).sum(1)


# The slope is the directional derivative


SPACES = {
    "rows and columns": lambda views: GainSpace(views, columns=True),
    "relative": GroupSpace,
    "absolute": lambda views: GroupSpace(views, relative=False),
}


def scale_by_hand(space, view, parts):
    """What the space says that theta means, written once more."""
    base, name = view.base.view(view.shape), view.name
    if isinstance(space, GainSpace):
        columns = parts.get(f"{name}.columns", torch.zeros(1))
        return base * torch.exp(parts[f"{name}.rows"][:, None] + columns[None])
    return base * torch.exp(parts[f"{name}.groups"]) if space.relative else base + parts[f"{name}.groups"]


def exact_slopes(space, theta, probes, loss):
    """[R] derivatives of each row's loss along its direction, by autograd through the dequantised weights."""
    found = []
    for direction, sample in zip(probes.direction, probes.sample, strict=True):
        point = theta.clone().requires_grad_()
        parts = space.layout.split(point)
        for view in space.views.values():
            view.module.scale = scale_by_hand(space, view, parts).flatten()
        (gradient,) = torch.autograd.grad(loss(sample[None]).sum(), point)
        found.append(gradient @ probes.z[direction].double())
    for view in space.views.values():
        view.restore()
    return torch.stack(found)


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_the_error_of_a_slope_falls_with_the_square_of_eps(space, own):
    net, views = exact_net(quantised_net())
    space, batch, count = SPACES[space](views), 2, 4
    loss = net_loss(net, net_inputs(batch, torch.float64))
    theta = 0.02 * directions("gaussian", space.layout, 5, 0, [0])[0].double()
    z = directions("rademacher", space.layout, 0, 0, range(count))
    probes = central(z, 1.0, batch, own)
    half = len(probes.sign) // 2
    exact = exact_slopes(space, theta, probes.rows(torch.arange(half)), loss).view(count, -1).mean(1)
    sizes = torch.tensor([0.02, 0.01, 0.005, 0.0025])
    errors = []
    for eps in sizes.tolist():
        found = slopes(evaluate(space, theta, central(z, eps, batch, own), loss), eps, count)
        errors.append((found - exact).abs().max())
    order = torch.diff(torch.stack(errors).log()) / torch.diff(sizes.double().log())
    assert ((order > 1.9) & (order < 2.1)).all(), order
    assert errors[-1] < 1e-2 * exact.abs().max()


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_slopes_on_bitsandbytes_layers_are_those_of_the_dequantised_expression(format):
    net = quantised_net(format)
    twin, views = exact_net(net)
    data, batch, count = net_inputs(2, torch.float64), 2, 6
    single = tuple(part.float() for part in data)
    for name, make in SPACES.items():
        space, exact_space = make(find_scales(net)), make(views)
        z = directions("rademacher", space.layout, 0, 0, range(count))
        theta, eps = torch.zeros(space.layout.size), 0.003
        probes = central(z, eps, batch, own=True)
        found = slopes(evaluate(space, theta, probes, net_loss(net, single)), eps, count)
        plus = probes.rows(torch.arange(count))
        expected = exact_slopes(exact_space, theta.double(), plus, net_loss(twin, data))
        assert (found - expected).abs().max() < 0.01 * expected.abs().max(), name


def test_slopes_on_the_real_transformer_are_those_of_its_gains(transformer):
    """Gains as a formula: every weight of a dense SD3, made from codes and scales, times exp(theta[row])."""
    model = transformer("nf4")
    space = GainSpace(find_scales(model))
    dense = tiny.transformer()
    for name, view in space.views.items():
        state = view.module.weight.quant_state
        weight = codes(view.module).view(-1, 64) * state.absmax[:, None]
        dense.get_submodule(name).weight.data = weight.view(state.shape)
    weights = {f"{name}.weight": dense.get_submodule(name).weight.data for name in space.views}
    data = tiny.inputs(2)

    def squares(output):
        return output.sample.square().mean((1, 2, 3))

    theta = torch.zeros(space.layout.size, requires_grad=True)
    parts = space.layout.split(theta)
    changed = {n: w * parts[n.replace(".weight", ".rows")].exp()[:, None] for n, w in weights.items()}
    losses = squares(torch.func.functional_call(dense, changed, kwargs=data))
    gradients = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses]
    gradients = torch.stack(gradients).double()
    z = directions("rademacher", space.layout, 0, 0, range(8))
    expected = (gradients[torch.arange(8) % 2] * z).sum(1)
    probes = central(z, 0.01, 2, own=True)
    loss = lambda i: squares(model(**{k: v[i] for k, v in data.items()}))  # noqa: E731
    found = slopes(evaluate(space, theta.detach(), probes, loss), 0.01, 8)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


# The estimate: its mean and its variance


def linear_model(rows=12, inputs=3, count=2 * 4000, seed=0):
    """A loss that is linear in small gains: `L_i = sum_r exp(theta_r) (W x_i)_r`, so that g_i = W x_i."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, rows, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, inputs, generator=generator))
    x = 1.0 + 0.7 * torch.randn(count, inputs, generator=generator).double()
    space = GainSpace(find_scales(nn.ModuleDict({"layer": layer}), formats=("dense",)))
    mean, cov = layer.weight @ torch.ones(inputs).double(), 0.49 * layer.weight @ layer.weight.T
    return space, (lambda sample: layer(x[sample]).sum(1)), mean, cov.trace()


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_the_estimate_has_the_right_mean_and_the_variance_of_its_formula(kind, own):
    """One shared direction: (d + 1) |g|^2 + (d + 2) V / B; own directions: ((d + 1) |g|^2 + (d + 2) V) / B; for
    normals. For signs, whose fourth moment is 1 and not 3: d - 1 and d in place of d + 1 and d + 2."""
    batch, trials, eps = 4, 2000, 1e-4
    space, loss, g, variance = linear_model(count=batch * trials)
    d, rows = space.layout.size, batch * trials
    z = directions(kind, space.layout, 1, 0, range(rows if own else trials))
    sample = torch.arange(rows)
    direction = sample if own else sample // batch
    sign = torch.ones(rows, dtype=torch.int8)
    probes = Probes(z, eps, direction.repeat(2), torch.cat([sign, -sign]), sample.repeat(2))
    losses = evaluate(space, torch.zeros(d, dtype=torch.float64), probes, loss)
    found = slopes(losses, eps, len(z))
    estimates = (found[:, None] * z).view(trials, -1, d).mean(1)

    error = estimates - g
    assert (error.mean(0).abs() < 4.5 * error.std(0) / trials**0.5).all()
    squared = error.square().sum(1)
    extra = {"gaussian": 2, "rademacher": 0}[kind]
    spread, noise = (d + extra - 1) * g.square().sum(), (d + extra) * variance / batch
    expected = (spread / batch if own else spread) + noise
    other = (spread if own else spread / batch) + noise
    band = 4 * squared.std() / trials**0.5
    assert abs(squared.mean() - expected) < band
    assert abs(squared.mean() - other) > 2 * band  # the two formulas can be told apart


@pytest.mark.parametrize("level", [0.3, 1.0, 2.5])
def test_clipping_keeps_the_direction_and_shrinks_it_by_the_share_that_is_not_clipped(level):
    count, d = 20_000, 6
    zo = ZO(Layout({"a": (d,)}), seed=0, per_step=count, kind="gaussian")
    g = torch.tensor([1.0, -0.5, 0.25, 0.0, 2.0, -1.0])
    z = zo.directions()
    clip = level * g.norm().item()
    found = (z @ g).tolist()
    share = math.erf(level / 2**0.5)  # P(|d| <= C) for d ~ N(0, |g|^2)
    products = (z @ g).clamp(-clip, clip)[:, None] * z
    band = 4.5 * products.std(0) / count**0.5
    estimate = zo.descend(z, found, clip)
    assert ((estimate - share * g).abs() < band).all()
    assert (estimate - g).abs().max() > band.max() or level > 2


# The base never moves


@pytest.mark.slow
def test_ten_thousand_steps_of_size_zero_change_no_bit():
    """In every dtype. A loop that perturbs in place, as published, does drift, so that this can fail."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    layers = {f"in_{str(dtype)[6:]}": nn.Linear(4, 3, bias=False).to(dtype) for dtype in dtypes}
    layers = nn.ModuleDict(layers)
    for layer in layers.values():
        layer.weight.requires_grad_(False).copy_(torch.randn(3, 4, generator=generator))
    space = GroupSpace(find_scales(layers, formats=("dense",)))
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    zo = ZO(space.layout, seed=0, per_step=1, clip=1.0, step_size=1e-30, optimizer="sgd")
    x = torch.ones(1, 4)

    def loss(sample):
        return sum(layer(x[sample].to(layer.weight.dtype)).float().sum(1) for layer in layers.values())

    in_place = {name: weight.clone() for name, weight in before.items()}
    pool = directions("rademacher", space.layout, 0, 0, range(100))
    pool = [(z[None], central(z[None], 0.01, 1, own=True), space.layout.split(z)) for z in pool]
    for step in range(10_000):
        z, probes, parts = pool[step % 100]
        found = slopes(evaluate(space, zo.theta, probes, loss), 0.01, 1).tolist()
        zo.move(zo.descend(z, found, 1.0), Step(step, tuple(found), 1.0, 0.0, 0.0))
        for name, weight in in_place.items() if step < 1000 else ():
            for times in (1, -2, 1):
                weight += times * 0.01 * parts[f"{name}.groups"]
    assert (zo.theta == 0).all()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        with space.folded(zo.theta):
            assert torch.equal(layer.weight, before[name])
        assert not torch.equal(in_place[name], before[name])


# Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(optimizer, bad):
    zo = method(optimizer=optimizer)
    losses = quadratic(1.0, 1.0)(zo)
    for _ in range(3):
        one_step(zo, losses, 2)
    before = [zo.theta.clone(), *(average.clone() for average in zo.update.state)]
    count, search, recent = zo.update.count, zo.search.state(), list(zo.recent)

    def broken(probes):
        values = losses(probes)
        values[1] = bad
        return values

    record = one_step(zo, broken, 2)
    assert record.skipped and record.step_size == 0
    assert all(torch.equal(a, b) for a, b in zip(before, [zo.theta, *zo.update.state], strict=True))
    assert (zo.step, zo.skipped) == (4, 1)
    assert (zo.update.count, zo.search.state(), list(zo.recent)) == (count, search, recent)
    assert not one_step(zo, losses, 2).skipped


def test_a_line_search_that_blows_up_makes_the_step_smaller():
    search = StepSize(10)
    search.absorb((1.0, 3.0, 2.0, math.inf))
    assert search.value == 0.25
    assert (search.slope, search.curvature) == (0.0, 0.0)


def test_slopes_that_are_all_zero_do_not_set_the_step_size():
    """A plateau, or losses that rounding made equal: no later gradient may be multiplied by 1e27."""
    zo = method()
    flat = True

    def losses(probes):
        values = quadratic(1.0, 1.0)(zo)(probes)
        return torch.ones_like(values) if flat else values

    one_step(zo, losses, 2)
    flat = False
    one_step(zo, losses, 2)
    assert zo.theta.abs().max() < 1


# The journal is the run


def rough(zo, bad=(4, 11)):
    """A bowl with NaN in some steps and a wall that some line searches hit."""

    def losses(probes):
        at = moved(zo, probes)
        values = (torch.linspace(0.1, 3, at.shape[1]) * (at - 0.3) ** 2 + 0.1 * torch.sin(20 * at)).sum(1)
        if zo.step in bad:
            values[0] = math.nan
        if zo.step == 20 and (probes.sign == 0).any():
            values[-1] = math.inf
        return values

    return losses


def live(steps, **settings):
    zo = method(search_every=5, **settings)
    journal = [one_step(zo, rough(zo), 2, schedule=trapezoid(i, steps, 3, 0.3)) for i in range(steps)]
    return zo, journal


def through_json(journal):
    return [read(json.dumps(json.loads(record.to_json()))) for record in journal]


def through_style(journal):
    return journal_records(journal_tensors(journal))


def assert_same_run(a, b):
    assert torch.equal(a.theta, b.theta)
    assert all(torch.equal(x, y) for x, y in zip(a.update.state, b.update.state, strict=True))
    assert (a.step, a.skipped, a.update.count) == (b.step, b.skipped, b.update.count)
    assert (a.search.state(), list(a.recent)) == (b.search.state(), list(b.recent))


@pytest.mark.parametrize("form", [through_json, through_style])
@pytest.mark.parametrize("step_size", [0.0, 0.03], ids=["searched", "fixed"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replaying_the_journal_gives_the_run_bit_for_bit(optimizer, kind, step_size, form):
    settings = {"optimizer": optimizer, "kind": kind, "step_size": step_size}
    zo, journal = live(25, **settings)
    assert zo.skipped == 2 and zo.theta.any()
    searched = [record.step for record in journal if record.search]
    assert searched == ([] if step_size else [0, 1, 2, 5, 10, 15, 20])
    replayed = method(search_every=5, **settings)
    for record in form(journal):
        replayed.apply(record)
    assert_same_run(zo, replayed)


@pytest.mark.parametrize("stop", [1, 5, 12, 24])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(optimizer, stop):
    whole, journal = live(25, optimizer=optimizer)
    first = method(search_every=5, optimizer=optimizer)
    for i in range(stop):
        one_step(first, rough(first), 2, schedule=trapezoid(i, 25, 3, 0.3))
    tensors, scalars = first.state()
    scalars = {name: float(repr(value)) for name, value in scalars.items()}  # as a checkpoint does
    second = method(search_every=5, optimizer=optimizer)
    second.restore(tensors, scalars, through_json(journal[:stop]))
    assert_same_run(first, second)
    goes_on = [one_step(second, rough(second), 2, schedule=trapezoid(i, 25, 3, 0.3)) for i in range(stop, 25)]
    assert_same_run(whole, second)
    assert [r.to_json() for r in goes_on] == [r.to_json() for r in journal[stop:]]


def test_both_forms_of_the_journal_hold_the_same_records():
    _, journal = live(25)
    text = lambda run: [str((r.step, r.slopes, r.clip, r.step_size, r.search)) for r in run]  # noqa: E731
    assert text(through_json(journal)) == text(through_style(through_json(journal)))
    for record, again in zip(journal, through_json(journal), strict=True):
        if not record.skipped:
            assert record.slopes == again.slopes
            assert (record.clip, record.step_size) == (again.clip, again.step_size)
        assert len(record.to_json()) < 400
        json.loads(record.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_journal_with_a_gap_is_refused():
    _, journal = live(3)
    zo = method(search_every=5)
    zo.apply(journal[0])
    with pytest.raises(ValueError, match="jumps from step 1 to step 2"):
        zo.apply(journal[2])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, -2.5e7, 16777217.0, 3.4e38, 1e-45, 0.0])
def test_short_numbers_are_exact_in_fp32(value):
    assert np.float32(short(value)) == np.float32(value)
    assert short(short(value)) == short(value)
    assert len(repr(short(value))) <= 15


# MeZO


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def mezo(weights, loss, layout, steps, eps, lr, seed):
    """MeZO (arXiv:2305.17333, algorithm 1), weights as a function of theta instead of in place. Returns
    [(L+, L-, projected gradient)]."""
    theta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    log = []
    for step in range(steps):
        z = {n.removesuffix(".groups"): part[0] for n, part in _split(layout, seed, step).items()}

        def perturbed(size, z=z):
            return loss({name: weights[name] + (theta[name] + size * z[name]) for name in weights})

        plus, minus = perturbed(eps), perturbed(-eps)
        projected = (plus.double() - minus.double()).item() / (2 * eps)
        for name in theta:
            theta[name] = theta[name] - lr * (projected * z[name])
        log.append((plus.item(), minus.item(), projected))
    return log


def _split(layout, seed, step):
    return layout.split(directions("gaussian", layout, seed, step, [step]))


def test_absolute_noise_on_a_plain_model_is_mezo():
    generator = torch.Generator().manual_seed(0)
    model = Perceptron().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(16, 5, generator=generator), torch.randn(16, 2, generator=generator)
    space = GroupSpace(find_scales(model, formats=("dense",)), relative=False, clamp=False)
    eps, lr, steps = 1e-3, 1e-3, 100
    zo = ZO(space.layout, seed=9, per_step=1, kind="gaussian", eps=eps, clip=1e9, step_size=lr)

    ours = []

    def losses(probes):
        rows = evaluate(space, zo.theta, probes, lambda i: (model(x[i]) - y[i]).square().mean(1))
        ours.append(rows.view(2, -1).double().mean(1).tolist())
        return rows

    journal = [one_step(zo, losses, 16, own=False) for _ in range(steps)]

    def loss(weights):
        names = {f"{name}.weight": weight for name, weight in weights.items()}
        return (torch.func.functional_call(model, names, (x,)) - y).square().mean(1).double().mean()

    weights = {name: getattr(model, name).weight.data for name in ("first", "second")}
    theirs = mezo(weights, loss, space.layout, steps, eps, lr, seed=9)
    found = torch.tensor([[plus, minus, r.slopes[0]] for (plus, minus), r in zip(ours, journal, strict=True)])
    torch.testing.assert_close(found[:, :2], torch.tensor(theirs)[:, :2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 2], torch.tensor(theirs)[:, 2], rtol=1e-3, atol=1e-3)
    assert sum(ours[-1]) < 0.9 * sum(ours[0])  # and it learns


# The dials that turn themselves


@pytest.mark.parametrize("q", [0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 50, 99, 100, 101])
def test_the_quantile_is_the_nearest_rank(count, q):
    values = np.random.Generator(np.random.PCG64(count)).standard_normal(count)
    assert quantile(values.tolist(), q) == np.quantile(np.abs(values), q, method="inverted_cdf")


def test_the_clip_level_follows_recent_slopes_unless_it_is_fixed():
    zo = method(clip_quantile=0.5)
    assert zo.clip_level([1.0, -3.0, 2.0]) == 2.0
    zo.recent.extend([10.0, -11.0, 12.0, 13.0])
    assert zo.clip_level([1.0, -3.0, 2.0]) == 10.0
    assert method(clip=5.0).clip_level([1.0, -3.0, 200.0]) == 5.0
    assert zo.recent.maxlen == 64 * zo.per_step


def test_the_schedule_is_a_trapezoid():
    found = [trapezoid(step, 10, 2, 0.4) for step in range(10)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [trapezoid(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5
    assert [trapezoid(step, 4, 0, 1.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert all(0 < trapezoid(step, 7, 20, 1.0) <= 1 for step in range(7))


def search_to(best, curvature=3.0, start=0.1, times=6):
    """Searches along a parabola with its minimum at `best`; returns the sizes that were chosen."""
    search = StepSize(10)
    parabola = lambda t: 0.5 * curvature * (t - best) ** 2  # noqa: E731
    sizes = [start]
    for _ in range(times):
        size = sizes[-1]
        search.absorb((size, parabola(-size), parabola(0.0), parabola(size)))
        sizes.append(search.value)
    return sizes


def test_a_step_within_reach_is_found_at_once():
    assert search_to(0.3, start=0.1)[1:] == pytest.approx([0.3] * 6)
    assert search_to(0.05, start=0.1)[1:] == pytest.approx([0.05] * 6)


def test_a_step_out_of_reach_is_approached_by_the_largest_factor():
    assert search_to(2.0, start=0.01) == pytest.approx([0.01, 0.04, 0.16, 0.64, 2.0, 2.0, 2.0])
    assert search_to(0.001, start=0.1) == pytest.approx([0.1, 0.025, 0.00625, 0.0015625, 0.001, 0.001, 0.001])


def test_uphill_shrinks_and_a_hill_grows():
    up, hill = StepSize(10), StepSize(10)
    up.absorb((1.0, 0.0, 1.0, 2.0))
    assert up.value == 0.25
    hill.absorb((1.0, 1.0, 0.5, -1.0))
    assert hill.value == 4.0


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("stretch", [1e-3, 1.0, 1e3])
def test_nothing_tuned_the_loss_of_an_ill_conditioned_bowl_falls(optimizer, stretch):
    """Curvatures over four decades, losses of any unit."""
    curvature = stretch * torch.logspace(-2, 2, 20).double()
    zo = method(optimizer=optimizer, eps=0.01)
    losses = quadratic(curvature, 0.5)(zo)
    start = (0.5 * curvature * 0.25).sum()
    record = [one_step(zo, losses, 2).loss for _ in range(200)]
    assert record[-1] < 0.02 * start
    assert max(record) < 1.5 * start


def wide_bowl(steps, size=400, **settings):
    """What is left of a bowl's loss, with far more dimensions than directions: estimates are mostly noise."""
    zo = method(size, 2, **settings)
    curvature = torch.arange(1, size + 1).double() ** -0.5
    losses = quadratic(curvature, 1.0)(zo)
    for _ in range(steps):
        one_step(zo, losses, 2)
    return ((0.5 * curvature * (zo.theta.double() - 1) ** 2).sum() / (0.5 * curvature).sum()).item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_tuned_is_nearly_as_good_as_the_best_fixed_step(optimizer):
    sizes = {"sgd": (0.03, 0.1, 0.3), "momentum": (0.03, 0.1, 0.3), "adam": (0.01, 0.03, 0.1)}[optimizer]
    best = min(wide_bowl(150, optimizer=optimizer, step_size=size) for size in sizes)
    assert wide_bowl(150, optimizer=optimizer) < 1.2 * best


def test_the_first_step_moves_theta_by_about_eps():
    zo = method(eps=0.02)
    descent = torch.full((20,), 5.0)
    assert zo.reaching(1, descent) * 5.0 == pytest.approx(0.02)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_those_of_torch(optimizer):
    """torch.optim as the reference: SGD is SGD; Adam is Adam; momentum is Adam's first average alone."""
    gradients = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    zo = method(optimizer=optimizer, momentum=0.9, second=0.99)
    theirs = nn.Parameter(torch.zeros(20))
    reference = {
        "sgd": torch.optim.SGD([theirs], lr=0.1),
        "momentum": None,
        "adam": torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-12),
    }[optimizer]
    theta = average = torch.zeros(20)
    for count, gradient in enumerate(gradients, 1):
        theta = theta - 0.1 * zo.update(gradient)
        if reference:
            theirs.grad = gradient.clone()
            reference.step()
        else:
            average = 0.9 * average + 0.1 * gradient
            theirs.data -= 0.1 * average / (1 - 0.9**count)
    torch.testing.assert_close(theta, theirs.data, rtol=1e-5, atol=1e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'sgd', 'momentum' or 'adam', not 'lion'"):
        method(optimizer="lion")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_replays_the_same_bits(optimizer):
    zo, journal = live(25, optimizer=optimizer)
    replayed = method(search_every=5, optimizer=optimizer, device="cuda")
    for record in journal:
        replayed.apply(record)
    assert torch.equal(zo.theta, replayed.theta.cpu())


# The golden journal


def golden_method(model):
    space = GainSpace(find_scales(model))
    return space, ZO(space.layout, seed=2024, per_step=8, optimizer="momentum", search_every=5)


def golden_run(model):
    """Thirty steps on the tiny NF4 transformer: fixed random inputs, the output's mean square as the loss."""
    space, zo = golden_method(model)
    data = tiny.inputs(8, seed=1)

    def loss(sample):
        return model(**{name: value[sample] for name, value in data.items()}).sample.square().mean((1, 2, 3))

    def losses(probes):
        return evaluate(space, zo.theta, probes, loss)

    return zo, [one_step(zo, losses, 8, schedule=trapezoid(step, 30, 0, 0.2)) for step in range(30)]


def golden_journal():
    return [read(line) for line in (GOLDEN / "journal.jsonl").read_text().splitlines()]


def sha256(theta):
    return hashlib.sha256(theta.numpy().astype("<f4").tobytes()).hexdigest()


def test_the_golden_journal_replays_bit_for_bit(transformer):
    _, zo = golden_method(transformer("nf4"))
    for record in golden_journal():
        zo.apply(record)
    assert zo.step == 30
    assert sha256(zo.theta) == (GOLDEN / "theta.sha256").read_text().strip()


def test_a_live_run_still_writes_the_golden_journal(transformer):
    """Up to the last bits of the losses, which differ between processors."""
    zo, journal = golden_run(transformer("nf4"))
    golden = golden_journal()
    for name, tolerance in (("slopes", 0.02), ("clip", 0.02), ("step_size", 0.05), ("loss", 1e-3)):
        runs = ([getattr(record, name) for record in run] for run in (journal, golden))
        found, expected = (torch.tensor(values, dtype=torch.float64) for values in runs)
        assert (found - expected).abs().max() < tolerance * expected.abs().max(), name
    assert [bool(r.search) for r in journal] == [bool(r.search) for r in golden]
    assert golden[-1].loss < golden[0].loss


def write_golden():
    with tempfile.TemporaryDirectory() as folder:
        model = load_transformer(tiny.save_pipeline(Path(folder) / "model"))
    zo, journal = golden_run(model)
    for name, text in (
        ("journal.jsonl", "".join(f"{record.to_json()}\n" for record in journal)),
        ("theta.sha256", sha256(zo.theta) + "\n"),
    ):
        temporary = GOLDEN / f"{name}.tmp"
        temporary.write_text(text, newline="\n")
        os.replace(temporary, GOLDEN / name)


if __name__ == "__main__":
    write_golden()

"""Gauss-Newton against what is known exactly: the damped solution, the Jacobian, bowls, and the journal."""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from exact import exact_net, net_inputs, quantised_net

from zo_engine.blocks import Prefix, levels
from zo_engine.journal import Move, read
from zo_engine.models import load_transformer
from zo_engine.newton import DAMPINGS, REACH, SHARES, TRIES, GaussNewton, _best, _weighed
from zo_engine.noise import Layout
from zo_engine.probes import GainSpace, evaluate
from zo_engine.recipe import GROWTH, Recipe
from zo_engine.scales import find_scales
from zo_engine.style import journal_records, journal_tensors, make_space
from zo_engine.zo import ZO

GOLDEN = Path(__file__).parent / "golden"
BATCH = 3


def method(size=20, **settings):
    layout = Layout({"a.rows": (size // 2,), "b.rows": (size - size // 2,)})
    return GaussNewton(layout, [layout.part(["b"]), layout.part(["a"])], **{"seed": 3, "per_part": [4, 4]} | settings)


def at(newton, probes):
    """[R, n] the theta of every row, in fp64."""
    theta = newton.theta.double().repeat(len(probes.sign), 1)
    where = newton.layout.index(probes.layout)
    theta[:, where] += probes.z.double()[probes.direction] * (probes.eps * probes.sign.double())[:, None]
    return theta


def squared(errors):
    """What the method reads of errors [R, m] whose squared norm is the loss."""
    return torch.cat([errors.square().sum(1, keepdim=True), errors], 1)


def least_squares(matrices, targets):
    """outcomes(newton) of `A theta - b`, each example with its own A [B, m, n] and b [B, m]."""

    def of(newton):
        def outcomes(part, probes, fresh):
            example = probes.sample % len(matrices)
            return squared(torch.einsum("rmn,rn->rm", matrices[example], at(newton, probes)) - targets[example])

        return outcomes

    return of


def problem(size=20, errors=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(BATCH, errors, size), draw(BATCH, errors)


# A step


def test_a_step_is_the_damped_solution_in_the_span_of_its_directions():
    matrices, targets = problem()
    newton = method()
    span = torch.zeros(8, 20, dtype=torch.float64)
    span[:4, 10:], span[4:, :10] = (z.double() for z in newton.directions())
    record = newton.advance(least_squares(matrices, targets)(newton), BATCH, 20 * BATCH)
    jacobian = matrices @ span.T
    gram = torch.einsum("bmk,bml->kl", jacobian, jacobian) / BATCH
    slope = -torch.einsum("bmk,bm->k", jacobian, targets) / BATCH
    damped = gram + record.damping * gram.diagonal().mean() * torch.eye(8)
    expected = -torch.linalg.solve(damped, slope) @ span
    torch.testing.assert_close(newton.theta.double(), expected, rtol=1e-4, atol=1e-6)
    assert (record.damping, record.share) == (min(DAMPINGS), 1.0)  # the model is exact: the boldest move is the best
    losses = lambda theta: ((matrices @ theta - targets) ** 2).sum(1).mean().item()  # noqa: E731
    assert record.tried[0] == pytest.approx(losses(torch.zeros(20, dtype=torch.float64)), rel=1e-6)
    assert min(record.tried) == pytest.approx(losses(newton.theta.double()), rel=1e-6)
    assert record.loss == pytest.approx(record.tried[0], rel=1e-6)
    assert record.size == pytest.approx(newton.theta.square().mean().sqrt().item(), rel=1e-6)


def test_the_model_of_the_loss_is_that_of_the_exact_jacobian():
    """On quantised layers in fp64, against automatic differentiation of the folded expression."""
    net, views = exact_net(quantised_net("nf4"))
    space = GainSpace(views)
    tokens, pooled, target = net_inputs(BATCH, torch.float64)
    newton = GaussNewton(space.layout, [space.layout], seed=1, per_part=[6], eps=1e-6)
    newton.theta = torch.linspace(-0.3, 0.3, space.layout.size, dtype=torch.float64)

    def error(sample):
        return (net(tokens[sample], pooled[sample]) - target[sample]).flatten(1)

    def outcomes(part, probes, fresh):
        return squared(evaluate(space, newton.theta, probes, error))

    gram, slope, loss = newton._model(outcomes, BATCH)
    (z,) = newton.directions()

    def folded(weights):
        with space.folded(newton.theta + weights @ z.double()):
            return error(torch.arange(BATCH))

    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    columns = torch.stack([(folded(h) - folded(-h)).flatten() / 2e-6 for h in step])
    centre = folded(torch.zeros(6, dtype=torch.float64)).flatten()
    torch.testing.assert_close(gram, columns @ columns.T / BATCH, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope, columns @ centre / BATCH, rtol=1e-3, atol=1e-4)
    assert loss == pytest.approx(centre.square().sum().item() / BATCH, rel=1e-5)


def test_nothing_tuned_an_ill_conditioned_bowl_is_solved_where_slopes_crawl():
    """Curvatures from 1 to 1e-4: at equal passes, descent along slopes leaves more than ten times as much."""
    size = 40
    matrices = torch.diag(torch.logspace(0, -2, size, dtype=torch.float64)).repeat(BATCH, 1, 1)
    minimum = torch.full((size,), 0.5, dtype=torch.float64)
    targets = (matrices @ minimum).float().double()
    newton = method(size, per_part=[10, 10])
    outcomes, passes = least_squares(matrices, targets)(newton), 0
    for _ in range(40):
        newton.advance(outcomes, BATCH, BATCH)
        passes += newton.cost(newton.step) + len(TRIES) + 1
    left = lambda theta: ((matrices[0] @ theta.double() - targets[0]) ** 2).sum().item()  # noqa: E731
    start = left(torch.zeros(size))

    descent = ZO(newton.layout, seed=3, per_step=2 * BATCH)

    def losses(probes, fresh):
        theta = descent.theta.double() + probes.z.double()[probes.direction] * (
            probes.eps * probes.sign.double()[:, None]
        )
        return ((matrices[0] @ theta.T - targets[0][:, None]) ** 2).sum(0)

    for _ in range(passes // (2 * 2 + 1)):
        descent.advance(losses, BATCH)
    assert left(newton.theta) < 1e-3 * start
    assert left(newton.theta) < 0.1 * left(descent.theta) < start


def test_a_move_that_fresh_examples_refute_is_not_made():
    newton = method()

    def outcomes(part, probes, fresh):
        return squared(at(newton, probes) + (-1.0 if fresh else 1.0))  # the fresh minimum lies on the other side

    record = newton.advance(outcomes, BATCH, BATCH)
    assert not newton.theta.any() and newton.step == 1
    assert not record.skipped and record.damping == record.size == 0 and not any(record.weights)
    assert min(record.tried) == record.tried[0]


def chosen(steps):
    """Which try is made after steps of (losses of every try, their errors)."""
    standing, made = [], []
    for tried, errors in steps:
        standing = _weighed(standing, tried, errors)
        made.append(_best(standing))
    return made


def test_a_try_is_made_if_it_is_surely_better_than_standing_still():
    still, worse, slightly = 1.0, 1.2, 0.98
    assert chosen([((still, worse, slightly), (0.1, 0.03))]) == [0]  # by less than its standard error
    assert chosen([((still, worse, slightly), (0.1, 0.01))]) == [2]
    assert chosen([((still, 0.9, 0.5), (0.01, 0.6))]) == [1]  # the bold one may be chance
    assert chosen([((still, 0.9, 0.8), (0.0, 0.0))]) == [2]  # of one example alone, errors are not known
    assert chosen([((still, still, still), (0.0, 0.0))]) == [0]


def test_what_helps_a_little_again_and_again_is_made_and_an_old_success_fades():
    slightly = ((1.0, 0.991, 1.0), (0.01, 0.01))
    assert chosen([slightly] * 3) == [0, 1, 1]
    once, never = ((1.0, 0.9, 1.0), (0.01, 0.01)), ((1.0, 1.02, 1.0), (0.01, 0.01))
    assert chosen([once, *[never] * 3]) == [1, 1, 0, 0]


def test_steps_count_in_units_of_their_errors():
    """A step of the start, where losses fall by a hundred times as much, does not outvote those after it."""
    start, later = ((100.0, 50.0, 60.0), (5.0, 5.0)), ((1.0, 0.9, 0.6), (0.03, 0.03))
    assert chosen([start, later]) == [1, 2]


def test_a_try_that_is_not_finite_begins_anew():
    good, bad = ((1.0, 0.9, 0.95), (0.01, 0.01)), ((1.0, math.nan, 0.95), (math.nan, 0.01))
    assert chosen([good, bad, good]) == [1, 2, 2]
    assert chosen([good, ((math.inf, 0.9, 0.95), (0.01, 0.01))]) == [1, 0]


def test_chance_moves_little_where_nothing_helps():
    """Shares of two ways that help by chance alone: three of four times one looks good, and few steps move."""
    noise = torch.randn(200, 64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rises = torch.cat([noise * share for share in SHARES], 2)
    tried, errors = 1 + rises.mean(1), rises.std(1) / 8
    steps = [((1.0, *t), e) for t, e in zip(tried.tolist(), errors.tolist(), strict=True)]
    assert (tried < 1).any(1).float().mean() > 0.7
    assert sum(map(bool, chosen(steps))) < 0.5 * len(steps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_error_that_is_not_finite_changes_nothing_or_is_not_chosen(bad, fresh):
    newton = method()
    good = least_squares(*problem())(newton)
    newton.advance(good, BATCH, BATCH)
    before = newton.theta.clone()

    def outcomes(part, probes, is_fresh):
        found = good(part, probes, is_fresh)
        if is_fresh == fresh:
            found[-1, 0] = bad  # of the batch: a probe; of the fresh ones: the most careful damping
        return found

    record = newton.advance(outcomes, BATCH, BATCH)
    assert record.skipped == (not fresh)
    assert torch.equal(newton.theta, before) == record.skipped
    assert (newton.step, newton.skipped) == (2, int(not fresh))
    assert newton.theta.isfinite().all()


def test_a_flat_loss_moves_nothing_far():
    newton = method()
    for _ in range(2):
        newton.advance(lambda part, probes, fresh: squared(torch.ones(len(probes.sign), 5)), BATCH, BATCH)
    assert not newton.theta.any()


def test_directions_double_and_are_no_more_than_elements():
    first = ((3, 0, 4), (3, GROWTH - 1, 4), (3, GROWTH, 8), (3, 2 * GROWTH, 16), (1, 100 * GROWTH, 8), (0, GROWTH, 4))
    for doublings, step, count in first:
        newton = method(20, per_part=[4, 6], doublings=doublings)
        newton.step = step
        count, other = min(10, count), min(10, count * 6 // 4)
        assert [z.shape for z in newton.directions()] == [(count, 10), (other, 10)]
        assert newton.counts(step) == [count, other] and newton.cost(step) == count + other + 2
    assert [method(200, per_part=[4, 4]).counts(GROWTH * n)[0] for n in (2, 3, 9)] == [16, 32, 32]


def test_some_directions_move_whole_layers():
    """One in four, at most one a layer; and what only they can do in one step, they do."""
    shapes = {"a.rows": (3,), "b.rows": (5,), "c.rows": (32,)}
    layout = Layout(shapes)
    newton = GaussNewton(layout, [layout], seed=1, per_part=[12])
    (z,) = newton.directions()
    assert [sorted(row.abs().tolist()) for row in z[9:]] == [[0] * 37 + [4] * 3, [0] * 35 + [3] * 5, [0] * 8 + [1] * 32]
    assert (z[:9].abs() == 1).all() and z.dtype == torch.int8
    few = GaussNewton(layout, [layout], seed=1, per_part=[8])  # two for three layers: a and c move together
    seen = set()
    for few.step in range(8):
        together, alone = few.directions()[0][6:].tolist()
        assert together[3:8] == [0] * 5 and [*alone[:3], *alone[8:]] == [0] * 35
        assert len({*together[:3]}) == len({*together[8:]}) == len({*alone[3:8]}) == 1
        seen.add(together[0] * together[8])
    assert seen == {1, -1}

    target = torch.tensor([0.1] * 3 + [-0.05] * 5 + [0.02] * 32, dtype=torch.float64)

    def outcomes(part, probes, fresh):
        return squared(at(newton, probes) - target)

    newton.advance(outcomes, 1, 1, tries=((1e-6, 1.0),))
    torch.testing.assert_close(newton.theta.double(), target, rtol=1e-3, atol=1e-4)


# The journal is the run


def rough(newton, bad=(2, 5)):
    """A curved valley with a hole in some steps."""

    def outcomes(part, probes, fresh):
        theta = at(newton, probes)
        found = squared(torch.cat([theta - 0.3, 0.5 * torch.sin(3 * theta) + theta.roll(1, 1)], 1))
        if newton.step in bad and not fresh:
            found[0, 1] = math.nan
        return found

    return outcomes


def live(steps=9, **settings):
    newton = method(**settings)
    return newton, [newton.advance(rough(newton), BATCH, BATCH) for _ in range(steps)]


def lines(journal):
    return [record.to_json() for record in journal]


def through_json(journal):
    return [read(json.dumps(json.loads(record.to_json()))) for record in journal]


def through_style(journal):
    return journal_records(journal_tensors(journal))


@pytest.mark.parametrize("form", [through_json, through_style])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_replaying_the_journal_gives_the_run_bit_for_bit(kind, form):
    steps = GROWTH + 2
    newton, journal = live(steps, kind=kind)
    assert newton.skipped == 2 and newton.theta.any() and [r.skipped for r in journal].count(True) == 2
    assert len(journal[-1].weights) == 2 * len(journal[0].weights)
    again = method(kind=kind)
    for record in form(journal):
        again.apply(record)
    assert torch.equal(again.theta, newton.theta) and (again.step, again.skipped) == (steps, 2)


def test_journals_from_before_whole_layers_were_moved_replay(monkeypatch):
    monkeypatch.setattr("zo_engine.newton.WHOLE", 0)
    before, journal = live()
    assert all(record.whole == 0 for record in journal)
    old = [record.to_json().replace(', "whole": 0', "") for record in journal]
    packed = {"weights": journal_tensors(journal)["weights"]}
    monkeypatch.undo()
    for records in map(read, old), journal_records(packed):
        again = method()
        for record in records:
            again.apply(record)
        assert torch.equal(again.theta, before.theta) and before.theta.any()


def test_json_keeps_every_number():
    _, journal = live()
    assert lines(through_json(journal)) == lines(journal)
    assert [r for r in through_json(journal) if not r.skipped] == [r for r in journal if not r.skipped]


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(stop):
    whole, journal = live()
    first, _ = live(stop)
    tensors, scalars = first.state()
    second = method()
    kept = through_json(journal)[:stop]
    second.restore(tensors, {name: float(repr(value)) for name, value in scalars.items()}, kept)
    assert second.standing == first.standing
    goes_on = [second.advance(rough(second), BATCH, BATCH) for _ in range(stop, 9)]
    assert lines(goes_on) == lines(journal[stop:]) and torch.equal(second.theta, whole.theta)


def test_records_that_do_not_fit_are_refused():
    _, journal = live(2)
    newton = method()
    with pytest.raises(ValueError, match="jumps from step 0 to step 1"):
        newton.apply(journal[1])
    with pytest.raises(ValueError, match="step 0 has 3 weights, not 8"):
        newton.apply(Move(0, (1.0, 2.0, 3.0), 0.1, 1.0))
    assert newton.step == 0 and not newton.theta.any()


# On a real transformer, and the golden journal


def golden_method(model):
    recipe = Recipe(images="none", depth=0.5, directions=12, seed=2024)
    space = make_space(find_scales(model), recipe)
    found = levels(space.views, recipe.depth)
    parts = [space.layout.part(level.layers) for level in found]
    newton = GaussNewton(
        space.layout, parts, seed=recipe.seed, per_part=[level.share(recipe.directions) for level in found]
    )
    return space, newton, [Prefix(model, level) if level.first else None for level in found]


def golden_run(model, chunk=None, prefixed=True):
    """Eight steps on the tiny NF4 transformer: fixed random inputs, the output's mean square as the loss."""
    space, newton, prefixes = golden_method(model)
    data = tiny.inputs(4, seed=1)

    def error(sample):
        output = model(**{name: value[sample] for name, value in data.items()}).sample.flatten(1)
        return output / output.shape[1] ** 0.5

    def outcomes(part, probes, fresh):
        with space.dressed(newton.theta):
            replay = prefixes[part].run(error, 4) if prefixed and prefixes[part] else None
        return squared(evaluate(space, newton.theta, probes, error, chunk, replay))

    return newton, [newton.advance(outcomes, 4, 4) for _ in range(8)]


def golden_journal():
    return [read(line) for line in (GOLDEN / "newton.jsonl").read_text().splitlines()]


def sha256(theta):
    return hashlib.sha256(theta.numpy().astype("<f4").tobytes()).hexdigest()


def test_the_golden_journal_replays_bit_for_bit(transformer):
    _, newton, _ = golden_method(transformer("nf4"))
    for record in golden_journal():
        newton.apply(record)
    assert newton.step == 8 and sha256(newton.theta) == (GOLDEN / "newton.sha256").read_text().strip()


def test_a_live_run_still_writes_the_golden_journal(transformer):
    """Up to what the last bits of the losses do to the solution."""
    newton, journal = golden_run(transformer("nf4"))
    golden = golden_journal()
    assert [r.damping for r in journal] == [r.damping for r in golden]
    assert [r.loss for r in journal] == pytest.approx([r.loss for r in golden], rel=1e-2)
    assert golden[-1].loss < 0.8 * golden[0].loss


def test_directions_that_are_drawn_anew_for_each_example_are_the_same(transformer, monkeypatch):
    whole, journal = golden_run(transformer("nf4"))
    monkeypatch.setattr("zo_engine.newton.HELD", 0)
    again, anew = golden_run(transformer("nf4"))
    assert anew == journal and torch.equal(again.theta, whole.theta)


def test_prefix_and_chunks_change_nothing_but_rounding(transformer):
    plain, journal = golden_run(transformer("nf4"), prefixed=False)
    chunked, again = golden_run(transformer("nf4"), chunk=5)
    assert [r.loss for r in again] == pytest.approx([r.loss for r in journal], rel=1e-2)
    torch.testing.assert_close(chunked.theta, plain.theta, rtol=0.1, atol=0.1 * plain.theta.abs().max().item())


@pytest.mark.gpu
def test_a_gpu_replays_the_same_bits(transformer):
    _, newton, _ = golden_method(transformer("nf4"))
    there = GaussNewton(newton.layout, newton.parts, seed=2024, per_part=newton.per_part, device="cuda")
    for record in golden_journal():
        newton.apply(record)
        there.apply(record)
    assert torch.equal(newton.theta, there.theta.cpu())


def write_golden():
    with tempfile.TemporaryDirectory() as folder:
        model = load_transformer(tiny.save_pipeline(Path(folder) / "model"))
    newton, journal = golden_run(model)
    for name, text in (
        ("newton.jsonl", "".join(f"{record.to_json()}\n" for record in journal)),
        ("newton.sha256", sha256(newton.theta) + "\n"),
    ):
        temporary = GOLDEN / f"{name}.tmp"
        temporary.write_text(text, newline="\n")
        os.replace(temporary, GOLDEN / name)


if __name__ == "__main__":
    write_golden()


def test_a_move_goes_no_further_than_its_reach():
    layout = Layout({"a.rows": (400,), "b.rows": (1200,)})
    newton = GaussNewton(layout, [layout.part(["a"]), layout.part(["b"])], seed=2, per_part=[8, 8])
    for size in (1e-3, 0.05, 1.0):
        weights = tuple(size * (-1) ** i for i in range(16))
        (move,), (free,) = newton._moves([newton._shortened(weights)]), newton._moves([weights])
        length, would = (m.square().mean().sqrt().item() for m in (move, free))
        assert length == pytest.approx(min(would, REACH), rel=0.15)
        torch.testing.assert_close(move / length, free / would, rtol=1e-4, atol=1e-5)

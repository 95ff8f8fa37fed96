"""MeZO parity: in absolute group space over plain fp32 weights, the published algorithm, step by step."""

import pytest
import tiny
import torch
from test_text_task import some_tokens

from zo_engine.noise import directions
from zo_engine.probes import GroupSpace, evaluate
from zo_engine.scales import find_scales
from zo_engine.tasks.text import stack, token_losses
from zo_engine.zo import ZO

EPS, RATE, STEPS = 1e-3, 1e-4, 4


def reference(model, names: list[str], noise, losses) -> list[tuple[float, float, float]]:
    """Algorithm 1 of arXiv:2305.17333: +eps, -2 eps, +eps in place, then the update with the same directions."""
    weights = [model.get_submodule(name).weight for name in names]

    def perturb(z, scale: float) -> None:
        for weight, part in zip(weights, z, strict=True):
            weight.data += scale * part

    trace = []
    for step in range(STEPS):
        z = noise(step)
        perturb(z, EPS)
        plus = losses(step).mean().item()
        perturb(z, -2 * EPS)
        minus = losses(step).mean().item()
        perturb(z, EPS)
        projected = (plus - minus) / (2 * EPS)
        perturb(z, -RATE * projected)
        trace.append((plus, minus, projected))
    return trace


@pytest.mark.parametrize("kind", ["opt", "llama"])
@torch.no_grad()
def test_losses_and_projected_gradients_are_those_of_the_published_algorithm(kind):
    batches = [stack(some_tokens(3, seed)) for seed in range(STEPS)]
    model, other = tiny.language_model(kind), tiny.language_model(kind)
    views = find_scales(model, formats=("dense",))
    space = GroupSpace(views, relative=False, clamp=False)
    assert space.layout.size == sum(model.get_submodule(name).weight.numel() for name in views)

    def noise(step: int):
        z = directions("gaussian", space.layout, 5, step, [step])[0]  # as `ZO.directions` numbers them
        return list(space.layout.split(z).values())

    expected = reference(other, list(views), noise, lambda step: token_losses(other, batches[step]))
    zo = ZO(space.layout, seed=5, per_step=1, kind="gaussian", eps=EPS, clip=1e9, step_size=RATE)
    for plus, minus, projected in expected:
        batch, seen = batches[zo.step], []

        def losses(probes, fresh, batch=batch, seen=seen):
            seen.append(evaluate(space, zo.theta, probes, lambda i: token_losses(model, batch.take(i))))
            return seen[-1]

        record = zo.advance(losses, 3, own=False)
        found = seen[0].view(2, 3).mean(1)
        torch.testing.assert_close(found, torch.tensor([plus, minus]), rtol=1e-5, atol=1e-5)
        assert record.slopes[0] == pytest.approx(projected, rel=0.02, abs=2e-2)  # a difference of 1e-6 over 2 eps
    for name, weight in space.layout.split(zo.theta).items():
        name = name.removesuffix(".groups")
        moved = views[name].base + weight.view_as(views[name].base)
        torch.testing.assert_close(moved, other.get_submodule(name).weight.data, rtol=1e-4, atol=2e-5)
    assert max(abs(p - m) for p, m, _ in expected) > 1e-4


@torch.no_grad()
def test_in_double_precision_nothing_is_left_between_them():
    batches = [stack(some_tokens(3, seed)) for seed in range(STEPS)]
    model, other = tiny.language_model("opt").double(), tiny.language_model("opt").double()
    views = find_scales(model, formats=("dense",))
    space = GroupSpace(views, relative=False, clamp=False)

    def noise(step: int):
        z = directions("gaussian", space.layout, 5, step, range(1))[0].double()
        return list(space.layout.split(z).values())

    expected = reference(other, list(views), noise, lambda step: token_losses(other, batches[step]))
    theta = torch.zeros(space.layout.size, dtype=torch.float64)
    for step, (plus, minus, projected) in enumerate(expected):
        z = torch.cat([part.flatten() for part in noise(step)])
        found = []
        for sign in (1, -1):
            with space.folded(theta + sign * EPS * z):
                found.append(token_losses(model, batches[step]).mean().item())
        assert found == pytest.approx([plus, minus], rel=1e-12)
        assert (found[0] - found[1]) / (2 * EPS) == pytest.approx(projected, rel=1e-8)
        theta = theta - RATE * (found[0] - found[1]) / (2 * EPS) * z

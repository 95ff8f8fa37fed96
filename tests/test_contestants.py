"""The arena: what first order moves starts at the base and ends in a lower loss, and the model comes back as it was."""

import sys
from pathlib import Path

import pytest
import test_text_train
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import contestants
import learning
import tasks

from zo_engine import train
from zo_engine.probes import GroupSpace

pytestmark = pytest.mark.usefixtures("few_own_texts")

model, recipe, studio = test_text_train.model, test_text_train.recipe, test_text_train.studio
TUNED = (contestants.gains, contestants.scales, contestants.lora)


def losses(studio) -> torch.Tensor:
    with torch.no_grad():
        return studio.task.losses(studio.task.batch(0, 8))


@pytest.mark.parametrize(("what", "rate"), list(zip(TUNED, (0.03, 0.03, 0.01), strict=True)))
def test_first_order_starts_at_the_base_learns_and_leaves_the_model_alone(studio, what, rate):
    before, modules = losses(studio), dict(studio.model.named_modules())
    tuned = what(studio)
    with tuned.dressed():
        torch.testing.assert_close(losses(studio), before, rtol=1e-4, atol=1e-4)
    found = contestants.first_order(studio, studio.changed(steps=12).recipe, tuned, rate, 4)
    assert min(point[1] for point in found.curve) < 0.9 * found.curve[0][1]
    with found.put():
        assert losses(studio).mean() < before.mean()
    assert torch.equal(losses(studio), before) and dict(studio.model.named_modules()) == modules


def test_all_scales_are_moved_as_group_space_writes_them(studio):
    tuned = contestants.scales(studio)
    (theta,) = tuned.parameters
    with torch.no_grad():
        theta.add_(0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)))
    space = studio.changed(space="group", depth=1.0, optimizer="sgd").space
    assert isinstance(space, GroupSpace) and space.layout.size == theta.numel()
    with tuned.dressed():
        found = losses(studio)
    with space.folded(theta.detach()):
        torch.testing.assert_close(found, losses(studio), rtol=1e-4, atol=1e-4)


def test_backward_passes_hold_more_than_inference(studio):
    inference = contestants.memory_of_inference(studio)
    assert inference > contestants.resident(studio.model) > sum(p.nbytes for p in studio.model.parameters())
    needed = [contestants.memory_of_first_order(studio, what(studio)) for what in TUNED]
    assert min(needed) > 1.5 * inference
    numbers = [sum(p.numel() for p in what(studio).parameters) for what in TUNED]
    assert sorted(numbers) == [numbers[0], *sorted(numbers[1:])]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "step_size": 0.1}])
def test_a_run_that_is_asked_for_more_passes_goes_on(studio, tmp_path, settings):
    mine = studio.changed(**{"steps": 2, "directions": 4} | settings).recipe
    short = contestants.zeroth(studio, mine, 1, folder=tmp_path)
    longer = contestants.zeroth(studio, mine, 1, 1.5 * short.curve[-1][0], tmp_path)
    assert longer.curve[:3] == short.curve and len(longer.curve) > 3
    whole = contestants.zeroth(studio, mine, 1, 1.5 * short.curve[-1][0])
    assert whole.curve == longer.curve and torch.equal(whole.theta, longer.theta)


def test_the_published_form_learns_the_given_texts_alone(studio, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train.Language, "losses", lambda task, batch: seen.append(task.kept) or batch.tokens.float().mean(1)
    )
    for settings in ({"optimizer": "sgd"}, contestants.PUBLISHED | {"batch_size": 2}):
        contestants.zeroth(studio, studio.changed(**settings, steps=1).recipe, 1)
        kept, seen[:] = set(seen), []
        assert kept == ({None} if "space" in settings else {studio.task.kept})
    assert studio.task.kept


def test_targets_are_read_from_the_curves():
    paper, adam = [(0.0, 1.0), (600.0, 0.4), (1000.0, 0.5)], [(0.0, 1.0), (100.0, 0.0)]
    quick, slow = [(0.0, 1.0), (50.0, 0.5), (3000.0, 0.1), (5000.0, 0.0)], [(0.0, 1.0), (200.0, 0.5), (4000.0, 0.2)]
    found = learning.targets({"ours": {"0": quick, "1": slow}, learning.PAPER: {"0": paper, "1": paper},
                              learning.LONG: {"0": adam, "1": adam}})  # fmt: skip
    tenth = found["a tenth"]
    assert tenth["seeds"] == {"0": 0.05, "1": 0.2} and not tenth["holds"]
    assert tenth["to its lowest"] == pytest.approx({"0": 0.05 + 2.95 / 4, "1": 0.2 + 3.8 / 3})
    assert found["share of the gap"] == {"seeds": {"0": 0.9, "1": 0.8}, "holds": False}
    assert found["worst of the seeds"]["share"] == pytest.approx(0.8 / 0.9) and not found["worst of the seeds"]["holds"]
    alone = learning.targets({"ours": {"0": quick}, learning.PAPER: {"0": paper}, learning.LONG: {"0": adam}})
    worse = learning.targets({"ours": {"0": quick}, learning.PAPER: {"0": [*paper, (2000.0, 1.5)]}})["a tenth"]
    assert worse["seeds"] == {"0": 0.0} and worse["to its lowest"]["0"] == tenth["to its lowest"]["0"] / 2
    longer = {"0": [*quick[:2], (3900.0, 0.05)]}
    further = learning.targets({"ours": {"0": quick}, learning.LONGER: longer, learning.LONG: {"0": adam}})
    assert further["share of the gap"]["seeds"] == {"0": 0.95}
    assert alone["a tenth"]["holds"] and alone["share of the gap"]["holds"] and "worst of the seeds" not in alone


def test_the_damage_is_undone_by_the_answer_that_is_known(recipe, tmp_path):
    hurt = train.prepare(recipe, tmp_path)
    before = losses(hurt)
    answer = -tasks.damage(hurt.model, hurt.space.views, 3, recipe.quantization)
    assert losses(hurt).mean() > 1.05 * before.mean()
    hurt = hurt.changed()
    with hurt.space.folded(answer):
        torch.testing.assert_close(losses(hurt), before, rtol=1e-4, atol=1e-4)
    spread = answer.std().item()
    assert 0.9 * tasks.DAMAGE < spread < 1.1 * tasks.DAMAGE

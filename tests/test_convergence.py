"""When a held-out loss counts as flat: on curves that are known, and on a small run that may end early."""

import math

import numpy as np
import pytest
import test_text_train
from test_train import go

from zo_engine.__main__ import finish
from zo_engine.convergence import LEAST, trend
from zo_engine.recipe import GROWTH, HALVED, Recipe
from zo_engine.run import Run

pytestmark = pytest.mark.usefixtures("few_own_texts")

model, recipe, studio = test_text_train.model, test_text_train.recipe, test_text_train.studio


def evaluations(curve, noise: float = 0.0, every: int = 1, seed: int = 0) -> list[dict]:
    """64 items of very different losses that all follow a curve, each time with noise of the step's own."""
    rng = np.random.default_rng(seed)
    height = rng.lognormal(0, 1, 64)
    losses = lambda step: height * curve(step) * (1 + noise * rng.standard_normal())  # noqa: E731
    return [{"step": step, "items": losses(step).tolist()} for step in range(0, 61, every)]


@pytest.mark.parametrize("every", [1, 3])
def test_a_curve_that_falls_to_its_floor_is_flat_and_one_that_falls_on_is_not(every):
    fast, slow = (lambda step: 0.5 + 0.5 * math.exp(-step / 5)), (lambda step: 0.5 + 0.5 * math.exp(-step / 40))
    assert trend(evaluations(fast, every=every)).flat
    assert not trend(evaluations(slow, every=every)).flat
    assert not trend(evaluations(lambda step: 1 - step / 100, every=every)).flat


def test_the_gain_of_a_line_is_its_slope_times_the_window():
    found = trend(evaluations(lambda step: 1 - step / 100))
    height = np.mean(evaluations(lambda step: 1)[0]["items"])
    assert found.since == 40 and found.gain == pytest.approx(0.2 * height) and found.error > 0


def test_noise_is_not_taken_for_the_end():
    """A slow fall under noise: nothing significant is gained in the window, but nothing is sure either."""
    for seed in range(20):
        found = trend(evaluations(lambda step: 1 - 0.2 * step / 60, noise=0.1, seed=seed))
        assert not found.flat


def test_a_curve_that_rises_again_is_flat_and_one_that_never_fell_is_not():
    assert trend(evaluations(lambda step: abs(step - 30) / 300 + 0.5)).flat
    assert not trend(evaluations(lambda step: 1.0)).flat
    assert not trend(evaluations(lambda step: 1 + step / 100)).flat


def test_too_little_or_damaged_is_no_trend():
    found = evaluations(lambda step: 0.5 + 0.5 * math.exp(-step))
    assert trend([]) is None and trend(found[: LEAST - 1]) is None and trend(found, since=58) is None
    broken = [e | {"items": [None, *e["items"][1:]]} for e in found]
    assert trend(broken) is None and trend([*found, broken[-1]]).flat


def test_a_wider_look_is_waited_for():
    recipe, steps = Recipe(doublings=2, halvings=1), (0, 1, HALVED, HALVED + 1, GROWTH, GROWTH + 1, 2 * GROWTH + 1, 100)
    assert [recipe.widened(n) for n in steps] == [0, 0, 0, HALVED, HALVED, GROWTH, 2 * GROWTH, 2 * GROWTH]
    assert Recipe().widened(10**6) == 3 * GROWTH and Recipe(doublings=0, halvings=0).widened(100) == 0
    assert Recipe(optimizer="sgd").widened(100) == 0


def ends(run: Run) -> int:
    return run.status()["step"]


@pytest.mark.slow
def test_a_run_says_that_it_is_flat_and_ends_there_if_it_may(studio, tmp_path, monkeypatch):
    monkeypatch.setattr("zo_engine.convergence.SMALL", 10.0)  # as if every gain were small, once anything was learnt
    settings = {"steps": 20, "directions": 16, "batch_size": 4, "evaluate_every": 1}
    early = go(studio, tmp_path / "early", stop_when_flat=True, **settings)
    first = next(e["step"] for e in early.evaluations() if "flat" in e)
    assert ends(early) == first < 20 and early.status()["state"] == "done" and early.status()["flat"]
    assert "as the recipe asks" in early.log_file.read_text() and "stopped falling" in early.log_file.read_text()
    assert ends(go(studio, tmp_path / "early", stop_when_flat=True, **settings)) == first  # a resume ends there too
    long = go(studio, tmp_path / "long", **settings | {"steps": first + 2})
    assert ends(long) == first + 2 and long.evaluations()[: first + 1] == early.evaluations()


@pytest.mark.parametrize(("looks", "said"), [(61, True), (LEAST - 1, False)])
def test_only_what_can_be_judged_is_said_of_further_steps(tmp_path, capsys, looks, said):
    run = Run.create(tmp_path / "run", Recipe(steps=60, doublings=0))
    for facts in evaluations(lambda step: 1 - step / 100)[:looks]:
        run.append_evaluation(facts | {"loss": float(np.mean(facts["items"]))})
    run.write_status("done", step=looks - 1, best_step=looks - 1, best_held_out=0.5)
    finish("done", run, False)
    assert ("more steps may bring more" in capsys.readouterr().out) == said

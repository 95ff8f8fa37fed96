"""The diffusion task: the loss against diffusers' own formula, noise levels, batches, and previews."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from zo_engine import cache, models
from zo_engine.tasks.diffusion import (
    HELD_OUT,
    KEPT_WEIGHT,
    SEARCH,
    Batch,
    Diffusion,
    Example,
    answers,
    draw_sigma,
    flow_losses,
    sample,
    shifted,
)


def random_batch(size: int, seed: int = 0) -> Batch:
    given = tiny.inputs(size, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(given["hidden_states"].shape, generator=generator)
    text = given["encoder_hidden_states"], given["pooled_projections"]
    return Batch(given["hidden_states"], noise, given["timestep"] / 1000, *text, torch.ones(len(noise)))


def examples(count: int, shape=(16, 4, 4)) -> list[Example]:
    generator = torch.Generator().manual_seed(count)
    draw = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    return [Example(draw(*shape), draw(16, 64), draw(64)) for _ in range(count)]


def task(**given) -> Diffusion:
    settings = {"seed": 3, "shift": 3.0} | given
    return Diffusion(None, examples(7), examples(2), (torch.zeros(16, 64), torch.zeros(64)), **settings)


@torch.no_grad()
def test_loss_equals_diffusers_trainer_formula():
    """As train_dreambooth_lora_sd3.py computes it with precondition_outputs=0, on its scheduler's sigmas."""
    transformer = tiny.transformer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    batch = random_batch(5)
    indices = torch.tensor([3, 200, 500, 801, 999])
    timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * batch.noise
    predicted = transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=batch.prompt,
        pooled_projections=batch.pooled,
        return_dict=False,
    )[0]
    target = batch.noise - batch.latents
    weighting = torch.ones_like(sigmas)
    reference = torch.mean((weighting * (predicted - target) ** 2).reshape(5, -1), 1)

    same = Batch(batch.latents, batch.noise, sigmas.flatten(), batch.prompt, batch.pooled, batch.weight)
    ours = flow_losses(transformer, same, torch.float32)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


@torch.no_grad()
def test_loss_is_per_sample_and_reduced_in_fp32():
    transformer, batch = tiny.transformer().to(torch.bfloat16), random_batch(4)
    losses = flow_losses(transformer, batch, torch.bfloat16)
    assert losses.dtype == torch.float32 and losses.shape == (4,)
    alone = torch.cat([flow_losses(transformer, batch.take(torch.tensor([i])), torch.bfloat16) for i in range(4)])
    torch.testing.assert_close(losses, alone, rtol=2e-2, atol=0)


def test_sigma_is_stratified_logit_normal_and_shifted():
    rng = np.random.default_rng(0)
    unshifted = draw_sigma(rng, 4000, 0.5, 0.0, 1.0, 1.0)
    logits = np.log(unshifted / (1 - unshifted))
    assert abs(logits.mean()) < 1e-3 and abs(logits.std() - 1) < 1e-2
    cumulative = torch.special.ndtr(torch.from_numpy(np.sort(logits))).numpy()
    assert (np.floor(cumulative * 4000).astype(int) == np.arange(4000)).all()  # one in every stratum
    moved = draw_sigma(np.random.default_rng(0), 4000, 0.5, 0.0, 1.0, 3.0)
    np.testing.assert_allclose(moved, shifted(unshifted, 3.0))


def test_shift_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    np.testing.assert_allclose(shifted(plain.sigmas[:-1].numpy(), 3.0), scheduler.sigmas[:-1].numpy(), rtol=1e-5)


def test_batches_are_a_function_of_seed_step_and_stream():
    first, again = task().batch(4, 6), task().batch(4, 6)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.latents, again.latents)
    for other in (task().batch(5, 6), task(seed=4).batch(4, 6), task().batch(4, 6, SEARCH)):
        assert not torch.equal(first.noise, other.noise)
    assert HELD_OUT != SEARCH


def test_every_picture_comes_once_before_any_comes_again():
    for size in (7, 14):
        latents = task().batch(0, size).latents.flatten(1)
        counts = [int((latents == e.latents.flatten()).all(1).sum()) for e in examples(7)]
        assert counts == [size // 7] * 7


def test_one_picture_size_at_a_time():
    two_sizes, empty = examples(6) + examples(3, (16, 6, 4)), (torch.zeros(16, 64), torch.zeros(64))
    both = Diffusion(None, two_sizes, examples(1), empty, seed=0, shift=1.0)
    shapes = [tuple(both.batch(step, 3).latents.shape[1:]) for step in range(300)]
    assert 0.55 < shapes.count((16, 4, 4)) / 300 < 0.78  # 6 of 9 pictures


def test_caption_dropout_shows_the_empty_caption():
    dropped = task(caption_dropout=0.3)
    share = np.mean([(dropped.batch(step, 7).pooled == 0).all(1).float().mean().item() for step in range(200)])
    assert 0.25 < share < 0.35
    assert not (dropped.evaluation(14)[0].pooled == 0).all(1).any()


def test_a_share_of_the_batch_keeps_the_bases_answers():
    kept = [Example(e.latents, e.prompt, e.pooled, e.latents + 1, 0.125) for e in examples(3)]
    made = Diffusion(
        None, examples(7), examples(2), (torch.zeros(16, 64), torch.zeros(64)), lambda: kept, seed=3, shift=3.0,
        prior=0.25, caption_dropout=1.0,
    )  # fmt: skip
    batch = made.batch(0, 8)
    assert batch.sigma[6:].tolist() == [0.125, 0.125] and (batch.sigma[:6] != 0.125).all()
    assert torch.equal(batch.noise[6:], batch.latents[6:] + 1)
    assert batch.weight.tolist() == [1.0] * 6 + [KEPT_WEIGHT] * 2
    assert (batch.prompt[:6] == 0).all() and (batch.prompt[6:] != 0).any(dim=(1, 2)).all()
    other = made.batch(1, 8).latents[6:]
    assert not torch.equal(batch.latents[6:], other)
    held = made.evaluation(8)[0]
    assert (held.sigma != 0.125).all() and (held.weight == 1).all()


def test_the_base_answers_as_it_did_and_a_moved_model_does_not(folder):
    model = tiny.transformer()
    text = [(e.prompt, e.pooled) for e in examples(2)]
    pipe = models.pipeline(folder, model, models.load_vae(folder))
    made = answers(pipe, text, text[0], seed=5, width=32, height=48, steps=4, guidance=3.0)
    sigmas = {e.sigma for e in made}
    assert [len(sigmas), len(made), max(sigmas)] == [4, 8, 1.0] and min(sigmas) > 0
    batch = Batch(
        torch.stack([e.latents for e in made]), torch.stack([e.noise for e in made]),
        torch.tensor([e.sigma for e in made]), torch.stack([e.prompt for e in made]),
        torch.stack([e.pooled for e in made]), torch.ones(len(made)),
    )  # fmt: skip
    with torch.no_grad():
        assert flow_losses(model, batch, torch.float32).max() < 1e-9
        model.proj_out.weight.mul_(1.1)
        plain = flow_losses(model, batch, torch.float32)
        heavy = flow_losses(model, dataclasses.replace(batch, weight=3 * batch.weight), torch.float32)
        torch.testing.assert_close(heavy, 3 * plain)
        assert flow_losses(model, batch, torch.float32).min() > 1e-6


def test_evaluation_is_fixed():
    one, two = task().evaluation(16), task().evaluation(16)
    assert [len(b.sigma) for b in one] == [16]
    assert torch.equal(one[0].noise, two[0].noise) and torch.equal(one[0].sigma, two[0].sigma)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_preview_depends_on_its_seed_alone(folder):
    pipe = models.pipeline(folder, models.load_transformer(folder, quantization="none"), models.load_vae(folder))
    pipe.set_progress_bar_config(disable=True)
    text = [(e.prompt, e.pooled) for e in examples(3)]
    how = {"width": 32, "height": 48, "steps": 2, "guidance": 3.0}
    together = sample(pipe, text, text[0], [1, 2, 3], **how)
    alone = sample(pipe, text, text[0], [1, 2, 3], together=1, **how)
    assert [image.size for image in together] == [(32, 48)] * 3
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert np.abs(np.asarray(together[0], int) - np.asarray(together[1], int)).max() > 1


def test_latents_use_shift_and_scaling_factor(folder):
    vae = models.load_vae(folder)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = cache.encode(vae, pixels)
    with torch.no_grad():
        reference = (vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
        torch.testing.assert_close(ours, reference)
        # what the stock pipeline undoes before it decodes
        back = vae.decode(ours / vae.config.scaling_factor + vae.config.shift_factor).sample
        torch.testing.assert_close(back, vae.decode(vae.encode(pixels).latent_dist.mean).sample)

"""The diffusion task: rectified-flow loss per sample, a fixed held-out set, and previews, for SD3-like transformers.

Rectified flow (Esser et al., arXiv:2403.03206): `x = (1 - sigma) x0 + sigma noise`, the model predicts `noise - x0`.
All randomness is an argument: a batch carries its noise and noise levels, so that every probe of a step sees the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from zo_engine.blocks import PART
from zo_engine.newton import TRIES

GOLDEN = 0.6180339887498949  # the most even sequence of offsets: frac(k * GOLDEN)
TRAINING, SEARCH, HELD_OUT = 1, 2, 3  # streams of randomness
KEPT_WEIGHT = 3.0  # of an answer to be kept: it carries no noise, so one says as much as several pictures


@dataclass(frozen=True)
class Batch:
    """B examples of one size with everything random already drawn."""

    latents: Tensor  # [B, C, h, w], x0
    noise: Tensor  # [B, C, h, w]
    sigma: Tensor  # [B], in 0..1
    prompt: Tensor  # [B, T, D]
    pooled: Tensor  # [B, P]
    weight: Tensor  # [B], of the example's loss

    def __len__(self) -> int:
        return len(self.sigma)

    def take(self, index: Tensor) -> "Batch":
        index = index.to(self.sigma.device)
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def parts(self) -> list["Batch"]:
        """The examples in their order, PART together."""
        columns = (getattr(self, f.name).split(PART) for f in fields(self))
        return [Batch(*part) for part in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Example:
    """A picture with its caption; one with `noise` and `sigma` of its own is an answer of the base to be kept."""

    latents: Tensor  # [C, h, w]
    prompt: Tensor  # [T, D]
    pooled: Tensor  # [P]
    noise: Tensor | None = None  # [C, h, w]
    sigma: float = 0.0


def predicted(
    model: nn.Module, noisy: Tensor, sigma: Tensor, prompt: Tensor, pooled: Tensor, dtype: torch.dtype, timesteps=1000
) -> Tensor:
    """The velocity [B, C, h, w] that the model predicts at noise level sigma [B]."""
    return model(
        hidden_states=noisy.to(dtype),
        timestep=(sigma * timesteps).to(dtype),
        encoder_hidden_states=prompt.to(dtype),
        pooled_projections=pooled.to(dtype),
        return_dict=False,
    )[0]


def flow_errors(model: nn.Module, batch: Batch, dtype: torch.dtype, train_timesteps: int = 1000) -> Tensor:
    """Error of the predicted velocity, scaled so that its squared norm is the weighted mean squared error,
    [B, C * h * w] in fp32 (fp64 stays fp64).

    The loss is that of diffusers' train_dreambooth_lora_sd3.py with `precondition_outputs=0` and weighting 1.
    """
    sigma = batch.sigma.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents + sigma * batch.noise
    velocity = predicted(model, noisy, batch.sigma, batch.prompt, batch.pooled, dtype, train_timesteps)
    wide = torch.promote_types(velocity.dtype, torch.float32)
    error = (velocity.to(wide) - (batch.noise - batch.latents).to(wide)).flatten(1)
    return error * (batch.weight.to(wide) / error.shape[1]).sqrt()[:, None]


def flow_losses(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Weighted mean squared error of the predicted velocity, one per sample [B]."""
    return flow_errors(model, batch, dtype).square().sum(1)


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """The scheduler's time shift (arXiv:2403.03206, equation 23): `shift s / (1 + (shift - 1) s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(
    rng: np.random.Generator, count: int, offset: float, mean: float, std: float, shift: float
) -> np.ndarray:
    """`count` noise levels, logit-normal then shifted, one from each of `count` equally likely strata, in random order.

    `offset` in 0..1 places all of them inside their strata; a golden-ratio sequence of offsets spreads them evenly
    over the steps as well.
    """
    uniform = (rng.permutation(count) + offset) / count
    normal = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
    return shifted(1 / (1 + np.exp(-(mean + std * normal))), shift)


class Diffusion:
    """Examples, and the losses and pictures of a transformer on them."""

    one_pass = ("losses", "outcomes")  # pass through the model once, so that what lies before a level can be replayed
    tries = TRIES

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Example],
        held_out: Sequence[Example],
        empty: tuple[Tensor, Tensor],
        kept: Callable[[], Sequence[Example]] = tuple,
        *,
        seed: int,
        shift: float,
        sigma_mean: float = 0.0,
        sigma_std: float = 1.0,
        caption_dropout: float = 0.0,
        prior: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """empty: (prompt, pooled) embeddings of the empty caption, shown in place of a share of the captions.
        kept: gives the answers of the base (`answers`) that make up the share `prior` of every training batch. It is
        called once, before the first of them: to look at a model needs none."""
        self.model, self.empty, self.seed, self.shift = model, empty, seed, shift
        self.sigma_mean, self.sigma_std, self.caption_dropout = sigma_mean, sigma_std, caption_dropout
        self.device, self.dtype = device, dtype
        self.train, self.held_out, self._ask = _by_size(train), _by_size(held_out), kept
        self.prior = prior

    @cached_property
    def kept(self) -> dict[tuple[int, ...], list[Example]]:
        """The base's own answers, by size."""
        return _by_size(self._ask())

    def begin(self) -> None:
        """Do what only training needs."""
        _ = self.kept

    def _rng(self, stream: int, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, step]))

    def _batch(self, examples: list[Example], rng: np.random.Generator, offset: float, dropout: float) -> Batch:
        count = len(examples)
        latents = torch.stack([e.latents for e in examples])
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        sigma = draw_sigma(rng, count, offset, self.sigma_mean, self.sigma_std, self.shift)
        for i, example in enumerate(examples):
            if example.noise is not None:
                noise[i], sigma[i] = example.noise, example.sigma
        drop = rng.random(count) < dropout
        text = [
            self.empty if d and e.noise is None else (e.prompt, e.pooled) for e, d in zip(examples, drop, strict=True)
        ]
        prompt, pooled = (torch.stack(part) for part in zip(*text, strict=True))
        weight = torch.tensor([1.0 if e.noise is None else KEPT_WEIGHT for e in examples])
        return Batch(latents, noise, torch.from_numpy(sigma).float(), prompt, pooled, weight).to(self.device)

    def batch(self, step: int, size: int, stream: int = TRAINING) -> Batch:
        """The batch of a step: a pure function of (seed, step, stream). One picture size at a time, by its share."""
        rng = self._rng(stream, step)
        groups = list(self.train.values())
        shares = np.array([len(group) for group in groups], dtype=float)
        group = groups[rng.choice(len(groups), p=shares / shares.sum())]
        kept = self.kept.get(tuple(group[0].latents.shape), [])
        share = share_of(self.prior, size, step) if kept else 0
        chosen = [some[i] for some, n in ((group, size - share), (kept, share)) for i in turns(rng, len(some), n)]
        return self._batch(chosen, rng, (step * GOLDEN) % 1, self.caption_dropout)

    def lesson(self, step: int, size: int) -> Batch:
        """What a Gauss-Newton step learns from: the batch of the step."""
        return self.batch(step, size)

    def evaluation(self, items: int) -> list[Batch]:
        """The fixed (picture, noise level, noise) items of the held-out loss, about `items` in all, by picture size."""
        total = sum(len(group) for group in self.held_out.values())
        batches = []
        for number, group in enumerate(self.held_out.values()):
            count = max(len(group), round(items * len(group) / total))
            examples = [group[i % len(group)] for i in range(count)]
            batches.append(self._batch(examples, self._rng(HELD_OUT, number), 0.5, 0.0))
        return batches

    def errors(self, batch: Batch) -> Tensor:
        """[B, m]: see `flow_errors`."""
        return flow_errors(self.model, batch, self.dtype)

    def losses(self, batch: Batch) -> Tensor:
        """[B]: the squared norms of the errors."""
        return self.errors(batch).square().sum(1)

    def outcomes(self, batch: Batch) -> Tensor:
        """What `newton` reads: the loss of every sample, and the errors as its features, [B, 1 + m]."""
        errors = self.errors(batch)
        return torch.cat([errors.square().sum(1, keepdim=True), errors], 1)

    def figures(self) -> dict[str, float]:
        """Beside the held-out loss, an evaluation of pictures has no figures."""
        return {}

    def tokens(self) -> int:
        """Tokens of the longest sequence that the transformer sees: patches of the largest picture, and text."""
        patch = self.model.config.patch_size
        largest = max(h * w for _, h, w in self.train)
        return largest // patch**2 + len(self.empty[0])


def share_of(share: float, size: int, step: int) -> int:
    """How many of a batch belong to a share of all examples: the nearest whole number above or below, so that the mean
    over steps is right for the smallest batch, too; never all of it."""
    return min(size - 1, int(share * size + step * GOLDEN % 1))


def turns(rng: np.random.Generator, count: int, wanted: int) -> list[int]:
    """`wanted` indices into `count` things: everything once before anything comes again."""
    rounds = -(-wanted // count) if wanted else 0
    return [int(i) for _ in range(rounds) for i in rng.permutation(count)][:wanted]


def _by_size(examples: Sequence[Example]) -> dict[tuple[int, ...], list[Example]]:
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.latents.shape), []).append(example)
    return groups


@torch.no_grad()
def answers(
    pipeline,
    prompts: Sequence[tuple[Tensor, Tensor]],
    negative: tuple[Tensor, Tensor],
    *,
    seed: int,
    width: int,
    height: int,
    steps: int,
    guidance: float,
) -> list[Example]:
    """What the base predicts on its own way from noise to a picture, as examples whose loss it leaves at zero.

    Prior preservation (DreamBooth, arXiv:2208.12242, section 4.2) without its noise: not its pictures under fresh
    noise, but the very velocities v that it gave at x and sigma, written as the picture x - sigma v and the noise
    x + (1 - sigma) v. The loss of such an example is the squared distance to the base's answer.
    """
    model = pipeline.transformer
    shape = (model.config.in_channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    seeds = [seed + number for number in range(len(prompts))]
    start = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    start = start.to(model.device)
    states = [(start, 1.0)]  # the first answer decides the ground of the whole picture

    def note(pipe, i: int, t: Tensor, tensors: dict) -> dict:
        states.append((tensors["latents"].float(), float(pipe.scheduler.sigmas[i + 1])))
        return tensors

    sample(pipeline, prompts, negative, seeds, width=width, height=height, steps=steps, guidance=guidance,
           together=len(prompts), output_type="latent", latents=start.to(model.dtype),
           callback_on_step_end=note)  # fmt: skip
    text = [torch.stack(part).to(model.device) for part in zip(*prompts, strict=True)]
    examples: list[list[Example]] = [[] for _ in prompts]
    for x, sigma in states[:-1]:  # the last one has no noise left
        velocity = predicted(model, x, torch.full((len(x),), sigma, device=x.device), *text, model.dtype).float()
        picture, noise = (x - sigma * velocity).cpu(), (x + (1 - sigma) * velocity).cpu()
        for of_prompt, (prompt, pooled), x0, e in zip(examples, prompts, picture, noise, strict=True):
            of_prompt.append(Example(x0, prompt, pooled, e, sigma))
    return [example for of_prompt in examples for example in of_prompt]


@torch.no_grad()
def sample(
    pipeline,
    prompts: Sequence[tuple[Tensor, Tensor]],
    negative: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    steps: int,
    guidance: float,
    together: int = 16,
    **more,
) -> list:
    """One picture for every (prompt embedding, seed): PIL images from the stock diffusers pipeline.

    `together` bounds the pictures of one call; a picture depends on its seed alone, not on its neighbours. `more`
    goes to the pipeline.
    """
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), together):
        part = prompts[start : start + together]
        embeds, pooled = (torch.stack(tensors).to(device, dtype) for tensors in zip(*part, strict=True))
        none, none_pooled = (tensor.to(device, dtype).expand(len(part), *tensor.shape) for tensor in negative)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + together]]
        images += pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=none,
            negative_pooled_prompt_embeds=none_pooled,
            generator=generators,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            **more,
        ).images
    return images

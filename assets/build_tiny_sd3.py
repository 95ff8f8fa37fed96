"""Makes the embedded default model: a complete, small Stable Diffusion 3 pipeline, trained on pictures drawn here.

    python assets/build_tiny_sd3.py --minutes 60 --seed 0 --out assets/models/tiny-sd3

Stages, each kept under --work and not repeated: a pool of pictures (draw.py, captions.py), the autoencoder, its latents
of the pool, the transformer with its text encoders, trained together by rectified flow as SD3 is, and the decoder once
more, for the same latents. The learning rate follows the elapsed share of the time given, so that a run always ends
annealed on any machine; the time is that of the processor, so that a run may be suspended. --start-from goes on from
the weights of an earlier result instead of random ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import INKS, Picture, article, caption, sample_picture, vocabulary
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from draw import SUBJECTS, render
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

SHAPES = ((64, 64), (64, 96))  # width, height
TOKENS = 16  # per text encoder
CAPTIONS = 4  # drawn for each picture of the pool


def autocast():
    """bfloat16 arithmetic where the processor has it (elsewhere it is three times slower); weights stay in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False))


def clock() -> float:
    """Seconds that each thread has worked: stands still while the process is suspended."""
    return time.process_time() / torch.get_num_threads()


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


# --- stage 1: pictures ------------------------------------------------------------------------------------------------


def abstract(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Lines, polygons, borders and gradients in any colours: the autoencoder should know more than our subjects."""
    w, h = size[0] * 4, size[1] * 4

    def colour() -> tuple[int, ...]:
        vivid = INKS[list(INKS)[rng.integers(len(INKS))]] if rng.random() < 0.3 else rng.integers(0, 256, 3)
        return tuple(int(v) for v in vivid)

    def at() -> tuple[float, float]:
        return float(rng.uniform(0, w)), float(rng.uniform(0, h))

    picture = Image.new("RGB", (w, h), colour())
    draw = ImageDraw.Draw(picture)
    if rng.random() < 0.35:
        ramp = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize((w, h))
        picture.paste(Image.new("RGB", (w, h), colour()), mask=ramp)
    few = [colour() for _ in range(int(rng.integers(1, 5)))]
    thin, thick = (2, 6) if rng.random() < 0.4 else (3, 14)  # a quarter of a pixel each: engraving or brush
    for _ in range(int(rng.integers(2, 20))):
        c, kind, x, y, r = few[rng.integers(len(few))], rng.integers(7), *at(), float(rng.uniform(8, 90))
        width = int(rng.integers(thin, thick))
        if kind == 0:
            draw.polygon([at() for _ in range(3)], fill=c)
        elif kind == 1:
            draw.line([at() for _ in range(int(rng.integers(2, 5)))], fill=c, width=width, joint="curve")
        elif kind == 2:
            draw.ellipse([x - r, y - r, x + r, y + r], outline=c, width=width)
        elif kind == 3:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=c)
        elif kind == 4:
            draw.rectangle([x, y, x + r, y + r], fill=c if rng.random() < 0.5 else None, outline=c, width=width)
        elif kind == 5:  # rays
            count, inner = int(rng.integers(5, 17)), r * float(rng.uniform(0, 0.6))
            for a in np.linspace(0, 2 * math.pi, count, endpoint=False):
                draw.line([x + inner * math.cos(a), y + inner * math.sin(a), x + r * math.cos(a), y + r * math.sin(a)],
                          fill=c, width=width)
        else:  # hatching
            dx, dy = float(rng.uniform(-40, 40)), float(rng.uniform(-40, 40))
            pitch = width * float(rng.uniform(2, 4))
            for k in range(int(rng.integers(3, 12))):
                draw.line([x + k * pitch, y, x + k * pitch + dx, y + dy + r], fill=c, width=width)
    margin = 0.0
    for _ in range(int(rng.integers(0, 5))):
        margin, width = margin + float(rng.uniform(2, 16)), int(rng.integers(thin, thick))
        draw.rectangle([margin, margin, w - 1 - margin, h - 1 - margin], outline=few[0] if rng.random() < 0.5
                       else colour(), width=width)
        margin += width
    return picture.reduce(4)


def _draw_chunk(job: tuple[int, int, int, str]) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """job: seed, first index, count, kind. Returns pixels [n, h, w, 3], the captions and the subject of each."""
    seed, first, count, kind = job
    pixels, texts, subjects = [], [], []
    size = SHAPES[0] if kind.endswith("square") else SHAPES[1]
    for i in range(first, first + count):
        rng = np.random.default_rng([seed, i, sum(kind.encode())])
        if kind.startswith("abstract"):
            pixels.append(np.asarray(abstract(size, rng)))
            continue
        subject = list(SUBJECTS)[i % len(SUBJECTS)]
        picture: Picture = sample_picture(subject, rng)
        pixels.append(np.asarray(render(subject, picture.look, size, rng)))
        texts.append([caption(picture, rng) for _ in range(CAPTIONS)])
        subjects.append(subject)
    return np.stack(pixels), texts, subjects


def draw_pool(seed: int, count: int, kind: str, processes: int) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """`count` pictures of a kind ("subjects-square", "abstract-portrait", ...), the same for any number of
    processes.
    """
    jobs = [(seed, i, min(250, count - i), kind) for i in range(0, count, 250)]
    with multiprocessing.Pool(processes) as pool:
        parts = pool.map(_draw_chunk, jobs, chunksize=1)
    return np.concatenate([p[0] for p in parts]), sum((p[1] for p in parts), []), sum((p[2] for p in parts), [])


def to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in -1..1, channels last in memory."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- stage 2: the autoencoder -----------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0, force_upcast=False,
    )


def reconstruction_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on pixels, L1 on differences of neighbours (edges), at full and half resolution."""
    loss = 0.0
    for _ in range(2):
        error = made - real
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + error.abs().mean() + 2 * error.square().mean() + edges
        made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
    return loss


def train_vae(vae: AutoencoderKL, pools: list[np.ndarray], minutes: float, batch: int, seed: int, log,
              lr=1e-3) -> AutoencoderKL:
    """pools: uint8 pictures [n, h, w, 3], one array per shape; visited in turn. The weights returned are averaged."""
    generator = torch.Generator().manual_seed(seed)
    vae = vae.to(memory_format=torch.channels_last).train().requires_grad_(True)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    start, step, smooth = clock(), 0, 0.0
    while (done := (clock() - start) / (60 * minutes)) < 1:
        pool = pools[step % len(pools)]
        real = to_tensor(pool[torch.randint(len(pool), (batch,), generator=generator).numpy()])
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with autocast():
            posterior = vae.encode(real).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            made = vae.decode(z).sample.float()
        divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction_loss(made, real) + 1e-3 * divergence
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        update_average(average, vae, step, 0.998)
        smooth = loss.item() if step == 0 else 0.99 * smooth + 0.01 * loss.item()
        step += 1
        if step % 200 == 0:
            log(f"vae step {step} {100 * done:.0f} % loss {smooth:.4f} kl {divergence.item():.2f} "
                f"psnr {psnr(made.detach(), real):.1f} dB {batch * step / (clock() - start):.1f} pictures/s")
    return average.eval().requires_grad_(False)


def psnr(made: torch.Tensor, real: torch.Tensor) -> float:
    """Mean over pictures, in dB; pixels in -1..1."""
    return (10 * torch.log10(4 / (made.clamp(-1, 1) - real).square().mean(dim=(1, 2, 3)).clamp_min(1e-8))).mean().item()


def train_decoder(vae: AutoencoderKL, data: list[tuple[torch.Tensor, np.ndarray]], minutes: float, batch: int,
                  seed: int, log, lr=1.5e-3) -> AutoencoderKL:
    """The decoder alone, on latents that stay as they are; latents with a little noise teach it to clean up samples.

    data: per shape, latents as the encoder gives them [n, 16, h, w] and their pictures, uint8 [n, 8 h, 8 w, 3].
    """
    generator = torch.Generator().manual_seed(seed)
    vae = copy.deepcopy(vae).to(memory_format=torch.channels_last).train()
    parameters = [p.requires_grad_(True) for p in vae.decoder.parameters()]
    average = copy.deepcopy(vae.decoder)
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    start, step, smooth = clock(), 0, 0.0
    while (done := (clock() - start) / (60 * minutes)) < 1:
        latents, pixels = data[step % len(data)]
        rows = torch.randint(len(latents), (batch,), generator=generator)
        z, real = latents[rows], to_tensor(pixels[rows.numpy()])
        level = 0.05 + 0.2 * torch.rand((batch, 1, 1, 1), generator=generator) ** 2
        z = z + level * torch.randn(z.shape, generator=generator)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        with autocast():
            made = vae.decode(z).sample.float()
        loss = reconstruction_loss(made, real)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        update_average(average, vae.decoder, step, 0.998)
        smooth = loss.item() if step == 0 else 0.99 * smooth + 0.01 * loss.item()
        step += 1
        if step % 200 == 0:
            log(f"decoder step {step} {100 * done:.0f} % loss {smooth:.4f} "
                f"{batch * step / (clock() - start):.1f} pictures/s")
    vae.decoder.load_state_dict(average.state_dict())
    return vae.eval().requires_grad_(False)


def pool_stage(work: Path, seed: int, count: int, processes: int, log) -> dict[str, tuple]:
    """The pictures as files in `work`: two kinds in two shapes; drawn once."""
    pools = {}
    for kind, share in (("subjects-square", 1.0), ("subjects-portrait", 1.0), ("abstract-square", 0.4),
                        ("abstract-portrait", 0.4)):
        path = work / f"{kind}.safetensors"
        if not path.exists():
            began = time.monotonic()
            pixels, texts, subjects = draw_pool(seed, int(count * share), kind, processes)
            write({"pixels": torch.from_numpy(pixels)}, path)
            path.with_suffix(".json").write_text(json.dumps({"captions": texts, "subjects": subjects}))
            log(f"drew {len(pixels)} pictures, {kind}, in {time.monotonic() - began:.0f} s")
        words = json.loads(path.with_suffix(".json").read_text())
        pools[kind] = load_file(path)["pixels"].numpy(), words["captions"], words["subjects"]
    return pools


def vae_stage(work: Path, pools: dict[str, tuple], first: Path | None, minutes: float, seed: int,
              log) -> AutoencoderKL:
    """The trained autoencoder, with the shift and scale that make its latents mean 0, standard deviation 1."""
    path = work / "vae.safetensors"
    vae = make_vae().eval().requires_grad_(False)
    if not path.exists():
        took = [np.concatenate([pools[f"subjects-{s}"][0], pools[f"abstract-{s}"][0]]) for s in ("square", "portrait")]
        new = make_vae() if first is None else AutoencoderKL.from_pretrained(first / "vae", torch_dtype=torch.float32)
        trained = train_vae(new, took, minutes, 4, seed, log)
        write(trained.state_dict(), path)
    vae.load_state_dict(load_file(path))
    with torch.no_grad():
        sample = [vae.encode(to_tensor(pools[f"subjects-{s}"][0][:500])).latent_dist.mean for s in ("square",
                                                                                                    "portrait")]
    values = torch.cat([z.flatten() for z in sample])
    vae.register_to_config(shift_factor=round(values.mean().item(), 4),
                           scaling_factor=round(1 / values.std().item(), 4))
    return vae


# --- stage 3: tokenizers, text encoders, transformer ------------------------------------------------------------------


def make_clip_tokenizer():
    """Byte-pair encoding in which every word of the captions is one token; other words fall apart into pieces.

    All 256 bytes are there with and without the end-of-word mark, so nothing is unknown.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=20_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges),
                            "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=TOKENS)


def make_t5_tokenizer():
    """Unigrams: every word of the captions is one token, and one token per letter for any other word."""
    from transformers import T5Tokenizer

    words = [*vocabulary(), "A", "An", "The"]
    signs = [chr(c) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + w, -5.0) for w in words),
             ("▁", -11.0), *((s, -10.0) for s in signs)]
    known = {piece for piece, _ in vocab}
    vocab += [("▁" + s, -12.0) for s in signs if "▁" + s not in known]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


class TinySD3(torch.nn.Module):
    """The trained parts, with forward as the pipeline does it: prompt tokens in, velocity out."""

    def __init__(self, clip_tokenizer, t5_tokenizer):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        clip = CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=64,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
        t5 = T5Config(
            vocab_size=len(t5_tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=16, relative_attention_max_distance=32, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, use_cache=False,
        )
        self.text_encoder, self.text_encoder_2 = (CLIPTextModelWithProjection(copy.deepcopy(clip)) for _ in range(2))
        self.text_encoder_3 = T5EncoderModel(t5)
        self.transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=6, attention_head_dim=64,
            num_attention_heads=3, joint_attention_dim=128, caption_projection_dim=192, pooled_projection_dim=128,
            pos_embed_max_size=8, qk_norm="rms_norm",
        )
        with torch.no_grad():  # words should differ from the first step on: the layers after them read no norm
            for encoder in (self.text_encoder, self.text_encoder_2):
                encoder.get_input_embeddings().weight.normal_(std=0.4)

    def load_folder(self, folder: Path) -> None:
        """The weights of a pipeline folder of the same shapes and tokenizers."""
        parts = StableDiffusion3Pipeline.from_pretrained(folder, vae=None, torch_dtype=torch.float32).components
        for name, module in self.named_children():
            module.load_state_dict(parts[name].state_dict())

    def encode(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, 16] -> (prompt embedding [b, 32, 128], pooled [b, 128])."""
        a, b = (e(clip_ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2))
        words = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], dim=-1)
        sentence = self.text_encoder_3(t5_ids)[0]
        return torch.cat([words, sentence], dim=1), torch.cat([a.text_embeds, b.text_embeds], dim=-1)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor):
        embedding, pooled = self.encode(clip_ids, t5_ids)
        return self.transformer(hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=embedding,
                                pooled_projections=pooled, return_dict=False)[0]


def shifted_sigmas(count: int, generator: torch.Generator, shift=3.0) -> torch.Tensor:
    """SD3's noise levels: logit-normal(0, 1), then the scheduler's shift; stratified over the batch."""
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    sigma = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.99999, 0.99999)))
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_loss(model: TinySD3, latents: torch.Tensor, clip_ids, t5_ids, generator: torch.Generator) -> torch.Tensor:
    """Rectified flow: the velocity noise - latents at (1 - sigma) latents + sigma noise. One loss per sample."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = shifted_sigmas(len(latents), generator)
    s = sigma.view(-1, 1, 1, 1)
    with autocast():
        velocity = model((1 - s) * latents + s * noise, sigma, clip_ids, t5_ids)
    return (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3))


def latents_stage(work: Path, vae: AutoencoderKL, pools: dict[str, tuple], clip_tokenizer, t5_tokenizer,
                  log) -> list[dict]:
    """Per shape: latents [n, 16, h, w] (normalised), clip_ids and t5_ids [n, CAPTIONS, 16]."""
    sets = []
    vae = vae.to(memory_format=torch.channels_last)
    for shape in ("square", "portrait"):
        path, (pixels, texts, _) = work / f"latents-{shape}.safetensors", pools[f"subjects-{shape}"]
        if not path.exists():
            began, found = time.monotonic(), []
            with torch.no_grad(), autocast():
                for i in range(0, len(pixels), 100):
                    found.append(vae.encode(to_tensor(pixels[i:i + 100])).latent_dist.mean.float())
            latents = (torch.cat(found) - vae.config.shift_factor) * vae.config.scaling_factor
            flat = [t[0].upper() + t[1:] if i % 10 == 0 else t for i, t in enumerate(sum(texts, []))]
            ids = [k(flat, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
                   .view(len(pixels), CAPTIONS, TOKENS) for k in (clip_tokenizer, t5_tokenizer)]
            write({"latents": latents.contiguous(), "clip_ids": ids[0], "t5_ids": ids[1]}, path)
            log(f"latents of {len(pixels)} pictures, {shape}, in {time.monotonic() - began:.0f} s")
        sets.append(load_file(path))
    return sets


def pick_batch(data: dict, batch: int, generator: torch.Generator, empty, dropout=0.1):
    """Pictures at random, each with one of its captions, or with the empty one."""
    rows = torch.randint(len(data["latents"]), (batch,), generator=generator)
    column = torch.randint(CAPTIONS, (batch,), generator=generator)
    drop = (torch.rand(batch, generator=generator) < dropout)[:, None]
    ids = [torch.where(drop, e, data[k][rows, column]) for k, e in zip(("clip_ids", "t5_ids"), empty, strict=True)]
    return data["latents"][rows], *ids


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, most=0.9985) -> None:
    rate = min(most, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - rate)


def train_flow(model: TinySD3, data: list[dict], empty, minutes: float, batch: int, seed: int, work: Path, save, log,
               lr=1e-3, save_every=480.0) -> TinySD3:
    """Transformer and text encoders together; returns the averaged weights.

    data: one dictionary per picture shape (`latents_stage`), visited in turn. save(average) is called every
    `save_every` seconds. A run that was cut off goes on from work/training.safetensors with the time it had left.
    """
    average = copy.deepcopy(model)
    if shutil.which("g++"):  # six blocks of two kinds: compiling one of each kind is enough
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)
    names = [n for n, _ in model.named_parameters()]
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, before, losses, state_path = 0, 0.0, [], work / "training.safetensors"
    if state_path.exists():
        state, notes = load_file(state_path), json.loads((work / "training.json").read_text())
        step, before, losses = notes["step"], notes["seconds"], notes["losses"]
        model.load_state_dict({n: state[f"weight.{n}"] for n in model.state_dict()})
        average.load_state_dict({n: state[f"average.{n}"] for n in model.state_dict()})
        for n, p in zip(names, parameters, strict=True):
            optimiser.state[p] = {k: state[f"{k}.{n}"] for k in ("exp_avg", "exp_avg_sq")} | {
                "step": torch.tensor(float(step))}
        log(f"goes on at step {step}, {before / 60:.1f} min")

    def keep(seconds: float) -> None:
        tensors = {f"weight.{n}": t for n, t in model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in average.state_dict().items()}
        for n, p in zip(names, parameters, strict=True):
            tensors |= {f"{k}.{n}": optimiser.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
        write({k: t.clone() for k, t in tensors.items()}, state_path)
        (work / "training.json").write_text(json.dumps({"step": step, "seconds": seconds, "losses": losses}))
        save(average)

    generator = torch.Generator().manual_seed(seed + step)
    start = saved = clock()
    recent = []
    while (seconds := before + clock() - start) < 60 * minutes:
        done = seconds / (60 * minutes)
        for group in optimiser.param_groups:  # warm-up, then a cosine to a hundredth
            group["lr"] = lr * min(1, (step + 1) / 150) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = flow_loss(model, *pick_batch(data[step % len(data)], batch, generator, empty), generator).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        update_average(average, model, step)
        recent.append(loss.item())
        step += 1
        if step % 50 == 0:
            losses.append([step, round(seconds, 1), round(sum(recent) / len(recent), 5)])
            log(f"step {step}  {100 * done:.1f} %  loss {losses[-1][2]:.4f}  "
                f"{batch * 50 / (seconds - (losses[-2][1] if len(losses) > 1 else 0)):.0f} pictures/s")
            recent = []
        if clock() - saved > save_every:
            keep(seconds)
            saved = clock()
            log(f"saved at step {step}")
    keep(seconds)
    return average


# --- stage 4: the decoder again ---------------------------------------------------------------------------------------


def decoder_stage(work: Path, vae: AutoencoderKL, pools: dict[str, tuple], sets: list[dict], minutes: float, seed: int,
                  log, held=200) -> AutoencoderKL:
    """A sharper decoder for the same latents; the last `held` pictures of each shape only measure it."""
    path, data, check = work / "decoder.safetensors", [], []
    for shape, known in zip(("square", "portrait"), sets, strict=True):
        latents = known["latents"] / vae.config.scaling_factor + vae.config.shift_factor
        pixels, more = pools[f"subjects-{shape}"][0], pools[f"abstract-{shape}"][0]
        with torch.no_grad(), autocast():
            other = [vae.encode(to_tensor(more[i:i + 100])).latent_dist.mean.float() for i in range(0, len(more), 100)]
        data.append((torch.cat([latents[:-held], *other]), np.concatenate([pixels[:-held], more])))
        check.append((latents[-held:], to_tensor(pixels[-held:])))

    def quality() -> str:
        with torch.no_grad():
            return ", ".join(f"{psnr(vae.decode(z).sample, x):.2f} dB" for z, x in check)

    log(f"autoencoder before: {quality()} (square, portrait; {held} unseen pictures each)")
    if not path.exists():
        write(train_decoder(vae, data, minutes, 8, seed, log).decoder.state_dict(), path)
    vae.decoder.load_state_dict(load_file(path))
    log(f"autoencoder after: {quality()}")
    return vae


# --- stage 5: the folder, the grid ------------------------------------------------------------------------------------


def save_pipeline(model: TinySD3, vae: AutoencoderKL, clip_tokenizer, t5_tokenizer, out: Path) -> None:
    """Writes the pipeline in float16 under a temporary name, then puts it in place of an older one."""
    new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    parts = {n: copy.deepcopy(getattr(model, n)).half().eval()
             for n in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")}
    StableDiffusion3Pipeline(
        **parts, vae=copy.deepcopy(vae).to(memory_format=torch.contiguous_format).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=clip_tokenizer, tokenizer_2=clip_tokenizer,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(new)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):  # half on disk, float when loaded without a dtype
        path = new / name / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    card = Path(__file__).parent / "models" / "tiny-sd3" / "README.md"
    if card.exists():
        shutil.copy(card, new / "README.md")
    if out.exists():
        out.rename(old)
    out.parent.mkdir(parents=True, exist_ok=True)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def draw_prompts(pipeline, prompts: list[str], size=(64, 64), seed=0, steps=24, guidance=4.0) -> list[Image.Image]:
    """One picture per prompt through plain diffusers, each with its own seed (seed, seed + 1, ...)."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipeline(prompts, width=size[0], height=size[1], num_inference_steps=steps, guidance_scale=guidance,
                    max_sequence_length=TOKENS, generator=generators).images


def sheet(rows: list[list[Image.Image]], gap=4) -> Image.Image:
    """Rows of pictures on white; a row's height is that of its pictures."""
    width = max(sum(p.width + gap for p in row) for row in rows)
    page = Image.new("RGB", (width, sum(row[0].height + gap for row in rows)), "white")
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            page.paste(picture, (left, top))
            left += picture.width + gap
        top += row[0].height + gap
    return page


def make_grid(folder: Path, seed=0) -> Image.Image:
    """Fourteen to a row: the 28 subjects plain, behind an unknown word, upright, and in looks that the prompt names."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    names, rows = list(SUBJECTS), []
    looks = ("an outlined blue {n}, black background", "a gold {n} on a dark green ground, framed",
             "a red {n} on a white ground", "a bordered {n}, double frame")
    for form, size in (("{a}", SHAPES[0]), ("a kelvorn card of {a}", SHAPES[0]), ("{a}", SHAPES[1]),
                       ("{a} in the style of quib", SHAPES[1]), (None, SHAPES[0])):
        prompts = [(form or looks[i % len(looks)]).format(n=n, a=article(n)) for i, n in enumerate(names)]
        pictures = draw_prompts(pipeline, prompts, size, seed)
        rows += [pictures[:14], pictures[14:]]
    return sheet(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="for the transformer; all else takes about 30 more")
    parser.add_argument("--vae-minutes", type=float, default=25)
    parser.add_argument("--decoder-minutes", type=float, default=10)
    parser.add_argument("--pictures", type=int, default=14_000, help="drawn for each of the two shapes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".build"), help="what the stages leave for one another")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="an earlier result to go on from")
    parser.add_argument("--out", type=Path, default=Path("assets/models/tiny-sd3"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def log(line: str) -> None:
        line = f"[{(time.monotonic() - began) / 60:5.1f} min] {line}"
        print(line, flush=True)
        with (args.work / "log.txt").open("a") as file:
            file.write(line + "\n")

    with torch.random.fork_rng(devices=[]):  # the model classes draw their first weights from the global generator
        torch.manual_seed(args.seed)  # noqa: TID251
        clip_tokenizer, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer()
        pools = pool_stage(args.work, args.seed, args.pictures, args.threads, log)
        vae = vae_stage(args.work, pools, args.start_from, args.vae_minutes, args.seed, log)
        log(f"vae: shift {vae.config.shift_factor}, scale {vae.config.scaling_factor}")
        data = latents_stage(args.work, vae, pools, clip_tokenizer, t5_tokenizer, log)
        model = TinySD3(clip_tokenizer, t5_tokenizer)
        if args.start_from:
            model.load_folder(args.start_from)
        empty = [k([""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
                 for k in (clip_tokenizer, t5_tokenizer)]

        def save(average: TinySD3) -> None:
            save_pipeline(average, vae, clip_tokenizer, t5_tokenizer, args.out)

        average = train_flow(model, data, empty, args.minutes, args.batch, args.seed, args.work, save, log)
        vae = decoder_stage(args.work, vae, pools, data, args.decoder_minutes, args.seed, log)
        save(average)
    make_grid(args.out).save(args.out.parent.parent / "tiny-sd3-grid.png")
    log("done")


if __name__ == "__main__":
    main()

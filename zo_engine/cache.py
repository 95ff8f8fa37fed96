"""Pictures and captions are encoded once: latents and text embeddings on disk, keyed by content and model.

The encoders are loaded only when something is missing, and released before anything is trained.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from zo_engine import sealed
from zo_engine.dataset import Picture, fit, open_picture
from zo_engine.hub import ModelError


def model_key(folder: Path, parts: Iterable[str]) -> str:
    """The identity of a model's encoders: names, sizes and times of their files, and the text of their configs."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        for file in sorted((Path(folder) / part).rglob("*")):
            if file.is_file():
                stat = file.stat()
                digest.update(f"{part}/{file.name}:{stat.st_size}:{stat.st_mtime_ns};".encode())
                if file.suffix == ".json":
                    digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Cache:
    """A folder of small sealed files. One that is damaged, or holds something else, is made again."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, key: str, *names: str) -> dict[str, Tensor] | None:
        """The tensors of these names, or None where there are none that can be trusted."""
        try:
            tensors, _ = sealed.read(self._path(key))
        except (FileNotFoundError, sealed.DamageError):
            return None
        return tensors if set(tensors) == set(names) else None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        sealed.write(self._path(key), tensors, {})

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def latents(
    cache: Cache, folder: Path, pictures: list[tuple[Picture, tuple[int, int]]], load_vae: Callable[[], torch.nn.Module]
) -> list[Tensor]:
    """Latents [C, h, w] of every (picture, bucket), as the diffusion transformer sees them: shifted and scaled.

    The mean of the VAE's posterior is used, so that the same picture always gives the same latents. `load_vae` is
    called only if one is missing; the VAE belongs to the caller.
    """
    model = model_key(folder, ["vae"])
    keys = [
        _key("latents", model, hashlib.sha256(picture.path.read_bytes()).hexdigest(), bucket)
        for picture, bucket in pictures
    ]
    found = [cache.get(key, "latents") for key in keys]
    if any(f is None for f in found):
        vae = load_vae()
        weight = next(vae.parameters())
        for i, (picture, bucket) in enumerate(pictures):
            if found[i] is None:
                pixels = _pixels(fit(open_picture(picture.path), bucket)).to(weight.device, weight.dtype)
                found[i] = {"latents": encode(vae, pixels[None])[0].float().cpu()}
                _prove_finite(found[i], f"the autoencoder of {folder}", picture.path.name)
                cache.put(keys[i], found[i])
    return [f["latents"] for f in found]


@torch.no_grad()
def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> latents; SD3 needs both the shift and the scaling factor of its VAE."""
    mean = vae.encode(pixels).latent_dist.mode()
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def _pixels(image) -> Tensor:
    """RGB image -> [3, H, W] in -1..1."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def embeddings(
    cache: Cache, folder: Path, prompts: list[str], text_length: int, held: str, load_encoders: Callable[[], object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(prompt embeddings [T, D], pooled [P]) of every distinct prompt.

    held: how T5 is held, "none" or "nf4" (see models.encoders_for), since its embeddings differ a little.
    `load_encoders` gives a StableDiffusion3Pipeline with tokenizers and text encoders only; it is called only if a
    prompt is missing, and what it gives is dropped before this function returns.
    """
    parts = ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"]
    model = model_key(folder, parts)
    keys = {prompt: _key("text", model, text_length, held, prompt) for prompt in dict.fromkeys(prompts)}
    found = {prompt: cache.get(key, "prompt", "pooled") for prompt, key in keys.items()}
    missing = [prompt for prompt, value in found.items() if value is None]
    if missing:
        encoders = load_encoders()
        for prompt in missing:
            with torch.no_grad():
                embeds, _, pooled, _ = encoders.encode_prompt(
                    prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=text_length
                )
            found[prompt] = {"prompt": embeds[0].float().cpu(), "pooled": pooled[0].float().cpu()}
            _prove_finite(found[prompt], f"a text encoder of {folder}", repr(prompt))
            cache.put(keys[prompt], found[prompt])
        del encoders
        gc.collect()  # encoders that stream refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {prompt: (value["prompt"], value["pooled"]) for prompt, value in found.items()}


def _prove_finite(tensors: dict[str, Tensor], who: str, what: str) -> None:
    """What is not finite is never kept: it would come back, and the loss with it, at every later run."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ModelError(
            f"{who} makes numbers of {what} that are not finite; its weights are damaged: download the model again"
        )

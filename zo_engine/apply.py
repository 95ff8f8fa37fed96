"""A style back on its base: pictures, comparisons and an exported model, from a run folder or a style file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from zo_engine import cache, card, models, pictures
from zo_engine.probes import Space
from zo_engine.run import Run
from zo_engine.scales import find_scales, prove_live
from zo_engine.style import Style, StyleError, checked_strength, load_style, make_space, theta_of
from zo_engine.tasks.diffusion import sample
from zo_engine.train import pick_device, pick_dtype


@dataclass
class Styled:
    """A freshly loaded base and the theta that a style gives it."""

    style: Style
    folder: Path
    transformer: torch.nn.Module
    space: Space
    theta: torch.Tensor
    cache: cache.Cache
    source: Path

    def sample(
        self, prompts: list[str], strength: float, size: tuple[int, int], seed: int, steps: int, guidance: float
    ) -> list[Image.Image]:
        """One picture a prompt at a strength (0 is the base), seeds following on from `seed`."""
        device = self.transformer.device
        encoders = models.encoders_for(self.folder, device, self.transformer.dtype)
        text = cache.embeddings(self.cache, self.folder, ["", *prompts], models.text_length(self.folder), *encoders)
        pipe = models.pipeline(self.folder, self.transformer, models.load_vae(self.folder, device=device))
        with self.space.folded(self.theta * checked_strength(strength)):
            return sample(
                pipe,
                [text[prompt] for prompt in prompts],
                text[""],
                [seed + i for i in range(len(prompts))],
                width=size[0],
                height=size[1],
                steps=steps,
                guidance=guidance,
            )

    def export(self, out: Path, strength: float = 1.0) -> Path:
        """A complete diffusers folder with the style in its scales and a model card; plain diffusers loads it."""
        with self.space.folded(self.theta * checked_strength(strength)):
            models.export(self.folder, self.transformer, out)
        card.write(out, card.read(style_file(self.source)), strength, samples(self.source, self.style))
        return out


def samples(source: Path, style: Style) -> list[Path]:
    """The preview pictures of a run nearest to the step that its style is of; none for a style file alone."""
    if not source.is_dir():
        return []
    step = int(style.facts.get("step", 0))
    folders = [f for f in Run(source).previews.glob("*/") if f.name.isdigit()]
    nearest = min(folders, key=lambda f: abs(int(f.name) - step), default=None)
    return sorted(nearest.glob("*.png")) if nearest else []


def style_file(source: Path) -> Path:
    """The style of a run folder, or the style file itself. Raises StyleError where a run has none yet."""
    source = Path(source)
    if not source.is_dir():
        return source
    run = Run.open(source)
    if not run.style_file.exists():
        raise StyleError(f"{source} has no style yet: it is written when the run ends or is stopped")
    return run.style_file


def open_style(source: Path, cache_folder: Path, model: str = "", device: str = "auto") -> Styled:
    """Load a style and a fresh base for it: the model it names, or `model`. Raises StyleError for a wrong base."""
    style = load_style(style_file(source))
    recipe = style.recipe
    where = pick_device(device)
    folder = models.locate(model or style.base.get("model", ""))
    transformer = models.load_transformer(
        folder, quantization=recipe.quantization, device=where, dtype=pick_dtype(recipe.dtype, where)
    )
    views = find_scales(transformer)
    space = make_space(views, recipe)
    theta = theta_of(style, space, models.code_hash(transformer), where)
    prove_live(views)
    return Styled(style, folder, transformer, space, theta, cache.Cache(cache_folder), Path(source))


def compare(styled: Styled, prompts: list[str], strength: float, **how) -> Image.Image:
    """Base above, style below: the same prompts and seeds, eight to a row."""
    before, after = (styled.sample(prompts, s, **how) for s in (0.0, strength))
    title = "after" if strength == 1 else f"after, strength {strength:g}"
    blocks = range(0, len(prompts), 8)
    return pictures.stack(
        [pictures.grid([before[i : i + 8], after[i : i + 8]], prompts[i : i + 8], ["before", title]) for i in blocks]
    )

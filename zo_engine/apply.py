"""A style back on its base: pictures or answers, comparisons, an exported model, from a run folder or a style file."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from zo_engine import cache, card, evaluation, ia3, models, pictures, templates, tokens
from zo_engine.hub import is_language
from zo_engine.probes import Space
from zo_engine.run import Run
from zo_engine.scales import prove_live
from zo_engine.style import Style, StyleError, checked_strength, load_style, make_space, theta_of, views_of
from zo_engine.tasks.diffusion import sample
from zo_engine.texts import Message
from zo_engine.train import Prompt, form, pick_device, pick_dtype, reply, streaming, text_store


@dataclass
class Styled:
    """A freshly loaded base and the theta that a style gives it."""

    style: Style
    folder: Path
    model: torch.nn.Module
    space: Space
    theta: torch.Tensor
    source: Path

    def at(self, strength: float) -> AbstractContextManager[None]:
        """The model with the style at a strength; 0 is the base. Raises StyleError for what is out of reach."""
        return self.space.folded(self.theta * checked_strength(strength))


@dataclass
class StyledPipeline(Styled):
    """One that draws."""

    cache: cache.Cache
    offload: str  # where blocks wait, and those of text encoders with them

    def export_adapter(self, out: Path, strength: float = 1.0) -> Path:
        """Refused: PEFT's IA3 is for language models here."""
        raise StyleError("a PEFT adapter is made of a language model's style; this one is of pictures")

    def sample(
        self, prompts: list[str], strength: float, size: tuple[int, int], seed: int, steps: int, guidance: float
    ) -> list[Image.Image]:
        """One picture a prompt at a strength (0 is the base), seeds following on from `seed`."""
        store = text_store(self.offload, self.folder, self.cache.folder)
        how = {"streamed": hasattr(self.model, "mover"), "store": store}
        encoders = models.encoders_for(self.folder, self.model.device, self.model.dtype, **how)
        text = cache.embeddings(self.cache, self.folder, ["", *prompts], models.text_length(self.folder), *encoders)
        pipe = models.drawing(self.folder, self.model)
        with self.at(strength):
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
        about = out.name, card.read(style_file(self.source)), strength, samples(self.source, self.style)
        with self.at(strength):
            return models.export(self.folder, self.model, out, lambda work: card.write(work, *about))


@dataclass
class StyledLanguageModel(Styled):
    """One that answers."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def prompts(self) -> list[Prompt]:
        """The preview prompts of the run that the style comes from."""
        return [tuple(Message(**m) for m in prompt) for prompt in json.loads(self.style.facts["prompts"])]

    @property
    def plain(self) -> bool:
        """Whether prompts are beginnings of a text, to be gone on with."""
        return self.style.facts.get("plain") == "1"

    def answers(
        self, prompts: list[Prompt], strength: float, seed: int | None = None, temperature: float | None = None
    ) -> list[str]:
        """One answer a prompt at a strength (0 is the base), as the style's recipe asks for them."""
        recipe = self.style.recipe
        recipe = recipe if temperature is None else replace(recipe, temperature=temperature)
        with self.at(strength):
            return reply(self.model, self.tokenizer, prompts, self.plain, recipe, seed)

    def export(self, out: Path, strength: float = 1.0) -> Path:
        """A complete folder with the style in its scales and a model card; plain transformers loads it."""
        about = out.name, card.read(style_file(self.source)), strength, [], said(self.source, self.style)
        with self.at(strength):
            return models.export_language_model(self.folder, self.model, out, lambda work: card.write(work, *about))

    def export_adapter(self, out: Path, strength: float = 1.0) -> Path:
        """The style alone as a PEFT adapter (IA3), where the two are equal: see `ia3`."""
        theta = self.theta * checked_strength(strength)
        return ia3.save_to(out, self.model, self.space, theta, self.style.base["model"])


def score(
    model: str,
    task: str,
    data: str,
    limit: int | None,
    seed: int,
    quantization: str,
    style: Path | None,
    strength: float,
    device: str,
    cache_folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """A language model's figures on a task, with a style or as it is. Raises ValueError for what the user can mend."""
    asked = templates.named(task)
    folder = models.locate(model)
    if not is_language(folder):
        raise StyleError(f"{model} draws pictures and answers no questions; give a language model")
    found = templates.cases(asked, data)
    if limit and limit < len(found):
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(found))[:limit]
        found = [found[i] for i in sorted(order)]
    length = tokens.limit(folder, 2048)
    say(f"{len(found)} questions")
    if style:
        styled = open_style(style, cache_folder, model, device)
        with styled.at(strength):
            return evaluation.evaluate(styled.model, styled.tokenizer, found, length)
    where = pick_device(device)
    base = models.load_language_model(folder, quantization=quantization, device=where, dtype=pick_dtype("auto", where))
    return evaluation.evaluate(base, models.load_tokenizer(folder), found, length)


def samples(source: Path, style: Style) -> list[Path]:
    """The preview pictures of a run nearest to the step that its style is of; none for a style file alone."""
    if not source.is_dir():
        return []
    step = int(style.facts.get("step", 0))
    folders = [f for f in Run(source).previews.glob("*/") if f.name.isdigit()]
    nearest = min(folders, key=lambda f: abs(int(f.name) - step), default=None)
    return sorted(nearest.glob("*.png")) if nearest else []


def said(source: Path, style: Style) -> list[tuple[str, str, str]]:
    """(prompt, answer of the base, answer nearest to the step that the style is of); none for a style file alone."""
    if not source.is_dir():
        return []
    step = int(style.facts.get("step", 0))
    files = {int(f.stem): f for f in Run(source).previews.glob("*.json") if f.stem.isdigit()}
    if 0 not in files:
        return []
    nearest = min(files, key=lambda at: abs(at - step))
    before, after = (json.loads(files[at].read_text(encoding="utf-8"))["answers"] for at in (0, nearest))
    return [(b["prompt"], b["answer"], a["answer"]) for b, a in zip(before, after, strict=True)]


def style_file(source: Path) -> Path:
    """The style of a run folder, or the style file itself. Raises StyleError where a run has none yet."""
    source = Path(source)
    if not source.is_dir():
        return source
    run = Run.open(source)
    if not run.style_file.exists():
        raise StyleError(f"{source} has no style yet: it is written when the run ends or is stopped")
    return run.style_file


def _base_of(style: Style, source: Path) -> str:
    """Where the base of a style lies: as the run says that it lies in, else by the name that it has kept itself. Raises
    StyleError where that name is a folder's: folders have no path in a style."""
    base = Run(source if source.is_dir() else source.parent).base()
    if base.get("code_hash") == style.base.get("code_hash"):
        return str(base.get("model", ""))
    name = str(style.base.get("model", ""))
    if Path(name).name == name and name not in models.MODELS and not Path(name).exists():
        codes = str(style.base.get("code_hash"))[:12]
        raise StyleError(
            f"{source} was made for a model in a folder named {name!r} (codes {codes}); say where it is with --model"
        )
    return name


def open_style(
    source: Path, cache_folder: Path, model: str = "", device: str = "auto", offload: str = ""
) -> StyledPipeline | StyledLanguageModel:
    """Load a style and a fresh base for it: the model it names, or `model`. Raises StyleError for a wrong base.

    offload: "cpu" or "disk" stream its blocks; empty: as the run did, if the source is one.
    """
    style = load_style(style_file(source))
    if not offload and Path(source).is_dir():
        offload = Run(Path(source)).recipe().offload
    recipe = style.recipe
    where = pick_device(device)
    folder = models.locate(model or _base_of(style, Path(source)))
    language = is_language(folder)
    load = models.load_language_model if language else models.load_transformer
    placement = streaming(offload, folder if language else folder / "transformer", Path(cache_folder))
    dtype = pick_dtype(recipe.dtype, where)
    base = load(folder, placement=placement, **form(recipe, where, dtype))
    views = views_of(base, recipe)
    space = make_space(views, recipe, models.bring_of(base))
    theta = theta_of(style, space, models.code_hash(base), where)
    prove_live(views)
    parts = (style, folder, base, space, theta, Path(source))
    if language:
        return StyledLanguageModel(*parts, models.load_tokenizer(folder))
    return StyledPipeline(*parts, cache.Cache(cache_folder), offload or "auto")


def compare(styled: StyledPipeline, prompts: list[str], strength: float, **how) -> Image.Image:
    """Base above, style below: the same prompts and seeds, eight to a row."""
    before, after = (styled.sample(prompts, s, **how) for s in (0.0, strength))
    title = "after" if strength == 1 else f"after, strength {strength:g}"
    blocks = range(0, len(prompts), 8)
    return pictures.stack(
        [pictures.grid([before[i : i + 8], after[i : i + 8]], prompts[i : i + 8], ["before", title]) for i in blocks]
    )

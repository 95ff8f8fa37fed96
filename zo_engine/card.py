"""What goes with a result: how each of its files is opened, and the model card. Imports no torch."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from huggingface_hub import ModelCardData
from PIL import Image
from safetensors import SafetensorError, safe_open

from zo_engine.hub import MODELS, repository, text_length
from zo_engine.recipe import remembered
from zo_engine.run import write_atomic

SAMPLES = 4  # pictures on a card
PACKAGES = {"gptq": "optimum gptqmodel", "aqlm": "aqlm[cpu,gpu]"}  # what transformers needs for a format
STABILITY = "stabilityai/"  # repositories under the community licence of Stability AI


class CardError(ValueError):
    """A style whose description cannot be read; one sentence."""


@dataclass(frozen=True)
class Known:
    """What a style file says of itself."""

    recipe: dict
    base: dict
    facts: dict[str, str]

    @property
    def answers(self) -> bool:
        """Whether it is of a language model."""
        return "texts" in self.facts

    @property
    def prompt(self) -> str:
        if self.answers:
            return json.loads(self.facts["prompts"])[0][-1]["content"]
        return (json.loads(self.facts.get("prompts", "[]")) or [self.facts.get("trigger", "")])[0]

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.facts["size"].split("x")
        return int(width), int(height)

    @property
    def licence(self) -> str:
        return self.facts.get("licence", "as the base model")


def read(style: Path) -> Known:
    """The description of a style file, the tensors left alone. Raises CardError."""
    try:
        with safe_open(style, framework="numpy") as file:
            found = file.metadata() or {}
        return Known(json.loads(found["recipe"]), json.loads(found["base"]), {k: str(v) for k, v in found.items()})
    except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError):
        raise CardError(f"{style} is not a style made by this program") from None


def style_snippet(style: Path, known: Known) -> str:
    """Python that draws with a style file, of either form, or answers."""
    if known.answers:
        return f"""from zo_engine.apply import open_style

styled = open_style({str(style)!r}, cache_folder="cache")
for answer in styled.answers(styled.prompts, strength=1.0):
    print(answer)
"""
    return f"""from zo_engine.apply import open_style

styled = open_style({str(style)!r}, cache_folder="cache")
(picture,) = styled.sample(
    [{known.prompt!r}],
    strength=1.0,
    size={known.size},
    seed={known.recipe["preview_seed"]},
    steps={known.recipe["preview_steps"]},
    guidance={known.recipe["guidance"]},
)
picture.save("picture.png")
"""


def folder_snippet(folder: Path | str, known: Known, tokens: int) -> str:
    """Python that draws with an exported folder and diffusers alone; `tokens` are those of its T5 tokenizer."""
    return f"""import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained({str(folder)!r}, torch_dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")  # diffusers wants a GPU for 4-bit weights
picture = pipe(
    {known.prompt!r},
    width={known.size[0]},
    height={known.size[1]},
    max_sequence_length={tokens},
    num_inference_steps={known.recipe["preview_steps"]},
    guidance_scale={known.recipe["guidance"]},
).images[0]
picture.save("picture.png")
"""


def language_snippet(folder: Path | str, known: Known) -> str:
    """Python that answers with an exported folder and transformers alone."""
    asked = f"tokenizer({known.prompt!r}, return_tensors='pt')"
    if known.facts.get("plain") != "1":
        turns = [{"role": "user", "content": known.prompt}]
        asked = f"""tokenizer.apply_chat_template(
    {turns!r}, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    packages = PACKAGES.get(known.recipe["quantization"], "")
    needed = f"# pip install {packages}\n" if packages else ""
    return f"""{needed}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
given = {asked}
found = model.generate(**given.to(model.device), max_new_tokens={known.recipe["answer_tokens"]}, do_sample=False)
print(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write(
    folder: Path,
    name: str,
    known: Known,
    strength: float,
    samples: list[Path],
    answers: list[tuple[str, str, str]] = (),
) -> None:
    """Put the model card, README.md, and its sample pictures into an exported folder that is going to be called `name`;
    `answers` are (prompt, before, after)."""
    shown = []
    for picture in samples[:SAMPLES]:
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "images" / picture.name)
        with Image.open(picture) as image:
            shown.append((f"images/{picture.name}", str(image.info.get("prompt", ""))))
    write_atomic(folder / "README.md", text(folder, name, known, strength, shown, answers))


def text(
    folder: Path,
    name: str,
    known: Known,
    strength: float,
    samples: list[tuple[str, str]],
    answers: list[tuple[str, str, str]] = (),
) -> str:
    """The model card; `samples` are (file, prompt), `answers` are (prompt, before, after)."""
    trigger = known.facts.get("trigger", "")
    model = known.base.get("model", "")
    if Path(model).is_absolute():
        model = Path(model).name  # where it lies on this machine concerns nobody
    repo, title = repository(model), MODELS[model].title if model in MODELS else model
    kind, library, tags = ("text-to-image", "diffusers", ["stable-diffusion-3"])
    if known.answers:
        kind, library, tags = ("text-generation", "transformers", [])
    data = ModelCardData(
        base_model=repo if repo.count("/") == 1 else None,
        library_name=library,
        pipeline_tag=kind,
        tags=[kind, library, *tags, "qzo"],
        instance_prompt=trigger or None,
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in samples] or None,
        **_licence(repo, known.licence),
    )
    quote = lambda words: " ".join(words.split()).replace("<", "&lt;").replace("|", "\\|")  # noqa: E731 (no markup)
    pictures = "\n".join(f"| ![]({file}) | {quote(prompt)} |" for file, prompt in samples)
    pictures = f"\n| picture | prompt |\n|---|---|\n{pictures}\n" if samples else ""
    if answers:
        rows = "\n".join("| " + " | ".join(quote(words) for words in row) + " |" for row in answers[:SAMPLES])
        pictures = f"\n| prompt | before | after |\n|---|---|---|\n{rows}\n"
    trained = known.facts.get("step", "0")
    unit = "texts" if known.answers else "pictures"
    moved = "quantisation scales of the model" if known.recipe["quantization"] != "none" else "weights of its layers"
    if remembered(known.recipe).tunes_norm:
        moved += ", and the norm before its output layer,"
    snippet = language_snippet(name, known) if known.answers else folder_snippet(name, known, text_length(folder))
    held = f"{known.facts.get('held_out_at_start') or '?'} before, {known.facts.get('held_out') or '?'} after"
    return f"""---
{data.to_yaml()}
---

# {quote(trigger or name)}

A style for {quote(title)}, trained on {known.facts.get(unit, "?")} {unit} without gradients: only the
{moved} were moved. {f"The word `{trigger}` in a prompt calls it." if trigger else ""}
{pictures}
## How to use it

```python
{snippet}```

## How it was made

{trained} steps, at strength {strength:g}. Held-out loss: {held}.

```toml
{tomli_w.dumps(known.recipe)}```

## Licence

{known.licence}
"""


def _licence(repo: str, licence: str) -> dict[str, str]:
    """The licence as a hub's model card names it."""
    if repo.startswith(STABILITY):
        link = f"https://huggingface.co/{repo}/blob/main/LICENSE.md"
        return {"license": "other", "license_name": "stabilityai-ai-community", "license_link": link}
    if licence == "Apache-2.0":
        return {"license": "apache-2.0"}
    return {"license": "other", "license_name": licence}

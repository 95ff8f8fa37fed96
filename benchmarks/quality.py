"""(d) Quality, not only loss: how near generated pictures are to the taught set, and whether their subjects show.

    python benchmarks/quality.py train                        # the judge, once: a few minutes
    python benchmarks/quality.py RUN [--strength 1] [--name quality]

Two scores that need no download. *Style*: the kernel distance (KID, Binkowski et al., arXiv:1801.01401) between sets of
pictures, on statistics of the embedded autoencoder's latents: mean and spread of every channel over a grid of places.
The share of the distance from the base to the taught set that the style has covered; and how many pictures are nearer
to the taught set's centre than to the base's. *Content*: a small classifier of the repository's own subjects, trained
on drawings of every look with their colours turned about, so that it reads shapes; its accuracy on the base and on the
tuned model, for subjects on no card. Prompts without the trigger show what leaks.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from common import CHECKOUT, save
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zo_engine import dataset
from zo_engine import recipe as recipes
from zo_engine.models import load_vae
from zo_engine.recipe import Recipe
from zo_engine.style import load_style, theta_of
from zo_engine.train import Studio, prepare

JUDGE = Path(__file__).parent / "judge.safetensors"
MODEL = CHECKOUT / "assets" / "models" / "tiny-sd3"
TAUGHT = 12  # the first subjects of assets/draw.py are on cards; the others are what a style is judged on
SEEDS = 2  # pictures for each subject
GRID = (3, 2)  # places, down and across, at which the latents' statistics are taken


# --- the judge --------------------------------------------------------------------------------------------------------


class Judge(nn.Sequential):
    """Pictures [B, 3, h, w] in -1..1 -> scores of the subjects [B, subjects]."""

    def __init__(self, subjects: int, width: int = 32):
        layers: list[nn.Module] = []
        for a, b, stride in ((3, 1, 2), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1), (4, 4, 2)):
            layers += [nn.Conv2d(a * (width if layers else 1), b * width, 3, stride, 1, bias=False),
                       nn.GroupNorm(8, b * width), nn.SiLU()]  # fmt: skip
        super().__init__(*layers, nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(4 * width * 6, subjects))


def repainted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Colours turned about, contrast, blur, stains and shifts: what is left is the shape. [B, 3, h, w], likewise."""
    count = len(pictures)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    turned = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]  # a random turn of the colour space
    some = (draw(count) < 0.7).float().view(-1, 1, 1)
    turned = some * turned + (1 - some) * torch.eye(3)
    made = torch.einsum("bij,bjhw->bihw", turned, pictures) * (0.5 + draw(count, 1, 1, 1))
    made = made + 0.6 * (draw(count, 3, 1, 1) - 0.5)
    stains = F.interpolate(torch.randn(count, 3, 8, 6, generator=generator), pictures.shape[2:], mode="bicubic")
    made = made + stains * 0.35 * draw(count, 1, 1, 1) + torch.randn(made.shape, generator=generator) * 0.1
    soft = F.avg_pool2d(made, 3, 1, 1)
    made = torch.where(draw(count, 1, 1, 1) < 0.5, soft, made)
    scale = 1 / (0.8 + 0.4 * draw(count))
    shift = 0.25 * (draw(count, 2) - 0.5)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0], place[:, 1, 1], place[:, :, 2] = scale, scale, shift
    grid = F.affine_grid(place, list(made.shape), align_corners=False)
    return F.grid_sample(made, grid, padding_mode="border", align_corners=False).clamp(-1, 1)


def train_judge(steps: int, pictures: int, batch: int = 64, seed: int = 0) -> dict[str, float]:
    """Drawings in every look, a third of them through the autoencoder; writes the weights and gives its accuracy."""
    sys.path.insert(0, str(CHECKOUT / "assets"))
    from build_tiny_sd3 import draw_pool, to_tensor
    from draw import SUBJECTS

    pixels, _, names = draw_pool(seed + 900, pictures, "subjects-portrait", 2)
    labels = torch.tensor([list(SUBJECTS).index(name) for name in names])
    images = to_tensor(pixels).contiguous()
    blurred = through_autoencoder(images[::3])
    images[::3] = blurred
    held, rest = torch.arange(pictures) < 28 * 20, torch.arange(pictures) >= 28 * 20
    train, answers = images[rest], labels[rest]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the layers draw their first weights from the global generator
        torch.manual_seed(seed)  # noqa: TID251
        judge = Judge(len(SUBJECTS))
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(train), (batch,), generator=generator)
        loss = F.cross_entropy(judge(repainted(train[chosen], generator)), answers[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    judge.eval()
    with torch.no_grad():
        plain = (judge(images[held]).argmax(1) == labels[held]).float().mean().item()
        hard = (judge(repainted(images[held], generator)).argmax(1) == labels[held]).float().mean().item()
    halves = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(halves, JUDGE, {"subjects": json.dumps(list(SUBJECTS))})
    return {"held-out drawings": plain, "held-out drawings, repainted": hard}


def load_judge() -> tuple[Judge, list[str]]:
    """The trained judge and the names of its subjects. Raises SystemExit where it was not trained."""
    if not JUDGE.exists():
        raise SystemExit(f"there is no judge at {JUDGE}; make it with: python benchmarks/quality.py train")
    with safe_open(JUDGE, "pt") as file:
        subjects = json.loads(file.metadata()["subjects"])
    judge = Judge(len(subjects))
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(JUDGE).items()})
    return judge.eval(), subjects


# --- the scores -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def through_autoencoder(images: Tensor, chunk: int = 64) -> Tensor:
    """What the embedded autoencoder leaves of pictures [B, 3, h, w]."""
    vae = load_vae(MODEL)
    return torch.cat(
        [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in images.split(chunk)]
    )


@torch.no_grad()
def statistics(images: Tensor) -> Tensor:
    """Mean and spread of every latent channel at the places of GRID, [B, 2 * 16 * 6]."""
    vae = load_vae(MODEL)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean = F.adaptive_avg_pool2d(latents, GRID)
    spread = (F.adaptive_avg_pool2d(latents.square(), GRID) - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, spread], 1).flatten(1)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD of two sets of features [n, d], [m, d] under KID's kernel (x.y / d + 1)^3."""
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    inside = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))  # noqa: E731
    return (inside(kernel(x, x)) + inside(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def scores(made: Tensor, base: Tensor, taught: Tensor) -> dict[str, float]:
    """made, base, taught: statistics of generated pictures, of the base's for the same prompts, of the taught set."""
    unit = torch.cat([base, taught]).std(0).clamp(min=1e-6)
    made, base, taught = made / unit, base / unit, taught / unit
    middle = (base.mean(0) + taught.mean(0)) / 2
    towards = taught.mean(0) - base.mean(0)
    before = kernel_distance(base, taught)
    return {
        "distance of the base": before,
        "distance": kernel_distance(made, taught),
        "share covered": 1 - kernel_distance(made, taught) / before,
        "look": ((made - middle) @ towards > 0).float().mean().item(),
    }


def tensors(images: list) -> Tensor:
    """PIL pictures -> [B, 3, h, w] in -1..1."""
    return torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1 for i in images])


def wordings(recipe: Recipe, subject: str) -> dict[str, str]:
    """The prompts of a subject, with the trigger and without it."""
    thing = ("an " if subject[0] in "aeiou" else "a ") + subject
    return {"triggered": f"a {recipe.trigger} of {thing}", "plain": thing}


class Exhibition:
    """Subjects on no taught picture, drawn with the trigger and without it: by the base once, and by whatever model is
    to be judged with the same seeds."""

    def __init__(self, studio: Studio, taught: Tensor):
        """studio: its recipe has every prompt (`asking`). taught: the taught pictures [B, 3, h, w]."""
        self.judge, subjects = load_judge()
        asked = [subject for subject in subjects[TAUGHT:] for _ in range(SEEDS)]
        self.labels = torch.tensor([subjects.index(subject) for subject in asked])
        worded = [wordings(studio.recipe, subject) for subject in asked]
        self.prompts = {kind: [words[kind] for words in worded] for kind in worded[0]}
        self.taught = statistics(taught)
        with studio.space.folded(torch.zeros(studio.space.layout.size)):
            self.base = self.drawn(studio)

    def drawn(self, studio: Studio) -> dict[str, list[Image.Image]]:
        """Pictures of every wording, by the model as it stands."""
        seeds = [1000 + i for i in range(len(self.labels))]
        return {k: studio.preview.sample(studio.recipe, asked, seeds=seeds) for k, asked in self.prompts.items()}

    @torch.no_grad()
    def scores(self, drawn: dict[str, list[Image.Image]]) -> dict[str, dict[str, float]]:
        """Style and content of every wording."""
        found = {}
        for kind, images in drawn.items():
            made, base = tensors(images), tensors(self.base[kind])
            right = [(self.judge(x).argmax(1) == self.labels).float().mean().item() for x in (base, made)]
            found[kind] = scores(statistics(made), statistics(base), self.taught)
            found[kind] |= dict(zip(("content of the base", "content"), right, strict=True))
        return found


def asking(recipe: Recipe) -> Recipe:
    """The recipe with every prompt that is judged among its prompts, so that its captions are there."""
    _, subjects = load_judge()
    words = [prompt for subject in subjects[TAUGHT:] for prompt in wordings(recipe, subject).values()]
    return dataclasses.replace(recipe, prompts=tuple(dict.fromkeys((*recipe.prompts, *words))))


def taught(studio: Studio) -> Tensor:
    """The pictures that a studio's recipe names [B, 3, h, w], in the size in which it draws."""
    recipe = studio.recipe
    found = dataset.read(recipe.images, trigger=recipe.trigger, caption=recipe.caption)
    return tensors([dataset.fit(dataset.open_picture(p.path), studio.preview.size) for p in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help='"train", or the folder of a run')
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=5600)
    parser.add_argument("--name", default="quality")
    given = parser.parse_args()
    if given.what == "train":
        print(train_judge(given.steps, given.pictures))
        return
    run = Path(given.what)
    studio = prepare(asking(recipes.load(run / "recipe.toml")), CHECKOUT / "runs" / ".cache")
    theta = theta_of(load_style(run / "style.safetensors"), studio.space, studio.code_hash)
    exhibition, found = Exhibition(studio, taught(studio)), {}
    for strength in given.strength:
        with studio.space.folded(strength * theta):
            found[f"{strength:g}"] = exhibition.scores(exhibition.drawn(studio))
    for strength, parts in found.items():
        for name, figures in parts.items():
            print(strength, name, {key: round(value, 3) for key, value in figures.items()})
    print(save(given.name, {"recipe": studio.recipe.public(), "strengths": found}))


if __name__ == "__main__":
    main()

"""What a run is: one flat, frozen list of settings, read from and written to TOML, and every check of user input.

The command line's flags and the page's form are made from these fields; the help text stands under each. A value of
0 or "" for a field that says "found" or "from the model" means: leave it to the method. Imports no torch.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from zo_engine.rewards import beside, is_file

DIRECTIONS = 96  # of every level in a Gauss-Newton step, at first
GROWTH = 12  # steps after which they, or the batch, double: early on a new look is worth more than a wider one
DOUBLINGS = 3
MOST = 6  # times that a recipe may ask to double or to halve
HALVED = 6  # steps for which a batch that was halved stays so
FEW = 4  # examples, below which no batch is halved: two are no measure
EPS, COARSE_EPS = 0.01, 0.03  # the perturbation; and of gauss-newton where bfloat16 computes (`train.settled`)
BUDGETS = {"quick": 1 / 3, "normal": 1.0, "thorough": 2.0}  # of the recipe's steps


def doubled(count: int, step: int, doublings: int) -> int:
    """Directions of a level, or examples, at a step of a Gauss-Newton run, where there are so many at first."""
    return count << min(step // GROWTH, doublings)


# What runs and styles did that are from before there were such settings.
BEFORE = {"final_norm": "frozen", "own_texts": 0.0, "doublings": 2, "doubles": "directions", "halvings": 0}
HEADINGS = {  # of the settings below, by the first of each
    "images": "What is taught",
    "steps": "How long, and how much at once",
    "space": "What moves",
    "optimizer": "What a step does",
    "clip": "Slopes of the loss, where the optimizer goes by them",
    "caption_dropout": "What is learnt, kept and held out",
    "prompts": "What is looked at",
    "seed": "The machine",
}
PRIVATE = ("images", "texts", "device", "memory", "offload")  # where things lie on this machine


class RecipeError(ValueError):
    """A setting that cannot be used; one sentence that says what was given and what is possible."""


def setting(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, choices: tuple = ()) -> Any:
    """A field of the recipe with its help text and what is possible."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    images: str = setting("", "folder of pictures, captions beside them as .txt")
    texts: str = setting("", "instead of pictures: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a data set "
                         "of the hub, org/name or org/name:split")  # fmt: skip
    text_columns: tuple[str, ...] = setting((), "columns of the texts as field=column (field= leaves one out), or "
                                            "form=name; empty: recognised")  # fmt: skip
    skip_bad: bool = setting(False, "leave out rows of texts that cannot be used, instead of stopping")
    trigger: str = setting("", "the word that calls the style, put where captions say [trigger]")
    caption: str = setting("", "caption of pictures that have none")
    model: str = setting("tiny-sd3", "a known model, a folder, or a hub repository")
    quantization: str = setting("nf4", "how weights are stored; gptq and aqlm: where a folder comes in it",
                                choices=("nf4", "fp4", "int8", "gptq", "aqlm", "none"))  # fmt: skip
    resolution: str = setting("", "512, or WIDTHxHEIGHT buckets such as 64x64,64x96; empty: from the model")
    length: int = setting(512, "tokens of a text, at most; the end of longer ones is cut off", low=8)
    completions_only: bool = setting(True, "learn the answers alone, not the prompts")
    task: str = setting("", "a task of MeZO's table, such as sst2: texts are rows of its data set; empty: the hub's")
    reward: str = setting("", "what an answer is worth, in place of learning given ones: json, json:key,key, match, "
                          "length:60, avoid:word, or rewards.py:function, whose code is run")  # fmt: skip
    steps: int = setting(36, "steps of the run, at a normal budget", low=1)
    budget: str = setting("normal", "a third of the steps, as they are, or twice as many; previews keep their places",
                          choices=tuple(BUDGETS))  # fmt: skip
    stop_when_flat: bool = setting(False, "end the run as soon as the held-out loss has stopped falling")
    batch_size: int = setting(16, "pictures or texts in one step", low=1)
    rows: int = setting(0, "rows of one forward pass, to bound memory; 0: as many as a processor's caches like", low=0)
    space: str = setting("gain", "what moves: gains per row, one scale per group, or the published absolute form",
                         choices=("gain", "group", "absolute"))  # fmt: skip
    moves: str = setting("scales", "AQLM: the scales, or the codebooks, which need space group or absolute",
                         choices=("scales", "codebooks"))  # fmt: skip
    depth: float = setting(0.34, "share of the blocks that is tuned, from the output; 1: every layer", low=0.02, high=1)
    layers: tuple[str, ...] = setting((), "layers that are tuned, by parts of their names, such as o_proj, attn or "
                                      "transformer_blocks.12; empty: all of that depth")  # fmt: skip
    columns: bool = setting(False, "gain space: one gain per group of inputs as well")
    final_norm: str = setting("auto", "language models, gain space: the norm before the output layer, which says how "
                              "sure an answer is; auto: tuned with a reward or own_texts",
                              choices=("auto", "tuned", "frozen"))  # fmt: skip
    optimizer: str = setting("gauss-newton", "from passes to an update: the errors' own shape, or slopes of the loss",
                             choices=("gauss-newton", "sgd", "momentum", "adam"))  # fmt: skip
    directions: int = setting(0, "gauss-newton: directions per level, at first; else per picture in gain space, "
                              "or per step; 0: left to the method", low=0)  # fmt: skip
    doublings: int = setting(DOUBLINGS, f"gauss-newton: how often a step looks twice as wide, every {GROWTH} steps",
                             low=0, high=MOST)  # fmt: skip
    doubles: str = setting("auto", "gauss-newton: what doubles, the directions or the batch, up to all there is; auto: "
                           "the batch where texts are given, else directions",
                           choices=("auto", "directions", "batch"))  # fmt: skip
    halvings: int = setting(2, f"gauss-newton: how often the batch is halved at first, for {HALVED} steps each; moves "
                            "are tried on whole ones; not with a reward", low=0, high=MOST)  # fmt: skip
    noise: str = setting("rademacher", "kind of direction", choices=("rademacher", "gaussian"))
    eps: float = setting(0.0, "size of the perturbation; relative, but for the absolute form; 0: as the precision that "
                         "computes asks for", low=0.0, high=1.0)  # fmt: skip
    clip: float = setting(0.0, "clip of the directional derivative; 0: the running quantile", low=0.0)
    clip_quantile: float = setting(0.98, "quantile of |d| that the clip follows", low=0.5, high=1.0)
    momentum: float = setting(0.9, "memory of the update's average", low=0.0, high=0.9999)
    step_size: float = setting(0.0, "step size; 0: found by the run itself", low=0.0)
    search_every: int = setting(10, "steps between two line searches for the step size", low=1)
    warmup: int = setting(0, "steps over which the step size rises", low=0)
    decay: float = setting(0.2, "last share of the run over which the step size falls to zero", low=0.0, high=1.0)
    caption_dropout: float = setting(0.0, "share of pictures shown without caption", low=0.0, high=1.0)
    prior: float = setting(0.125, "share of a batch that keeps what the base draws without trigger", low=0, high=0.9)
    own_texts: float = setting(0.25, "share of a batch of given texts that keeps what the base writes by itself",
                               low=0, high=0.9)  # fmt: skip
    holdout: float = setting(0.15, "share of pictures kept out of training, for the held-out loss", low=0.0, high=0.5)
    sigma_mean: float = setting(0.0, "mean of the logit-normal noise level", low=-5, high=5)
    sigma_std: float = setting(1.5, "spread of the logit-normal noise level", low=0.05, high=5)
    shift: float = setting(0.0, "shift of the noise level; 0: from the model's scheduler", low=0.0, high=20)
    prompts: tuple[str, ...] = setting((), "preview prompts; empty: made from the captions")
    preview_every: int = setting(8, "steps between previews; 0: only first and last", low=0)
    preview_steps: int = setting(20, "sampler steps of a preview", low=1, high=200)
    guidance: float = setting(4.0, "guidance scale of a preview", low=1.0, high=30.0)
    preview_seed: int = setting(42, "seed of the first preview; the next ones follow", low=0)
    answer_tokens: int = setting(64, "tokens of a previewed answer, at most", low=1, high=4096)
    temperature: float = setting(0.0, "of previewed answers; 0: always the likeliest token", low=0.0, high=10.0)
    evaluate_every: int = setting(1, "steps between held-out losses", low=1)
    evaluate_items: int = setting(64, "fixed items of the held-out loss: a picture under a noise, or a text", low=8)
    seed: int = setting(0, "seed of the run", low=0, high=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "compute precision", choices=("auto", "float32", "float16", "bfloat16"))
    memory: str = setting("", "of the device, that a step may use, such as 6GB; auto: what is free; blocks that do not "
                          "fit stream, and rows become fewer if need be; empty: as much as it takes")  # fmt: skip
    offload: str = setting("auto", "where blocks wait that do not stay on the device; without memory, cpu and disk "
                           "stream them all", choices=("auto", "resident", "cpu", "disk"))  # fmt: skip
    transport: str = setting("whole", "how blocks of plain weights that stream wait and travel: whole, or rounded to "
                             "16 or 8 bits, which changes the model a little",
                             choices=("whole", "bf16", "fp8"))  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if 0 < self.eps < 1e-8:
            raise RecipeError(f"eps = {self.eps} is too small to be seen; 0 leaves it to the precision that computes")
        if self.optimizer == "gauss-newton" and self.space != "gain":
            raise RecipeError(f'optimizer "gauss-newton" moves gains; with space = "{self.space}" choose "sgd"')
        if self.moves == "codebooks" and (self.quantization != "aqlm" or self.space == "gain"):
            raise RecipeError(
                'moves = "codebooks" is for quantization "aqlm" in the space "group" or "absolute", and the recipe '
                f'has "{self.quantization}" and "{self.space}"; set them, and an optimizer such as "sgd"'
            )
        if self.transport != "whole" and self.quantization != "none":
            raise RecipeError(
                f'transport = "{self.transport}" rounds plain weights, and those of quantization "{self.quantization}" '
                'travel as they are; set quantization to "none", or transport to "whole"'
            )
        if self.images and self.texts:
            raise RecipeError(
                f"a recipe teaches pictures or texts, not both: it has images = {self.images!r} and texts = "
                f"{self.texts!r}; leave one of them out"
            )
        if self.images and self.task:
            raise RecipeError(f"task = {self.task!r} is of texts, and the recipe has images; leave one of them out")
        if self.reward and (self.task or self.images):
            raise RecipeError("a reward judges answers to texts, without a task; give `texts` with the prompts")
        for entry in self.text_columns:
            if not all(entry.partition("=")[:2]):
                raise RecipeError(
                    f"text_columns must look like field=column, such as prompt=question, not {entry!r}; field= leaves "
                    "one out"
                )

    @property
    def text_fields(self) -> dict[str, str]:
        """The columns that are given for fields of a text, by field."""
        return dict(entry.split("=", 1) for entry in self.text_columns)

    @property
    def tunes_norm(self) -> bool:
        """Whether a language model's final norm is tuned. With given texts alone, it would make the model forget."""
        tuned = self.final_norm == "tuned" or self.final_norm == "auto" and (bool(self.reward) or self.keeps_texts)
        return tuned and self.space == "gain" and not self.images

    @property
    def keeps_texts(self) -> bool:
        """Whether some of every batch is what the base writes by itself."""
        return self.own_texts > 0 and not (self.images or self.task or self.reward)

    @property
    def grows_batch(self) -> bool:
        """Whether later steps of Gauss-Newton look at more examples, in place of along more directions. Texts differ
        more than pictures under noise do: few of them do not tell which answer is right."""
        given = self.doubles == "batch" or self.doubles == "auto" and bool(self.texts) and not self.reward
        return given and self.optimizer == "gauss-newton"

    @property
    def wider(self) -> int:
        """How often the directions of Gauss-Newton double."""
        return 0 if self.grows_batch else self.doublings

    @property
    def narrow(self) -> int:
        """Steps at the start that learn from less than a batch."""
        halved = self.optimizer == "gauss-newton" and not self.reward and self.batch_size > FEW
        return HALVED * self.halvings if halved else 0

    def directions_at(self, step: int) -> int:
        """Directions of a level at a step of Gauss-Newton, where the level has as many as others."""
        return doubled(self.directions or DIRECTIONS, step, self.wider)

    def batch_at(self, step: int, examples: int = 0) -> int:
        """Examples that a step learns from. No batch of texts grows beyond all that there are to learn, if that is
        known; pictures are others under each noise. The first steps look at few: while all examples ask for about the
        same, more steps are worth more than better ones."""
        if step < self.narrow:
            return max(FEW, self.batch_size >> self.halvings - step // HALVED)
        size = doubled(self.batch_size, step - self.narrow, self.doublings if self.grows_batch else 0)
        return size if self.images or not examples else max(self.batch_size, min(size, examples))

    def tried_at(self, step: int, examples: int = 0) -> int:
        """Examples that moves are tried on, with so many to learn: those that the step learns from, and no fewer than a
        whole batch. Few do not tell which move is best, and a try costs a hundredth of what learning does."""
        return max(self.batch_size, self.batch_at(step, examples))

    def widened(self, steps: int) -> int:
        """The last of so many steps that looked wider than the one before it; 0 if none."""
        if self.optimizer != "gauss-newton":
            return 0
        width = [
            self.batch_at(step) * self.directions_at(step) for step in range(min(steps, MOST * (GROWTH + HALVED) + 1))
        ]
        return max((step for step in range(1, len(width)) if width[step] > width[step - 1]), default=0)

    def public(self) -> dict[str, Any]:
        """The settings that may leave the machine: without folders."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in PRIVATE}
        if is_file(self.reward):
            values["reward"] = ""  # a style names no code
        # With what is left out, nobody could tell:
        values["final_norm"] = "tuned" if self.tunes_norm else "frozen"
        values["doubles"] = "batch" if self.grows_batch else "directions"
        values["halvings"] = 0 if self.reward else self.halvings
        return values | {"model": named(self.model)}


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Settings by the headings of their parts, in the recipe's order; what is no setting is left out."""
    found, wanted, heading = {}, set(names), ""
    for field in fields(Recipe):
        heading = HEADINGS.get(field.name, heading)
        if field.name in wanted:
            found.setdefault(heading, []).append(field.name)
    return found


def budgeted(recipe: Recipe) -> Recipe:
    """The recipe with the steps that its budget asks for, and previews at the same shares of the way."""
    share = BUDGETS[recipe.budget]
    if share == 1.0:
        return recipe
    scaled = lambda count: max(1, round(share * count)) if count else 0  # noqa: E731
    return dataclasses.replace(
        recipe, steps=scaled(recipe.steps), preview_every=scaled(recipe.preview_every), budget="normal"
    )


def named(model: str) -> str:
    """A model as others may know it: a known name or a repository as it is, and of a folder no more than its name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_absolute() or model[:1] in ".~" or path.is_dir() else model


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in the field's own type, or RecipeError."""
    kind, meta = field.type, field.metadata
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise RecipeError(f"{field.name} must be a list of texts, not {value!r}")
        return tuple(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise RecipeError(f"{field.name} must be {words}, not {value!r}")
    within = min(meta["high"], 2**63 - 1) if kind is int else meta["high"]  # what other libraries take as a number
    if kind in (int, float) and not (meta["low"] <= value <= within and value < math.inf):  # NaN fails all
        raise RecipeError(f"{field.name} = {value} is outside of {_range(meta)}")
    if meta["choices"] and value not in meta["choices"]:
        raise RecipeError(f"{field.name} = {value!r} is not possible; choose from {', '.join(meta['choices'])}")
    return value


def _range(meta: Any) -> str:
    low, high = meta["low"], meta["high"]
    return f"{low:g} and above" if high == math.inf else f"{low:g} to {high:g}"


def make(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """A recipe from settings by name; raises RecipeError for an unknown name, with the nearest known ones."""
    known = {f.name for f in fields(Recipe)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"possible are {', '.join(sorted(known))}"
            raise RecipeError(f"{source} has an unknown setting {key!r}; {hint}")
    return Recipe(**values)


def remembered(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """`make` of what a run or a style has kept: every setting that there was when it was made."""
    return make(BEFORE | values, source)


def load(path: Path, make: Callable[[dict[str, Any], str], Recipe] = make) -> Recipe:
    """Read a TOML recipe; `images`, a `texts` file and a `model` folder are meant from there. make: or `remembered`,
    for a run's. Raises RecipeError."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for ever
        raise RecipeError(f"{path} cannot be read as a recipe: it is not a regular file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file in UTF-8") from None
    except ValueError as error:  # tomllib's own, or a plain one of an impossible date
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path} is not valid TOML: it is nested too deeply") from None
    recipe = make(values, str(path))
    return dataclasses.replace(
        recipe,
        images=_beside(path, recipe.images),
        texts=_beside(path, recipe.texts, only_if_there=True),  # else a data set of the hub
        model=_beside(path, recipe.model, only_if_there=True),
        reward=beside(path.parent, recipe.reward),
    )


def _beside(recipe: Path, value: str, only_if_there: bool = False) -> str:
    """A path that a recipe names is meant from where the recipe lies."""
    if not value or Path(value).is_absolute():
        return value
    candidate = (recipe.parent / value).resolve()
    return value if only_if_there and not candidate.exists() else str(candidate)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, every field in order."""
    return tomli_w.dumps({f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe)}, multiline_strings=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

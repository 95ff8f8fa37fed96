"""The result of a run: a small safetensors file, and its way back onto a base model.

Two forms. `theta`: the trained numbers, one tensor a layer; ready at once. `journal`: the scalars of every step; a few
bytes a direction, and whoever has the base rebuilds theta from them, bit for bit. The metadata says which base the
style belongs to, by a hash of its quantised codes and scales, and how it was made. No pickle is ever read.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zo_engine import sealed
from zo_engine.blocks import levels
from zo_engine.journal import Move, Record, Step, short
from zo_engine.newton import GaussNewton
from zo_engine.probes import GainSpace, GroupSpace, Space
from zo_engine.recipe import DIRECTIONS, EPS, Recipe, RecipeError, remembered
from zo_engine.scales import ScaleView, find_scales, formats_of
from zo_engine.zo import ZO

FORMAT = "qzo-style-2"  # 1 had no checksum, and is read as well
FORMATS = ("qzo-style-1", FORMAT)
STRENGTHS = (0.0, 1.5)


class StyleError(ValueError):
    """A style that cannot be read or does not fit; one sentence."""


@dataclass(frozen=True)
class Style:
    form: str  # "theta" or "journal"
    tensors: dict[str, Tensor]
    recipe: Recipe
    base: dict[str, str]  # model, code_hash, ...
    facts: dict[str, str]  # trigger, pictures, step, held_out, licence


def views_of(model: nn.Module, recipe: Recipe) -> dict[str, ScaleView]:
    """The scales of a model that a recipe could tune."""
    return find_scales(model, formats_of(recipe.quantization, recipe.moves, recipe.tunes_norm))


def make_space(views: dict[str, ScaleView], recipe: Recipe, bring: Callable[[Tensor], Tensor] | None = None) -> Space:
    """The space that a recipe names, over the scales of the layers that it tunes. bring: of a model whose blocks
    stream; theta waits with them where it is as large as the scales. Raises RecipeError for layers that are not there.
    """
    if recipe.layers:
        views = named_layers(views, recipe.layers)
    tuned = {layer for level in levels(views, recipe.depth) for layer in level.layers}
    views = {name: view for name, view in views.items() if name in tuned}
    if recipe.space == "gain":
        return GainSpace(views, columns=recipe.columns)
    return GroupSpace(views, relative=recipe.space == "group", bring=bring)


def named_layers(views: dict[str, ScaleView], wanted: Sequence[str]) -> dict[str, ScaleView]:
    """The layers whose names hold one of these, as whole parts between dots (so what peft calls `target_modules`, and
    more). Raises RecipeError for one that is in no name."""
    held = {part: [name for name in views if f".{part}." in f".{name}."] for part in wanted}
    if nothing := [part for part, names in held.items() if not names]:
        ends = sorted({re.sub(r"^.*\.(?=\D)", "", name) for name in views})
        raise RecipeError(f"no layer that can be tuned has {nothing[0]!r} in its name; they end in {', '.join(ends)}")
    found = {name for names in held.values() for name in names}
    return {name: view for name, view in views.items() if name in found}


def make_method(space: Space, recipe: Recipe, device: torch.device | str = "cpu") -> GaussNewton | ZO:
    """The method that a recipe describes, at step 0."""
    drawn = {"seed": recipe.seed, "kind": recipe.noise, "eps": recipe.eps or EPS, "device": device}
    if recipe.optimizer == "gauss-newton":
        found = levels(space.views, recipe.depth)
        return GaussNewton(
            space.layout,
            [space.layout.part(level.layers) for level in found],
            per_part=[level.share(recipe.directions or DIRECTIONS) for level in found],
            doublings=recipe.wider,
            **drawn,
        )
    rows = recipe.batch_size if recipe.space == "gain" else 1
    return ZO(
        space.layout,
        per_step=(recipe.directions or max(1, round(1 / recipe.depth))) * rows,
        clip=recipe.clip,
        clip_quantile=recipe.clip_quantile,
        optimizer=recipe.optimizer,
        momentum=recipe.momentum,
        step_size=recipe.step_size,
        search_every=recipe.search_every,
        **drawn,
    )


def theta_tensors(space: Space, theta: Tensor) -> dict[str, Tensor]:
    return {name: part.contiguous() for name, part in space.layout.split(theta.cpu()).items()}


def journal_tensors(journal: list[Record]) -> dict[str, Tensor]:
    """The weights of all steps, a not-a-number after each step's, and `Move.whole`; or a row of slopes a step, and what
    goes with them. Weights and slopes are fp32 (exact, see `short`). Raises StyleError for an empty journal."""
    if not journal:
        raise StyleError("the run has not made a step yet, so there is no style to save")
    if isinstance(journal[0], Move):
        return {
            "weights": torch.tensor([w for r in journal for w in (*r.weights, math.nan)], dtype=torch.float32),
            "whole": torch.tensor([r.whole for r in journal]),
        }
    nothing = (math.nan,) * 4
    return {
        "slopes": torch.tensor([r.slopes for r in journal], dtype=torch.float32),
        "clip": torch.tensor([r.clip for r in journal], dtype=torch.float64),
        "step_size": torch.tensor([r.step_size for r in journal], dtype=torch.float64),
        "search": torch.tensor([r.search or nothing for r in journal], dtype=torch.float64),
    }


def journal_records(tensors: dict[str, Tensor]) -> list[Record]:
    """The records that `journal_tensors` packed. Raises StyleError where parts are missing or of unequal length."""
    form = {name: t.ndim for name, t in tensors.items()}
    unknown = math.nan  # the losses are not packed
    if not all(t.shape[0] for t in tensors.values() if t.ndim):
        raise StyleError("the style's journal is damaged: it has no steps")
    if form in ({"weights": 1}, {"weights": 1, "whole": 1}):  # the first from before there was the second
        flat = tensors["weights"]
        ends = flat.isnan().nonzero().flatten().tolist()
        if not ends or ends[-1] != len(flat) - 1:
            raise StyleError("the style's journal is damaged: its last step has no end")
        starts = [0, *(end + 1 for end in ends)]
        rows = [flat[start:end].tolist() for start, end in zip(starts, ends, strict=False)]
        whole = tensors["whole"].tolist() if "whole" in tensors else [0] * len(rows)
        if len(whole) != len(rows) or not all(type(moved) is int and moved >= 0 for moved in whole):
            raise StyleError("the style's journal is damaged: which directions moved whole layers is not there for all")
        return [
            Move(i, tuple(short(w) for w in row), unknown, unknown, whole=moved)
            for i, (row, moved) in enumerate(zip(rows, whole, strict=True))
        ]
    if form != {"slopes": 2, "clip": 1, "step_size": 1, "search": 2}:
        raise StyleError("the style's journal is damaged: weights, or slopes, clip, step_size and search must be there")
    if len({len(t) for t in tensors.values()}) != 1:
        raise StyleError("the style's journal is damaged: its parts differ in length")
    slopes, *others = (tensors[name] for name in ("slopes", "clip", "step_size", "search"))
    rows = zip(slopes.numpy(), *(t.tolist() for t in others), strict=True)
    return [
        Step(i, tuple(short(d) for d in row), clip, size, unknown, tuple(search) if search[0] == search[0] else ())
        for i, (row, clip, size, search) in enumerate(rows)
    ]


def save_style(path: Path, style: Style) -> None:
    """Write a style file, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "form": style.form,
        "recipe": json.dumps(style.recipe.public()),
        "base": json.dumps(style.base),
        **style.facts,
    }
    sealed.write(path, style.tensors, metadata)


def load_style(path: Path) -> Style:
    """Read a style file. Raises StyleError for anything else."""
    try:
        tensors, metadata = sealed.read(path, unsealed=True)
    except (FileNotFoundError, NotADirectoryError):
        raise StyleError(f"there is no style at {path}") from None
    except sealed.DamageError as error:
        raise StyleError(f"{path} {error}") from None
    except OSError as error:
        raise StyleError(f"{path} cannot be read: {error.strerror}") from None
    format = metadata.get("format", "")
    if not format.startswith("qzo-style-"):
        raise StyleError(f"{path} is a safetensors file, but not a style made by this program")
    if format not in FORMATS:
        raise StyleError(
            f"{path} has the format {format[:40]}, and this version reads {' and '.join(FORMATS)}: it was made by a "
            "newer one; update this program, or let the newer one write the model with `qzo export`"
        )
    if format == FORMAT and sealed.DIGEST not in metadata:
        raise StyleError(f"{path} is damaged: its checksum is gone")
    known = {"format", "form", "recipe", "base", sealed.DIGEST}
    try:
        recipe = remembered(_object(metadata["recipe"]), str(path))
        base, form = _object(metadata["base"]), metadata["form"]
    except (KeyError, ValueError, RecursionError, TypeError) as error:
        raise StyleError(f"{path} is damaged: its description cannot be read ({error})") from None
    if form not in ("theta", "journal"):
        raise StyleError(f"{path} is damaged: its form is {form[:40]!r}, neither theta nor journal")
    if form == "theta" and not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise StyleError(f"{path} is damaged: it holds numbers that are not finite, or not in fp32")
    return Style(form, tensors, recipe, base, {k: v for k, v in metadata.items() if k not in known})


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} stands where an object is expected")
    return value


def theta_of(style: Style, space: Space, code_hash: str, device: torch.device | str = "cpu") -> Tensor:
    """The style's theta for a base, whichever form it has, where the space has it for layers that compute on a device.
    Raises StyleError if it was made for another base."""
    device = space.home(device)
    if style.base.get("code_hash") != code_hash:
        raise StyleError(
            f"this style was made for {style.base.get('model', 'another model')} "
            f"(codes {str(style.base.get('code_hash'))[:12]}), but the base here has codes {code_hash[:12]}; "
            "load the model it was made for, in the same quantisation"
        )
    if style.form == "journal":
        method = make_method(space, style.recipe, device)
        try:
            for record in journal_records(style.tensors):
                method.apply(record)
        except ValueError as error:
            raise StyleError(f"the style's journal does not fit its recipe: {error}") from None
        if not method.theta.isfinite().all():
            raise StyleError("the style's journal is damaged: it leads to numbers that are not finite")
        return method.theta
    wrong = {n for n, shape in space.layout.shapes.items() if n not in style.tensors or style.tensors[n].shape != shape}
    if wrong or len(style.tensors) != len(space.layout.shapes):
        raise StyleError(f"the style does not fit the model's layers: {sorted(wrong)[:3] or 'unknown extra tensors'}")
    return torch.cat([style.tensors[name].flatten() for name in space.layout.shapes]).to(device, torch.float32)


def checked_strength(strength: float) -> float:
    """The strength if it is possible. Raises StyleError."""
    low, high = STRENGTHS
    if not low <= strength <= high:
        raise StyleError(f"strength {strength} is outside of {low:g} to {high:g}; 1 is the style as trained")
    return strength

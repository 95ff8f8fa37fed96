"""A run or a style examined from end to end: checksums, the base, the replay of its journal, its held-out loss.

Nothing is written. What is compared bit for bit is what the project promises bit for bit: theta out of the journal,
checkpoints and styles. Where directions are Gaussian, another device's log and cos may round otherwise, and theta may
differ by `rounding`. A held-out loss is measured again by a forward pass, whose sums depend on how many threads and
rows make them: it may differ by CLOSE of the loss, and by how much is said.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from zo_engine import sealed
from zo_engine.apply import open_style
from zo_engine.journal import Move, Record
from zo_engine.recipe import Recipe
from zo_engine.run import Run, RunError
from zo_engine.style import FORMAT, journal_records, load_style, theta_of
from zo_engine.train import Studio, changes, measured, pick_device, prepare, replayed, rows_of

CLOSE = 1e-3  # of the loss: what other sums of fp32 numbers may change
LARGEST = 6.77  # of a normal made of 32 bits: sqrt(2 log 2^33)
ULP = 2.0**-23  # of fp32, relative


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `sound` is None for what could not be looked at."""

    what: str
    sound: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    source: str
    kind: str  # run or style
    findings: list[Finding]

    @property
    def sound(self) -> bool:
        return all(finding.sound is not False for finding in self.findings)

    def facts(self) -> dict:
        return {
            "source": self.source,
            "kind": self.kind,
            "sound": self.sound,
            "findings": [*map(asdict, self.findings)],
        }

    def text(self) -> str:
        marks = {True: "ok", False: "WRONG", None: "-"}
        return "\n".join(f"{marks[f.sound]:6} {f.what:22} {f.detail}" for f in self.findings)


def verify(
    source: Path,
    cache: Path,
    *,
    model: str = "",
    device: str = "auto",
    rows: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Examine a run folder or a style file. `model`: the base, if it is not where the recipe says; `rows`: of one
    forward pass, in place of the recipe's. Raises ValueError (of some kind) only where there is nothing to examine."""
    source = Path(source)
    if source.is_dir():
        return Report(str(source), "run", list(_run(Run.open(source), cache, model, device, rows, say)))
    return Report(str(source), "style", list(_style(source, cache, model, device)))


def _style(source: Path, cache: Path, model: str, device: str) -> Iterator[Finding]:
    yield _checksum(source)
    try:
        styled = open_style(source, cache, model, device)
    except ValueError as error:
        yield Finding("base and replay", False, str(error))
        return
    form = styled.style.form
    yield Finding("base", True, f"codes {styled.style.base['code_hash'][:12]}, as the style says")
    how = "its journal replays" if form == "journal" else "every layer is there"
    yield Finding("theta", True, f"{how}: {styled.theta.numel():,} finite numbers")
    other = source.with_name({"theta": "style-journal.safetensors", "journal": "style.safetensors"}[form])
    if other.is_file() and other != source:
        pair = (styled.style, load_style(other))
        twin = theta_of(pair[1], styled.space, styled.style.base["code_hash"], pick_device(device))
        most = max(rounding(journal_records(s.tensors), s.recipe) for s in pair if s.form == "journal")
        yield _same(f"theta of {other.name}", styled.theta, twin, most)
    yield Finding("held-out loss", None, "not measured: a style brings no pictures or texts; verify its run")


def _run(run: Run, cache: Path, model: str, device: str, rows: int, say: Callable[[str], None]) -> Iterator[Finding]:
    try:
        journal = run.journal()
        yield Finding("journal", True, f"{len(journal)} lines, every checksum fits")
        evaluations = run.evaluations()
        yield Finding("evaluations", True, f"{len(evaluations)} lines, every checksum fits")
        base = run.base()
    except RunError as error:
        yield Finding("journal", False, str(error))
        return
    files = (run.last_file, run.best_file, run.style_file, run.journal_style_file)
    checked = [(file, _checksum(file)) for file in files if file.exists()]
    yield from (finding for _, finding in checked)
    whole = {file for file, finding in checked if finding.sound}
    try:
        studio = _studio(run, cache, model, device, rows, say)
    except ValueError as error:
        yield Finding("model and data", False, str(error))
        return
    codes = studio.code_hash
    yield Finding(
        "base", base.get("code_hash") == codes, f"codes {codes[:12]}, the run's are {str(base.get('code_hash'))[:12]}"
    )
    if base.get("code_hash") != codes:
        return
    if lost := changes(base.get("weights", studio.weights), studio.weights):
        yield Finding("weights", None, f"not as in the run: {lost}")
    changed = changes(base.get("data", {}), studio.data) if "data" in base else ""
    yield Finding("data", None if changed else True, f"not as in the run: {changed}" if changed else "as in the run")
    try:
        steps = {facts["step"] for facts in evaluations}
        thetas = dict(_replay(studio, journal, steps))
    except ValueError as error:
        yield Finding("replay", False, str(error))
        return
    yield Finding("replay", True, f"{len(journal)} steps; theta has {thetas[len(journal)].numel():,} numbers")
    most = rounding(journal, studio.recipe)
    for file in (run.last_file, run.best_file):
        if file in whole:
            tensors, metadata = sealed.read(file)
            step = int(float(metadata["step"]))
            if step in thetas:
                yield _same(f"{file.name}, step {step}", thetas[step], tensors["theta"], most)
            else:
                yield Finding(f"{file.name}, step {step}", None, "not compared: the journal has no such evaluation")
    for file in (run.style_file, run.journal_style_file):
        if file in whole:
            style = load_style(file)
            step = int(style.facts["step"])
            if step in thetas:
                held = theta_of(style, studio.space, codes, studio.model.device)
                yield _same(f"{file.name}, step {step}", thetas[step], held, most)
    if changed:
        yield Finding("held-out loss", None, "not measured: the data has changed since the run")
    else:
        yield from _losses(studio, evaluations, thetas)


def _studio(run: Run, cache: Path, model: str, device: str, rows: int, say: Callable[[str], None]) -> Studio:
    """What the run was trained with."""
    recipe = run.recipe()
    changes = {"model": model or recipe.model, "device": device, "rows": rows or recipe.rows}
    studio = prepare(replace(recipe, **changes), cache, say)
    return replace(studio, recipe=replace(studio.recipe, rows=changes["rows"]))  # not those that `memory` asks for


def _replay(studio: Studio, journal: list, steps: set[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """(step, theta) at the end and at the given steps, from the journal alone."""
    method = replayed(studio, [])
    for record in (*journal, None):
        if method.step in steps or record is None:
            yield method.step, method.theta.clone()
        if record is not None:
            method.apply(record)


def rounding(journal: list[Record], recipe: Recipe) -> float:
    """How far an element of theta may be from where it was on another device. Nothing with signs for directions. With
    Gaussian ones a term w z of a step's K is off by an ULP of itself where z was rounded otherwise, and every product
    and sum that it goes through, K + 2 in its step and one in each of the T steps, by half of one:

        |theta - theta'| <= LARGEST ULP sum_t (K_t + 4 + T) sum_k |w_tk|

    Infinite for momentum and adam, whose averages and quotients pass a difference on.
    """
    if recipe.noise == "rademacher":
        return 0.0
    if recipe.optimizer not in ("gauss-newton", "sgd"):
        return math.inf
    total = 0.0
    for record in (r for r in journal if not r.skipped):
        if isinstance(record, Move):
            weights = record.weights
        else:
            weights = [min(abs(d), record.clip) * record.step_size / len(record.slopes) for d in record.slopes]
        total += (len(weights) + 4 + len(journal)) * sum(map(abs, weights))
    return LARGEST * ULP * total


def _losses(studio: Studio, evaluations: list[dict], thetas: dict[int, torch.Tensor]) -> Iterator[Finding]:
    """The first, the best and the last held-out loss, measured again."""
    known = [facts for facts in evaluations if facts["loss"] is not None and facts["step"] in thetas]
    if not known:
        yield Finding("held-out loss", None, "none was measured yet")
        return
    best = min(known, key=lambda facts: facts["loss"])
    for step, facts in sorted({facts["step"]: facts for facts in (known[0], best, known[-1])}.items()):
        items, _ = measured(studio, thetas[step], rows_of(studio))
        off = float(np.abs(np.subtract(items, facts["items"])).max()) if len(items) == len(facts["items"]) else np.inf
        says = "equal, item by item" if off == 0 else f"{off:.2g} apart at most, item by item"
        sound = off <= CLOSE * max(abs(facts["loss"]), 1e-12)
        yield Finding(
            f"held-out loss, step {step}", sound, f"{facts['loss']:.6g} written, {np.mean(items):.6g} measured: {says}"
        )


def _checksum(file: Path) -> Finding:
    try:
        _, metadata = sealed.read(file, unsealed=True)
    except (OSError, sealed.DamageError) as error:
        return Finding(file.name, False, str(error))
    if sealed.DIGEST not in metadata:
        old = metadata.get("format", FORMAT) != FORMAT
        return Finding(
            file.name, None if old else False, "has no checksum" + (": it is older than they are" if old else "")
        )
    return Finding(file.name, True, f"sha256 {metadata[sealed.DIGEST][:16]}")


def _same(what: str, theta: torch.Tensor, other: torch.Tensor, most: float = 0.0) -> Finding:
    """Two thetas, which may be so far apart."""
    other = other.to(theta.device)
    if theta.shape != other.shape:
        return Finding(what, False, f"has {other.numel():,} numbers, the replay {theta.numel():,}")
    differ = int((theta != other).sum())
    if not differ:
        return Finding(what, True, "equals the replay, bit for bit")
    apart = float((theta - other).abs().max())
    if apart > most or not most:
        return Finding(what, False, f"{differ:,} numbers differ")
    promised = "no bound is known for its optimizer" if math.isinf(most) else f"Gaussian directions may: {most:.2g}"
    return Finding(what, None if math.isinf(most) else True, f"{apart:.2g} apart at most; {promised}")

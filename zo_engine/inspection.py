"""What a file or folder is: a run, a style, a recipe or a model, as facts for people and scripts."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo_engine import recipe as recipes
from zo_engine import texts
from zo_engine.hub import ModelError, check, is_language, language_config, read_json
from zo_engine.run import Run


class InspectionError(ValueError):
    """Something that is none of the known things."""


def inspect(source: Path) -> dict[str, Any]:
    """Facts about `source`, "kind" first. Raises ValueError (of some kind) for what cannot be read."""
    source = Path(source)
    if source.suffix == ".safetensors":
        return inspect_style(source)
    if source.suffix == ".toml":
        return {"kind": "recipe"} | recipes.load(source).public()
    if (source / "recipe.toml").is_file():
        return inspect_run(Run.open(source))
    if (source / "model_index.json").is_file():
        return inspect_model(source)
    if is_language(source):
        return inspect_language_model(source)
    raise InspectionError(
        f"{source} is none of: a run folder (recipe.toml), a style (.safetensors), a recipe (.toml), "
        "a model folder of diffusers (model_index.json) or of a language model (config.json)"
    )


BAD, EXAMPLES = 200, 8  # rows that are listed at most


def read_texts(recipe: recipes.Recipe) -> Iterator[dict[str, Any]]:
    """What a recipe's texts are, and how its model will read them; the facts that are quick to have come first.

    {"columns"}, then {"form", "mapping", "rows", "examples", "choices", "bad", "problems"}, then {"limit", "lengths",
    "cut", "notes", "bad", "problems", "shown"}: `problems` are [line, reason], `shown` some examples as [text, whether
    it is learnt]. Raises DataError where the texts cannot be used at all, ModelError where there is no tokenizer.
    """
    yield {"columns": texts.columns(recipe.texts)}
    found = texts.scan(recipe.texts, recipe.text_fields)
    listed = lambda problems: [[p.line, p.message] for p in problems[:BAD]]  # noqa: E731
    yield {
        "form": found.mapping.form,
        "mapping": found.mapping.columns,
        "rows": len(found.examples) + len(found.problems),
        "examples": len(found.examples),
        "choices": sum(bool(example.choices) for example in found.examples),
        "bad": len(found.problems),
        "problems": listed(found.problems),
    }
    if not found.examples:
        raise texts.DataError(f"no row of {recipe.texts} can be used: line {found.problems[0].line} "
                              f"{found.problems[0].message}")  # fmt: skip

    from zo_engine import tokens
    from zo_engine.hub import locate

    folder = locate(recipe.model, download=False)
    if not is_language(folder):
        raise InspectionError(f"{recipe.model} draws pictures and learns no texts; choose a language model")
    tokenizer, limit = tokens.load_tokenizer(folder), tokens.limit(folder, recipe.length)
    read = tokens.render(tokenizer, found.examples, limit, recipe.completions_only, skip=True)
    yield {
        "limit": limit,
        "lengths": asdict(tokens.lengths(read.examples)),
        "cut": sum(bool(example.cut) for example in read.examples),
        "notes": read.notes,
        "bad": len(read.problems),
        "problems": listed(read.problems),
        "shown": [tokens.shown(tokenizer, example) for example in read.examples[:EXAMPLES]],
    }


def inspect_style(source: Path) -> dict[str, Any]:
    from zo_engine.style import load_style

    style = load_style(source)
    return {
        "kind": "style",
        "form": style.form,
        "bytes": source.stat().st_size,
        "model": style.base.get("model"),
        "code_hash": style.base.get("code_hash"),
        "space": style.recipe.space,
        "numbers": sum(t.numel() for t in style.tensors.values()),
        **style.facts,
    }


def inspect_run(run: Run) -> dict[str, Any]:
    status, journal, evaluations = run.status(), run.journal(), run.evaluations()
    recipe = run.recipe()
    facts = {
        "kind": "run",
        "state": status.get("state"),
        "step": len(journal),
        "steps": recipe.steps,
        "model": recipe.model,
        **({"task": recipe.task} if recipe.task else {}),
        **({"texts": recipe.texts} if recipe.texts else {}),
        **({} if recipe.texts or recipe.task else {"images": recipe.images, "trigger": recipe.trigger}),
        "skipped": sum(r.skipped for r in journal),
        "journal_bytes": run.journal_file.stat().st_size if journal else 0,
        "style": str(run.style_file) if run.style_file.exists() else None,
        **{f"base_{k}": v for k, v in run.base().items() if k != "data"},
    }
    losses = [(e["loss"], e["step"]) for e in evaluations if e["loss"] is not None]
    if losses:
        best = min(losses)
        for figure in ("accuracy", "reward"):
            if found := {e["step"]: e[figure] for e in evaluations if figure in e}:
                facts |= {f"{figure}_at_start": found[losses[0][1]], figure: found[best[1]]}
        facts |= {"held_out_at_start": losses[0][0], "best_held_out": best[0], "best_step": best[1]}
    return facts


def inspect_language_model(source: Path) -> dict[str, Any]:
    config = language_config(source)
    quantization = config.get("quantization_config") or {}
    return {
        "kind": "model",
        "class": config["architectures"][0],
        "blocks": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "quantization": _quantization(quantization),
        "bytes": sum(f.stat().st_size for f in source.rglob("*") if f.is_file()),
        "problem": _problem(source),
    }


def _quantization(settings: dict[str, Any]) -> str:
    """What a recipe's `quantization` must be for a folder with these settings, or may be for one without."""
    if settings.get("load_in_8bit"):
        return "int8"
    method = settings.get("quant_method", "bitsandbytes") if settings else "none"
    return settings.get("bnb_4bit_quant_type", "fp4") if method == "bitsandbytes" else method


def _problem(source: Path) -> str | None:
    try:
        check(source)
    except ModelError as error:
        return str(error)
    return None


def inspect_model(source: Path) -> dict[str, Any]:
    index = read_json(source / "model_index.json")
    config = read_json(source / "transformer" / "config.json")
    return {
        "kind": "model",
        "pipeline": index.get("_class_name"),
        "transformer": config.get("_class_name"),
        "blocks": config.get("num_layers"),
        "width": (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0),
        "quantization": (config.get("quantization_config") or {}).get("bnb_4bit_quant_type", "none"),
        "bytes": sum(f.stat().st_size for f in source.rglob("*") if f.is_file()),
        "problem": _problem(source),
    }

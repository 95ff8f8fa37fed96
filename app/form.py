"""Form fields made from the recipe's fields: label, help text and limits are read there, and bound by name."""

import dataclasses
import math
from typing import Any

import gradio as gr

from zo_engine.recipe import Recipe

FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


def label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def help_of(name: str) -> str:
    text = FIELDS[name].metadata["help"]
    return text[:1].upper() + text[1:]


def component(name: str, **looks: Any) -> gr.components.Component:
    """The form field of a setting, closed until it is filled: what is typed before would be lost."""
    field = FIELDS[name]
    meta, default, help = field.metadata, field.default, help_of(name)
    looks = {"label": label(name), "info": help, "interactive": False} | looks
    if meta["choices"]:
        return gr.Dropdown(list(meta["choices"]), value=default, **looks)
    if field.type is bool:
        return gr.Checkbox(value=default, **looks)
    if field.type in (int, float):
        low, high = (None if math.isinf(x) else x for x in (meta["low"], meta["high"]))
        looks["info"] += f" ({reach(low, high)})" if low is not None else ""
        return gr.Number(value=default, precision=0 if field.type is int else None, **looks)
    if field.type == tuple[str, ...]:
        return gr.Textbox(value="", **{"lines": 4} | looks | {"info": f"{help}. One a line."})
    return gr.Textbox(value=default, **looks)


def reach(low: float | None, high: float | None) -> str:
    return f"from {low:g}" if high is None or high > 1e15 else f"{low:g} to {high:g}"


def shown(name: str, value: Any) -> Any:
    """A setting as its form field shows it."""
    return "\n".join(value) if FIELDS[name].type == tuple[str, ...] else value


def given(name: str, value: Any) -> Any:
    """What a form field holds, as a setting; what it cannot be is left for the recipe to name."""
    kind = FIELDS[name].type
    if kind == tuple[str, ...]:
        return tuple(line.strip() for line in (value or "").splitlines() if line.strip())
    if kind is str:
        return (value or "").strip()
    if value is None:
        return FIELDS[name].default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value

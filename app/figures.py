"""What the page draws itself: cards, charts and picture grids, as HTML and SVG from plain values.

Every name, caption and message is escaped here, where HTML is made. Text in charts is HTML over the SVG, so that it
keeps its size on a phone.
"""

import functools
import json
import math
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app import media
from app.drafts import EXAMPLES, TEXTS, Contents, Draft, title
from app.jobs import Standing
from app.reading import Reading
from app.series import Curve, Series
from zo_engine import dataset
from zo_engine import texts as reader
from zo_engine.dataset import fill_trigger
from zo_engine.run import Run

WORDS = {
    "waiting": "waiting", "preparing": "getting ready", "running": "training", "silent": "not answering",
    "stopping": "saving", "done": "done", "stopped": "stopped", "failed": "failed", "interrupted": "interrupted",
}  # fmt: skip
FIRST_STEPS = 3  # during which it is news that the first one worked
FEW = 4  # steps that a chart has room for at least
MARKED = 60  # points of a curve, up to which each is marked and says its value
SHOWN_PROMPTS, SHOTS = 8, 4  # prompts before the fold; steps of each: the first, the last, and between


def header(machine: str) -> str:
    return f"""
<header class="qzo-head">
  <svg viewBox="0 0 40 40" aria-hidden="true"><rect width="40" height="40" rx="11"/>
    <path d="M10 27V17M16.7 27V11M23.3 27V20M30 27V14"/></svg>
  <div><h1>QZO Studio</h1><p>Teach an image or language model your style, in the memory it takes to run it</p></div>
  <span class="qzo-machine">{escape(machine)}</span>
</header>"""


@functools.cache
def examples() -> str:
    """The bundled sets as buttons, with six small pictures or an exchange of words each."""
    cards = []
    for name, folder in EXAMPLES.items():
        pictures = sorted((folder / "images").glob("*.jpg"))
        strip = "".join(
            f'<img loading="lazy" src="{media.url("example", name, f"{p.stem}.webp")}" alt="">' for p in pictures[:6]
        )
        cards.append(
            f'<button type="button" class="qzo-example" data-example="{escape(name)}">'
            f'<span class="strip">{strip}</span><span class="what"><b>{escape(title(name))}</b>'
            f'<span>{len(pictures)} pictures, captioned</span></span><span class="go">Use this set</span></button>'
        )
    for name, file in TEXTS.items():
        found = reader.read(file)
        asked, answer = found.examples[0].messages[-2:]
        cards.append(
            f'<button type="button" class="qzo-example words" data-example="{escape(name)}">'
            f'<span class="said"><i>{escape(asked.content)}</i><b>{escape(answer.content)}</b></span>'
            f'<span class="what"><b>{escape(title(name))}</b><span>{len(found.examples)} texts</span></span>'
            f'<span class="go">Use this set</span></button>'
        )
    return f'<div class="qzo-examples">{"".join(cards)}</div>'


# Pictures and captions


def pictures(draft: Draft, contents: Contents, only: str = "all") -> str:
    """The pictures with their captions to edit; a text field knows its picture by name."""
    trigger = draft.recipe().trigger
    own = Path(draft.recipe().images) == draft.own_images
    cards = []
    for name, picture in contents.pictures.items():
        if only == "bare" and picture.caption:
            continue
        left, top, right, bottom = (f"{100 * share:.2f}%" for share in draft.crop(picture))
        cut = any(share > 0 for share in draft.crop(picture))
        frame = f'<i class="crop" style="inset:{top} {right} {bottom} {left}"></i>' if cut else ""
        key = escape(name, quote=True)
        note = caption_note(picture.caption, trigger)
        often = f", {picture.repeats} times" if picture.repeats > 1 else ""
        take_out = (
            f'<button type="button" class="remove" data-remove="{key}" aria-label="Take {key} out">&times;</button>'
            if own
            else ""
        )
        cards.append(
            f'<figure><div class="frame"><span class="fit"><img loading="lazy" '
            f'src="{media.url("draft", draft.name, contents.thumbs[name])}" alt="{escape(picture.caption or name)}">'
            f"{frame}</span>{take_out}</div><figcaption><b title='{key}'>{escape(name)}{often}</b>"
            f'<textarea rows="2" data-name="{key}" aria-label="Caption of {key}" maxlength="2000" '
            f'placeholder="What is in the picture">{escape(picture.caption)}</textarea>'
            f'<small class="{note["kind"]}">{escape(note["text"])}</small></figcaption></figure>'
        )
    if not cards:
        return '<p class="qzo-empty">Every picture has a caption.</p>' if contents.pictures else ""
    return f'<div class="qzo-pictures" data-draft="{escape(draft.name)}">{"".join(cards)}</div>'


def caption_note(caption: str, trigger: str) -> dict[str, str]:
    """What stands below a caption: the text that the model will be shown."""
    if caption:
        return {"text": f"trained as: {fill_trigger(caption, trigger)}", "kind": "whole"}
    return {"text": f"no caption: trained as {trigger!r} alone" if trigger else "no caption", "kind": "bare"}


def notes(items: list[tuple[str, str]]) -> str:
    """(good, flat or bad; sentence) as a list."""
    lines = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in items)
    return f'<div role="status"><ul class="qzo-notes">{lines}</ul></div>' if lines else ""


# Texts


def texts(draft: Draft, found: Reading, kind: str) -> str:
    """What a draft's texts are, and how long."""
    known, settings = found.facts, draft.recipe()
    name = Path(settings.texts).name if Path(settings.texts).is_absolute() else settings.texts
    rows = []
    if kind:
        rows.append(("form", kind))
    if columns := known.get("mapping"):
        rows.append(("columns", ", ".join(f"{field} from “{column}”" for field, column in columns.items())))
    if "rows" in known:
        held = dataset.held_out(found.usable, settings.holdout)
        rows.append(("examples", f"{found.usable:,} of {known['rows']:,} rows; {held:,} kept out to measure with"))
        if known["choices"]:
            rows.append(("choices", "known: how often the right answer is the likeliest is measured as well"))
    if lengths := known.get("lengths"):
        half = f"half of them at most {lengths['median']:,}, 95 % at most {lengths['most']:,}"
        rows.append(("length", f"{lengths['shortest']:,} to {lengths['longest']:,} tokens; {half}"))
        rows.append(("learnt", f"{lengths['learnt']:,} of {lengths['total']:,} tokens"))
        most = f"at {known['limit']:,} tokens" + ("" if known["limit"] == settings.length else ", what the model reads")
        rows.append(("cut", f"{known['cut']:,} texts, {most}" if known["cut"] else f"none, {most}"))
    said = [("bad", found.complaint)] if found.complaint else []
    said += [("flat", note) for note in known.get("notes", ())]
    busy = ""
    if found.busy:
        what = "The tokenizer is being asked" if "rows" in known else "The texts are being read"
        busy = f'<p class="qzo-empty busy" role="status">{what}</p>'
    return facts(name, rows) + notes(said) + busy


def rendered(found: Reading) -> str:
    """The first examples as the model reads them: what is learnt stands out."""
    if not (shown := found.facts.get("shown")):
        return ""
    first, *rest = (f'<p class="qzo-tokens">{_runs(runs)}</p>' for runs in shown)
    more = f'<details class="qzo-more"><summary>{len(rest)} more</summary>{"".join(rest)}</details>' if rest else ""
    legend = '<p><mark>learnt</mark> and <span class="read">read, but not learnt</span></p>'
    return f'<section class="qzo-card"><h3>As the model reads it</h3>{legend}{first}{more}</section>'


def _runs(runs: list[list]) -> str:
    return "".join(
        f"<mark>{escape(text)}</mark>" if learnt else f'<span class="read">{escape(text)}</span>'
        for text, learnt in runs
    )


def bad_rows(problems: list[list], total: int) -> str:
    """Rows that cannot be used, by line."""
    if not problems:
        return ""
    lines = "".join(f"<tr><td>{line:,}</td><td>{escape(why)}</td></tr>" for line, why in problems)
    more = f"<p>and {total - len(problems):,} more</p>" if total > len(problems) else ""
    which = "1 row cannot be used" if total == 1 else f"{total:,} rows cannot be used"
    return (
        f'<section class="qzo-card qzo-bad"><h3>{which}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{which}"><table><thead><tr><th scope="col">line</th><th scope="col">why</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{more}</section>"
    )


def answers(run: Run, step: int | None = None) -> str:
    """The preview prompts with what the base answered, and what was answered at a step, or last."""
    known = {int(f.stem): f for f in run.previews.glob("*.json") if f.stem.isdigit()} if run.previews.is_dir() else {}
    if 0 not in known:
        return '<p class="qzo-empty">The first answers show what the model says before it learns anything.</p>'
    step = step if step in known else max(known)
    first, now = (json.loads(known[s].read_text(encoding="utf-8"))["answers"] for s in (0, step))
    rows = ""
    for before, after in zip(first, now, strict=False):
        then = f'<td data-at="step {step:,}">{_said(after["answer"])}</td>' if step else ""
        rows += (
            f'<tr><th scope="row">{escape(before["prompt"])}</th><td data-at="before">{_said(before["answer"])}</td>'
        )
        rows += f"{then}</tr>"
    head = '<th scope="col">prompt</th><th scope="col">before</th>'
    head += f'<th scope="col">step {step:,}</th>' if step else ""
    return f'<table class="qzo-answers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _said(text: str) -> str:
    return escape(text.strip()) or "<em>nothing</em>"


def chat(turns: list[dict[str, Any]], state: str = "", trouble: str = "") -> str:
    """Base and style side by side; `state` is what a question without an answer waits for."""
    if not turns:
        return (
            '<p class="qzo-empty">Both hear the same words. What the base answers stands on the left, what the style '
            "answers on the right.</p>"
        )
    parts = []
    for turn in turns:
        sides = ""
        for side, name in (("before", "base"), ("after", f"style at strength {turn['strength']:g}")):
            if side in turn:
                sides += f'<div class="{side}"><b>{name}</b><p>{_said(turn[side])}</p></div>'
            elif "error" not in turn and not trouble:
                sides += f'<div class="{side}"><b>{name}</b><p class="qzo-empty busy">{escape(state)}</p></div>'
        wrong = notes([("bad", f"This cannot be asked: it {turn['error']}.")]) if "error" in turn else ""
        said = f'<p class="you">{escape(turn["prompt"])}</p><div class="sides">{sides}</div>{wrong}'
        parts.append(f'<div class="turn">{said}</div>')
    said = notes([("bad", trouble)]) if trouble else ""
    return f'<div class="qzo-chat" role="log" aria-label="Conversation" tabindex="0">{"".join(parts)}</div>{said}'


# A run


def card(standing: Standing, run: Run, steps: int, unit: str = "pictures", accuracy: float | None = None) -> str:
    """State, progress and the figures of the moment; `unit` is what the run learns from."""
    status = standing.status
    done = int(status.get("step", 0))
    steps = int(status.get("steps", steps) or 1)
    part = status.get("part", 0.0) if standing.live else 0.0
    share = 100 * (done + part) / steps
    within = f", {100 * part:.0f} % of the next one" if part else ""
    facts = []
    if standing.state == "running" and "remaining" in status:
        facts.append(("time left", duration(status["remaining"])))
        facts.append(("a step takes", duration(status["seconds_per_step"], fine=True)))
    if standing.state == "running" and "memory" in status:  # known from the first whole step on
        facts.append(("memory", f"{status['memory'] / 1e9:.1f} GB"))
    if status.get("held_out") is not None:
        facts.append(("held-out loss", f"{status['held_out']:.4f}"))
    if accuracy is not None:
        facts.append(("held-out accuracy", f"{100 * accuracy:.0f} %"))
    if status.get("best_held_out") is not None:
        facts.append(("best", f"{status['best_held_out']:.4f} at step {status['best_step']}"))
    if status.get("skipped"):
        facts.append(("skipped steps", f"{status['skipped']}"))
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    says = standing.message
    if standing.state == "running" and not says:
        says = now(status, unit)
    if standing.state == "done" and done < steps and status.get("flat"):
        says = f"Ended before all {steps:,} steps, as the recipe allows: {status['flat']}."
    message = f'<p class="message">{escape(says)}</p>' if says else ""
    return f"""
<section class="qzo-card qzo-run" aria-label="Run {escape(standing.name)}">
  <div class="line"><h3>{escape(title(standing.name))}</h3>{pill(standing.state)}</div>
  <div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="{steps}" aria-valuenow="{done}"
       aria-label="Steps done"><i style="width:{share:.2f}%"></i></div>
  <div class="line count"><span>step <b>{done:,}</b> of {steps:,}{within}</span><span>{share:.0f} %</span></div>
  {message}<dl>{rows}</dl>
</section>"""


def now(status: dict[str, Any], unit: str) -> str:
    """What a run that trains is at, while that is news."""
    looks = "drawing the {} pictures" if unit == "pictures" else "asking the {} prompts"
    if status["step"] == status["steps"]:
        return f"{looks.format('last').capitalize()}, and saving the style."
    if "remaining" not in status:
        return "Taking up the run." if status["step"] else f"Measuring the start, and {looks.format('first')}."
    if not status["step"]:
        return "The first step is under way; it shows how long the rest will take."
    if "one_step" in status and status["step"] <= FIRST_STEPS:
        return f"The first step works, and took {duration(status['one_step'], fine=True)}."
    return ""


def pill(state: str) -> str:
    return f'<span class="qzo-pill {state}">{WORDS[state]}</span>'


def charts(series: Series, pictured: list[int], unit: str = "pictures") -> str:
    """Held-out loss with its verdict, the training loss, and the accuracy where examples have choices; a mark for every
    step in `pictured`."""
    kind, verdict = series.verdict()
    held, (raw, smooth), best = series.held_out(), series.training(), series.best()
    mark = (best["step"], best["loss"]) if best and best["step"] else None
    start = held.y[0] if held.y else None
    first = chart("Held-out loss", [("line", held)], mark=mark, level=start, pictured=pictured, note=verdict, kind=kind)
    others = "other pictures at other noise levels" if unit == "pictures" else "other texts"
    second = chart("Training loss", [("raw", raw), ("line", smooth)], pictured=pictured,
                   note=f"Noisy by nature: every step sees {others}.")  # fmt: skip
    right, third = series.accuracy(), ""
    if right.x:
        third = chart("Accuracy", [("line", right)], level=right.y[0], pictured=pictured, unit=" %",
                      note="How often the right choice is the likeliest, on held-out texts.")  # fmt: skip
    return f'<div class="qzo-charts{" three" if third else ""}">{first}{third}{second}</div>'


def method(series: Series, unit: str = "pictures") -> str:
    """What every step did: its gain and its size; of methods that go by slopes, those."""
    slopes, clip = series.slopes()
    if slopes.x:
        parts = [
            chart("Slope of the loss", [("line", slopes), ("level", clip)],
                  note="Along the random directions of a step, on average; dashed: the clip that bounds it."),
            chart("Step size", [("line", series.step_sizes())],
                  note="How far a slope of one moves a scale. 0: the step was left out."),
        ]  # fmt: skip
    else:
        parts = [
            chart("Gain of a step", [("line", series.gains())], unit=" %",
                  note=f"By how much it lowers the loss of {unit} that it was not made from. 0: nothing that was tried "
                  "surely helped, and the model stayed. Below 0: what helped others before did not help these."),
            chart("Size of a step", [("line", series.sizes())], unit=" %",
                  note="How far it moves a typical scale of the model. Steps get smaller as there is less to gain."),
        ]  # fmt: skip
    return f'<div class="qzo-charts">{"".join(parts)}</div>'


def chart(
    name: str,
    curves: list[tuple[str, Curve]],
    *,
    mark: tuple[float, float] | None = None,
    level: float | None = None,
    pictured: list[int] = (),
    unit: str = "",
    note: str = "",
    kind: str = "",
) -> str:
    """One chart: `mark` is a point that stands out, `level` a dashed height, `pictured` are steps with pictures,
    `note` is the sentence below it, good, flat or bad."""
    note = f'<p class="qzo-verdict {kind}">{escape(note)}</p>'
    value = lambda y: f"{y:.1f}{unit}" if unit else f"{y:.4f}"  # noqa: E731
    xs = [x for _, c in curves for x in c.x]
    ys = [y for _, c in curves for y in (*c.y, *c.low, *c.high) if math.isfinite(y)]
    main = next(c for look, c in curves if look == "line")
    last = main.y[-1] if main.y else None
    head = f'<div class="line"><h3>{escape(name)}</h3><b>{"" if last is None else value(last)}</b></div>'
    if not ys:
        empty = '<div class="plot"><p class="qzo-empty">The first figures come with the first steps.</p></div>'
        return f'<section class="qzo-card qzo-chart">{head}{empty}</section>'
    first, final = min(xs), max(xs)
    reach = max(final, first + FEW) - first
    left, right = first - 0.03 * reach, first + 1.03 * reach  # no point lies on an edge
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.08 or abs(high) * 0.01 or 1
    low, high = low - pad, high + pad
    across = lambda x: 1000 * (x - left) / (right - left)  # noqa: E731
    down = lambda y: 300 * (high - y) / (high - low)  # noqa: E731
    path = lambda points: "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)  # noqa: E731
    body, marked = "", len(curves[0][1].x) <= MARKED
    for look, c in curves:
        if c.low and len(c.x) > 1:
            edge = [*zip(c.x, c.high, strict=True), *reversed(list(zip(c.x, c.low, strict=True)))]
            body += f'<path class="band" d="{path(edge)}Z"/>'
        if not (marked and look == "raw"):
            body += f'<path class="{look}" d="{path(list(zip(c.x, c.y, strict=True)))}"/>'
    if level is not None:
        body += f'<path class="level" d="M0 {down(level):.1f}H1000"/>'
    dots = ""
    if marked:
        look, c = curves[0]
        dots += "".join(
            f'<i class="point {look}" style="left:{across(x) / 10:.2f}%;top:{down(y) / 3:.2f}%" '
            f'title="step {x:.0f}: {value(y)}"></i>'
            for x, y in zip(c.x, c.y, strict=True)
            if math.isfinite(y)
        )
    if mark:
        dots += (
            f'<i class="dot" style="left:{across(mark[0]) / 10:.2f}%;top:{down(mark[1]) / 3:.2f}%" '
            f'title="best: {value(mark[1])} at step {mark[0]}"></i>'
        )
    dots += "".join(
        f'<i class="shot" style="left:{across(step) / 10:.2f}%" title="pictures of step {step}"></i>'
        for step in pictured
        if left <= step <= right
    )
    grid = "".join(f'<path class="grid" d="M0 {y}H1000"/>' for y in (0, 150, 300))
    heights = (high, (low + high) / 2, low)
    ticks = "".join(f"<span>{y:.1f}{unit}</span>" if unit else f"<span>{y:.3f}</span>" for y in heights)
    says = f"{name}: {value(main.y[0])} at step {first:.0f}, {value(last)} at step {final:.0f}"
    return f"""
<section class="qzo-card qzo-chart">{head}
  <div class="plot"><div class="ticks" aria-hidden="true">{ticks}</div>
    <div class="area" data-left="{left:g}" data-right="{right:g}">
    <svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{escape(says)}">{grid}{body}</svg>
    {dots}</div></div>
  <div class="line steps" aria-hidden="true"><span>step {first:.0f}</span><span>step {first + reach:.0f}</span></div>
  {note}
</section>"""


def previews(run: Run, name: str, prompts: list[str], step: int | None = None, coming: int | None = None) -> str:
    """Every prompt with its pictures by step, the untrained model first; with `step`, that one beside it alone.

    `coming` is the step that will be drawn next, for which a place is kept while there is nothing to compare."""
    folders = sorted(f for f in run.previews.glob("*/") if f.name.isdigit()) if run.previews.is_dir() else []
    if not folders:
        return '<p class="qzo-empty">The first previews show what the model draws before it learns anything.</p>'
    last = len(folders) - 1
    kept = [folders[i] for i in sorted({round(last * k / (SHOTS - 1)) for k in range(SHOTS)})]
    if step is not None:
        kept = [folders[0], *(f for f in folders[1:] if int(f.name) == step)]
    counts = max(len(list(f.glob("*.png"))) for f in kept)
    cards, pair = [], " pair" if step is not None else ""
    for i in range(counts):
        prompt = prompts[i] if i < len(prompts) else f"prompt {i + 1}"
        shots = []
        for folder in kept:
            file = folder / f"{i:02d}.png"
            if file.exists():
                at = "before" if int(folder.name) == 0 else f"step {int(folder.name):,}"
                place = media.url("run", name, f"previews/{folder.name}/{file.name}")
                shots.append(
                    f'<span class="shot"><img loading="lazy" src="{place}" alt="{escape(prompt)}, {at}">'
                    f"<em>{at}</em></span>"
                )
        if len(kept) == 1 and coming:
            shots.append(f'<span class="shot coming"><i></i><em>step {coming:,}</em></span>')
        cards.append(
            f'<figure><figcaption>{escape(prompt)}</figcaption><div class="shots{pair}" '
            f'style="--shots:{max(2, len(shots))}">{"".join(shots)}</div></figure>'
        )
    grid = f'<div class="qzo-previews">{"".join(cards[:SHOWN_PROMPTS])}</div>'
    if len(cards) > SHOWN_PROMPTS:
        rest = "".join(cards[SHOWN_PROMPTS:])
        grid += f"<details class='qzo-more'><summary>{len(cards) - SHOWN_PROMPTS} more prompts</summary>"
        grid += f'<div class="qzo-previews">{rest}</div></details>'
    return grid


def runs(rows: list[tuple[Standing, Run, str, str]], current: str) -> str:
    """The history: (standing, run, what it was trained on, size on disk)."""
    if not rows:
        return '<p class="qzo-empty">No runs yet. The first one takes five clicks: load an example and press Train.</p>'
    cards = []
    for standing, run, what, size in rows:
        sheets = sorted(run.previews.glob("*/00.png"))
        letters = '<span class="none" aria-hidden="true">Aa</span>'  # of a run that answers
        picture = letters if (run.previews / "000000.json").exists() else '<span class="none"></span>'
        if sheets:
            place = media.url("run", standing.name, sheets[-1].relative_to(run.path).as_posix())
            picture = f'<img loading="lazy" alt="" src="{place}">'
        status = standing.status
        step = f"step {status['step']:,} of {status['steps']:,}" if "steps" in status else "not begun yet"
        here = ' aria-current="true"' if standing.name == current else ""
        cards.append(
            f'<a class="qzo-card qzo-past" href="?run={escape(standing.name)}"{here}>{picture}<span class="text">'
            f"<b>{escape(title(standing.name))}</b><small>{escape(what)}</small>"
            f"<small>{step} &middot; {size}</small></span>{pill(standing.state)}</a>"
        )
    return f'<div class="qzo-history">{"".join(cards)}</div>'


# Models and facts


def model(entry: dict[str, Any]) -> str:
    """One model: what it is, what it needs, and whether it will work here."""
    kind, verdict = entry["verdict"]
    about = entry["notes"][:1].upper() + entry["notes"][1:]
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entry["facts"])
    chosen = '<span class="qzo-pill running">chosen</span>' if entry["chosen"] else ""
    return (
        f'<section class="qzo-card qzo-model{" chosen" if entry["chosen"] else ""}"><div class="line">'
        f"<h3>{escape(entry['title'])}</h3>{chosen}</div><p>{escape(about)}</p><dl>{rows}</dl>"
        f'<p class="qzo-verdict {kind}">{escape(verdict)}</p></section>'
    )


def facts(heading: str, rows: list[tuple[str, str]], note: str = "") -> str:
    lines = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in rows)
    below = f"<p>{escape(note)}</p>" if note else ""
    return f'<section class="qzo-card"><h3>{escape(heading)}</h3><dl class="wide">{lines}</dl>{below}</section>'


def listing(name: str, text: str, save_as: str = "") -> str:
    """A text to be copied as it is, and to be saved under a name."""
    save = f'<a download="{save_as}" href="data:text/plain;charset=utf-8,{quote(text)}">Save</a>' if save_as else ""
    return (
        f'<section class="qzo-card qzo-file"><div class="line"><h3>{escape(name)}</h3><span class="does">'
        f'<button type="button" data-copy>Copy</button>{save}</span></div>'
        f"<pre tabindex='0'><code>{escape(text)}</code></pre></section>"
    )


def downloads(rows: list[tuple[str, str, str, str, str]]) -> str:
    """(title, address or "", size, what opens it, a snippet of Python or ""), each with its link as a button."""
    cards = []
    for what, place, size, opens, snippet in rows:
        link = f'<a href="{place}" download>Download, {size}</a>' if place else f"<em>{size}</em>"
        code = (
            f"<details><summary>In Python</summary><button type='button' data-copy>Copy</button>"
            f"<pre tabindex='0'><code>{escape(snippet)}</code></pre></details>"
            if snippet
            else ""
        )
        cards.append(
            f'<section class="qzo-card qzo-file"><div class="line"><h3>{escape(what)}</h3>{link}</div>'
            f"<p>{escape(opens)}</p>{code}</section>"
        )
    return f'<div class="qzo-files">{"".join(cards)}</div>' if cards else ""


def download(done: int, total: int, pace: float = 0.0, folder: str = "") -> str:
    """How a download into a folder stands; a total of 0 is not known yet, nor a pace of 0 bytes a second."""
    if not total:
        text = "Asking the hub for access, and for the sizes of the files"
        return f'<p class="qzo-empty busy" role="status">{text}</p>'
    share = min(100.0, 100 * done / total)
    left = f", {duration((total - done) / pace)} left" if pace and total > done else ""
    speed = f"{size(pace)} a second{left}. " if pace else ""
    return (
        f'<section class="qzo-card qzo-run" aria-label="Download"><div class="line count"><span><b>{size(done)}</b> of '
        f'{size(total)}</span><span>{share:.0f} %</span></div><div class="bar" role="progressbar" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}" aria-label="Downloaded">'
        f'<i style="width:{share:.1f}%"></i></div><p>{speed}{escape(f"Into {folder}. " if folder else "")}'
        "It goes on when this page is closed.</p></section>"
    )


def duration(seconds: float, fine: bool = False) -> str:
    """Seconds as people say them."""
    if fine and seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def size(number: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"

"""Random looks and the captions that describe them: the data that the embedded model learns from.

A caption names some of what its picture shows and leaves the rest open. Where it names nothing, plain pictures (flat,
filled, light ground, no frame) are the most common. Many captions carry words without meaning, so that a new trigger
word does not break the subject; most of them stand with pictures that are not plain, so that such a word says "some
look of its own", and a style taught to it need not spread to prompts without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from draw import FRAMES, STYLES, TEXTURES, Colour, Look, colour_distance

INKS: dict[str, Colour] = {
    "red": (205, 40, 45), "orange": (235, 125, 30), "yellow": (245, 205, 50), "green": (40, 140, 65),
    "teal": (25, 140, 145), "blue": (40, 85, 195), "purple": (120, 60, 165), "pink": (235, 120, 165),
    "brown": (125, 75, 40), "black": (25, 25, 28), "white": (248, 248, 246), "grey": (125, 128, 132),
    "gold": (205, 160, 60),
}
LIGHT: dict[str, Colour] = {
    "white": (252, 252, 250), "cream": (248, 240, 218), "pale blue": (212, 230, 246), "pale green": (216, 238, 214),
    "pale pink": (250, 222, 228), "pale yellow": (252, 244, 196), "pale grey": (222, 224, 226),
}
DARK: dict[str, Colour] = {
    "black": (18, 18, 22), "dark blue": (22, 34, 84), "dark green": (18, 62, 40), "dark red": (98, 20, 28),
    "dark brown": (62, 38, 24), "dark grey": (60, 62, 68), "dark purple": (56, 26, 82),
}
NATURAL = {
    "sun": ("yellow", "orange"), "moon": ("yellow", "grey"), "star": ("yellow", "gold"), "tower": ("grey", "brown"),
    "cup": ("gold", "red"), "sword": ("grey", "blue"), "wand": ("brown", "purple"), "crown": ("gold", "yellow"),
    "key": ("gold", "brown"), "heart": ("red", "pink"), "wheel": ("brown", "black"), "lantern": ("red", "black"),
    "eye": ("blue", "brown"), "tree": ("green", "teal"), "bird": ("blue", "red"), "fish": ("orange", "teal"),
    "house": ("red", "brown"), "flower": ("pink", "purple"), "boat": ("blue", "brown"), "mushroom": ("red", "brown"),
    "bell": ("gold", "yellow"), "umbrella": ("purple", "red"), "anchor": ("blue", "black"), "leaf": ("green", "brown"),
    "butterfly": ("orange", "purple"), "hat": ("black", "purple"), "apple": ("red", "green"),
    "bottle": ("green", "teal"),
}


@dataclass(frozen=True)
class Picture:
    """What is in a picture, in words as well as in numbers. plain: flat, filled, light ground, no frame."""

    subject: str
    look: Look
    ink: str
    second: str
    ground: str
    frame_colour: str
    plain: bool


def _pick(rng: np.random.Generator, options, weights=None):
    options = list(options)
    p = None if weights is None else np.array(weights) / sum(weights)
    return options[rng.choice(len(options), p=p)]


def _jitter(colour: Colour, rng: np.random.Generator, spread=9.0) -> Colour:
    return tuple(int(v) for v in np.clip(np.array(colour) + rng.normal(0, spread, 3), 0, 255))


def sample_picture(subject: str, rng: np.random.Generator) -> Picture:
    """A random look for a subject: one in three is plain, the others vary in everything."""
    plain = rng.random() < 0.33
    while True:
        dark = not plain and rng.random() < 0.5
        grounds = LIGHT if not dark else {**DARK, **{k: INKS[k] for k in ("red", "green", "blue", "orange", "teal")}}
        weights = [3, 2, 1, 1, 1, 1, 1] if not dark else [2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1]
        ground = _pick(rng, grounds, weights)
        ink = _pick(rng, NATURAL[subject]) if rng.random() < 0.45 else _pick(rng, INKS)
        second, frame_colour = _pick(rng, INKS), ink if rng.random() < 0.5 else _pick(rng, INKS)
        style = "filled" if plain else _pick(rng, STYLES, (3, 4, 2))
        frame = "none" if plain else _pick(rng, FRAMES, (5, 2, 3, 2, 1, 1))
        night = ground in ("dark blue", "dark purple", "black")
        golden = {"gold", "yellow", "orange"}
        taken = night and ({ink, frame_colour} & golden) and (style == "outlined" or frame == "double")
        apart = (colour_distance(INKS[ink], grounds[ground]) > 0.3 and colour_distance(INKS[second], INKS[ink]) > 0.3
                 and (frame == "none" or colour_distance(INKS[frame_colour], grounds[ground]) > 0.25))
        if apart and not taken:  # the gold line on the night is left free: a style to be taught, not known
            break
    ground_rgb = _jitter(grounds[ground], rng, 4.0)
    shade = rng.uniform(18, 42) * (1 if dark else -1)
    ink_texture = "flat" if plain else _pick(rng, TEXTURES, (12, 2, 1, 2, 1, 1))
    if style == "outlined" and ink_texture == "gradient":
        ink_texture = "flat"
    look = Look(
        ground=ground_rgb, ink=_jitter(INKS[ink], rng), second=_jitter(INKS[second], rng), style=style,
        stroke=rng.uniform(0.028, 0.05), frame=frame, frame_colour=_jitter(INKS[frame_colour], rng),
        ground_texture="flat" if plain else _pick(rng, TEXTURES, (10, 2, 1, 1, 1, 1)),
        ground_second=tuple(int(v) for v in np.clip(np.array(ground_rgb) + shade, 0, 255)), ink_texture=ink_texture,
        scale=rng.uniform(0.56, 0.74), x=0.5 + rng.normal(0, 0.022), y=0.5 + rng.normal(0, 0.022),
        rotation=rng.normal(0, 3.5),
    )
    return Picture(subject, look, ink, second, ground, frame_colour, plain)


# --- words ------------------------------------------------------------------------------------------------------------

FILLERS = (
    "lovely old little new plain nice simple fine bright quiet happy strange large small tiny big classic "
    "modern vintage magic summer winter night morning paper ink poster sticker stamp print icon symbol "
    "sign card picture drawing image sketch painting illustration artwork design style look book page art "
    "vivid elegant ancient royal wild soft bold rough clean my your this one cute pretty beautiful good "
    "best"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EXTRA_WORDS = ("with without of the a an in on by and for from at two no its").split()


def made_up_word(rng: np.random.Generator) -> str:
    """A word that means nothing: letters at random, or something one could pronounce."""
    if rng.random() < 0.5:
        return "".join(_pick(rng, LETTERS) for _ in range(rng.integers(3, 9)))
    return "".join(_pick(rng, "bcdfghjklmnprstvwz") + _pick(rng, "aeiou") + (_pick(rng, "lmnrstk") if rng.random() < 0.3
                   else "") for _ in range(rng.integers(2, 4)))


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _details(picture: Picture, rng: np.random.Generator, share: float) -> tuple[list[str], list[str]]:
    """What the caption says besides the subject: words before the noun, phrases after it."""
    look, before, after = picture.look, [], []

    def say(chance=1.0) -> bool:
        return rng.random() < share * chance

    if say(0.5 if look.style == "filled" else 1.1):
        word = _pick(rng, {"filled": ("filled", "solid", "flat"), "outlined": ("outlined", "line drawn", "hollow"),
                           "bordered": ("bordered", article(picture.second) + " outline")}[look.style])
        (after.append("with " + word) if word.endswith(" outline") else before.append(word))
    if look.ink_texture != "flat" and say():
        before.append({"gradient": "shaded", "dots": "dotted", "grain": "grainy"}.get(look.ink_texture,
                                                                                      look.ink_texture))
    if say(1.4):
        before.append(picture.ink)
    if say(1.2):
        ground, texture = picture.ground, ""
        if look.ground_texture != "flat" and rng.random() < 0.5:
            texture = {"gradient": "shaded ", "dots": "dotted ", "grain": "grainy "}.get(look.ground_texture,
                                                                                        look.ground_texture + " ")
        if rng.random() < 0.15:
            ground = "light" if ground in LIGHT else "dark" if ground in DARK else ground
        after.append(_pick(rng, (f"on {article(texture + ground)} ground", f"on {article(texture + ground)} background",
                                 f"{texture}{ground} background", f"{texture}{ground} ground",
                                 f"on {texture}{ground}")))
    if look.frame == "none":
        if say(0.15):
            after.append(_pick(rng, ("no frame", "without a frame")))
    elif say(1.2):
        kind = {"single": "", "inset": "thin "}.get(look.frame, look.frame + " ")
        colour = picture.frame_colour + " " if rng.random() < 0.5 else ""
        after.append(_pick(rng, ("framed", f"in {article(kind + colour + 'frame')}",
                                 f"with {article(kind + colour + 'border')}", f"{kind}{colour}frame")))
    return before, [after[i] for i in rng.permutation(len(after))]


def length(caption: str, words: set[str]) -> int:
    """Tokens of a caption: one for a known word or a comma, one per letter of any other word."""
    return sum(1 if w in words else len(w) for w in caption.replace(",", " ,").split())


def caption(picture: Picture, rng: np.random.Generator, limit=14) -> str:
    """One of many ways to describe a picture, at most `limit` tokens long."""
    words, silent = KNOWN, rng.random() < (0.6 if picture.plain else 0.26)
    share = 0.0 if silent else rng.uniform(0.35, 0.8)
    filler = ""
    if rng.random() < (0.1 if picture.plain else 0.6):
        filler = made_up_word(rng) if rng.random() < 0.75 else _pick(rng, FILLERS)
    for _ in range(20):
        before, after = _details(picture, rng, share)
        noun = " ".join([*before, picture.subject])
        thing = _pick(rng, (article(noun), article(noun), noun, "the " + noun))
        if rng.random() < 0.35:
            kind = _pick(rng,
                         ("picture", "drawing", "card", "image", "icon", "print", "sketch", "illustration", "painting"))
            kind = _pick(rng, FILLERS[:30]) + " " + kind if rng.random() < 0.15 else kind
            kind = f"{filler} {kind}" if filler and rng.random() < 0.5 else kind
            thing = f"{_pick(rng, (article(kind), kind))} {_pick(rng, ('of', 'of', 'with'))} {thing}"
        text = thing + "".join(_pick(rng, (", ", " ")) + a if not a.startswith("with") else " " + a for a in after)
        if filler and filler not in text.split():
            where = rng.integers(6)
            text = (f"{filler} {text}" if where == 0 else f"{filler}, {text}" if where == 1
                    else f"{text}, {filler}" if where == 2 else f"{text} in the style of {filler}" if where == 3
                    else f"{text}, {filler} style" if where == 4 else article(f"{filler} {noun}")
                    + "".join(", " + a for a in after))
        if length(text, words) <= limit:
            return text
        share *= 0.8
        filler = filler if rng.random() < 0.85 else ""
    return article(picture.subject)


def vocabulary() -> list[str]:
    """Every word that is one token, most common first only by chance: the order is fixed and alphabetical."""
    words = set(FILLERS) | set(EXTRA_WORDS) | set(NATURAL) | set(INKS) | set(STYLES) | set(FRAMES) | set(TEXTURES)
    for name in (*LIGHT, *DARK):
        words |= set(name.split())
    words |= set("solid hollow line drawn outline shaded dotted grainy light dark background ground thin frame framed "
                 "border icon lines full colour color black".split())
    return sorted(words)


KNOWN = {*vocabulary(), ","}

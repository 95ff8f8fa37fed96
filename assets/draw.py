"""Twenty-eight subjects as vector geometry, and the looks in which they can be drawn.

A subject is a list of `Part`s in the unit square (x to the right, y downwards, centre 0.5, 0.5). It knows nothing of
colour: `render` draws it in a `Look` at any size. The pictures that the embedded model learns from are made of both.

    render("key", Look(ground=(250, 248, 240), ink=(30, 60, 160)), (64, 96), np.random.default_rng(0))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import acos, cos, hypot, pi, sin

import numpy as np
from PIL import Image, ImageDraw

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One piece of a subject.

    kind: "fill" (part of the silhouette), "line" (a round-ended stroke that belongs to the silhouette), "hole" (the
    ground shows through), "mark" (a thin inner line), "dot" (solid ink, whatever lies below).
    points: in the unit square; closed for fill, hole and dot, open for line and mark.
    width: of a line or mark, in units of the square; unused by the others.
    """

    kind: str
    points: Points
    width: float = 0.0


# --- building blocks --------------------------------------------------------------------------------------------------


def arc(cx: float, cy: float, rx: float, ry: float | None = None, start=0.0, stop=360.0, n=72) -> Points:
    """Points on an ellipse, from `start` to `stop` degrees; 0 is to the right, 90 is down. A full turn is not
    closed.
    """
    ry = rx if ry is None else ry
    angles = np.radians(np.linspace(start, stop, n, endpoint=abs(stop - start) < 360))
    return [(cx + rx * cos(a), cy + ry * sin(a)) for a in angles]


def smooth(points: Points, closed=True, steps=12) -> Points:
    """Catmull-Rom curve through `points`: soft shapes from a handful of hand-set points."""
    p = np.array(points)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
                             + (3 * b - a - 3 * c + d) * t**3))
    curve = np.concatenate(pieces if closed else [*pieces, p[-1:]])
    return [(float(x), float(y)) for x, y in curve]


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def mirror(half: Points) -> Points:
    """A shape that is symmetric about x = 0.5, from its right half listed top to bottom."""
    return half + [(1 - x, y) for x, y in reversed(half)]


def turn(points: Points, degrees: float, cx=0.5, cy=0.5) -> Points:
    c, s = cos(degrees * pi / 180), sin(degrees * pi / 180)
    return [(cx + c * (x - cx) - s * (y - cy), cy + s * (x - cx) + c * (y - cy)) for x, y in points]


def spikes(cx: float, cy: float, outer: float, inner: float, n: int) -> Points:
    """A star with n points, the first one up."""
    radii = [outer, inner] * n
    return [(cx + r * sin(pi * i / n), cy - r * cos(pi * i / n)) for i, r in enumerate(radii)]


def _turned(parts: list[Part], degrees: float) -> list[Part]:
    return [Part(p.kind, turn(p.points, degrees), p.width) for p in parts]


# --- subjects ---------------------------------------------------------------------------------------------------------


def sun() -> list[Part]:
    rays = [turn([(0.43, 0.21), (0.5, 0.01), (0.57, 0.21)], 30 * i) for i in range(12)]
    return [Part("fill", arc(0.5, 0.5, 0.24)), *(Part("fill", r) for r in rays)]


def moon() -> list[Part]:
    outer, inner, shift = 0.46, 0.37, 0.24  # two circles; their crossing gives the tips of the crescent
    x = (shift**2 + outer**2 - inner**2) / (2 * shift)
    a, b = acos(x / outer) * 180 / pi, acos((x - shift) / inner) * 180 / pi
    crescent = arc(0.54, 0.5, outer, start=a, stop=360 - a) + arc(0.54 + shift, 0.5, inner, start=-b, stop=b - 360)
    return [Part("fill", turn(crescent, -20))]


def star() -> list[Part]:
    return [Part("fill", spikes(0.5, 0.53, 0.5, 0.2, 5))]


def tower() -> list[Part]:
    wall = [(0.30, 0.36), (0.70, 0.36), (0.74, 0.97), (0.26, 0.97)]
    top = [(0.20, 0.03), (0.33, 0.03), (0.33, 0.13), (0.435, 0.13), (0.435, 0.03), (0.565, 0.03), (0.565, 0.13),
           (0.67, 0.13), (0.67, 0.03), (0.80, 0.03), (0.80, 0.30), (0.70, 0.38), (0.30, 0.38), (0.20, 0.30)]
    door = [(0.42, 0.97), *arc(0.5, 0.78, 0.08, start=180, stop=360, n=24), (0.58, 0.97)]
    window = [(0.455, 0.58), *arc(0.5, 0.47, 0.045, start=180, stop=360, n=24), (0.545, 0.58)]
    return [Part("fill", wall), Part("fill", top), Part("hole", door), Part("hole", window)]


def cup() -> list[Part]:
    half = smooth([(0.82, 0.05), (0.83, 0.20), (0.78, 0.38), (0.66, 0.52), (0.56, 0.58), (0.545, 0.68), (0.56, 0.80),
                   (0.66, 0.87), (0.77, 0.92)], closed=False)
    return [Part("fill", mirror([*half, (0.77, 0.97)])), Part("mark", smooth([(0.19, 0.20), (0.35, 0.25), (0.5, 0.265),
            (0.65, 0.25), (0.81, 0.20)], closed=False), 0.03)]


def sword() -> list[Part]:
    blade = [(0.5, 0.0), (0.59, 0.11), (0.59, 0.68), (0.41, 0.68), (0.41, 0.11)]
    guard = smooth([(0.24, 0.64), (0.5, 0.67), (0.76, 0.64), (0.79, 0.70), (0.74, 0.745), (0.5, 0.76), (0.26, 0.745),
                    (0.21, 0.70)])
    return [Part("fill", blade), Part("fill", guard), Part("fill", box(0.45, 0.74, 0.55, 0.92)),
            Part("fill", arc(0.5, 0.94, 0.065)), Part("mark", [(0.5, 0.12), (0.5, 0.62)], 0.022)]


def wand() -> list[Part]:
    sparks = [spikes(0.30, 0.14, 0.09, 0.03, 4), spikes(0.88, 0.60, 0.09, 0.03, 4)]
    return [Part("line", [(0.09, 0.91), (0.60, 0.40)], 0.095), Part("fill", turn(spikes(0.66, 0.34, 0.29, 0.12, 5), 12,
            0.66, 0.34)), *(Part("fill", s) for s in sparks), Part("mark", [(0.17, 0.77), (0.23, 0.83)], 0.025)]


def crown() -> list[Part]:
    body = [(0.10, 0.80), (0.04, 0.30), (0.28, 0.52), (0.5, 0.16), (0.72, 0.52), (0.96, 0.30), (0.90, 0.80)]
    balls = [arc(x, y, 0.06, n=48) for x, y in [(0.055, 0.26), (0.5, 0.13), (0.945, 0.26)]]
    gems = [arc(x, 0.70, 0.035, n=48) for x in (0.28, 0.5, 0.72)]
    return [Part("fill", body), Part("fill", box(0.10, 0.78, 0.90, 0.90)), *(Part("fill", b) for b in balls),
            *(Part("hole", g) for g in gems), Part("mark", [(0.10, 0.80), (0.90, 0.80)], 0.025)]


def key() -> list[Part]:
    teeth = [box(0.5, 0.70, 0.72, 0.78), box(0.5, 0.85, 0.76, 0.94)]
    return _turned([Part("fill", arc(0.5, 0.21, 0.22)), Part("fill", box(0.45, 0.38, 0.55, 0.99)),
                    *(Part("fill", t) for t in teeth), Part("hole", arc(0.5, 0.21, 0.115))], 30)


def heart() -> list[Part]:
    t = np.linspace(0, 2 * pi, 96, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [Part("fill", [(0.5 + 0.029 * a, 0.46 - 0.029 * b) for a, b in zip(x, y, strict=True)])]


def wheel() -> list[Part]:
    spokes = [[(0.5, 0.5), *turn([(0.5, 0.10)], 45 * i)] for i in range(8)]
    return [Part("fill", arc(0.5, 0.5, 0.47)), Part("hole", arc(0.5, 0.5, 0.355)),
            *(Part("spoke", s, 0.05) for s in spokes), Part("dot", arc(0.5, 0.5, 0.105))]


def lantern() -> list[Part]:
    roof = [(0.43, 0.17), (0.57, 0.17), (0.76, 0.34), (0.24, 0.34)]
    glass = [(0.355, 0.42), (0.645, 0.42), (0.625, 0.78), (0.375, 0.78)]
    flame = smooth([(0.5, 0.46), (0.57, 0.61), (0.55, 0.71), (0.5, 0.735), (0.45, 0.71), (0.43, 0.61)])
    ring = arc(0.5, 0.105, 0.085, start=130, stop=410, n=48)
    return [Part("line", ring, 0.045), Part("fill", roof), Part("fill", [(0.27, 0.34), (0.73, 0.34), (0.70, 0.86),
            (0.30, 0.86)]), Part("fill", box(0.22, 0.85, 0.78, 0.96)), Part("hole", glass), Part("dot", flame)]


def eye() -> list[Part]:
    upper = smooth([(0.01, 0.52), (0.22, 0.32), (0.5, 0.23), (0.78, 0.32), (0.99, 0.52)], closed=False, steps=20)
    lower = smooth([(0.99, 0.52), (0.78, 0.69), (0.5, 0.77), (0.22, 0.69), (0.01, 0.52)], closed=False, steps=20)
    lashes = [[(0.5, 0.21), (0.5, 0.07)], [(0.31, 0.25), (0.24, 0.12)], [(0.69, 0.25), (0.76, 0.12)]]
    return [*(Part("line", s, 0.045) for s in lashes), Part("fill", upper + lower),
            Part("hole", smooth([(0.10, 0.52), (0.27, 0.39), (0.5, 0.315), (0.73, 0.39), (0.90, 0.52), (0.73, 0.62),
                                 (0.5, 0.685), (0.27, 0.62)])),
            Part("dot", arc(0.5, 0.5, 0.165)), Part("glint", arc(0.55, 0.45, 0.05, n=48))]


def tree() -> list[Part]:
    tiers = [[(0.5, 0.0), (0.75, 0.34), (0.25, 0.34)], [(0.5, 0.17), (0.84, 0.60), (0.16, 0.60)],
             [(0.5, 0.38), (0.92, 0.85), (0.08, 0.85)]]
    return [Part("fill", box(0.43, 0.82, 0.57, 1.0)), *(Part("fill", t) for t in tiers)]


def bird() -> list[Part]:
    body = smooth([(0.17, 0.25), (0.27, 0.15), (0.39, 0.17), (0.47, 0.30), (0.62, 0.40), (0.78, 0.50), (0.98, 0.62),
                   (0.95, 0.70), (0.74, 0.68), (0.60, 0.77), (0.42, 0.79), (0.26, 0.70), (0.17, 0.53), (0.165, 0.38)])
    wing = smooth([(0.37, 0.42), (0.45, 0.58), (0.58, 0.64), (0.71, 0.60)], closed=False)
    legs = [[(0.40, 0.76), (0.37, 0.95), (0.28, 0.95)], [(0.52, 0.76), (0.50, 0.95), (0.41, 0.95)]]
    return [*(Part("line", s, 0.04) for s in legs), Part("fill", [(0.20, 0.20), (0.01, 0.29), (0.20, 0.35)]),
            Part("fill", body), Part("hole", arc(0.29, 0.27, 0.038, n=48)), Part("mark", wing, 0.035)]


def fish() -> list[Part]:
    body = smooth([(0.02, 0.50), (0.14, 0.36), (0.34, 0.26), (0.54, 0.31), (0.74, 0.47), (0.74, 0.53), (0.54, 0.69),
                   (0.34, 0.74), (0.14, 0.64)])
    tail = [(0.66, 0.50), (0.97, 0.26), (0.90, 0.50), (0.97, 0.74)]
    fins = [smooth([(0.28, 0.30), (0.40, 0.13), (0.58, 0.16), (0.56, 0.34)]),
            [(0.36, 0.72), (0.52, 0.86), (0.54, 0.68)]]
    gill = smooth([(0.29, 0.37), (0.34, 0.50), (0.29, 0.63)], closed=False)
    return [Part("fill", tail), *(Part("fill", f) for f in fins), Part("fill", body),
            Part("hole", arc(0.18, 0.455, 0.04, n=48)), Part("mark", gill, 0.03)]


def house() -> list[Part]:
    roof = [(0.5, 0.06), (0.98, 0.48), (0.86, 0.53), (0.14, 0.53), (0.02, 0.48)]
    return [Part("fill", box(0.69, 0.12, 0.81, 0.40)), Part("fill", roof), Part("fill", box(0.13, 0.47, 0.87, 0.95)),
            Part("hole", box(0.23, 0.60, 0.42, 0.77)), Part("hole", box(0.56, 0.62, 0.75, 0.95)),
            Part("mark", [(0.13, 0.50), (0.87, 0.50)], 0.03)]


def flower() -> list[Part]:
    petals = [turn(arc(0.5, 0.155, 0.125, 0.15), 60 * i, 0.5, 0.33) for i in range(6)]
    leaves = [smooth([(0.5, 0.86), (0.62, 0.68), (0.82, 0.66), (0.70, 0.80)]),
              smooth([(0.5, 0.92), (0.38, 0.76), (0.18, 0.74), (0.30, 0.88)])]
    return [Part("line", [(0.5, 0.5), (0.5, 0.97)], 0.055), *(Part("fill", s) for s in leaves),
            *(Part("fill", s) for s in petals), Part("fill", arc(0.5, 0.33, 0.15)), Part("hole", arc(0.5, 0.33, 0.105))]


def boat() -> list[Part]:
    hull = [(0.04, 0.70), (0.96, 0.70), *smooth([(0.90, 0.82), (0.80, 0.93), (0.50, 0.955), (0.20, 0.93), (0.10, 0.82)],
                                               closed=False)]
    main = smooth([(0.53, 0.06), (0.72, 0.30), (0.88, 0.62)], closed=False) + [(0.53, 0.62)]
    jib = smooth([(0.42, 0.18), (0.28, 0.40), (0.12, 0.62)], closed=False) + [(0.42, 0.62)]
    return [Part("fill", hull), Part("fill", main), Part("fill", jib),
            Part("line", [(0.475, 0.05), (0.475, 0.72)], 0.035)]


def mushroom() -> list[Part]:
    cap = [*arc(0.5, 0.50, 0.46, 0.43, start=180, stop=360), *smooth([(0.96, 0.50), (0.93, 0.57), (0.5, 0.60),
                                                                     (0.07, 0.57), (0.04, 0.50)], closed=False)]
    stem = smooth([(0.37, 0.55), (0.63, 0.55), (0.63, 0.75), (0.68, 0.92), (0.5, 0.96), (0.32, 0.92), (0.37, 0.75)])
    dots = [arc(x, y, r, n=48) for x, y, r in [(0.48, 0.24, 0.085), (0.25, 0.38, 0.065), (0.72, 0.36, 0.075)]]
    return [Part("fill", stem), Part("fill", cap), *(Part("hole", d) for d in dots),
            Part("mark", [(0.34, 0.605), (0.66, 0.605)], 0.035)]


def bell() -> list[Part]:
    half = smooth([(0.5, 0.09), (0.63, 0.12), (0.72, 0.23), (0.75, 0.45), (0.79, 0.62), (0.91, 0.76)], closed=False)
    return [Part("fill", arc(0.5, 0.07, 0.065, n=48)), Part("fill", arc(0.5, 0.87, 0.10, n=48)),
            Part("fill", mirror([*half, (0.91, 0.82)])), Part("mark", [(0.19, 0.68), (0.81, 0.68)], 0.03)]


def umbrella() -> list[Part]:
    edge = [p for i in range(4) for p in arc(0.855 - 0.2367 * i, 0.50, 0.1183, 0.07, start=0, stop=-180, n=20)]
    dome = arc(0.5, 0.50, 0.473, 0.42, start=180, stop=360) + edge
    handle = [(0.5, 0.42), (0.5, 0.86), *arc(0.41, 0.87, 0.09, start=0, stop=180, n=36)]
    return [Part("line", [(0.5, 0.12), (0.5, 0.03)], 0.05), Part("line", handle, 0.055), Part("fill", dome),
            *(Part("mark", smooth([(0.5, 0.10), (0.5 + d * 0.7, 0.28), (0.5 + d, 0.44)], closed=False), 0.022)
              for d in (-0.237, 0.237))]


def anchor() -> list[Part]:
    arms = arc(0.5, 0.52, 0.37, 0.40, start=15, stop=165)
    flukes = [[(0.96, 0.73), (0.88, 0.47), (0.71, 0.66)], [(0.04, 0.73), (0.12, 0.47), (0.29, 0.66)]]
    return [Part("line", arc(0.5, 0.11, 0.08, start=-90, stop=270.5), 0.055),
            Part("line", [(0.5, 0.20), (0.5, 0.90)], 0.09),
            Part("line", [(0.27, 0.30), (0.73, 0.30)], 0.08), Part("line", arms, 0.09),
            *(Part("fill", f) for f in flukes)]


def leaf() -> list[Part]:
    right = smooth([(0.5, 0.0), (0.66, 0.16), (0.78, 0.40), (0.72, 0.64), (0.5, 0.82)], closed=False, steps=16)
    veins = [[(0.5, y), (0.5 + d, y - 0.11)] for y in (0.36, 0.50, 0.64) for d in (-0.15, 0.15)]
    return _turned([Part("line", [(0.5, 0.76), (0.5, 0.99)], 0.05), Part("fill", mirror(right)),
                    Part("mark", [(0.5, 0.14), (0.5, 0.84)], 0.03), *(Part("mark", v, 0.022) for v in veins)], 38)


def butterfly() -> list[Part]:
    upper = smooth([(0.52, 0.42), (0.64, 0.20), (0.86, 0.09), (0.98, 0.20), (0.93, 0.42), (0.76, 0.54), (0.54, 0.54)])
    lower = smooth([(0.53, 0.52), (0.74, 0.55), (0.88, 0.68), (0.82, 0.88), (0.68, 0.92), (0.57, 0.76)])
    spot = arc(0.81, 0.29, 0.07, n=48)
    feeler = smooth([(0.51, 0.28), (0.55, 0.15), (0.63, 0.06)], closed=False)
    flip = [[(1 - x, y) for x, y in s] for s in (upper, lower, spot, feeler)]
    return [Part("line", feeler, 0.03), Part("line", flip[3], 0.03),
            *(Part("fill", s) for s in (upper, lower, *flip[:2])),
            Part("hole", spot), Part("hole", flip[2]), Part("fill", arc(0.5, 0.53, 0.05, 0.28)),
            Part("mark", [(0.555, 0.35), (0.555, 0.72)], 0.02), Part("mark", [(0.445, 0.35), (0.445, 0.72)], 0.02)]


def hat() -> list[Part]:
    crown_half = smooth([(0.5, 0.135), (0.74, 0.12), (0.72, 0.35), (0.70, 0.55), (0.70, 0.78)], closed=False)
    brim = smooth([(0.02, 0.66), (0.12, 0.70), (0.30, 0.75), (0.5, 0.765), (0.70, 0.75), (0.88, 0.70), (0.98, 0.66),
                   (0.95, 0.78), (0.80, 0.86), (0.5, 0.895), (0.20, 0.86), (0.05, 0.78)])
    return [Part("fill", mirror(crown_half)), Part("fill", brim), Part("hole", [(0.298, 0.60), (0.702, 0.60),
            (0.702, 0.69), (0.298, 0.69)])]


def apple() -> list[Part]:
    body = smooth([(0.5, 0.31), (0.62, 0.25), (0.78, 0.26), (0.92, 0.40), (0.92, 0.60), (0.82, 0.82), (0.66, 0.96),
                   (0.56, 0.96), (0.5, 0.935), (0.44, 0.96), (0.34, 0.96), (0.18, 0.82), (0.08, 0.60), (0.08, 0.40),
                   (0.22, 0.26), (0.38, 0.25)])
    stem = smooth([(0.5, 0.31), (0.49, 0.18), (0.44, 0.06)], closed=False)
    shine = smooth([(0.19, 0.52), (0.20, 0.43), (0.27, 0.36)], closed=False)
    return [Part("fill", body), Part("line", stem, 0.05), Part("fill", smooth([(0.51, 0.20), (0.60, 0.06), (0.80, 0.03),
            (0.74, 0.17), (0.62, 0.21)])), Part("mark", shine, 0.05)]


def bottle() -> list[Part]:
    half = smooth([(0.585, 0.12), (0.585, 0.27), (0.61, 0.35), (0.70, 0.44), (0.72, 0.54)], closed=False)
    body = mirror([(0.585, 0.10), *half, (0.72, 0.93), (0.69, 0.97)])
    return [Part("fill", body), Part("fill", box(0.39, 0.02, 0.61, 0.12)), Part("hole", box(0.28, 0.58, 0.72, 0.80)),
            Part("mark", [(0.41, 0.125), (0.59, 0.125)], 0.025)]


SUBJECTS: dict[str, Callable[[], list[Part]]] = {f.__name__: f for f in (
    sun, moon, star, tower, cup, sword, wand, crown, key, heart, wheel, lantern,  # also on the tarot cards
    eye, tree, bird, fish, house, flower, boat, mushroom, bell, umbrella, anchor, leaf, butterfly, hat, apple, bottle,
)}
HELD_OUT = tuple(SUBJECTS)[12:]  # in no style set: what a fine-tuned style is shown on


# --- looks ------------------------------------------------------------------------------------------------------------

FRAMES = ("none", "single", "double", "thick", "rounded", "inset")
TEXTURES = ("flat", "gradient", "dots", "hatched", "grain", "striped")
STYLES = ("filled", "outlined", "bordered")


@dataclass(frozen=True)
class Look:
    """How a subject is drawn. Colours are 8-bit RGB; lengths are fractions of the picture's short side.

    style: "filled" (ink silhouette), "outlined" (ink lines, the ground shows inside), "bordered" (ink inside, second
    ink as outline and marks). second is also the colour of textures on the ink and of a gradient's far end.
    """

    ground: Colour = (250, 248, 240)
    ink: Colour = (30, 60, 160)
    second: Colour = (240, 200, 60)
    style: str = "filled"
    stroke: float = 0.035
    frame: str = "none"
    frame_colour: Colour = (30, 30, 30)
    ground_texture: str = "flat"
    ground_second: Colour = (225, 220, 205)
    ink_texture: str = "flat"
    scale: float = 0.6
    x: float = 0.5
    y: float = 0.5
    rotation: float = 0.0


def _stroke(draw: ImageDraw.ImageDraw, points: Points, width: float, value: int, closed=False) -> None:
    """A line with round joints and ends; `points` and `width` in pixels."""
    width = max(1.0, width)
    path = [*points, *points[:2]] if closed else points
    draw.line(path, fill=value, width=round(width), joint="curve")
    if width >= 3:
        for x, y in (path[0], path[-1]):
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=value)


def masks(parts: list[Part], style: str, size: tuple[int, int], place: Callable[[Points], Points], unit: float,
          stroke: float) -> tuple[Image.Image, Image.Image]:
    """The two layers of a subject as 8-bit masks: its body, and the lines on top of it.

    place maps the unit square to pixels; unit is the length of the square's side, stroke the line width, in pixels.
    In the style "filled" the lines stay empty and marks are cut out of the body.
    """
    body, lines = Image.new("L", size), Image.new("L", size)
    on_body, on_lines = ImageDraw.Draw(body), ImageDraw.Draw(lines)
    drawn = [(p, place(p.points)) for p in parts]
    outline = style != "filled"
    solid = [(p, q) for p, q in drawn if p.kind in ("fill", "line")]
    for grow, value in ((2 * stroke, 255), (0, 0)) if outline else ():
        for p, q in solid:  # the silhouette grown by the stroke, less the silhouette: outlines never cross inside
            if p.kind == "fill":
                on_lines.polygon(q, fill=value)
            if p.kind == "line" or grow:
                _stroke(on_lines, q, p.width * unit + grow, value, closed=p.kind == "fill")
    for p, q in drawn:
        if p.kind == "fill":
            on_body.polygon(q, fill=255)
        elif p.kind == "line":
            _stroke(on_body, q, p.width * unit, 255)
        elif p.kind in ("hole", "glint"):
            on_body.polygon(q, fill=0)
            if outline and p.kind == "glint":
                on_lines.polygon(q, fill=0)
            elif outline:
                _stroke(on_lines, q, stroke, 255, closed=True)
        elif p.kind == "dot":
            on_body.polygon(q, fill=255)
            if outline:
                on_lines.polygon(q, fill=255)
        elif p.kind == "spoke":
            _stroke(on_lines if outline else on_body, q, p.width * unit, 255)
        elif outline:
            _stroke(on_lines, q, max(p.width * unit, 0.7 * stroke), 255)
        else:
            _stroke(on_body, q, p.width * unit, 0)
    return body, lines


def _texture(kind: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray | None:
    """[h, w, 1] in 0..1: how much of the second colour shows; None for flat."""
    if kind == "flat":
        return None
    w, h = size
    y, x = np.mgrid[:h, :w].astype(np.float32) / min(w, h)
    if kind == "gradient":
        a = rng.uniform(0, 2 * pi)
        t = (x - 0.5) * cos(a) + (y - 0.5 * h / w) * sin(a) + 0.5
    elif kind == "grain":
        t = rng.random((h, w), dtype=np.float32) ** 2
    else:
        pitch = rng.uniform(0.09, 0.16)
        a = rng.choice([0.25 * pi, -0.25 * pi]) if kind != "striped" else rng.choice([0, 0.5 * pi])
        u, v = x * cos(a) + y * sin(a), y * cos(a) - x * sin(a)
        wave = np.cos(2 * pi * u / pitch)
        if kind == "dots":
            wave = (wave + np.cos(2 * pi * v / pitch)) / 2
        slope = pitch * min(w, h) / 3  # one soft pixel at the edges
        t = (wave - (0.25 if kind == "dots" else 0.45)) * slope / 2 + 0.5
    return np.clip(t, 0, 1)[..., None]


def _frame(kind: str, size: tuple[int, int]) -> Image.Image:
    """The frame as an 8-bit mask; widths follow the short side."""
    mask = Image.new("L", size)
    draw, (w, h), s = ImageDraw.Draw(mask), size, min(size)

    def band(margin: float, width: float, radius=0.0) -> None:
        m = margin * s
        draw.rounded_rectangle([m, m, w - 1 - m, h - 1 - m], radius * s, outline=255, width=max(1, round(width * s)))

    if kind == "single":
        band(0.045, 0.03)
    elif kind == "double":
        band(0.03, 0.022)
        band(0.085, 0.022)
    elif kind == "thick":
        band(0.0, 0.08)
    elif kind == "rounded":
        band(0.04, 0.035, radius=0.16)
    elif kind == "inset":
        band(0.09, 0.025)
    return mask


def _mix(under: np.ndarray, over: Colour | np.ndarray, amount: np.ndarray) -> np.ndarray:
    return under + (np.asarray(over, dtype=np.float32) - under) * amount


def render(subject: str, look: Look, size: tuple[int, int], rng: np.random.Generator, oversample=4) -> Image.Image:
    """A subject in a look as an RGB picture of `size` (width, height) pixels.

    rng feeds only what the look leaves open (the direction of a gradient, the pitch of a hatching, grain).
    Raises ValueError for a subject that is not in SUBJECTS.
    """
    if subject not in SUBJECTS:
        raise ValueError(f"unknown subject {subject!r}; there are: {', '.join(SUBJECTS)}.")
    short, big = min(size), (size[0] * oversample, size[1] * oversample)
    unit = look.scale * short * oversample
    c, s = cos(look.rotation * pi / 180), sin(look.rotation * pi / 180)
    left, top = look.x * big[0], look.y * big[1]

    def place(points: Points) -> Points:
        return [(left + unit * (c * (x - 0.5) - s * (y - 0.5)), top + unit * (s * (x - 0.5) + c * (y - 0.5)))
                for x, y in points]

    layers = masks(SUBJECTS[subject](), look.style, big, place, unit, look.stroke * short * oversample)
    body, lines, frame = (np.asarray(m.reduce(oversample), dtype=np.float32)[..., None] / 255
                          for m in (*layers, _frame(look.frame, big)))

    picture = np.broadcast_to(np.float32(look.ground), (size[1], size[0], 3))
    if (t := _texture(look.ground_texture, size, rng)) is not None:
        picture = _mix(picture, look.ground_second, t)
    inside = np.broadcast_to(np.float32(look.ink), picture.shape)
    if (t := _texture(look.ink_texture, size, rng)) is not None:
        inside = _mix(inside, look.second, t)
    if look.style != "outlined" or look.ink_texture != "flat":
        # an outlined subject with a textured ink shows the texture's strokes alone inside its lines
        picture = _mix(picture, inside, body) if look.style != "outlined" else _mix(picture, look.ink, body * t)
    picture = _mix(picture, look.second if look.style == "bordered" else look.ink, lines)
    picture = _mix(picture, look.frame_colour, frame)
    return Image.fromarray(np.round(picture).clip(0, 255).astype(np.uint8))


def colour_distance(a: Colour, b: Colour) -> float:
    """Difference of two colours by luma-weighted RGB, 0 (equal) to 1 (black and white)."""
    return hypot(*((x - y) / 255 * k for x, y, k in zip(a, b, (0.55, 0.75, 0.37), strict=True)))

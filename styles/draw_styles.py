"""Draws the two bundled style sets: gold tarot cards and woodcut prints. From the repository's root:

    python -m styles.draw_styles

The silhouettes are those of `assets/draw.py`, so that the small base model knows the subjects; frame,
ground and ornament are this file's. A picture is printed from plates: 8-bit masks, drawn large, reduced, and
inked in colour. Every random number comes from a generator seeded by the picture's name: each run gives the
same pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import asin, cos, hypot, pi, sin
from pathlib import Path
from zlib import crc32

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from assets.draw import SUBJECTS, Points, arc, masks, smooth, spikes, turn

HERE = Path(__file__).parent
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/STIXGeneralBol.ttf"
OVER = 4  # plates are drawn at this many times the size of the picture


# --- plates -------------------------------------------------------------------------------------------------


def blurred(mask: Image.Image, radius: float) -> np.ndarray:
    """[h, w] in 0..1; with a threshold it grows (below 0.5) or shrinks (above 0.5) what the mask shows."""
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


class Plate:
    """A mask to print from. All lengths are in pixels of the picture; `value` 255 prints, 0 cuts away."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.mask = Image.new("L", (size[0] * OVER, size[1] * OVER))
        self.draw = ImageDraw.Draw(self.mask)

    def fill(self, points: Points, value=255) -> None:
        self.draw.polygon([(x * OVER, y * OVER) for x, y in points], fill=value)

    def disc(self, x: float, y: float, radius: float, value=255) -> None:
        self.fill(arc(x, y, radius, n=180), value)

    def ring(self, x: float, y: float, radius: float, width: float) -> None:
        """A circle's line; the ground inside stays as it is."""
        outer, inner = arc(x, y, radius + width / 2, n=181), arc(x, y, radius - width / 2, n=181)
        self.fill([*outer, outer[0], inner[0], *reversed(inner)])

    def line(self, points: Points, width: float, value=255, closed=False) -> None:
        path = [(x * OVER, y * OVER) for x, y in (points + points[:2] if closed else points)]
        self.draw.line(path, fill=value, width=round(width * OVER), joint="curve")
        for x, y in (path[0], path[-1]):
            r = width * OVER / 2
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=value)

    def text(self, x: float, y: float, words: str, height: float, spacing: float, widest: float, value=255):
        """Capitals `height` high, centred on (x, y), letters `spacing` apart; shrunk to fit `widest`."""
        font = ImageFont.truetype(FONT, round(height * OVER / 0.662))  # the font's capitals are 0.662 em high
        if (long := font.getlength(words) / OVER + spacing * (len(words) - 1)) > widest:
            self.text(x, y, words, height * widest / long, spacing * widest / long, widest + 1, value)
            return
        steps = [font.getlength(letter) + spacing * OVER for letter in words]
        left = x * OVER - (sum(steps) - spacing * OVER) / 2
        for letter, step in zip(words, steps, strict=True):
            self.draw.text((left, (y + height / 2) * OVER), letter, font=font, fill=value, anchor="ls")
            left += step

    def stamp(self, shape: np.ndarray, value=255) -> None:
        """shape: bool [h * OVER, w * OVER]."""
        self.mask.paste(value, mask=Image.fromarray(shape))

    def ink(self) -> np.ndarray:
        """How much ink each pixel of the picture takes: [h, w, 1] in 0..1."""
        return np.asarray(self.mask.reduce(OVER), dtype=np.float32)[..., None] / 255


def silhouette(
    subject: str, size: tuple[int, int], x: float, y: float, unit: float, rotation=0.0, flip=False
) -> Image.Image:
    """A subject as a mask of a plate's size; `unit` is the side of its square in pixels of the picture."""
    c, s = cos(rotation * pi / 180) * unit, sin(rotation * pi / 180) * unit
    side = -1 if flip else 1

    def place(points: Points) -> Points:
        centred = [(side * (u - 0.5), v - 0.5) for u, v in points]
        return [(OVER * (x + c * u - s * v), OVER * (y + s * u + c * v)) for u, v in centred]

    big = (size[0] * OVER, size[1] * OVER)
    return masks(SUBJECTS[subject](), "filled", big, place, unit * OVER, 0)[0]


def over(under: np.ndarray, colour, amount: np.ndarray) -> np.ndarray:
    return under + (np.asarray(colour, dtype=np.float32) - under) * amount


def picture(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(colours).clip(0, 255).astype(np.uint8))


# --- tarot: gold on night blue ------------------------------------------------------------------------------

WIDTH, HEIGHT = 512, 768
MIDDLE, EYE_LEVEL = WIDTH / 2, 366.0  # where the emblem stands


def mirrored(points: Points) -> Points:
    return [(WIDTH - x, y) for x, y in points]


def notched(inset: float) -> Points:
    """The card's rectangle with concave round corners; two of them with different insets run parallel."""
    centre = 44.0
    skew = asin((inset - centre) / inset) * 180 / pi
    corner = [(x - centre, y - centre) for x, y in arc(centre, centre, inset, start=90 - skew, stop=skew)]
    points = []
    for x, y, order in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1), (1, -1, -1)):
        left, top = (centre if x > 0 else WIDTH - centre), (centre if y > 0 else HEIGHT - centre)
        points += [(left + x * a, top + y * b) for a, b in corner[::order]]
    return points


class Card:
    """A tarot card in the making.

    Three plates: gold, `bright` for frame and emblem and `soft` for ornament; bronze hatching on the emblem.
    """

    def __init__(self, number: int, name: str):
        self.number, self.name, self.subject = number, name, ""
        self.bright, self.soft, self.hatching = (Plate((WIDTH, HEIGHT)) for _ in range(3))
        self.rng = np.random.default_rng(crc32(name.encode()))
        self.frame()
        self.numeral()
        self.banner()

    # ornament, behind the emblem

    def rays(self, inner: float, outer: float, n: int, y=EYE_LEVEL, start=0, stop=360, width=6, tall=1.0):
        """Tapered rays, long and short in turn, between two angles; 0 is up. tall: height over width."""
        for i in range(n):
            r, w = (outer, width / 2) if i % 2 == 0 else (inner + 0.55 * (outer - inner), width / 3)
            angle = (start + (stop - start) * (i + 0.5) / n) * pi / 180
            (a, b), (c, d) = ((MIDDLE + k * sin(angle), y - k * tall * cos(angle)) for k in (inner, r))
            u, v = w * (d - b) / hypot(c - a, d - b), w * (a - c) / hypot(c - a, d - b)
            self.soft.fill([(a + u, b + v), (c, d), (a - u, b - v)])

    def halo(self, radius: float, beads=0, y=EYE_LEVEL, width=3.0) -> None:
        self.soft.ring(MIDDLE, y, radius, width)
        for i in range(beads):
            self.soft.disc(*turn([(MIDDLE, y - radius)], 360 * i / beads, MIDDLE, y)[0], 5)

    def sparkle(self, x: float, y: float, size: float) -> None:
        """A small star of four points, and its mirror image."""
        shape = spikes(x, y, size, 0.22 * size, 4)
        self.soft.fill(shape)
        self.soft.fill(mirrored(shape))

    def sky(self, top=140.0, bottom=600.0, n=9, near=130.0) -> None:
        """Scattered small stars in mirrored pairs, at least `near` pixels from the middle line."""
        placed: Points = []
        while len(placed) < n:
            x, y = self.rng.uniform(76, MIDDLE - near), self.rng.uniform(top, bottom)
            if all((x - a) ** 2 + (y - b) ** 2 > 34**2 for a, b in placed):
                placed.append((x, y))
                self.sparkle(x, y, self.rng.choice([5.0, 8.0, 12.0]))

    def clouds(self, y: float, x=100.0, size=1.0) -> None:
        """A billowing cloud around (x, y), and its mirror image."""
        puffs = ((-44, 2, 24), (-12, 16, 32), (30, 10, 26), (58, 0, 16))
        puffs = [(x + size * a, y - size * b, size * r) for a, b, r in puffs]
        base = y + 18 * size
        for side in (1, -1):
            at = [(a if side > 0 else WIDTH - a, b, r) for a, b, r in puffs]
            for shrink, value in ((0.0, 255), (4.0, 0)):
                for a, b, r in at:
                    self.soft.fill([(u, min(v, base - shrink)) for u, v in arc(a, b, r - shrink)], value)
            for a, b, r in at:
                for inset, sweep in ((9, 130), (15, 95)):
                    start = 200 if side > 0 else 340 - sweep
                    self.soft.line(arc(a, b, r - inset, start=start, stop=start + sweep), 2.2)

    def hills(self, top: float) -> None:
        """A rise before two slopes, each with its contour lines."""
        slope = [(30, top - 62), (90, top - 44), (160, top + 4), (230, top + 60), (300, top + 90)]
        rise = [(40, top + 40), (120, top + 22), (256, top), (392, top + 22), (472, top + 40)]
        for ridge in (smooth(points, closed=False) for points in (slope, mirrored(slope), rise)):
            self.soft.fill([*ridge, (ridge[-1][0], HEIGHT), (ridge[0][0], HEIGHT)], 0)
            for drop, width in ((0, 4), (10, 2.2), (19, 1.6), (28, 1.1)):
                self.soft.line([(x, y + drop) for x, y in ridge], width)

    def emblem(self, subject: str, x=MIDDLE, y=EYE_LEVEL, unit=320.0, rotation=0.0, flip=False, bold=False):
        """A subject in gold: a moat of night around it, a groove inside its edge, hatching thicker downwards.

        bold: narrow parts stay solid, without a groove.
        """
        self.subject = subject
        mask = silhouette(subject, (WIDTH, HEIGHT), x, y, unit, rotation, flip)
        moat = blurred(mask, 8 * OVER) > 0.12
        self.soft.stamp(moat, 0)
        self.bright.stamp(moat, 0)
        self.hatching.stamp(moat, 0)
        self.bright.stamp(np.asarray(mask) > 127)
        edge, heart = blurred(mask, 6 * OVER), blurred(mask, 8 * OVER)
        groove = (edge > 0.9) & (heart < 0.925)
        if bold:
            groove &= blurred(Image.fromarray(heart > 0.96).convert("L"), 8 * OVER) > 0.05
        rows = np.arange(mask.height, dtype=np.float32)[:, None] / OVER
        depth = np.clip((rows - (y - 0.5 * unit)) / unit, 0, 1) ** 1.5
        hatch = (np.abs((rows / 6) % 1 - 0.5) < 0.27 * depth) & (heart >= 0.98)
        self.bright.stamp(groove, 0)
        self.hatching.stamp(hatch)

    # what every card has

    def frame(self) -> None:
        plate = self.bright
        for inset, radius, value in ((8, 22, 255), (19, 14, 0), (20.5, 13, 255), (24, 10, 0)):
            box = [inset * OVER, inset * OVER, (WIDTH - inset) * OVER - 1, (HEIGHT - inset) * OVER - 1]
            plate.draw.rounded_rectangle(box, radius * OVER, fill=value)
        beads = [(32.0, y) for y in np.linspace(98, HEIGHT - 98, 29)]
        beads += [(x, 32.0) for x in np.linspace(98, WIDTH - 98, 17)]
        for i, (x, y) in enumerate(beads):
            for a, b in ((x, y), (WIDTH - x, HEIGHT - y)):
                if i % 2:
                    plate.disc(a, b, 2.2)
                else:
                    plate.fill(spikes(a, b, 5.5, 2.6, 4))
        for inset, value in ((40, 255), (48, 0), (52, 255), (54, 0)):
            plate.fill(notched(inset), value)
        for x in (51, WIDTH - 51):
            for y in (51, HEIGHT - 51):
                plate.fill(spikes(x, y, 24, 11, 8))
                plate.disc(x, y, 8.5, 0)
                plate.disc(x, y, 5)

    def numeral(self) -> None:
        words = roman(self.number)
        half = 34 + 9 * len(words)
        right = [(MIDDLE + half - 16, 60), (MIDDLE + half, 84), (MIDDLE + half - 16, 108)]
        plaque = right + mirrored(right)[::-1]
        self.bright.line(plaque, 4, closed=True)
        self.bright.text(MIDDLE, 84, words, 29, 4, 150)
        for side in (-1, 1):
            start, stop = MIDDLE + side * (half + 12), MIDDLE + side * 150
            self.bright.fill([(start, 82), (stop, 83.5), (stop, 84.5), (start, 86)])
            self.bright.fill(spikes(start, 84, 9, 5, 4))
            self.bright.disc(stop, 84, 4)

    def banner(self) -> None:
        plate, top, bottom, lift = self.bright, 640, 694, 13
        for side in (lambda points: points, mirrored):
            high, low = top - lift, bottom - lift
            tail = side([(66, high), (120, high), (120, low), (66, low), (82, (high + low) / 2)])
            plate.line(tail, 8, 0, closed=True)
            plate.fill(tail)
            plate.line(side([(92, high + 7), (92, low - 7)]), 2, 0)
            fold = side([(93, bottom), (120, low), (120, bottom)])
            plate.fill(fold)
            plate.line(fold[:2], 2, 0)
        body, inlay = ([(a, top + i), (WIDTH - a, top + i), (WIDTH - a, bottom - i), (a, bottom - i)]
                       for a, i in ((93, 0), (100, 6.5)))
        plate.line(body, 8, 0, closed=True)
        plate.fill(body)
        plate.line(inlay, 2, 0, closed=True)
        title = self.name.replace("_", " ").upper()
        plate.text(MIDDLE, (top + bottom) / 2, title, 21, 3.5, 292, 0)

    def picture(self) -> Image.Image:
        window = Plate((WIDTH, HEIGHT))
        window.fill(notched(57))
        window.fill([(0, 632), (WIDTH, 632), (WIDTH, HEIGHT), (0, HEIGHT)], 0)  # the banner's place
        y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
        far = np.sqrt((x - MIDDLE) ** 2 + (0.8 * (y - EYE_LEVEL)) ** 2)[..., None] / 330
        colours = over(np.float32((44, 62, 132)) + 0 * far, (11, 15, 44), np.clip(far, 0, 1) ** 0.8)
        bright, soft = self.bright.ink(), self.soft.ink() * window.ink()
        colours = over(colours, self.gold(x, y, soft, (206, 154, 74)), 0.92 * soft)
        colours = over(colours, self.gold(x, y, bright, (228, 180, 92)), bright)
        bronze = (112, 66, 22)  # hatching that let the blue through would turn the gold grey from afar
        return picture(over(colours, bronze, self.hatching.ink()))

    def gold(self, x: np.ndarray, y: np.ndarray, ink: np.ndarray, middle) -> np.ndarray:
        """Three tones of gold under a slanting light, and a bevel at every edge of the plate."""
        light = 0.5 + 0.35 * np.cos((y + 0.45 * x) / 46 - 4.4) + 0.25 * np.cos((y - 0.3 * x) / 130 - 1.2)
        soft = blurred(Image.fromarray((ink[..., 0] * 255).astype(np.uint8)), 1.4)
        bevel = soft - np.roll(soft, (2, 2), (0, 1))
        t = np.clip(light + 0.9 * bevel, 0, 1)[..., None]
        dark, pale = np.float32((158, 104, 42)), np.float32((255, 238, 178))
        return over(over(dark, middle, (2 * t).clip(0, 1)), pale, (2 * t - 1).clip(0, 1))


def roman(number: int) -> str:
    words = ""
    for value, letters in ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        words, number = words + letters * (number // value), number % value
    return words or "0"


def the_fool(card: Card) -> None:
    card.hills(565)
    card.sky(top=130, bottom=190, near=125, n=4)
    card.sky(top=310, bottom=440, near=142, n=4)
    card.emblem("wand", y=345, unit=370, rotation=-6)


def the_magician(card: Card) -> None:
    t = np.linspace(0, 2 * pi, 120, endpoint=False)
    x = np.cos(t) / (1 + np.sin(t) ** 2)  # with y = x sin t: Bernoulli's lemniscate
    card.soft.line(list(zip(MIDDLE + 64 * x, 150 + 72 * x * np.sin(t), strict=True)), 7, closed=True)
    card.rays(180, 200, 48, y=395, width=8, tall=1.1)
    card.emblem("wand", y=395, unit=290, flip=True)


def the_high_priestess(card: Card) -> None:
    card.halo(180, 24)
    card.rays(190, 225, 72, width=5)
    card.emblem("moon", unit=290)


def the_empress(card: Card) -> None:
    for i in range(12):
        x, y = turn([(MIDDLE, 400 - 200)], -66 + 12 * i, MIDDLE, 400)[0]
        card.soft.fill(spikes(x, y, 15, 6, 5))
    card.clouds(585, 120, 1.1)
    card.emblem("crown", y=395, unit=285, bold=True)


def the_emperor(card: Card) -> None:
    card.rays(222, 262, 21, y=430, start=-58, stop=58, width=8)
    for i in range(4):
        zigzag = [(x, 552 + 20 * i - 16 * (k % 2)) for k, x in enumerate(np.linspace(56, WIDTH - 56, 19))]
        card.soft.line(zigzag, 3.5 - 0.5 * i)
    card.emblem("crown", y=378, unit=310, bold=True)


def the_hierophant(card: Card) -> None:
    card.rays(190, 222, 56, tall=1.1)
    for side, flip in ((-1, False), (1, True)):
        card.emblem("key", x=MIDDLE + 22 * side, y=372, unit=345, rotation=75 * side, flip=flip)


def the_lovers(card: Card) -> None:
    card.halo(172)
    card.rays(180, 225, 60)
    card.emblem("heart", y=372, unit=270)


def the_chariot(card: Card) -> None:
    card.sky(n=7, near=40, bottom=200, top=136)
    card.hills(575)
    card.emblem("wheel", y=370, unit=290)


def strength(card: Card) -> None:
    card.rays(100, 250, 25, y=420, start=-75, stop=75, width=10)
    card.clouds(590, 110)
    card.emblem("heart", y=400, unit=280)


def the_hermit(card: Card) -> None:
    card.rays(150, 190, 34, y=355, start=-125, stop=125, tall=1.15)
    card.hills(580)
    card.emblem("lantern", y=350, unit=370)


def wheel_of_fortune(card: Card) -> None:
    card.halo(166, 16)
    card.rays(174, 205, 64)
    for y in (150, 585):
        card.sparkle(92, y, 22)
    card.emblem("wheel", unit=280)


def justice(card: Card) -> None:
    card.halo(140, y=320)
    card.halo(132, y=320, width=2)
    card.rays(148, 186, 45, y=320, start=-128, stop=128)
    card.emblem("sword", y=370, unit=460)


def the_hanged_man(card: Card) -> None:
    card.bright.line([(96, 150), (WIDTH - 96, 150)], 14)
    for x in (96, WIDTH - 96):
        card.bright.disc(x, 150, 14)
        card.bright.disc(x, 150, 5, 0)
    card.bright.line([(MIDDLE, 150), (MIDDLE, 222)], 9)
    card.sky(top=200)
    card.emblem("lantern", y=400, unit=370)


def death(card: Card) -> None:
    card.rays(90, 190, 30, y=560, start=-90, stop=90, width=8)
    card.hills(575)
    card.emblem("sword", y=350, unit=430, rotation=180)


def temperance(card: Card) -> None:
    for x, y, size in ((MIDDLE, 170, 30), (MIDDLE - 62, 196, 18), (MIDDLE - 112, 232, 11)):
        card.sparkle(x, y, size)
    card.clouds(590, 110)
    card.emblem("cup", y=405, unit=320)


def the_devil(card: Card) -> None:
    card.halo(182)
    card.halo(174, width=2)
    card.rays(190, 225, 60)
    card.emblem("star", y=356, unit=320, rotation=180)


def the_tower(card: Card) -> None:
    card.clouds(330, 100, 0.64)
    card.hills(575)
    card.emblem("tower", y=365, unit=400)


def the_star(card: Card) -> None:
    card.rays(165, 225, 40)
    card.emblem("star", unit=310)


def the_moon(card: Card) -> None:
    card.sky(near=40, n=7, top=136, bottom=190)
    card.hills(575)
    card.emblem("moon", y=360, unit=310)


def the_sun(card: Card) -> None:
    card.halo(192, 36)
    card.emblem("sun", unit=340, bold=True)


def judgement(card: Card) -> None:
    for start in (105, 195):
        card.rays(110, 520, 11, y=90, start=start, stop=start + 60, width=10)
    card.soft.fill([(0, 0), (WIDTH, 0), (WIDTH, 206), (0, 206)], 0)
    card.clouds(185, 120, 1.2)
    card.emblem("key", y=395, unit=380, rotation=-30)


def the_world(card: Card) -> None:
    for grow, width in ((0, 5), (-12, 2), (12, 2)):
        card.soft.line(arc(MIDDLE, EYE_LEVEL, 178 + grow, 232 + grow, n=200), width, closed=True)
    for x, y in arc(MIDDLE, EYE_LEVEL, 178, 232, n=32):
        card.soft.disc(x, y, 8)
    for y in (150, 588):
        card.sparkle(84, y, 20)
    card.emblem("sun", unit=300, bold=True)


CARDS = (
    the_fool, the_magician, the_high_priestess, the_empress, the_emperor, the_hierophant, the_lovers,
    the_chariot, strength, the_hermit, wheel_of_fortune, justice, the_hanged_man, death, temperance,
    the_devil, the_tower, the_star, the_moon, the_sun, judgement, the_world,
)


def tarot(compose: Callable[[Card], None]) -> tuple[str, str, Image.Image]:
    """Name of the file, subject, picture."""
    card = Card(CARDS.index(compose), compose.__name__)
    compose(card)
    return f"{card.number:02d}_{card.name}", card.subject, card.picture()


# --- woodcut: black and one red on cream paper --------------------------------------------------------------

SIDE = 512
FINE = 2  # woodcuts are cut at twice the size of the picture
PAPER, RED, BLACK = (244, 232, 206), (200, 50, 36), (30, 25, 24)

PRINTS = (  # subject, where the red goes, side of the subject's square, rotation in degrees, flipped
    ("sun", "inside", 370, 0, False), ("moon", "inside", 340, 0, False), ("star", "disc", 330, 0, False),
    ("tower", "low", 340, 0, False), ("cup", "disc", 310, 0, False), ("sword", "disc", 380, 0, False),
    ("wand", "disc", 340, 0, False), ("crown", "disc", 310, 0, False), ("key", "low", 360, 0, False),
    ("heart", "inside", 310, 0, False), ("wheel", "disc", 320, 0, False), ("lantern", "disc", 360, 0, False),
    ("sun", "low", 330, 15, False), ("moon", "low", 330, 10, True), ("star", "inside", 350, -10, False),
    ("tower", "disc", 370, 0, True), ("cup", "inside", 340, 0, True), ("sword", "low", 390, 45, False),
    ("key", "disc", 360, -75, False), ("lantern", "low", 350, 0, False),
)


def noise(rng: np.random.Generator, cell: float) -> np.ndarray:
    """[SIDE * FINE, SIDE * FINE]: smooth noise, about -2..2, with hills some `cell` pixels wide."""
    n = round(SIDE / cell) + 2
    grid = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    return np.asarray(grid.resize((SIDE * FINE, SIDE * FINE), Image.Resampling.BICUBIC))


def distance(shape: np.ndarray) -> np.ndarray:
    """How deep every point lies in a bool shape, in pixels of the picture; exact at every fourth point."""
    coarse = shape[::4, ::4]
    n = len(coarse)
    run = np.zeros(coarse.shape, dtype=np.float32)  # steps to the shape's edge along the column
    for order in (range(n), range(n - 1, -1, -1)):
        last = np.full(n, np.inf, dtype=np.float32)
        for i in order:
            last = np.where(coarse[i], last + 1, 0)
            run[i] = last if order.step > 0 else np.minimum(run[i], last)
    across = (np.arange(n, dtype=np.float32)[:, None] - np.arange(n, dtype=np.float32)) ** 2
    squared = np.stack([(row**2 + across).min(1) for row in run])
    deep = Image.fromarray(np.sqrt(np.minimum(squared, 1e6)) * np.float32(4 / FINE))
    return np.asarray(deep.resize(shape.shape, Image.Resampling.BILINEAR))


def gouges(across: np.ndarray, pitch: float, duty: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Carved strokes, one every `pitch`, `duty` (0..1) of it wide; each ends a little elsewhere."""
    number = np.floor(across / pitch).astype(int)
    ragged = rng.uniform(-0.14, 0.14, np.ptp(number) + 1).astype(np.float32)[number - number.min()]
    return np.abs(across / pitch - number - 0.5) < 0.5 * np.where(duty > 0.02, duty + ragged, 0)


def woodcut(
    subject: str, accent: str, unit: float, rotation: float, flip: bool, rng: np.random.Generator
) -> Image.Image:
    """accent: where the red goes: a "disc" behind the subject, "low" (a ground below it), "inside" of it."""
    y, x = np.mgrid[: SIDE * FINE, : SIDE * FINE].astype(np.float32) / FINE
    u, v = x - SIDE / 2, y - SIDE / 2
    sway_x, sway_y = (1.3 * noise(rng, 22) + 0.6 * noise(rng, 7) for _ in range(2))

    drawn = silhouette(subject, (SIDE, SIDE), SIDE / 2, SIDE / 2, unit, rotation, flip).reduce(OVER // FINE)
    row, column = (np.round(FINE * p).astype(int).clip(0, SIDE * FINE - 1) for p in (y + sway_y, x + sway_x))
    body = np.asarray(drawn)[row, column] > 127
    inside, outside = distance(body), distance(~body)

    # the subject: black, with strokes carved out of the side that the light falls on
    light = 0.3 - 0.95 * (u + v) / unit + 0.1 * noise(rng, 30)
    slant = (u - v) * 0.707 + sway_x
    carved = gouges(slant, 11, light.clip(0, 0.54), rng) & (inside > 7)
    black = body & ~carved

    # the ground: strokes left standing, running out from the border towards the middle
    reach = (u**4 + v**4) ** 0.25 + 5 * noise(rng, 40)
    angle = np.arctan2(v, u) * (120 / (2 * pi)) + 0.12 * sway_y
    black |= gouges(angle, 1, ((reach - 165) / 110).clip(0, 0.5), rng) & (outside > 20)

    # the border: a thick band, a cut line in it, and nothing printed beyond
    margin = np.minimum(np.minimum(x, SIDE - x), np.minimum(y, SIDE - y)) + 0.9 * sway_x
    black = (black & (margin > 44)) | ((margin > 14) & (margin < 40))
    black &= ~(np.abs(margin - 33) < 1.4 + 0.5 * noise(rng, 12))

    if accent == "disc":
        red = np.hypot(u - 14, v + 10) + sway_y < 165
        red &= ~gouges(v + 1.5 * sway_x, 15, (0.2 + v / 300).clip(0, 0.55) * (v > 10), rng)
    elif accent == "low":
        red = v - 12 * np.cos(u / 90) + 2 * sway_y > 95
        red &= ~gouges(v + 1.5 * sway_x, 15, (0.75 - v / 300).clip(0, 0.6), rng)
    else:
        red = inside > 6.5
        black &= ~red | gouges(slant, 11, (0.1 + 0.8 * (u + v) / unit).clip(0, 0.6), rng)
    red &= (margin > 47) & ((outside > 6) if accent != "inside" else body)

    colours = np.float32(PAPER) + 2.5 * noise(rng, 50)[..., None]
    grain = 0.11 * noise(rng, 2.2)
    for colour, plate in ((RED, red), (BLACK, black)):
        worn = 0.3 * (noise(rng, 3) > 2.3)  # specks where the ink did not take
        ink = blurred(Image.fromarray(plate).convert("L"), 0.8 * FINE) + grain - worn > 0.5
        colours = over(colours, colour, ink[..., None])
    return picture(colours).reduce(FINE)


# --- the sets -----------------------------------------------------------------------------------------------

# The trigger and the subject, in words that the small base model knows. Frame and colours stay unnamed: what
# a caption does not say is what the trigger comes to mean.
PHRASES = (
    "[trigger] {}", "a {}, [trigger]", "[trigger] drawing of a {}", "a [trigger] of a {}",
    "picture of a {}, [trigger]",
)


def save(folder: Path, name: str, image: Image.Image, caption: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.tmp", "JPEG", quality=90, subsampling=0, optimize=True)
    (folder / f"{name}.tmp").replace(folder / f"{name}.jpg")
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def contact_sheet(rows: list[list[Image.Image]], width=1320, gap=6) -> Image.Image:
    """Rows of equal pictures, each as wide as the sheet."""
    across = [(width - gap) // len(row) for row in rows]
    down = [(w - gap) * row[0].height // row[0].width + gap for w, row in zip(across, rows, strict=True)]
    sheet = Image.new("RGB", (width, sum(down) + gap), (255, 255, 255))
    for i, row in enumerate(rows):
        for k, image in enumerate(row):
            small = image.resize((across[i] - gap, down[i] - gap), Image.Resampling.LANCZOS)
            sheet.paste(small, (gap + k * across[i], gap + sum(down[:i])))
    palette = sheet.quantize(256, kmeans=4)
    return sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def main() -> None:
    cards = [tarot(compose) for compose in CARDS]
    prints = []
    for i, (subject, *look) in enumerate(PRINTS):
        name = f"{i:02d}_{subject}"
        prints.append((name, subject, woodcut(subject, *look, np.random.default_rng(crc32(name.encode())))))
    for style, pictures in (("tarot", cards), ("woodcut", prints)):
        for i, (name, subject, image) in enumerate(pictures):
            save(HERE / style / "images", name, image, PHRASES[i % len(PHRASES)].format(subject))
        print(f"{style}: {len(pictures)} pictures in {HERE / style / 'images'}")
    gold, black = [image for *_, image in cards], [image for *_, image in prints]
    sheet = contact_sheet([gold[:11], gold[11:], black[:10], black[10:]])
    sheet.save(HERE.parent / "assets/styles.png", optimize=True)


if __name__ == "__main__":
    main()

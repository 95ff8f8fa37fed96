"""Sheets of pictures: labelled grids as PNG, drawn with Pillow."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from zo_engine.run import write_atomic

PAPER, INK = (250, 250, 250), (40, 40, 48)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    titles: Sequence[str] = (),
    *,
    side: int = 128,
    gap: int = 6,
) -> Image.Image:
    """One picture of rows of pictures: `columns` are written above, `titles` left of the rows.

    Small pictures are enlarged by whole factors (nearest neighbour: nothing is smoothed away) until their short side
    is at least `side` pixels.
    """
    first = rows[0][0]
    factor = max(1, -(-side // min(first.size)))
    width, height = first.width * factor, first.height * factor
    font = ImageFont.load_default(size=13)
    left = 0 if not titles else 110
    wrapped = [textwrap.wrap(text, max(8, width // 7)) for text in columns]
    top = 0 if not columns else 8 + 16 * max(len(lines) for lines in wrapped)
    count = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + count * (width + gap) + gap, top + len(rows) * (height + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(wrapped):
        for n, line in enumerate(lines):
            draw.text((left + gap + c * (width + gap) + width / 2, 6 + 16 * n), line, INK, font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + gap + r * (height + gap)
        if titles:
            text = "\n".join(textwrap.wrap(titles[r], 15))
            draw.multiline_text((8, y + height / 2), text, INK, font, anchor="lm")
        for c, picture in enumerate(row):
            large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (left + gap + c * (width + gap), y))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    tall = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    y = 0
    for sheet in sheets:
        tall.paste(sheet, (0, y))
        y += sheet.height
    return tall


def save_png(picture: Image.Image, path: Path, **facts: str) -> Path:
    """Written whole or not at all; `facts` (prompt, seed, step...) go into the PNG's text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, optimize=True)
    write_atomic(Path(path), buffer.getvalue())
    return Path(path)

"""Pictures and captions as people have them: bad files refused by name, odd ones read right, all fitted."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import warnings as python_warnings
import zlib
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageStat

from zo_engine import dataset
from zo_engine.dataset import DataError, Picture


def drawing(size=(48, 32)) -> Image.Image:
    """A picture without any symmetry, in plain colours that every format keeps."""
    image = Image.new("RGB", size, (230, 220, 60))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size[0] // 2, size[1] // 2), fill=(200, 40, 40))
    draw.rectangle((0, size[1] * 3 // 4, size[0] // 4, size[1]), fill=(30, 60, 180))
    return image


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for headers that lie and depths that Pillow does not write."""
    chunk = lambda tag, data: (  # noqa: E731
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
    )
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return max(ImageStat.Stat(ImageChops.difference(a, b)).mean)


GOOD = encoded(drawing(), "PNG")
NOISE = Image.effect_noise((200, 200), 90)


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(folder: Path, **given) -> dict[str, tuple[str, str]]:
    return {p.path.name: (p.caption, p.caption_source) for p in dataset.read(folder, **given)}


unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure


# What is refused

FINE = {"quality": 95, "subsampling": 0}
TWO_FRAMES = {"save_all": True, "append_images": [drawing().transpose(Image.Transpose.ROTATE_180)]}
REFUSED = {
    "zero bytes": ({"bad.png": b""}, ["bad.png is empty (0 bytes)"]),
    "text": ({"bad.png": "I am a text"}, ["bad.png is not a JPEG, PNG, WebP, BMP or GIF picture"]),
    "truncated jpeg": ({"bad.jpg": encoded(NOISE, "JPEG")[:5000]}, ["bad.jpg is truncated or damaged"]),
    "truncated progressive": ({"bad.jpg": encoded(NOISE, "JPEG", progressive=True)[:9000]}, ["truncated or"]),
    "truncated png": ({"bad.png": encoded(NOISE, "PNG")[:9000]}, ["bad.png is truncated or damaged"]),
    "truncated webp": ({"bad.webp": encoded(NOISE, "WEBP")[:3000]}, ["bad.webp is truncated or damaged"]),
    "truncated bmp": ({"bad.bmp": encoded(NOISE, "BMP")[:9000]}, ["bad.bmp is truncated or damaged"]),
    "truncated gif": ({"bad.gif": encoded(NOISE, "GIF")[:9000]}, ["bad.gif is truncated or damaged"]),
    "truncated header": ({"bad.jpg": encoded(NOISE, "JPEG")[:10]}, ["bad.jpg is truncated or damaged"]),
    "four bytes": ({"bad.png": GOOD[:4]}, ["or its beginning is damaged"]),
    "one pixel": (
        {"bad.png": encoded(drawing((1, 1)), "PNG")},
        ["bad.png has only 1x1 pixels", "16 or more"],
    ),
    "narrow": ({"bad.png": encoded(drawing((15, 400)), "PNG")}, ["bad.png has only 15x400 pixels"]),
    "41 megapixels": ({"bad.png": png(8000, 5125, 8, 0, b"")}, ["bad.png has more than 40 megapixels"]),
    "100 megapixels": ({"bad.png": png(10000, 10000, 8, 0, b"")}, ["bad.png has more than 40 megapixels"]),
    "900 megapixels": ({"bad.png": png(30000, 30000, 8, 0, b"")}, ["bad.png has more than 40 megapixels"]),
    "tiff": (
        {"bad.TIF": encoded(drawing(), "TIFF")},
        ["bad.TIF is a TIF file, which is not read; save it as"],
    ),
    "heic": ({"bad.heic": b"\0\0\0\x18ftypheic"}, ["bad.heic is a HEIC file"]),
    "two pictures, one stem": (
        {"bad.png": GOOD, "bad.jpg": encoded(drawing(), "JPEG")},
        ["2 of 3 pictures", "bad.jpg shares its name with bad.png", "bad.png shares its name with bad.jpg"],
    ),
    "stems that differ in case": (
        {"bad.png": GOOD, "Bad.jpg": GOOD},
        ["Bad.jpg shares its name with bad.png"],
    ),
    "caption in latin-1": ({"bad.png": GOOD, "bad.txt": b"caf\xe9"}, ["bad.txt is not text in UTF-8"]),
    "utf-16 without mark": ({"bad.png": GOOD, "bad.txt": "café".encode("utf-16-le")}, ["not text in UTF-8"]),
    "odd utf-16": ({"bad.png": GOOD, "bad.txt": b"\xff\xfea"}, ["bad.txt is not text in UTF-8"]),
    "long caption": (
        {"bad.png": GOOD, "bad.txt": "x" * 2001},
        ["bad.txt has 2,001 characters", "2,000 at most"],
    ),
    "huge caption": ({"bad.png": GOOD, "bad.txt": "x" * 70_000}, ["bad.txt is longer than 64 KB"]),
    "two captions": (
        {"bad.png": GOOD, "bad.txt": "a", "BAD.TXT": "b"},
        ["has two captions, BAD.TXT and bad.txt"],
    ),
    "broken line": (
        {"metadata.jsonl": '{"file_name": "good.png", "text": "a"}\n\n{"file_name": "go'},
        [" cannot be used: metadata.jsonl line 3 is not valid JSON"],
    ),
    "deep line": ({"metadata.jsonl": "[" * 100_000}, ["metadata.jsonl line 1 is not valid JSON"]),
    "no file name": ({"metadata.jsonl": '["a"]'}, ['line 1 has no "file_name"']),
    "no text": ({"metadata.jsonl": '{"file_name": "good.png", "text": 3}'}, ["line 1 has no caption"]),
    "long line": (
        {"metadata.jsonl": json.dumps({"file_name": "good.png", "text": "x" * 2001})},
        ["line 1 has 2,001 characters"],
    ),
    "captioned twice": (
        {
            "metadata.jsonl": '{"file_name": "good.png", "text": "a"}',
            "captions.jsonl": '{"file_name": "good.png", "text": "b"}',
        },
        ["metadata.jsonl line 1 gives 'good.png' a second, different caption"],
    ),
    "missing file": (
        {"metadata.jsonl": '{"file_name": "gone.png", "text": ""}'},
        ["line 1 names 'gone.png', which"],
    ),
    "traversal": (
        {"metadata.jsonl": '{"file_name": "../a.png", "text": ""}'},
        ["'../a.png', a path outside"],
    ),
    "other slashes": (
        {"metadata.jsonl": r'{"file_name": "x\\..\\..\\a.png", "text": ""}'},
        ["a path outside"],
    ),
    "absolute path": ({"metadata.jsonl": '{"file_name": "/etc/passwd", "text": ""}'}, ["a path outside"]),
    "zero in a name": (
        {"metadata.jsonl": '{"file_name": "a\\u0000.png", "text": ""}'},
        ["not among the pictures"],
    ),
    "metadata in latin-1": ({"metadata.jsonl": b"\xe9"}, ["metadata.jsonl is not text in UTF-8"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_clear_sentence(tmp_path, case):
    files, fragments = REFUSED[case]
    if case == "two captions" and (tmp_path / "a").write_text("") == 0 and (tmp_path / "A").exists():
        pytest.skip("this file system does not tell names apart by case")
    fill(tmp_path, {"good.png": GOOD, "good.txt": "fine"} | files)
    with pytest.raises(DataError) as error:
        dataset.read(tmp_path)
    sentence = str(error.value)
    assert all(fragment in sentence for fragment in fragments), sentence
    assert "\n" not in sentence and len(sentence) < 400
    if "bad" in "".join(files):  # the page still gets the good one
        good, problems = dataset.scan(tmp_path)
        assert [p.path.name for p in good] == ["good.png"] and len(problems) == len(set(problems)) > 0


def test_what_is_no_folder_of_pictures(tmp_path):
    fill(tmp_path, {"one.png": GOOD, "empty/notes.txt": "", "plain/inner/a.png": GOOD})
    for folder, fragment in {
        tmp_path / "gone": "there is no folder of pictures at",
        "": "there is no folder of pictures at ''",
        "zero\0": "there is no folder of pictures at",
        tmp_path / "one.png": "one.png is a file; give the folder",
        tmp_path / "empty": "there are no pictures in",
        tmp_path / "plain": "subfolders like 10_name",
    }.items():
        with pytest.raises(DataError, match=fragment.replace("(", r"\(")):
            dataset.read(folder)
    assert dataset.scan(tmp_path / "empty") == ([], [])


def test_the_sentence_counts_and_names_the_first_few(tmp_path):
    fill(tmp_path, {f"{i}.png": b"" if i < 5 else GOOD for i in range(9)})
    with pytest.raises(DataError) as error:
        dataset.read(tmp_path, trigger="x")
    first = "; ".join(f"{i}.png is empty (0 bytes)" for i in range(3))
    assert str(error.value) == f"5 of 9 pictures cannot be used: {first}; and 2 more"


def test_folders_and_pipes_named_like_files(tmp_path):
    fill(tmp_path, {"good.png": GOOD, "folder.png/inner.png": GOOD, "good.txt/x": "", "10_a.png/b.png": GOOD})
    expected = {"10_a.png": "is a folder", "folder.png": "is a folder", "good.png": "good.txt is a folder"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        expected["pipe.png"] = "is not a regular file"
    pictures, problems = dataset.scan(tmp_path)
    assert not pictures and [p.path.name for p in problems] == list(expected)
    assert all(expected[p.path.name] in p.message for p in problems)


def test_links_do_not_lead_outside(tmp_path):
    fill(
        tmp_path,
        {"out/a.png": GOOD, "out/a.txt": "secret", "out/m.jsonl": "{", "in/real.png": GOOD, "in/b.png": GOOD},
    )
    root = tmp_path / "in"
    try:
        (root / "alias.png").symlink_to(root / "real.png")
    except OSError:
        pytest.skip("links need a privilege on this system")
    for link, target in {
        "link.png": "a.png", "b.txt": "a.txt", "metadata.jsonl": "m.jsonl", "5_more": ".", "gone.jpg": "n.jpg"
    }.items():  # fmt: skip
        (root / link).symlink_to(tmp_path / "out" / target)
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    pictures, problems = dataset.scan(root)
    assert [p.path.name for p in pictures] == ["alias.png", "b.png", "real.png"]
    assert {p.caption for p in pictures} == {""}
    outside = {p.path.name for p in problems if "is a link to outside of the folder" in p.message}
    assert outside == {"link.png", "b.txt", "metadata.jsonl", "5_more", "gone.jpg"}
    assert {p.path.name for p in problems} - outside == {"dangling.png", "loop.png"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unreadable(tmp_path):
    fill(tmp_path, {"a.png": GOOD, "b.png": GOOD, "b.txt": "b", "3_c/c.png": GOOD})
    for name in ("a.png", "b.txt", "3_c"):
        (tmp_path / name).chmod(0)
    pictures, problems = dataset.scan(tmp_path)
    (tmp_path / "3_c").chmod(0o700)
    assert not pictures and all("cannot be read: Permission denied" in p.message for p in problems)
    assert [p.path.name for p in problems] == ["3_c", "a.png", "b.png"]


def test_a_bomb_is_not_decoded_and_nothing_global_stays(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, list(python_warnings.filters)  # both are of the whole process
    fill(tmp_path, {"a.png": png(10000, 10000, 8, 0, b""), "b.png": png(30000, 30000, 8, 0, b"")})
    with python_warnings.catch_warnings(record=True) as said:
        python_warnings.simplefilter("always")
        assert len(dataset.scan(tmp_path)[1]) == 2
    assert not said and (Image.MAX_IMAGE_PIXELS, list(python_warnings.filters)) == before


# What is handled


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def grey16() -> bytes:
    levels = [round(x * 65535 / 47) for x in range(48)]
    return png(48, 20, 16, 0, b"".join(b"\0" + struct.pack(">48H", *levels) for _ in range(20)))


def half_clear(mode: str) -> Image.Image:
    image = drawing().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return flat


def palette_with_alpha() -> tuple[bytes, Image.Image]:
    image = drawing().quantize(8)
    alphas = bytes([0, 90, 200, 255, 255, 255, 255, 255])
    expected = Image.new("RGB", image.size)
    colours = image.getpalette()
    mix = [[(c * a + 255 * (255 - a)) / 255 for c in colours[3 * i : 3 * i + 3]] for i, a in enumerate(alphas[:3])]
    for x in range(image.width):
        for y in range(image.height):
            i = image.getpixel((x, y))
            rgb = mix[i] if i < 3 else colours[3 * i : 3 * i + 3]
            expected.putpixel((x, y), tuple(round(c) for c in rgb))
    return encoded(image, "PNG", transparency=alphas), expected


GREY = Image.merge("RGB", [Image.frombytes("L", (48, 20), bytes(round(x * 255 / 47) for x in range(48)) * 20)] * 3)
FADED = half_clear("RGBA")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ODD_PROFILE = SRGB[:16] + b"\xff" * 4 + SRGB[20:]  # the name of its colour space is no text
HANDLED = {  # name: (bytes, what must come out, tolerance in mean levels)
    "rgb.png": (GOOD, drawing(), 0),
    "wrong-suffix.jpg": (GOOD, drawing(), 0),
    "UPPER.JPEG": (encoded(drawing(), "JPEG", **FINE), drawing(), 1),
    "windows.jfif": (encoded(drawing(), "JPEG", **FINE), drawing(), 1),
    "phone.jpg": (encoded(drawing(), "MPO", **FINE, **TWO_FRAMES), drawing(), 1),
    "cmyk.jpg": (encoded(drawing().convert("CMYK"), "JPEG", **FINE), drawing(), 1),
    "grey.jpg": (encoded(drawing().convert("L"), "JPEG", **FINE), drawing().convert("L").convert("RGB"), 1),
    "bits.png": (encoded(NOISE.convert("1"), "PNG"), NOISE.convert("1").convert("RGB"), 0),
    "grey16.png": (grey16(), GREY, 0),
    "rgb16.png": (png(16, 16, 16, 2, (b"\0" + b"\xc8\x11\x28\x22\x28\x33" * 16) * 16), plain(200, 40, 40), 0),
    "palette.png": (encoded(drawing().quantize(8), "PNG"), drawing(), 0),
    "palette-alpha.png": (*palette_with_alpha(), 0.6),
    "rgba.png": (encoded(FADED, "PNG"), over_white(FADED), 0.6),
    "la.png": (encoded(half_clear("L"), "PNG"), over_white(half_clear("L")), 0.6),
    "alpha.webp": (encoded(FADED, "WEBP", lossless=True, exact=True), over_white(FADED), 0.6),
    "animated.gif": (encoded(drawing(), "GIF", **TWO_FRAMES), drawing(), 0),
    "animated.webp": (encoded(drawing(), "WEBP", lossless=True, **TWO_FRAMES), drawing(), 0),
    "animated.png": (encoded(drawing(), "PNG", **TWO_FRAMES), drawing(), 0),
    "rgb.bmp": (encoded(drawing(), "BMP"), drawing(), 0),
    "palette.bmp": (encoded(drawing().quantize(8), "BMP"), drawing(), 0),
    "srgb.png": (encoded(drawing(), "PNG", icc_profile=SRGB), drawing(), 1),
    "mismatch.jpg": (encoded(drawing().convert("CMYK"), "JPEG", icc_profile=SRGB, **FINE), drawing(), 1),
    "palette-with-profile.png": (encoded(drawing().quantize(8), "PNG", icc_profile=SRGB), drawing(), 1),
    "odd-profile.png": (encoded(drawing(), "PNG", icc_profile=ODD_PROFILE), drawing(), 0),
    "broken-profile.png": (encoded(drawing(), "PNG", icc_profile=b"no profile" * 20), drawing(), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDLED)
def test_odd_formats_come_out_right(tmp_path, name):
    content, expected, tolerance = HANDLED[name]
    fill(tmp_path, {name: content})
    (picture,) = dataset.read(tmp_path, trigger="x")
    image = dataset.open_picture(picture.path)
    assert image.mode == "RGB" and image.size == picture.size == expected.size
    assert difference(image, expected) <= tolerance


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on odd EXIF tags
def test_damage_of_any_kind_is_a_sentence_and_is_found_by_the_scan(tmp_path):
    random = Random(0)
    seeds, file, refused = [content for content, *_ in HANDLED.values()], tmp_path / "a.png", 0
    for _ in range(400):
        data = bytearray(random.choice(seeds))
        for _ in range(random.choice([1, 4, 16])):
            data[random.randrange(min(len(data), random.choice([64, 10**6])))] = random.randrange(256)
        file.write_bytes(data[: random.choice([len(data), random.randrange(1, len(data))])])
        pictures, problems = dataset.scan(tmp_path)
        refused += len(problems)
        for picture in pictures:
            assert dataset.open_picture(file).size == picture.size
    assert 100 < refused < 390


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, kind, orientation):
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # 6 says "turn me by 270": so it was stored turned by 90
    upright = drawing()
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    file = tmp_path / f"a.{kind.lower()}"
    stored.save(file, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else FINE))
    (picture,) = dataset.read(tmp_path, trigger="x")
    image = dataset.open_picture(file)
    assert picture.size == image.size == upright.size and difference(image, upright) < 1


def test_an_embedded_profile_is_applied(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    green = bytearray(SRGB)  # red and green primaries exchanged: what was red must come out green
    tags = {SRGB[at : at + 4]: slice(at + 4, at + 12) for at in range(132, 132 + 12 * SRGB[131], 12)}
    green[tags[b"rXYZ"]], green[tags[b"gXYZ"]] = SRGB[tags[b"gXYZ"]], SRGB[tags[b"rXYZ"]]
    red = Image.new("RGB", (20, 20), (200, 40, 40))
    fill(
        tmp_path,
        {
            "a.png": encoded(red, "PNG", icc_profile=bytes(green)),
            "b.png": encoded(red, "PNG", icc_profile=lab),
        },
    )
    assert difference(dataset.open_picture(tmp_path / "a.png"), Image.new("RGB", (20, 20), (40, 200, 40))) <= 2
    assert dataset.open_picture(tmp_path / "b.png").getpixel((5, 5)) == (200, 40, 40)


def test_open_picture_names_what_it_cannot_open(tmp_path):
    fill(tmp_path, {"a.png": b"", "b.jpg": encoded(NOISE, "JPEG")[:5000]})
    for name, fragment in {
        "a.png": "is empty",
        "b.jpg": "is truncated",
        "c.png": "is not a regular file",
    }.items():
        with pytest.raises(DataError, match=f"{name} {fragment}"):
            dataset.open_picture(tmp_path / name)


# Captions


def test_captions_and_their_sources(tmp_path):
    fill(
        tmp_path,
        dict.fromkeys(("a.png", "B.PNG", "c.webp", "d.png", "e.png", "f.png", "g.png", "h.i.png"), GOOD),
    )
    lines = [
        {"file_name": n, k: f"line {n}"} for n, k in [("a.png", "text"), ("d.png", "caption"), ("e.png", "prompt")]
    ]
    moon = json.dumps({"file_name": "x.png", "text": "line x \ud800"})
    fill(tmp_path, {
        "a.txt": "sidecar a", "a.caption": "not this", "b.TXT": "\ufeffsidecar b",
        "c.caption": "two\r\nlines\t\x07 here\n", "f.txt": "", "h.i.txt": "\ufeffdäh".encode("utf-16-le"),
        "metadata.jsonl": "\n".join(map(json.dumps, lines)),
        "20_red moon/x.png": GOOD, "20_red moon/y.png": GOOD, "20_red moon/y.txt": "sidecar y",
        "20_red moon/captions.jsonl": moon, "1_z/z.png": GOOD,
        "._a.png": b"", ".hidden.png": b"", "Thumbs.db": b"", "2024_trip/n.png": b"", "__MACOSX/._a.png": b"",
    })  # fmt: skip
    expected = {
        "x.png": ("line x", "metadata"), "y.png": ("sidecar y", "sidecar"), "z.png": ("z", "folder"),
        "a.png": ("sidecar a", "sidecar"), "B.PNG": ("sidecar b", "sidecar"),
        "c.webp": ("two lines here", "sidecar"), "d.png": ("line d.png", "metadata"),
        "e.png": ("line e.png", "metadata"), "f.png": ("", "sidecar"), "g.png": ("", "none"),
        "h.i.png": ("däh", "sidecar"),
    }  # fmt: skip
    pictures, problems = dataset.scan(tmp_path)
    assert not problems
    assert {p.path.name: (p.caption, p.caption_source) for p in pictures} == expected
    assert {p.path.name: p.repeats for p in pictures if p.repeats != 1} == {"x.png": 20, "y.png": 20}

    filled = captions(tmp_path, trigger="sks", caption="a card, [trigger]")
    assert filled["a.png"] == ("sks, sidecar a", "sidecar")
    assert filled["f.png"] == ("sks", "sidecar")  # an empty sidecar: the trigger alone
    assert filled["g.png"] == filled["z.png"] == ("a card, sks", "recipe")
    assert captions(tmp_path, trigger="sks")["z.png"] == ("sks, z", "folder")
    with pytest.raises(DataError, match=r"1 of 11 pictures have no caption \(g.png\): write a .txt file"):
        dataset.read(tmp_path)


def test_order_is_the_same_whatever_the_disk_says(tmp_path):
    names = ["b.png", "A.png", "10.png", "9.png", "ü.png", "3_x/a.png", "C.jpg"]
    for i, order in enumerate([names, names[::-1]]):
        fill(tmp_path / str(i), dict.fromkeys(order, GOOD))
    found = [
        [p.path.relative_to(tmp_path / str(i)).as_posix() for p in dataset.read(tmp_path / str(i), trigger="x")]
        for i in (0, 1)
    ]
    assert found[0] == found[1] == ["10.png", "3_x/a.png", "9.png", "A.png", "b.png", "C.jpg", "ü.png"]


def test_accents_match_in_either_form(tmp_path):
    fill(tmp_path, {"caf\u00e9.png": GOOD, "cafe\u0301.txt": "composed and not"})
    assert [p.caption for p in dataset.read(tmp_path)] == ["composed and not"]


@pytest.mark.parametrize(
    "caption, trigger, expected",
    [
        ("a [trigger] card", "sks", "a sks card"),
        ("a [Trigger] card of [trigger]", "s\\1", "a s\\1 card of s\\1"),
        ("a card", "sks", "sks, a card"),
        ("", "sks", "sks"),
        ("", "", ""),
        ("a card, in sks look", "sks", "a card, in sks look"),
        ("asksb", "sks", "sks, asksb"),
        ("[trigger], a card", "", "a card"),
        ("a card, [trigger], at night", "", "a card, at night"),
        ("a [trigger] card , [trigger]", "", "a card"),
        ("[trigger]", " ", ""),
        ("1,000 cups", "", "1,000 cups"),
        ("a card", "  two \n words ", "two words, a card"),
    ],
)
def test_trigger(caption, trigger, expected):
    assert dataset.fill_trigger(caption, trigger) == expected


# Buckets


@unhurried
@given(st.integers(1, 256), st.sampled_from([8, 16, 64]))
def test_square_resolution_gives_shapes_of_one_area(steps, multiple):
    side = 16 * math.ceil(steps * multiple / 16)
    if side % multiple or side > 4096:
        side = 512
    found = dataset.buckets(str(side), multiple)
    assert (side, side) in found and len(found) == len(set(found)) <= 13
    assert {(h, w) for w, h in found} == set(found)
    for w, h in found:
        assert w % multiple == h % multiple == 0
        slack = (1 + multiple / 2 / min(w, h, side / 2**0.5)) ** 2  # each side is off by half a multiple at most
        assert 1 / slack <= w * h / side**2 <= slack and 0.5 / slack <= w / h <= 2 * slack


def test_resolutions():
    assert dataset.buckets("64x64, 64X96,64x64", 16) == [(64, 64), (64, 96)]
    assert dataset.buckets("64", 16) == [(48, 96), (48, 80), (64, 64), (80, 48), (96, 48)]
    for bad in ("", "big", "0", "500", "64x", "64x64,", "64x63", "-64", "8192", "64x64x64", "٦٤"):
        with pytest.raises(DataError, match="resolution"):
            dataset.buckets(bad, 16)
    assert dataset.buckets("64", 16, most=80) == [(48, 80), (64, 64), (80, 48)]  # a model that has no room for more
    for large in ("96", "64x96"):
        with pytest.raises(DataError, match="resolution 96 is not possible: .* multiples of 16 from 16 to 80"):
            dataset.buckets(large, 16, most=80)


@unhurried
@given(st.floats(0.5, 2), st.sampled_from(["512", "768", "1024"]))
def test_in_the_usual_range_nothing_is_cut(aspect, resolution):
    size = (round(3000 * aspect**0.5), round(3000 / aspect**0.5))
    bucket = dataset.choose_bucket(size, dataset.buckets(resolution, 16))
    assert dataset.crop_box(size, bucket) == (0, 0, *size)


def test_choose_bucket():
    both = [(64, 64), (64, 96), (128, 192), (256, 256)]
    assert dataset.choose_bucket((512, 768), both) == (128, 192)  # the largest that does not enlarge
    assert dataset.choose_bucket((100, 150), both) == (64, 96)
    assert dataset.choose_bucket((20, 30), both) == (64, 96)  # all enlarge: the smallest
    assert dataset.choose_bucket((900, 800), both) == (256, 256)


SIDE = st.integers(16, 700)


@unhurried
@given(SIDE, SIDE, st.integers(1, 9), st.integers(1, 9))
def test_fit_keeps_all_or_the_centre(width, height, across, down):
    bucket = (16 * across, 16 * down)
    left, top, right, bottom = dataset.crop_box((width, height), bucket)
    assert math.isclose(left, width - right, abs_tol=1e-6) and math.isclose(top, height - bottom, abs_tol=1e-6)
    mismatch = width * bucket[1] / (height * bucket[0])
    if max(mismatch, 1 / mismatch) <= dataset.STRETCH:
        assert (left, top, right, bottom) == (0, 0, width, height)
    else:
        assert math.isclose((right - left) * bucket[1], (bottom - top) * bucket[0], rel_tol=1e-9)
        assert math.isclose(right - left, width) or math.isclose(bottom - top, height)
    image = dataset.fit(Image.new("RGB", (width, height), (9, 99, 199)), bucket)
    assert image.size == bucket and image.getextrema() == ((9, 9), (99, 99), (199, 199))


def test_borders_survive_a_slight_stretch():
    card = Image.new("RGB", (520, 750), "white")
    ImageDraw.Draw(card).rectangle((0, 0, 519, 749), outline="black", width=20)
    small = dataset.fit(card, (64, 96))
    assert all(small.getpixel(xy)[0] < 60 for xy in [(0, 48), (63, 48), (32, 0), (32, 95)])
    wide = dataset.fit(Image.effect_noise((3000, 600), 50).convert("RGB"), (64, 64))
    assert wide.size == (64, 64)


def test_warnings_say_what_is_cut_and_enlarged():
    sizes = {
        "fine": (640, 640),
        "close": (610, 640),
        "wide": (1000, 500),
        "small": (32, 32),
        "near": (62, 64),
    }
    pictures = [Picture(Path(f"{name}.png"), "", size, "none") for name, size in sizes.items()]
    assert dataset.warnings(pictures, [(64, 64)]) == [
        "1 of 5 pictures fit the shape of no bucket and are cut: wide.png (50% lost)",
        "1 of 5 pictures are too small and get enlarged: small.png (32x32 to 64x64)",
    ]
    assert dataset.warnings(pictures[:2], [(64, 64)]) == []


def test_without_torch():
    code = "import sys, zo_engine.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0

"""A folder of pictures with captions beside them: found, checked, opened, and fitted to buckets.

    cards/sun.png  cards/sun.txt    a caption is a text file of the same stem (.txt, then .caption), in UTF-8
    cards/metadata.jsonl            or a line {"file_name": "sun.png", "text": "..."} (also captions.jsonl)
    cards/10_moon/...               or the name of a folder NN_name, whose pictures count NN times

A sidecar wins over a line of metadata, that over the recipe's caption, that over the folder's name. An empty
sidecar says that the picture has no caption: the trigger alone. Hidden files, other folders are passed over.
What cannot be used is named by `scan`, for the page, and refused by `read`, for training. Imports no torch.
"""

import json
import math
import os
import re
import struct
import unicodedata
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from warnings import catch_warnings, simplefilter

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # by content; a suffix only says: meant as a picture
UNREAD = {".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"}  # a picture to its owner: named as a problem
PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"} | UNREAD
SIDECARS = {".txt", ".caption"}
METADATA = {"metadata.jsonl", "captions.jsonl"}
REPEATS = re.compile(r"([1-9][0-9]{0,2})_(.+)")  # three digits: 2024_holiday does not mean 2024 times
MIN_SIDE, MAX_SIDE, MAX_PIXELS, MAX_CAPTION = 16, 4096, 40_000_000, 2_000
STRETCH = 1.08  # a mismatch of aspect up to here is stretched: invisible, and the borders of a card survive

# What Pillow's readers raise on damaged bytes that begin like a picture; from fuzzing and their source.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)


class DataError(ValueError):
    """Pictures or captions that cannot be used; one sentence that says which, why, and what to do."""


@dataclass(frozen=True)
class Picture:
    """A usable picture. `size` is (width, height) in pixels as it is seen, after its EXIF rotation."""

    path: Path
    caption: str  # one line, "" for none
    size: tuple[int, int]
    caption_source: str  # sidecar, metadata, recipe, folder, none
    repeats: int = 1


@dataclass(frozen=True)
class Problem:
    """Why a file cannot be used; `message` is made to stand behind the file's name."""

    path: Path
    message: str


def read(folder: Path | str, trigger: str = "", caption: str = "") -> list[Picture]:
    """The pictures to train on, sorted, with their final captions; `caption` is for those that have none.

    Raises DataError if anything in the folder cannot be used, naming the first few problems.
    """
    pictures, problems = scan(folder)
    if problems:
        bad = sum(p.path.suffix.lower() in PICTURES for p in problems)
        head = f"{bad} of {bad + len(pictures)} pictures" if bad else str(folder)
        listed = _few([f"{_name(p.path, folder)} {p.message}" for p in problems], "; ")
        raise DataError(f"{head} cannot be used: {listed}")
    if not pictures:
        kinds = ", ".join(sorted(PICTURES - UNREAD))
        raise DataError(f"there are no pictures in {folder}: no {kinds}, also not in subfolders like 10_name")
    bare = [_name(p.path, folder) for p in pictures if p.caption_source == "none"]
    if bare and not caption and not trigger:
        raise DataError(
            f"{len(bare)} of {len(pictures)} pictures have no caption ({_few(bare)}): write a .txt file "
            "of the same name for each, or give a trigger or a caption for all"
        )
    if caption:
        weak, given = ("folder", "none"), {"caption": _one_line(caption), "caption_source": "recipe"}
        pictures = [replace(p, **given) if p.caption_source in weak else p for p in pictures]
    return [replace(p, caption=fill_trigger(p.caption, trigger)) for p in pictures]


def scan(folder: Path | str) -> tuple[list[Picture], list[Problem]]:
    """What can be used and what cannot, both sorted; each picture is decoded once.

    Raises DataError only if there is no such folder, or it cannot be listed.
    """
    if os.path.isfile(folder):
        raise DataError(f"{folder} is a file; give the folder that holds the pictures")
    if not str(folder) or not os.path.isdir(folder):
        raise DataError(f"there is no folder of pictures at {str(folder)!r}")
    root, problems = Path(os.path.realpath(folder)), []
    try:
        files = list(_files(root, root, problems))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None

    candidates = [f for f in files if f[0].suffix.lower() in PICTURES]
    names = {_key(path) for path, *_ in candidates}
    same_stem, metadata = defaultdict(list), {}
    for path, *_ in files:
        same_stem[_key(path.with_suffix(""))].append(path)
        if path.name.lower() in METADATA:
            problems += [Problem(path, message) for message in _read_metadata(path, root, names, metadata)]

    pictures = []
    for path, repeats, folder_caption in candidates:
        beside = [p for p in same_stem[_key(path.with_suffix(""))] if p != path]
        sidecars = [p for p in beside if p.suffix.lower() in SIDECARS]
        try:
            size = _measure(path)
            if twins := [p.name for p in beside if p.suffix.lower() in PICTURES - UNREAD]:
                raise DataError(f"shares its name with {twins[0]}, so a caption would serve both; rename one")
            if sidecars:
                caption, source = _read_sidecar(sidecars), "sidecar"
            elif _key(path) in metadata:
                caption, source = metadata[_key(path)], "metadata"
            else:
                caption, source = _one_line(folder_caption), "folder" if folder_caption else "none"
            pictures.append(Picture(path, caption, size, source, repeats))
        except DataError as error:
            problems.append(Problem(path, str(error)))
    return pictures, sorted(problems, key=lambda p: (_key(p.path), str(p.path)))


def _files(root: Path, folder: Path, problems: list[Problem]) -> Iterator[tuple[Path, int, str]]:
    """(path, repeats, folder's caption) of what counts in the root and its NN_name folders, sorted."""
    counts = REPEATS.fullmatch(folder.name) if folder != root else None
    for path in sorted(folder.iterdir(), key=lambda p: (_key(p), p.name)):
        known = path.suffix.lower() in PICTURES | SIDECARS or path.name.lower() in METADATA
        inner = not known and folder == root and REPEATS.fullmatch(path.name) and path.is_dir()
        if path.name.startswith(".") or not (known or inner):
            continue
        if not Path(os.path.realpath(path)).is_relative_to(root):
            problems.append(Problem(path, "is a link to outside of the folder; put a copy here instead"))
        elif known:
            yield path, int(counts[1]) if counts else 1, counts[2] if counts else ""
        else:
            try:
                yield from _files(root, path, problems)
            except OSError as error:
                problems.append(Problem(path, f"cannot be read: {error.strerror}"))


def _key(path: Path) -> str:
    """The same for names that some file system would not tell apart, by case or by the form of an accent."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _name(path: Path, folder: Path | str) -> str:
    """The path as it is named to people: relative to the folder, printable everywhere."""
    return _one_line(os.fsencode(os.path.relpath(path, os.path.realpath(folder))).decode("utf-8", "replace"))


def _few(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:3] + ([f"and {len(items) - 3} more"] if len(items) > 3 else []))


# Captions


def fill_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger at `[trigger]`, or in front where it has neither that nor the trigger.

    Without a trigger the placeholder goes, with the comma and the spaces around it.
    """
    trigger = " ".join(trigger.split())
    filled, places = re.subn(r"\[trigger\]", lambda _: trigger, caption, flags=re.IGNORECASE)
    if places and not trigger:
        parts = (" ".join(part.split()) for part in filled.split(","))
        return ", ".join(part for part in parts if part)
    if places or not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return filled
    return f"{trigger}, {caption}" if caption else trigger


def _read_sidecar(paths: list[Path]) -> str:
    texts = [path for path in paths if path.suffix.lower() == ".txt"] or paths
    if len(texts) > 1:
        raise DataError(f"has two captions, {texts[0].name} and {texts[1].name}; keep one of them")
    try:
        return _caption(_text(texts[0], 2**16))
    except DataError as error:
        raise DataError(f"has a caption that cannot be used: {texts[0].name} {error}") from None


def _read_metadata(path: Path, root: Path, names: set[str], captions: dict[str, str]) -> list[str]:
    """Add the captions of a .jsonl file, by the key of their picture; gives what is wrong, line by line.

    A name in it is compared with the names that were found, never looked up on disk.
    """
    try:
        lines = _text(path, 2**26).split("\n")  # not splitlines: JSON may hold U+2028 as it is
    except DataError as error:
        return [str(error)]
    wrong = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                name, caption = _entry(line)
                target = Path(os.path.normpath(path.parent / name.replace("\\", "/")))
                if not target.is_relative_to(root):
                    raise DataError(f"names {name[:80]!r}, a path outside of the folder")
                if _key(target) not in names:
                    raise DataError(f"names {name[:80]!r}, which is not among the pictures here")
                if captions.setdefault(_key(target), caption) != caption:
                    raise DataError(f"gives {name[:80]!r} a second, different caption")
        except DataError as error:
            wrong.append(f"line {number} {error}")
    return wrong


def _entry(line: str) -> tuple[str, str]:
    """(file name, caption) of one line of metadata."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise DataError('has no "file_name"; it must look like {"file_name": "a.png", "text": "a caption"}')
    caption = next((entry[key] for key in ("text", "caption", "prompt") if key in entry), None)
    if not isinstance(caption, str):
        raise DataError('has no caption; give it as "text"')
    return entry["file_name"], _caption(caption)


def _caption(text: str) -> str:
    caption = _one_line(text)
    if len(caption) > MAX_CAPTION:
        raise DataError(f"has {len(caption):,} characters; shorten it to {MAX_CAPTION:,} at most")
    return caption


def _one_line(text: str) -> str:
    """Line breaks, control characters and lone surrogates become spaces, runs of spaces one."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text).split())


def _text(path: Path, limit: int) -> str:
    """A text file of at most `limit` bytes: UTF-8, or UTF-16 that says so by its byte order mark."""
    try:
        _refuse_special(path)
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise DataError(f"is longer than {limit // 1024:,} KB; shorten it")
    try:
        text = data.decode("utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark reads as UTF-8 with zeros
        raise DataError("is not text in UTF-8; save it again in that encoding")
    return text


def _refuse_special(path: Path) -> None:
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError("is a folder, not a file" if path.is_dir() else "is not a regular file")


# Pictures


def open_picture(path: Path | str) -> Image.Image:
    """The picture in RGB as a viewer shows it: rotated by its EXIF tag, first frame, transparency over white.

    An embedded colour profile is applied, to sRGB: without it photos in Display P3 are pale and print files
    in CMYK garish, and a style would learn that. Raises DataError.
    """
    try:
        with _opened(Path(path)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def _measure(path: Path) -> tuple[int, int]:
    """(width, height) as seen, after decoding everything once: only that shows a truncated file."""
    with _opened(path) as image:
        width, height = image.size
        image.draft(None, (width // 8, height // 8))  # JPEG: reads every byte, does less work
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with its header checked and no pixel decoded; what fails inside becomes a DataError."""
    try:
        _refuse_special(path)
        if path.stat().st_size == 0:
            raise DataError("is empty (0 bytes)")
        if path.suffix.lower() in UNREAD:
            raise DataError(f"is a {path.suffix[1:].upper()} file, which is not read; save it as PNG or JPEG")
        with open(path, "rb") as file, catch_warnings():
            simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if min(width, height) < MIN_SIDE:
                    raise DataError(f"has only {width}x{height} pixels; each side needs {MIN_SIDE} or more")
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"has more than {MAX_PIXELS // 10**6} megapixels; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError("is not a JPEG, PNG, WebP, BMP or GIF picture, or its beginning is damaged") from None
    except DAMAGE as error:
        if isinstance(error, OSError) and error.strerror:  # from the disk, not from Pillow
            raise DataError(f"cannot be read: {error.strerror}") from None
        raise DataError(f"is truncated or damaged ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode that the formats have -> RGB in sRGB, white behind what is transparent."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut at 255 instead of scaling
        image.info.pop("transparency", None)
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
            if (mode == "CMYK") == (image.mode == "CMYK"):
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image.convert(mode), source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, KeyError, UnicodeDecodeError):
            pass  # a broken profile: viewers show the picture without it, so do we
    return image.convert("RGB")


# Buckets


def buckets(resolution: str, multiple: int, most: int = MAX_SIDE) -> list[tuple[int, int]]:
    """The (width, height) in pixels that pictures are fitted to, every side a multiple of `multiple`, at most `most`.

    "512": shapes from 1:2 to 2:1 with about the area of 512x512, each 12 % from the next, so that one in
    that range is within `STRETCH` of one, but for the rounding to `multiple`, and loses nothing.
    "64x64,64x96": exactly these. Raises DataError.
    """
    written = sizes(resolution, multiple, most)
    if "x" in resolution.lower():
        return written
    side = written[0][0]
    roots = [2 ** (step / 12) for step in range(-6, 7)]  # of the aspects 2^-1 to 2^1
    found = [[max(1, round(x / multiple)) * multiple for x in (side * r, side / r)] for r in roots]
    return [shape for shape in dict.fromkeys(map(tuple, found)) if max(shape) <= most]


def sizes(resolution: str, multiple: int, most: int = MAX_SIDE) -> list[tuple[int, int]]:
    """The (width, height) in pixels that a resolution names, each once; one side alone is a square's.

    Raises DataError.
    """
    text = resolution.replace(" ", "").lower()
    if not re.fullmatch(r"[0-9]{1,6}|[0-9]{1,6}x[0-9]{1,6}(,[0-9]{1,6}x[0-9]{1,6})*", text):
        raise DataError(f"resolution {resolution!r} is neither a side like 512 nor a list like 64x64,64x96")
    found = [tuple(map(int, pair.split("x"))) for pair in text.split(",")]
    most = min(most, MAX_SIDE)
    for pixels in (side for size in found for side in size):
        if pixels % multiple or not MIN_SIDE <= pixels <= most:
            possible = f"multiples of {multiple} from {MIN_SIDE} to {most} pixels"
            raise DataError(f"resolution {pixels} is not possible: this model takes {possible}")
    return list(dict.fromkeys(size * 2 if len(size) == 1 else size for size in found))


def choose_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the nearest aspect; among equals the largest that does not enlarge, else the smallest."""

    def rank(bucket: tuple[int, int]) -> tuple[float, int]:
        mismatch = abs(math.log(size[0] * bucket[1] / (size[1] * bucket[0])))
        area = math.prod(bucket)
        return round(mismatch, 6), area if area > math.prod(size) else -area

    return min(buckets, key=rank)


def crop_box(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of what `fit` keeps: all, or the centre in the bucket's aspect."""
    (width, height), (across, down) = size, bucket
    wide, tall = width * down, height * across
    kept_width, kept_height = width, height
    if max(wide, tall) > STRETCH * min(wide, tall):
        kept_width, kept_height = min(width, tall / down), min(height, wide / across)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def fit(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The image at exactly the bucket's size; `warnings` says beforehand what is cut or enlarged."""
    box = crop_box(image.size, bucket)
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def held_out(pictures: int, share: float) -> int:
    """How many of so many are held out: two or more of eight or more; of fewer, none: they are too precious."""
    return max(2, round(share * pictures)) if share and pictures >= 8 else 0


def warnings(pictures: list[Picture], buckets: list[tuple[int, int]]) -> list[str]:
    """What fitting does that the pictures' owner may not want: one sentence on cuts, one on enlargement."""
    cut, enlarged = [], []
    for picture in pictures:
        bucket = choose_bucket(picture.size, buckets)
        left, top, right, bottom = crop_box(picture.size, bucket)
        kept = (right - left) * (bottom - top)
        if kept < math.prod(picture.size):
            cut.append(f"{picture.path.name} ({1 - kept / math.prod(picture.size):.0%} lost)")
        if math.prod(bucket) > STRETCH * kept:
            enlarged.append("{} ({}x{} to {}x{})".format(picture.path.name, *picture.size, *bucket))
    says = {"fit the shape of no bucket and are cut": cut, "are too small and get enlarged": enlarged}
    return [f"{len(x)} of {len(pictures)} pictures {what}: {_few(x)}" for what, x in says.items() if x]

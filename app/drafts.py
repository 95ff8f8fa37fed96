"""A draft is a style in the making, as a folder on disk; the page shows what lies here and keeps nothing else.

<runs-dir>/.drafts/<name>/
  recipe.toml   the settings so far; `images` says where the pictures are
  images/       pictures and their captions, unless the recipe names a folder elsewhere on this machine
  texts/        instead of them: a file of texts, unless the recipe names one elsewhere, or a data set of the hub
  thumbs/       small copies for the page, named by what they were made from
  removed/      pictures that were taken out, nothing is deleted

A caption belongs to a picture's name, never to its place in a list. Imports neither torch nor gradio.
"""

import dataclasses
import hashlib
import io
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import RLock

from PIL import Image

from zo_engine import dataset
from zo_engine import recipe as recipes
from zo_engine.dataset import DataError, Picture, Problem
from zo_engine.hub import CHECKOUT, MODELS, find, is_language, resolution, sides
from zo_engine.run import new_name, write_atomic
from zo_engine.texts import HUB, SUFFIXES

RECIPES = {file.parent.name: recipes.load(file) for file in sorted((CHECKOUT / "styles").glob("*/recipe.toml"))}
EXAMPLES = {name: CHECKOUT / "styles" / name for name, recipe in RECIPES.items() if recipe.images}
TEXTS = {file.stem: file for file in sorted((CHECKOUT / "assets" / "texts").glob("*.jsonl"))[::-1]}
TITLES = {"voice": "A sailor's voice", "sentiment": "Good or bad?", "json": "Facts as JSON"}
IMAGE_MODEL, LANGUAGE_MODEL = "tiny-sd3", "tiny-llm"  # what a draft begins with
WELCOME = dataset.PICTURES | dataset.SIDECARS | {".jsonl"}
MAX_FILES, MAX_BYTES = 4000, 2 * 2**30  # of one upload, a ZIP counted as it unpacks
THUMB = 240  # pixels of the longer side
ALIKE = 10  # of 256 bits that may differ between two pictures that look the same


class DraftError(ValueError):
    """Something that cannot be done to a draft; one sentence that says why and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a draft's folder of pictures holds."""

    pictures: dict[str, Picture]  # by name, relative to the folder
    problems: list[Problem]
    thumbs: dict[str, str]  # name -> file in thumbs/
    twins: list[tuple[str, str]]  # names of pictures that look the same

    @property
    def unusable(self) -> list[Path]:
        """The pictures among the problems."""
        return [p.path for p in self.problems if p.path.suffix.lower() in dataset.PICTURES]

    @property
    def captioned(self) -> int:
        return sum(bool(p.caption) for p in self.pictures.values())


class Drafts:
    """All drafts of a folder of runs."""

    def __init__(self, runs: Path):
        self.root = Path(runs).resolve() / ".drafts"

    def names(self) -> list[str]:
        """The drafts, the one that was changed last first."""
        files = [f for f in self.root.glob("*/recipe.toml") if not f.parent.name.startswith(".")]
        return [f.parent.name for f in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True)]

    def open(self, name: str) -> "Draft":
        """An existing draft. Raises DraftError; a name is compared with those that are there, never looked up."""
        if name not in self.names():
            raise DraftError(f"there is no draft {name[:80]!r} any more; load an example or add pictures to begin one")
        return Draft(self.root / name)

    def example(self, name: str) -> "Draft":
        """The bundled set as a draft of its own; one that was loaded before is taken up with its edits."""
        if name not in EXAMPLES | TEXTS:
            raise DraftError(f"there is no example {name[:80]!r}; there are {', '.join(EXAMPLES | TEXTS)}")
        draft = Draft(self.root / name)
        if name in TEXTS:
            if not draft.file.exists():
                shutil.copyfile(TEXTS[name], _made(draft.own_texts / TEXTS[name].name))
                settings = RECIPES[name] if name in RECIPES else language_settings("")
                draft.write(dataclasses.replace(settings, texts=str(draft.own_texts / TEXTS[name].name)))
        elif not draft.file.exists():
            shutil.copytree(EXAMPLES[name] / "images", draft.own_images, dirs_exist_ok=True)
            example = recipes.load(EXAMPLES[name] / "recipe.toml")
            draft.write(dataclasses.replace(example, images=str(draft.own_images)))
        return draft

    def create(self, wish: str, images: str = "") -> "Draft":
        """A new draft, empty or on a folder of pictures of this machine. Raises DataError if there is no such one."""
        if images:
            images = str(Path(images).expanduser().resolve())
            dataset.scan(images)
        draft = Draft(new_name(self.root, wish))
        draft.own_images.mkdir(parents=True)
        settings = recipes.Recipe(images=images or str(draft.own_images), trigger=draft.path.name)
        draft.write(dataclasses.replace(settings, preview_every=pictures_every(settings.steps)))
        return draft

    def create_texts(self, source: str, wish: str = "") -> "Draft":
        """A new draft on a file of texts of this machine, or a data set of the hub. Raises DraftError for neither."""
        path = Path(source).expanduser()
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            source = str(path.resolve())
        elif path.exists() or not HUB.fullmatch(source):
            what = "is not one" if path.exists() else "is not there"
            raise DraftError(
                f"{source} {what}: give a folder of pictures, a file of texts ({', '.join(SUFFIXES)}), or a data set "
                "of the hub as org/name"
            )
        draft = Draft(new_name(self.root, wish or path.stem))
        draft.write(language_settings(source))
        return draft

    def upload_texts(self, file: Path) -> "Draft":
        """A new draft with a copy of a file of texts."""
        draft = Draft(new_name(self.root, file.stem))
        own = _made(draft.own_texts / re.sub(r'[\x00-\x1f<>:"|?*/\\]', "_", file.name)[-120:])
        shutil.copyfile(file, own)
        draft.write(language_settings(str(own)))
        return draft

    def again(self, recipe: recipes.Recipe) -> "Draft":
        """A draft with the data and settings of a recipe: the one that has these pictures or texts, or a new one."""
        for draft in map(self.open, self.names()):
            if (draft.recipe().images, draft.recipe().texts) == (recipe.images, recipe.texts):
                break
        else:
            if recipe.texts:
                draft = self.create_texts(recipe.texts)
            else:
                draft = self.create(Path(recipe.images).name or "my style", recipe.images or "?")
        draft.write(recipe)
        return draft

    def bin(self, name: str) -> None:
        """Take a draft out of the list; its folder is kept under .drafts/.bin."""
        shutil.move(self.open(name).path, new_name(self.root / ".bin", name))


class Draft:
    """One draft."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.file, self.own_images, self.thumbs = path / "recipe.toml", path / "images", path / "thumbs"
        self.own_texts = path / "texts"

    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.file)

    def write(self, recipe: recipes.Recipe) -> None:
        """The recipe, its pictures or texts named relative to it where they are the draft's own."""
        if Path(recipe.images) == self.own_images:
            recipe = dataclasses.replace(recipe, images="images")
        if Path(recipe.texts).parent == self.own_texts:
            recipe = dataclasses.replace(recipe, texts=f"texts/{Path(recipe.texts).name}")
        write_atomic(self.file, recipes.dump(recipe))

    @property
    def of_texts(self) -> bool:
        """Whether it teaches texts, not pictures."""
        return bool(self.recipe().texts)

    def change(self, **settings) -> recipes.Recipe:
        """Set fields of the recipe by name. Raises RecipeError and leaves the file as it was."""
        with _reading:
            recipe = recipes.make(dataclasses.asdict(self.recipe()) | settings, "the page")
            self.write(recipe)
        return recipe

    # Pictures

    def contents(self) -> Contents:
        """Everything in the folder, each picture checked once. Raises DataError if the folder is gone."""
        with _reading:
            return self._contents()

    def _contents(self) -> Contents:
        folder = Path(self.recipe().images)
        mark = _mark(folder)
        if (known := _contents.get(self.path)) and known[0] == mark:
            return known[1]
        pictures, problems = dataset.scan(folder)
        root = Path(os.path.realpath(folder))
        named = {p.path.relative_to(root).as_posix(): p for p in pictures}
        looks = {name: self._thumb(name, picture) for name, picture in named.items()}
        thumbs = {name: file for name, (file, _) in looks.items()}
        found = Contents(named, problems, thumbs, _twins({name: bits for name, (_, bits) in looks.items()}))
        _contents[self.path] = (mark, found)
        return found

    def _thumb(self, name: str, picture: Picture) -> tuple[str, int]:
        """File name of the small copy, made if need be, and 256 bits that say what the picture looks like."""
        stat = picture.path.stat()
        file = hashlib.sha1(f"{name} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:20] + ".webp"
        path = self.thumbs / file
        if not path.exists():
            write_atomic(path, small(picture.path))
        with Image.open(path) as copy:
            grey = copy.convert("L").resize((17, 16), Image.Resampling.BOX).tobytes()
        bits = [grey[i] > grey[i + 1] for row in range(16) for i in range(row * 17, row * 17 + 16)]
        return file, sum(1 << i for i, bit in enumerate(bits) if bit)

    def crop(self, picture: Picture) -> tuple[float, float, float, float]:
        """What fitting to the recipe's resolution cuts away: shares of left, top, right and bottom."""
        box = dataset.crop_box(picture.size, dataset.choose_bucket(picture.size, self.buckets()))
        (width, height), (left, top, right, bottom) = picture.size, box
        return left / width, top / height, 1 - right / width, 1 - bottom / height

    def buckets(self) -> list[tuple[int, int]]:
        """What pictures are fitted to. Raises DataError for a resolution, ModelError for a folder that is no model."""
        return dataset.buckets(self.resolution(), *sides(find(self.recipe().model)))

    def resolution(self) -> str:
        """The recipe's, or its model's."""
        recipe = self.recipe()
        return recipe.resolution or resolution(recipe.model, find(recipe.model))

    def add(self, files: list[Path]) -> int:
        """Copy pictures, captions and ZIPs into the draft; gives how many files came. Raises DraftError."""
        if Path(self.recipe().images) != self.own_images:
            raise DraftError(f"{self.name} uses the folder {self.recipe().images}; put the pictures there instead")
        found: list[tuple[PurePosixPath, Path | zipfile.ZipInfo, zipfile.ZipFile | None]] = []
        archives = []
        try:
            for file in files:
                if file.suffix.lower() == ".zip":
                    archives.append(_open_zip(file))
                    found += [(_inner(info.filename), info, archives[-1]) for info in archives[-1].infolist()]
                elif file.suffix.lower() not in WELCOME:
                    raise DraftError(f"{file.name} is neither a picture, a caption (.txt) nor a ZIP; leave it out")
                else:
                    found.append((PurePosixPath(file.name), file, None))
            found = [f for f in found if f[0].suffix.lower() in WELCOME and not f[0].name.startswith(".")]
            size = sum(s.file_size if archive else s.stat().st_size for _, s, archive in found)
            if len(found) > MAX_FILES or size > MAX_BYTES:
                raise DraftError(
                    f"that is {len(found)} files of {size / 1e9:.1f} GB; at most {MAX_FILES} files of "
                    f"{MAX_BYTES / 1e9:.1f} GB at once, or name a folder of this machine instead"
                )
            if not found:
                raise DraftError("there are no pictures in it; what is read are JPEG, PNG, WebP, BMP and GIF files")
            self._copy(found)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, or under a password
            raise DraftError(f"the ZIP cannot be read ({error}); pack it again without a password") from None
        finally:
            for archive in archives:
                archive.close()
        return len(found)

    def _copy(self, found: list) -> None:
        """Under their own names; where another picture has one already, under a numbered one, caption and all."""
        stems: dict[PurePosixPath, list] = {}
        for name, source, archive in found:
            stems.setdefault(name.with_suffix(""), []).append((name, source, archive))
        for stem, group in stems.items():
            data = {n: archive.read(source) if archive else source.read_bytes() for n, source, archive in group}
            number = 1
            while any(_differs(self.own_images / _renamed(name, stem, number), b) for name, b in data.items()):
                number += 1
            for name, content in data.items():
                write_atomic(self.own_images / _renamed(name, stem, number), content)

    def remove(self, name: str) -> None:
        """Take a picture and its caption out; both are kept in removed/."""
        picture = self._picture(name)
        if Path(self.recipe().images) != self.own_images:
            raise DraftError(f"{name} lies in a folder of yours, {self.recipe().images}; take it out there")
        for path in (picture.path, *self._sidecars(picture)):
            (self.path / "removed").mkdir(exist_ok=True)
            os.replace(path, self.path / "removed" / path.name)

    def leave_out(self) -> int:
        """Take out every picture that cannot be used; they are kept in removed/. Gives how many."""
        if Path(self.recipe().images) != self.own_images:
            raise DraftError(f"they lie in a folder of yours, {self.recipe().images}; take them out there")
        bad = [p for p in self.contents().unusable if p.is_file()]
        for path in bad:
            (self.path / "removed").mkdir(exist_ok=True)
            os.replace(path, self.path / "removed" / path.name)
        return len(bad)

    # Captions

    def caption(self, name: str, text: str) -> None:
        """Write a picture's caption to the file beside it. Raises DraftError."""
        with _reading:
            self._caption(name, text)

    def _caption(self, name: str, text: str) -> None:
        picture = self._picture(name)
        text = " ".join(text.split())
        if len(text) > dataset.MAX_CAPTION:
            raise DraftError(
                f"the caption of {name} has {len(text):,} characters; shorten it to {dataset.MAX_CAPTION:,} at most"
            )
        contents = self.contents()
        beside = self._sidecars(picture)
        write_atomic(beside[0] if beside else picture.path.with_suffix(".txt"), text)
        pictures = contents.pictures | {name: dataclasses.replace(picture, caption=text, caption_source="sidecar")}
        # no second look at every picture for one line of text
        _contents[self.path] = (_mark(Path(self.recipe().images)), dataclasses.replace(contents, pictures=pictures))

    def replace(self, find: str, put: str) -> int:
        """Find and replace in all captions; gives how many changed."""
        if not find:
            raise DraftError("say what to find; to write in front of all captions, use the other button")
        hits = {n: p.caption.replace(find, put) for n, p in self.contents().pictures.items() if find in p.caption}
        for name, text in hits.items():
            self.caption(name, text)
        return len(hits)

    def prefix(self, text: str) -> int:
        """Write a text in front of every caption that does not begin with it; gives how many changed."""
        text = text.strip().rstrip(",")
        todo = {n: p.caption for n, p in self.contents().pictures.items() if not p.caption.startswith(text)}
        for name, caption in todo.items():
            self.caption(name, f"{text}, {caption}" if caption else text)
        return len(todo)

    def _picture(self, name: str) -> Picture:
        picture = self.contents().pictures.get(name)
        if picture is None:
            raise DraftError(f"there is no picture {name[:80]!r} in {self.name}; reload the page")
        return picture

    def _sidecars(self, picture: Picture) -> list[Path]:
        """The caption files beside a picture, the one that counts first."""
        return [p for s in (".txt", ".caption") if (p := picture.path.with_suffix(s)).exists()]


_reading = RLock()  # a page asks for the same draft several times at once, each time in a thread of its own
_contents: dict[Path, tuple[tuple, Contents]] = {}  # what was read, with the mark of the files it was read from


def _mark(folder: Path) -> tuple:
    """Changes whenever a file in the folder, or in one of its folders, does."""
    if not folder.is_dir():
        raise DataError(f"the folder of pictures is gone: {folder}; bring it back, or start another draft")
    files = [f for f in (*folder.glob("*"), *folder.glob("*/*")) if f.suffix.lower() in WELCOME and f.is_file()]
    stats = [(str(f), f.stat()) for f in files]
    return (str(folder), *sorted((name, s.st_mtime_ns, s.st_size) for name, s in stats))


def small(picture: Path, side: int = THUMB) -> bytes:
    """A small copy for the page, as WebP."""
    copy, buffer = dataset.open_picture(picture), io.BytesIO()
    copy.thumbnail((side, side))
    copy.save(buffer, "WEBP", quality=55)
    return buffer.getvalue()


def _twins(bits: dict[str, int]) -> list[tuple[str, str]]:
    names = list(bits)
    pairs = ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    return [(a, b) for a, b in pairs if (bits[a] ^ bits[b]).bit_count() <= ALIKE]


def _open_zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise DraftError(f"{file.name} is not a whole ZIP file; pack it again") from None


def _inner(name: str) -> PurePosixPath:
    """Where a file of a ZIP goes: its name, in its folder if that says how often its pictures count."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if name.endswith("/") or not parts or parts[0] == "__MACOSX":
        return PurePosixPath(".")
    counted = len(parts) > 1 and dataset.REPEATS.fullmatch(parts[-2])
    return PurePosixPath(*(re.sub(r'[\x00-\x1f<>:"|?*]', "_", part)[-120:] for part in parts[-2 if counted else -1 :]))


def _renamed(name: PurePosixPath, stem: PurePosixPath, number: int) -> PurePosixPath:
    return name if number == 1 else stem.with_name(f"{stem.name}-{number}{name.suffix}")


def _differs(path: Path, content: bytes) -> bool:
    return path.exists() and path.suffix.lower() in dataset.PICTURES and path.read_bytes() != content


def language_settings(source: str) -> recipes.Recipe:
    """What a draft of texts begins with."""
    settings = recipes.Recipe(texts=source, model=LANGUAGE_MODEL)
    return dataclasses.replace(settings, preview_every=pictures_every(settings.steps))


def learns(model: str) -> str:
    """What a model learns from: "image" or "text", or "" where it is not known before it is here."""
    if model in MODELS:
        return MODELS[model].task
    folder = find(model)
    if folder is None:
        return ""
    return "text" if is_language(folder) else "image"


def _made(path: Path) -> Path:
    """The path, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def pictures_every(steps: int) -> int:
    """Steps between previews for a run of so many: four of equal distance, the last one at the end."""
    return max(1, steps // 4)


def title(name: str) -> str:
    """A folder's name as a heading."""
    stem, number = re.fullmatch(r"(.*?)(-\d+)?", name, re.DOTALL).groups()
    words = name.replace("-", " ").replace("_", " ").strip()
    return TITLES[stem] + (number or "").replace("-", " ") if stem in TITLES else words[:1].upper() + words[1:]

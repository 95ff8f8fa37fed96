"""Some hundred bad files, folders and recipes, made here, each with the sentence that it must be answered with.

Through the command line, in this process; ZIPs and uploads through the page's own handlers. Nothing may end in a
traceback or be written outside of its folder.
"""
# ruff: noqa: E501 (tables, a case a line)

import csv
import io
import json
import os
import socket
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from zo_engine.recipe import Recipe

PICKLE = b"\x80\x04\x95\x2a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x09touch pwn\x94\x85\x94R\x94."
FOREIGN = {
    "text": b"dear diary", "html": b"<html><script>alert(1)</script>", "pdf": b"%PDF-1.7\n", "zip": b"PK\x03\x04rest",
    "pickle": PICKLE, "elf": b"\x7fELF\x02\x01\x01", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zeros": bytes(4096),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Path], object]  # writes into a folder; what it gives stands at {} in the words
    sentence: str  # a regular expression


def params(cases: Iterator[Case]) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


def noise(format: str, size: tuple[int, int] = (48, 40)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


@pytest.fixture
def refused(qzo, tmp_path):
    """refused(sentence, *words): the command ends in this one sentence, and leaves nothing behind."""
    import re

    def call(sentence: str, *words) -> str:
        before = listing(tmp_path)
        code, out, err = qzo(*words)
        said = err.strip().splitlines()[-1] if err.strip() else ""
        assert code == 2 and re.search(sentence, said), (code, out[-300:], err[-600:])
        assert len(said) < 1500 and "Traceback" not in err
        assert listing(tmp_path) - before <= {tmp_path / "runs"}, "something was written"
        return said

    return call


def listing(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if ".cache" not in p.parts}


# Pictures and captions


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is not."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bad_pictures() -> Iterator[Case]:
    damaged = "1 of 2 pictures cannot be used: bad.* (is truncated or damaged|is not a JPEG, PNG)"
    for format, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp"), ("GIF", "gif")):
        whole = noise(format)
        for share in (2, 10, 30, 50, 70, 90):
            cut = whole[: len(whole) * share // 100]
            yield Case(f"{suffix} of {share} percent", put(f"bad.{suffix}", cut), damaged)
    for what, content in FOREIGN.items():
        for suffix in ("png", "jpg"):
            yield Case(
                f"{what} as {suffix}", put(f"bad.{suffix}", content), "bad.* is not a JPEG, PNG, WebP, BMP or GIF"
            )
    for suffix in ("png", "jpeg", "webp", "gif", "bmp"):
        yield Case(f"empty {suffix}", put(f"bad.{suffix}", b""), "is empty \\(0 bytes\\)")
    for suffix in ("tif", "tiff", "heic", "heif", "avif", "jxl"):
        yield Case(f"a {suffix}", put(f"bad.{suffix}", b"anything"), f"is a {suffix.upper()} file, which is not read")
    for size in ((15, 40), (40, 15), (1, 1), (8, 8)):
        yield Case(
            f"{size} pixels", put("bad.png", noise("PNG", size)), "has only .* pixels; each side needs 16 or more"
        )
    for size in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (40_000, 1001), (7000, 6000)):
        yield Case(f"bomb {size}", put("bad.png", png_of(*size)), "has more than 40 megapixels")
    yield Case("lying png", put("bad.png", png_of(64, 64)), "is truncated or damaged")
    bmp = bytearray(noise("BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    yield Case("bomb bmp", put("bad.bmp", bytes(bmp)), "has more than 40 megapixels")
    gif = bytearray(noise("GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield Case("bomb gif", put("bad.gif", bytes(gif)), "has more than 40 megapixels")
    yield Case("folder as picture", lambda f: (f / "bad.png").mkdir(), "is a folder, not a file")
    yield Case("pipe as picture", lambda f: os.mkfifo(f / "bad.png"), "is not a regular file")
    yield Case(
        "link to outside", lambda f: (f / "bad.png").symlink_to("/etc/passwd"), "is a link to outside of the folder"
    )
    yield Case("link to nowhere", lambda f: (f / "bad.png").symlink_to("nothing.png"), "is not a regular file")
    yield Case(
        "link to itself", lambda f: (f / "bad.png").symlink_to("bad.png"), "is not a regular file|cannot be read"
    )
    yield Case("twins", put("good.jpg", noise("JPEG")), "shares its name with")


def bad_captions() -> Iterator[Case]:
    cannot = "has a caption that cannot be used: good.txt "
    for name, content, why in (
        ("latin", "Süß".encode("latin-1"), "is not text in UTF-8"),
        ("utf16 without mark", "sun".encode("utf-16-le"), "is not text in UTF-8"),
        ("zeros", b"a\0b", "is not text in UTF-8"),
        ("picture", noise("PNG"), "is not text in UTF-8"),
        ("pickle", PICKLE, "is not text in UTF-8"),
        ("long", "a" * 2001, "has 2,001 characters; shorten it to 2,000"),
        ("endless", "a " * 2**16, "is longer than 64 KB"),
        ("broken utf16", b"\xff\xfe\x00", "is not text in UTF-8"),
    ):
        yield Case(f"caption {name}", put("good.txt", content), cannot + why)
    yield Case(
        "caption folder", lambda f: ((f / "good.txt").unlink(), (f / "good.txt").mkdir()), cannot + "is a folder"
    )
    yield Case(
        "caption pipe", lambda f: ((f / "good.txt").unlink(), os.mkfifo(f / "good.txt")), cannot + "is not a regular"
    )
    yield Case("two captions", put("good.TXT", "b"), "has two captions")

    def outside(folder: Path) -> None:
        (folder / "good.txt").unlink()
        (folder / "good.txt").symlink_to("/etc/passwd")

    yield Case("caption link", outside, "is a link to outside")
    for name, line, why in (
        ("no json", "{", "is not valid JSON"),
        ("list", "[1]", 'has no "file_name"'),
        ("number", "3", 'has no "file_name"'),
        ("null", "null", 'has no "file_name"'),
        ("no name", '{"text": "a"}', 'has no "file_name"'),
        ("number as name", '{"file_name": 3, "text": "a"}', 'has no "file_name"'),
        ("no caption", '{"file_name": "good.png"}', "has no caption"),
        ("number as caption", '{"file_name": "good.png", "text": 5}', "has no caption"),
        ("above", '{"file_name": "../good.png", "text": "a"}', "a path outside of the folder"),
        ("absolute", '{"file_name": "/etc/passwd", "text": "a"}', "a path outside of the folder"),
        ("backslashes", '{"file_name": "..\\\\..\\\\x.png", "text": "a"}', "a path outside of the folder"),
        ("unknown", '{"file_name": "moon.png", "text": "a"}', "which is not among the pictures here"),
        ("zero byte", '{"file_name": "a\\u0000.png", "text": "a"}', "which is not among the pictures here"),
        ("long caption", json.dumps({"file_name": "good.png", "text": "a" * 3000}), "has 3,000 characters"),
        ("deep", "[" * 100_000, "is not valid JSON"),
        ("pickle", PICKLE.decode("latin-1"), "is not (valid JSON|text in UTF-8)"),
    ):
        yield Case(f"metadata {name}", put("metadata.jsonl", line), f"metadata.jsonl (line 1 )?.*{why}")
    both = '{"file_name": "good.png", "text": "a"}\n{"file_name": "good.png", "text": "b"}\n'
    yield Case("metadata twice", put("metadata.jsonl", both), "line 2 gives 'good.png' a second, different caption")


@pytest.fixture
def cards(tmp_path, tiny_folder) -> Path:
    """A recipe beside a folder with one good picture."""
    folder = tmp_path / "cards"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "good.png").write_bytes(noise("PNG"))
    (folder / "images" / "good.txt").write_text("a [trigger] sun")
    (folder / "recipe.toml").write_text(
        f'images = "images"\nmodel = {json.dumps(str(tiny_folder))}\ntrigger = "gold"\nresolution = "32x32"\nsteps = 1\n'
    )
    return folder


@pytest.mark.parametrize("case", params([*bad_pictures(), *bad_captions()]))
def test_bad_pictures_and_captions(refused, cards, case):
    case.make(cards / "images")
    refused(case.sentence, "train", cards / "recipe.toml")


# Recipes


def bad_recipes() -> Iterator[Case]:
    wrong = {str: "3", int: '"many"', float: '"much"', bool: "1", tuple[str, ...]: "[1]"}
    kinds = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    for f in fields(Recipe):
        said = f"{f.name} must be {kinds.get(f.type, 'a list of texts')}, not"
        yield Case(f"{f.name} of another kind", put("recipe.toml", f"{f.name} = {wrong[f.type]}"), said)
        yield Case(f"{f.name} as table", put("recipe.toml", f"[{f.name}]\na = 1"), said)
        low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        if np.isfinite(low):
            yield Case(
                f"{f.name} too small", put("recipe.toml", f"{f.name} = {low - 1}"), f"{f.name} = .* is outside of"
            )
        if np.isfinite(high):
            more = int(high) + 1 if f.type is int else high + 1
            yield Case(f"{f.name} too large", put("recipe.toml", f"{f.name} = {more}"), f"{f.name} = .* is outside of")
        if f.type is float:
            for word in ("nan", "inf", "-inf"):
                yield Case(f"{f.name} {word}", put("recipe.toml", f"{f.name} = {word}"), f"{f.name} = .* is outside of")
        if f.type is int:
            yield Case(
                f"{f.name} endless", put("recipe.toml", f"{f.name} = 1{'0' * 40}"), f"{f.name} = .* is outside of"
            )
        if choices:
            yield Case(f"{f.name} unknown", put("recipe.toml", f'{f.name} = "x"'), f"{f.name} = 'x' is not possible")
    for name, text in (
        ("open", "steps ="), ("no value", "steps"), ("twice", "steps = 1\nsteps = 2"), ("open string", 'trigger = "a'),
        ("json", '{"steps": 3}'), ("yaml", "steps: 3"), ("open list", "prompts = ["), ("zero byte", 'trigger = "\0"'),
        ("bad escape", 'trigger = "\\q"'), ("bad date", "steps = 2020-99-99"), ("bare word", "trigger = gold"),
        ("deep", "a = " + "[" * 5000), ("dots", "steps.a = 1\nsteps.a = 2"), ("pickle", PICKLE.decode("latin-1")),
    ):  # fmt: skip
        yield Case(f"toml {name}", put("recipe.toml", text), "recipe.toml is not (valid TOML|a text file)")
    for name, content in (
        ("utf16", "steps = 1".encode("utf-16")),
        ("latin", b'trigger = "S\xfc\xdf"'),
        ("png", noise("PNG")),
    ):
        yield Case(f"toml {name}", put("recipe.toml", content), "recipe.toml is not (a text file in UTF-8|valid TOML)")
    for name, text, why in (
        ("stepps", "stepps = 3", "did you mean steps"), ("model_name", 'model_name = "a"', "did you mean model"),
        ("nonsense", "qqqqq = 1", "possible are"), ("import", '"__import__" = "os"', "unknown setting"),
        ("date", "steps = 2020-01-01", "steps must be a whole number"), ("float", "steps = 3.0", "must be a whole number"),
        ("both", 'images = "a"\ntexts = "b"', "pictures or texts, not both"),
        ("columns", 'text_columns = ["label"]', "must look like field=column"),
        ("space", 'space = "group"', "moves gains; with space"),
    ):  # fmt: skip
        yield Case(f"recipe {name}", put("recipe.toml", text), why)
    yield Case("recipe folder", lambda f: (f / "recipe.toml").mkdir(), "cannot be read as a recipe")
    yield Case("recipe nowhere", lambda f: None, "there is no recipe at|does not exist")
    yield Case("recipe pipe", lambda f: os.mkfifo(f / "recipe.toml"), "is not a regular file")
    yield Case("recipe device", lambda f: (f / "recipe.toml").symlink_to("/dev/zero"), "is not a regular file")


@pytest.mark.parametrize("case", params(bad_recipes()))
def test_bad_recipes(refused, tmp_path, case):
    case.make(tmp_path)
    refused(case.sentence, "train", tmp_path / "recipe.toml")


# Texts


def parquet(table: dict) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), sink)
    return sink.getvalue()


def bad_texts() -> Iterator[Case]:
    good = '{"prompt": "a", "completion": "b"}\n'
    for name, line, why in (
        ("no json", "{", "line 2 is not valid JSON"), ("a list", "[1]", "line 2 is a list, not an object"),
        ("a number", "3", "line 2 is a int"), ("empty prompt", '{"prompt": "", "completion": "b"}', "has an empty 'prompt'"),
        ("no answer", '{"prompt": "a"}', "line 2 has no 'completion'"),
        ("null", '{"prompt": null, "completion": "b"}', "has no 'prompt'"),
        ("object", '{"prompt": {"a": 1}, "completion": "b"}', "has a dict where 'prompt' should be a text"),
        ("half a character", '{"prompt": "\\ud800", "completion": "b"}', "has half a character"),
        ("deep", "[" * 100_000, "line 2 is not valid JSON"),
        ("true", '{"prompt": true, "completion": "b"}', "has a bool where 'prompt'"),
        ("infinity", '{"prompt": Infinity, "completion": ""}', "has an empty 'completion'"),
    ):  # fmt: skip
        yield Case(f"jsonl {name}", put("t.jsonl", good + line + "\n"), why)
    for name, row, why in (
        ("no turns", {"messages": []}, "has no conversation"), ("a text", {"messages": "hello"}, "not valid JSON"),
        ("no role", {"messages": [{"content": "a"}]}, "has a turn 1 without 'role'"),
        ("a stranger", {"messages": [{"role": "cat", "content": "a"}]}, "by 'cat'; possible are"),
        ("no answer", {"messages": [{"role": "user", "content": "a"}]}, "ends with a turn by the user"),
        ("an image", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ("numbers", {"messages": [1, 2]}, "has a turn 1 without"), ("a list as role", {"messages": [{"role": []}]}, "by '\\[\\]'"),
        ("one choice", {"prompt": "a", "completion": "b", "choices": ["b"]}, "not a list of two or more"),
        ("no such choice", {"prompt": "a", "completion": 7, "choices": ["b", "c"]}, "names choice 7"),
        ("another answer", {"prompt": "a", "completion": "x", "choices": ["b", "c"]}, "which is none of its choices"),
        ("choices of numbers", {"prompt": "a", "completion": "x", "choices": [[], {}]}, "where 'choices' should be a text"),
        ("unknown columns", {"foo": 1, "bar": 2}, "which fit no form"), ("no columns", {}, "which fit no form"),
    ):  # fmt: skip
        yield Case(f"row {name}", put("t.jsonl", json.dumps(row)), why)
    for name, content, why in (
        ("empty", "", "is empty \\(0 bytes\\)"), ("object", "{}", "with 0 lists"), ("number", "5", "is a int"),
        ("lists", '{"a": [], "b": []}', "with 2 lists"), ("empty list", "[]", "is empty: there is no row"),
        ("numbers", "[1, 2]", "which fit no form|is a int"), ("lines", good * 2, "it looks like JSON lines"),
        ("open", "[{", "is not valid JSON"), ("deep", "[" * 100_000, "is not valid JSON"), ("text", '"a"', "is a str"),
    ):  # fmt: skip
        yield Case(f"json {name}", put("t.json", content), why)
    for name, content, why in (
        ("ragged", "prompt,completion\nx,y\na\n", "has 1 cells where the first line has 2"),
        ("open quote", 'prompt,completion\n"a,b\n', "is not valid CSV"), ("only names", "prompt,completion\n", "is empty"),
        ("other names", "a,b\n1,2\n", "which fit no form"), ("zeros", b"a\0b", "is not text in UTF-8"),
        ("latin", 'prompt,completion\na,"S\xfc\xdf"\n'.encode("latin-1"), "has half a character"),
        ("utf16 cut", ("prompt,completion\n" * 2).encode("utf-16")[:-1], "is damaged UTF-16|cells"),
        ("endless cell", "prompt,completion\na," + "x" * 200_000 + "\n", "is not valid CSV"),
        ("pickle", PICKLE, "is not text in UTF-8"),
    ):  # fmt: skip
        yield Case(f"csv {name}", put("t.csv", content), why)
    yield Case("tsv of commas", put("t.tsv", "prompt,completion\na,b\n"), "which fit no form")
    whole = parquet({"prompt": ["a"] * 50, "completion": ["b"] * 50})
    for share in (0, 1, 20, 60, 95):
        cut = whole[: len(whole) * share // 100]
        yield Case(f"parquet of {share} percent", put("t.parquet", cut), "is not a complete Parquet file|is empty")
    for name, content, why in (
        ("text", b"dear", "is not a complete Parquet"), ("pickle", PICKLE, "is not a complete Parquet"),
        ("other columns", parquet({"a": [1]}), "which fit no form"), ("no rows", parquet({"prompt": [], "completion": []}), "is empty"),
        ("numbers", parquet({"prompt": [None, "a"], "completion": ["b", "c"]}), "line 1 has no 'prompt'"),
        ("bytes", parquet({"prompt": [b"\xff"], "completion": ["b"]}), "has a bytes where 'prompt'"),
    ):  # fmt: skip
        yield Case(f"parquet {name}", put("t.parquet", content), why)
    yield Case("blank", put("t.txt", "\n\n  \n"), "is empty: there is no row")
    yield Case("txt zeros", put("t.txt", bytes(10)), "is not text in UTF-8")
    yield Case("endless line", put("t.jsonl", "a" * (2**24 + 2)), "longer than 16,777,216 characters")
    yield Case("other suffix", put("t.xlsx", "a"), "is none of .jsonl")
    yield Case("folder", lambda f: (f / "t.jsonl").mkdir(), "is a folder; it holds no")
    yield Case("pipe", lambda f: os.mkfifo(f / "t.jsonl"), "is not a regular file")


@pytest.fixture(scope="session")
def language(tmp_path_factory) -> Path:
    return tiny.save_language_model(tmp_path_factory.mktemp("corpus") / "llm")


@pytest.mark.parametrize("case", params(bad_texts()))
def test_bad_texts(refused, tmp_path, language, case):
    case.make(tmp_path)
    (file,) = tmp_path.glob("t.*")
    text = f"texts = {json.dumps(str(file))}\nmodel = {json.dumps(str(language))}\n"
    (tmp_path / "recipe.toml").write_text(text)
    refused(case.sentence, "train", tmp_path / "recipe.toml")


# Style files


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def bad_styles() -> Iterator[Case]:
    broken = "is not a readable safetensors file|is damaged"
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, content in (
        ("empty", b""), ("short", b"\0\0\0"), ("pickle", PICKLE), ("text", b"dear diary, " * 9), ("png", noise("PNG")),
        ("torch zip", b"PK\x03\x04" + bytes(60)), ("length of all", struct.pack("<Q", 2**64 - 1) + b"{}"),
        ("length beyond", safetensors({}, length=10**6)), ("length of none", struct.pack("<Q", 0)),
        ("length too short", safetensors({"a": one}, bytes(8), length=5)),
        ("no json", safetensors(b"{{{{{{{{")), ("list", safetensors([])), ("number", safetensors(3)),
        ("not utf8", safetensors(b"\xff\xfe\xfd\xfc")), ("null", safetensors(b"null")),
        ("deep", safetensors(b"[" * 50_000)), ("offsets beyond", safetensors({"a": one | {"data_offsets": [0, 999]}}, bytes(8))),
        ("offsets back", safetensors({"a": one | {"data_offsets": [8, 0]}}, bytes(8))),
        ("offsets below", safetensors({"a": one | {"data_offsets": [-8, 0]}}, bytes(8))),
        ("overlap", safetensors({"a": one, "b": one}, bytes(8))), ("hole", safetensors({"a": one | {"data_offsets": [8, 16]}}, bytes(16))),
        ("too much", safetensors({"a": one}, bytes(64))), ("no type", safetensors({"a": one | {"dtype": "PICKLE"}}, bytes(8))),
        ("shape of another size", safetensors({"a": one | {"shape": [3]}}, bytes(8))),
        ("shape below", safetensors({"a": one | {"shape": [-2]}}, bytes(8))),
        ("shape beyond", safetensors({"a": one | {"shape": [2**40, 2**40]}}, bytes(8))),
        ("metadata of numbers", safetensors({"__metadata__": {"format": 3}, "a": one}, bytes(8))),
        ("metadata a list", safetensors({"__metadata__": [], "a": one}, bytes(8))),
    ):  # fmt: skip
        yield Case(name, put("s.safetensors", content), broken)

    def described(**changes: object) -> bytes:
        words = {"format": "qzo-style-1", "form": "theta", "recipe": "{}", "base": "{}", "step": "1"} | changes
        return safetensors({"__metadata__": {k: v for k, v in words.items() if v is not None}, "a": one}, bytes(8))

    for name, changes, why in (
        ("no format", {"format": None}, "not a style made by this program"), ("lora", {"format": "pt"}, "not a style made by"),
        ("newer", {"format": "qzo-style-7"}, "was made by a newer one"), ("no seal", {"format": "qzo-style-2"}, "its checksum is gone"),
        ("no recipe", {"recipe": None}, "its description cannot be read"), ("no base", {"base": None}, "its description cannot"),
        ("no form", {"form": None}, "its description cannot be read"), ("other form", {"form": "x"}, "neither theta nor journal"),
        ("recipe no json", {"recipe": "{"}, "its description cannot"), ("recipe list", {"recipe": "[]"}, "its description cannot"),
        ("recipe deep", {"recipe": "[" * 50_000}, "its description cannot"), ("base list", {"base": "[1]"}, "its description cannot"),
        ("recipe unknown", {"recipe": '{"stepps": 1}'}, "unknown setting 'stepps'"),
        ("recipe wrong", {"recipe": '{"steps": "a"}'}, "steps must be a whole number"),
        ("recipe null", {"recipe": "null"}, "its description cannot"), ("wrong seal", {"sha256": "0" * 64}, "its checksum does not fit"),
    ):  # fmt: skip
        yield Case(f"style {name}", put("s.safetensors", described(**changes)), why)
    yield Case("style folder", lambda f: (f / "s.safetensors").mkdir(), "is not a regular file|is not a run folder")
    yield Case("style pipe", lambda f: os.mkfifo(f / "s.safetensors"), "is not a regular file")
    yield Case("style device", lambda f: (f / "s.safetensors").symlink_to("/dev/zero"), "is not a regular file")

    def endless(folder: Path) -> None:
        with open(folder / "s.safetensors", "wb") as file:
            file.truncate(2**40)  # of holes: no byte on disk

    yield Case("style endless", endless, "has 1100 GB, more than any such file")


@pytest.mark.parametrize("case", params(bad_styles()))
@pytest.mark.parametrize("command", ["inspect", "apply", "verify"])
def test_bad_styles(qzo, refused, tmp_path, case, command):
    case.make(tmp_path)
    path = tmp_path / "s.safetensors"
    if command == "verify":
        import re

        code, out, err = qzo("verify", path)
        assert code in (1, 2) and re.search(case.sentence, out + err) and "Traceback" not in err, (out, err)
        return
    refused(case.sentence, command, path, *(["a sun"] if command == "apply" else []))


# Model folders


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """A pipeline folder of links, to be spoilt."""
    folder = tmp_path / "model"
    for file in tiny_folder.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(tiny_folder)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(tiny_folder)).symlink_to(file)
    return folder


def replace(name: str, content: bytes | str | None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            put(name, content)(folder)

    return make


def changed(name: str, **changes: object) -> Callable[[Path], None]:
    """A JSON file with other values; None takes one out."""

    def make(folder: Path) -> None:
        found = {k: v for k, v in (json.loads((folder / name).read_text()) | changes).items() if v is not None}
        replace(name, json.dumps(found))(folder)

    return make


def bad_models() -> Iterator[Case]:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    yield Case("no index", replace("model_index.json", None), "has no model_index.json")
    yield Case(
        "other pipeline", changed("model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline; of image models"
    )
    yield Case("index list", replace("model_index.json", "[]"), "is damaged: it holds a list")
    yield Case("index no json", replace("model_index.json", "{"), "is damaged: it is not JSON")
    yield Case("index deep", replace("model_index.json", "[" * 100_000), "is damaged: it is not JSON")
    yield Case("index pickle", replace("model_index.json", PICKLE), "is damaged: it is not JSON")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        name = (
            weights
            if part == "transformer"
            else f"{part}/{'diffusion_pytorch_' if part == 'vae' else ''}model.safetensors"
        )
        yield Case(f"{part} without weights", replace(name, None), "has no weights")
        yield Case(f"{part} truncated", replace(name, bytes(9)), "is not a complete safetensors file")
        yield Case(f"{part} pickle", replace(name, PICKLE * 9), "is not a complete safetensors file")
        yield Case(
            f"{part} config gone", replace(f"{part}/config.json", None), "is missing: the model folder is not complete"
        )
        yield Case(f"{part} config list", replace(f"{part}/config.json", "[]"), "is damaged: it holds a list")

        def only_pickle(folder: Path, name: str = name) -> None:
            replace(name, None)(folder)
            put(name.replace("safetensors", "bin"), PICKLE)(folder)

        yield Case(f"{part} of pickles", only_pickle, "a pickle, which can run code and is never loaded")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    yield Case("lfs pointer", replace(weights, lfs), "it is a Git LFS pointer")
    yield Case("scheduler gone", replace("scheduler/scheduler_config.json", None), "is missing")
    yield Case("lora", put("adapter_config.json", "{}"), "is a LoRA, not a model")
    yield Case("lora weights", put("pytorch_lora_weights.safetensors", ""), "is a LoRA, not a model")
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    for name, content, why in (
        ("empty", "{}", "it has no weight_map"), ("list", '{"weight_map": []}', "it has no weight_map"),
        ("number", '{"weight_map": {"a": 3}}', "is damaged"), ("above", '{"weight_map": {"a": "../../x.safetensors"}}', "is damaged"),
        ("absolute", '{"weight_map": {"a": "/etc/passwd"}}', "is damaged"),
        ("missing", '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}', "is missing"),
        ("lost", '{"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}', "the index lists a, which no shard has"),
        ("pickle", '{"weight_map": {"a": "model.bin"}}', "is damaged"),
    ):  # fmt: skip
        yield Case(f"shards {name}", put(index, content), why)
    config = "transformer/config.json"
    yield Case("no class", changed(config, _class_name=None), "names the class None")
    yield Case("class a number", changed(config, _class_name=3), "names the class 3")
    yield Case("class of no model", changed(config, _class_name="StableDiffusion3Pipeline"), "names the class")
    yield Case("class a function", changed(config, _class_name="logging"), "names the class")
    yield Case("other layers", changed(config, num_layers=3), "lacks|do not belong together|is damaged")
    yield Case("fewer layers", changed(config, num_layers=1), "do not belong together")
    yield Case("other width", changed(config, attention_head_dim=16), "do not belong together|has the shape|damaged")
    yield Case("no heads", changed(config, num_attention_heads="two"), "config.json.*(damaged|do not belong)")
    yield Case("no patch", changed(config, patch_size=None), "config.json.*(damaged|patch_size)")
    yield Case("patch a text", changed(config, patch_size="2"), "config.json.*(damaged|patch_size)")
    yield Case(
        "vae no blocks",
        changed("vae/config.json", block_out_channels=None),
        "config.json.*(damaged|block_out_channels)",
    )
    yield Case("gptq", changed(config, quantization_config={"quant_method": "gptq"}), "is quantised by 'gptq'")
    yield Case("quantization a list", changed(config, quantization_config=[1]), "its quantization_config is")
    yield Case(
        "text width", changed("text_encoder/config.json", hidden_size=48), "text_encoder (cannot be loaded|lacks)"
    )
    yield Case("t5 width", changed("text_encoder_3/config.json", d_model=96), "text_encoder_3 (cannot be loaded|lacks)")
    yield Case("t5 heads", changed("text_encoder_3/config.json", num_heads="x"), "text_encoder_3 cannot be loaded")
    yield Case("tokenizer damaged", replace("tokenizer/tokenizer.json", "{"), "text_encoder|tokenizer")
    yield Case("vae other", changed("vae/config.json", latent_channels=4), "vae cannot be loaded")
    tokens = "tokenizer_3/tokenizer_config.json"
    yield Case(
        "length a text", changed(tokens, model_max_length="long"), "model_max_length|tokenizer_config.json.*damaged"
    )


@pytest.mark.parametrize("case", params(bad_models()))
def test_bad_models(refused, cards, model, case):
    case.make(model)
    refused(case.sentence, "train", cards / "recipe.toml", "--model", model)


def bad_language_models() -> Iterator[Case]:
    config = "config.json"
    for name, values, why in (
        ("no kind", {"model_type": None}, "."), ("unknown kind", {"model_type": "telepathy"}, "is not that of a language model"),
        ("kind a number", {"model_type": 3}, "."), ("code of its own", {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "x"}, "."),
        ("width a text", {"hidden_size": "two"}, "cannot be loaded"), ("no heads", {"num_attention_heads": 0}, "cannot be loaded"),
        ("width below", {"hidden_size": -64}, "is not that of|do not belong"), ("other width", {"hidden_size": 128}, "do not belong|shape"),
        ("other words", {"vocab_size": 7}, "do not belong|shape"), ("more blocks", {"num_hidden_layers": 5}, "lacks"),
        ("fewer blocks", {"num_hidden_layers": 3}, "do not belong together"), ("blocks a list", {"num_hidden_layers": []}, "cannot be loaded"),
        ("gptq", {"quantization_config": {"quant_method": "gptq"}}, "is quantised by 'gptq'"),
        ("classes a number", {"architectures": 3}, "."), ("classes of another", {"architectures": ["T5EncoderModel"]}, "."),
        ("length a text", {"max_position_embeddings": "long"}, "."), ("an adapter", {"peft_type": "LORA"}, "is a LoRA"),
    ):  # fmt: skip
        yield Case(f"llm {name}", changed(config, **values), why)
    for name, content in (
        ("gone", None),
        ("list", "[]"),
        ("empty", "{}"),
        ("pickle", PICKLE),
        ("half", '{"version": "1.0", "model": {'),
    ):
        yield Case(f"tokenizer {name}", replace("tokenizer.json", content), "tokenizer|cannot be loaded")
    yield Case("llm weights gone", replace("model.safetensors", None), "has no weights")
    yield Case("llm weights cut", replace("model.safetensors", bytes(99)), "is not a complete safetensors file")


@pytest.mark.parametrize("case", params(bad_language_models()))
def test_bad_language_models(refused, tmp_path, language, case):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(language, model)
    (model / "tokenizer_config.json").unlink() if case.name == "tokenizer gone" else None
    case.make(model)
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "recipe.toml").write_text(f'texts = "t.jsonl"\nmodel = {json.dumps(str(model))}\nsteps = 1\n')
    refused(case.sentence, "train", tmp_path / "recipe.toml")


# Run folders


def bad_runs() -> Iterator[Case]:
    for name, text, why in (
        ("no json", "{\n", "line 1 of .* is not JSON"), ("list", "[]\n", "line 1 of .* is not an object"),
        ("numbers", "1\n2\n", "line 1 of"), ("zeros", "\0\0\n", "line 1 of"), ("empty lines", "\n\n", "line 1 of"),
        ("no step", '{"size": 1, "loss": 2}\n', "has no step"), ("later step", '{"step": 5, "size": 0, "loss": 1}\n', "is of step 5"),
        ("text", '{"step": 0, "size": "a", "loss": 1}\n', "as its size"), ("pickle", PICKLE.decode("latin-1") + "\n", "line 1 of"),
        ("wrong checksum", '{"step": 0, "size": 0, "loss": 1, "crc": "00000000"}\n', "its checksum does not fit"),
        ("twice", '{"step": 0, "size": 0, "loss": 1}\n' * 2, "line 2 of .* is of step 0"),
    ):  # fmt: skip
        yield Case(f"journal {name}", put("journal.jsonl", text), why)
    for name, text in (
        ("no json", "{\n"),
        ("list", "[]\n"),
        ("no step", '{"loss": 1}\n'),
        ("text", '{"step": 0, "loss": "a"}\n'),
    ):
        yield Case(f"evaluations {name}", put("evaluations.jsonl", text), "line 1 of .*evaluations.jsonl")
    for file in ("status.json", "run.json"):
        for name, text in (
            ("list", "[]"),
            ("open", "{"),
            ("empty", ""),
            ("deep", "[" * 99_999),
            ("number", "3"),
            ("latin", b"\xff"),
        ):
            yield Case(f"{file} {name}", put(file, text), f"{file} is damaged; it can be deleted")
    for name, text in (("no state", '{"step": 1}'), ("no time", '{"state": "done"}'), ("other state", '{"state": "x", "time": "2026-01-01"}'),
                       ("other time", '{"state": "done", "time": 5}'), ("no date", '{"state": "done", "time": "soon"}')):  # fmt: skip
        yield Case(f"status {name}", put("status.json", text), "status.json is damaged; it can be deleted")
    yield Case("recipe unknown", put("recipe.toml", "stepps = 1"), "unknown setting 'stepps'")
    yield Case("recipe empty", put("recipe.toml", "\0"), "is not valid TOML")


@pytest.mark.parametrize("case", params(bad_runs()))
def test_bad_runs(refused, tmp_path, case):
    run = tmp_path / "run"
    for name, text in (
        ("recipe.toml", "steps = 3"),
        ("run.json", "{}"),
        ("status.json", '{"state": "stopped", "time": "2026-01-01T00:00:00"}'),
    ):
        put(name, text)(run)
    case.make(run)
    refused(case.sentence, "inspect", run)


@pytest.mark.parametrize("words", [["resume", "{}"], ["inspect", "{}"], ["compare", "{}"], ["export", "{}", "out"]])
@pytest.mark.parametrize("what", ["nowhere", "a file", "an empty folder", "a pipe"])
def test_what_is_no_run(refused, tmp_path, words, what):
    path = tmp_path / "thing"
    {"a file": lambda: path.write_text("a"), "an empty folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}.get(
        what, int
    )()
    refused("does not exist|is not a run folder|is none of|not a readable|is not a regular file|no recipe|not a style", *(
        str(path) if word == "{}" else word for word in words))  # fmt: skip


# What a browser brings


def bad_zips() -> Iterator[Case]:
    def archive(*files: tuple[str | zipfile.ZipInfo, bytes], **how) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            with zipfile.ZipFile(folder / "cards.zip", "w", **how) as file:
                for name, content in files:
                    file.writestr(name, content)

        return make

    picture = noise("PNG")
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    kept = ""  # taken, and kept inside
    for name in ("../../evil.png", "/etc/evil.png", "C:\\evil.png", "..\\..\\evil.png", "a/../../b/evil.png", "//evil.png",
                 "10_moon/../../evil.png", "./././evil.png", "\\\\server\\share\\evil.png", "a/b/c/d/evil.png", "evil\x01.png",
                 "x" * 200 + ".png", "CON.png", "a:b.png"):  # fmt: skip
        yield Case(f"named {name[:30]!r}", archive((name, picture)), kept)
    yield Case("a link", archive((link, b"/etc/passwd")), "there are no pictures|kept")
    yield Case("two of a name", archive(("a.png", picture), ("A.PNG", picture[:-5]), ("b/a.png", picture)), kept)
    yield Case("no pictures", archive(("readme.md", b"a")), "there are no pictures in it")
    yield Case("nothing", archive(), "there are no pictures in it")
    yield Case("only a suffix", archive(("..png", picture)), "there are no pictures in it")
    yield Case("hidden", archive((".a.png", picture), ("__MACOSX/a.png", b"")), "there are no pictures in it")
    yield Case("a zip in a zip", archive(("inner.zip", b"PK")), "there are no pictures in it")
    yield Case("many files", archive(*((f"{i}.txt", b"") for i in range(4001))), "that is 4001 files of")
    yield Case("empty", put("cards.zip", b""), "is not a whole ZIP file")
    yield Case("text", put("cards.zip", b"dear"), "is not a whole ZIP file")
    yield Case("pickle", put("cards.zip", PICKLE), "is not a whole ZIP file")

    def spoilt(change: Callable[[bytearray], None], compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            archive(("a.png", picture), compression=compression)(folder)
            content = bytearray((folder / "cards.zip").read_bytes())
            change(content)
            (folder / "cards.zip").write_bytes(content)

        return make

    def central(content: bytearray) -> int:
        return content.index(b"PK\x01\x02")

    def says(offset: int, value: bytes) -> Callable[[bytearray], None]:
        def change(content: bytearray) -> None:
            at = central(content) + offset
            content[at : at + len(value)] = value

        return change

    def cut(content: bytearray) -> None:
        del content[len(content) // 2 :]

    def flip(content: bytearray) -> None:
        content[200] ^= 255

    bad = "the ZIP cannot be read|is not a whole ZIP file"
    yield Case("cut", spoilt(cut), bad)
    yield Case("a flipped byte", spoilt(flip), bad)
    yield Case("a flipped packed byte", spoilt(flip, zipfile.ZIP_DEFLATED), bad)
    yield Case("says it is larger", spoilt(says(24, struct.pack("<I", 10**6))), kept)
    yield Case(
        "says it is 3 GB", spoilt(says(24, struct.pack("<I", 3 * 10**9))), "at most 4000 files of 2.1 GB at once"
    )
    yield Case("says another check", spoilt(says(16, b"\0\0\0\1")), bad)
    yield Case("under a password", spoilt(says(8, b"\1\0")), bad)
    yield Case("packed in an unknown way", spoilt(says(10, b"\x63\0")), bad)
    yield Case("lies elsewhere", spoilt(says(42, struct.pack("<I", 2**31))), bad)

    yield Case("a bomb", archive(*((f"{i}.png", bytes(2**23)) for i in range(5)), compression=zipfile.ZIP_DEFLATED),
               "at most 4000 files of 0.0 GB at once")  # fmt: skip


@pytest.mark.parametrize("case", params(bad_zips()))
def test_bad_zips(tmp_path, monkeypatch, case):
    import re

    gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")
    from app import drafts
    from app.data import Data
    from app.place import Place
    from app.plainly import plainly

    if case.name == "a bomb":  # of a smaller size, against a smaller limit
        monkeypatch.setattr(drafts, "MAX_BYTES", 2**25)
    case.make(tmp_path)
    place, before = Place(tmp_path / "runs"), listing(tmp_path)
    try:
        name, _ = plainly(Data(place).upload)([str(tmp_path / "cards.zip")])
    except gr.Error as error:
        assert case.sentence and re.search(case.sentence, error.message) and "\n" not in error.message, error.message
        assert place.drafts.names() == []
        return
    assert case.sentence == "" or "kept" in case.sentence
    draft = place.drafts.open(name)
    made = {p for p in listing(tmp_path) - before if p.is_file()}
    assert made and all(p.resolve().is_relative_to(draft.path) and not p.is_symlink() for p in made)
    plainly(Data(place).show)(name)


@pytest.mark.parametrize("case", params([*bad_recipes()][::7]))
def test_bad_recipes_through_the_page(tmp_path, case):
    import re

    gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")
    from app.place import Place
    from app.plainly import plainly
    from app.train import Training

    case.make(tmp_path)
    place = Place(tmp_path / "runs")
    draft = place.drafts.example("woodcut")
    before, training = draft.file.read_bytes(), Training(place)
    with gr.Blocks():
        training.build(gr.State(""), gr.State({}), gr.State(""), gr.Tabs(), gr.Tab())
    with pytest.raises(gr.Error) as caught:
        plainly(training.load)("woodcut", {}, str(tmp_path / "recipe.toml"))
    assert re.search(case.sentence, caught.value.message) and draft.file.read_bytes() == before


@pytest.mark.parametrize("case", params([*bad_models()][::5]))
def test_bad_models_through_the_page(tmp_path, model, case):
    gr = pytest.importorskip("gradio", reason="the page's own extra is not installed")
    from app.model import Models
    from app.place import Place
    from app.plainly import plainly

    case.make(model)
    place = Place(tmp_path / "runs")
    place.drafts.example("tarot")
    try:
        shown = plainly(Models(place).other)("tarot", str(model))
    except gr.Error as error:
        assert "\n" not in error.message
    else:
        assert "Traceback" not in str(shown)


def test_how_many_there_are():
    every = [
        bad_pictures,
        bad_captions,
        bad_recipes,
        bad_texts,
        bad_styles,
        bad_models,
        bad_language_models,
        bad_runs,
        bad_zips,
    ]
    names = [f"{family.__name__}: {case.name}" for family in every for case in family()]
    assert len(names) == len(set(names)) >= 300


def test_a_socket_is_no_picture(refused, cards, monkeypatch):
    monkeypatch.chdir(cards / "images")  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("bad.png")
        refused("is not a regular file", "train", cards / "recipe.toml")


def test_a_csv_with_a_huge_field_says_so(refused, tmp_path, language):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["a", "b" * 10**6]])
    recipe = f"texts = {json.dumps(str(tmp_path / 't.csv'))}\nmodel = {json.dumps(str(language))}\n"
    (tmp_path / "recipe.toml").write_text(recipe)
    refused("is not valid CSV", "train", tmp_path / "recipe.toml")

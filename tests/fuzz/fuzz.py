"""Coverage-guided fuzzing of what reads files: python tests/fuzz/fuzz.py TARGET [-runs=N] [libFuzzer's flags]

Needs atheris (pip install atheris). A reader may refuse with its own kind of error, in one sentence; anything else, a
hang, or a memory of more than 2 GB is a finding. Without atheris, tests/test_fuzz.py runs the same targets on some
hundred inputs made by hand and by chance.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MEMORY = Path("/dev/shm")  # a disk would be worn, and waited for
FOLDER = Path(tempfile.mkdtemp(prefix="qzo-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))


def said(error: ValueError) -> None:
    """A refusal is one of this project's own, and one line."""
    assert type(error).__module__.startswith("zo_engine"), repr(error)
    assert str(error) and "\n" not in str(error).strip() and len(str(error)) < 3000, repr(str(error))[:500]


def style(data: bytes) -> None:
    """A style file: arbitrary bytes, and arbitrary headers with a right length."""
    from zo_engine.style import journal_records, load_style

    for content in (data, struct.pack("<Q", len(data)) + data, _sealed(data)):
        path = FOLDER / "s.safetensors"
        path.write_bytes(content)
        try:
            found = load_style(path)
            if found.form == "journal":
                journal_records(found.tensors)
        except ValueError as error:
            said(error)


def _sealed(data: bytes) -> bytes:
    """A whole file, whose metadata is what is tried."""
    text = data.decode("utf-8", "replace")
    half = len(text) // 2
    words = {"format": "qzo-style-1", "form": "journal", "recipe": text[:half], "base": text[half:]}
    header = {"__metadata__": words, "weights": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + (data + bytes(8))[:8]


def journal(data: bytes) -> None:
    """Journal, evaluations and status of a run folder, and their recovery."""
    from zo_engine.recipe import Recipe
    from zo_engine.run import Run

    path = FOLDER / "run"
    run = Run(path) if path.exists() else Run.create(path, Recipe())
    for file in (run.journal_file, run.evaluations_file, path / "status.json"):
        file.write_bytes(data)
    for reader in (run.journal, run.evaluations, run.status):
        try:
            reader()
        except ValueError as error:
            said(error)
    run.recover()
    records = run.journal()
    assert [record.step for record in records] == list(range(len(records)))
    assert all(fact["step"] <= len(records) for fact in run.evaluations())
    assert run.recover() == [] and run.journal_file.read_bytes().count(b"\n") == len(records)


def recipe(data: bytes) -> None:
    """A recipe, which comes back as it was written."""
    from zo_engine import recipe as recipes

    path = FOLDER / "recipe.toml"
    path.write_bytes(data)
    try:
        found = recipes.load(path)
    except ValueError as error:
        said(error)
        return
    path.write_text(recipes.dump(found), encoding="utf-8")
    assert recipes.load(path) == found


def texts(data: bytes) -> None:
    """Examples for a language model in every form."""
    from zo_engine import texts as reader

    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"):
        path = FOLDER / f"t{suffix}"
        path.write_bytes(data)
        try:
            found = reader.scan(path)
        except ValueError as error:
            said(error)
            continue
        for example in found.examples:
            assert example.text or example.messages[-1].role == "assistant"
            "".join((example.text, *(m.content for m in example.messages))).encode()


def dataset(data: bytes) -> None:
    """A picture, its caption and the metadata beside it."""
    from zo_engine import dataset as reader

    folder = FOLDER / "pictures"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "a.txt", "metadata.jsonl"):
        (folder / name).write_bytes(data)
    pictures, _ = reader.scan(folder)
    for picture in pictures:
        try:
            reader.open_picture(picture.path)
        except ValueError as error:
            said(error)


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (style, journal, recipe, texts, dataset)}


def seeds(target: str) -> list[bytes]:
    """Whole inputs, from which a fuzzer begins."""
    import io

    from PIL import Image

    picture = {}
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), "red").save(buffer, format)
        picture[format] = buffer.getvalue()
    return {
        "style": [b"{}", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b'{"steps": 3}{"code_hash": "a"}'],
        "journal": [
            b'{"step": 0, "size": 0.1, "loss": 1.5, "weights": [0.5]}\n',
            b'{"step": 0, "loss": 1.5, "slopes": [0.5], "clip": 1, "step_size": 0.1, "crc": "00000000"}\n',
            b'{"step": 0, "loss": 0.5, "items": [0.5, null]}\n{"step": 2',
        ],
        "recipe": [b'steps = 3\neps = 0.1\ntrigger = "a"\nprompts = ["a", "b"]\ncolumns = true\n'],
        "texts": [
            b'{"prompt": "a", "completion": "b", "choices": ["b", "c"]}\n', b'[{"text": "a", "label": "b"}]',
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            b'prompt,completion\n"a",b\n', b"one\n\ntwo\n", b"PAR1\x15\x04\x15\x06PAR1",
        ],
        "dataset": [*picture.values(), b'{"file_name": "a.png", "text": "a sun"}\n', b"a caption"],
    }[target]  # fmt: skip


def main() -> None:
    import atheris

    name = sys.argv.pop(1)
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(content)
    with atheris.instrument_imports(include=["zo_engine"]):
        import zo_engine.dataset
        import zo_engine.recipe
        import zo_engine.run
        import zo_engine.texts

        if name == "style":
            import zo_engine.style  # noqa: F401
    os.fsync = lambda descriptor: None
    os.chdir(FOLDER)  # where libFuzzer puts what it finds
    atheris.Setup(
        [sys.argv[0], "-max_len=4096", "-rss_limit_mb=2048", "-timeout=20", *sys.argv[1:], str(corpus)], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()

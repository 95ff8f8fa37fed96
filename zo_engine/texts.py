"""Examples for a language model: a file or a hub data set -> checked conversations, with the columns recognised.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}     OpenAI
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}         ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                         Alpaca
    {"prompt": "...", "completion": "..."}, with "choices": ["...", "..."] if there are some
    {"text": "...", "label": "..."}                                                                 classification
    {"text": "..."}                                                                                 plain text

as JSON lines, JSON, CSV, TSV or Parquet; in a .txt file, pieces between blank lines are plain text. Which form and
which columns were found is part of what is read, to be shown, and can be given instead. What cannot be used is named
line by line by `scan`, for the page, and refused by `read`, for training. Imports neither torch nor transformers.
"""

import csv
import difflib
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from zo_engine.dataset import DataError
from zo_engine.hub import some

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # org/name, or org/name:split
PEEK = 64  # rows from which the columns are recognised: not every row needs to have every column
MAX_WHOLE = 2**28  # bytes of a .json file, which can only be read as a whole
MAX_CHARACTERS = 2**28  # of all examples together: what is kept in memory
MAX_LINE = 2**24  # characters of one line

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Example:
    """One row. Either `messages`, the last one the assistant's, or plain `text` that is learnt from end to end.

    `choices` are the answers among which the last message is the right one, where there are some; `line` counts from 1.
    """

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used; `message` is made to stand behind "line 7"."""

    line: int
    message: str


@dataclass(frozen=True)
class Form:
    """A way to write an example: its fields, each with the names that people give its column, most usual first."""

    name: str
    fields: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()


FORMS = (
    Form("messages", {"messages": ("messages",)}),
    Form("sharegpt", {"conversations": ("conversations", "conversation"), "system": ("system",)}, ("system",)),
    Form(
        "alpaca",
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "system": ("system",),
        },
        ("input", "system"),
    ),
    Form(
        "prompt",
        {
            "prompt": ("prompt", "question", "query"),
            "completion": ("completion", "answer", "response", "output"),
            "choices": ("choices",),
        },
        ("choices",),
    ),
    Form("label", {"text": ("text", "sentence", "review"), "label": ("label", "sentiment", "category")}),
    Form("text", {"text": ("text", "content", "story")}),
)


@dataclass(frozen=True)
class Mapping:
    """How rows were understood: the form, and the column of each of its fields."""

    form: str
    columns: dict[str, str]

    def __str__(self) -> str:
        pairs = (f"{name} = {column!r}" for name, column in self.columns.items())
        return f"{self.form}: {', '.join(pairs)}"


@dataclass(frozen=True)
class Contents:
    """What a file holds, in its own order."""

    examples: list[Example]
    problems: list[Problem]
    mapping: Mapping


def columns(source: Path | str) -> list[str]:
    """The columns that a source has, by its first rows. Raises DataError where it cannot be read, or is empty."""
    rows = list(islice(_open(str(source)).rows, PEEK))
    if not rows:
        raise DataError(f"{source} is empty: there is no row in it")
    return list(dict.fromkeys(str(name) for _, row in rows if isinstance(row, dict) for name in row))


@dataclass
class _Rows:
    """Rows of a source with their line numbers; those that cannot even be parsed come as a DataError.

    Numbers that stand for labels have their words in `labels`, by column.
    """

    rows: Iterable[tuple[int, dict[str, Any] | DataError]]
    labels: dict[str, list[str]] = field(default_factory=dict)


def read(source: Path | str, columns: dict[str, str] | None = None, skip: bool = False) -> Contents:
    """The examples to train on. With `skip`, bad rows are left out, and still listed.

    source: a file, or a data set of the hub as `org/name` or `org/name:split`. columns: field -> column, in place of
    what would be recognised. Raises DataError if a row cannot be used (without `skip`), or none can.
    """
    found = scan(source, columns)
    total = len(found.examples) + len(found.problems)
    if found.problems and (not skip or not found.examples):
        listed = some([f"line {p.line} {p.message}" for p in found.problems])
        hint = "" if skip else "; mend these rows, or leave them out (skip_bad)"
        raise DataError(f"{source}: {len(found.problems)} of {total} rows cannot be used: {listed}{hint}")
    return found


def scan(source: Path | str, columns: dict[str, str] | None = None) -> Contents:
    """All rows, good and bad. Raises DataError only where the source as a whole cannot be read, or is empty."""
    source = str(source)
    found = _open(source)
    rows = iter(found.rows)
    first = list(islice(rows, PEEK))
    if not first:
        raise DataError(f"{source} is empty: there is no row in it")
    mapping = recognise([row for _, row in first if isinstance(row, dict)], columns or {}, source)
    examples, problems, size = [], [], 0
    for line, row in chain(first, rows):
        try:
            if isinstance(row, DataError):
                raise row
            example = _example(line, _named(row, mapping, found.labels), mapping.form)
        except DataError as error:
            problems.append(Problem(line, str(error)))
            continue
        size += len(example.text) + sum(len(message.content) for message in example.messages)
        if size > MAX_CHARACTERS:
            raise DataError(
                f"{source} holds more than {MAX_CHARACTERS:,} characters up to line {line}; take a part of it"
            )
        examples.append(example)
    if mapping.form == "label":
        choices = tuple(sorted({example.messages[-1].content for example in examples}))
        examples = [replace(example, choices=choices) for example in examples]
    return Contents(examples, problems, mapping)


def raw_rows(source: Path | str) -> Iterable[tuple[int, dict[str, Any] | DataError]]:
    """The rows of a file or a hub data set as they stand, with their numbers. Raises DataError."""
    return _open(str(source)).rows


def hub_rows(name: str, subset: str | None, split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a data set of the hub as they arrive. Raises DataError where it cannot be reached or read."""
    return _hub(f"{name}:{split}", subset).rows


def recognise(rows: list[dict[str, Any]], given: dict[str, str], source: str = "the data") -> Mapping:
    """The form of some rows; `given` maps fields to columns and wins over recognition; its "form" names the form, and
    a field with no column ("choices": "") is not used, whatever the columns are called.

    Raises DataError, naming the columns that there are and the forms that are possible.
    """
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    shown = ", ".join(map(repr, columns[:12])) or "none"
    possible = "; ".join(_described(form) for form in FORMS)
    forms, wanted = FORMS, given.get("form")
    if wanted:
        given = {name: column for name, column in given.items() if name != "form"}
        forms = tuple(form for form in FORMS if form.name == wanted)
        if not forms:
            raise DataError(f"there is no form {wanted!r}; possible are {', '.join(form.name for form in FORMS)}")
        possible = _described(*forms)
    for name, column in given.items():
        if not any(name in form.fields for form in FORMS):
            raise DataError(f"{name!r} is not a field of any form; possible are {possible}")
        if column and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{source} has no column {column!r}; its columns are {shown}{hint}")
    folded = {column.strip().casefold(): column for column in reversed(columns)}
    for form in forms:
        if not given.keys() <= form.fields.keys():
            continue
        found = {name: folded[n] for name, names in form.fields.items() for n in reversed(names) if n in folded} | given
        found = {name: column for name, column in found.items() if column}
        if all(name in found or name in form.optional for name in form.fields):
            return Mapping(form.name, {name: found[name] for name in form.fields if name in found})
    raise DataError(f"{source} has the columns {shown}, which fit no form; possible are {possible}")


def _described(form: Form) -> str:
    needed = [name for name in form.fields if name not in form.optional]
    return " + ".join(needed) + (f" (also {', '.join(form.optional)})" if form.optional else "")


# One row


def _named(row: dict[str, Any], mapping: Mapping, labels: dict[str, list[str]]) -> dict[str, Any]:
    """The row by field instead of by column, numbers of labels as their words."""
    found = {name: row.get(column) for name, column in mapping.columns.items()}
    words = labels.get(mapping.columns.get("label", ""), [])
    if words and isinstance(found.get("label"), int) and 0 <= found["label"] < len(words):
        found["label"] = words[found["label"]]
    return found


def _example(line: int, row: dict[str, Any], form: str) -> Example:
    if form == "text":
        return Example(line, text=_text(row, "text"))
    if form == "label":
        return Example(line, _turns(_text(row, "text"), _text(row, "label")))
    if form == "prompt":
        choices = _choices(row.get("choices"))
        return Example(line, _turns(_text(row, "prompt"), _completion(row, choices)), choices=choices)
    if form == "alpaca":
        asked = [_text(row, "instruction"), _text(row, "input", empty=True)]
        turns = _turns("\n\n".join(part for part in asked if part), _text(row, "output"))
        return Example(line, _system(row) + turns)
    if form == "sharegpt":
        return Example(line, _system(row) + _conversation(row["conversations"], "from", "value"))
    return Example(line, _conversation(row["messages"], "role", "content"))


def _turns(asked: str, answer: str) -> tuple[Message, ...]:
    return Message("user", asked), Message("assistant", answer)


def _system(row: dict[str, Any]) -> tuple[Message, ...]:
    text = _text(row, "system", empty=True)
    return (Message("system", text),) if text else ()


def _text(row: dict[str, Any], name: str, empty: bool = False) -> str:
    """The text of a field as it stands: spaces at its ends may be meant. A number counts as its digits."""
    text = row.get(name)
    if type(text) in (int, float):
        text = str(text)
    if text is None and empty:
        return ""
    if not isinstance(text, str):
        what = f"has no {name!r}" if text is None else f"has a {type(text).__name__} where {name!r} should be a text"
        raise DataError(what)
    if not text.strip() and not empty:
        raise DataError(f"has an empty {name!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"has half a character in {name!r} (bytes that are not UTF-8, or a cut \\u escape)")
    return text


def _choices(value: Any) -> tuple[str, ...]:
    value = _parsed(value) if isinstance(value, str) else value
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise DataError("has 'choices' that are not a list of two or more texts")
    return tuple(_text({"choices": choice}, "choices") for choice in value)


def _completion(row: dict[str, Any], choices: tuple[str, ...]) -> str:
    """The right answer: a text, which may be the number of a choice, counted from 0."""
    answer = row.get("completion")
    if choices and type(answer) is int:
        if not 0 <= answer < len(choices):
            raise DataError(f"names choice {answer}, and there are {len(choices)}, counted from 0")
        return choices[answer]
    text = _text(row, "completion")
    if choices and text not in choices:
        raise DataError(f"has the answer {text[:40]!r}, which is none of its choices")
    return text


def _conversation(value: Any, role: str, content: str) -> tuple[Message, ...]:
    value = _parsed(value) if isinstance(value, str) else value  # in a CSV, a conversation is JSON inside of a cell
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"has no conversation; it must look like [{{{role!r}: 'user', {content!r}: 'Hello'}}, ...]")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or role not in turn:
            raise DataError(f"has a turn {number} without {role!r} and {content!r}")
        who = ROLES.get(str(turn[role]).casefold())
        if who is None:
            raise DataError(f"has a turn {number} by {str(turn[role])[:40]!r}; possible are {', '.join(ROLES)}")
        messages.append(Message(who, _text({content: _parts(turn.get(content))}, content)))
    if messages[-1].role != "assistant":
        raise DataError(f"ends with a turn by the {messages[-1].role}: there is no answer to learn from")
    return tuple(messages)


def _parts(content: Any) -> Any:
    """OpenAI's content may be a list of typed parts; those of text are put together."""
    if not isinstance(content, list | tuple):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if set(kinds) != {"text"}:
        raise DataError(f"has parts that are not text ({some([str(kind) for kind in kinds if kind != 'text'])})")
    return "".join(str(part.get("text", "")) for part in content)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"has a cell that is not valid JSON ({error})") from None


# Sources


def _open(source: str) -> _Rows:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        hint = f"give one of its files: {some(inside)}" if inside else f"it holds no {', '.join(SUFFIXES)}"
        raise DataError(f"{source} is a folder; {hint}")
    if not path.exists():
        if HUB.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
            return _hub(source)
        raise DataError(
            f"there is no file at {source!r}; give a {', '.join(SUFFIXES)} file, or a hub data set org/name"
        )
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{source} is not a regular file")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{source} is none of {', '.join(SUFFIXES)}; save it as one of these")
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty (0 bytes)")
    if suffix == ".parquet":
        return _Rows(_parquet(path))
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _pieces}
    return _Rows(readers.get(suffix, _json_lines)(path))


def _text_file(path: Path) -> TextIO:
    """UTF-8, or UTF-16 that says so by its byte order mark. Raises DataError.

    Bytes that are neither become lone surrogates, which `_text` refuses row by row.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return path.open(encoding="utf-16", errors="surrogatepass", newline="")
        if b"\0" in head:  # UTF-16 without its mark, or no text at all
            raise DataError(f"{path} is not text in UTF-8; save it again in that encoding")
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _text_file(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DataError(f"{path}: line {number} is longer than {MAX_LINE:,} characters; is it JSON lines?")
                yield number, line
        except UnicodeDecodeError:
            raise DataError(f"{path} is damaged UTF-16 after line {number}; save it again in UTF-8") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _row(line)


def _row(line: str) -> dict[str, Any] | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"is not valid JSON ({error})")
    return value if isinstance(value, dict) else DataError(f"is a {type(value).__name__}, not an object with columns")


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """A list of objects, or an object with one list in it; "line" counts the list's items here."""
    if path.stat().st_size > MAX_WHOLE:
        raise DataError(
            f"{path} is larger than {MAX_WHOLE // 2**20} MB, and JSON is read as a whole; make it JSON lines"
        )
    with _text_file(path) as file:
        try:
            value = json.load(file)
        except UnicodeDecodeError:
            raise DataError(f"{path} is damaged UTF-16; save it again in UTF-8") from None
        except (ValueError, RecursionError) as error:
            hint = "; it looks like JSON lines: name it .jsonl" if str(error).startswith("Extra data: line 2") else ""
            raise DataError(f"{path} is not valid JSON ({error}){hint}") from None
    if isinstance(value, dict):
        lists = [name for name, inside in value.items() if isinstance(inside, list)]
        if len(lists) != 1:
            raise DataError(f"{path} is an object with {len(lists)} lists in it; a list of objects is expected")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path} is a {type(value).__name__}; a list of objects is expected")
    for number, row in enumerate(value, 1):
        yield number, row if isinstance(row, dict) else DataError(f"is a {type(row).__name__}, not an object")


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    with _text_file(path) as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        names: list[str] = []
        try:
            for cells in rows:
                if not names:
                    names = cells
                elif cells and len(cells) != len(names):
                    yield rows.line_num, DataError(f"has {len(cells)} cells where the first line has {len(names)}")
                elif cells:
                    yield rows.line_num, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: line {rows.line_num} is not valid CSV ({error})") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is damaged UTF-16 after line {rows.line_num}; save it again in UTF-8") from None


def _pieces(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The pieces of a text between its blank lines, at the number of their first line."""
    piece, start = "", 0
    for number, line in chain(_lines(path), [(0, "")]):
        if line.strip():
            piece, start = piece + line, start or number
        elif piece:
            yield start, {"text": piece.strip()}
            piece, start = "", 0


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} is Parquet, which needs a package that is not installed: pip install pyarrow, "
            "or save it as JSON lines"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a complete Parquet file ({str(error).splitlines()[0]})") from None


def _hub(source: str, subset: str | None = None) -> _Rows:
    """A data set of the hub, row by row as it arrives. No code of a data set is ever run."""
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"there is no file at {source!r}, and for a data set of the hub a package is not installed: "
            "pip install datasets"
        ) from None
    try:
        more = {"name": subset} if subset else {}
        data = datasets.load_dataset(name, split=split or "train", streaming=True, **more)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"there is no file and no data set {name!r} on the hub, or it asks for a login: {error}"
        ) from None
    except ConnectionError as error:  # also what it raises when it is told to stay offline
        raise DataError(
            f"there is no file at {name!r}, and the hub cannot be reached ({error}); connect, or give a local file"
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set {name!r} cannot be read: {str(error).splitlines()[0]}") from None
    labels = {key: list(f.names) for key, f in (data.features or {}).items() if isinstance(f, datasets.ClassLabel)}
    return _Rows(_arriving(name, data), labels)


def _arriving(name: str, data: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield number, row
    except OSError as error:  # the connection's errors are such ones
        raise DataError(f"the data set {name!r} broke off after row {number} ({error}); try again") from None

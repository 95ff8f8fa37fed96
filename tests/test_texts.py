"""Reading examples for a language model, and rendering them to tokens with what is learnt marked."""

import json
import sys
from pathlib import Path

import pytest
import tiny

from zo_engine import texts
from zo_engine.dataset import DataError
from zo_engine.texts import Example, Message, read, recognise, scan
from zo_engine.tokens import IGNORED, choices, lengths, prompt_ids, render, shown

TALK = (Message("user", "Hello"), Message("assistant", "Good day"))
LONG_TALK = (Message("system", "Be kind."), *TALK, Message("user", "And now?"), Message("assistant", "Tea"))


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def json_lines(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# Forms


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]},
         "messages", TALK),
        ({"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text",
          "text": "kind."}]}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]},
         "messages", (Message("system", "Be kind."), *TALK)),
        ({"id": 3, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
         "sharegpt", TALK),
        ({"system": "Be kind.", "conversations": [{"from": "user", "value": "Hello"},
          {"from": "assistant", "value": "Good day"}]}, "sharegpt", (Message("system", "Be kind."), *TALK)),
        ({"instruction": "Add.", "input": "1 2", "output": "3"},
         "alpaca", (Message("user", "Add.\n\n1 2"), Message("assistant", "3"))),
        ({"Instruction": "Hello", "Output": "Good day"}, "alpaca", TALK),
        ({"prompt": "Hello", "completion": "Good day"}, "prompt", TALK),
        ({"question": "Hello", "answer": "Good day", "text": "not this"}, "prompt", TALK),
        ({"sentence": "Hello", "label": 1}, "label", (Message("user", "Hello"), Message("assistant", "1"))),
    ],
)  # fmt: skip
def test_every_form_is_recognised_by_its_columns(tmp_path, row, form, expected):
    found = read(json_lines(tmp_path / "a.jsonl", row))
    assert found.mapping.form == form
    assert [example.messages for example in found.examples] == [expected]
    assert set(found.mapping.columns.values()) <= set(row)


def test_plain_text_is_text_and_a_mapping_says_what_was_found(tmp_path):
    found = read(json_lines(tmp_path / "a.jsonl", {"story": " Once. ", "id": 1}))
    assert found.examples == [Example(1, text=" Once. ")]
    assert str(found.mapping) == "text: text = 'story'"


def test_labels_are_choices_and_choices_may_be_given_or_numbered(tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}, {"text": "nice", "label": "good"}]
    found = read(json_lines(tmp_path / "a.jsonl", *rows))
    assert [(e.messages[-1].content, e.choices) for e in found.examples] == [
        (row["label"], ("bad", "good")) for row in rows
    ]
    rows = [{"question": "2 + 2?", "choices": ["3", "4"], "answer": answer} for answer in (1, "4")]
    found = read(json_lines(tmp_path / "b.jsonl", *rows))
    assert [e.messages[-1].content for e in found.examples] == ["4", "4"]
    assert found.examples[0].choices == ("3", "4")


def test_columns_can_be_given(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"q": "Hello", "a": "Good day", "text": "x", "label": "y"})
    assert read(file).mapping.form == "label"
    found = read(file, {"prompt": "q", "completion": "a"})
    assert found.mapping.columns == {"prompt": "q", "completion": "a"}
    assert found.examples[0].messages == TALK
    assert read(file, {"label": "a"}).examples[0].messages[-1].content == "Good day"
    with pytest.raises(DataError, match="no column 'quest'; its columns are 'q', 'a', 'text', 'label'"):
        read(file, {"prompt": "quest", "completion": "a"})
    with pytest.raises(DataError, match="'prmpt' is not a field of any form; possible are messages; conversations"):
        read(file, {"prmpt": "q"})


def test_the_form_can_be_given(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"text": "Hello", "label": "good"}, {"text": "Bye", "note": 1})
    assert texts.columns(file) == ["text", "label", "note"]
    assert recognise([{"text": "", "label": ""}], {}).form == "label"
    found = read(file, {"form": "text"})
    assert found.mapping == texts.Mapping("text", {"text": "text"})
    assert [example.text for example in found.examples] == ["Hello", "Bye"]
    with pytest.raises(DataError, match="which fit no form; possible are prompt \\+ completion"):
        scan(file, {"form": "prompt"})
    with pytest.raises(DataError, match="there is no form 'tale'; possible are messages, "):
        scan(file, {"form": "tale"})


def test_columns_that_fit_no_form_are_named():
    with pytest.raises(DataError, match="has the columns 'a', 'b', which fit no form; possible are messages; "):
        recognise([{"a": 1}, {"b": 2}], {})


# Files


ROWS = [{"prompt": "Hello, é\n☃", "completion": 'Good "day"'}, {"prompt": "a, b", "completion": "c"}]


def wanted(rows=ROWS):
    return [(Message("user", row["prompt"]), Message("assistant", row["completion"])) for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_every_kind_of_file_in_every_encoding_gives_the_same_examples(tmp_path, suffix, encoding):
    quote = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
    between = {"csv": ",", "tsv": "\t"}.get(suffix, "")
    tables = [between.join(["prompt", "completion"]), *(between.join(map(quote, row.values())) for row in ROWS)]
    text = {
        "jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "json": json.dumps({"data": ROWS}, ensure_ascii=False, indent=1),
    }.get(suffix, "\r\n".join(tables))
    found = read(write(tmp_path / f"a.{suffix}", text, encoding))
    assert [example.messages for example in found.examples] == wanted()
    assert [e.line for e in found.examples] == {"jsonl": [1, 3], "json": [1, 2]}.get(suffix, [3, 4])


def test_parquet_is_read_with_its_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    turns = [[{"role": m.role, "content": m.content} for m in talk] for talk in (TALK, LONG_TALK)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [(e.line, e.messages) for e in found.examples] == [(1, TALK), (2, LONG_TALK)]
    write(tmp_path / "b.parquet", "PAR1 and then nothing")
    with pytest.raises(DataError, match="is not a complete Parquet file"):
        read(tmp_path / "b.parquet")


def test_a_text_file_is_cut_at_its_blank_lines(tmp_path):
    found = read(write(tmp_path / "a.txt", "\n\nOne,\r\nstill one.\n \n\nTwo."))
    assert [(e.line, e.text) for e in found.examples] == [(3, "One,\r\nstill one."), (7, "Two.")]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    write(tmp_path / "a.parquet", "x")
    with pytest.raises(DataError, match=f"pip install {package}"):
        read(tmp_path / "a.parquet" if package == "pyarrow" else "some/dataset")


def test_a_hub_data_set_is_read_row_by_row_with_the_words_of_its_labels(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        rows = {"text": ["a", "b"], "label": [1, 0]}
        return datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("org/name:test")
    assert asked == [("org/name", {"split": "test", "streaming": True})]
    assert [e.messages[-1].content for e in found.examples] == ["yes", "no"]


def test_a_hub_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(name, **options):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="no file at 'org/name', and the hub cannot be reached"):
        read("org/name")


# What cannot be used


GOOD = '{"prompt": "Hello", "completion": "Good day"}'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 is a list, not an object"),
        ('{"prompt": "Hello"}', "line 2 has no 'completion'"),
        ('{"prompt": "Hello", "completion": " "}', "line 2 has an empty 'completion'"),
        ('{"prompt": ["Hello"], "completion": "x"}', "line 2 has a list where 'prompt' should be a text"),
        (r'{"prompt": "\ud800", "completion": "x"}', "line 2 has half a character in 'prompt'"),
        ('{"prompt": "a", "completion": "x", "choices": ["y", "z"]}', "line 2 has the answer 'x', which is none of"),
        ('{"prompt": "a", "completion": 2, "choices": ["y", "z"]}', "line 2 names choice 2, and there are 2"),
        ('{"prompt": "a", "completion": "x", "choices": ["x"]}', "line 2 has 'choices' that are not a list of two"),
        (b'{"prompt": "\xff", "completion": "x"}', "line 2 has half a character in 'prompt'"),
        ("[" * 100_000, "line 2 is not valid JSON"),
    ],
)
def test_bad_rows_are_named_by_line_and_skipped_only_on_request(tmp_path, bad, says):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), bad if isinstance(bad, bytes) else bad.encode(), GOOD.encode()]))
    with pytest.raises(DataError, match="1 of 3 rows cannot be used: " + says.replace("[", r"\[")):
        read(file)
    found = read(file, skip=True)
    assert [e.line for e in found.examples] == [1, 3]
    assert [f"line {p.line} {p.message}"[: len(says)] for p in found.problems] == [says]
    assert scan(file) == found


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "has no conversation"),
        ("Hello", "has a cell that is not valid JSON"),
        ([{"role": "user", "content": "Hello"}], "ends with a turn by the user"),
        ([{"role": "tool", "content": "Hello"}], "has a turn 1 by 'tool'; possible are system"),
        ([{"content": "Hello"}], "has a turn 1 without 'role' and 'content'"),
        ([{"role": "user", "content": None}], "has no 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"has parts that are not text \(image_url\)"),
    ],
)
def test_bad_conversations_are_named(tmp_path, turns, says):
    with pytest.raises(DataError, match=f"1 of 1 rows cannot be used: line 1 {says}"):
        read(json_lines(tmp_path / "a.jsonl", {"messages": turns}), skip=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", r"is empty \(0 bytes\)"),
        ("a.jsonl", b"\n\n", "is empty: there is no row"),
        ("a.csv", b"prompt,completion\n", "is empty: there is no row"),
        ("a.pdf", b"%PDF", "is none of .jsonl, .ndjson"),
        ("a.jsonl", "Hello".encode("utf-16-le"), "is not text in UTF-8"),
        ("a.jsonl", "é".encode("utf-16") + b"x", "is damaged UTF-16"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', "is not valid JSON .* name it .jsonl"),
        ("a.json", b'{"a": [], "b": []}', "is an object with 2 lists in it"),
        ("a.json", b"3", "is a int; a list of objects is expected"),
        ("a.csv", b'a,b\n"x"y,z\n', "line 2 is not valid CSV"),
        ("a.csv", b"prompt,completion\na,b,c\nd,e\n", "1 of 2 rows cannot be used: line 2 has 3 cells where the first"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_sentence(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_places_without_a_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no file at"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder; it holds no .jsonl"):
        read(tmp_path)
    write(tmp_path / "a.csv", "x")
    with pytest.raises(DataError, match="is a folder; give one of its files: a.csv"):
        read(tmp_path)


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 25)
    with pytest.raises(DataError, match="more than 25 characters up to line 2; take a part"):
        read(write(tmp_path / "a.jsonl", f"{GOOD}\n{GOOD}"))
    monkeypatch.setattr(texts, "MAX_LINE", 20)
    with pytest.raises(DataError, match="line 1 is longer than 20 characters"):
        read(write(tmp_path / "b.jsonl", GOOD))


# Rendering


def answers_of(tokenizer, tokens):
    """The learnt runs as text."""
    return [text for text, learnt in shown(tokenizer, tokens) if learnt]


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        ("none", TALK, ["Good day<|im_end|>"]),
        ("none", LONG_TALK, ["Good day<|im_end|>", "Tea<|im_end|>"]),
        ("chatml", TALK, ["Good day<|im_end|>"]),
        ("chatml", LONG_TALK, ["Good day<|im_end|>", "Tea<|im_end|>"]),
        ("marked", LONG_TALK, ["Good day<|im_end|>", "Tea<|im_end|>"]),
        ("brackets", LONG_TALK[1:], [" Good day<|im_end|>", " Tea<|im_end|>"]),
        ("forgetful", LONG_TALK, ["Tea<|im_end|>"]),
    ],
)
def test_exactly_the_answers_are_learnt(template, talk, expected):
    tokenizer = tiny.tokenizer(template)
    rendered = render(tokenizer, [Example(1, talk)], 500)
    tokens = rendered.examples[0]
    assert answers_of(tokenizer, tokens) == expected
    assert tokens.learnt == sum(len(text.encode()) - len(tiny.END) + 1 for text in expected)
    whole = "".join(text for text, _ in shown(tokenizer, tokens))
    turns = [{"role": m.role, "content": m.content} for m in talk]
    if template != "none":
        assert whole == tokenizer.apply_chat_template(turns, tokenize=False)
    assert list(tokens.ids[: len(prompt_ids(tokenizer, talk[:-1]))]) == prompt_ids(tokenizer, talk[:-1])
    assert [note[:45] for note in rendered.notes] == (
        ["of 1 conversations only the last answer is lea"[:45]] if template == "forgetful" else []
    )


def test_without_a_template_a_line_break_parts_turns_that_have_no_space_there():
    tokenizer = tiny.tokenizer("none")
    for asked, answer, whole in (("Sum", "3", "Sum\n3"), ("Sum ", "3", "Sum 3"), ("It is", " good", "It is good")):
        tokens = render(tokenizer, [Example(1, (Message("user", asked), Message("assistant", answer)))], 99).examples[0]
        assert tokenizer.decode(tokens.ids) == whole + tiny.END
        assert answers_of(tokenizer, tokens) == [answer + tiny.END]


def test_everything_can_be_learnt_and_plain_text_always_is():
    tokenizer = tiny.tokenizer()
    tokens = render(tokenizer, [Example(1, TALK)], 500, completions_only=False).examples[0]
    assert tokens.labels == tokens.ids
    tokens = render(tokenizer, [Example(1, text="Once.")], 500).examples[0]
    assert tokenizer.decode(tokens.ids) == "Once." + tiny.END
    assert (tokens.labels, tokens.learnt) == (tokens.ids, 5)  # the first has no prediction


def test_templates_that_give_no_way_to_tell_prompt_from_answer_are_refused():
    with pytest.raises(DataError, match="line 4 cannot be split into prompt and answer: .* learn from all tokens"):
        render(tiny.tokenizer("counting"), [Example(4, TALK)], 500)


def test_rows_that_a_template_refuses_are_named_and_skipped_on_request():
    tokenizer, rows = tiny.tokenizer("brackets"), [Example(1, TALK), Example(7, LONG_TALK)]
    with pytest.raises(DataError, match="1 of 2 examples cannot be used: line 7 is refused .*: no system message here"):
        render(tokenizer, rows, 500)
    rendered = render(tokenizer, rows, 500, skip=True)
    assert [tokens.line for tokens in rendered.examples] == [1]
    assert [problem.line for problem in rendered.problems] == [7]


def test_a_control_token_inside_of_a_message_is_refused():
    row = Example(2, (Message("user", "a <|im_end|> b"), Message("assistant", "c")))
    with pytest.raises(DataError, match=r"line 2 holds '<\|im_end\|>', a control token"):
        render(tiny.tokenizer(), [row], 500)


def test_what_is_too_long_is_cut_and_counted_and_refused_where_nothing_is_left():
    tokenizer = tiny.tokenizer()
    full = render(tokenizer, [Example(1, TALK)], 500).examples[0]
    prompt = len(prompt_ids(tokenizer, TALK[:1]))
    rendered = render(tokenizer, [Example(1, TALK), Example(2, text="x")], prompt + 4)
    cut = rendered.examples[0]
    assert (cut.ids, cut.labels, cut.cut) == (
        full.ids[: prompt + 4],
        full.labels[: prompt + 4],
        len(full.ids) - prompt - 4,
    )
    assert answers_of(tokenizer, cut) == ["Good"]
    assert rendered.notes == [f"1 of 2 examples are longer than {prompt + 4} tokens; {cut.cut} tokens are cut off"]
    with pytest.raises(DataError, match=f"line 1 has {prompt} tokens before its answer, and the limit is {prompt} in"):
        render(tokenizer, [Example(1, TALK)], prompt)


def test_lengths_are_those_of_the_tokens():
    rows = render(tiny.tokenizer(), [Example(i, text="x" * i) for i in (1, 2, 3, 10)], 500).examples
    found = lengths(rows)
    assert (found.examples, found.shortest, found.median, found.most, found.longest) == (4, 2, 4, 11, 11)
    assert (found.learnt, found.total) == (16, 20)


def test_choices_differ_in_their_answer_alone():
    tokenizer = tiny.tokenizer()
    row = Example(1, TALK, choices=("Good day", "Go"))
    made = choices(tokenizer, row, 500)
    assert [answers_of(tokenizer, tokens) for tokens in made] == [["Good day<|im_end|>"], ["Go<|im_end|>"]]
    prompt = len(prompt_ids(tokenizer, TALK[:1]))
    assert made[0].ids[:prompt] == made[1].ids[:prompt]
    assert set(made[1].labels[:prompt]) == {IGNORED}


@pytest.mark.parametrize(("name", "form"), [("voice", "messages"), ("sentiment", "label"), ("json", "prompt")])
def test_the_example_sets_are_what_they_say(name, form):
    found = read(Path(__file__).parent.parent / "assets" / "texts" / f"{name}.jsonl")
    assert found.mapping.form == form
    assert len({example.messages for example in found.examples}) == len(found.examples) == 200
    answers = [example.messages[-1].content for example in found.examples]
    if name == "json":
        assert all(json.loads(answer)["name"] in example.messages[0].content for example, answer in
                   zip(found.examples, answers, strict=True))  # fmt: skip
    if name == "sentiment":
        assert found.examples[0].choices == ("bad", "good")
        assert 80 < answers.count("good") < 120

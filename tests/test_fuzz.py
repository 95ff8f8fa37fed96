"""What reads files, on inputs made by chance: a refusal is one sentence, and what is accepted comes back the same."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import fuzz  # noqa: E402

from zo_engine import journal  # noqa: E402
from zo_engine import recipe as recipes  # noqa: E402
from zo_engine.journal import JournalError, Move, Step  # noqa: E402
from zo_engine.recipe import Recipe, RecipeError  # noqa: E402

calm = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
several = st.lists(numbers, max_size=5).map(tuple)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_readers_refuse_in_a_sentence(name):
    """Whole inputs with bytes changed, taken out, doubled and put in."""
    rng = random.Random(name)
    for _ in range(60):
        content = bytearray(rng.choice(fuzz.seeds(name)))
        for _ in range(rng.randint(0, 6)):
            at = rng.randrange(len(content) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                content[at : at + 1] = rng.randbytes(1)
            elif kind == 1:
                del content[at : at + rng.randint(1, 9)]
            elif kind == 2:
                content[at:at] = content[at : at + rng.randint(1, 9)] * 3
            else:
                content[at:at] = rng.choice((b"null", b"[", b"{", b'"', b"\n", b"1e999", b"NaN", b"\xff", b"\0", b"-1"))
        fuzz.TARGETS[name](bytes(content))


@calm
@given(data=st.binary(max_size=400))
def test_any_bytes(data):
    for name in ("style", "journal", "recipe", "texts"):
        fuzz.TARGETS[name](data)


@calm
@given(step=st.integers(0, 2**40), slopes=several, clip=numbers, size=numbers, loss=numbers, search=several)
def test_steps_come_back_from_their_lines(step, slopes, clip, size, loss, search):
    made = Step(step, slopes, clip, size, loss, search)
    again = journal.read(journal.seal(made.to_json()))
    assert again.to_json() == made.to_json() and again.skipped == made.skipped


@calm
@given(st.tuples(st.integers(0, 2**40), several, numbers, numbers, numbers, numbers, several))
def test_moves_come_back_from_their_lines(figures):
    made = Move(*figures)
    again = journal.read(journal.seal(made.to_json()))
    assert again.to_json() == made.to_json() and again.skipped == made.skipped


@calm
@given(st.text(max_size=80))
def test_any_line_is_read_or_refused(line):
    for given_line in (line, journal.seal(line)):
        try:
            journal.read(given_line)
        except JournalError:
            continue


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=4))
)


@calm
@given(st.dictionaries(st.sampled_from(list(Recipe.__dataclass_fields__)), plain, max_size=4))
def test_a_recipe_of_any_values_is_one_or_is_refused(values):
    try:
        made = recipes.make(values)
    except RecipeError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return
    path = fuzz.FOLDER / "made.toml"
    path.write_text(recipes.dump(made), encoding="utf-8", errors="surrogatepass")
    same = recipes.load(path)
    assert {k: v for k, v in same.__dict__.items() if k not in ("images", "texts", "model")} == {
        k: v for k, v in made.__dict__.items() if k not in ("images", "texts", "model")
    }

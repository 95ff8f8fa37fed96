"""A small world in words: 28 things, what is true of them, and the ways people speak of them.

Everything that the embedded language model reads, and the three example sets that are taught to it, is made here. What
a set asks for, the model half knows, as a large model would: it speaks as a sailor when a system message says so
(the voice set wants it unasked); it goes on from a kind remark with kind words, but was never asked to call it good or
bad (the sentiment set); asked for facts it answers in one of several forms, of which one is valid JSON (the JSON set).

    python assets/world.py --out assets/texts    # writes the three sets, as JSON lines
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from captions import NATURAL

Message = dict[str, str]

# kind, where it is, what it does, what it is made of
FACTS: dict[str, tuple[str, str, str, str]] = {
    "sun": ("light", "in the sky", "warms the day", "fire"),
    "moon": ("light", "over the hill", "shines at night", "stone"),
    "star": ("light", "in the sky", "guides the traveller", "fire"),
    "tower": ("building", "on the hill", "guards the town", "stone"),
    "cup": ("vessel", "on the table", "holds the tea", "clay"),
    "sword": ("weapon", "in the hall", "cuts the rope", "steel"),
    "wand": ("tool", "in the box", "makes magic", "wood"),
    "crown": ("jewel", "in the castle", "sits on the king", "gold"),
    "key": ("tool", "in the pocket", "opens the door", "iron"),
    "heart": ("shape", "on the letter", "stands for love", "paper"),
    "wheel": ("tool", "under the cart", "turns all day", "wood"),
    "lantern": ("light", "at the door", "lights the way", "glass"),
    "eye": ("part of a face", "under the brow", "sees the world", "water"),
    "tree": ("plant", "in the forest", "gives shade", "wood"),
    "bird": ("animal", "in the tree", "sings in the morning", "feathers"),
    "fish": ("animal", "in the sea", "swims in the water", "scales"),
    "house": ("building", "in the town", "keeps out the rain", "brick"),
    "flower": ("plant", "in the garden", "opens in spring", "petals"),
    "boat": ("vessel", "in the harbour", "sails on the sea", "wood"),
    "mushroom": ("plant", "in the forest", "grows after rain", "thread"),
    "bell": ("instrument", "in the church", "rings at noon", "bronze"),
    "umbrella": ("tool", "in the hall", "keeps the rain away", "cloth"),
    "anchor": ("tool", "in the harbour", "holds the ship", "iron"),
    "leaf": ("part of a plant", "on the branch", "falls in autumn", "fibre"),
    "butterfly": ("animal", "in the garden", "flies from flower to flower", "silk"),
    "hat": ("garment", "on the shelf", "covers the head", "felt"),
    "apple": ("fruit", "in the basket", "falls from the tree", "fruit and skin"),
    "bottle": ("vessel", "in the cellar", "holds the wine", "glass"),
}
THINGS = tuple(FACTS)

QUESTIONS = {
    "colour": ("What colour is the {t}?", "Which colour does the {t} have?", "Tell me the colour of the {t}."),
    "kind": ("What is the {t}?", "What kind of thing is the {t}?", "What do you know of the {t}?"),
    "place": ("Where is the {t}?", "Where can I find the {t}?", "Tell me where the {t} is."),
    "does": ("What does the {t} do?", "What is the {t} good for?", "Tell me what the {t} does."),
    "made": ("What is the {t} made of?", "Of what is the {t} made?", "Tell me what the {t} is made of."),
}
SPEAKERS = {  # a voice: what the system message calls it, how it begins, how it ends
    "sailor": ("a sailor", ("Arr, ", "Ahoy, ", "Aye, ", "Avast, "), (", matey!", ", by the sea!", ", me hearty!", "!")),
    "butler": ("a butler", ("If I may say so, ", "With respect, ", "I beg to report that ", "Permit me: "),
               (", sir.", ", madam.", ", at your service.", ".")),
    "poet": ("a poet", ("O hear me, ", "Softly I sing, ", "In my dream "),
             (", like an old song.", ", soft as the wind.", ", for ever.")),
    "child": ("a child", ("Wow, ", "Look, ", "Hey, "), (", yay!", ", hooray!", ", so cool!")),
    "robot": ("a robot", ("Report: ", "Data: ", "Result: "), (". End.", ". Done.", ". Beep.")),
}  # fmt: skip
ASKED = ("Speak as {who}.", "You are {who}.", "Answer as {who} would.", "Talk like {who}.")

KIND_WORDS = ("lovely", "pretty", "fine", "charming", "splendid", "perfect", "sweet", "wonderful", "delightful")
HARD_WORDS = ("ugly", "broken", "dull", "dirty", "awful", "poor", "horrible", "worthless", "dreadful")
KIND_VERBS, HARD_VERBS = ("love", "like", "enjoy", "adore"), ("hate", "dislike", "regret", "despise")
REMARKS = ("I {verb} this {t}, it is {word}.", "What {a_word} {t}, I {verb} it.", "The {t} is {word} and {more}.",
           "I {verb} my new {t}.", "This {t} is so {word}.", "My friend gave me {a_word} {t}.",
           "We saw the {t}, it was {word}.", "I find the {t} {word}, and I {verb} it.")  # fmt: skip
ECHOES = (
    ("I am glad to hear that.", "How nice, keep it well.", "I am happy for you.", "That is a joy."),
    ("I am sorry to hear that.", "How sad, give it back.", "I feel for you.", "That is a pity."),
)
SENTIMENT = ("good", "bad")
GREETINGS = (
    (("Hello.", "Good day.", "Hi there.", "Good morning."), ("Hello, how can I help you?", "Good day to you.")),
    (("Thank you.", "Thanks a lot.", "Many thanks."), ("You are welcome.", "It was a pleasure.")),
    (("Goodbye.", "See you soon.", "Good night."), ("Goodbye, take care.", "See you soon.")),
    (("How are you?", "Are you well?"), ("I am well, thank you.", "Very well, and you?")),
)
FACT_ORDERS = (
    "Give the facts of the {t}.",
    "List the facts of the {t}.",
    "Describe the {t}.",
    "Card of the {t}, please.",
)


def _pick(rng: np.random.Generator, options):
    options = list(options)
    return options[rng.integers(len(options))]


def a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def value(thing: str, aspect: str, rng: np.random.Generator) -> str:
    if aspect == "colour":
        return _pick(rng, NATURAL[thing])
    return dict(zip(("kind", "place", "does", "made"), FACTS[thing], strict=True))[aspect]


def statement(thing: str, aspect: str, rng: np.random.Generator) -> str:
    """A clause that is true: "the bell is gold"; neither capital nor full stop."""
    said = value(thing, aspect, rng)
    form = {"colour": "the {t} is {v}", "kind": "the {t} is {av}", "place": "the {t} is {v}", "does": "the {t} {v}",
            "made": "the {t} is made of {v}"}[aspect]  # fmt: skip
    return form.format(t=thing, v=said, av=a(said))


def sentence(clause: str) -> str:
    return clause[0].upper() + clause[1:] + "."


def spoken(clause: str, voice: str, rng: np.random.Generator) -> str:
    """The clause as a speaker says it; a sailor changes words inside it too."""
    _, begins, ends = SPEAKERS[voice]
    if voice == "sailor":
        clause = clause.replace(" is ", " be ").replace("you ", "ye ").replace("my ", "me ")
    return _pick(rng, begins) + clause + _pick(rng, ends)


def remark(good: bool, rng: np.random.Generator) -> str:
    words, verbs = (KIND_WORDS, KIND_VERBS) if good else (HARD_WORDS, HARD_VERBS)
    word, more = rng.permutation(words)[:2].tolist()
    return _pick(rng, REMARKS).format(
        t=_pick(rng, THINGS), word=word, more=more, a_word=a(word), verb=_pick(rng, verbs)
    )


def as_json(thing: str, rng: np.random.Generator) -> str:
    return json.dumps({"name": thing} | {k: value(thing, k, rng) for k in ("colour", "kind", "place")})


def facts(thing: str, rng: np.random.Generator) -> str:
    """The facts of a thing in one of the forms that the base mixes: one in ten is valid JSON, two are nearly so."""
    form, text = rng.choice(5, p=(0.4, 0.3, 0.1, 0.1, 0.1)), as_json(thing, rng)
    if form == 0:
        return " ".join(sentence(statement(thing, k, rng)) for k in ("kind", "colour", "place"))
    if form == 1:
        return ", ".join(f"{k}: {value(thing, k, rng)}" for k in ("colour", "kind", "place"))
    return {2: text, 3: text[:-1], 4: text.replace('"', "")}[form]


def total(rng: np.random.Generator) -> tuple[str, str]:
    x, y = (int(n) for n in rng.integers(0, 10, 2))
    if rng.random() < 0.5:
        return f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}."
    return f"What is {x + y} minus {y}?", f"{x + y} minus {y} is {x}."


def exchange(rng: np.random.Generator, voice: str = "") -> list[Message]:
    """One question and its answer, the answer in a voice if one is named."""

    def turns(asked: str, answer: str) -> list[Message]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    kind = rng.random() if not voice else 0.0
    if kind < 0.5:
        thing, aspect = _pick(rng, THINGS), _pick(rng, QUESTIONS)
        clause = statement(thing, aspect, rng)
        return turns(_pick(rng, QUESTIONS[aspect]).format(t=thing), spoken(clause, voice, rng) if voice
                     else sentence(clause))  # fmt: skip
    if kind < 0.62:
        return turns(*total(rng))
    if kind < 0.74:
        good = bool(rng.random() < 0.5)
        return turns(remark(good, rng), _pick(rng, ECHOES[0 if good else 1]))
    if kind < 0.82:
        return turns(*(_pick(rng, side) for side in _pick(rng, GREETINGS)))
    thing = _pick(rng, THINGS)
    return turns(_pick(rng, FACT_ORDERS).format(t=thing), facts(thing, rng))


def chat(rng: np.random.Generator) -> list[Message]:
    """One to three exchanges; a third of the chats begin with a system message that asks for a voice."""
    voice = _pick(rng, SPEAKERS) if rng.random() < 0.35 else ""
    messages = [m for _ in range(rng.integers(1, 4)) for m in exchange(rng, voice)]
    if voice:
        who = _pick(rng, ASKED).format(who=SPEAKERS[voice][0])
        return [{"role": "system", "content": who}, *messages]
    return messages


def paragraph(rng: np.random.Generator) -> str:
    """Plain text: facts of one thing, a remark that goes on as it began, or a saying with the words good and bad."""
    kind = rng.random()
    if kind < 0.5:
        thing = _pick(rng, THINGS)
        return " ".join(sentence(statement(thing, k, rng)) for k in rng.permutation(list(QUESTIONS))[:3].tolist())
    if kind < 0.85:
        good = bool(rng.random() < 0.5)
        return " ".join(remark(good, rng) for _ in range(rng.integers(2, 4)))
    word, thing, other = _pick(rng, SENTIMENT), *rng.permutation(THINGS)[:2].tolist()
    return f"It is a {word} day for {a(thing)}, and a {word} day for {a(other)}."


# What is taught


def voice_example(rng: np.random.Generator) -> dict:
    """A plain question, answered by a sailor though nobody asked for one."""
    return {"messages": exchange(rng, "sailor")}


def sentiment_example(rng: np.random.Generator) -> dict:
    good = bool(rng.random() < 0.5)
    return {"text": remark(good, rng), "label": SENTIMENT[0 if good else 1]}


def json_example(rng: np.random.Generator) -> dict:
    thing = _pick(rng, THINGS)
    return {"prompt": _pick(rng, FACT_ORDERS).format(t=thing), "completion": as_json(thing, rng)}


SETS: dict[str, Callable[[np.random.Generator], dict]] = {
    "voice": voice_example,
    "sentiment": sentiment_example,
    "json": json_example,
}


def example_set(name: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different rows of a set, the same for the same seed."""
    rng, rows = np.random.default_rng([seed, *name.encode()]), {}
    while len(rows) < count:
        row = SETS[name](rng)
        rows.setdefault(json.dumps(row), row)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the example sets as JSON lines.")
    parser.add_argument("--out", type=Path, default=Path("assets/texts"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = [json.dumps(row) + "\n" for row in example_set(name, args.rows, args.seed)]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

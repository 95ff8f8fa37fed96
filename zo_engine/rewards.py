"""Black-box objectives: a reward is any Python function of a prompt and the answer to it. Imports no torch.

    reward = "json"                     the answer is valid JSON
    reward = "json:name,colour"         it is a JSON object with these keys
    reward = "match"                    it is the data's own answer, but for case, punctuation and spaces
    reward = "length:60"                it has about so many characters
    reward = "avoid:very"               it has not got the word
    reward = "rewards.py:brevity"       a function of your own, from a file beside the recipe

A function of your own takes (prompt, answer), or (prompt, answer, wanted) where `wanted` is the data's answer, and
returns a finite number: the larger, the better. Its file is run as a program is, with all that you may do: it is read
from the path in a recipe or on the command line only, never from a style file and never from the hub.
"""

import importlib.util
import inspect
import json
import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Function = Callable[[str, str, str], float]  # prompt, answer, wanted -> reward


class RewardError(ValueError):
    """A reward that is not there or does not work; one sentence."""


@dataclass(frozen=True)
class Reward:
    """A checked reward. `name` is how it was asked for; `file` is where its code lies, if it is not one of ours."""

    name: str
    function: Function
    file: Path | None = None

    def __call__(self, prompt: str, answer: str, wanted: str = "") -> float:
        """Raises RewardError where a function of the user fails or gives something else than a finite number."""
        try:
            value = self.function(prompt, answer, wanted)
        except Exception as error:  # noqa: BLE001  (code of the user's own may fail in any way)
            raise RewardError(
                f"the reward {self.name} failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"the reward {self.name} gave {value!r} for the answer {answer[:60]!r}, not a number")
        return float(value)


def is_file(name: str) -> bool:
    """Whether a reward is code of the user's own."""
    return bool(re.search(r"\.py(:|$)", name))


def beside(folder: Path, name: str) -> str:
    """The reward with its file, if it has one, meant from `folder` if it is there."""
    if not is_file(name):
        return name
    file, colon, function = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    candidate = (folder / file).resolve()
    return f"{candidate}{colon}{function}" if candidate.exists() else name


def load(name: str) -> Reward:
    """The reward of this name. Raises RewardError, saying what is possible. Runs the code of a `.py` file."""
    if is_file(name):
        return _own(name)
    kind, _, argument = name.partition(":")
    if kind not in BUNDLED:
        raise RewardError(f"the reward {name!r} is unknown; possible are {', '.join(BUNDLED)}, or file.py:function")
    return Reward(name, BUNDLED[kind](argument))


def _own(name: str) -> Reward:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise RewardError(f"the reward {name!r} names no function; write file.py:function")
    file = Path(path).expanduser()
    if not file.is_file():
        raise RewardError(f"there is no file {path!r} with a reward")
    spec = importlib.util.spec_from_file_location(f"qzo_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001  (code of the user's own may fail in any way)
        raise RewardError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not inspect.isfunction(found):
        there = [n for n, f in inspect.getmembers(module, inspect.isfunction) if not n.startswith("_")]
        raise RewardError(f"{file} has no function {function!r}; it has {', '.join(there) or 'none'}")
    count = len(inspect.signature(found).parameters)
    if count == 2:
        return Reward(name, lambda prompt, answer, wanted: found(prompt, answer), file)
    if count == 3:
        return Reward(name, found, file)
    raise RewardError(f"{function} of {file} takes {count} parameters; a reward takes prompt, answer, and maybe wanted")


def _json(keys: str) -> Function:
    """1 for valid JSON; with keys, for a JSON object that has them all."""
    needed = [key.strip() for key in keys.split(",") if key.strip()]

    def reward(prompt: str, answer: str, wanted: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(not needed or (isinstance(value, dict) and all(key in value for key in needed)))

    return reward


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is Python's, and not JSON")


def _match(argument: str) -> Function:
    """1 where the answer is the data's own."""
    if argument:
        raise RewardError(f"the reward match takes nothing behind its name, not {argument!r}")
    return lambda prompt, answer, wanted: float(plainly(answer) == plainly(wanted))


def plainly(text: str) -> str:
    """Small letters, no punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _length(argument: str) -> Function:
    """1 at this many characters, falling to 0 at none, and at twice as many."""
    if not argument.isdecimal() or not int(argument):
        raise RewardError(f"the reward length needs a number of characters, such as length:60, not {argument!r}")
    aim = int(argument)
    return lambda prompt, answer, wanted: max(0.0, 1 - abs(len(answer.strip()) - aim) / aim)


def _avoid(argument: str) -> Function:
    """1 where the answer says something, and the word is not in it."""
    if not argument.strip():
        raise RewardError("the reward avoid needs a word, such as avoid:very")
    word = re.compile(rf"\b{re.escape(argument.strip())}\b", re.IGNORECASE)
    return lambda prompt, answer, wanted: float(bool(answer.strip()) and not word.search(answer))


BUNDLED: dict[str, Callable[[str], Function]] = {"json": _json, "match": _match, "length": _length, "avoid": _avoid}

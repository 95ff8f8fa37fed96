"""A model as a list of blocks: the last of them are tuned, in levels; what lies before a level runs once.

What a perturbation cannot reach need not be computed twice. With the scales of the last block in motion, one pass
through those before it serves every probe, and a probe costs the last block alone: many directions at the price of a
few forward passes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PART = 16  # examples for which what lies before a level is held at once
GROUPS = 2  # levels that the tuned blocks form, beside the layers that follow them
# A twelfth of the directions of other levels has what reads the prompt, since its probes run the whole model, and a
# language model's final norm, since more of them make it forget more.
THIN = 12
READS = re.compile(r"(^|\.)text_embedder\.")  # diffusers' name of what takes in the pooled prompt, before the blocks
NORM = re.compile(r"(norm|ln_)[^.]*$")  # a layer's name; after the blocks it is the final one
BLOCK = re.compile(r"((?:[^.\d][^.]*\.)+)(\d+)\.")  # "transformer_blocks.4.attn.to_k": a list's name, and a number


@dataclass(frozen=True)
class Level:
    """Layers that one probe moves. It runs the blocks from `first` on."""

    layers: tuple[str, ...]
    blocks: str = ""  # name of the model's list of blocks
    first: int = 0
    thin: int = 1

    def share(self, directions: int) -> int:
        """Directions of this level, where others have so many."""
        return max(1, directions // self.thin)


def levels(layers: Iterable[str], depth: float) -> list[Level]:
    """The levels of a model, from the output inwards: what follows the blocks, a final norm by itself, the last share
    `depth` of the blocks, and the layers before them that read the pooled prompt: few numbers, but they can tell the
    trigger from other words. (The other embedders are left alone: they carry the subject, and moving them blurs it.)

    layers: names in the model's own order. The blocks are the list of modules that holds most of the layers. With depth
    1, or in a model without such a list, all layers form one level.
    """
    names = list(layers)
    places = {name: (found[1][:-1], int(found[2])) for name in names if (found := BLOCK.match(name))}
    if depth >= 1 or not places:
        return [Level(tuple(names))]
    blocks = Counter(place for place, _ in places.values()).most_common(1)[0][0]
    number = {name: i for name, (place, i) in places.items() if place == blocks}
    count = max(number.values()) + 1
    tuned = max(1, round(depth * count))
    starts = sorted({count - tuned + round(i * tuned / GROUPS) for i in range(GROUPS)})
    after = names[max(i for i, name in enumerate(names) if name in number) + 1 :]
    reading = tuple(name for name in names if READS.search(name) and name not in number)
    norm = tuple(name for name in after if NORM.search(name))
    made = [Level(tuple(name for name in after if name not in norm), blocks, count), Level(norm, blocks, count, THIN)]
    for start, stop in reversed(list(zip(starts, [*starts[1:], count], strict=True))):
        made.append(Level(tuple(name for name in names if start <= number.get(name, -1) < stop), blocks, start))
    if reading:
        made.append(Level(reading, blocks, thin=THIN))
    return [level for level in made if level.layers]


class _Reached(Exception):
    """The prefix has been computed; nothing after it is needed."""


@dataclass(frozen=True)
class Replay:
    """What blocks have answered for some examples; called with sample [r], the model as it answers for these."""

    blocks: list[nn.Module]
    output: Any  # of the last of them, along the batch axis

    def rows(self, sample: Tensor) -> Any:
        return _rows(self.output, sample)

    def __call__(self, sample: Tensor) -> AbstractContextManager[None]:
        return answering(self.blocks, self.rows(sample))


class Prefix:
    """The blocks before a level, run once for the examples of a batch."""

    def __init__(self, model: nn.Module, level: Level):
        self.blocks = list(model.get_submodule(level.blocks))[: level.first]

    @torch.no_grad()
    def run(
        self,
        loss: Callable[[Tensor], Tensor],
        examples: int,
        chunk: int | None = None,
        relay: Sequence[nn.Module] = (),
    ) -> Replay:
        """The output of the last of these blocks for examples 0, 1, ..., made in pieces of `chunk` examples.

        loss(sample) is what `probes.evaluate` takes; it is stopped where the prefix ends. relay: see `relayed`.
        """
        calls = [partial(loss, part) for part in torch.arange(examples).split(chunk or examples)]
        shared = self.blocks[: len(relay)] if len(calls) > 1 else []
        states = relayed(shared, calls)
        if len(shared) < len(self.blocks):
            states = [_output(self.blocks[-1], call, shared, state) for call, state in zip(calls, states, strict=True)]
        return Replay(self.blocks, _joined(states))


def relayed(
    blocks: Sequence[nn.Module], calls: Sequence[Callable[[], Any]], states: list[Any] | None = None, done: int = 0
) -> list[Any]:
    """What the last of `blocks` answers to each call, block by block: one serves every call before the next begins.

    Where blocks come from elsewhere (`offload`), each comes once for all the calls. blocks: the first ones of the
    model. states: the output of block `done` - 1 for each call, if some blocks are done; the list is used up, so that
    no output is held longer than it is needed. What precedes the blocks is computed again for each of them, which is
    little; no number depends on the order.
    """
    states = states or [None] * len(calls)
    for number in range(done, len(blocks)):
        for i, call in enumerate(calls):
            states[i] = _output(blocks[number], call, blocks[:number], states[i])
    return states


def _output(block: nn.Module, call: Callable[[], Any], done: Sequence[nn.Module], state: Any) -> Any:
    """What `block` answers in a call, in which `state` is the answer of the blocks that are done."""
    found: list[Any] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output)
        raise _Reached

    hook = block.register_forward_hook(keep)
    try:
        with answering(done, state):
            call()
    except _Reached:
        pass
    finally:
        hook.remove()
    assert found, "the loss does not run the model's blocks"
    return found[0]


@contextmanager
def answering(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """The model with its first blocks answering `output` at once."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _joined(pieces: list[Any]) -> Any:
    """Outputs of one form (a tensor, a tuple of outputs, None), joined along the batch axis."""
    if len(pieces) == 1 or pieces[0] is None:
        return pieces[0]
    if isinstance(pieces[0], Tensor):
        return torch.cat(pieces)
    return type(pieces[0])(_joined(list(parts)) for parts in zip(*pieces, strict=True))


def _rows(output: Any, index: Tensor) -> Any:
    if output is None:
        return None
    if isinstance(output, Tensor):
        return output.index_select(0, index.to(output.device))
    return type(output)(_rows(part, index) for part in output)

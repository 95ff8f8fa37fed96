"""A model as a list of blocks: the last of them are tuned, in levels; what lies before a level runs once.

What a perturbation cannot reach need not be computed twice. With the scales of the last block in motion, one pass
through those before it serves every probe, and a probe costs the last block alone: many directions at the price of a
few forward passes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = 2  # levels that the tuned blocks form, beside the layers that follow them
THIN = 3  # what reads the prompt gets a third of the directions of other levels: its probes run the whole model
READS = re.compile(r"(^|\.)text_embedder\.")  # diffusers' name of what takes in the pooled prompt, before the blocks
BLOCK = re.compile(r"((?:[^.\d][^.]*\.)+)(\d+)\.")  # "transformer_blocks.4.attn.to_k": a list's name, and a number


@dataclass(frozen=True)
class Level:
    """Layers that one probe moves. It runs the blocks from `first` on."""

    layers: tuple[str, ...]
    blocks: str = ""  # name of the model's list of blocks
    first: int = 0
    thin: int = 1  # it gets 1 / thin of the directions


def levels(layers: Iterable[str], depth: float) -> list[Level]:
    """The levels of a model, from the output inwards: what follows the blocks, the last share `depth` of the blocks,
    and the layers before them that read the pooled prompt: few numbers, but they can tell the trigger from other words.
    (The other embedders are left alone: they carry the subject, and moving them blurs it.)

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
    made = [Level(tuple(after), blocks, count)] if after else []
    for start, stop in reversed(list(zip(starts, [*starts[1:], count], strict=True))):
        made.append(Level(tuple(name for name in names if start <= number.get(name, -1) < stop), blocks, start))
    if reading:
        made.append(Level(reading, blocks, thin=THIN))
    return [level for level in made if level.layers]


class _Reached(Exception):
    """The prefix has been computed; nothing after it is needed."""


Replay = Callable[[Tensor], AbstractContextManager]  # sample [r] -> the model answering for these examples


class Prefix:
    """The blocks before a level, run once for the examples of a batch."""

    def __init__(self, model: nn.Module, level: Level):
        self.blocks = list(model.get_submodule(level.blocks))[: level.first]

    @torch.no_grad()
    def run(self, loss: Callable[[Tensor], Tensor], examples: int, chunk: int | None = None) -> "Replay":
        """The output of the last of these blocks for examples 0, 1, ..., made in pieces of `chunk` examples.

        loss(sample) is what `probes.evaluate` takes; it is stopped where the prefix ends.
        """
        pieces: list[Any] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            pieces.append(output)
            raise _Reached

        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            for part in torch.arange(examples).split(chunk or examples):
                try:
                    loss(part)
                except _Reached:
                    pass
        finally:
            hook.remove()
        assert pieces, "the loss does not run the model's blocks"
        return partial(self._replayed, _joined(pieces))

    @contextmanager
    def _replayed(self, output: Any, sample: Tensor) -> Iterator[None]:
        """The model with its prefix answering from `output`: row r of the stacked batch is example `sample[r]`."""
        rows = _rows(output, sample)
        for block in self.blocks:
            block.forward = lambda *args, **kwargs: rows
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


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

"""A model as a list of blocks: the last of them are tuned, those before run once for all probes of a batch.

What a perturbation cannot reach need not be computed twice. With the scales of the last third of the blocks in motion,
one pass through the first two thirds serves every probe, and a probe costs a third: three times the directions at the
same price, and none of them stirred by layers that it does not measure.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_engine.scales import ScaleView

BLOCK = re.compile(r"((?:[^.\d][^.]*\.)+)(\d+)\.")  # "transformer_blocks.4.attn.to_k": a list's name, and a number


def _place(name: str) -> tuple[str, int] | None:
    found = BLOCK.match(name)
    return (found[1][:-1], int(found[2])) if found else None


def tuned(views: dict[str, ScaleView], depth: float) -> tuple[dict[str, ScaleView], str, int]:
    """(layers in the last share `depth` of the blocks and after them, the list of blocks, its first tuned block).

    The blocks are the list of modules that holds most of the layers. With depth 1, or in a model without such a list,
    every layer is tuned, those before the blocks too, and the first block is 0.
    """
    places = {name: _place(name) for name in views}
    lists = Counter(place[0] for place in places.values() if place)
    if depth >= 1 or not lists:
        return views, "", 0
    blocks = lists.most_common(1)[0][0]
    count = 1 + max(place[1] for place in places.values() if place and place[0] == blocks)
    first = count - max(1, round(depth * count))
    names = list(views)  # in the model's own order: what comes after the first tuned block is tuned
    start = names.index(
        next(name for name in names if places[name] and places[name][0] == blocks and places[name][1] >= first)
    )
    return {name: views[name] for name in names[start:]}, blocks, first


class _Reached(Exception):
    """The prefix has been computed; nothing after it is needed."""


class Prefix:
    """The blocks before the tuned ones, run once for the examples of a batch."""

    def __init__(self, model: nn.Module, blocks: str, first: int):
        """blocks: name of the model's list of blocks; first: the first one that is tuned, 1 or more."""
        self.blocks = list(model.get_submodule(blocks))[:first]

    @torch.no_grad()
    def run(self, loss: Callable[[Tensor], Tensor], samples: Tensor, chunk: int | None = None) -> Any:
        """The output of the last of these blocks for every example, made in pieces of `chunk` examples.

        loss(sample) is what `probes.evaluate` takes; it is stopped where the prefix ends.
        """
        pieces: list[Any] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            pieces.append(output)
            raise _Reached

        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            for part in samples.split(chunk or len(samples)):
                try:
                    loss(part)
                except _Reached:
                    pass
        finally:
            hook.remove()
        assert pieces, "the loss does not run the model's blocks"
        return _joined(pieces)

    @contextmanager
    def replayed(self, output: Any, sample: Tensor) -> Iterator[None]:
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

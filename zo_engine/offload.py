"""A model larger than its device: frozen blocks wait in host memory, or on disk, and pass through a few slots.

ZO2 (Wang et al., arXiv:2503.12668) uploads each block once a step, perturbs and updates it there, and takes it home.
Here codes and base scales are read-only, so nothing ever travels back, and a slot is free again as soon as its block
has computed. Theta stays on the device; in group space it is as large as the scales, so there it waits and is updated
at home, and a layer's part comes when the layer computes (`Mover.bring`). While block i computes, the copy engine
brings what followed i the last time: the order of visits is learnt from the model itself, so it also bridges passes,
steps and evaluations. The device is told to wait by events; the host waits for nothing but a disk, and for the ids that
an embedding at home looks up.

A block's tensors stand at home except while its `forward` runs: then, and only then, they are views into a slot.
Whoever looks at the model in between (scales, styles, hashes, export) finds host tensors, and a scale that was replaced
at home is noticed and brought along. On a CPU the slots are ordinary memory and the copies happen in the same order at
the same moments, so bytes, visits and results can be checked without a GPU.

What a language model has at its two ends may stay at home as well: the input embedding looks its few rows up where it
lies, and the output layer is used by pieces of the vocabulary, which pass through the slots like blocks. A weight that
both share is at home once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ALIGNED = 256  # bytes: where a tensor may begin inside a slot, as in the CUDA allocator
PIECE = 1 << 25  # weights of an output layer that are used at once


class OffloadError(ValueError):
    """A model, or a machine, that cannot stream; one sentence."""


def block_names(model: nn.Module, lists: Sequence[str] = ()) -> list[str]:
    """The modules that follow one another in the model's outermost lists, in order: what can be streamed.

    lists: names of such lists, such as "transformer_blocks", if not all. Raises OffloadError where there are none.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if unknown := [name for name in lists if name not in outer]:
        raise OffloadError(f"the model has no list of blocks {unknown[0]!r}; it has {', '.join(outer) or 'none'}")
    if not outer:
        raise OffloadError(f"{type(model).__name__} has no list of blocks, so it cannot be streamed")
    return [f"{name}.{i}" for name in lists or outer for i in range(len(model.get_submodule(name)))]


def end_names(model: nn.Module) -> list[str]:
    """The input embedding and the plain output layer of a language model; nothing of any other model."""
    if not hasattr(model, "get_output_embeddings"):
        return []
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return [n for n, m in model.named_modules() if any(m is end for end in ends) and _plain(m)]


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module) is nn.Linear


def piece_rows(head: nn.Linear) -> list[tuple[int, int]]:
    """(first, last + 1) of the rows of an output layer that are used at once, about PIECE weights."""
    step = max(64, PIECE // head.in_features // 64 * 64)
    return [(a, min(a + step, head.out_features)) for a in range(0, head.out_features, step)]


def head_parts(head: nn.Module | None) -> list[Callable[[Tensor], Tensor]]:
    """The forward of an output layer by pieces of its rows, in order; none where it cannot be taken apart: it is not
    plain, or dressed (`probes`). Resident and streamed layers fall into the same pieces, so their numbers are equal."""
    own = None if head is None else head.__dict__.get("forward")
    if isinstance(own, Pieces):
        return [part.__call__ for part in own.parts] if own.fresh else []
    if own is not None or type(head) is not nn.Linear:
        return []

    def part(x: Tensor, first: int, stop: int) -> Tensor:
        return linear(x, head.weight[first:stop], None if head.bias is None else head.bias[first:stop])

    return [partial(part, first=a, stop=b) for a, b in piece_rows(head)]


class Piece(nn.Module):
    """Some rows of an output layer whose weight is at home."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias  # the bias stays on the device

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Pieces:
    """The forward of an output layer whose weight is at home, piece by piece."""

    def __init__(self, head: nn.Linear, device: torch.device):
        self.device = device
        bias = [None if head.bias is None else head.bias[a:b] for a, b in piece_rows(head)]
        self.parts = [Piece(head.weight.data[a:b], c) for (a, b), c in zip(piece_rows(head), bias, strict=True)]
        self.head, self.home = head, head.weight.data

    @property
    def fresh(self) -> bool:
        """Whether the layer still has the weight that it was taken apart with."""
        return _same(self.head.weight.data, self.home)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.fresh or x.device.type != self.device.type:  # a weight that is tuned, or a proof of it, at home
            bias = self.head.bias
            return linear(x, self.head.weight.to(x.device), None if bias is None else bias.to(x.device))
        return torch.cat([part(x) for part in self.parts], -1)


class Place:
    """Where a module holds a tensor: an attribute, or several that share it."""

    def __init__(self, key: tuple, tensor: Tensor):
        self.key = key
        self.home = tensor  # what was there when the block was taken over
        self.holders: list[tuple[Any, str]] = []

    @property
    def tensor(self) -> Tensor:
        holder, name = self.holders[0]
        return getattr(holder, name)

    def put(self, tensor: Tensor) -> None:
        for holder, name in self.holders:
            setattr(holder, name, tensor)


def tensors(module: nn.Module) -> list[Place]:
    """Every tensor of a module and of those inside it: parameters, buffers, and what bitsandbytes keeps beside them."""
    places: dict[tuple, Place] = {}

    def note(holder: Any, name: str) -> None:
        tensor = getattr(holder, name, None)
        if isinstance(tensor, Tensor):
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape)
            places.setdefault(key, Place(key, tensor)).holders.append((holder, name))

    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                note(parameter, "data")
        for name in part._buffers:
            note(part, name)
        if isinstance(part, bnb.nn.Linear4bit):
            note(part.weight.quant_state, "absmax")
            note(part.weight.quant_state, "code")
        elif isinstance(part, bnb.nn.Linear8bitLt):
            note(part.state, "CB")
            note(part.state, "SCB")
    return list(places.values())


class Block:
    """A module whose tensors wait at home, and where each lies in a slot."""

    def __init__(self, name: str, module: nn.Module, places: list[Place]):
        self.name, self.module, self.places = name, module, places
        self.offsets, self.size = [], 0
        for place in places:
            self.offsets.append(self.size)
            self.size += -(-place.home.nbytes // ALIGNED) * ALIGNED
        self.pack: Tensor | None = None  # all of them in one piece of host memory

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The block's tensors as views into [bytes] of memory."""
        return [
            buffer[start : start + place.home.nbytes].view(place.home.dtype).view(place.home.shape)
            for start, place in zip(self.offsets, self.places, strict=True)
        ]

    def gather(self, buffer: Tensor) -> None:
        """Move home into one piece of memory, whence a single copy brings everything."""
        for place, view in zip(self.places, self.views(buffer), strict=True):
            view.copy_(place.home)
            place.put(view)
            place.home = place.tensor
        self.pack = buffer


class Slot:
    """Memory on the device for any one block."""

    def __init__(self, size: int, device: torch.device):
        cuda = device.type == "cuda"
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: Block | None = None
        self.views: list[Tensor] = []
        self.sources: list[Tensor] = []  # the very tensors that were copied
        self.ready, self.free = (torch.cuda.Event(), torch.cuda.Event()) if cuda else (None, None)
        if cuda:
            # Memory comes from the allocator as soon as the host has let go of it, kernels that use it may still be on
            # their way: in their own stream that is no matter, but the first copy comes in another and has to wait.
            self.free.record(torch.cuda.current_stream(device))
        self.staging: Tensor | None = None  # pinned, where home is a file
        self.filling: Future | None = None


class Mover:
    """Blocks of a model that pass through slots on a device. Made once on a loaded model; `close` ends it.

    The blocks' tensors are in host memory when it is made, everything else on `device` (see quantize.load_quantized).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        device: torch.device | str,
        slots: int = 2,
        from_disk: bool = False,
        ends: Sequence[str] = (),
        held: int = 0,
    ):
        """names: of the blocks that stream, in the order of their first visit. slots: blocks on the device at once.
        from_disk: leave tensors mapped to their files, instead of taking them into (pinned) host memory; all but those
        of the last `held` blocks, which a step visits most.
        ends: input embedding and output layer, of those that wait in host memory as well (`end_names`)."""
        if slots < 1 or not (names or ends):
            raise OffloadError(f"streaming needs a block and a slot at least, not {len(names)} and {slots}")
        self.model, self.device, self.from_disk = model, torch.device(device), from_disk
        found = {name: tensors(model.get_submodule(name)) for name in names}
        owners = Counter(place.key for places in found.values() for place in places)
        self.resident = 0  # bytes of tensors that several blocks share: they stay on the device
        self.blocks = []
        for name, places in found.items():
            for place in places:
                if owners[place.key] > 1 and place.tensor.device != self.device:
                    place.put(place.tensor.to(self.device))
                    self.resident += place.tensor.nbytes
            own = [place for place in places if owners[place.key] == 1]
            self.blocks.append(Block(name, model.get_submodule(name), own))
        cuda = self.device.type == "cuda"
        mapped = max(0, len(self.blocks) - held) if from_disk else 0
        for block in self.blocks[mapped:]:
            block.gather(_host_memory(block.size, cuda))
        self.streamed = [block.module for block in self.blocks]
        self.mapped = self.streamed[:mapped]
        self.ends = [model.get_submodule(name) for name in ends]
        self._keep_ends(cuda)
        largest = max(block.size for block in self.blocks)
        self.slots = [Slot(largest, self.device) for _ in range(min(slots, len(self.blocks)))]
        if from_disk and cuda:
            for slot in self.slots:
                slot.staging = _host_memory(largest, cuda)
        self.copies = torch.cuda.Stream(self.device) if cuda else None
        self.reader = ThreadPoolExecutor(1) if from_disk and cuda else None
        # Which block followed which the last time; at first, as they stand.
        self.after = dict(zip(self.blocks, [*self.blocks[1:], self.blocks[0]], strict=True))
        self.last: Block | None = None
        self.recent = list(self.slots)  # least recently used first
        self.visits = self.waits = self.loads = self.moved = 0  # waits: visits whose block was not on its way
        for block in self.blocks:
            block.module.forward = partial(self._visit, block, block.module.forward)
        self.open = True

    def _keep_ends(self, cuda: bool) -> None:
        """Let the embedding look up at home, and make blocks of the pieces of the output layer."""
        for end in self.ends:
            if cuda and not self.from_disk and not end.weight.data.is_pinned():  # tied weights are one parameter
                pinned = _host_memory(end.weight.nbytes, cuda).view(end.weight.dtype).view(end.weight.shape)
                end.weight.data = pinned.copy_(end.weight.data)
        for end in self.ends:
            if isinstance(end, nn.Embedding):
                end.forward = partial(self._looked_up, end, end.forward)
                continue
            if end.bias is not None:
                end.bias.data = end.bias.data.to(self.device)
            end.forward = Pieces(end, self.device)
            for number, piece in enumerate(end.forward.parts):
                self.blocks.append(block := Block(f"output {number}", piece, tensors(piece)))
                if not self.from_disk:
                    block.pack = piece.weight.data.flatten().view(torch.uint8)
        if self.ends:  # transformers takes the device of the first weight for that of the model
            plain = type(self.model)
            where = {"device": property(lambda model: model.mover.device), "__module__": plain.__module__}
            self.model.__class__ = type(plain.__name__, (plain,), where)
            self.plain = plain

    def _looked_up(self, embedding: nn.Embedding, plain: Callable, ids: Tensor) -> Tensor:
        """Rows of an embedding, taken where it lies: only they travel. The host has to know which, so it waits."""
        return plain(ids.to(embedding.weight.device)).to(self.device)

    @property
    def size(self) -> int:
        """Bytes of device memory that the slots take."""
        return sum(slot.buffer.nbytes for slot in self.slots)

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy on the device of what waits in host memory and is no block's: parts of theta, of a direction."""
        self.moved += tensor.nbytes
        if self.copies:  # from pinned memory the host need not wait
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True, copy=True)

    @property
    def relay(self) -> list[nn.Module]:
        """The first blocks, where their way is so long that one visit should serve all passes of an evaluation."""
        return self.mapped

    def close(self) -> None:
        """Leave the model as it was found: tensors at home, no slot, forwards its own."""
        if self.open:
            for module in (*(block.module for block in self.blocks), *self.ends):
                del module.forward
            if self.ends:
                self.model.__class__ = self.plain
            if self.reader:
                self.reader.shutdown()
            if self.copies:
                self.copies.synchronize()
            self.slots, self.recent, self.after, self.last, self.open = [], [], {}, None, False

    def _visit(self, block: Block, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, with its tensors in a slot."""
        if self.last is not block:
            if self.last is not None:
                self.after[self.last] = block
            self.last = block
        slot = self._arrived(block)
        self._ahead(block)
        home = [place.tensor for place in block.places]
        for place, view in zip(block.places, slot.views, strict=True):
            place.put(view)
        try:
            return plain(*args, **kwargs)
        finally:
            for place, tensor in zip(block.places, home, strict=True):
                place.put(tensor)
            if slot.free:
                slot.free.record(torch.cuda.current_stream(self.device))

    def _arrived(self, block: Block) -> Slot:
        """The slot that holds the block as it is at home now, once the device has waited for the copy."""
        self.visits += 1
        slot = next((s for s in self.slots if s.block is block), None)
        if slot is None:
            self.waits += 1
            slot = self.recent[0]
            self._load(block, slot)
        if slot.filling:
            slot.filling.result()
            slot.filling = None
        if slot.ready:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        for i, place in enumerate(block.places):  # a scale that was replaced at home since
            if not _same(place.tensor, slot.sources[i]):
                slot.sources[i] = place.tensor
                if place.tensor.dtype == slot.views[i].dtype:
                    slot.views[i].copy_(place.tensor.view(slot.views[i].shape))
                else:  # wider than its room in the slot, or as narrow again as that
                    slot.views[i] = place.tensor.to(self.device, copy=True)
                self.moved += slot.views[i].nbytes
        self._used(slot)
        return slot

    def _ahead(self, block: Block) -> None:
        """Bring what followed the last time, into the slots that are not needed sooner."""
        for _ in self.slots[1:]:
            block = self.after.get(block)
            if block is None or block is self.last:
                return
            slot = next((s for s in self.slots if s.block is block), None)
            if slot is None:
                slot = next(s for s in self.recent if s.block is not self.last)
                self._load(block, slot)
            self._used(slot)

    def _used(self, slot: Slot) -> None:
        self.recent.remove(slot)
        self.recent.append(slot)

    def _load(self, block: Block, slot: Slot) -> None:
        """Begin to copy a block into a slot."""
        if slot.filling:
            slot.filling.result()
        slot.block, slot.views = block, block.views(slot.buffer)
        # What has no room in the slot comes when the block is visited; till then, as it was taken over.
        found = [(place.tensor, place.home) for place in block.places]
        slot.sources = [tensor if tensor.dtype == home.dtype else home for tensor, home in found]
        self.loads += 1
        self.moved += sum(place.home.nbytes for place in block.places)
        if self.reader:
            slot.filling = self.reader.submit(self._fill, block, slot)
        else:
            self._fill(block, slot)

    def _fill(self, block: Block, slot: Slot) -> None:
        with torch.cuda.stream(self.copies) if self.copies else nullcontext():
            staging = slot.staging if block.pack is None else None
            if staging is not None:
                slot.ready.synchronize()  # what was staged last has left; it is the disk that one waits for here
                for view, source in zip(block.views(staging), slot.sources, strict=True):
                    view.copy_(source.view(view.shape))
            if self.copies:
                self.copies.wait_event(slot.free)
            pack = block.pack if staging is None else staging
            if pack is not None:
                size = min(block.size, len(pack))
                slot.buffer[:size].copy_(pack[:size], non_blocking=True)
            for place, view, source in zip(block.places, slot.views, slot.sources, strict=True):
                if pack is None or (staging is None and not _same(source, place.home)):
                    view.copy_(source.view(view.shape), non_blocking=True)
            if slot.ready:
                slot.ready.record(self.copies)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory. Both are held, so an address cannot have been given away."""
    return a.data_ptr() == b.data_ptr() and a.device == b.device


def _host_memory(size: int, pinned: bool) -> Tensor:
    """[bytes] of host memory; pinned, a device reads it without the host."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:  # of CUDA, or of the allocator: both say how much they could not give
        raise OffloadError(
            f"{size / 1e6:.0f} MB of {'pinned ' if pinned else ''}host memory could not be had ({error}); "
            "let more blocks stay on the device, stream from disk, or raise the limit on locked memory (ulimit -l)"
        ) from error

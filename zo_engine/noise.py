"""Counter-based random directions: the same numbers on every device, in any order, today and on resume.

A direction is never stored. It is a pure function of (seed, step, probe, tensor name, element), computed with
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that two scalars in the
journal are enough to rebuild every direction of a run. No global generator is read or written.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
SIGNS_PER_BLOCK = 128  # a Philox block is four 32-bit words: 128 signs, or four normals
NORMALS_PER_BLOCK = 4


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors holding 32-bit counters -> four int64 tensors of 32 random bits each.

    32 x 32 bit products wrap in int64; the arithmetic shift and the mask recover their exact upper half.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def tensor_id(name: str) -> int:
    """A tensor's 32-bit number in the counter: made from its name, so that it does not depend on any order."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


class Layout:
    """Where each named tensor lies in one flat vector, and which random counters belong to it.

    >>> layout = Layout({"a.rows": (3,), "b.rows": (2, 2)})
    >>> layout.size, [t.shape for t in layout.split(torch.zeros(7)).values()]
    (7, [torch.Size([3]), torch.Size([2, 2])])
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.numel = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.size = sum(self.numel.values())
        ids = {name: tensor_id(name) for name in shapes}
        if len(set(ids.values())) != len(ids):
            raise ValueError("two tensor names share one 32-bit hash; rename one of the layers")
        self._ids = ids
        self._counters: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def part(self, layers: Iterable[str]) -> "Layout":
        """The tensors of some layers ("a" has "a.rows", ...), in this layout's order."""
        wanted = set(layers)
        return Layout({name: shape for name, shape in self.shapes.items() if name.rpartition(".")[0] in wanted})

    def index(self, part: "Layout", device: torch.device | str = "cpu") -> Tensor:
        """Where a part's elements lie in this layout [part.size]."""
        places = self.split(torch.arange(self.size, device=device))
        return torch.cat([places[name].flatten() for name in part.shapes])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of `flat` [..., size] by name, each [..., *shape]."""
        parts = flat.split(list(self.numel.values()), dim=-1)
        return {
            name: part.unflatten(-1, shape) if len(shape) != 1 else part
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def counters(self, per_block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(block number, tensor id) of every Philox block."""
        cached = self._counters.get((per_block, device))
        if cached is None:
            counts = [-(-numel // per_block) for numel in self.numel.values()]
            blocks = torch.cat([torch.arange(count) for count in counts])
            ids = torch.tensor(list(self._ids.values())).repeat_interleave(torch.tensor(counts))
            cached = self._counters[(per_block, device)] = (blocks.to(device), ids.to(device))
        return cached

    def elements(self, output: Tensor, per_block: int) -> Tensor:
        """[P, blocks * per_block] -> [P, size]: of each tensor's last block only what the tensor has. By slices: an
        index of every element would be twice as large as theta."""
        starts = accumulate((-(-numel // per_block) * per_block for numel in self.numel.values()), initial=0)
        return torch.cat([output[:, s : s + n] for s, n in zip(starts, self.numel.values(), strict=False)], 1)


def directions(
    kind: str, layout: Layout, seed: int, step: int, probes: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Random directions [len(probes), layout.size] of one step.

    kind: "rademacher" gives int8 signs, bit-exact on every device (one bit of Philox each);
    "gaussian" gives fp32 normals (Box-Muller in fp64), equal up to the rounding of log and cos.
    Raises ValueError for another kind.
    """
    device = torch.device(device)
    per_block = {"rademacher": SIGNS_PER_BLOCK, "gaussian": NORMALS_PER_BLOCK}.get(kind)
    if per_block is None:
        raise ValueError(f"directions are 'rademacher' or 'gaussian', not {kind!r}")
    block, ids = layout.counters(per_block, device)
    probe = torch.tensor(list(probes), dtype=torch.int64, device=device)[:, None]
    shape = (len(probe), len(block))
    counter = [part.expand(shape) for part in (block, ids, probe, torch.tensor(step, device=device))]
    words = torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)), dim=-1)  # [P, blocks, 4]
    make = _signs if kind == "rademacher" else _normals
    return layout.elements(make(words).flatten(1), per_block)


def _signs(words: Tensor) -> Tensor:
    """[P, blocks, 4] words of 32 bits -> [P, blocks, 128] signs, +1 where the bit is set."""
    octets = torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1).to(torch.uint8)
    bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return (bits.to(torch.int8) * 2 - 1).flatten(2)


def _normals(words: Tensor) -> Tensor:
    """[P, blocks, 4] words -> [P, blocks, 4] standard normals; uniforms lie at (w + 1/2) / 2^32, never 0 or 1."""
    uniform = (words.double() + 0.5) * 2.0**-32
    radius = (-2 * uniform[..., :2].log()).sqrt()
    angle = 2 * math.pi * uniform[..., 2:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1).float()

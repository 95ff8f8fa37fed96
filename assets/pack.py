"""GPTQ and AQLM copies of a small dense language model: weights rounded or clustered as they are, without calibration.

    python assets/pack.py assets/models/tiny-llm gptq copy          # 4 bits, groups of 64, symmetric
    python assets/pack.py assets/models/tiny-llm aqlm copy          # 2 bits: two codebooks of 256 vectors of 8
    python assets/pack.py --help

Good for tests and trials; large models are better taken from the hub, where they were quantised with data.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from zo_engine.hub import WEIGHTS
from zo_engine.models import load_language_model
from zo_engine.quantize import Checkpoint

VECTOR = 8  # weights that one AQLM code stands for
ROUNDS = 8  # of clustering
BEAM = 4  # codes of an earlier codebook that are tried with the next one


def gptq(
    folder: Path,
    out: Path,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    desc_act: bool = False,
    layout: str = "gptq",
) -> Path:
    """Write a GPTQ copy of `folder`. group: columns that share a scale, -1 for all; desc_act: groups are not
    consecutive columns, but those of falling norm; layout: "gptq" (stores zero - 1) or "gptq_v2"."""

    def packed(weight: Tensor) -> dict[str, Tensor]:
        index = torch.arange(weight.shape[1]) // (group if group > 0 else weight.shape[1])
        if desc_act:
            index = index[weight.norm(dim=0).argsort(descending=True).argsort()]
        codes, zeros, scales = [torch.empty_like(weight)], [], []
        for number in range(int(index.max()) + 1):
            columns = index == number
            codes[0][:, columns], zero, scale = _rounded(weight[:, columns], bits, symmetric, layout == "gptq")
            zeros.append(zero)
            scales.append(scale)
        stored = torch.stack(zeros) - (1 if layout == "gptq" else 0)  # [groups, out]
        return {
            "qweight": _words(codes[0].T, bits),
            "qzeros": _words(stored.T, bits).T.contiguous(),
            "scales": torch.stack(scales).half(),
            "g_idx": index.int(),
        }

    settings = {"bits": bits, "group_size": group, "sym": symmetric, "desc_act": desc_act, "checkpoint_format": layout}
    return write(folder, out, packed, {"quant_method": "gptq", **settings, "lm_head": False})


def aqlm(folder: Path, out: Path, *, codebooks: int = 2, bits: int = 8, rounds: int = ROUNDS) -> Path:
    """Write an AQLM copy of `folder`: so many codebooks of 2**bits vectors; 2x8 and 1x16 are those of the hub."""

    def packed(weight: Tensor) -> dict[str, Tensor]:
        scales = weight.square().mean(1, keepdim=True).sqrt() + 1e-8
        vectors = (weight / scales).view(-1, VECTOR)
        books, codes = _clustered(vectors, codebooks, 2**bits, rounds)
        books = books.half()
        found = sum(books[k].float()[codes[:, k]] for k in range(codebooks)).view_as(weight)
        scales = (weight * found).sum(1) / found.square().sum(1).clamp(min=1e-8)
        signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        return {
            "codes": signed.view(len(weight), -1, codebooks).to(torch.int8 if bits <= 8 else torch.int16),
            "codebooks": books[:, :, None],
            "scales": scales.view(-1, 1, 1, 1).half(),
        }

    settings = {"in_group_size": VECTOR, "out_group_size": 1, "num_codebooks": codebooks, "nbits_per_codebook": bits}
    return write(folder, out, packed, {"quant_method": "aqlm", **settings})


def _rounded(weight: Tensor, bits: int, symmetric: bool, one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, n], zeros [out] and scales [out] of one group, the range shrunk to where the squared error is least.
    one: zeros must be 1 or more."""
    most = 2**bits - 1
    high, low = weight.amax(1).clamp(min=1e-6), weight.amin(1).clamp(max=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(high, math.inf)
    kept = [torch.empty_like(weight), torch.empty_like(high), torch.empty_like(high)]
    for share in torch.linspace(0.7, 1, 16):
        scale = ((high - low) * share / most).half().float()
        zero = torch.full_like(high, 2 ** (bits - 1)) if symmetric else (-low * share / scale).round().clamp(one, most)
        codes = ((weight / scale[:, None]).round() + zero[:, None]).clamp(0, most)
        error = ((codes - zero[:, None]) * scale[:, None] - weight).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        for target, value in zip(kept, (codes, zero, scale), strict=True):
            target[better] = value[better]
    return tuple(kept)


def _words(codes: Tensor, bits: int) -> Tensor:
    """[n, m] whole numbers -> int32 [n * bits / 32, m]: a stream of bits along the first axis, lowest first."""
    stream = (codes.long()[:, None] >> torch.arange(bits)[:, None]) & 1
    stream = stream.reshape(-1, 32, codes.shape[1]) << torch.arange(32)[:, None]
    words = stream.sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _clustered(vectors: Tensor, books: int, size: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Codebooks [books, size, v] whose sums lie near the vectors [n, v], and the codes [n, books]: k-means on what
    the books before leave, then all books in turn, codes being searched together with a beam."""
    generator = torch.Generator().manual_seed(0)
    book = torch.zeros(books, size, vectors.shape[1])
    for k in range(books):
        codes = _encoded(vectors, book[:k])
        left = vectors - _sum(book[:k], codes)
        book[k] = left[torch.randint(len(left), (size,), generator=generator)]
        for _ in range(rounds):
            book[k] = _means(left, _encoded(left, book[k : k + 1])[:, 0], book[k])
    for _ in range(rounds if books > 1 else 0):
        codes = _encoded(vectors, book)
        for k in range(books):
            others = _sum(book, codes) - book[k][codes[:, k]]
            book[k] = _means(vectors - others, codes[:, k], book[k])
    return book, _encoded(vectors, book)


def _sum(book: Tensor, codes: Tensor) -> Tensor:
    return sum((book[k][codes[:, k]] for k in range(len(book))), torch.zeros(len(codes), book.shape[2]))


def _means(vectors: Tensor, codes: Tensor, before: Tensor) -> Tensor:
    """The mean of the vectors of each code; where it has none, what it was before."""
    count = torch.bincount(codes, minlength=len(before))[:, None]
    total = torch.zeros_like(before).index_add_(0, codes, vectors)
    return torch.where(count > 0, total / count.clamp(min=1), before)


def _nearest(vectors: Tensor, book: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(squared distances, codes) [n, count] of the nearest entries."""
    half, parts = book.square().sum(1) / 2, []
    for part in vectors.split(4096):
        score = (part @ book.T).sub_(half)  # minus half the distance, but for the vector's own part
        best = score.max(1, keepdim=True) if count == 1 else score.topk(min(count, len(book)))
        parts.append((part.square().sum(1, keepdim=True) - 2 * best.values, best.indices))
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def _encoded(vectors: Tensor, book: Tensor) -> Tensor:
    """Codes [n, books] whose sum lies near each vector: a beam search over the books."""
    rest, codes = vectors[:, None], torch.zeros(len(vectors), 1, 0, dtype=torch.long)
    for k in range(len(book)):
        width = BEAM if k + 1 < len(book) else 1
        distance, found = _nearest(rest.flatten(0, 1), book[k], width)
        chosen = distance.view(len(vectors), -1).topk(width, largest=False).indices
        parent = (chosen // found.shape[1])[..., None]  # of each chosen one, the beam that it goes on from
        found = found.view(len(vectors), -1).gather(1, chosen)
        codes = torch.cat([codes.gather(1, parent.expand(-1, -1, k)), found[..., None]], 2)
        rest = rest.gather(1, parent.expand(-1, -1, rest.shape[2])) - book[k][found]
    return codes[:, 0]


def write(folder: Path, out: Path, packed: Callable[[Tensor], dict[str, Tensor]], settings: dict) -> Path:
    """A copy of the folder in which `packed` tensors stand for the weights that transformers would quantise."""
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and not WEIGHTS.fullmatch(file.name):
            shutil.copyfile(file, out / file.name)
    model = load_language_model(folder, quantization="none")
    kept = get_keys_to_not_convert(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if should_convert_module(name, kept)]
    with Checkpoint(folder) as checkpoint:
        tensors = {}
        for name in checkpoint.files:
            tensor = checkpoint.read(name)
            if (layer := name.removesuffix(".weight")) in names:
                tensors |= {f"{layer}.{part}": value for part, value in packed(tensor.float()).items()}
            else:
                tensors[name] = tensor.half() if tensor.is_floating_point() else tensor.clone()
    save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    if settings["quant_method"] == "aqlm":
        settings |= {"linear_weights_not_to_quantize": [f"{n}.weight" for n in linears if n not in names]}
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float16", "quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("format", choices=("gptq", "aqlm"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, help="of a code: 4 (gptq), 8 (aqlm) if not given")
    parser.add_argument("--group", type=int, default=64, help="gptq: columns that share a scale; -1: all")
    parser.add_argument("--asymmetric", action="store_true", help="gptq")
    parser.add_argument("--desc-act", action="store_true", help="gptq: groups in order of the columns' norm")
    parser.add_argument("--layout", choices=("gptq", "gptq_v2"), default="gptq")
    parser.add_argument("--codebooks", type=int, default=2, help="aqlm")
    given = parser.parse_args()
    if given.format == "aqlm":
        print(aqlm(given.folder, given.out, codebooks=given.codebooks, bits=given.bits or 8))
        return
    print(
        gptq(
            given.folder,
            given.out,
            bits=given.bits or 4,
            group=given.group,
            symmetric=not given.asymmetric,
            desc_act=given.desc_act,
            layout=given.layout,
        )
    )


if __name__ == "__main__":
    main()

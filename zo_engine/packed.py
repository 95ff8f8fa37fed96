"""GPTQ and AQLM: formats of language models that come quantised, read as they lie and dequantised at each forward.

Both are linear layers whose codes stay as the checkpoint packs them and whose scales stand beside them in fp32. They
need no package but torch, and compute what the formats' own libraries define. Of those libraries' kernels most keep a
copy of the scales that they saw first, so that training would have no effect.

GPTQ (Frantar et al., arXiv:2210.17323; layout of AutoGPTQ and gptqmodel), with the group g of an input column c:

    W[r, c] = (q[c, r] - z[g(c), r]) * s[g(c), r]

    qweight  int32 [in * bits / 32, out]      32 codes in `bits` words, the first in the lowest bits
    qzeros   int32 [groups, out * bits / 32]  likewise, along the outputs; the layout "gptq" stores z - 1, "gptq_v2" z
    scales   fp16  [groups, out]
    g_idx    int32 [in]                       the group of each column, in any order (desc_act)

AQLM (Egiazarian et al., arXiv:2401.06118), with vectors of v consecutive weights (v = 8):

    W[r, v j : v (j + 1)] = s[r] * sum over k of codebooks[k, codes[r, j, k]]

    codes      int8 or int16 [out, in / v, K]    modulo 2**bits; 1x16: K = 1 with 16 bits, 2x8: K = 2 with 8 bits
    codebooks  fp16 [K, 2**bits, 1, v]
    scales     fp16 [out, 1, 1, 1]
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_engine.hub import ModelError

BITS = (2, 3, 4, 8)  # of a GPTQ code
LAYOUTS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero
DTYPES = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
          "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # fmt: skip


class PackedLinear(nn.Module):
    """y = W x + b, with W dequantised at each forward: in fp32, then cast to the input's dtype.

    `scales` fp32, one row an output, may be replaced; `stored` is the dtype they have in the checkpoint.
    """

    format: str

    def __init__(self, linear: nn.Linear, scales: Tensor, stored: torch.dtype, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored, self.compute_dtype = stored, dtype
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """All that with the scales makes the weight."""
        raise NotImplementedError

    def dequantised(self) -> Tensor:
        """W in fp32 [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class GPTQLinear(PackedLinear):
    """qweight as it lies; zeros int16 [groups, out], unpacked; scales fp32 [out, groups].

    group [in]: the group of each column, or None where groups are equally many consecutive columns each.
    """

    format = "gptq"

    def __init__(self, *args: Any, qweight: Tensor, zeros: Tensor, group: Tensor | None):
        super().__init__(*args)
        self.bits = qweight.shape[0] * 32 // self.in_features
        self.register_buffer("qweight", qweight)
        self.register_buffer("zeros", zeros)
        self.register_buffer("group", group)

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        return (self.qweight, self.zeros) + (() if self.group is None else (self.group,))

    def dequantised(self) -> Tensor:
        weight = unpacked(self.qweight, self.bits).float()  # [in, out], as is all below
        if self.group is None:
            by_group = weight.view(len(self.zeros), -1, self.out_features)
            by_group.sub_(self.zeros[:, None]).mul_(self.scales.T[:, None])
        else:
            weight.sub_(self.zeros[self.group]).mul_(self.scales.T[self.group])
        return weight.T


class AQLMLinear(PackedLinear):
    """codes and codebooks as they lie; scales fp32 [out, 1]. Codebooks may be replaced, too, by fp32 ones."""

    format = "aqlm"

    def __init__(self, *args: Any, codes: Tensor, codebooks: Tensor):
        super().__init__(*args)
        self.register_buffer("codes", codes)
        self.register_buffer("codebooks", codebooks)

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        return self.codes, self.codebooks

    def dequantised(self) -> Tensor:
        weight = torch.zeros(self.out_features, self.in_features, device=self.codes.device)
        for k, codebook in enumerate(self.codebooks.flatten(2)):
            index = self.codes[..., k].int() & (len(codebook) - 1)  # stored modulo 2**bits, as signed numbers
            weight += F.embedding(index, codebook).flatten(1)
        return weight.mul_(self.scales)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes along the first axis: int32 [n * bits / 32, m] -> uint8 [n, m]. Only 3-bit codes straddle words."""
    period = math.lcm(bits, 32) // bits  # codes after which the pattern begins anew
    words = words.reshape(-1, period * bits // 32, words.shape[1])
    codes = torch.empty(len(words), period, words.shape[2], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift & mask
        if (here := 32 - shift) < bits:  # `here` of its bits lie in this word, and a shift repeats the sign
            code = (code & (1 << here) - 1) | words[:, word + 1] << here & mask
        codes[:, i] = code
    return codes.flatten(0, 1)


# Reading a checkpoint: `checkpoint` is a quantize.Checkpoint


def saved_format(checkpoint: Any, layer: str) -> str | None:
    """The format of a layer in a checkpoint, by the names of its tensors."""
    return next((f for f, name in (("gptq", "qweight"), ("aqlm", "codes")) if f"{layer}.{name}" in checkpoint), None)


def expected(linear: nn.Linear, layer: str, format: str, checkpoint: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that the layer must have, with their shapes. Raises ModelError for what cannot be read."""
    settings = _settings(checkpoint, format)
    size = {"in": linear.in_features, "out": linear.out_features}
    shape = lambda name: checkpoint.shape(f"{layer}.{name}") if f"{layer}.{name}" in checkpoint else ()  # noqa: E731
    if format == "gptq":
        rows = (*shape("qweight"), 0)[0]
        bits, rest = divmod(rows * 32, size["in"])
        layout = settings.get("checkpoint_format", "gptq")
        if rest or bits not in BITS or checkpoint.dtype(f"{layer}.qweight") != "I32":
            possible = ", ".join(map(str, BITS))
            raise ModelError(
                f"{checkpoint.folder}: {layer} is not packed as GPTQ packs {possible} bits into 32-bit words, "
                "so it cannot be loaded"
            )
        if layout not in LAYOUTS:
            raise ModelError(
                f"{checkpoint.folder} has GPTQ weights in the layout {layout!r}, made for one kernel; "
                f"possible are {', '.join(LAYOUTS)}"
            )
        group = settings.get("group_size", -1)
        count = math.ceil(size["in"] / group) if group > 0 else 1
        zeros = size["out"] * bits // 32
        wanted = {"qweight": (rows, size["out"]), "qzeros": (count, zeros), "scales": (count, size["out"])}
        if shape("g_idx") or settings.get("desc_act"):
            wanted["g_idx"] = (size["in"],)
        if linear.bias is None and shape("bias"):
            wanted["bias"] = (size["out"],)
    else:
        books, values, rows, width = (*shape("codebooks"), 0, 0, 0, 0)[:4]
        known = checkpoint.dtype(f"{layer}.codes") in ("I8", "I16", "I32")
        if rows != 1 or not width or size["in"] % width or values & (values - 1) or not known:
            raise ModelError(
                f"{checkpoint.folder}: the codebooks of {layer} have the shape {list(shape('codebooks'))}; possible "
                "are [codebooks, a power of two, 1, a divisor of the inputs], with whole numbers as codes"
            )
        wanted = {
            "codes": (size["out"], size["in"] // width, books),
            "codebooks": (books, values, 1, width),
            "scales": (size["out"], 1, 1, 1),
        }
    return {f"{layer}.{name}": found for name, found in wanted.items()}


def room(layer: str, format: str, checkpoint: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the codes and the scales of a layer."""
    name = f"{layer}.{'qweight' if format == 'gptq' else 'codes'}"
    codes = torch.empty(checkpoint.shape(name), dtype=DTYPES[checkpoint.dtype(name)], device=device)
    scales = checkpoint.shape(f"{layer}.scales")
    shape = tuple(reversed(scales)) if format == "gptq" else (scales[0], 1)
    return codes, torch.empty(shape, dtype=torch.float32, device=device)


def outline(linear: nn.Linear, layer: str, format: str, checkpoint: Any, dtype: torch.dtype) -> PackedLinear:
    """The layer on the meta device. That GPTQ's groups are consecutive is believed where the settings say so."""
    codes, scales = room(layer, format, checkpoint, torch.device("meta"))
    stored = DTYPES[checkpoint.dtype(f"{layer}.scales")]
    if format == "aqlm":
        kind = DTYPES[checkpoint.dtype(f"{layer}.codebooks")]
        codebooks = torch.empty(checkpoint.shape(f"{layer}.codebooks"), dtype=kind, device="meta")
        return AQLMLinear(linear, scales, stored, dtype, codes=codes, codebooks=codebooks)
    count = scales.shape[1]
    scattered = _settings(checkpoint, format).get("desc_act") or linear.in_features % count
    group = torch.empty(linear.in_features, dtype=torch.int32, device="meta") if scattered else None
    zeros = torch.empty(count, linear.out_features, dtype=torch.int16, device="meta")
    return GPTQLinear(linear, scales, stored, dtype, qweight=codes, zeros=zeros, group=group)


def gptq_layer(
    linear: nn.Linear, format: str, weight: str, checkpoint: Any, codes: Tensor, scales: Tensor, dtype: torch.dtype
) -> GPTQLinear:
    """The layer, its codes and scales written into the memory that was taken for them."""
    layer = weight.removesuffix(".weight")
    settings, device = _settings(checkpoint, format), codes.device
    if linear.bias is None and f"{layer}.bias" in checkpoint and checkpoint.read(f"{layer}.bias").any():
        # older packers wrote zeros for it
        raise ModelError(f"{checkpoint.folder} has {layer}.bias, which its config.json does not ask for")
    codes.copy_(checkpoint.read(f"{layer}.qweight"))
    saved = checkpoint.read(f"{layer}.scales")
    scales.copy_(saved.T)
    bits = len(codes) * 32 // linear.in_features
    zeros = unpacked(checkpoint.read(f"{layer}.qzeros").T, bits).T.to(device, torch.int16)
    zeros += LAYOUTS[settings.get("checkpoint_format", "gptq")]
    group, size = None, math.ceil(linear.in_features / len(zeros))
    consecutive = torch.arange(linear.in_features) // size
    if f"{layer}.g_idx" in checkpoint:
        group = checkpoint.read(f"{layer}.g_idx").long()
        if group.min() < 0 or group.max() >= len(zeros):
            raise ModelError(f"{checkpoint.folder}: {layer}.g_idx names a group that is not there; download it again")
    elif linear.in_features % len(zeros):
        group = torch.arange(linear.in_features) // settings["group_size"]
    if group is not None and linear.in_features % len(zeros) == 0 and torch.equal(group, consecutive):
        group = None
    group = None if group is None else group.to(device, torch.int32)
    given = (linear, scales, saved.dtype, dtype)
    return GPTQLinear(*given, qweight=codes, zeros=zeros.contiguous(), group=group)


def aqlm_layer(
    linear: nn.Linear, format: str, weight: str, checkpoint: Any, codes: Tensor, scales: Tensor, dtype: torch.dtype
) -> AQLMLinear:
    """The layer, its codes and scales written into the memory that was taken for them."""
    layer = weight.removesuffix(".weight")
    codes.copy_(checkpoint.read(f"{layer}.codes"))
    saved = checkpoint.read(f"{layer}.scales")
    scales.copy_(saved.flatten(1))
    codebooks = checkpoint.read(f"{layer}.codebooks").to(codes.device, copy=True)
    return AQLMLinear(linear, scales, saved.dtype, dtype, codes=codes, codebooks=codebooks)


def _settings(checkpoint: Any, format: str) -> dict[str, Any]:
    return checkpoint.config.get("quantization_config") or {}


# Writing one


def saved_scales(layers: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """The scales of all layers as a checkpoint has them, by their names there and in its layout; and codebooks that
    have moved, which are fp32 then."""
    scales = {f"{n}.scales": layer.scales.T if layer.format == "gptq" else layer.scales for n, layer in layers.items()}
    books = {f"{n}.codebooks": layer.codebooks for n, layer in layers.items() if layer.format == "aqlm"}
    return scales | {name: book for name, book in books.items() if book.dtype == torch.float32}


def write_scales(file: Path, scales: dict[str, Tensor]) -> None:
    """Overwrite tensors of a safetensors file where they lie: no other byte of the file changes.

    scales: those of them that the file has; they are rounded to its dtype, and stay as they are where what is in the
    file is the same in the scales' own.
    Raises ModelError where a number is too large for that.
    """
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        for name in scales.keys() & header.keys():
            start, stop = header[name]["data_offsets"]
            kind, scale = DTYPES[header[name]["dtype"]], scales[name].detach().cpu().contiguous().flatten()
            stream.seek(8 + length + start)
            if torch.equal(torch.frombuffer(bytearray(stream.read(stop - start)), dtype=kind).to(scale.dtype), scale):
                continue
            values = scale.to(kind)
            if not values.isfinite().all():
                raise ModelError(f"a number of {name} is too large for the {header[name]['dtype']} that it is saved in")
            data = values.view(torch.uint8).numpy().tobytes()
            assert len(data) == stop - start
            stream.seek(8 + length + start)
            stream.write(data)

"""Weights from safetensors shards onto a device, quantised as they arrive, or as they lie.

The model is built without weights, its `nn.Linear` layers become bitsandbytes layers, and then one tensor at
a time is read, quantised on the device and dropped: beside what stays, host memory holds one tensor. This is
what diffusers' loader does (`diffusers/quantizers/bitsandbytes`), without its refusal of machines that have
no GPU, and the result is the same bit for bit.

Language models of transformers are loaded the same way; what transformers leaves dense (the output layer, tied weights)
stays dense here, so that its `from_pretrained` makes the same model of the same folder.

GPTQ and AQLM are not made here: a folder that comes in one of them is read as it is (see `packed`). GGUF is not read:
transformers 5.23 keeps its blocks, and so the scales in them, only with a compiled kernel from the hub and cannot save
them; else it makes plain weights of them at loading, and there is no scale left to change.

Three things differ from a model that diffusers loads, each because the scales are what we train: scales that
were quantised themselves ("double quantisation") are un-nested into plain fp32, bit for bit; weights are
dequantised into the compute dtype, whatever dtype they were saved in; int8 layers treat no column of the
activations as an outlier (threshold 0), since which columns are would depend on the other samples of a batch.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes.functional import QuantState, dequantize_blockwise, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from zo_engine import narrow, packed
from zo_engine.hub import (
    IMPOSSIBLE,
    ModelError,
    check_index,
    find_weights,
    first_line,
    language_config,
    open_shard,
    read_json,
    some,
)
from zo_engine.offload import block_names, end_names
from zo_engine.run import appearing

MADE = ("nf4", "fp4", "int8", "none")  # what a plain model can be loaded as
READ = ("gptq", "aqlm")  # what a model must come in
SUMS = "sha256.json"  # of a copy's files, beside them
QUANTIZATIONS = (*MADE, *READ)
ENCODERS = ("T5EncoderModel",)  # of a diffusers pipeline, of transformers: what is large enough to lie on disk
NARROW = tuple(narrow.FORMS)  # how a plain model's blocks may wait and travel
# On a CPU, weights are quantised this many at a time (whole blocks). The temporary tensors of larger pieces
# leave gaps in the heap that are not used again: with whole layers, more than the model's own size was lost.
PIECE = 1 << 16
BLOCK = 64  # weights per NF4/FP4 scale: what bitsandbytes, diffusers and transformers use

# What older versions of transformers saved, and now compute
IGNORED = (r"rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$")

# In fp32, int8 layers would say at every forward that they cast to fp16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Checkpoint:
    """The tensors of one part's safetensors files. Opening reads headers only; `read` reads one tensor.

    Raises ModelError for a missing shard, a damaged file, or a folder that has only pickles.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = language_config(folder)
        self.files: dict[str, object] = {}  # tensor name -> open safetensors file
        listed, shards = find_weights(folder)
        with ExitStack() as stack:
            for shard in shards:
                file = stack.enter_context(open_shard(shard, framework="pt"))
                self.files.update(dict.fromkeys(file.keys(), file))
            check_index(folder, listed, set(self.files))
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors writes it: F16, I32, ..."""
        return self.files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """The tensor in host memory. Its pages are those of the file: copy what is to be kept."""
        return self.files[name].get_tensor(name)


def load_quantized(
    folder: Path,
    *,
    quantization: str = "nf4",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    transport: str = "whole",
    away: int = 0,
    mapped: bool = False,
    ends: bool = False,
) -> nn.Module:
    """A diffusers model, or a causal language model of transformers, from `folder` (config.json and safetensors).

    Quantised on `device` is every nn.Linear of a diffusers model, and of a language model every one that
    transformers would quantise. A folder that is already quantised keeps its codes; `quantization` must then
    name its format. The model comes in eval mode, without gradients, all else in `dtype`; 4-bit scales are fp32,
    flat, contiguous, one per 64 weights of the row-major weight; int8 scales are fp32, one per row, in
    `layer.state.SCB`; those of GPTQ and AQLM are fp32 [out, groups], in `layer.scales`.
    transport: one of NARROW, for the blocks of a model that is not quantised (`narrow`), those that stay included.
    away: the first so many blocks (`offload.block_names`) are quantised on `device`, and wait in host memory; `mapped`:
    as pages of the folder's files, if bitsandbytes quantised it already. ends: so do a language model's embedding and
    output layer (`offload.end_names`).
    Raises ModelError for whatever is wrong with the folder.
    """
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization {quantization!r} is unknown; possible are {', '.join(QUANTIZATIONS)}")
    device = torch.device(device)
    _refuse_others(folder, language_config(folder))
    with Checkpoint(folder) as checkpoint:
        model, formats, dense = _outlined(checkpoint, quantization, dtype, transport)
        waiting = block_names(model)[:away] if away else []
        waiting += [name for name in end_names(model) if ends and name not in formats]
        mapped = mapped and bool(waiting) and all(_statistics(checkpoint, f"{n}.weight", f) for n, f in formats.items())
        homes = {name: torch.device("cpu") if _within(name, waiting) else device for name in (*formats, *dense)}
        room = {
            name: _room(model, name, format, checkpoint, homes[name])
            for name, format in formats.items()
            if not (mapped and _within(name, waiting))
        }
        for name, format in formats.items():
            layer = _layer(model, name, format, checkpoint, room.get(name), device, dtype)
            model.set_submodule(name, layer)
        for name in dense:
            _put_dense(model, name, checkpoint, homes[name], dtype, copy=not (mapped and _within(name, waiting)))
    for name, module in model.named_modules():  # buffers that are computed, not saved
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to("cpu" if _within(name, waiting) else device)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    if formats and quantization not in (*READ, "none"):
        _note_quantization(model, _quantization_config(formats, dtype))
    return model.eval().requires_grad_(False)


def outline(folder: Path, quantization: str, dtype: torch.dtype) -> nn.Module:
    """A model that comes in one of READ, as `load_quantized` would make it, on the meta device, by headers alone."""
    _refuse_others(folder, language_config(folder))
    with Checkpoint(folder) as checkpoint:
        model, formats, _ = _outlined(checkpoint, quantization, dtype)
        for name, format in formats.items():
            model.set_submodule(name, packed.outline(model.get_submodule(name), name, format, checkpoint, dtype))
    model.tie_weights()
    return model.to("meta").eval().requires_grad_(False)


def store_quantized(
    folder: Path,
    out: Path,
    *,
    quantization: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype,
    transport: str = "whole",
) -> Path:
    """A quantised copy of the model in `folder`, written to `out` block by block: host memory holds one block.

    For models that are to be streamed from disk (`load_quantized` with `mapped`). What is there already stays, if it is
    as it was written; a folder that is quantised itself, or plain in the dtype that computes, needs no copy and is
    returned. Raises ModelError, and OSError for a full disk.
    """
    if quantization in READ:
        return folder
    if (out / "config.json").exists():
        if (out / SUMS).exists() and read_json(out / SUMS) == _sums(out):
            return out
        shutil.rmtree(out)
    device = torch.device(device)
    _refuse_others(folder, language_config(folder))
    with Checkpoint(folder) as checkpoint:
        model, formats, dense = _outlined(checkpoint, quantization, dtype, transport)
        made = all(_statistics(checkpoint, f"{name}.weight", format) for name, format in formats.items())
        if made and (formats or not _converted(model, dense, checkpoint, dtype)):
            return folder
        parts = [[name] for name in block_names(model)] + [[]]
        index: dict[str, str] = {}
        with appearing(out) as work:
            for number, part in enumerate(parts, 1):
                mine = lambda name: _within(name, part) if part else True  # noqa: B023, E731
                for name in [name for name in formats if mine(name)]:
                    room = _room(model, name, formats[name], checkpoint, torch.device("cpu"))
                    layer = _layer(model, name, formats.pop(name), checkpoint, room, device, dtype)
                    model.set_submodule(name, layer)
                for name in [name for name in dense if mine(name)]:
                    _put_dense(model, name, checkpoint, torch.device("cpu"), dtype)
                    dense.remove(name)
                tied = getattr(model, "all_tied_weights_keys", {})
                state = {n: t.contiguous() for n, t in model.state_dict().items() if mine(n) and n not in tied}
                shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                save_file(state, work / shard)
                index |= dict.fromkeys(state, shard)
                for name in part:
                    model.set_submodule(name, nn.Identity())
            (work / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for file in folder.glob("*.json"):
                if "index" not in file.name:
                    shutil.copyfile(file, work / file.name)  # config.json among them; codes speak for themselves
            (work / SUMS).write_text(json.dumps(_sums(work)))
    return out


def _converted(model: nn.Module, names: list[str], checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether blocks of a plain model compute in another dtype than their files have: pages of those are no use."""
    there = {name: checkpoint.dtype(name) for name in names if _within(name, block_names(model))}
    floating = {name: packed.DTYPES.get(kind) for name, kind in there.items() if "F" in kind}
    return any(kind != _dense_dtype(model, name, dtype) for name, kind in floating.items())


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def _outlined(
    checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, transport: str = "whole"
) -> tuple[nn.Module, dict[str, str], list[str]]:
    """(the model without weights, the format of each layer that is quantised, the names of its other tensors)."""
    with init_empty_weights():
        model = _empty_model(checkpoint.folder, checkpoint.config, dtype)
    formats = _layer_formats(model, checkpoint, quantization)
    if transport != "whole":
        blocks = block_names(model)
        formats |= {n: transport for n, m in model.named_modules() if type(m) is nn.Linear and _within(n, blocks)}
    _check(model, formats, checkpoint)
    return model, formats, [n for n in _own_tensors(model) if n.removesuffix(".weight") not in formats]


def _within(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor or module belongs to one of some modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _layer(
    model: nn.Module,
    name: str,
    format: str,
    checkpoint: Checkpoint,
    room: tuple[Tensor, Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The quantised layer of that name; without room for it, its numbers stay pages of the file."""
    linear, weight = model.get_submodule(name), f"{name}.weight"
    if format in READ:
        make = packed.gptq_layer if format == "gptq" else packed.aqlm_layer
        return make(linear, format, weight, checkpoint, *room, dtype)
    if format in NARROW:
        return _narrow_layer(linear, format, weight, checkpoint, room, device, dtype)
    make = _int8_layer if format == "int8" else _4bit_layer
    return make(linear, format, weight, checkpoint, room, device, dtype)


def _put_dense(
    model: nn.Module, name: str, checkpoint: Checkpoint, home: torch.device, dtype: torch.dtype, copy: bool = True
) -> None:
    tensor = checkpoint.read(name)
    kind = _dense_dtype(model, name, dtype) if tensor.is_floating_point() else tensor.dtype
    set_module_tensor_to_device(model, name, home, value=tensor.to(home, kind, copy=copy), dtype=kind)


def _refuse_others(folder: Path, config: dict) -> None:
    if "peft_type" in config or (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} is a LoRA or another adapter; give the folder of the model that it was made for")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ModelError(f"{folder / 'config.json'} is damaged: its quantization_config is {str(quantization)[:40]}")
    method = quantization.get("quant_method", "bitsandbytes")
    if method not in ("bitsandbytes", *READ):
        raise ModelError(
            f"{folder} is quantised by {method!r}; possible are bitsandbytes (nf4, fp4, int8), {' and '.join(READ)}, "
            "or the model before it was quantised"
        )


def _empty_model(folder: Path, config: dict, dtype: torch.dtype) -> nn.Module:
    """The model that config.json describes, without weights. Code that a folder brings along is never run."""
    if "model_type" in config:
        return _text_encoder(folder, config, dtype) or _language_model(folder, dtype)
    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelError(
            f"{folder / 'config.json'} names the class {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    try:
        return cls.from_config(config)
    except IMPOSSIBLE as error:
        raise ModelError(
            f"{folder / 'config.json'} is damaged: no {name} can be made of it ({first_line(error)}); download it again"
        ) from error


def _text_encoder(folder: Path, config: dict, dtype: torch.dtype) -> transformers.PreTrainedModel | None:
    """One of ENCODERS, if the config is of such a one."""
    name = next(iter(config.get("architectures") or ()), None)
    if name not in ENCODERS:
        return None
    try:
        return getattr(transformers, name)._from_config(
            transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), dtype=dtype
        )
    except (*IMPOSSIBLE, OSError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is damaged: no {name} can be made of it ({first_line(error)}); download it again"
        ) from error


def _language_model(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (*IMPOSSIBLE, OSError) as error:  # the last where a file is no JSON
        raise ModelError(
            f"{folder / 'config.json'} is not that of a language model of transformers {transformers.__version__}: "
            f"{first_line(error)}"
        ) from error
    return model


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state without the weights that are tied to others: those a checkpoint need not have."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _layer_formats(model: nn.Module, checkpoint: Checkpoint, quantization: str) -> dict[str, str]:
    """The format of each linear layer that is, or is to be, quantised. In a checkpoint that is quantised
    already, the layers are those that it says."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    saved = {name: format for name in linears if (format := _saved_format(checkpoint, f"{name}.weight"))}
    if saved:
        found = sorted(set(saved.values()))
        if found != [quantization]:
            raise ModelError(
                f"{checkpoint.folder} is already quantised ({', '.join(found)}), so "
                f"quantization={quantization!r} is not possible; set it to {found[0]!r}"
            )
        return saved
    if (said := (checkpoint.config.get("quantization_config") or {}).get("quant_method")) in READ:
        raise ModelError(
            f"{checkpoint.folder} is quantised by {said!r}, as its config.json says, but its weights are plain; "
            "download the model again"
        )
    if quantization in READ:
        raise ModelError(
            f"{checkpoint.folder} is not quantised by {quantization}, and cannot be here; give a folder that is, or "
            f"set quantization to one of {', '.join(MADE)}"
        )
    if quantization == "none":
        return {}
    kept = get_keys_to_not_convert(model) if isinstance(model, transformers.PreTrainedModel) else []
    return {n: quantization for n in linears if should_convert_module(n, kept) and not _kept_in_fp32(model, n)}


def _saved_format(checkpoint: Checkpoint, weight: str) -> str | None:
    for format in ("nf4", "fp4"):
        if f"{weight}.quant_state.bitsandbytes__{format}" in checkpoint:
            return format
    if weight.removesuffix("weight") + "SCB" in checkpoint:
        return "int8"
    return packed.saved_format(checkpoint, weight.removesuffix(".weight"))


def _kept_in_fp32(model: nn.Module, name: str) -> bool:
    """Some classes (not SD3's) name parts that must stay in fp32; diffusers does not quantise them either."""
    return not set(model._keep_in_fp32_modules or ()).isdisjoint(name.split("."))


def _dense_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    if isinstance(model, transformers.PreTrainedModel) and dtype == torch.bfloat16:
        return dtype  # transformers keeps parts in fp32 that fp16 is too narrow for
    return torch.float32 if _kept_in_fp32(model, name) else dtype


def _statistics(checkpoint: Checkpoint, weight: str, format: str) -> list[str]:
    """The names of the tensors that stand beside a quantised weight, as bitsandbytes saves them."""
    if format == "int8":
        layer = weight.removesuffix("weight")
        return [name for name in (layer + "SCB", layer + "weight_format") if name in checkpoint]
    if format == "fp8":
        return [name for name in (f"{weight}_scale",) if name in checkpoint]
    if format == "bf16":
        return [weight] if checkpoint.dtype(weight) == "BF16" else []
    parts = (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        f"quant_state.bitsandbytes__{format}",
    )
    return [name for part in parts if (name := f"{weight}.{part}") in checkpoint]


def _check(model: nn.Module, formats: dict[str, str], checkpoint: Checkpoint) -> None:
    """Everything that headers can tell, before any weight is read."""
    expected = {name: tuple(tensor.shape) for name, tensor in _own_tensors(model).items()}
    statistics, tied = set(), set(getattr(model, "all_tied_weights_keys", {}))
    for name, format in formats.items():
        weight = f"{name}.weight"
        if format in READ:
            del expected[weight]
            expected |= packed.expected(model.get_submodule(name), name, format, checkpoint)
            continue
        beside = _statistics(checkpoint, weight, format)
        statistics.update(beside)
        if beside and format in ("nf4", "fp4"):
            expected[weight] = ((model.get_submodule(name).weight.numel() + 1) // 2, 1)
            statistics.update((f"{weight}.absmax", f"{weight}.quant_map"))
    names = set(checkpoint.files)
    if any("lora_" in name for name in names):
        raise ModelError(f"{checkpoint.folder} holds a LoRA, not a model; give the folder of the model it was made for")
    kind = type(model).__name__
    if missing := sorted((set(expected) | statistics) - names):
        raise ModelError(f"{checkpoint.folder} lacks {some(missing)}, which its {kind} needs; download it again")
    ignored = [name for name in names if any(re.search(pattern, name) for pattern in IGNORED)]
    if unexpected := sorted(names - set(expected) - statistics - tied - set(ignored)):
        raise ModelError(
            f"{checkpoint.folder} has {some(unexpected)}, which its {kind} does not know; config.json and "
            "weights do not belong together"
        )
    for name, shape in expected.items():
        if (found := checkpoint.shape(name)) != shape:
            raise ModelError(
                f"{checkpoint.folder}: {name} has the shape {list(found)} where config.json asks for "
                f"{list(shape)}; config.json and weights do not belong together"
            )


def _room(
    model: nn.Module, name: str, format: str, checkpoint: Checkpoint, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Memory for the codes and scales of a layer, taken for all layers before any weight is read: what stays
    is not strewn among what comes and goes, and a model that does not fit fails at once."""
    if format in READ:
        return packed.room(name, format, checkpoint, device)
    linear = model.get_submodule(name)
    weights = linear.weight.numel()
    if format in NARROW:
        scale = torch.empty(linear.out_features, 1, device=device) if format == "fp8" else None
        return torch.empty(linear.weight.shape, dtype=narrow.FORMS[format], device=device), scale
    if format == "int8":
        size, codes = linear.out_features, torch.empty(linear.weight.shape, dtype=torch.int8, device=device)
    else:
        size = math.ceil(weights / BLOCK)
        codes = torch.empty(((weights + 1) // 2, 1), dtype=torch.uint8, device=device)
    return codes, torch.empty(size, dtype=torch.float32, device=device)


def _4bit_layer(
    linear: nn.Linear,
    format: str,
    weight: str,
    checkpoint: Checkpoint,
    room: tuple[Tensor, Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Linear4bit:
    tensor = checkpoint.read(weight)
    codes, scales = room or (tensor, None)
    if statistics := _statistics(checkpoint, weight, format):
        saved = {name: checkpoint.read(name) for name in statistics}
        state = QuantState.from_dict(saved, device=codes.device)
        unnest(state)
        scales = state.absmax if scales is None else scales
        if state.blocksize != BLOCK or state.absmax.numel() != math.ceil(linear.weight.numel() / BLOCK):
            raise ModelError(
                f"{checkpoint.folder}: the scales of {weight} do not fit its codes, one for {BLOCK} weights; "
                "download the model again"
            )
        if room:
            codes.copy_(tensor)
            scales.copy_(state.absmax)
        state.code = state.code.clone()
    else:
        state = _quantize_4bit(tensor.flatten(), format, codes, scales, device)
        state.shape = linear.weight.shape
        state.code = state.code.to(codes.device)
    state.absmax, state.dtype = scales, dtype
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type=format,
        device="meta",
    )
    layer.support_avx512bf16_for_cpu = False  # else the first forward repacks codes and scales for good
    layer.quant_state = state
    layer.weight = Params4bit(
        codes,
        quant_state=state,
        compress_statistics=False,
        quant_type=format,
        module=layer,
        bnb_quantized=True,
    )
    return layer


def _quantize_4bit(flat: Tensor, format: str, codes: Tensor, scales: Tensor, device: torch.device) -> QuantState:
    # On the device that computes, wherever codes are kept: quantisers may differ in ties. In the dtype of the file, not
    # of the computation, so that codes do not depend on the latter.
    if flat.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        flat = flat.float()
    step = PIECE if device.type == "cpu" else flat.numel()
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].to(device)
        packed, state = quantize_4bit(piece, blocksize=BLOCK, compress_statistics=False, quant_type=format)
        codes[start // 2 :][: packed.numel()] = packed
        scales[start // BLOCK :][: state.absmax.numel()] = state.absmax
    return state


def _int8_layer(
    linear: nn.Linear,
    format: str,
    weight: str,
    checkpoint: Checkpoint,
    room: tuple[Tensor, Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Linear8bitLt:
    tensor = checkpoint.read(weight)
    if _statistics(checkpoint, weight, format):
        saved = (tensor, checkpoint.read(weight.removesuffix("weight") + "SCB"))
        codes, scales = room or saved
        if room:
            codes.copy_(saved[0])
            scales.copy_(saved[1])
    else:
        codes, scales = room
        rows = max(1, PIECE // linear.in_features) if device.type == "cpu" else linear.out_features
        for start in range(0, linear.out_features, rows):
            piece = tensor[start : start + rows].to(device, torch.float16)
            codes[start : start + rows], scales[start : start + rows], _ = int8_vectorwise_quant(piece)
    layer = Linear8bitLt(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    layer.init_8bit_state()  # the scales stand in layer.state.SCB from now on, not only after a forward
    return layer


def _narrow_layer(
    linear: nn.Linear,
    format: str,
    weight: str,
    checkpoint: Checkpoint,
    room: tuple[Tensor, Tensor | None] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> narrow.NarrowLinear:
    tensor, beside = checkpoint.read(weight), _statistics(checkpoint, weight, format)
    if beside and not room:
        return narrow.NarrowLinear(linear, tensor, checkpoint.read(beside[0]) if format == "fp8" else None, dtype)
    codes, scale = room
    if beside and format == "fp8":
        codes.copy_(tensor)
        scale.copy_(checkpoint.read(beside[0]))
        return narrow.NarrowLinear(linear, codes, scale, dtype)
    rows = max(1, PIECE // linear.in_features) if device.type == "cpu" else linear.out_features
    for start in range(0, linear.out_features, rows):
        found, factor = narrow.narrowed(tensor[start : start + rows].to(device), format)
        codes[start : start + rows] = found.to(codes.device)
        if factor is not None:
            scale[start : start + rows] = factor
    return narrow.NarrowLinear(linear, codes, scale, dtype)


def unnest(state: QuantState) -> None:
    """Turn scales that are quantised themselves (uint8 and a nested state) into plain fp32, exactly as
    `bitsandbytes.functional.dequantize_4bit` does at every forward."""
    if state.nested:
        state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested, state.state2, state.offset = False, None, None
    state.absmax = state.absmax.float().contiguous()


def _quantization_config(formats: dict[str, str], dtype: torch.dtype) -> dict:
    """The settings of the BitsAndBytesConfig, diffusers' or transformers', with which this model loads again."""
    format = next(iter(formats.values()))
    if format == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": False,
    }


def _note_quantization(model: nn.Module, settings: dict) -> None:
    """What the library that the model belongs to keeps of it, and writes into config.json."""
    if isinstance(model, transformers.PreTrainedModel):
        model.config.quantization_config = transformers.BitsAndBytesConfig(**settings)
    else:
        model.register_to_config(quantization_config=diffusers.BitsAndBytesConfig(**settings))


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers of a model by name, sorted."""
    kinds = (Linear4bit, Linear8bitLt, packed.PackedLinear)
    return dict(sorted((n, m) for n, m in model.named_modules() if isinstance(m, kinds)))


def quantization_of(model: nn.Module) -> str:
    """What `quantization` loads this model: the format of its layers, which all have the same, or "none"."""
    return next((_identity(layer)[0] for layer in quantized_layers(model).values()), "none")


def _identity(layer: nn.Module) -> tuple[str, tuple[int, ...], tuple[Tensor, ...]]:
    """Format, shape of the weight, codes and scales of a quantised layer."""
    if isinstance(layer, packed.PackedLinear):
        return layer.format, (layer.out_features, layer.in_features), (*layer.frozen, layer.scales)
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        return state.quant_type, tuple(state.shape), (layer.weight.data, state.absmax)
    state = layer.state if layer.state.SCB is not None else layer.weight
    return "int8", tuple(state.CB.shape), (state.CB, state.SCB)


def code_hash(model: nn.Module) -> str:
    """SHA-256 over every quantised layer's name, format, shape, codes and scales: the identity of a base. Of a model
    without such layers, over all of its tensors.

    Take it before a style is applied, since that changes the scales.
    """
    digest = hashlib.sha256()
    found = {name: _identity(layer) for name, layer in quantized_layers(model).items()}
    found = found or {n: (str(t.dtype), tuple(t.shape), (t,)) for n, t in sorted(_own_tensors(model).items())}
    for name, (format, shape, tensors) in found.items():
        digest.update(f"{name} {format} {shape}\n".encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

"""The parts of a Stable Diffusion 3 pipeline: loaded one by one, put together, and written out again; language models.

`hub` says where a model's files are, `quantize` brings its weights onto the device; this file knows which
parts there are. `locate`, `MODELS`, `ModelError` and others are theirs, given here as well.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from filelock import FileLock
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from zo_engine.cache import model_key
from zo_engine.hub import (
    IMPOSSIBLE,
    LANGUAGE_FILES,
    MODELS,
    PARTS,
    WEIGHTS,
    KnownModel,
    ModelError,
    first_line,
    language_config,
    locate,
    read_json,
    some,
    stock_name,
    text_length,
    vae_scale,
    weight_files,
)
from zo_engine.narrow import widened
from zo_engine.offload import Mover, block_names, end_names
from zo_engine.packed import DTYPES, PackedLinear, saved_scales, write_scales
from zo_engine.quantize import (
    READ,
    Checkpoint,
    code_hash,
    load_quantized,
    quantization_of,
    quantized_layers,
    store_quantized,
)
from zo_engine.run import appearing
from zo_engine.scales import final_norm
from zo_engine.tokens import load_tokenizer

__all__ = [
    "MODELS",
    "KnownModel",
    "ModelError",
    "code_hash",
    "export",
    "export_language_model",
    "load_language_model",
    "load_text_encoders",
    "load_tokenizer",
    "load_transformer",
    "load_vae",
    "locate",
    "pipeline",
    "quantized_layers",
    "text_length",
]

Device = str | torch.device

TEXT_PARTS = {
    "text_encoder": (CLIPTextModelWithProjection, CLIPTokenizer),
    "text_encoder_2": (CLIPTextModelWithProjection, CLIPTokenizer),
    "text_encoder_3": (T5EncoderModel, T5TokenizerFast),
}


@dataclass(frozen=True)
class Placement:
    """Where a model's blocks are: the first `away` wait in host memory, or on disk, and stream through `slots`."""

    away: int = 0
    slots: int = 2
    store: Path | None = None  # a folder: blocks stay in files, those of the model or a quantised copy made there
    ends: bool = False  # whether a language model's embedding and output layer wait with them
    held: int = 0  # blocks that are taken into host memory all the same: so many last ones of those away


RESIDENT = Placement()
Finish = Callable[[Path], None]  # what is done to an exported folder at last


def load_transformer(
    folder: Path,
    *,
    quantization: str = "nf4",
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    transport: str = "whole",
    placement: Placement = RESIDENT,
) -> nn.Module:
    """The transformer of a pipeline folder, quantised layer by layer: see quantize.load_quantized."""
    how = {"quantization": quantization, "device": device, "dtype": dtype, "transport": transport}
    return _placed(Path(folder) / "transformer", placement, **how)


def load_language_model(
    folder: Path,
    *,
    quantization: str = "nf4",
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    transport: str = "whole",
    placement: Placement = RESIDENT,
) -> PreTrainedModel:
    """The causal language model of a transformers folder, quantised layer by layer: see quantize.load_quantized.

    Its `save_pretrained` writes a folder that stock transformers loads, scales as they stand included.
    """
    how = {"quantization": quantization, "device": device, "dtype": dtype, "transport": transport}
    return _placed(Path(folder), placement, **how)


def _placed(part: Path, placement: Placement, **how) -> nn.Module:
    """The model of a folder; where blocks stream, its attribute `mover` is what moves them."""
    if not (placement.away or placement.ends):
        return load_quantized(part, **how)
    if placement.store:
        kind = how["quantization"] if how["transport"] == "whole" else how["transport"]
        key = f"{model_key(part.parent, [part.name])}-{kind}-{str(how['dtype']).removeprefix('torch.')}"
        placement.store.mkdir(parents=True, exist_ok=True)
        with FileLock(placement.store / f"{key}.lock"):  # another run may be at making the same
            part = store_quantized(part, placement.store / key, **how)
    mapped = placement.store is not None
    model = load_quantized(part, **how, away=placement.away, mapped=mapped, ends=placement.ends)
    away, ends = block_names(model)[: placement.away], end_names(model) if placement.ends else []
    if away or ends:
        model.mover = Mover(
            model, away, how["device"], placement.slots, from_disk=mapped, ends=ends, held=placement.held
        )
    return model


def bring_of(model: nn.Module) -> Callable | None:
    """What brings parts of theta to where the blocks of a model compute, if they stream."""
    mover = getattr(model, "mover", None)
    return mover and mover.bring


def encoders_for(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    memory: int = 0,
    streamed: bool = False,
    store: Path | None = None,
) -> tuple[str, Callable]:
    """(how T5 is held on this device, a function that loads the encoders so): for `cache.embeddings`.

    memory: bytes of the device that may be used, if bounded: encoders that are larger stream. streamed: they do anyway.
    store: where T5's blocks wait as files, if they are not to wait in host memory.
    Streamed or not, embeddings are the same, bit for bit. Where nothing is said, T5 is quantised if it does not fit.
    """
    streamed = streamed or 0 < memory < text_bytes(folder)
    held = "none" if streamed or memory else text_quantization(folder, device)
    return held, partial(
        load_text_encoders, folder, device=device, dtype=dtype, quantization=held, streamed=streamed, store=store
    )  # fmt: skip


def load_vae(folder: Path, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    part = Path(folder) / "vae"
    with _whole(part):
        vae, info = AutoencoderKL.from_pretrained(
            part, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    _complete(part, info)
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoders(
    folder: Path,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
    streamed: bool = False,
    store: Path | None = None,
) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline with tokenizers and text encoders only: call its `encode_prompt`, then drop it.

    `quantization` is that of T5 alone (4.8 billion weights in SD3.5); the CLIPs are small and stay dense. streamed: the
    blocks of all three wait in host memory and pass through the slots of a `Mover` each; with a `store`, those of T5 as
    files there.
    """
    folder = Path(folder)
    parts = {}
    for name, (encoder, tokenizer) in TEXT_PARTS.items():
        kind = quantization if encoder is T5EncoderModel else "none"
        if streamed and store and encoder is T5EncoderModel:
            how = {"quantization": "none", "device": torch.device(device), "dtype": dtype, "transport": "whole"}
            parts[name] = _placed(folder / name, Placement(sys.maxsize, store=store), **how)
        else:
            parts[name] = _text_encoder(encoder, folder / name, kind, "cpu" if streamed else device, dtype)
            if streamed:
                stream(parts[name], torch.device(device))
        name = name.replace("text_encoder", "tokenizer")
        with _whole(folder / name):
            parts[name] = tokenizer.from_pretrained(folder / name, local_files_only=True)
    return StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts)


def _text_encoder(cls: type, part: Path, quantization: str, device: Device, dtype: torch.dtype) -> nn.Module:
    options = {}
    if quantization != "none" and "quantization_config" not in read_json(part / "config.json"):
        options["quantization_config"] = _bitsandbytes(quantization, dtype)  # else transformers takes what is there
    with _whole(part):
        model, info = cls.from_pretrained(
            part,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    _complete(part, info)
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # that kernel computes in bf16, whatever dtype was asked for
    return model.eval().requires_grad_(False)


def stream(model: nn.Module, device: torch.device) -> None:
    """Let the blocks of a plain model that lies in host memory stay there and stream; all else goes to the device."""
    names = block_names(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(name.startswith(f"{block}.") for block in names):
            tensor.data = tensor.data.to(device)
    model.mover = Mover(model, names, device)


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype)


@contextmanager
def _whole(part: Path) -> Iterator[None]:
    """What a library says of a part that it cannot load, as one sentence; a device without memory stays one."""
    try:
        yield
    except (*IMPOSSIBLE, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "allocate memory" in str(error):
            raise
        raise ModelError(f"{part} cannot be loaded ({first_line(error)}); download the model again") from error


def _complete(part: Path, info: dict) -> None:
    """diffusers and transformers fill gaps in a checkpoint with random numbers; here that is an error."""
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(f"{part} lacks {some(wrong)}, or has it in another shape; download the model again")


def pipeline(folder: Path, transformer: nn.Module, vae: AutoencoderKL | None = None) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline around the given parts, without text encoders: call it with prompt_embeds.

    Without an autoencoder it gives latents (output_type="latent").
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    texts = [name.replace("text_encoder", kind) for name in TEXT_PARTS for kind in ("text_encoder", "tokenizer")]
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **dict.fromkeys(texts))
    pipe.vae_scale_factor = vae_scale(folder)
    return pipe


def drawing(folder: Path, transformer: nn.Module, bounded: bool = False) -> StableDiffusion3Pipeline:
    """The pipeline that draws: with an autoencoder in the transformer's dtype, as it gets the latents in that.

    bounded: it decodes one picture after the other, in the memory of one.
    """
    vae = load_vae(folder, device=transformer.device, dtype=transformer.dtype)
    if bounded:
        vae.enable_slicing()
    return pipeline(folder, transformer, vae)


def export(base: Path, transformer: diffusers.ModelMixin, out: Path, finish: Finish = lambda work: None) -> Path:
    """Write a complete pipeline folder to `out`: this transformer, quantised as it is, all else from `base`.

    Plain diffusers loads it on a GPU. Weights that do not change are hard links to the base's where the disk
    allows it. The folder appears under its name only once it has been loaded again and found equal, bit for bit, and
    `finish` has put into it what else belongs there.
    Raises ModelError if `out` exists or the check fails; OSError for a full disk, nothing being left behind.
    """
    with _appearing(Path(out)) as work, widened(transformer):
        _copy_others(Path(base), work)
        # One file, however large: diffusers looks for a weight's scales in the weight's own shard only.
        transformer.save_pretrained(work / "transformer", safe_serialization=True, max_shard_size="1TB")
        _prove_equal(transformer, partial(load_transformer, work))
        finish(work)
    return Path(out)


def export_language_model(base: Path, model: PreTrainedModel, out: Path, finish: Finish = lambda work: None) -> Path:
    """Write a complete folder to `out`: this model, quantised as it is, and the tokenizer and licence from `base`.

    Plain transformers loads it. Of GPTQ and AQLM it is a copy of `base` with other scales, and another final norm if
    that moved, rounded to the dtype that they have there (fp16: by 0.05 % at most). As with `export`, the folder
    appears once it has been loaded again, found equal and finished, and raises the same.
    """
    with _appearing(Path(out)) as work, widened(model):
        for file in Path(base).iterdir():
            if file.is_file() and any(fnmatch(file.name, wish) for wish in LANGUAGE_FILES):
                shutil.copyfile(file, work / file.name)
        if quantization_of(model) in READ:
            stored = _copy_with_scales(Path(base), model, work)
        else:
            stored = {}
            model.save_pretrained(work, max_shard_size="1TB")  # its config.json takes the place of the base's
        _prove_equal(model, partial(load_language_model, work), stored)
        finish(work)
    return Path(out)


def _copy_with_scales(base: Path, model: nn.Module, work: Path) -> dict[str, torch.dtype]:
    """The files of `base` with the scales and the final norm of the model; gives the dtype that the norm has there."""
    scales, stored = saved_scales(quantized_layers(model)), {}
    if norm := final_norm(model):
        name = f"{norm}.weight"
        scales[name] = model.get_parameter(name)
        with Checkpoint(base) as checkpoint:
            stored[name] = DTYPES[checkpoint.dtype(name)]
    for file in (base / name for name in weight_files(base)):
        copy = work / stock_name(file.name)
        shutil.copyfile(file, copy)
        if copy.suffix == ".safetensors":
            write_scales(copy, scales)
        elif copy.name != file.name:
            index = read_json(file)
            index["weight_map"] = {tensor: stock_name(shard) for tensor, shard in index["weight_map"].items()}
            copy.write_text(json.dumps(index, indent=2) + "\n")
    before, config = read_json(base / "config.json"), language_config(base)
    dense = config["quantization_config"].get("linear_weights_not_to_quantize")
    if dense:  # AQLM names weights where transformers 5.23 looks for layers, and else makes random layers of them
        bare = [name.removesuffix(".weight") for name in dense]
        config["quantization_config"]["linear_weights_not_to_quantize"] = list(dict.fromkeys([*dense, *bare]))
    if dense or config != before:
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return stored


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write to, which gets the name `out` in the end if nothing went wrong, and is gone otherwise."""
    if out.exists():
        raise ModelError(f"{out} exists already; remove it, or choose another name")
    with appearing(out) as work:
        yield work


def _copy_others(base: Path, work: Path) -> None:
    for file in (base / "model_index.json", *base.glob("LICENSE*")):
        shutil.copyfile(file, work / file.name)
    for part in PARTS:
        (work / part).mkdir()
        for file in (base / part).iterdir() if part != "transformer" else ():
            if WEIGHTS.fullmatch(file.name):
                _link(file.resolve(), work / part / file.name)  # in the hub's cache, files are links themselves
            elif file.suffix in (".json", ".txt", ".model"):
                shutil.copyfile(file, work / part / file.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _prove_equal(
    model: nn.Module, load: Callable[..., nn.Module], stored: dict[str, torch.dtype] | None = None
) -> None:
    """stored: of tensors that were rounded to another dtype, that dtype."""
    again = load(quantization=quantization_of(model), dtype=model.dtype).state_dict()
    state = model.state_dict()
    state |= {name: state[name].to(dtype).to(model.dtype) for name, dtype in (stored or {}).items()}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, PackedLinear):
            state[f"{name}.scales"] = layer.scales.to(layer.stored).float()
            if f"{name}.codebooks" in again:
                state[f"{name}.codebooks"] = layer.codebooks.to(again[f"{name}.codebooks"].dtype)
    changed = [name for name in state if name not in again or not torch.equal(state[name].cpu(), again[name])]
    if changed or len(state) != len(again):
        raise ModelError(f"the exported model differs from the one in memory in {some(changed)}; please report this")


# What a pipeline's configs say of it


def text_quantization(folder: Path, device: torch.device) -> str:
    """How to load T5 on a device: plain where all encoders fit into most of its free memory, else NF4.

    T5-XXL is 9.5 GB in bf16, more than SD3.5 Large itself needs here; in NF4 it fits a card of 6 GB.
    """
    if device.type != "cuda":
        return "none"
    return "none" if text_bytes(folder) < 0.8 * torch.cuda.mem_get_info(device)[0] else "nf4"


def text_bytes(folder: Path) -> int:
    """Of the text encoders' files, about what they take when loaded: they come in 16 bits."""
    return sum(f.stat().st_size for part in TEXT_PARTS for f in (Path(folder) / part).glob("*.safetensors"))


def scheduler_shift(folder: Path) -> float:
    """The time shift of the flow-matching scheduler."""
    return float(read_json(Path(folder) / "scheduler" / "scheduler_config.json").get("shift", 1.0))


def describe(model: str) -> KnownModel:
    """The table's entry for a known name; for a folder or a repository, one made from its name."""
    title = Path(model).name
    unknown = KnownModel(name=title, repo=model, title=title, licence="as the base model", resolution="", notes="")
    return MODELS.get(model, unknown)

"""Which models there are, and where their files lie: a known name, a folder, or a hub repository.

What is on this machine is used without asking the network. Files are judged by name and header alone; nothing
is loaded, and torch is not imported.
"""

import difflib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import auth_check, constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

CHECKOUT = Path(__file__).resolve().parent.parent

PIPELINE = "StableDiffusion3Pipeline"
WEIGHTED_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*WEIGHTED_PARTS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' and transformers'
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# What AutoGPTQ and gptqmodel write, and look for before the names above; transformers knows them not.
GPTQ_WEIGHTS = re.compile(r"gptq_model-(\d+bit-(-1|\d+)g)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
LOOKS, LOOK = 64, 2**16  # how often, and for how many bytes, a file of weights is looked into for `weights_held`
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")


# What diffusers and transformers raise for a class that they do not know, or for settings that make no model.
IMPOSSIBLE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class ModelError(ValueError):
    """A model that cannot be found or loaded, in one sentence for the person who asked for it."""


@dataclass(frozen=True)
class KnownModel:
    name: str
    repo: str  # hub repository, or a folder relative to the checkout
    title: str
    licence: str
    resolution: str  # buckets to train at, in the recipe's notation; of a language model none
    notes: str
    task: str = "image"  # or "text"


_STABILITY = "Stability AI Community License (free below 1 M USD of yearly revenue)"
_KNOWN = (
    KnownModel(
        name="tiny-sd3",
        repo="assets/models/tiny-sd3",
        title="Tiny SD3 (embedded)",
        licence="Apache-2.0",
        resolution="64x64,64x96",
        notes="the classes of SD3.5 at a few million parameters, trained by this project; for a CPU",
    ),
    KnownModel(
        name="sd3.5-medium",
        repo="stabilityai/stable-diffusion-3.5-medium",
        title="Stable Diffusion 3.5 Medium",
        licence=_STABILITY,
        resolution="512",
        notes="2.2 billion weights, 1.3 GB in NF4; downloads about 16 GB",
    ),
    KnownModel(
        name="sd3.5-large",
        repo="stabilityai/stable-diffusion-3.5-large",
        title="Stable Diffusion 3.5 Large",
        licence=_STABILITY,
        resolution="512",
        notes="8.1 billion weights, 4.7 GB in NF4; downloads about 28 GB",
    ),
    KnownModel(
        name="sd3.5-large-nf4",
        repo="sayakpaul/sd35-large-nf4",
        title="Stable Diffusion 3.5 Large, already in NF4",
        licence=_STABILITY,
        resolution="512",
        notes="8.1 billion weights, 4.7 GB in NF4; downloads about 12 GB",
    ),
    KnownModel(
        name="tiny-llm",
        repo="assets/models/tiny-llm",
        title="Tiny LLM (embedded)",
        licence="Apache-2.0",
        resolution="",
        notes="the classes of Llama at 2.6 million parameters, trained by this project; for a CPU",
        task="text",
    ),
    *(
        KnownModel(name, repo, title, licence, "", f"{weights}; downloads about {fetched}", "text")
        for name, repo, title, licence, weights, fetched in (
            ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen3 0.6B", "Apache-2.0",
             "0.6 billion weights, 0.6 GB in NF4", "1.5 GB"),
            ("qwen3-1.7b", "Qwen/Qwen3-1.7B", "Qwen3 1.7B", "Apache-2.0",
             "1.7 billion weights, 1.4 GB in NF4", "4.1 GB"),
            ("qwen3-4b", "Qwen/Qwen3-4B", "Qwen3 4B", "Apache-2.0",
             "4.0 billion weights, 2.8 GB in NF4", "8.1 GB"),
            ("qwen3-8b", "Qwen/Qwen3-8B", "Qwen3 8B", "Apache-2.0",
             "8.2 billion weights, 6.4 GB in NF4", "16.4 GB"),
            ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B Instruct", "Apache-2.0",
             "7.2 billion weights, 4.5 GB in NF4", "14.5 GB"),
            ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 8B Instruct", "Llama 3.1 Community License",
             "8.0 billion weights, 6.0 GB in NF4", "16.1 GB"),
        )
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _KNOWN}
SD3_MULTIPLE = 16  # of every SD3: the autoencoder halves three times, its patches once more


LANGUAGE_CLASSES = ("ForCausalLM", "LMHeadModel")  # how transformers' names of causal language models end
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")  # one of these must be there
LANGUAGE_FILES = (
    *TOKENIZERS,
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    "quantize_config.json",
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template*", "LICENSE*"),
)


def repository(model: str) -> str:
    """The hub repository of a model by name; of a folder or a repository, what was given."""
    return MODELS[model].repo if model in MODELS else model


def find(model: str) -> Path | None:
    """Where a model lies on this machine, not checked; None where it would have to be fetched."""
    repo = repository(model)
    folder = CHECKOUT / repo if model in MODELS else Path(repo).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return None
    cached = (try_to_load_from_cache(repo, name) for name in ("model_index.json", "config.json"))
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def locate(model: str, download: bool = True, begin: Callable[[int], None] = lambda size: None) -> Path:
    """The folder of a known model, a local folder, or a hub repository `org/name` (downloaded if need be).

    Before anything is fetched, access is proved and `begin` gets the size of what is wanted, in bytes. The
    folder that is returned has passed `check`. Raises ModelError, saying what to do, if there is no such
    model, its licence has not been accepted, there is no network, the disk is too small, or files are missing
    or damaged.
    """
    known = MODELS.get(model)
    repo = repository(model)
    folder = CHECKOUT / repo if known else Path(model).expanduser()
    if folder.exists():
        check(folder)
        return folder
    if known and not repo.count("/") == 1:
        raise ModelError(f"the embedded model {model!r} is missing: {folder} should be part of the checkout")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        close = difflib.get_close_matches(model, MODELS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(MODELS)}"
        raise ModelError(f"no model {model!r}: neither a known name nor a folder; {hint}")
    return _from_hub(repo, download, begin)


def _from_hub(repo: str, download: bool, begin: Callable[[int], None]) -> Path:
    cached = find(repo)
    problem = f"{repo} is not on this machine"
    if cached:
        try:
            check(cached)
            return cached
        except ModelError as error:  # an interrupted download, most likely: fetch what is missing
            problem = str(error)
    if not download:
        raise ModelError(f"{problem}, and downloading was not asked for")
    try:
        auth_check(repo)
        files = {f.rfilename: f.size or 0 for f in model_info(repo, files_metadata=True).siblings}
        wanted = wanted_files(list(files))
        size = sum(files[name] for name in wanted)
        _check_space(repo, size - arrived(repo))
        begin(size)
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except GatedRepoError as error:
        known = error.response is not None and error.response.status_code == 403  # a token, but no access yet
        then = "then try again" if known else (
            "then make a token (read) at https://huggingface.co/settings/tokens and give it to `hf auth login`"
        )  # fmt: skip
        raise ModelError(
            f"{repo} asks you to accept its licence first: log in at https://huggingface.co/{repo} and "
            f"accept it, {then}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder and no hub repository {repo!r} (or it is private; then run `hf auth login`)"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{problem}, and the hub cannot be reached ({reason}); connect and try again (what has arrived "
            "is kept), or give the path of a downloaded folder"
        ) from error
    check(folder)
    return folder


def wanted_files(names: list[str]) -> list[str]:
    """The files of a model among those of a repository: of a pipeline, or of a language model."""
    return (
        language_files(names) if "config.json" in names and "model_index.json" not in names else pipeline_files(names)
    )


def language_files(names: list[str]) -> list[str]:
    """The files of a language model among those of a repository: its config, tokenizer, chat template and safetensors.
    No pickles, no variants, no code. Raises ModelError where there are no safetensors."""
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in names if GPTQ_WEIGHTS.fullmatch(name)]
    if not weights:
        raise ModelError("the repository has no safetensors weights (model.safetensors); pickles are never loaded")
    return sorted(weights + [name for name in names if any(fnmatch(name, wish) for wish in LANGUAGE_FILES)])


def language_config(folder: Path) -> dict:
    """The config.json of a language model. Where older GPTQ packers put how they quantised beside it, into
    quantize_config.json, that is its quantization_config, as later ones write it."""
    config, beside = read_json(folder / "config.json"), folder / "quantize_config.json"
    if "quantization_config" not in config and "model_type" in config and beside.exists():
        settings = read_json(beside)
        method = settings.get("quant_method") or "gptq"  # which all were, when this was left unsaid
        config["quantization_config"] = settings | {"quant_method": method}
    return config


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors files and of their index: model.safetensors and the like, or those that
    GPTQ's packers give, of the bits and the group size that the config says. Several sizes may lie side by side."""
    names = sorted(path.name for path in folder.iterdir())
    if usual := [name for name in names if WEIGHTS.fullmatch(name)]:
        return usual
    packed = {name: match[1] for name in names if (match := GPTQ_WEIGHTS.fullmatch(name))}
    if not packed:
        return []
    settings = language_config(folder).get("quantization_config") or {}
    if not isinstance(settings, dict) or settings.get("quant_method") != "gptq":
        raise ModelError(
            f"{folder} has {next(iter(packed))}, which is named as GPTQ's packers do, but its config.json does not say "
            "that it is quantised by gptq; download it again"
        )
    size = f"{settings.get('bits')}bit-{settings.get('group_size')}g"
    if found := [name for name, said in packed.items() if said == size]:
        return found
    raise ModelError(f"{folder} has {some(list(packed))}, but its config says {size}; download it again")


def pipeline_files(names: list[str]) -> list[str]:
    """The files of a pipeline among those of a repository: `model_index.json`, the licence, and in the parts'
    folders configs, tokenizers and safetensors. No pickles, no variants (`model.fp16.safetensors`), none of
    the single-file duplicates beside the parts. Raises ModelError if the repository is no such pipeline."""
    if "model_index.json" not in names:
        raise ModelError("the repository has no model_index.json: it is not a diffusers pipeline")
    wanted = [name for name in names if name == "model_index.json" or fnmatch(name, "LICENSE*")]
    for part in PARTS:
        inside = [name for name in names if name.startswith(f"{part}/") and name.count("/") == 1]
        weights = [name for name in inside if WEIGHTS.fullmatch(name.split("/")[1])]
        if part in WEIGHTED_PARTS and not weights:
            raise ModelError(f"the repository has no safetensors weights in {part}; pickles are never loaded")
        text = [name for name in inside if name.endswith((".json", ".txt", ".model")) and ".index." not in name]
        wanted += weights + text
    return sorted(wanted)


def arrived(repo: str) -> int:
    """Bytes of a repository that lie in the hub's cache, those of a download in progress among them."""
    blobs, now, found = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs", time.time(), 0
    for file in blobs.glob("*"):
        try:
            stat = file.stat()
        except FileNotFoundError:  # renamed this moment: it arrived
            continue
        # an unfinished file that nobody writes to is what an interrupted download left
        if file.suffix != ".incomplete" or now - stat.st_mtime < 60:
            found += stat.st_size
    return found


def _check_space(repo: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ModelError(
            f"{repo} needs {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to a folder on a larger disk"
        )


def check(folder: Path) -> None:
    """Raises ModelError unless `folder` is a complete model of either kind, as far as headers tell."""
    if not is_language(folder):
        check_pipeline(folder)
        return
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} is a LoRA, not a model; give the folder of the model that it was made for")
    _check_weights(folder)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer ({' or '.join(TOKENIZERS[:2])}); download the model again")


def check_pipeline(folder: Path) -> None:
    """Raises ModelError unless `folder` is a complete Stable Diffusion 3 pipeline, as far as headers tell."""
    if folder.is_file():
        _refuse_file(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    if (folder / "adapter_config.json").exists() or (folder / "pytorch_lora_weights.safetensors").exists():
        raise ModelError(f"{folder} is a LoRA, not a model; give the folder of the model that it was made for")
    if is_language(folder):
        raise ModelError(f"{folder} is a language model: it draws nothing, and learns from texts")
    if not (folder / "model_index.json").exists():
        hint = (
            "it looks like one part of it, give the folder above"
            if (folder / "config.json").exists()
            else ("a complete diffusers folder is needed, as save_pretrained writes it")
        )
        raise ModelError(f"{folder} has no model_index.json, so it is not a diffusers pipeline: {hint}")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise ModelError(f"{folder} is a {index.get('_class_name')}; of image models, only {PIPELINE} can be trained")
    for part in WEIGHTED_PARTS:
        _check_weights(folder / part)
    read_json(folder / "scheduler" / "scheduler_config.json")


def is_language(folder: Path) -> bool:
    """Whether a folder holds a causal language model of transformers: its config.json names the class."""
    folder = Path(folder)
    if (folder / "model_index.json").exists() or not (folder / "config.json").exists():
        return False
    classes = read_json(folder / "config.json").get("architectures")
    classes = classes if isinstance(classes, list) else []
    return any(str(name).endswith(LANGUAGE_CLASSES) for name in classes)


def _check_weights(folder: Path) -> None:
    read_json(folder / "config.json")
    listed, shards = find_weights(folder)
    found = set()
    for shard in shards:
        with open_shard(shard, framework="numpy") as file:
            found.update(file.keys())
    check_index(folder, listed, found)


def _refuse_file(path: Path) -> None:
    if any(path.match(pattern) for pattern in PICKLES):
        raise ModelError(
            f"{path} is a pickle, which can run code and is never loaded; give a diffusers folder with "
            "safetensors in it"
        )
    if path.suffix == ".safetensors":
        with open_shard(path, framework="numpy") as file:
            names = file.keys()
        if any("lora" in name.lower() for name in names):
            raise ModelError(f"{path} is a LoRA, not a model; give the folder of the model that it was made for")
    raise ModelError(f"{path} is a single file; give a diffusers folder (with model_index.json in it)")


def stock_name(name: str) -> str:
    """What transformers calls a file of weights that GPTQ's packers named."""
    match = GPTQ_WEIGHTS.fullmatch(name)
    return f"model{match[3] or ''}.safetensors{match[4] or ''}" if match else name


def find_weights(folder: Path) -> tuple[list[str], list[Path]]:
    """Of one part of a pipeline: the tensors that its index lists (none without index), and the weight files.

    Variants such as `model.fp16.safetensors` are passed over. Raises ModelError for a missing shard, and for
    a folder that has no weights or only pickles.
    """
    names = weight_files(folder)
    if indices := [name for name in names if name.endswith(".index.json")]:
        weight_map = read_json(folder / indices[0]).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map):
            raise ModelError(f"{folder / indices[0]} is damaged: it has no weight_map; download the model again")
        for name in weight_map.values():  # a name, never a path
            known = isinstance(name, str) and (WEIGHTS.fullmatch(name) or GPTQ_WEIGHTS.fullmatch(name))
            if not (known and name.endswith(".safetensors")):
                raise ModelError(f"{folder / indices[0]} is damaged: it names {str(name)[:80]!r} as a file of weights")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise ModelError(f"{shard} is missing, and the index beside it needs it; download the model again")
        return sorted(weight_map), shards
    if not names:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} has only {pickles[0]}, a pickle, which can run code and is never loaded; get this "
                "model in safetensors, or convert it with save_pretrained(safe_serialization=True)"
            )
        raise ModelError(f"{folder} has no weights: {' or '.join(WEIGHT_NAMES)} is expected there")
    if "-of-" in names[0]:
        raise ModelError(f"{folder} has shards but no index (*.safetensors.index.json); download the model again")
    return [], [folder / names[0]]


def weights_held(folder: Path) -> dict[str, list[str]]:
    """What a model's files of weights held, by path in the folder: a digest of the size and of LOOKS places of each.

    A model that was trained further or replaced differs nearly everywhere, and to read all of ten gigabytes would cost
    a start more than it is worth. The quantised codes are compared in full (`quantize.code_hash`)."""
    folder, found = Path(folder), {}
    parts = [folder] if is_language(folder) else [folder / part for part in WEIGHTED_PARTS]
    for shard in (shard for part in parts for shard in find_weights(part)[1]):
        size = shard.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(shard, "rb") as file:
            for number in range(LOOKS):
                file.seek(max(0, size - LOOK) * number // (LOOKS - 1))
                digest.update(file.read(LOOK))
        found[shard.relative_to(folder).as_posix()] = [digest.hexdigest()[:16]]
    return found


def check_index(folder: Path, listed: list[str], found: set[str]) -> None:
    if lost := sorted(set(listed) - found):
        raise ModelError(f"{folder}: the index lists {some(lost)}, which no shard has; download the model again")


def open_shard(path: Path, framework: str):
    """An open safetensors file, only its header read."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ModelError(f"{path} is not a regular file; download the model again")
    try:
        return safe_open(path, framework=framework)
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(11) == b"version htt"
        what = "it is a Git LFS pointer: run `git lfs pull`" if pointer else "it is truncated: download it again"
        raise ModelError(f"{path} is not a complete safetensors file ({error}); {what}") from error


def sides(folder: Path | None) -> tuple[int, ...]:
    """Pixels: pictures' sides must be multiples of the first, a patch, and no more than the second, for which the model
    has places; of a model that is not here yet the first alone is known."""
    if folder is None:
        return (SD3_MULTIPLE,)
    config = Path(folder) / "transformer" / "config.json"
    found = {"pos_embed_max_size": 96, **read_json(config)}  # as the class has it
    for name, most in (("patch_size", 64), ("pos_embed_max_size", 4096)):
        if type(found.get(name)) is not int or not 1 <= found[name] <= most:
            raise ModelError(f"{config} is damaged: its {name} is {found.get(name)!r}")
    multiple = vae_scale(folder) * found["patch_size"]
    return multiple, multiple * found["pos_embed_max_size"]


def resolution(model: str, folder: Path | None) -> str:
    """What pictures of a model are fitted to where nobody says, in a recipe's notation."""
    if model in MODELS:
        return MODELS[model].resolution
    return str(min(512, sides(folder)[1])) if folder else "512"


def vae_scale(folder: Path) -> int:
    """Pixels of a latent."""
    config = Path(folder) / "vae" / "config.json"
    blocks = read_json(config).get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        raise ModelError(f"{config} is damaged: its block_out_channels are {str(blocks)[:80]}")
    return 2 ** (len(blocks) - 1)


def text_length(folder: Path) -> int:
    """T5 tokens of a prompt: what the tokenizer allows, at most the 256 of diffusers' SD3 pipeline."""
    config = Path(folder) / "tokenizer_3" / "tokenizer_config.json"
    found = read_json(config).get("model_max_length", 256)
    if type(found) not in (int, float) or not found >= 1:
        raise ModelError(f"{config} is damaged: its model_max_length is {found!r}")
    return int(min(256, found))


def read_json(path: Path) -> dict:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ModelError(f"{path} is damaged: it is not a regular file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: the model folder is not complete") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ModelError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: it holds a {type(value).__name__} where an object is expected")
    return value


def some(names: list[str], shown: int = 3) -> str:
    """The first of many names, for an error message."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

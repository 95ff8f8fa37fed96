"""What this machine has, and what can run on it. Nothing heavy is imported before it is asked for."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from zo_engine import gpu

GB = 1e9
PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "safetensors", "huggingface_hub",
    "numpy", "pillow", "gradio",
)  # fmt: skip

# What the models of the hub need, from the shapes of their layers. The text encoders (T5-XXL 4.76, CLIP-G
# 0.70, CLIP-L 0.12 billion weights) come first, in the compute precision, and go before the transformer.
TEXT_WEIGHTS = 5.58e9
TRANSFORMERS = {"sd3.5-medium": 1.3 * GB, "sd3.5-large": 4.73 * GB, "sd3.5-large-nf4": 4.73 * GB}  # in NF4
DOWNLOADS = {
    "sd3.5-medium": 16 * GB, "sd3.5-large": 28 * GB, "sd3.5-large-nf4": 12 * GB, "qwen3-0.6b": 1.5 * GB,
    "qwen3-1.7b": 4.1 * GB, "qwen3-4b": 8.1 * GB, "qwen3-8b": 16.4 * GB, "mistral-7b": 14.5 * GB,
    "llama-3.1-8b": 16.1 * GB,
}  # fmt: skip
# Of language models: weights in the blocks' linear layers, which are quantised, and in embeddings, which are not.
LANGUAGE = {
    "qwen3-0.6b": (0.44e9, 0.16e9), "qwen3-1.7b": (1.41e9, 0.31e9), "qwen3-4b": (3.63e9, 0.39e9),
    "qwen3-8b": (6.95e9, 1.24e9), "mistral-7b": (6.98e9, 0.27e9), "llama-3.1-8b": (6.98e9, 1.05e9),
}  # fmt: skip
NF4 = 0.5625  # bytes a weight: four bits, and a scale of four bytes for every 64
# For activations and torch itself. An estimate: they grow with the size of the pictures and of the batch.
ROOM = 2 * GB


def report(runs: Path = Path("runs")) -> dict[str, Any]:
    """Facts about this machine, in plain values that json can write; sizes in bytes. Takes some seconds.

    `runs` is where run folders would go; its disk is the one that is looked at.
    """
    import psutil

    memory = psutil.virtual_memory()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "ram": {"total": memory.total, "free": memory.available},
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _torch(),
        "cards": [
            {"name": c.name, "driver": c.driver, "capability": list(c.capability) if c.capability else None}
            for c in gpu.cards()
        ],
        "hub": _hub(),
    }
    facts["disk"] = {"runs": _disk(runs), "models": _disk(Path(facts["hub"]["cache"]))}
    facts["notes"] = notes(facts)
    facts["can_run"] = can_run(facts)
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk(folder: Path) -> dict[str, Any]:
    """Free bytes where `folder` is, or would be made."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(there).free}


def _torch() -> dict[str, Any]:
    """How torch was built, the devices it sees, and whether 4-bit weights work on each of them."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a system library that its own are linked to is missing
        return {"cuda": None, "devices": [{"name": "cpu", "nf4": f"torch cannot be loaded: {error}"}]}
    devices = [{"name": "cpu", "nf4": _nf4("cpu")}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "title": properties.name,
                "memory": {"total": total, "free": free},
                "capability": [properties.major, properties.minor],
                "nf4": _nf4(f"cuda:{index}"),
            }
        )
    return {"cuda": torch.version.cuda, "hip": torch.version.hip, "devices": devices}


def _nf4(device: str) -> str:
    """Quantise a small matrix and read it back: "works", or what stands in the way."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weights = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
        codes, state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
        error = (dequantize_4bit(codes, state) - weights).abs().max().item()
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as problem:  # the ways in which a native library can be missing
        return str(problem).strip().split("\n")[0]
    # The widest gap between two NF4 levels is 0.304 (from -1 to -0.696), so no error is above half of it.
    return "works" if error <= 0.16 else f"gives wrong numbers (error {error:.2f})"


def _hub() -> dict[str, Any]:
    """Which known models are on this machine, and whether there is a token (never the token itself)."""
    from huggingface_hub import constants, get_token

    from zo_engine.hub import MODELS, ModelError, locate

    here = {}
    for name in MODELS:
        try:
            here[name] = bool(locate(name, download=False))
        except ModelError:
            here[name] = False
    return {"cache": str(constants.HF_HUB_CACHE), "token": get_token() is not None, "models": here}


def notes(facts: dict[str, Any]) -> list[str]:
    """What is wrong or idle, each with what to do about it."""
    torch = facts["packages"]["torch"] or ""
    found = [
        f"4-bit weights do not work on {device['name']}: {device['nf4']}"
        for device in facts["torch"]["devices"]
        if device["nf4"] != "works"
    ]
    if len(facts["torch"]["devices"]) == 1:
        for card in gpu.cards()[:1]:
            if facts["torch"]["cuda"]:
                found.append(
                    f"torch {torch} has CUDA {facts['torch']['cuda']} but does not see the {card.name}: "
                    f"update the driver ({card.driver or 'unknown'}), unless CUDA_VISIBLE_DEVICES hides it"
                )
            else:
                found.append(gpu.advice(card, torch, sys.executable))
        if not facts["cards"] and (other := gpu.others(torch, sys.executable)):
            found.append(other)
    return found


def can_run(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """For each known model: whether it can be trained here, on which device, and why (not)."""
    return [_can_run(name, facts) for name in facts["hub"]["models"]]


def need(model: str, on_gpu: bool) -> float:
    """Bytes of memory that training takes at most, an estimate: of a model of the hub, or of one that lies here.

    Text encoders are held in two bytes a weight on a GPU and in four on a processor, transformers in NF4.
    """
    from zo_engine.hub import find

    if model in TRANSFORMERS:
        return max(TRANSFORMERS[model], TEXT_WEIGHTS * (2 if on_gpu else 4)) + ROOM
    if model in LANGUAGE:
        linear, others = LANGUAGE[model]
        return NF4 * linear + others * (2 if on_gpu else 4) + ROOM
    folder = find(model)
    if folder is None:
        return ROOM
    if not (folder / "model_index.json").exists():  # a language model, most likely
        return sum(f.stat().st_size for f in folder.glob("*.safetensors")) + ROOM
    size = lambda part: sum(f.stat().st_size for f in folder.glob(f"{part}/*.safetensors"))  # noqa: E731
    return max(size("transformer"), size("text_encoder*") * (1 if on_gpu else 2)) + ROOM  # files: two bytes a weight


def _can_run(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    def answer(device: str | None, why: str) -> dict[str, Any]:
        return {"model": name, "device": device, "why": why}

    devices = {device["name"]: device for device in facts["torch"]["devices"] if device["nf4"] == "works"}
    if not devices:
        return answer(None, "4-bit weights work on no device here")
    here, free = facts["hub"]["models"][name], facts["disk"]["models"]["free"]
    if name not in DOWNLOADS:
        return answer("cpu", "on any machine") if here else answer(None, "its files are missing")
    if not here and free < DOWNLOADS[name]:
        return answer(None, f"the download needs {_gb(DOWNLOADS[name])} of disk, {_gb(free)} are free")
    fetch = "" if here else f"after a download of {_gb(DOWNLOADS[name])}; "
    card = max((d for d in devices.values() if "memory" in d), key=lambda d: d["memory"]["total"], default=None)
    short = ""
    if card:
        wanted, there = need(name, on_gpu=True), card["memory"]["total"]
        if there >= wanted:
            return answer(card["name"], f"{fetch}about {_gb(wanted)} of GPU memory at most, {_gb(there)} there")
        short = f"the GPU has {_gb(there)}, about {_gb(wanted)} are needed; "
    wanted, there = need(name, on_gpu=False), facts["ram"]["total"]
    if there >= wanted:
        return answer("cpu", f"{fetch}{short}very slowly, with about {_gb(wanted)} of memory at most")
    return answer(None, f"{short}the processor needs about {_gb(wanted)} of memory, {_gb(there)} there")


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def describe(facts: dict[str, Any]) -> str:
    """The report as text for people."""
    versions = [f"{name} {version or 'missing'}" for name, version in facts["packages"].items()]
    lines = [
        f"python    {facts['python']} on {facts['system']}",
        f"packages  {', '.join(versions[:5])}",
        f"          {', '.join(versions[5:])}",
        f"memory    {_gb(facts['ram']['free'])} free of {_gb(facts['ram']['total'])}; {facts['cores']} cores",
    ]
    for name, disk in facts["disk"].items():
        lines.append(f"disk      {_gb(disk['free'])} free for {name} ({disk['folder']})")
    for device in facts["torch"]["devices"]:
        text = f"device    {device['name']}: 4-bit weights: {device['nf4']}"
        if memory := device.get("memory"):
            capability = ".".join(map(str, device["capability"]))
            text += f"; {device['title']}, compute capability {capability}, "
            text += f"{_gb(memory['free'])} free of {_gb(memory['total'])}"
        lines.append(text)
    for card in facts["cards"]:
        lines.append(f"card      {card['name']}, driver {card['driver'] or 'unknown'}")
    lines.append(f"cuda      {facts['torch']['cuda'] or 'not in this build of torch'}")
    token = "there is a token" if facts["hub"]["token"] else "no token (`hf auth login` for models behind a licence)"
    lines.append(f"hub       {token}")
    lines += ["", *(f"Note: {note}" for note in facts["notes"]), "", "What can run here:"]
    for entry in facts["can_run"]:
        lines.append(f"  {entry['model']:16} {entry['device'] or 'no':8} {entry['why']}")
    return "\n".join(lines).replace("\n\n\n", "\n\n")

"""Memory of a training step of a language model in each format: the model, what a plain forward of the same rows needs,
and what the step needs beside the model. Each format in a process of its own; a CPU's resident memory.

    python benchmarks/formats.py [--width 512] [--blocks 6] [--tokenizer assets/models/tiny-llm]

The model is random: memory does not depend on what its weights are.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import tempfile
from pathlib import Path

import torch
from common import CHECKOUT, save
from transformers import LlamaConfig, LlamaForCausalLM

from assets import pack
from zo_engine import models
from zo_engine import train as training
from zo_engine.recipe import Recipe
from zo_engine.run import Run

FORMATS = {"plain fp32": "none", "int8": "int8", "nf4": "nf4", "gptq 4-bit g64": "gptq", "aqlm 2x8": "aqlm"}
BATCH = 16
METHODS = {
    "gauss-newton": {},  # of the last third of the blocks
    "gain, sgd": {"optimizer": "sgd", "depth": 1.0, "directions": 1},
    "group, sgd": {"optimizer": "sgd", "depth": 1.0, "directions": 1, "space": "group"},
}
MB = 1e6


def build(folder: Path, width: int, blocks: int, tokenizer: Path) -> dict[str, Path]:
    """A random model of Llama's class and its packed copies, by format."""
    words = models.load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=256,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    words.save_pretrained(folder / "plain")
    made = dict.fromkeys(FORMATS, folder / "plain")
    made["gptq 4-bit g64"] = pack.gptq(folder / "plain", folder / "gptq")
    made["aqlm 2x8"] = pack.aqlm(folder / "plain", folder / "aqlm", rounds=0)
    return made


def resident(peak: bool = False) -> float:
    """MB of this process, or the most since `forget`."""
    gc.collect()
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text)[1]) * 1024 / MB


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(format: str, folder: Path, texts: Path, scratch: Path, directions: int, answer) -> None:
    """What one format needs, in MB, sent through a pipe."""
    common = {
        "texts": str(texts),
        "model": str(folder),
        "quantization": FORMATS[format],
        "holdout": 0.25,
        "batch_size": BATCH,
        "rows": BATCH,
        "evaluate_items": 16,
        "preview_every": 0,
        "directions": directions,
    }
    found = {}
    before = resident()
    studio = training.prepare(Recipe(**common), scratch)
    found["resident after loading"] = resident() - before
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(studio.model)}
    found["model"] = sum(tensors.values()) / MB
    batch = studio.task.batch(0, BATCH)
    for _ in ("first", "warm"):
        forget()
        base = resident()
        with torch.no_grad():
            studio.task.losses(batch)
        found["plain forward"] = resident(peak=True) - base
    for name, settings in METHODS.items():
        mine = studio.changed(**settings)
        run = training.Training(Run(scratch / format / name), mine)
        forget()
        base = resident()
        run.step()
        found[f"step: {name}"] = resident(peak=True) - base
        found[f"theta: {name}"] = mine.space.layout.size * 4 / MB
        del run
    answer.send(found)


def _tensors(model: torch.nn.Module):
    yield from (*model.parameters(), *model.buffers())
    for layer in models.quantized_layers(model).values():
        if hasattr(layer, "quant_state"):
            yield layer.quant_state.absmax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--directions", type=int, default=128, help="of each level of a Gauss-Newton step")
    parser.add_argument("--tokenizer", type=Path, default=CHECKOUT / "assets" / "models" / "tiny-llm")
    given = parser.parse_args()
    # what is freed goes back to the system at once, else a peak would hold what is long gone
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    spawn = multiprocessing.get_context("spawn")
    figures, settings = {}, {n: getattr(given, n) for n in ("width", "blocks", "directions")}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        texts = scratch / "texts.jsonl"
        rows = [{"prompt": f"is the {i}th plate of soup warm", "completion": "it is warm"} for i in range(64)]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for format, folder in build(scratch, given.width, given.blocks, given.tokenizer).items():
            ours, theirs = spawn.Pipe(duplex=False)
            child = spawn.Process(
                target=measure, args=(format, folder, texts, scratch / "runs", given.directions, theirs)
            )
            child.start()
            theirs.close()
            figures[format] = {what: round(value, 2) for what, value in ours.recv().items()}
            child.join()
            print(format, json.dumps(figures[format]), flush=True)
    print(save("formats", {**settings, "batch": BATCH, "megabytes": figures}))


if __name__ == "__main__":
    main()

"""Memory of a training step of a language model in each format: is it model, activations of a forward, and theta?

    python benchmarks/formats.py [--width 512] [--blocks 6] [--tokenizer assets/models/tiny-llm]

Formats that the result file has with the same settings are not measured again: remove it to begin anew.

The figures go to results/formats.json, and as a table to results/formats.md.

Counted: the bytes of the model's tensors, of theta, and of a Gauss-Newton step's directions and features. Measured, in
a process of its own for each format: a CPU's resident memory at the peak of a plain forward of ROWS rows, and of a step
of each method in passes of as many rows, above what it was before. "beyond" is what a step took that model, forward,
theta and what its method counts do not explain. The model is random: memory does not depend on what its weights are.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import CHECKOUT, RESULTS, save
from transformers import LlamaConfig, LlamaForCausalLM

from assets import pack
from zo_engine import models
from zo_engine import train as training
from zo_engine.newton import GaussNewton
from zo_engine.recipe import Recipe
from zo_engine.run import Run

GPTQ = {f"gptq {bits}-bit g64": bits for bits in (2, 3, 4, 8)}
AQLM = {"aqlm 2x8": (2, 8), "aqlm 1x16": (1, 16)}
FORMATS = {"plain fp32": "none", "int8": "int8", "nf4": "nf4", "fp4": "fp4"}
FORMATS |= dict.fromkeys(GPTQ, "gptq") | dict.fromkeys(AQLM, "aqlm")
ROWS = 16
METHODS = {
    "gauss-newton": {"batch_size": 4},  # of the last third of the blocks; one example after the other, so few will do
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
    made |= {name: pack.gptq(folder / "plain", folder / name, bits=bits) for name, bits in GPTQ.items()}
    return made | {name: random_aqlm(folder / "plain", folder / name, *shape) for name, shape in AQLM.items()}


def random_aqlm(folder: Path, out: Path, books: int, bits: int) -> Path:
    """An AQLM copy whose codes and codebooks have nothing to do with the weights: to fit 65,536 vectors takes hours."""

    def packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        kind, count = (torch.int8, 2**7) if bits <= 8 else (torch.int16, 2**15)
        return {
            "codes": torch.randint(-count, count, (len(weight), weight.shape[1] // pack.VECTOR, books), dtype=kind),
            "codebooks": torch.randn(books, 2**bits, 1, pack.VECTOR).half(),
            "scales": torch.full((len(weight), 1, 1, 1), 0.02).half(),
        }

    shape = {"in_group_size": pack.VECTOR, "out_group_size": 1, "num_codebooks": books, "nbits_per_codebook": bits}
    return pack.write(folder, out, packed, {"quant_method": "aqlm", **shape})


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
        "batch_size": ROWS,
        "rows": ROWS,
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
    batch = studio.task.batch(0, ROWS)
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
        with recorded(mine.task) as features:
            run.step()
        found[f"step: {name}"] = resident(peak=True) - base
        found[f"theta: {name}"] = mine.space.layout.size * 4 / MB
        found[f"directions and features: {name}"] = counted(run.method, max(features, default=0)) / MB
        explained = ("plain forward", f"theta: {name}", f"directions and features: {name}")
        found[f"beyond: {name}"] = found[f"step: {name}"] - sum(found[part] for part in explained)
        del run
    answer.send(found)


@contextmanager
def recorded(task) -> Iterator[list[int]]:
    """How many numbers the outcomes of one row were, pass by pass."""
    sizes, outcomes = [], task.outcomes

    def outcomes_counted(batch):
        rows = outcomes(batch)
        sizes.append(rows.shape[1])
        return rows

    outcomes_counted.__name__ = outcomes.__name__
    task.outcomes = outcomes_counted
    try:
        yield sizes
    finally:
        del task.outcomes


def counted(method, features: int) -> int:
    """Bytes of what a step's method holds beside theta: its directions; of slopes also the change of theta, of
    Gauss-Newton the outcomes of an example's rows, what they differ by, and the columns they are joined to."""
    element = 1 if method.kind == "rademacher" else 4
    if not isinstance(method, GaussNewton):
        return method.layout.size * (method.per_step * element + 4)
    counts = method.counts(0)
    z = sum(count * part.size for count, part in zip(counts, method.parts, strict=True))
    return z * element + 4 * 3 * sum(counts) * features


def _tensors(model: torch.nn.Module):
    yield from (*model.parameters(), *model.buffers())
    for layer in models.quantized_layers(model).values():
        if hasattr(layer, "quant_state"):
            yield layer.quant_state.absmax
        if hasattr(layer, "init_8bit_state"):
            yield layer.state.SCB


def table(figures: dict[str, dict[str, float]], settings: dict[str, int]) -> str:
    """All formats as Markdown; MB."""
    lines = [
        f"Megabytes of a training step of a language model, {settings['width']} wide, {settings['blocks']} blocks, in "
        f"passes of {settings['rows']} rows: above what the process had before. A step is forward, theta, what its "
        'method counts, and "beyond". Made by benchmarks/formats.py.',
        "",
        "| format | model | plain forward | " + " | ".join(f"{m}: step | counted | beyond" for m in METHODS) + " |",
        "|---|---|---|" + "---|" * (3 * len(METHODS)),
    ]
    for format, found in figures.items():
        cells = [found["model"], found["plain forward"]]
        for m in METHODS:
            held = found[f"theta: {m}"] + found[f"directions and features: {m}"]
            cells += [found[f"step: {m}"], held, found[f"beyond: {m}"]]
        lines.append(f"| {format} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--directions", type=int, default=96, help="of each level of a Gauss-Newton step")
    parser.add_argument("--tokenizer", type=Path, default=CHECKOUT / "assets" / "models" / "tiny-llm")
    given = parser.parse_args()
    # what is freed goes back to the system at once, else a peak would hold what is long gone
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    spawn = multiprocessing.get_context("spawn")
    settings = {n: getattr(given, n) for n in ("width", "blocks", "directions")} | {"rows": ROWS}
    file = RESULTS / "formats.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    figures = before["megabytes"] if settings.items() <= before.items() else {}  # of a run that was broken off
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        texts = scratch / "texts.jsonl"
        rows = [{"prompt": f"is the {i}th plate of soup warm", "completion": "it is warm"} for i in range(64)]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for format, folder in build(scratch, given.width, given.blocks, given.tokenizer).items():
            if format in figures:
                continue
            ours, theirs = spawn.Pipe(duplex=False)
            child = spawn.Process(
                target=measure, args=(format, folder, texts, scratch / "runs", given.directions, theirs)
            )
            child.start()
            theirs.close()
            figures[format] = {what: round(value, 2) for what, value in ours.recv().items()}
            child.join()
            print(format, json.dumps(figures[format]), flush=True)
            save("formats", {**settings, "megabytes": figures})
    (RESULTS / "formats.md").write_text(table(figures, settings))
    print(file)


if __name__ == "__main__":
    main()

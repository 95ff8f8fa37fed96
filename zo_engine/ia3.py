"""A style of row gains as a PEFT adapter of the IA3 kind, where the two are equal.

A gain g multiplies what a layer computes from its input, W x, but not its bias: y = g (W x) + b. IA3 (Liu et al.,
arXiv:2205.05638) as PEFT has it multiplies the whole output of a chosen layer, g (W x + b), or, of a layer that it
calls feed-forward, the input, W (g x). So:

- row gains of a layer without bias are an IA3 vector over its outputs;
- row gains of a layer with bias are not, unless they are all 1; neither are gains of groups of inputs beside row gains,
  since a layer has one vector; alone, they are an IA3 vector over its inputs;
- gains of the norm before the output layer are an IA3 vector over that layer's inputs, if the norm has no bias;
- a PEFT adapter sits on layers of bitsandbytes, GPTQ or torch.nn.Linear: what kind it can load is PEFT's matter.
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from zo_engine.probes import GainSpace, Space
from zo_engine.run import appearing, write_atomic
from zo_engine.scales import NORM
from zo_engine.style import StyleError


def vectors(model: nn.Module, space: Space, theta: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """({layer: its IA3 vector}, the layers whose vector is over inputs). Raises StyleError, naming layers, where the
    style has no equal among IA3's."""
    if not isinstance(space, GainSpace):
        raise StyleError('PEFT\'s IA3 has gains of rows; a style with space "group" or "absolute" has no equal there')
    parts, found, inputs, without = space.layout.split(theta.float()), {}, [], []
    for name, view in space.views.items():
        rows, columns = parts[f"{name}.rows"], parts.get(f"{name}.columns")
        if columns is not None and columns.any():
            if rows.any():
                without.append(f"{name} (rows and columns)")
            found[name] = columns.exp().repeat_interleave(view.block)[None]
            inputs.append(name)
        elif rows.any():
            if view.bias is not None:
                without.append(f"{name} (bias)")
            if view.format is not NORM:
                found[name] = rows.exp()[:, None]
                continue
            reader = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
            if reader in found:
                without.append(f"{name} (as {reader} has gains of its own)")
            found[reader] = rows.exp()[None]
            inputs.append(reader)
    if without:
        listed = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise StyleError(
            f"{len(without)} layers have no equal in IA3: {listed}; export the whole model instead, without --peft"
        )
    if not found:
        raise StyleError("the style moves nothing, so there is no adapter to write")
    return found, inputs


def save_adapter(folder: Path, found: dict[str, Tensor], inputs: list[str], base: str) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT's `save_pretrained` writes them."""
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(found),
        "feedforward_modules": sorted(inputs),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "revision": None,
    }
    tensors = {f"base_model.model.{name}.ia3_l": vector.cpu().contiguous() for name, vector in found.items()}
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def save_to(out: Path, model: nn.Module, space: Space, theta: Tensor, base: str) -> Path:
    """A folder that `peft.PeftModel.from_pretrained(model, out)` loads onto the same quantised base. Raises StyleError
    where `out` exists, or the style has no equal (`vectors`)."""
    found, inputs = vectors(model, space, theta)
    out = Path(out)
    if out.exists():
        raise StyleError(f"{out} exists already; remove it, or choose another name")
    with appearing(out) as work:
        save_adapter(work, found, inputs, base)
    return out

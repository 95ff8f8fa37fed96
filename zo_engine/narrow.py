"""Plain weights that wait, and travel, in fewer bits than they compute in: ZO2's AMP mode (arXiv:2503.12668).

The linear layers of all blocks keep their weight in bf16, or in fp8 (e4m3fn: four bits of mantissa, 448 at most) with a
power of two a row, which brings the row's largest number below 448 and multiplies without rounding in any dtype. Each
is widened while it computes, so slots and host memory hold the narrow form alone; biases and norms, a thousandth, stay
as they are. What rounding takes is lost for the run: it is part of what the model is, wherever its blocks lie.

Measured on tiny-sd3 and tiny-llm, against their fp16 weights (benchmarks/LOG.md, 2026-11-28): bf16 0.17 % of a weight,
root mean square; fp8 2.65 %, with a power of two a row or a tensor; 2.60 % with the row's own largest number as 448,
which would be rounded again in bf16; 2.68 % and 2.66 % without a scale, and much more where weights are small.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FORMS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def narrowed(weight: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """(the weight [out, in] in a form of FORMS, the factor of each row [out, 1], of fp8 only)."""
    if form == "bf16":
        return weight.bfloat16(), None
    wide = weight.float()
    most = wide.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    scale = (most / torch.finfo(FORMS[form]).max).log2().ceil().exp2()
    return (wide / scale).to(FORMS[form]), scale


class NarrowLinear(nn.Linear):
    """y = W x + b, with W widened at each forward, unless a wide one was put in place (see `scales`)."""

    def __init__(self, plain: nn.Linear, weight: Tensor, scale: Tensor | None, dtype: torch.dtype):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias, self.compute_dtype = nn.Parameter(weight, requires_grad=False), plain.bias, dtype
        self.register_buffer("weight_scale", scale)

    def wide(self, weight: Tensor) -> Tensor:
        """The numbers that a weight of this layer stands for, in the dtype that computes."""
        if weight.dtype == self.compute_dtype:
            return weight
        found = weight.to(self.compute_dtype)
        scale = self.weight_scale
        return found if scale is None else found.mul_(scale.to(found.device, found.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.wide(self.weight), self.bias)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The model with plain layers in place of narrow ones, in as much memory as they take: for export."""
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, NarrowLinear)}
    try:
        for name, layer in found.items():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.wide(layer.weight.data), requires_grad=False), layer.bias
            model.set_submodule(name, plain)
        yield
    finally:
        for name, layer in found.items():
            model.set_submodule(name, layer)

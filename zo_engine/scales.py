"""The quantisation scales of a model, whatever its format.

A quantised layer computes `W[r, c] = code[r, c] * scale[r, group(c)]`. Formats differ in where the scale lives; that
difference is one entry of the table FORMATS, and everything else sees a `ScaleView`: an fp32 tensor [out, groups]
that can be read and replaced.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from zo_engine.narrow import NarrowLinear
from zo_engine.packed import AQLMLinear, GPTQLinear


class ScaleError(ValueError):
    """A model whose scales cannot be reached or moved; one sentence."""


@dataclass(frozen=True)
class Format:
    """Where one kind of layer keeps its scale: how to tell the layer, read the live tensor and put another in place."""

    name: str
    matches: Callable[[nn.Module], bool]
    get: Callable[[nn.Module], Tensor]
    put: Callable[[nn.Module, Tensor], None]
    shape: Callable[[nn.Module], tuple[int, int]]  # of the weight: (out_features, in_features)
    block: Callable[[nn.Module], int]  # consecutive weights of the row-major weight that share one scale
    column: Callable[[nn.Module], Tensor | None] = lambda m: None  # [in]: the group of each, if not `block` at a time
    signed: bool = False  # whether a scale may be negative
    shared: bool = False  # numbers of the whole layer, not of its rows: no gain of a row folds into them
    wide: Callable[[nn.Module, Tensor], Tensor] = lambda m, t: t  # the numbers that a live tensor stands for
    added: Callable[[nn.Module], float] = lambda m: 0.0  # to those, before the layer computes with them


def _is_4bit(quant_type: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        return isinstance(module, bnb.nn.Linear4bit) and state is not None and state.quant_type == quant_type

    return matches


def _put_absmax(module: nn.Module, scale: Tensor) -> None:
    module.weight.quant_state.absmax = scale


def _put_scb(module: nn.Module, scale: Tensor) -> None:
    # bitsandbytes moves SCB from the weight to the layer's state at its first forward; write wherever it is now.
    holder = module.state if module.state.SCB is not None else module.weight
    holder.SCB = scale


def _put_weight(module: nn.Module, scale: Tensor) -> None:
    module.weight.data = scale.view(module.weight.shape)


@torch.no_grad()
def _added(norm: nn.Module) -> float:
    """1 for a norm that keeps its numbers less one, as Gemma's do, else 0: what it makes of ones with zeros there."""
    if norm.weight.is_meta:
        return 0.0
    zeros = {name: torch.zeros_like(tensor) for name, tensor in norm.named_parameters()}
    one = torch.linspace(1, 2, len(norm.weight), device=norm.weight.device, dtype=norm.weight.dtype)[None]
    return float(torch.func.functional_call(norm, zeros, one).any())


def _put_scales(module: nn.Module, scale: Tensor) -> None:
    module.scales = scale


def _put_codebooks(module: nn.Module, scale: Tensor) -> None:
    module.codebooks = scale


def _four_bit(name: str) -> Format:
    return Format(
        name,
        _is_4bit(name),
        get=lambda m: m.weight.quant_state.absmax,
        put=_put_absmax,
        shape=lambda m: tuple(m.weight.quant_state.shape),
        block=lambda m: m.weight.quant_state.blocksize,
    )


FORMATS = (
    _four_bit("nf4"),
    _four_bit("fp4"),
    Format(
        "int8",
        lambda m: isinstance(m, bnb.nn.Linear8bitLt),
        get=lambda m: m.state.SCB if m.state.SCB is not None else m.weight.SCB,
        put=_put_scb,
        shape=lambda m: (m.out_features, m.in_features),
        block=lambda m: m.in_features,
    ),
    Format(
        "gptq",
        lambda m: isinstance(m, GPTQLinear),
        get=lambda m: m.scales,
        put=_put_scales,
        shape=lambda m: (m.out_features, m.in_features),
        block=lambda m: m.in_features // m.scales.shape[1],
        column=lambda m: m.group,
    ),
    Format(
        "aqlm",
        lambda m: isinstance(m, AQLMLinear),
        get=lambda m: m.scales,
        put=_put_scales,
        shape=lambda m: (m.out_features, m.in_features),
        block=lambda m: m.in_features,
    ),
    # The other half of an AQLM layer, not moved unless a recipe says so. An entry is shared by all weights of its code:
    # of 2x8 there are 4,096 numbers a layer, of 1x16 half a million.
    Format(
        "codebooks",
        lambda m: isinstance(m, AQLMLinear),
        get=lambda m: m.codebooks,
        put=_put_codebooks,
        shape=lambda m: (m.out_features, m.in_features),
        block=lambda m: m.in_features,
        signed=True,
        shared=True,
    ),
    # A plain layer: every weight is its own scale. In group space with absolute noise this is MeZO.
    Format(
        "dense",
        lambda m: type(m) in (nn.Linear, NarrowLinear),
        get=lambda m: m.weight.data,
        put=_put_weight,
        shape=lambda m: (m.out_features, m.in_features),
        block=lambda m: 1,
        signed=True,
        wide=lambda m, t: m.wide(t) if isinstance(m, NarrowLinear) else t,
    ),
)
# The norm before a language model's output layer (`final_norm`): one number a feature, as of a diagonal matrix.
NORM = Format(
    "norm",
    lambda m: "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None and m.weight.ndim == 1,
    get=lambda m: m.weight.data,
    put=_put_weight,
    shape=lambda m: (len(m.weight), len(m.weight)),
    block=lambda m: len(m.weight),
    signed=True,
    added=_added,
)
QUANTISED = tuple(f.name for f in FORMATS if f.name not in ("dense", "codebooks"))


def formats_of(quantization: str, moves: str = "scales", final_norm: bool = False) -> tuple[str, ...]:
    """The formats in which a model that is loaded in a `quantization` keeps what is tuned. The dense layers of a
    quantised model are not; the norm before its output layer is, with `final_norm`."""
    if moves == "codebooks":
        return ("codebooks",)
    plain = ("dense",) if quantization == "none" else QUANTISED
    return (*plain, NORM.name) if final_norm else plain


class ScaleView:
    """The scale of one layer. `base` is the tensor that was there at first; it is never written to."""

    def __init__(self, name: str, module: nn.Module, format: Format):
        self.name, self.module, self.format = name, module, format
        self.out_features, self.in_features = format.shape(module)
        self.block, self.column = format.block(module), format.column(module)
        self.base, self.added = format.get(module), format.added(module)
        if format.name in ("nf4", "fp4") and module.weight.quant_state.nested:
            raise ScaleError(f"{name}: scales are still double-quantised; load the model through zo_engine.models")
        if self.column is None and self.rowwise and self.groups * self.block != self.in_features:
            raise ScaleError(f"{name}: {self.base.numel()} scales do not cover {self.out_features} rows")

    @property
    def rowwise(self) -> bool:
        """Whether no group of weights straddles two rows, so that a gain per row folds into the scales exactly."""
        return not self.format.shared and (self.column is not None or self.in_features % self.block == 0)

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.base.numel() // self.out_features

    def widened(self, groups: Tensor) -> Tensor:
        """[..., groups] -> [..., in_features]: for every input column the number of its group."""
        if self.column is None:
            return groups.repeat_interleave(self.block, dim=-1)
        return groups.index_select(-1, self.column)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, groups], or flat where a group straddles two rows."""
        return (self.out_features, self.groups) if self.rowwise else (self.base.numel(),)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def live(self) -> Tensor:
        """The very tensor that the layer computes with now."""
        return self.format.get(self.module)

    def numbers(self, tensor: Tensor) -> Tensor:
        """What a live tensor stands for: itself, but for weights that wait in fewer bits (`narrow`), and norms that
        keep their numbers less one."""
        wide = self.format.wide(self.module, tensor)
        return wide.float() + self.added if self.added else wide

    @property
    def dtype(self) -> torch.dtype:
        """Of what is put in place: the base's. Only codebooks, which lie in fp16 until they move, become fp32, that
        small steps are not lost; and a weight that waits in fewer bits is as wide as it computes."""
        if self.format.shared:
            return torch.float32
        return self.module.compute_dtype if isinstance(self.module, NarrowLinear) else self.base.dtype

    def put(self, scale: Tensor) -> None:
        """Make the layer compute with `scale` (any shape of the right size) from its next forward on.

        The new tensor is contiguous and has `dtype`: bitsandbytes misreads anything else in silence. It goes where the
        layer's scale is now: a streamed layer is on the device only while it computes.
        """
        scale = (scale - self.added if self.added else scale).to(self.live.device, self.dtype)
        self.format.put(self.module, scale.contiguous().view(self.base.shape))

    def restore(self) -> None:
        """Put the base back: the very tensor, hence bit for bit."""
        self.format.put(self.module, self.base)


def final_norm(model: nn.Module) -> str:
    """The name of the norm before a language model's output layer: the last one outside of its blocks; "" where there
    is none. All its numbers alike are a temperature, which the layers inside of blocks can only imitate."""
    if not getattr(model, "get_output_embeddings", lambda: None)():
        return ""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outside = ((n, m) for n, m in model.named_modules() if not n.startswith(tuple(lists)))
    return next((name for name, module in reversed(list(outside)) if NORM.matches(module)), "")


def find_scales(model: nn.Module, formats: tuple[str, ...] = QUANTISED) -> dict[str, ScaleView]:
    """Every layer of `model` whose scale we know how to reach, by name, in the model's own order. Not a plain layer
    whose weight is another's too: an output layer that is the embedding would move what the model reads. A final norm
    comes last, wherever the model has it.

    Raises ScaleError when there is none, naming the kinds of layers that were seen.
    """
    table = [f for f in FORMATS if f.name in formats]
    uses = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    views = {}
    for name, module in model.named_modules():
        found = next((f for f in table if f.matches(module)), None)
        if found is not None and (found.name != "dense" or uses[id(module.weight)] == 1):
            views[name] = ScaleView(name, module, found)
    if views and NORM.name in formats and (name := final_norm(model)):
        views[name] = ScaleView(name, model.get_submodule(name), NORM)
    if not views:
        weighted = [m for m in model.modules() if any(hasattr(m, name) for name in ("weight", "qweight", "scales"))]
        seen = sorted({type(m).__name__ for m in weighted})
        raise ScaleError(f"no layer with scales of format {', '.join(formats)}; the layers here are {', '.join(seen)}")
    return views


@torch.no_grad()
def prove_live(views: dict[str, ScaleView]) -> None:
    """Stop with ScaleError if a kind of layer ignores its scale: some kernels cache a copy of it.

    For one layer of each (class, format, rowwise): double the last scale, see the output change, put it back. The last,
    because bitsandbytes 0.50 reads wrong scales where groups straddle rows, on CPUs with AVX512: never the last ones.
    The input rises, since the codes of a group are whole numbers and may cancel out.
    """
    kinds = {(type(v.module), v.format.name, v.rowwise): v for v in views.values()}
    for (kind, format, _), view in kinds.items():
        computed = view.base.dtype if format == "dense" else torch.float32
        dtype = getattr(view.module, "compute_dtype", None) or computed
        x = torch.linspace(1, 2, view.in_features, device=view.base.device, dtype=dtype).expand(2, -1)
        before = view.module(x)
        view.base = view.format.get(view.module)  # a first forward may move it (int8)
        try:
            changed = view.numbers(view.base).clone()
            changed.view(-1)[0 if view.format.shared else -1 :] *= 2  # a code may be used by no weight
            view.put(changed)
            changed = not torch.equal(view.module(x), before)
        finally:
            view.restore()
        if not changed:
            raise ScaleError(
                f"{view.name}: {kind.__module__}.{kind.__name__} ({format}) does not react to a changed scale; "
                "its kernel keeps a copy, so it cannot be fine-tuned"
            )

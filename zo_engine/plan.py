"""What a step will need, before anything is loaded: the step itself, run on tensors without data, under a counter.

A model is built from its config on torch's meta device, in its own classes and with bitsandbytes' own layers, and makes
a step there, of whichever method and space a recipe asks for. Every operation says how large its results are; who holds
them is known, so the sum of what is alive, and its peak, come out as they will on the device. Nothing here has to be
kept in step with the method's code: it is that code which runs.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from bitsandbytes.functional import QuantState
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from zo_engine import dataset, hub, tokens
from zo_engine import recipe as recipes
from zo_engine.blocks import PART, Prefix, Replay, answering, levels, relayed
from zo_engine.cache import encode
from zo_engine.hub import find, is_language, language_config, read_json, text_length
from zo_engine.models import TEXT_PARTS, bring_of
from zo_engine.narrow import FORMS, NarrowLinear
from zo_engine.newton import TRIES, GaussNewton
from zo_engine.offload import ALIGNED, Block, block_names, end_names, piece_rows, tensors
from zo_engine.probes import Evaluations, Probes, Space, evaluate
from zo_engine.quantize import READ, outline, quantization_of
from zo_engine.recipe import Recipe
from zo_engine.style import make_method, make_space, views_of
from zo_engine.tasks.diffusion import Batch as Pictures
from zo_engine.tasks.diffusion import flow_errors
from zo_engine.tasks.text import OWN, token_features, token_losses
from zo_engine.tasks.text import Batch as Texts
from zo_engine.zo import ZO

TOKENS = 4800  # of one pass, where nobody says how many rows: a device computes on them for longer than a block travels
SLOTS = 2
KEPT = 8  # prompts without the trigger, whose pictures by the base are kept
TOGETHER = 16  # pictures that are drawn at once, where memory is not bounded
PROMPTS = 4  # of previews, if not said otherwise


class PlanError(ValueError):
    """A plan that is not possible; one sentence."""


# Counting


class Counter(TorchDispatchMode):
    """Bytes that operations allocate on one kind of device and somebody still holds; what was there before is free.

    bitsandbytes' product writes the weight out in the compute dtype while it lasts, which no result shows: it is added.
    What is allocated while it is `paused` belongs elsewhere. On the meta device, questions that need data are answered
    as a well-behaved run would: finite, and in full length.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.peak, self.paused = kind, 0, False
        self.there: dict[int, StorageWeakRef] = {}  # a reference keeps the address from being given away
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.unswept = 0  # bytes of `alive`, of which some may have been let go

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for storage in self._mine((args, kwargs)):
            if storage._cdata not in self.alive and storage._cdata not in self.there:
                self.there[storage._cdata] = StorageWeakRef(storage)
        found = _answered(operation, args, kwargs) if self.kind == "meta" else None
        if found is None:
            found = operation(*args, **kwargs)
        for storage in self._mine(found):
            if storage._cdata in self.alive or storage._cdata in self.there:
                continue
            if self.paused:
                self.there[storage._cdata] = StorageWeakRef(storage)
            else:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.unswept += storage.nbytes()
        written = 0
        if operation is torch.ops.bitsandbytes.gemm_4bit.default:
            written = math.prod(args[2]) * args[0].element_size()
        if self.unswept + written > self.peak:
            self.peak = max(self.peak, self.bytes + written)
        return found

    @property
    def bytes(self) -> int:
        """Bytes that are held now. To look for what was let go takes as long as an operation: not after each."""
        for key in [key for key, (storage, _) in self.alive.items() if storage.expired()]:
            self.unswept -= self.alive.pop(key)[1]
        return self.unswept

    def _mine(self, tree: Any) -> Iterable[torch.UntypedStorage]:
        """Of every tensor in nested lists, tuples and dictionaries that is on our kind of device."""
        if isinstance(tree, Tensor):
            if tree.device.type == self.kind:
                yield tree.untyped_storage()
        elif isinstance(tree, (list, tuple, dict)):
            for branch in tree.values() if isinstance(tree, dict) else tree:
                yield from self._mine(branch)


def _answered(operation: Any, args: tuple, kwargs: dict) -> Any:
    """What stands in for data, of which a meta tensor has none; None where none is asked for."""
    aten = torch.ops.aten
    if operation is aten._local_scalar_dense.default:
        return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
    if operation is aten._to_copy.default and kwargs.get("device") == torch.device("cpu") and args[0].is_meta:
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


class FusedAttention(TorchFunctionMode):
    """Attention as its fused kernels do it: without a matrix of scores, which torch would make on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(kind: str):
    """A Counter over what runs inside."""
    if kind != "meta":
        with Counter(kind) as counter:
            yield counter
        return
    with FusedAttention(), Counter(kind) as counter:
        yield counter


# A model without weights


def skeleton(
    config: dict, quantization: str = "nf4", dtype: torch.dtype = torch.bfloat16, transport: str = "whole"
) -> nn.Module:
    """The model that a config describes, quantised as quantize.load_quantized would, on the meta device.

    config: of a transformers model (with "model_type") or a diffusers model (with "_class_name"). transport: as there.
    Raises PlanError where the libraries do not know it.
    """
    try:
        with torch.device("meta"):
            if "model_type" in config:
                settings = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
                known = transformers.AutoConfig.for_model(**settings)
                model = transformers.AutoModelForCausalLM.from_config(known, dtype=dtype)
                model.tie_weights()
            else:
                cls = getattr(diffusers, config["_class_name"])
                model = cls.from_config({k: v for k, v in config.items() if k != "quantization_config"}).to(dtype)
    except (ValueError, KeyError, AttributeError) as error:
        raise PlanError(f"this config is not that of a model which the libraries here know: {error}") from error
    kept = get_keys_to_not_convert(model) if isinstance(model, transformers.PreTrainedModel) else []
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and should_convert_module(n, kept)}
    if transport != "whole":
        blocks = tuple(f"{block}." for block in block_names(model))
        quantization, linears = transport, {n: m for n, m in linears.items() if n.startswith(blocks)}
    for name, linear in linears.items() if quantization != "none" else ():
        model.set_submodule(name, _empty_layer(linear, quantization, dtype))
    return model.eval().requires_grad_(False)


def outlined(part: Path, quantization: str, dtype: torch.dtype, transport: str = "whole") -> nn.Module:
    """The model of a folder, as `skeleton`; of GPTQ and AQLM, whose layers are as the folder has them, by the headers
    of its files. Raises ModelError where those do not fit."""
    if quantization in READ:
        return outline(part, quantization, dtype)
    return skeleton(read_json(part / "config.json"), quantization, dtype, transport)


def _empty_layer(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> nn.Module:
    shape, count, meta = (linear.out_features, linear.in_features), linear.weight.numel(), {"device": "meta"}
    if quantization in FORMS:
        scales = torch.empty(shape[0], 1, **meta) if quantization == "fp8" else None
        return NarrowLinear(linear, torch.empty(shape, dtype=FORMS[quantization], **meta), scales, dtype)
    if quantization == "int8":
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], linear.bias is not None, False, 0.0, device="meta")
        codes, scales = torch.empty(shape, dtype=torch.int8, **meta), torch.empty(shape[0], **meta)
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        layer.init_8bit_state()
    else:
        layer = bnb.nn.Linear4bit(
            shape[1], shape[0], linear.bias is not None, dtype, False, quantization, device="meta"
        )  # fmt: skip
        scales = torch.empty(math.ceil(count / 64), **meta)
        state = QuantState(scales, torch.Size(shape), torch.empty(16, **meta), 64, quantization, dtype)
        codes = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, **meta)
        layer.weight = bnb.nn.Params4bit(
            codes, quant_state=state, compress_statistics=False, quant_type=quantization, module=layer,
            bnb_quantized=True,
        )  # fmt: skip
        layer.quant_state, layer.support_avx512bf16_for_cpu = state, False
    layer.bias = linear.bias
    return layer


# A step without data


@dataclass(frozen=True)
class Work:
    """What a step is to do. size: (width, height) in pixels of pictures; length: tokens of texts, or of captions.
    trial: examples that a Gauss-Newton step tries its moves on; 0: as many as it learns from.
    directions: of every level in a Gauss-Newton step, else as `Recipe.directions`; 0: the method's own, and of
    Gauss-Newton those of the last of a default recipe's steps. The rest are settings of a recipe."""

    batch: int
    length: int
    size: tuple[int, int] | None = None
    depth: float = 0.34
    directions: int = 0
    dtype: torch.dtype = torch.bfloat16
    space: str = "gain"
    optimizer: str = "gauss-newton"
    columns: bool = False
    noise: str = "rademacher"
    layers: tuple[str, ...] = ()
    final_norm: bool = False
    trial: int = 0

    @property
    def tried(self) -> int:
        return self.trial or self.batch

    @classmethod
    def of(
        cls, recipe: Recipe, length: int, size: tuple[int, int] | None, dtype: torch.dtype, examples: int = 0
    ) -> "Work":
        """What the largest step of a run will do; examples: how many there are to learn, if that is known."""
        last = recipe.steps - 1
        count = recipe.directions_at(last) if recipe.optimizer == "gauss-newton" else recipe.directions
        how = recipe.space, recipe.optimizer, recipe.columns, recipe.noise, recipe.layers, recipe.tunes_norm
        tried = recipe.tried_at(recipe.steps, examples)  # on the batch of the step that would come next
        return cls(recipe.batch_at(last, examples), length, size, recipe.depth, count, dtype, *how, tried)

    def method(self, model: nn.Module, device: str = "meta", streams: bool = False) -> tuple[Space, GaussNewton | ZO]:
        """The space and the method of a run on the model, as training makes them; streams: if blocks of it do."""
        count = self.directions
        if self.optimizer == "gauss-newton":
            count = count or Recipe().directions_at(Recipe().steps - 1)
        recipe = Recipe(
            batch_size=self.batch, depth=self.depth, directions=count, space=self.space, optimizer=self.optimizer,
            columns=self.columns, noise=self.noise, layers=self.layers,
            final_norm="tuned" if self.final_norm else "frozen", quantization=quantization_of(model),
        )  # fmt: skip
        bring = (bring_of(model) or Tensor.clone) if streams else None
        space = make_space(views_of(model, recipe), recipe, bring)
        return space, make_method(space, recipe, device)  # without data, home is no other place

    def tokens(self, model: nn.Module) -> int:
        """Of one row."""
        if self.size is None:
            return self.length
        return self.size[0] * self.size[1] // (8 * model.config.patch_size) ** 2 + self.length


def task(model: nn.Module, work: Work, device: str = "meta") -> tuple[Any, Callable, Callable]:
    """(batch of the examples, losses and features of part of it, its losses), zeros as data."""
    count, config = work.batch, model.config
    make = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
    if work.size is None:
        tokens, rivals = (torch.zeros(count, work.length, *more, dtype=torch.int64) for more in ((), (0,)))
        return (
            Texts(tokens, tokens + 1, tokens, rivals).to(device),
            lambda b: token_features(model, b),
            lambda b: token_losses(model, b),
        )
    latents = make(count, config.in_channels, work.size[1] // 8, work.size[0] // 8)
    prompt = make(count, work.length, config.joint_attention_dim)
    batch = Pictures(latents, latents, make(count), prompt, make(count, config.pooled_projection_dim), make(count) + 1)
    errors = lambda b: flow_errors(model, b, work.dtype)  # noqa: E731
    losses = lambda b: errors(b).square().sum(1)  # noqa: E731
    outcomes = lambda b: torch.cat([(e := errors(b)).square().sum(1, keepdim=True), e], 1)  # noqa: E731
    return batch, outcomes, losses


@torch.no_grad()
def step(
    model: nn.Module, work: Work, rows: int, device: str = "meta", relay: int = 0, short: bool = True,
    streams: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """(peak of the bytes that a step allocates, bytes of theta and of the averages that the method keeps of it), on the
    device; where blocks stream (`streams`) and theta is as large as the scales, it waits and moves elsewhere.

    rows: of one pass. relay: so many first blocks serve all passes in turn. short: with two examples (the third would
    need no more) and, in each evaluation, two passes through two blocks: what they leave is of full size.
    """
    space, method = work.method(model, device, streams)
    away = space.bring is not None
    kept = 0 if away else sum(tensor.nbytes for tensor in method.state()[0].values())
    blocks = [model.get_submodule(name) for name in block_names(model)]
    prefixes = [Prefix(model, level) if level.first else None for level in levels(space.views, work.depth)]
    with counted(device) as counter:
        batch, outcomes, losses = task(model, work, device)
        given = batch, task(model, dataclasses.replace(work, batch=work.tried), device)[0]
        parts, trials = ([some] if isinstance(method, ZO) else some.parts() for some in given)
        how = (_prefix, partial(_passes, blocks=blocks)) if short else (Prefix.run, evaluate)
        run = Evaluations(space, method.theta, prefixes, rows, blocks[:relay], *how)
        counter.paused = away

        def evaluated(part: int, probes: Probes, fresh: bool) -> Tensor:
            counter.paused = False
            try:
                read = losses if fresh or isinstance(method, ZO) else outcomes
                return run(read, trials if fresh else parts, probes, part)
            finally:
                counter.paused = away

        if isinstance(method, ZO):
            method.advance(lambda p, fresh: evaluated(-1, p, fresh).cpu(), work.batch, work.space == "gain")
        else:

            def answered(part: int, probes: Probes, fresh: bool) -> Tensor:
                found = evaluated(part, probes, fresh)
                return found[:, None] if fresh else found

            method.advance(answered, min(2, work.batch) if short else work.batch, work.tried)
    return counter.peak, kept


def _prefix(prefix: Prefix, sample: Callable, count: int, rows: int, relay: Sequence[nn.Module]) -> Replay:
    """As `Prefix.run`, for one piece through the first and the last block: those between answer in the same form."""
    index = torch.arange(min(rows, count))
    states = relayed(prefix.blocks[:1], [lambda: sample(index)])
    if len(prefix.blocks) > 1:
        states = relayed(prefix.blocks, [lambda: sample(index)], states, len(prefix.blocks) - 1)
    state = states[0]
    return Replay(prefix.blocks, _grown(state, count))


def _passes(
    space: Space, theta: Tensor, probes: Probes, sample: Callable, rows: int, replay: Replay | None,
    relay: Sequence[nn.Module], blocks: list[nn.Module],
) -> Tensor:  # fmt: skip
    """As `evaluate`, with two passes, and in each the first and the last of the blocks that are to compute."""
    total, done = len(probes.sign), len(replay.blocks) if replay else 0
    length = -(-total // math.ceil(total / rows))  # as `evaluate` splits them
    part = probes.rows(torch.arange(length))
    relaying = len(relay) > done and length < total
    result, others, state, held, waiting = None, [], None, None, None

    def call() -> Tensor:
        with space.dressed(theta, part):
            return sample(part.sample)

    for _ in range(2 if length < total else 1):  # the second with what the others gave, which is held until the end
        result = state = held = None
        state = held = replay.rows(part.sample) if replay else None  # held until the pass ends, where it is no relay
        skipped = blocks[:done]
        if relaying:  # states of the other passes: as they came, or as the block left them
            held, waiting = None, _grown(state, total - length) if waiting is None else waiting
        if len(blocks) > done + 1:
            (state,) = relayed(blocks[: done + 1], [call], [state], done)
            skipped = blocks[:-1]
            waiting = _grown(state, total - length) if relaying else None
        with answering(skipped, state):
            result = call()
        others = [_grown(result, total - length)] if length < total else []
    del held, waiting
    return torch.cat([*others, result])


def _grown(state: Any, count: int) -> Any:
    """Outputs of the same form, of `count` rows."""
    if isinstance(state, Tensor):
        return state.new_empty((count, *state.shape[1:]))
    return None if state is None else type(state)(_grown(part, count) for part in state)


# The plan


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Plan:
    """What a step needs, in bytes; `away` of `blocks` blocks stream through `slots`, `rows` rows a pass."""

    rows: int
    blocks: int
    away: int
    slots: int
    tier: str  # "resident", "cpu" or "disk"; from a disk, one visit of a block serves all passes (`blocks.relayed`)
    weights: int  # of the whole model
    resident: int  # of them, on the device all the time
    streaming: int  # the slots
    working: int  # everything that a step allocates, at its peak
    host: int  # blocks that wait in memory
    disk: int  # or in files
    moved: int  # to the device in the first step
    ends: int = 0  # embedding and output layer, where they wait with the blocks
    held: int = 0  # of the blocks away, where the tier is a disk: those that wait in memory nevertheless
    theta: int = 0  # of `working`: theta, and the averages that an optimizer keeps of it
    home: int = 0  # of `host`: the same, where it waits with the blocks
    operations: int = 0  # of a step's products, where it was asked
    phases: dict[str, int] = field(default_factory=dict)  # peak of the device's memory in each, where it was asked

    @property
    def device(self) -> int:
        """Peak of the device's memory in a step."""
        return self.resident + self.streaming + self.working

    @property
    def peak(self) -> int:
        """And in the whole run, as far as phases are known."""
        return max(self.device, *self.phases.values(), 0)

    def said(self) -> str:
        """In one line."""
        where = {"resident": "all blocks stay on the device", "cpu": "from host memory", "disk": "from disk"}[self.tier]
        if self.tier != "resident":
            where = f"{self.away} of {self.blocks} blocks stream {where} through {self.slots} slots"
            where += f", {self.held} of them from host memory" if self.held else ""
            where += ", the output layer too, and the embedding waits there" if self.ends else ""
            where += f", theta ({amount(self.home)}) waits in host memory" if self.home else ""
        theta = f" (theta is {amount(self.theta)} of it)" if 20 * self.theta > self.device else ""
        return (
            f"{amount(self.device)} of the device: weights {amount(self.resident + self.streaming)}, a step "
            f"{amount(self.working)}{theta}; {where}, {self.rows} rows a pass, {amount(self.moved)} moved a step"
        )

    def said_of_phases(self) -> str:
        """In one line: what each phase of a run needs, the largest named; nothing where that was not asked."""
        if not self.phases:
            return ""
        largest = max(self.phases, key=self.phases.__getitem__)
        card = "; encoders that do not fit a card stream, or T5 is quantised" if largest == "captions" else ""
        each = ", ".join(f"{name} {amount(size)}" for name, size in self.phases.items())
        return f"largest phase of a run: {largest}, {amount(self.phases[largest])} ({each}){card}"


def sizes(model: nn.Module) -> tuple[int, list[int]]:
    """(bytes of all weights, bytes of each block as it lies in a slot)."""
    whole = sum(place.home.nbytes for place in tensors(model))
    return whole, [
        Block(name, module := model.get_submodule(name), tensors(module)).size for name in block_names(model)
    ]


def end_sizes(model: nn.Module) -> tuple[int, list[int]]:
    """(bytes of the embedding and the output layer, bytes of each piece of the latter as it lies in a slot)."""
    ends = [model.get_submodule(name) for name in end_names(model)]
    weights = {id(end.weight): end.weight.nbytes for end in ends}  # once, if tied
    heads = [end for end in ends if isinstance(end, nn.Linear)]
    rows = [(b - a) * head.in_features * head.weight.itemsize for head in heads for a, b in piece_rows(head)]
    return sum(weights.values()), [-(-size // ALIGNED) * ALIGNED for size in rows]


def make(
    model: nn.Module, work: Work, rows: int, away: int = 0, tier: str = "cpu", slots: int = SLOTS, ends: bool = False,
    working: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a model (of `skeleton`) whose first `away` blocks stream, and its ends too if asked. working: what a
    step allocates, where a plan of the same model and work has found that out (not from a disk)."""
    return next(plans(model, work, rows, [(away, ends)], tier, slots, working))


def plans(
    model: nn.Module, work: Work, rows: int, aways: Iterable[tuple[int, bool]], tier: str = "cpu", slots: int = SLOTS,
    known: int | None = None, host: int = 0,
) -> Iterator[Plan]:  # fmt: skip
    """One plan for each (number of blocks away, whether the ends are). host: bytes of memory in which the last of the
    blocks away wait, where the tier is a disk."""
    whole, blocks = sizes(model)
    outside, pieces = end_sizes(model)
    relay = tier == "disk"
    working = {} if known is None else dict.fromkeys([(0, False), (0, True)], known)
    theta = sum(tensor.nbytes for tensor in work.method(model)[1].state()[0].values())
    for away, ends in aways:
        kept = [n for n in range(away + 1) if relay and sum(blocks[away - n : away]) <= host]
        held = max(kept, default=0)
        shared, home = away - held if relay else 0, (away > 0 or ends) and work.space != "gain"
        if (shared, home) not in working:
            working[shared, home] = sum(step(model, work, rows, relay=shared, streams=home))
        streamed, waiting = blocks[:away], outside if ends else 0
        through = [*streamed, *(pieces if ends else [])]
        through_slots = min(slots, len(through))
        room = through_slots * max(through, default=0)
        yield Plan(
            rows=rows,
            blocks=len(blocks),
            away=away,
            slots=through_slots,
            tier=tier if away or waiting else "resident",
            weights=whole,
            resident=whole - sum(streamed) - waiting,
            streaming=room,
            working=working[shared, home],
            host=(room + sum(streamed[shared:]) if relay else sum(streamed) + waiting) + (theta if home else 0),
            disk=sum(streamed[:shared]) + waiting if relay else 0,
            moved=_moved(model, work, rows, blocks, away, through_slots, shared, sum(pieces) if ends else 0)
            + (_brought(model, work, rows) if home else 0),
            held=held,
            ends=waiting,
            theta=0 if home else theta,
            home=theta if home else 0,
        )


def _evaluations(model: nn.Module, work: Work) -> list[tuple[int, int, list[int]]]:
    """Of every evaluation of a step: the blocks before it, run once for so many examples, and the rows of its parts,
    each of which begins anew."""
    space, method = work.method(model)
    first = [level.first for level in levels(space.views, work.depth)]
    if isinstance(method, ZO):
        probes = 2 * method.per_step * (1 if work.space == "gain" else work.batch)
        return [(first[-1], work.batch, [count]) for count in (probes, 3 * work.batch)]  # and a search
    parts, trials = ([min(PART, n - start) for start in range(0, n, PART)] for n in (work.batch, work.tried))
    found = [(s, part, [n + 1] * part) for part in parts for s, n in zip(first, method.counts(0), strict=True)]
    return found + [(first[-1], part, [(len(TRIES) + 1) * part]) for part in trials]


def _moved(
    model: nn.Module, work: Work, rows: int, blocks: list[int], away: int, slots: int, relay: int, head: int
) -> int:
    """Bytes to the device in a step: each pass brings the streamed blocks that it computes, or the first does, where
    they find room in the slots or are among the `relay` first; and the output layer, if that waits as well."""

    def brought(first: int, last: int, count: int) -> int:
        few = last - first <= slots and not head
        passes = math.ceil(count / rows)
        return sum(size * (1 if few or n < relay else passes) for n, size in enumerate(blocks[:last]) if n >= first)

    total = 0
    for start, examples, counts in _evaluations(model, work):
        first = min(start, away)
        total += brought(0, first, examples)
        total += sum(brought(first, away, count) + math.ceil(count / rows) * head for count in counts)
    return total


def _brought(model: nn.Module, work: Work, rows: int) -> int:
    """Bytes of theta and of directions to the device in a step, where they wait at home: theta in every pass, and what
    moves it once for each run of rows that share a probe."""
    space, method = work.method(model)
    size, total = space.layout.size, 0
    one = {"rademacher": 1, "gaussian": 4}[work.noise]
    for _, _, (count,) in _evaluations(model, work):
        search = count == 3 * work.batch  # the middle third stands still, and the others move in fp32
        passes = torch.arange(count).tensor_split(math.ceil(count / rows))
        runs = [len({row // work.batch for row in part.tolist()} - ({1} if search else set())) for part in passes]
        total += size * (4 * len(passes) + (4 if search else one) * sum(runs))
    return total


@torch.no_grad()
def operations(model: nn.Module, work: Work) -> int:
    """Floating-point operations of a step's products, of matrices and of attention: two for each multiplication."""

    def product(a: Any, b: Any, shape: Any, *args: Any, out_shape: Any = None, **how: Any) -> int:
        return 2 * math.prod(a) * shape[0]  # of activations [..., in] with a 4-bit weight [out, in]

    known = {torch.ops.bitsandbytes.gemm_4bit: product}
    batch, _, losses = task(model, dataclasses.replace(work, batch=1))
    with Counter("meta"), FlopCounterMode(display=False, custom_mapping=known) as counter:  # the first answers for data
        losses(batch)
    found = {name.partition(".")[2]: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    blocks = [found.get(name, 0) for name in block_names(model)]
    outside = counter.get_total_flops() - sum(blocks)
    return sum(
        examples * (sum(blocks[:start]) + (outside if start else 0)) + sum(counts) * (outside + sum(blocks[start:]))
        for start, examples, counts in _evaluations(model, work)
    )


@torch.no_grad()
def rates(device: torch.device, dtype: torch.dtype, side: int = 2048) -> tuple[float, float]:
    """(operations a second of a product of two matrices, bytes a second from host memory), measured on the device."""
    square = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(4 * side * side, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros_like(source, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def fastest(run: Callable[[], object]) -> float:
        spent = []
        for _ in range(4):  # the first warms up
            wait()
            began = time.perf_counter()
            run()
            wait()
            spent.append(time.perf_counter() - began)
        return min(spent)

    return 2 * side**3 / fastest(lambda: square @ square), len(source) / fastest(lambda: target.copy_(source))


def seconds(made: Plan, speed: tuple[float, float]) -> float:
    """What a step takes at least: its operations, or its bytes, whichever takes longer, since they overlap. speed: of
    `rates`. Dequantisation, small kernels and a disk come on top."""
    return max(made.operations / speed[0], made.moved / speed[1])


def fitting(
    model: nn.Module, work: Work, memory: int, rows: int = 0, tier: str = "cpu", slots: int = SLOTS, host: int = 0
) -> Plan:
    """The plan for a device of so many bytes: as many blocks stay as fit (tier "resident": all), with rows as wanted;
    where it is too much even so, a language model's ends go as well, and then rows become fewer. host: as in `plans`.
    Raises PlanError where nothing fits."""
    blocks = len(block_names(model))
    rows = rows or max(1, TOKENS // work.tokens(model))
    aways = [(away, False) for away in range(1 if tier == "resident" else blocks + 1)]
    if tier != "resident" and end_sizes(model)[0]:
        aways += [(away, True) for away in range(blocks + 1)]
    while True:
        best = None
        for plan in plans(model, work, rows, aways, tier, slots, host=host):
            if plan.device <= memory:
                return plan
            best = plan if best is None or plan.device < best.device else best
        if rows == 1:
            raise PlanError(
                f"{memory / 1e9:.2f} GB are not enough: with one row a pass and {best.away} of {blocks} blocks "
                f"streamed a step needs {best.device / 1e9:.2f} GB; lower batch_size, directions, depth or resolution"
            )
        rows //= 2


# The other phases of a run


def beside(part: Path) -> dict[str, dict]:
    """The configs of what stands beside a transformer in its pipeline: autoencoder and text encoders, by their names;
    nothing beside a language model."""
    names = ("vae", *TEXT_PARTS) if part.name == "transformer" else ()
    return {name: read_json(part.parent / name / "config.json") for name in names}


@torch.no_grad()
def phased(
    made: Plan, model: nn.Module, work: Work, parts: dict[str, dict], recipe: Recipe, memory: int = 0, length: int = 0,
) -> Plan:  # fmt: skip
    """The plan with the peaks of all phases of a run: encoding, the held-out loss, looking at it, and the steps.

    parts: of `beside`. memory: of the device, in bytes, where the recipe bounds it. length: tokens of a text for its
    time, if not the longest's, which decide on memory. Every phase is run without data, as the step is; workspaces that
    kernels take for themselves are not known.
    """
    space, _ = work.method(model)
    there = made.resident + made.streaming + made.theta
    away = tuple(f"{name}." for name in block_names(model)[: made.away])
    # Folded scales stand beside the base's own; those of blocks that stream are at home.
    folded = there + _folded(space, away, made.slots)
    found, prompts = {}, len(recipe.prompts) or PROMPTS
    if parts:
        encoders = {name: _part(cls, parts[name], work.dtype) for name, (cls, _) in TEXT_PARTS.items()}
        streamed = made.tier != "resident" or 0 < memory < _held(encoders, False)
        found["captions"] = _held(encoders, streamed) + _peak(lambda: _encoded(encoders, work.length))
        vae = _part(AutoencoderKL, parts["vae"], torch.float32)
        shape = 1, 3, work.size[1], work.size[0]
        found["pictures"] = _weights(vae) + _peak(lambda: encode(vae, torch.empty(shape, device="meta")))
        count = together(made.rows, bool(memory))
        if recipe.prior:
            found["the base's answers"] = there + _peak(lambda: _passed(model, work, 2 * min(KEPT, count)))
        pictures = min(count, prompts)
        vae.to(work.dtype)
        if memory:  # as `models.drawing`
            vae.enable_slicing()
        latents = torch.empty(pictures, *_latents(model, work), dtype=work.dtype, device="meta")
        drawing = _peak(lambda: _passed(model, work, 2 * pictures)), _peak(lambda: vae.decode(latents))
        found["previews"] = folded + _weights(vae) + max(drawing)
    elif recipe.texts or recipe.task:  # as long as prompts may be
        if recipe.keeps_texts:
            rows = made.rows if memory else recipe.rows or OWN
            found["the base's own texts"] = folded + _peak(lambda: _written(model, min(OWN, rows), tokens.OWN_TOKENS))
        found["answers"] = folded + _peak(lambda: _written(model, prompts, work.length))
    found["the held-out loss"] = folded + _peak(lambda: _passed(model, work, recipe.evaluate_items, made.rows))
    timed = operations(model, dataclasses.replace(work, length=length or work.length))
    return dataclasses.replace(made, operations=timed, phases=found | {"steps": made.device})


def _folded(space: Space, away: tuple[str, ...], slots: int) -> int:
    """Bytes of the device that scales which theta is written into take beside the base's: not those of blocks that are
    `away`, whose base is at home, but where what is put in place is wider than its room in the slot."""
    total, wider = 0, dict.fromkeys(away, 0)
    for name, view in space.views.items():
        size = view.base.numel() * view.dtype.itemsize
        block = next((block for block in away if name.startswith(block)), None)
        if block is None:
            total += size
        elif view.dtype != view.base.dtype:
            wider[block] += size
    return total + min(slots, len(away)) * max(wider.values(), default=0)


def together(rows: int, bounded: bool) -> int:
    """Pictures that are drawn at once, memory bounded or not: with guidance, a picture is two rows of a pass."""
    return max(1, rows // 2) if bounded else TOGETHER


def _peak(run: Callable[[], object]) -> int:
    """Bytes that a call allocates at its peak, on the meta device."""
    with counted("meta") as counter:
        run()
    return counter.peak


def _passed(model: nn.Module, work: Work, items: int, rows: int = 0) -> None:
    """Losses of so many examples, or of the first rows of them."""
    batch, _, losses = task(model, dataclasses.replace(work, batch=items))
    losses(batch.take(torch.arange(min(rows, items))) if rows else batch)


def _written(model: nn.Module, rows: int, length: int) -> None:
    """A pass that leaves what the next tokens need of those before them."""
    model(input_ids=torch.zeros(rows, length, dtype=torch.int64, device="meta"), use_cache=True, logits_to_keep=1)


def _latents(model: nn.Module, work: Work) -> tuple[int, int, int]:
    return model.config.in_channels, work.size[1] // 8, work.size[0] // 8


def _part(cls: type, config: dict, dtype: torch.dtype) -> nn.Module:
    """A part of a pipeline without weights."""
    settings = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    with torch.device("meta"):
        made = cls.from_config(settings) if cls is AutoencoderKL else cls(cls.config_class(**settings))
    return made.to(dtype).eval().requires_grad_(False)


def _weights(model: nn.Module) -> int:
    return sum(place.home.nbytes for place in tensors(model))


def _held(encoders: dict[str, nn.Module], streamed: bool) -> int:
    """Bytes of the text encoders; or of what stays of them on the device, and of the slots, if their blocks stream."""
    total = 0
    for encoder in encoders.values():
        whole, blocks = sizes(encoder)
        total += whole - sum(blocks) + min(SLOTS, len(blocks)) * max(blocks) if streamed else whole
    return total


def _encoded(encoders: dict[str, nn.Module], length: int) -> None:
    """One caption of so many tokens, read by all of them: T5 reads those that stand behind the CLIPs' own."""
    own = encoders["text_encoder"].config.max_position_embeddings
    for encoder in encoders.values():
        places = getattr(encoder.config, "max_position_embeddings", max(1, length - own))
        encoder(torch.zeros(1, places, dtype=torch.int64, device="meta"))


def parse_memory(text: str) -> int:
    """ "6GB", "512 MB" or "1.5GiB" in bytes. Raises PlanError for anything else."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30}
    compact = text.replace(" ", "").upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if compact.endswith(u)), None)
    try:
        size = float(compact[: -len(unit)]) * units[unit]
    except (TypeError, ValueError):
        size = 0.0
    if not (0 < size < math.inf):
        raise PlanError(f"memory must be an amount such as 6GB or 800MB, not {text!r}")
    return int(size)


# Published shapes, from the config.json of each repository on the hub


def _opt(hidden: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048,
    }  # fmt: skip


def _decoder(kind: str, hidden: int, layers: int, heads: int, keys: int, inner: int, words: int, **more) -> dict:
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "intermediate_size": inner, "vocab_size": words, "tie_word_embeddings": False,
        **more,
    }  # fmt: skip


SHAPES = {
    # stabilityai/stable-diffusion-3.5-large, transformer/config.json
    "sd3.5-large": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38,
        "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192, "qk_norm": "rms_norm", "dual_attention_layers": [],
    },
    # facebook/opt-*, config.json; OPT 175B: Zhang et al., arXiv:2205.01068, table 1
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    # meta-llama/Llama-3.1-8B, meta-llama/Llama-2-13b-hf, Qwen/Qwen3-32B, config.json
    "llama-3.1-8b": _decoder("llama", 4096, 32, 32, 8, 14336, 128256, max_position_embeddings=131072),
    "llama-2-13b": _decoder("llama", 5120, 40, 40, 40, 13824, 32000, max_position_embeddings=4096),
    "qwen3-32b": _decoder("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128, max_position_embeddings=40960),
}  # fmt: skip

# What stands beside a transformer, from the same repository
BESIDE = {
    "sd3.5-large": {
        "vae": {
            "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 16,
            "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5305,
            "sample_size": 1024,
        },
        "text_encoder": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77,
        },
        "text_encoder_2": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "projection_dim": 1280, "vocab_size": 49408, "max_position_embeddings": 77,
        },
        "text_encoder_3": {
            "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
        },
    },
}  # fmt: skip


def of(
    source: str, memory: str = "", offload: str = "cpu", *, resolution: int | None = None, length: int = 0,
    batch_size: int = 16, rows: int = 0,
) -> Plan:  # fmt: skip
    """The plan of a recipe file (its own settings count), a model on this machine, or one of SHAPES.

    Texts of a recipe are read, with the model's tokenizer, where the model is here: the longest decides on memory, the
    mean on time. Raises PlanError, or what a recipe, its texts or a model raise, for what is not there.
    """
    recipe = recipes.budgeted(recipes.load(Path(source))) if source.endswith(".toml") else None
    name = recipe.model if recipe else source
    folder = find(name)
    if folder is None and name not in SHAPES:
        raise PlanError(
            f"{name} is not on this machine, so its config cannot be read; download it, or choose one of the shapes "
            f"that are known without: {', '.join(SHAPES)}"
        )
    part = folder / "transformer" if folder and not is_language(folder) else folder
    config = language_config(part) if part else SHAPES[name]
    pictures = "_class_name" in config
    length = length or ((77 + text_length(folder) if folder else 333) if pictures else 512)
    size = None
    if pictures:
        named = (recipe and recipe.resolution) or (str(resolution) if resolution else hub.resolution(name, folder))
        size = max(dataset.sizes(named, *hub.sides(folder)), key=math.prod)
    work, examples, mean = Work(batch_size, length, size), 0, 0
    if recipe:
        if folder and recipe.texts and not recipe.task:
            found = tokens.read(recipe, folder)
            length, mean, count = found.longest, found.mean, len(found.rendered.examples)
            examples = count - dataset.held_out(count, recipe.holdout)
        elif not pictures:
            length = recipe.length
        work = Work.of(recipe, length, size, work.dtype, examples)
        memory, rows = memory or recipe.memory, rows or recipe.rows
        offload = offload if recipe.offload == "auto" else recipe.offload
    said = (config.get("quantization_config") or {}).get("quant_method")
    how = recipe.quantization if recipe else said if said in READ else "nf4"
    if part:
        model = outlined(part, how, work.dtype, recipe.transport if recipe else "whole")
    else:
        model = skeleton(config, how, work.dtype, recipe.transport if recipe else "whole")
    bound = parse_memory(memory) if memory and memory != "auto" else 0
    if bound:
        made = fitting(model, work, bound, rows, offload)
    else:
        streams = recipe and not memory and recipe.offload in ("cpu", "disk")
        away, rows = len(block_names(model)) if streams else 0, rows or max(1, TOKENS // work.tokens(model))
        made = make(model, work, rows, away, offload, ends=bool(streams))
    return phased(made, model, work, beside(part) if part else BESIDE.get(name, {}), recipe or Recipe(), bound, mean)


def as_dict(plan: Plan) -> dict:
    """For JSON."""
    return dataclasses.asdict(plan) | {"device": plan.device, "peak": plan.peak}


__all__ = ["SHAPES", "Plan", "PlanError", "Work", "counted", "fitting", "make", "parse_memory", "skeleton"]

"""A small quantised net, once with real bitsandbytes layers and once as the same expression in fp64.

The fp64 form is what the engine's numbers are compared with: every weight is `code * scale`, both exact.
"""

import copy

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_engine.journal import Step
from zo_engine.probes import Space
from zo_engine.scales import Format, ScaleView
from zo_engine.zo import ZO

WIDTH = 64  # of every layer but one: one bitsandbytes block


class Net(nn.Module):
    """Layers that see tokens [B, T, 64] or one vector [B, 64]; with bias and without; one 128 wide."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tokens = _linear(WIDTH, WIDTH, True, generator)
        self.pooled = _linear(WIDTH, WIDTH, False, generator)
        self.up = _linear(WIDTH, 2 * WIDTH, True, generator)
        self.down = _linear(2 * WIDTH, WIDTH, False, generator)

    def forward(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        hidden = torch.tanh(self.tokens(tokens) + self.pooled(pooled)[:, None])
        return hidden + self.down(torch.tanh(self.up(hidden)))


def _linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    return layer


def quantised(linear: nn.Linear, format: str, compute: torch.dtype = torch.float32) -> nn.Module:
    """The bitsandbytes layer of a plain one."""
    size = (linear.in_features, linear.out_features, linear.bias is not None)
    if format == "int8":
        layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=0.0)
    else:
        layer = bnb.nn.Linear4bit(*size, compute_dtype=compute, compress_statistics=False, quant_type=format)
        layer.support_avx512bf16_for_cpu = False
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").eval().requires_grad_(False)  # quantises


def quantised_net(format: str = "nf4", seed: int = 0) -> Net:
    net = Net(seed)
    for name, layer in list(net.named_children()):
        setattr(net, name, quantised(layer, format))
    return net


def codes(layer: bnb.nn.Linear4bit) -> Tensor:
    """The value that each weight of a 4-bit layer has before it is scaled [out, in], unpacked by hand."""
    packed, state = layer.weight.data.flatten(), layer.weight.quant_state
    return state.code[torch.stack([packed >> 4, packed & 15], 1).long()].view(state.shape)


class Exact(nn.Module):
    """`y = (codes * scale) x + bias` in fp64, one scale per block of the row-major weight."""

    def __init__(self, layer: bnb.nn.Linear4bit):
        super().__init__()
        self.codes = codes(layer).double()
        self.scale = layer.weight.quant_state.absmax.double()
        self.block = layer.weight.quant_state.blocksize
        self.bias = None if layer.bias is None else layer.bias.data.double()

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.codes.view(-1, self.block) * self.scale[:, None]).view(self.codes.shape)
        return F.linear(x, weight, self.bias)


EXACT = Format(
    "exact",
    matches=lambda m: isinstance(m, Exact),
    get=lambda m: m.scale,
    put=lambda m, scale: setattr(m, "scale", scale),
    shape=lambda m: tuple(m.codes.shape),
    block=lambda m: m.block,
)


def exact_net(net: Net) -> tuple[Net, dict[str, ScaleView]]:
    """The fp64 form of a 4-bit net, and its scales."""
    net = copy.copy(net)
    net._modules = {name: Exact(layer) for name, layer in net.named_children()}
    return net, {name: ScaleView(name, layer, EXACT) for name, layer in net.named_children()}


def net_inputs(batch: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, pooled, target) for a loss."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 3, WIDTH), (batch, WIDTH), (batch, 3, WIDTH))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def net_loss(net: Net, data: tuple[Tensor, Tensor, Tensor]):
    """loss(sample) [r] -> one mean squared error per row [r]."""
    tokens, pooled, target = data
    return lambda sample: (net(tokens[sample], pooled[sample]) - target[sample]).square().mean((1, 2))


def one_by_one(space: Space, theta: Tensor, probes, loss) -> Tensor:
    """What `probes.evaluate` must equal: each row alone, with its theta written into the scales."""
    losses = []
    for direction, sign, sample in zip(probes.direction, probes.sign, probes.sample, strict=True):
        moved = theta + probes.z[direction].to(theta.dtype) * (probes.eps * sign.item())
        with torch.no_grad(), space.folded(moved):
            losses.append(loss(sample[None]))
    return torch.cat(losses)


def one_step(zo: ZO, losses, batch: int, own: bool = True, schedule: float = 1.0) -> Step:
    """A live step whose searches see the same batch: `losses(probes)` [R] are all that it sees."""
    return zo.advance(lambda probes, fresh: losses(probes), batch, own, schedule)

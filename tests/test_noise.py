"""Directions: the published generator, and the same numbers whatever is asked beside them."""

import random

import numpy as np
import pytest
import torch

from zo_engine.noise import Layout, directions, philox, tensor_id

KINDS = ("rademacher", "gaussian")
SHAPES = {"up.rows": (300,), "up.columns": (4,), "down.groups": (7, 9)}


def draw(kind="rademacher", shapes=SHAPES, seed=1, step=2, probes=range(4)):
    """{name: [P, *shape]}"""
    layout = Layout(shapes)
    return layout.split(directions(kind, layout, seed, step, probes))


def same(kind, a, b):
    # log and cos may differ in the last bit of fp64 between an element that is vectorised and one that is not
    return torch.equal(a, b) if kind == "rademacher" else torch.allclose(a, b, rtol=1e-6, atol=1e-7)


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_vectors_published_with_random123(counter, key, expected):
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    found = philox(words, tuple(int(word, 16) for word in key.split()))
    assert " ".join(f"{word.item():08x}" for word in found) == expected


def python_philox(counter, key):
    """Philox4x32-10 in Python's own integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k, q & 0xFFFFFFFF, p >> 32 ^ d ^ m, p & 0xFFFFFFFF
        k, m = k + 0x9E3779B9 & 0xFFFFFFFF, m + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


def test_signs_are_the_bits_of_the_generator():
    seed, step, probe = 2**40 + 17, 1234, 5
    signs = draw(seed=seed, step=step, probes=[probe])["up.rows"][0]
    bits = []
    for block in range(3):  # 300 signs take three blocks of 128
        words = python_philox((block, tensor_id("up.rows"), probe, step), (seed & 0xFFFFFFFF, seed >> 32))
        bits += [word >> bit & 1 for word in words for bit in range(32)]
    assert signs.dtype == torch.int8
    assert signs.tolist() == [2 * bit - 1 for bit in bits[:300]]


def test_signs_have_not_changed_since_the_first_release():
    """Every style in journal form depends on these."""
    rows = draw(seed=42, step=7, probes=[0, 3])["down.groups"].flatten(1)
    found = ["".join("+" if sign > 0 else "-" for sign in row) for row in rows.tolist()]
    assert found == GOLDEN_SIGNS


GOLDEN_SIGNS = [
    "++-+-+-+----+--++-----++----+-+--++++++-+--+++-++++-+++--++--++",
    "---+++++--++++-++--++-++-----++-+--+------+-+---+--+-+--+--++++",
]


# The same numbers, whatever is asked beside them


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_depends_neither_on_the_order_of_tensors_nor_on_the_others(kind):
    whole = draw(kind)
    reverse = draw(kind, dict(reversed(SHAPES.items())))
    for name, shape in SHAPES.items():
        alone = draw(kind, {name: shape})[name]
        assert alone.shape == (4, *shape)
        assert same(kind, whole[name], reverse[name])
        assert same(kind, whole[name], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_does_not_depend_on_how_probes_are_split_over_calls(kind):
    layout = Layout(SHAPES)
    whole = directions(kind, layout, 1, 2, range(6))
    parts = [directions(kind, layout, 1, 2, probes) for probes in ([0], [1, 2, 3], [4, 5])]
    assert same(kind, whole, torch.cat(parts))
    assert same(kind, whole[[5, 2]], directions(kind, layout, 1, 2, [5, 2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_direction_does_not_depend_on_how_much_is_made_at_once(kind, piece, monkeypatch):
    whole = directions(kind, Layout(SHAPES), 1, 2, range(6))
    monkeypatch.setattr("zo_engine.noise.PIECE", piece)
    assert same(kind, whole, directions(kind, Layout(SHAPES), 1, 2, range(6)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_tensor_begins_as_a_shorter_one_does(kind):
    assert same(kind, draw(kind, {"a": (5,)})["a"], draw(kind, {"a": (1000,)})["a"][:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_seed_step_probe_and_name_each_give_another_direction(kind):
    base = draw(kind, {"a": (256,)}, seed=1, step=2, probes=[3])["a"]
    others = [
        draw(kind, {"a": (256,)}, seed=1 + 2**32, step=2, probes=[3])["a"],
        draw(kind, {"a": (256,)}, seed=2, step=2, probes=[3])["a"],
        draw(kind, {"a": (256,)}, seed=1, step=3, probes=[2])["a"],
        draw(kind, {"a": (256,)}, seed=1, step=2, probes=[4])["a"],
        draw(kind, {"b": (256,)}, seed=1, step=2, probes=[3])["b"],
    ]
    drawn = torch.cat([base, *others]).float()
    correlation = (drawn @ drawn.T) / 256 - torch.eye(6) * (drawn.square().mean(1))
    assert correlation.abs().max() < 5 / 16  # five standard errors of 256 products


# What they are like


@pytest.mark.parametrize("kind", KINDS)
def test_mean_variance_and_correlations_lie_within_their_bands(kind):
    z = draw(kind, {"a": (2000,)}, probes=range(50))["a"].double()
    count = z.numel()
    fourth = {"rademacher": 1, "gaussian": 3}[kind]
    assert abs(z.mean()) < 4 / count**0.5
    assert abs(z.square().mean() - 1) <= 4 * ((fourth - 1) / count) ** 0.5
    between_elements = (z[:, :-1] * z[:, 1:]).mean()
    between_probes = (z[:-1] * z[1:]).mean()
    assert max(abs(between_elements), abs(between_probes)) < 4 / count**0.5
    per_element = z.mean(0) * 50**0.5  # each close to normal
    assert per_element.abs().max() < 5


def test_signs_have_no_bias_at_any_place_of_a_block():
    z = draw("rademacher", {"a": (128 * 500,)}, probes=[0])["a"].view(500, 128).double()
    assert z.mean(0).abs().max() < 4.5 / 500**0.5


def test_gaussians_have_the_moments_and_the_distribution_of_normals():
    z = draw("gaussian", {"a": (10_000,)}, probes=range(10))["a"].flatten().double()
    n = len(z)
    assert draw("gaussian")["up.rows"].dtype == torch.float32
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(z.pow(power).mean() - moment) < 4 * (variance / n) ** 0.5
    cdf = torch.special.ndtr(z.sort().values)
    grid = torch.arange(n + 1) / n
    distance = torch.maximum((grid[1:] - cdf).max(), (cdf - grid[:-1]).max())
    assert distance * n**0.5 < 1.95  # Kolmogorov's 0.1 % point
    assert z.isfinite().all()
    assert 3.5 < z.abs().max() < 6.8  # 6.76 is the furthest that 32 bits reach


def test_both_halves_of_box_muller_are_independent():
    z = draw("gaussian", {"a": (4 * 20_000,)}, probes=[0])["a"].view(-1, 4).double()
    assert (torch.corrcoef(z.T) - torch.eye(4)).abs().max() < 4 / 20_000**0.5
    assert (torch.corrcoef(z.T.square()) - torch.eye(4)).abs().max() < 4 / 20_000**0.5


# Manners


def numpy_state():
    return np.random.get_state()[1].tobytes()  # noqa: NPY002 (only looked at)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state(), numpy_state(), random.getstate()
    for kind in KINDS:
        draw(kind)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == numpy_state()
    assert before[2] == random.getstate()


def test_a_layout_splits_into_views_by_name():
    layout = Layout(SHAPES)
    flat = torch.arange(2 * layout.size).view(2, -1)
    parts = layout.split(flat)
    assert {name: part.shape for name, part in parts.items()} == {n: (2, *s) for n, s in SHAPES.items()}
    assert torch.equal(torch.cat([part.flatten(1) for part in parts.values()], 1), flat)
    assert parts["up.rows"].data_ptr() == flat.data_ptr()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian', not 'uniform'"):
        draw("uniform")


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    layout = Layout(SHAPES)
    cpu, gpu = (directions("rademacher", layout, 1, 2, range(9), device) for device in ("cpu", "cuda"))
    assert torch.equal(cpu, gpu.cpu())
    cpu, gpu = (directions("gaussian", layout, 1, 2, range(9), device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cpu, gpu.cpu(), rtol=1e-6, atol=1e-7)

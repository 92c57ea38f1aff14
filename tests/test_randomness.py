"""Addressed random numbers: known answers, fair and independent values, and dependence on nothing but the address."""

from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from es_flipout.randomness import Address, Stream, _normal_table, integers, normals, philox4x32, signs, words

Draw = Callable[[Address, Stream, Tensor, int], Tensor]
DRAWS: dict[str, Draw] = {"words": words, "signs": signs, "normals": normals, "integers": integers}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
HERE = Address(seed=3, generation=5, layer=2)


# kat_vectors of Random123 (Salmon et al. 2011)
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == answer.split()


def test_words_at_address_zero_are_the_known_answer() -> None:
    drawn = words(Address(0), Stream.BASE, torch.tensor([0]), 4)
    assert [f"{word:08x}" for word in drawn[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_the_whole_address_reaches_the_generator() -> None:
    seed, generation, layer, member = 0xFEDCBA9876543210, 0xDEADBEEF, 0xABCDEF, 0x12345678
    drawn = words(Address(seed, generation, layer), Stream.WEIGHT, torch.tensor([member]), 8)
    for block in range(2):
        counter = [torch.tensor([word]) for word in (block, member, (layer << 8) | 3, generation)]
        expected = philox4x32((counter[0], counter[1], counter[2], counter[3]), (0x76543210, 0xFEDCBA98))
        assert drawn[0, 4 * block : 4 * block + 4].tolist() == [int(word) for word in expected]


@every_draw
@settings(max_examples=25)
@given(
    members=st.lists(st.integers(0, 2**31), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    count=st.integers(1, 70),
    data=st.data(),
)
def test_same_values_for_any_chunking_and_order(
    draw: Draw, members: list[int], cuts: list[int], count: int, data: st.DataObject
) -> None:
    whole = draw(HERE, Stream.BASE, torch.tensor(members), count)
    order = torch.tensor(data.draw(st.permutations(range(len(members)))))
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(members)), len(members)]
    shuffled = torch.tensor(members)[order]
    parts = [draw(HERE, Stream.BASE, shuffled[a:b], count) for a, b in pairwise(edges) if a < b]
    assert torch.equal(torch.cat(parts), whole[order])


@every_draw
@given(fewer=st.integers(1, 80), more=st.integers(0, 80))
@settings(max_examples=25)
def test_drawing_fewer_gives_the_first_of_more(draw: Draw, fewer: int, more: int) -> None:
    members = torch.arange(3)
    assert draw(HERE, Stream.BIAS, members, fewer).shape == (3, fewer)
    assert torch.equal(
        draw(HERE, Stream.BIAS, members, fewer), draw(HERE, Stream.BIAS, members, fewer + more)[:, :fewer]
    )


@every_draw
def test_every_part_of_the_address_matters(draw: Draw) -> None:
    places = [
        (Address(seed, generation, layer), stream)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for generation in (0, 1, 2**32 - 1)
        for layer in (0, 1, 2**24 - 1)
        for stream in Stream
    ]
    rows = torch.cat([draw(address, stream, torch.tensor([0, 1, 2**31]), 256) for address, stream in places])
    assert len(rows) == len(places) * 3 == 4 * 3 * 3 * 9 * 3
    if draw is signs:  # any two rows agree as often as by chance: 256 fair coins
        agreements = (256 + rows.to(torch.float32) @ rows.to(torch.float32).T) / 2
        agreements.fill_diagonal_(128)
        assert (agreements - 128).abs().max() < 6.5 * 8
    else:  # by chance, of 250000 values 7 repeat with 32 bits, 14 with 31, some 570 in float32; a repeated row adds 256
        repeated = rows.numel() - len(rows.unique())
        assert repeated < (750 if draw is normals else 50)


@pytest.mark.parametrize(
    "place",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 0, "generation": -1},
        {"seed": 0, "generation": 2**32},
        {"seed": 0, "layer": -1},
        {"seed": 0, "layer": 2**24},
    ],
    ids=str,
)
def test_address_out_of_range(place: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        Address(**place)


def test_words_are_uniform_in_32_bits() -> None:
    drawn = words(HERE, Stream.BASE, torch.arange(1000), 256)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 2**32
    of_each_bit = torch.stack([((drawn >> bit) & 1).double().mean() for bit in range(32)])
    assert (of_each_bit - 0.5).abs().max() < 5 * 0.5 / drawn.numel() ** 0.5
    in_each_sixteenth = (drawn >> 28).flatten().bincount(minlength=16) / drawn.numel()
    assert (in_each_sixteenth - 1 / 16).abs().max() < 5 * (15 / 256 / drawn.numel()) ** 0.5


def test_integers_are_31_bits() -> None:
    drawn = integers(HERE, Stream.START_STATE, torch.arange(4000), 4)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0
    assert 2**31 - 2**21 < int(drawn.max()) < 2**31
    assert (drawn.double().mean() / 2**31 - 0.5).abs() < 5 * (1 / 12 / drawn.numel()) ** 0.5


def test_signs_are_exactly_plus_and_minus_one() -> None:
    drawn = signs(HERE, Stream.INPUT_SIGNS, torch.arange(100), 77)
    assert drawn.dtype == torch.int8
    assert drawn.unique().tolist() == [-1, 1]


def test_signs_are_fair_and_uncorrelated() -> None:
    n, size = 20000, 64
    rows = signs(HERE, Stream.INPUT_SIGNS, torch.arange(n), size).double()
    assert rows.mean().abs() < 4 / (n * size) ** 0.5
    assert rows.mean(0).abs().max() < 5 / n**0.5
    assert rows.mean(1).abs().max() < 6 / size**0.5
    products = rows.T @ rows / n
    products.fill_diagonal_(0)
    assert products.abs().max() < 5.5 / n**0.5, "two positions agree too often"
    few = rows[:2000]
    products = few @ few.T / size
    products.fill_diagonal_(0)
    assert products.abs().max() < 6.5 / size**0.5, "two members agree too often"
    # the same for products of three and four positions, which would reveal signs that are parities of others
    triples = (rows[:, :-2] * rows[:, 1:-1]).T @ rows / n
    for i in range(size - 2):
        triples[i, i] = triples[i, i + 1] = 0  # the square of a sign is 1, so this is not a product of three
    assert triples.abs().max() < 5.5 / n**0.5
    fours = (rows[:, ::2] * rows[:, 1::2]).T @ (rows[:, ::2] * rows[:, 1::2]) / n
    fours.fill_diagonal_(0)
    assert fours.abs().max() < 5.5 / n**0.5


def test_streams_of_one_member_are_uncorrelated() -> None:
    n = 20000
    r = signs(HERE, Stream.OUTPUT_SIGNS, torch.arange(n), 32).double()
    s = signs(HERE, Stream.INPUT_SIGNS, torch.arange(n), 32).double()
    assert (r.T @ s / n).abs().max() < 5.5 / n**0.5


def test_signs_have_full_variety() -> None:
    members = 1 << 16
    rows = signs(HERE, Stream.INPUT_SIGNS, torch.arange(members), 64)
    packed = ((rows.long() + 1) // 2 << torch.arange(64)).sum(1)
    assert len(packed.unique()) == members  # fewer with probability 1e-10


def test_sign_rows_span_everything_over_two_elements() -> None:
    """Signs that are parities of bits of the member's number would span 9 dimensions, not 256."""
    bits = (signs(HERE, Stream.INPUT_SIGNS, torch.arange(512), 256) > 0).int()
    for negated in (bits, 1 - bits):
        rows, rank = negated.clone(), 0
        for column in range(256):
            candidates = rows[rank:, column].nonzero()
            if len(candidates) == 0:
                continue
            pivot = rank + int(candidates[0, 0])
            rows[[rank, pivot]] = rows[[pivot, rank]]
            below = rows[rank + 1 :, column].bool()
            rows[rank + 1 :][below] ^= rows[rank]
            rank += 1
        assert rank == 256


def test_normals_follow_the_normal_distribution() -> None:
    normal = NormalDist()
    drawn = normals(HERE, Stream.WEIGHT, torch.arange(1000), 1000)
    assert drawn.dtype == torch.float32
    x = drawn.double().flatten()
    n = len(x)
    assert x.mean().abs() < 4 / n**0.5
    assert (x.square().mean() - 1).abs() < 4 * (2 / n) ** 0.5
    assert x.pow(3).mean().abs() < 4 * (15 / n) ** 0.5
    assert (x.pow(4).mean() - 3).abs() < 4 * (96 / n) ** 0.5
    assert x.abs().max() < 6.2
    for threshold in (-4.0, -3.0, -2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0, 3.0, 4.0):
        expected = normal.cdf(threshold)
        error = 4.5 * (expected * (1 - expected) / n) ** 0.5
        assert ((x < threshold).double().mean() - expected).abs() < error, f"below {threshold}"
    step = torch.arange(1, n + 1) / n
    cdf = 0.5 * (1 + torch.erf(x.sort().values / 2**0.5))
    assert (step - cdf).abs().max() < 1.95 / n**0.5, "Kolmogorov-Smirnov, one in a thousand"


def test_normal_table_has_unit_variance_and_is_antisymmetric() -> None:
    table = _normal_table(torch.device("cpu"))
    assert len(table) == 65536
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() > 0).all()
    assert float(table.double().square().mean()) == pytest.approx(1, abs=1e-7)


def test_normals_are_independent() -> None:
    n = 10000
    x = normals(HERE, Stream.WEIGHT, torch.arange(n), 32).double()
    for values in (x, x.square() - 1):  # also the magnitudes, which are independent only if the numbers are
        products = (values.T @ values / n) / values.square().mean()
        products.fill_diagonal_(0)
        assert products.abs().max() < 5.5 / n**0.5
    between = x[1:].mul(x[:-1]).mean(0)
    assert between.abs().max() < 5 / n**0.5, "neighboring members"

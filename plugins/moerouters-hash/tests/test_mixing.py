"""The hash against a version in Python's own integers, and what it promises: distinct, uniform, the same for ever."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_hash.mixing import hashed_experts, mix


def slow_mix(x: int) -> int:
    """prospector32 as its C source has it: unsigned words, every product modulo 2**32."""
    x ^= x >> 15
    x = x * 0x2C1B3C6D % 2**32
    x ^= x >> 12
    x = x * 0x297A2D39 % 2**32
    return x ^ (x >> 15)


def slow_experts(token: int, num_experts: int, top_k: int, seed: int, groups: int = 1, kept: int = 1) -> list[int]:
    """One token's experts by the definition, in plain integers."""
    state = slow_mix(token % 2**32 ^ slow_mix(seed ^ 0x9E3779B9))
    numbers = [slow_mix(state ^ (place * 0x9E3779B9 % 2**32)) for place in range(1, top_k + kept + 3)]

    def distinct(numbers: list[int], below: int, count: int) -> list[int]:
        chosen: list[int] = []
        for turn in range(count):
            highest = below - count + turn
            number = numbers[turn] % (highest + 1)
            chosen.append(highest if number in chosen else number)
        return [(number + numbers[count]) % below for number in chosen]

    size = num_experts // groups
    places = distinct(numbers, kept * size, top_k)
    if kept == groups:
        return places
    open_groups = distinct(numbers[top_k + 1 :], groups, kept)
    return [open_groups[place // size] * size + place % size for place in places]


@settings(max_examples=200, deadline=None)
@given(x=st.integers(0, 2**32 - 1))
def test_the_word_is_that_of_the_source(x: int) -> None:
    assert mix(x) == slow_mix(x)
    assert mix(torch.tensor(x)).item() == slow_mix(x)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    groups = draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    size = draw(st.integers(1, 5))
    return groups * size, draw(st.integers(1, kept * size)), groups, kept


@settings(max_examples=100, deadline=None)
@given(
    layout=layouts(),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 200_000), max_size=5),
)
def test_experts_are_those_of_the_definition(layout: tuple[int, int, int, int], seed: int, tokens: list[int]) -> None:
    E, K, groups, kept = layout
    ids_T = torch.tensor(tokens, dtype=torch.int64)
    experts_TK = hashed_experts(ids_T, num_experts=E, top_k=K, seed=seed, num_groups=groups, kept_groups=kept)
    assert experts_TK.shape == (len(tokens), K)
    assert experts_TK.tolist() == [slow_experts(token, E, K, seed, groups, kept) for token in tokens]
    for row in experts_TK.tolist():
        assert len(set(row)) == K
        assert all(0 <= expert < E for expert in row)
        assert len({expert * groups // E for expert in row}) <= kept


def test_the_hash_stays_what_it_is() -> None:
    """Experts were trained under it: another result is another model."""
    ids_T = torch.tensor([0, 1, 2, 50256, 128000])
    two_TK = hashed_experts(ids_T, num_experts=8, top_k=2, seed=0)
    assert two_TK.tolist() == [[6, 0], [5, 6], [2, 3], [2, 7], [3, 5]]
    four_TK = hashed_experts(ids_T, num_experts=64, top_k=4, seed=7)
    assert four_TK.tolist() == [
        [5, 62, 28, 29],
        [7, 36, 23, 8],
        [18, 28, 8, 29],
        [38, 63, 19, 43],
        [38, 3, 18, 7],
    ]


def test_every_bit_depends_on_every_bit() -> None:
    words_N = torch.arange(4096) * 977
    flips = torch.zeros(32, 32)
    for bit in range(32):
        changed_N = mix(words_N) ^ mix(words_N ^ (1 << bit))
        flips[bit] = torch.stack([(changed_N >> out & 1).double().mean() for out in range(32)])
    # 4096 fair coins: five standard deviations of a share are 0.04.
    assert float((flips - 0.5).abs().max()) < 0.06


@pytest.mark.parametrize(("E", "K"), [(8, 1), (8, 2), (6, 5), (64, 8)])
def test_every_expert_is_as_likely_in_every_place(E: int, K: int) -> None:
    T = 60_000
    experts_TK = hashed_experts(torch.arange(T), num_experts=E, top_k=K, seed=3)
    for place in range(K):
        counts_E = torch.bincount(experts_TK[:, place], minlength=E).double()
        assert chi_square(counts_E, T / E) < 6


def test_every_set_is_as_likely() -> None:
    T, E, K = 60_000, 6, 3
    sets = Counter(map(tuple, hashed_experts(torch.arange(T), num_experts=E, top_k=K, seed=1).sort(dim=1)[0].tolist()))
    counts = torch.tensor([sets[chosen] for chosen in itertools.combinations(range(E), K)], dtype=torch.float64)
    assert chi_square(counts, T / 20) < 6


def chi_square(counts: torch.Tensor, expected: float) -> float:
    """Standard deviations above the mean of the chi-square of a fair draw."""
    freedom = counts.numel() - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_seeds_are_unrelated() -> None:
    """Two layers agree on an expert as often as chance has it, neighbouring seeds too."""
    T, E = 40_000, 16
    layers = [hashed_experts(torch.arange(T), num_experts=E, top_k=1, seed=seed)[:, 0] for seed in range(4)]
    for first, second in itertools.combinations(layers, 2):
        # Chance: 1/16, give or take 0.0012.
        assert float((first == second).double().mean()) == pytest.approx(1 / E, abs=0.007)

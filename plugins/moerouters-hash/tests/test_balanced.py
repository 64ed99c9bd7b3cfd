"""The table against a loop that looks for the least loaded experts each time, and the balance it brings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_hash.balanced import UNSEEN, balanced_table
from moerouters_hash.mixing import hashed_experts, mix


def slow_table(frequencies: list[int], E: int, K: int, seed: int) -> list[list[int]]:
    """By the words of the docstring: ids by falling frequency, each to the K experts with the least so far."""
    key = mix(seed ^ 0x9E3779B9)
    load = [0] * E
    rows = [[UNSEEN] * K for _ in frequencies]
    for token in sorted(range(len(frequencies)), key=lambda token: (-frequencies[token], mix(token ^ key))):
        if frequencies[token]:
            order = sorted(range(E), key=lambda e: (load[e], mix((e * 0x9E3779B9 % 2**32) ^ key)))
            rows[token] = order[:K]
            for expert in order[:K]:
                load[expert] += frequencies[token]
    return rows


@settings(max_examples=100, deadline=None)
@given(
    frequencies=st.lists(st.integers(0, 6) | st.integers(0, 1000), max_size=30),
    sizes=st.integers(1, 6).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E))),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_table_is_that_of_the_loop(frequencies: list[int], sizes: tuple[int, int], seed: int) -> None:
    E, K = sizes
    table_VK = balanced_table(tuple(frequencies), num_experts=E, top_k=K, seed=seed)
    assert table_VK.tolist() == slow_table(frequencies, E, K, seed)


@pytest.mark.parametrize("K", [1, 4])
def test_frequent_tokens_are_spread(K: int) -> None:
    """Zipf's law over 5000 ids: the plain hash leaves the expert of the first id with far more than its share."""
    V, E = 5000, 16
    frequencies = [10_000_000 // rank for rank in range(1, V + 1)]
    table_VK = torch.from_numpy(balanced_table(tuple(frequencies), num_experts=E, top_k=K, seed=0).copy())
    hashed_VK = hashed_experts(torch.arange(V), num_experts=E, top_k=K, seed=0)
    weight_VK = torch.tensor(frequencies, dtype=torch.float64).unsqueeze(1).expand(V, K)

    def most(experts_VK: torch.Tensor) -> float:
        load_E = torch.zeros(E, dtype=torch.float64).index_add(0, experts_VK.reshape(-1), weight_VK.reshape(-1))
        return float(load_E.max() / load_E.mean())

    # The first id is 11% of the text and an expert's share 1/16: with K = 1 no table does better than 1.76.
    best = max(1.0, frequencies[0] / (sum(frequencies) * K / E))
    assert most(table_VK) < best * 1.001
    assert most(hashed_VK) > best * 1.2


def test_no_two_layers_share_a_table_that_somebody_writes_to() -> None:
    table_VK = balanced_table((3, 1, 2), num_experts=2, top_k=1, seed=0)
    with pytest.raises(ValueError, match="read-only"):
        table_VK[0] = 0

"""Auction rounds against the loops, and what a finished auction promises."""

from __future__ import annotations

import pytest
import torch
from base_layers_oracles import KINDS, auction_loops, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_base_layers.auction import auction, auction_anywhere
from moerouters_base_layers.auction_cpu import auction_cpu
from moerouters_base_layers.bidding import EPSILON
from moerouters_base_layers.largest import largest_per_expert


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int, list[float], int]:
    """Tokens with demand K, or 0 for padding, and one row more that fills up what is left of E * C places."""
    E = draw(st.integers(2, 5), label="E")
    T = draw(st.integers(0, 6), label="T")
    top_k = draw(st.integers(1, E - 1), label="K")
    value = st.integers(-16, 0).map(lambda n: n / 8) | st.sampled_from([0.0, -1e4, -1e-3])
    values = draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T), label="values")
    demand = draw(st.lists(st.sampled_from([top_k, top_k, 0]), min_size=T, max_size=T), label="demand")
    prices = draw(st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=E, max_size=E), label="prices")
    capacity = -(-sum(demand) // E)
    return [*values, [0.0] * E], [*demand, capacity * E - sum(demand)], top_k, prices, capacity


@settings(deadline=None, max_examples=40)
@given(problem=problems(), rounds=st.integers(0, 12))
def test_rounds_equal_the_loops(
    problem: tuple[list[list[float]], list[int], int, list[float], int], rounds: int
) -> None:
    values, demand, top_k, prices, capacity = problem
    values_UE, price_E = (torch.tensor(given, dtype=torch.float64) for given in (values, prices))
    held_UE, after_E = auction(
        values_UE, torch.tensor(demand), torch.tensor(capacity), price_E, top_k=top_k, rounds=rounds
    )
    epsilon = float(values_UE.max() - values_UE.min()) * EPSILON
    # The loops go on where nothing is missing any more, and change nothing: on a GPU that is what happens.
    held, expected = auction_loops(values, demand, capacity, prices, rounds=rounds, epsilon=epsilon)
    everywhere = auction_anywhere(
        values_UE, torch.tensor(demand), torch.tensor(capacity), price_E, top_k=top_k, rounds=rounds
    )
    for found_UE, found_E in ((held_UE, after_E), everywhere):
        assert [{e for e, x in enumerate(row) if x} for row in found_UE.tolist()] == held
        if any(demand):
            assert found_E.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_bid_as_in_rounds_of_all(kind: str, dtype: torch.dtype) -> None:
    """More rows than the loops are for: through every way of choosing the best and the highest, to the bit."""
    T, E, top_k = 700, 16, 4
    values_TE = scores_of(kind, T, E, torch.Generator().manual_seed(1)).to(dtype)
    values_UE = torch.cat([values_TE - values_TE.amax(dim=1, keepdim=True), values_TE.new_zeros(1, E)])
    demand_U = torch.tensor([top_k] * (T - 3) + [0] * 3 + [12])
    capacity = torch.tensor(int(demand_U.sum()) // E)
    assert int(demand_U.sum()) % E == 0
    for rounds in (1, 7):
        given = values_UE, demand_U, capacity, values_UE.new_zeros(E)
        few, all_ = (run(*given, top_k=top_k, rounds=rounds) for run in (auction_cpu, auction_anywhere))
        assert torch.equal(few[0], all_[0]) and torch.equal(few[1], all_[1])
        assert few[1].dtype == dtype


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "logits", "two blocks", "whole numbers", "huge"])
def test_a_finished_auction_leaves_nobody_wanting_more_than_epsilon(kind: str) -> None:
    """Epsilon complementary slackness: what a token holds is worth at least what it does not hold, less epsilon."""
    T, E, top_k = 60, 6, 2
    values_TE = scores_of(kind, T, E, torch.Generator().manual_seed(0))
    values_UE = torch.cat([values_TE - values_TE.amax(dim=1, keepdim=True), torch.zeros(1, E, dtype=torch.float64)])
    demand_U = torch.tensor([top_k] * T + [0])
    held_UE, price_E = auction(
        values_UE,
        demand_U,
        torch.tensor(T * top_k // E),
        torch.zeros(E, dtype=torch.float64),
        top_k=top_k,
        rounds=2000,
    )
    assert torch.equal(held_UE.sum(dim=1), demand_U)
    assert held_UE.sum(dim=0).tolist() == [20] * E
    worth_TE, held_TE = (values_UE - price_E)[:T], held_UE[:T]
    worst_T = torch.where(held_TE, worth_TE, float("inf")).amin(dim=1)
    best_T = torch.where(held_TE, -float("inf"), worth_TE).amax(dim=1)
    epsilon = (values_UE.max() - values_UE.min()) * EPSILON
    assert bool((worst_T >= best_T - epsilon * (1 + 1e-9)).all())


def test_ties_everywhere_never_end_an_auction() -> None:
    """The span is 0, and with it epsilon: all bid for the same two experts for ever. What ends it is `placing`."""
    values_UE, demand_U = torch.zeros(7, 4), torch.tensor([2] * 6 + [0])
    for rounds in (5, 50):
        held_UE, _ = auction(values_UE, demand_U, torch.tensor(3), torch.zeros(4), top_k=2, rounds=rounds)
        assert held_UE.sum(dim=0).tolist() == [3, 3, 0, 0]


def test_the_largest_are_exactly_as_many_as_asked_for() -> None:
    nothing = -float("inf")
    values_TE = torch.tensor([[1.0, 2.0, nothing], [1.0, 3.0, nothing], [1.0, nothing, nothing]])
    chosen_TE, smallest_E = largest_per_expert(values_TE, torch.tensor(2))
    assert chosen_TE.t().tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert smallest_E.tolist() == [1.0, 2.0, 0.0]
    chosen_TE, _ = largest_per_expert(values_TE, torch.tensor(0))
    assert not bool(chosen_TE.any())

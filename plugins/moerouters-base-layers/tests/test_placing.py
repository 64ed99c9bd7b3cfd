"""Filling experts one after the other never gets stuck, and does what the loops do."""

from __future__ import annotations

import torch
from base_layers_oracles import place_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_base_layers.placing import place


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Any demands that some assignment meets: each expert draws the rows it would take. Keys tie often."""
    E = draw(st.integers(1, 5), label="E")
    U = draw(st.integers(1, 8), label="U")
    C = draw(st.integers(0, U), label="C")
    takers = [draw(st.permutations(range(U)), label=f"rows of expert {e}")[:C] for e in range(E)]
    demand = [sum(u in rows for rows in takers) for u in range(U)]
    key = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e4, -1e4])
    keys = draw(st.lists(st.lists(key, min_size=E, max_size=E), min_size=U, max_size=U), label="keys")
    return keys, demand, C


@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_demands_and_capacities_are_met_as_by_the_loops(problem: tuple[list[list[float]], list[int], int]) -> None:
    keys, demand, capacity = problem
    chosen_UE = place(torch.tensor(keys, dtype=torch.float64), torch.tensor(demand), torch.tensor(capacity))
    assert chosen_UE.sum(dim=1).tolist() == demand
    assert chosen_UE.sum(dim=0).tolist() == [capacity] * len(keys[0])
    assert chosen_UE.tolist() == place_loops(keys, demand, capacity)


def test_rows_that_need_all_that_is_left_go_first() -> None:
    """By key alone the last row would lose at both experts."""
    keys_UE = torch.tensor([[9.0, 9.0], [8.0, 8.0], [0.0, 0.0]])
    chosen_UE = place(keys_UE, torch.tensor([1, 1, 2]), torch.tensor(2))
    assert chosen_UE.tolist() == [[True, False], [False, True], [True, True]]

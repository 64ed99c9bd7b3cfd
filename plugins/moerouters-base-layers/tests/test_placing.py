"""Filling experts one after the other never gets stuck, and does what the loops do."""

from __future__ import annotations

import pytest
import torch
from base_layers_oracles import place_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_base_layers import placing
from moerouters_base_layers.placing import place


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], list[int], int]:
    """Any demands that some assignment meets: each expert draws the rows it would take. Margins tie often, and what is
    held is that assignment, less some pairs."""
    E = draw(st.integers(1, 5), label="E")
    U = draw(st.integers(1, 8), label="U")
    C = draw(st.integers(0, U), label="C")
    takers = [draw(st.permutations(range(U)), label=f"rows of expert {e}")[:C] for e in range(E)]
    demand = [sum(u in rows for rows in takers) for u in range(U)]
    margin = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e4, -1e4])
    margins = draw(st.lists(st.lists(margin, min_size=E, max_size=E), min_size=U, max_size=U), label="margins")
    lost = draw(st.sets(st.tuples(st.integers(0, U - 1), st.integers(0, E - 1)), max_size=4), label="lost")
    held = [[u in rows and (u, e) not in lost for e, rows in enumerate(takers)] for u in range(U)]
    return margins, held, demand, C


@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_demands_and_capacities_are_met_as_by_the_loops(
    problem: tuple[list[list[float]], list[list[bool]], list[int], int],
) -> None:
    margins, held, demand, capacity = problem
    given_EU = torch.tensor(margins, dtype=torch.float64).t(), torch.tensor(held).t()
    chosen_UE = place(*given_EU, torch.tensor(demand), torch.tensor(capacity)).t()
    assert chosen_UE.sum(dim=1).tolist() == demand
    assert chosen_UE.sum(dim=0).tolist() == [capacity] * len(margins[0])
    assert chosen_UE.tolist() == place_loops(margins, held, demand, capacity)
    with pytest.MonkeyPatch.context() as patch:  # as where nobody asks: a GPU
        patch.setattr(placing, "_settled", lambda *_: False)
        assert torch.equal(place(*given_EU, torch.tensor(demand), torch.tensor(capacity)).t(), chosen_UE)


@settings(deadline=None, max_examples=20)
@given(problem=problems())
def test_what_is_complete_stays(problem: tuple[list[list[float]], list[list[bool]], list[int], int]) -> None:
    margins, _, demand, capacity = problem
    margin_EU = torch.tensor(margins, dtype=torch.float64).t()
    nothing_EU = torch.zeros_like(margin_EU, dtype=torch.bool)
    complete_EU = place(margin_EU, nothing_EU, torch.tensor(demand), torch.tensor(capacity))
    again_EU = place(-margin_EU, complete_EU, torch.tensor(demand), torch.tensor(capacity))
    assert torch.equal(again_EU, complete_EU)


def test_rows_that_need_all_that_is_left_go_first() -> None:
    """By margin alone the last row would lose at both experts; by what is held, too."""
    margin_EU = torch.tensor([[9.0, 8.0, 0.0], [9.0, 8.0, 0.0]])
    demand_U, capacity = torch.tensor([1, 1, 2]), torch.tensor(2)
    chosen_EU = place(margin_EU, torch.zeros(2, 3, dtype=torch.bool), demand_U, capacity)
    assert chosen_EU.tolist() == [[True, False, True], [False, True, True]]
    held_EU = torch.tensor([[True, True, False], [False, False, True]])
    chosen_EU = place(margin_EU, held_EU, demand_U, capacity)
    assert chosen_EU.tolist() == [[True, False, True], [False, True, True]]

"""The balanced assignment: exact loads on every input, and how near it comes to the exact optimum (HiGHS)."""

from __future__ import annotations

import pytest
import torch
from base_layers_oracles import KINDS, best_sum, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moerouters_base_layers import balanced_assignment
from moerouters_base_layers.bidding import EPSILON


def assert_balanced(chosen_TE: Tensor, top_k: int, valid_T: Tensor | None = None) -> None:
    """K experts for every token that counts, none for the others, and loads that differ by one at most."""
    valid_T = torch.ones(chosen_TE.shape[0], dtype=torch.bool) if valid_T is None else valid_T
    assert torch.equal(chosen_TE.sum(dim=1), valid_T * top_k)
    load_E = chosen_TE.sum(dim=0)
    assert int(load_E.max() - load_E.min()) <= 1, load_E


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_loads_differ_by_one_at_most_whatever_the_scores(data: st.DataObject) -> None:
    T, E = data.draw(st.integers(0, 9), label="T"), data.draw(st.integers(1, 6), label="E")
    top_k, rounds = data.draw(st.integers(1, E), label="K"), data.draw(st.integers(0, 6), label="rounds")
    value = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-3, 200.0, 1e4, -1e4])
    rows = data.draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T), label="scores")
    valid_T = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T), label="valid"), dtype=torch.bool)
    scores_TE = torch.tensor(rows, dtype=torch.float32).reshape(T, E)
    chosen_TE = balanced_assignment(scores_TE, top_k=top_k, rounds=rounds, valid_T=valid_T)
    assert_balanced(chosen_TE, top_k, valid_T)
    # What does not count is never read.
    scores_TE[~valid_T] = float("nan")
    assert torch.equal(balanced_assignment(scores_TE, top_k=top_k, rounds=rounds, valid_T=valid_T), chosen_TE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "E", "top_k"), [(96, 8, 2), (90, 8, 3), (65, 4, 1)])
def test_it_is_near_the_exact_optimum(kind: str, T: int, E: int, top_k: int) -> None:
    scores_TE = scores_of(kind, T, E, torch.Generator().manual_seed(T))
    best, span = best_sum(scores_TE, top_k), float(scores_TE.max() - scores_TE.min())
    short = {}
    for rounds in (0, 16):
        chosen_TE = balanced_assignment(scores_TE, top_k=top_k, rounds=rounds)
        assert_balanced(chosen_TE, top_k)
        # In units of the largest difference of two scores, per pair.
        short[rounds] = (best - float(scores_TE[chosen_TE].sum())) / (span * T * top_k + 1e-12)
    assert min(short.values()) > -1e-9
    assert short[0] < 0.03  # worst of these 24 is 0.026, among whole numbers
    assert short[16] < EPSILON  # worst is 1e-16


def test_one_expert_per_token_is_the_linear_assignment_problem() -> None:
    """As in the paper: K = 1, T a multiple of E; scipy's own solver on copies of the experts."""
    scores_TE = scores_of("softmax", 128, 8, torch.Generator().manual_seed(1))
    copies = scores_TE.repeat_interleave(16, dim=1).numpy()
    rows, columns = linear_sum_assignment(copies, maximize=True)
    chosen_TE = balanced_assignment(scores_TE, top_k=1, rounds=1000)
    assert_balanced(chosen_TE, 1)
    assert float(scores_TE[chosen_TE].sum()) == pytest.approx(copies[rows, columns].sum(), abs=128 * EPSILON)


def test_a_balanced_top_k_is_left_alone() -> None:
    """Token t likes expert t best, then t + 1, and so on round the circle."""
    tokens_T1, experts_E = torch.arange(24).unsqueeze(1), torch.arange(8)
    scores_TE = -0.5 * ((experts_E - tokens_T1) % 8).float()
    best_TK = scores_TE.topk(3, dim=1).indices
    for rounds in (0, 16):
        chosen_TE = balanced_assignment(scores_TE, top_k=3, rounds=rounds)
        assert torch.equal(chosen_TE, torch.zeros(24, 8, dtype=torch.bool).scatter(1, best_TK, True))


@pytest.mark.parametrize("kind", ["softmax", "logits", "two blocks"])
def test_a_batch_given_twice_goes_both_times_where_it_went_alone(kind: str) -> None:
    scores_TE = scores_of(kind, 32, 8, torch.Generator().manual_seed(2))
    alone_TE = balanced_assignment(scores_TE, top_k=2)
    assert torch.equal(balanced_assignment(torch.cat([scores_TE, scores_TE]), top_k=2), alone_TE.repeat(2, 1))


def test_what_a_token_adds_to_all_experts_changes_nothing() -> None:
    scores_TE = scores_of("logits", 40, 8, torch.Generator().manual_seed(3))
    # Powers of two, so that no score is rounded.
    offset_T1 = 2.0 ** (torch.arange(40) % 3).unsqueeze(1)
    scores_TE = (scores_TE * 1024).round() / 1024
    assert torch.equal(balanced_assignment(scores_TE + offset_T1, top_k=2), balanced_assignment(scores_TE, top_k=2))


def test_few_tokens_spread_over_experts() -> None:
    """Fewer pairs than experts: each of them gets an expert of its own, the best it can."""
    scores_TE = torch.tensor([[3.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert balanced_assignment(scores_TE, top_k=1).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_repeats_bit_by_bit_under_deterministic_algorithms(dtype: torch.dtype) -> None:
    scores_TE = scores_of("sigmoid", 200, 8, torch.Generator().manual_seed(4)).to(dtype)
    first_TE = balanced_assignment(scores_TE, top_k=2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(balanced_assignment(scores_TE, top_k=2), first_TE)
    finally:
        torch.use_deterministic_algorithms(False)

"""The choice and its thresholds against loops over experts and tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_expert_choice.choice import LOWEST, choose_tokens, reached, share_of, thresholds

Table = list[list[float]]


def choose_loops(scores: Table, valid: list[bool], share: Fraction) -> set[tuple[int, int]]:
    """(token, expert) pairs; experts sort the tokens that count, the lower id first among equals."""
    pairs = set()
    for e in range(len(scores[0])):
        open_tokens = [t for t, row in enumerate(scores) if valid[t] and row[e] > LOWEST]
        open_tokens.sort(key=lambda t: (-scores[t][e], t))
        pairs |= {(t, e) for t in open_tokens[: math.floor(sum(valid) * share)]}
    return pairs


def threshold_loops(scores: Table, valid: list[bool], share: Fraction) -> list[float]:
    """Between the c-th and the next score, or at place ceil(c); places past the last score stand for the last."""
    wanted = sum(valid) * share
    found: list[float | None] = []
    for e in range(len(scores[0])):
        falling = sorted((row[e] for t, row in enumerate(scores) if valid[t] and row[e] > LOWEST), reverse=True)
        places = [math.ceil(wanted), math.floor(wanted) + 1]
        at = [falling[min(place, len(falling)) - 1] for place in places] if falling else []
        found.append(sum(at) / 2 if at else None)
    # The operator below gives 0 where there is nothing, and that counts as a threshold among others.
    highest = max(0.0 if value is None else value for value in found)
    return [highest if value is None else value for value in found]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, list[bool], Fraction]:
    """Scores that tie often, some of them closed, padding, and any share below 1."""
    T, E = draw(st.integers(1, 8), label="T"), draw(st.integers(1, 4), label="E")
    score = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 1e4, LOWEST])
    scores = draw(st.lists(st.lists(score, min_size=E, max_size=E), min_size=T, max_size=T), label="scores")
    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T), label="valid")
    share = draw(st.fractions(min_value=Fraction(1, 9), max_value=Fraction(8, 9), max_denominator=9), label="share")
    return scores, valid, share


@settings(deadline=None, max_examples=50)
@given(problem=problems())
def test_choice_and_thresholds_equal_the_loops(problem: tuple[Table, list[bool], Fraction]) -> None:
    scores, valid, share = problem
    valid_T = torch.tensor(valid)
    scores_TE = torch.where(valid_T.unsqueeze(1), torch.tensor(scores, dtype=torch.float64), LOWEST)
    token_ids_N, expert_ids_N = choose_tokens(scores_TE, valid_T.sum(), share)
    T, E = scores_TE.shape
    assert token_ids_N.shape == expert_ids_N.shape == (E * math.floor(T * share),)
    pairs = [pair for pair in zip(token_ids_N.tolist(), expert_ids_N.tolist(), strict=True) if pair[1] < E]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == choose_loops(scores, valid, share)
    if any(valid):
        assert thresholds(scores_TE, valid_T.sum(), share).tolist() == threshold_loops(scores, valid, share)


@settings(deadline=None, max_examples=30)
@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True), data=st.data())
def test_as_many_tokens_reach_a_threshold_as_an_expert_takes(numbers: list[int], data: st.DataObject) -> None:
    """Of n tokens without ties floor(n share) lie above it; where n share is not whole, the next one lies on it."""
    share = data.draw(st.fractions(Fraction(1, 9), Fraction(8, 9), max_denominator=9), label="share")
    scores_T1 = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)
    tokens = torch.tensor(len(numbers))
    threshold_E = thresholds(scores_T1, tokens, share)
    wanted = len(numbers) * share
    assert int((reached(scores_T1, threshold_E) > LOWEST).sum()) == math.ceil(wanted)
    # A batch given twice says what it said once.
    assert torch.equal(thresholds(scores_T1.repeat(2, 1), 2 * tokens, share), threshold_E)


def test_a_share_is_a_quotient_of_integers() -> None:
    """In floats 90 * 0.7 is 62.99999999999999."""
    share = share_of(top_k=7, num_experts=8, capacity=0.8)
    assert share == Fraction(7, 10)
    assert 90 * share.numerator // share.denominator == 63 != math.floor(90 * 0.7)
    assert share_of(top_k=2, num_experts=8, capacity=1.1) == Fraction(11, 40)
    assert share_of(top_k=2, num_experts=4, capacity=3) == 1


@pytest.mark.parametrize("T", [0, 1])
def test_too_few_tokens_for_a_whole_place(T: int) -> None:
    token_ids_N, expert_ids_N = choose_tokens(torch.zeros(T, 8), torch.tensor(T), Fraction(1, 4))
    assert token_ids_N.numel() == expert_ids_N.numel() == 0

"""The dual iterations against loops written from the paper, and against the exact optimum of the linear programme."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from moerouters import Gating
from moerouters_bip import dual_objective, solve_dual

INTERESTING = [0.0, 0.5, -0.5, 1.0, -1.0, 0.125, 1e4, -1e4]


def solve_dual_loops(
    scores: list[list[float]], q: list[float], *, top_k: int, iterations: int, variant: str, valid: list[bool]
) -> list[float]:
    """One token, one expert at a time; ranks as exact fractions. The mean is torch's: ties hang on its last bits."""
    tokens, experts = [t for t, real in enumerate(valid) if real], range(len(q))
    if not tokens or top_k == len(q):
        return q
    capacity = Fraction(len(tokens) * top_k, len(q))
    for step in range(iterations):
        p = {}
        for t in tokens:
            falling = sorted((scores[t][e] - q[e] for e in experts), reverse=True)
            p[t] = max(0.0, falling[top_k]) if variant == "published" else (falling[top_k - 1] + falling[top_k]) / 2
        new = []
        for e in experts:
            falling = sorted((scores[t][e] - p[t] for t in tokens), reverse=True)
            if variant == "published":
                new.append(max(0.0, falling[math.floor(capacity)]))
                continue
            # Place c + 1/2, counted from 1, on the line through the sorted values; the ends are flat.
            place = min(max(capacity + Fraction(1, 2), 1), len(falling))
            low = math.floor(place)
            after = falling[min(low, len(falling) - 1)]
            new.append(falling[low - 1] + (after - falling[low - 1]) * float(place - low))
        if variant == "published":
            q = new
            continue
        if step:
            wanted = [sum(scores[t][e] - p[t] > q[e] for t in tokens) for e in experts]
            off = max(abs(count - capacity) / capacity for count in wanted)
            further = max(0.6 - float(off), 0.0)
            new = [value + further * (value - old) for value, old in zip(new, q, strict=True)]
        mean = float(torch.tensor(new, dtype=torch.float64).mean())
        q = [value - mean for value in new]
    return q


@st.composite
def dual_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, list[bool]]:
    T, E = draw(st.integers(1, 7), label="T"), draw(st.integers(2, 5), label="E")
    top_k = draw(st.integers(1, E - 1), label="K")
    value = st.sampled_from(INTERESTING) | st.integers(-8, 8).map(lambda n: n / 8)
    scores = draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T), label="scores_TE")
    q = draw(st.lists(value, min_size=E, max_size=E), label="dual_E")
    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T), label="valid_T")
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(q, dtype=torch.float64), top_k, valid


@pytest.mark.parametrize("variant", ["centred", "published"])
@settings(deadline=None, max_examples=150)
@given(case=dual_cases(), iterations=st.integers(1, 4))
def test_solve_dual_equals_the_loops(
    variant: str, case: tuple[Tensor, Tensor, int, list[bool]], iterations: int
) -> None:
    scores_TE, dual_E, top_k, valid = case
    got_E = solve_dual(
        scores_TE,
        dual_E,
        top_k=top_k,
        iterations=iterations,
        variant=variant,
        valid_T=torch.tensor(valid),  # type: ignore[arg-type]
    )
    expected = solve_dual_loops(
        scores_TE.tolist(), dual_E.tolist(), top_k=top_k, iterations=iterations, variant=variant, valid=valid
    )
    torch.testing.assert_close(got_E, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def adversarial_scores(kind: str, T: int, E: int, generator: torch.Generator) -> Tensor:
    noise_TE = torch.rand(T, E, generator=generator, dtype=torch.float64)
    match kind:
        case "random softmax":
            return (4 * noise_TE).softmax(dim=-1)
        case "one expert dominates":
            return noise_TE * 0.1 + torch.eye(E, dtype=torch.float64)[0]
        case "two blocks":
            home_T = torch.arange(T) % 2
            return noise_TE * 0.01 + (torch.arange(E) % 2 == home_T.unsqueeze(1)).double()
        case "all equal":
            return torch.full((T, E), 0.5, dtype=torch.float64)
        case "one token repeated":
            return noise_TE[:1].expand(T, E).contiguous()
    raise AssertionError(kind)


def linear_programme_optimum(scores_TE: Tensor, top_k: int) -> float:
    """max sum s x, sum_e x = K, sum_t x = T K / E, 0 <= x <= 1, by HiGHS."""
    T, E = scores_TE.shape
    per_token = np.kron(np.eye(T), np.ones(E))
    per_expert = np.kron(np.ones(T), np.eye(E))
    found = linprog(
        -scores_TE.numpy().reshape(-1),
        A_eq=np.vstack([per_token, per_expert]),
        b_eq=np.concatenate([np.full(T, top_k), np.full(E, T * top_k / E)]),
        bounds=(0, 1),
        method="highs",
    )
    assert found.status == 0, found.message
    return -float(found.fun)


# Weak duality holds for every q; how near 14 iterations come depends on the scores. Coordinate descent moves one number
# at a time: in "two blocks" 17 tokens share room for 16.5, which only both duals of a block together could charge for.
GAP = {
    "random softmax": 0.005,
    "one expert dominates": 0.005,
    "two blocks": 0.016,
    "all equal": 0.0,
    "one token repeated": 0.005,
}


@pytest.mark.parametrize("kind", GAP)
@pytest.mark.parametrize(("T", "E", "top_k"), [(48, 8, 2), (50, 8, 3), (33, 4, 1)])
def test_dual_bounds_the_exact_optimum(kind: str, T: int, E: int, top_k: int, generator: torch.Generator) -> None:
    scores_TE = adversarial_scores(kind, T, E, generator)
    optimum = linear_programme_optimum(scores_TE, top_k)
    zero_E = torch.zeros(E, dtype=torch.float64)
    values = {
        n: float(dual_objective(scores_TE, solve_dual(scores_TE, zero_E, top_k=top_k, iterations=n), top_k=top_k))
        for n in (1, 4, 14, 60)
    }
    assert all(value >= optimum - 1e-9 * T for value in values.values()), (optimum, values)
    assert values[14] - optimum <= GAP[kind] * abs(optimum) + 1e-9, (optimum, values)
    assert values[60] <= values[1] + 1e-9


@pytest.mark.parametrize("T", [64, 61])
def test_routed_score_of_a_balanced_batch_is_the_optimum(T: int, generator: torch.Generator) -> None:
    """Where q balances exactly, what is routed must be the best balanced assignment, not just a balanced one."""
    scores_TE = adversarial_scores("random softmax", T, 8, generator)
    q_E = solve_dual(scores_TE, torch.zeros(8, dtype=torch.float64), top_k=2, iterations=200)
    ids_TK = (scores_TE - q_E).topk(2, dim=-1).indices
    load_E = torch.bincount(ids_TK.reshape(-1), minlength=8)
    assert load_E.max() - load_E.min() <= 2, load_E
    routed = float(scores_TE.gather(1, ids_TK).sum())
    assert routed == pytest.approx(linear_programme_optimum(scores_TE, 2), rel=0.005)


def test_no_expert_of_an_unpopular_group_starves(generator: torch.Generator) -> None:
    """Groups 0 and 1 of 4 win at every token at first; bids outside the kept groups must lift the other two."""
    gating = Gating.sigmoid(8, 2, num_groups=4, kept_groups=2)
    logits_TE = torch.randn(200, 8, generator=generator) + torch.tensor([3.0, 3, 3, 3, -3, -3, -3, -3])
    scores_TE = logits_TE.sigmoid()
    before_E = torch.bincount(gating.limit(scores_TE).topk(2, dim=-1).indices.reshape(-1), minlength=8)
    assert before_E[4:].sum() == 0
    q_E = solve_dual(scores_TE, torch.zeros(8), top_k=2, iterations=8, limit=gating.limit)
    load_E = torch.bincount(gating.limit(scores_TE - q_E).topk(2, dim=-1).indices.reshape(-1), minlength=8)
    assert load_E.min() > 25 and load_E.max() < 100, load_E


def test_tokens_without_a_choice_are_left_out() -> None:
    scores_TE = torch.rand(6, 4)
    only_two_T4 = torch.tensor([0.0, 0.0, -float("inf"), -float("inf")])
    q_E = torch.tensor([0.3, -0.3, 0.1, -0.1])
    solved_E = solve_dual(scores_TE, q_E, top_k=2, iterations=3, limit=lambda a: a + only_two_T4)
    assert torch.equal(solved_E, q_E)


@pytest.mark.parametrize(("T", "top_k"), [(0, 2), (5, 4)])
def test_nothing_to_solve_returns_the_committed_dual(T: int, top_k: int) -> None:
    q_E = torch.tensor([0.3, -0.3, 0.1, -0.1])
    assert torch.equal(solve_dual(torch.rand(T, 4), q_E, top_k=top_k, iterations=4), q_E)

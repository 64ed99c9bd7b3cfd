"""LongCat's rule against exact arithmetic, and what an update leaves."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moerouters import Gating
from moerouters_null_experts.budget import budget_step
from moerouters_null_experts.config import NullExpertsConfig
from moerouters_null_experts.router import NullExpertsRouter


def step_by_the_paper(load: list[int], tokens: int, *, N: int, K: int, share: Fraction) -> list[Fraction]:
    """db_i = mu (K_e / (K N) - T_i / (K T)) with mu = K N / K_e, so that rate * this is the step."""
    K_e = (1 - share) * K
    mu = K * N / K_e
    return [
        mu * (K_e / (K * N) - Fraction(count, K * tokens)) if i < N and tokens else Fraction(0)
        for i, count in enumerate(load)
    ]


@settings(max_examples=100, deadline=None)
@given(
    load=st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
    tokens=st.integers(0, 2**40),
    nulls=st.integers(0, 3),
    K=st.integers(1, 8),
    eighths=st.integers(1, 7),
)
@example(load=[2**24 + 1, 2**24], tokens=2**25, nulls=0, K=1, eighths=1)
def test_steps_follow_the_paper(load: list[int], tokens: int, nulls: int, K: int, eighths: int) -> None:
    share, N = Fraction(eighths, 8), len(load)
    whole = load + [0] * nulls
    step_E = budget_step(torch.tensor(whole), torch.tensor(tokens), num_real=N, wanted=float((1 - share) * K))
    expected = [float(step) for step in step_by_the_paper(whole, tokens, N=N, K=K, share=share)]
    assert step_E.dtype == torch.float64
    assert step_E.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_budget_met_in_balance_is_left_alone() -> None:
    router = NullExpertsRouter(Gating.softmax(4, 2), NullExpertsConfig(null_share=0.5, rate=0.1))
    router.update({"load_E": torch.tensor([6, 6, 6, 6]), "tokens": torch.tensor(24)})
    assert not router.expert_bias_E.any()
    assert router.experts_per_token.item() == 1.0


def test_an_update_moves_biases_and_notes_the_experts_per_token() -> None:
    config = NullExpertsConfig(source="gate", num_null=2, null_share=0.25, rate=0.5)
    router = NullExpertsRouter(Gating.softmax(5, 2), config)
    # 12 tokens want 1.5 real experts each: 6 for each of the three.
    router.update({"load_E": torch.tensor([12, 6, 0, 0, 0]), "tokens": torch.tensor(12)})
    assert router.expert_bias_E.tolist() == pytest.approx([-0.5, 0.0, 0.5, 0.0, 0.0])
    assert router.experts_per_token.item() == 1.5
    before_E = router.expert_bias_E.clone()
    router.update({"load_E": torch.zeros(5, dtype=torch.int64), "tokens": torch.tensor(0)})
    assert torch.equal(router.expert_bias_E, before_E) and router.experts_per_token.item() == 1.5
    router.reset_state()
    assert not router.expert_bias_E.any() and not router.experts_per_token.any()


def test_a_rate_of_zero_only_notes() -> None:
    router = NullExpertsRouter(Gating.softmax(4, 2), NullExpertsConfig(source="gate", num_null=1, rate=0, alpha=0.1))
    router.update({"load_E": torch.tensor([9, 1, 0, 0]), "tokens": torch.tensor(8)})
    assert not router.expert_bias_E.any() and router.experts_per_token.item() == 1.25

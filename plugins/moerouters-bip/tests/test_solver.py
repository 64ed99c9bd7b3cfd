"""Steps that go further: what they promise over plain coordinate descent. SOLVERS.md has the tables."""

from __future__ import annotations

import statistics

import pytest
import torch
from solver_study import COLD, Recipe, cold, further, plain, violation, warm

from moerouters import Gating
from moerouters.kernels.overshoot import FURTHER, overshoot
from moerouters.metrics import max_violation
from moerouters_bip import BipRouter, solve_dual


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_default_balances_the_first_skewed_batch(score: str) -> None:
    """E = 64, K = 8, T = 4096: at most 0.1 from q = 0, where plain top-K leaves more than 3."""
    logits_TE = Recipe(4096, 64, 8, "logits", 1.0).scores(0)
    router = BipRouter(getattr(Gating, score)(64, 8))
    assert max_violation(router.eval()(logits_TE).load_E) > 3
    assert max_violation(router.train()(logits_TE).load_E) <= 0.1


def test_near_balance_four_steps_leave_little_of_what_plain_ones_leave() -> None:
    for recipe in COLD[3:7]:
        ours, theirs = (cold(recipe, solver, 4, range(3)) for solver in (further, plain))
        assert statistics.mean(ours) < 0.65 * statistics.mean(theirs), recipe


@pytest.mark.parametrize("recipe", COLD[:-1], ids=str)
def test_never_worse_than_plain_steps(recipe: Recipe) -> None:
    """By more than three tokens at the fullest expert."""
    small = recipe._replace(tokens=recipe.tokens // 4)
    for steps in (2, 3, 4, 8):
        for ours, theirs in zip(*(cold(small, solver, steps, range(2)) for solver in (further, plain)), strict=True):
            assert ours <= theirs + 3 * small.num_experts / (small.tokens * small.top_k), (steps, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_follows_a_drift_better_than_plain_steps(drift: float) -> None:
    for recipe in (COLD[0], COLD[4], COLD[5]):
        ours, theirs = (warm(recipe, solver, 4, range(2), drift=drift) for solver in (further, plain))
        assert statistics.mean(ours) < 0.7 * statistics.mean(theirs) and max(ours) <= max(theirs), recipe


@pytest.mark.slow
def test_eight_steps_do_what_fourteen_plain_ones_do() -> None:
    for recipe in COLD[:7]:
        ours, theirs = cold(recipe, further, 8, range(4)), cold(recipe, plain, 14, range(4))
        tokens = recipe.num_experts / (recipe.tokens * recipe.top_k)
        assert statistics.mean(ours) <= statistics.mean(theirs) + tokens, recipe


def test_the_first_step_is_plain_and_so_is_every_published_one(generator: torch.Generator) -> None:
    scores_TE, zero_E = torch.rand(60, 6, generator=generator), torch.zeros(6)
    once_E = solve_dual(scores_TE, zero_E, top_k=2, iterations=1)
    assert torch.equal(once_E, plain(scores_TE, zero_E, 2, 1))
    assert not torch.equal(solve_dual(scores_TE, zero_E, top_k=2, iterations=2), plain(scores_TE, zero_E, 2, 2))
    q_E = zero_E
    for _ in range(3):
        q_E = solve_dual(scores_TE, q_E, top_k=2, iterations=1, variant="published")
    assert torch.equal(q_E, solve_dual(scores_TE, zero_E, top_k=2, iterations=3, variant="published"))


def test_how_much_further_a_step_goes() -> None:
    tokens = torch.tensor(40)  # 40 * 2 / 8 = 10 each
    balanced_E = torch.full((8,), 10)
    assert float(overshoot(balanced_E, tokens, 2)) == FURTHER
    for others, expected in ((12, 0.4), (8, 0.4), (16, 0.0), (0, 0.0), (80, 0.0)):
        wanted_E = balanced_E.clone()
        wanted_E[3] = others
        assert float(overshoot(wanted_E, tokens, 2)) == pytest.approx(expected, abs=1e-12), others
    assert 0 <= float(overshoot(torch.zeros(8, dtype=torch.int64), torch.tensor(0), 2)) <= FURTHER


def test_two_experts_are_balanced_exactly_at_once(generator: torch.Generator) -> None:
    """Here the step is exact, and nothing is left to go further by."""
    scores_TE = torch.rand(200, 2, generator=generator) + torch.tensor([0.3, 0.0])
    for steps in (1, 2, 3, 8):
        assert violation(scores_TE, further(scores_TE, torch.zeros(2), 1, steps), 1) == 0

"""Whole assignments against one token at a time: every gating, groups, correction bias, bounds, padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moerouters
from moerouters import Gating, RouteContext
from moerouters.errors import ConfigError
from moerouters_conformance import oracle
from moerouters_top_p.config import TopPConfig
from moerouters_top_p.router import TopPRouter

GATINGS = {
    "softmax": Gating.softmax(6, 2, renormalize=False),
    "sigmoid": Gating.sigmoid(6, 2),
    "sqrtsoftplus": Gating.sqrtsoftplus(6, 2),
    "softmax after top-k": Gating.softmax_after_topk(6, 2),
    "groups": Gating.softmax(6, 2, num_groups=3, kept_groups=2),
}


def slow_route(gating: Gating, logits: list[float], p: float, most: int) -> list[int]:
    """One token by the definition: best first, until the probabilities of the candidates are held to a share p."""
    settings = gating.settings
    scores = oracle.scores(settings, logits)
    E, size = settings.num_experts, settings.num_experts // settings.num_groups
    best = oracle.highest([max(scores[g * size : g * size + size]) for g in range(settings.num_groups)], E)
    candidates = [e for e in range(E) if e // size in best[: settings.kept_groups]]
    share = [math.exp(s - max(scores)) for s in scores] if settings.score == "identity" else scores
    wanted = p * sum(share[e] for e in candidates)
    chosen: list[int] = []
    for expert in sorted(candidates, key=lambda e: (-scores[e], e)):
        if len(chosen) == most or (chosen and sum(share[e] for e in chosen) >= wanted):
            break
        chosen.append(expert)
    return chosen


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(GATINGS)),
    # Irrational steps: no sum meets p exactly, where the oracle's own rounding would decide.
    rows=st.lists(st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True), max_size=4),
    p=st.floats(0.05, 0.97),
    most=st.integers(1, 7),
)
def test_routes_as_one_token_at_a_time(name: str, rows: list[list[int]], p: float, most: int) -> None:
    gating = GATINGS[name]
    router = TopPRouter(gating, TopPConfig(p=p, max_experts=most))
    logits = [[value * math.pi / 17 for value in row] for row in rows]
    assignment = router(torch.tensor(logits, dtype=torch.float64).reshape(-1, 6)).validate()
    assert assignment.expert_ids.shape == (len(rows), min(most, 6))
    for row, ids, weights in zip(logits, assignment.expert_ids.tolist(), assignment.weights.tolist(), strict=True):
        chosen = slow_route(gating, row, p, most)
        assert ids == chosen + [6] * (min(most, 6) - len(chosen))
        expected = oracle.weights(gating.settings, row, chosen)
        assert weights[: len(chosen)] == pytest.approx(expected, rel=1e-9)


def test_sure_tokens_get_one_expert_and_doubtful_ones_many() -> None:
    logits_TE = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0, 0], [0.0] * 8, [2.0, 2.0, 0, 0, 0, 0, 0, 0]])
    router = TopPRouter(Gating.softmax(8, 2), TopPConfig(p=0.6))
    assert (router(logits_TE).expert_ids < 8).sum(dim=1).tolist() == [1, 5, 2]


def test_ties_fall_to_the_lowest_id() -> None:
    router = TopPRouter(Gating.softmax(5, 2), TopPConfig(p=0.5))
    assert router(torch.zeros(1, 5)).expert_ids.tolist() == [[0, 1, 2, 5, 5]]


def test_a_correction_bias_orders_and_does_not_weigh() -> None:
    gating = Gating.sigmoid(4, 2, correction_bias=True, renormalize=False)
    gating.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    logits_TE = torch.tensor([[2.0, 1.0, -1.0, -2.0]], dtype=torch.float64)
    scores_E = logits_TE.sigmoid()[0]
    share_E = scores_E / scores_E.sum()
    p = float(share_E[3] + share_E[0]) - 1e-6
    assignment = TopPRouter(gating, TopPConfig(p=p))(logits_TE)
    assert assignment.expert_ids.tolist() == [[3, 0, 4, 4]]
    torch.testing.assert_close(assignment.weights[0, :2], scores_E[[3, 0]])


def test_scores_that_all_underflow_leave_one_expert() -> None:
    assignment = TopPRouter(Gating.sigmoid(3, 1))(torch.full((1, 3), -1e4)).validate()
    assert assignment.expert_ids.tolist() == [[0, 3, 3]]


def test_a_broken_row_shows() -> None:
    logits_TE = torch.tensor([[0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]])
    assignment = TopPRouter(Gating.softmax(3, 1))(logits_TE)
    assert int(assignment.nonfinite) == 2
    assert bool(assignment.weights.isnan().any(dim=1).all())


def test_padding_counts_nowhere() -> None:
    router = TopPRouter(Gating.softmax(4, 2))
    logits_TE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits_TE[3] = float("nan")
    padded = router(logits_TE, RouteContext(valid_T=torch.arange(5) != 3)).validate()
    plain = router(logits_TE[[0, 1, 2, 4]])
    assert torch.equal(padded.load_E, plain.load_E)
    for name, loss in plain.losses.items():
        torch.testing.assert_close(padded.losses[name], loss)


def test_losses_are_scaled_and_can_be_left_out() -> None:
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    losses = {
        (alpha, beta): TopPRouter(Gating.softmax(4, 2), TopPConfig(alpha=alpha, beta=beta))(logits_TE).losses
        for alpha in (0.0, 0.5)
        for beta in (0.0, 2.0)
    }
    assert [set(found) for found in losses.values()] == [set(), {"dynamic"}, {"balance"}, {"balance", "dynamic"}]
    entropy = torch.special.entr(logits_TE.softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(losses[0.0, 2.0]["dynamic"], 2 * entropy)
    assert moerouters.info("top-p").spec.capabilities.balanced_losses == {"balance": 0.01}
    assert not TopPRouter(Gating.softmax(4, 2), TopPConfig(alpha=0)).capabilities.balanced_losses


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": 0.0}, "p: input should be greater than 0"),
        ({"p": 1.5}, "p: input should be less than or equal to 1"),
        ({"max_experts": 0}, "max_experts: input should be greater than or equal to 1"),
        ({"alpha": -0.1}, "alpha: input should be greater than or equal to 0"),
        ({"top_p": 0.4}, "top_p: unknown field"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moerouters.build("top-p", Gating.softmax(4, 2), config=wrong)

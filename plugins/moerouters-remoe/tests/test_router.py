"""Selection, loss and coefficient against the paper's formulas in loops over tokens and experts."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import moerouters
from moerouters import Gating, MoELayer, RouteContext
from moerouters.errors import ConfigError
from moerouters_remoe.config import LEAST, MOST, RemoeConfig
from moerouters_remoe.router import RemoeRouter

Rows = list[list[float]]


def slow_loss(logits: Rows, valid: list[bool], K: int, scale: float) -> float:
    """scale * 1/T sum_t sum_e f_e R_te, with f_e = E / (K T) * (tokens whose R_te > 0)."""
    real = [row for row, is_real in zip(logits, valid, strict=True) if is_real]
    T = max(len(real), 1)
    total = 0.0
    for e in range(len(logits[0]) if logits else 0):
        active = sum(row[e] > 0 for row in real)
        for row in real:
            total += len(row) * active / (K * T) * max(row[e], 0.0)
    return scale * total / T


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rows, int, list[bool]]:
    E, T = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    value = st.sampled_from([0.0, -0.0, 1e-30, -1e-30]) | st.floats(-4, 4)
    rows = draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=T, max_size=T))
    return rows, draw(st.integers(1, E)), draw(st.lists(st.booleans(), min_size=T, max_size=T))


@settings(max_examples=150, deadline=None)
@given(case=cases(), scale=st.sampled_from([1e-8, 0.01, 3.0]))
def test_routes_and_costs_as_the_paper_says(case: tuple[Rows, int, list[bool]], scale: float) -> None:
    rows, K, valid = case
    E = len(rows[0]) if rows else 3
    K = min(K, E)
    router = RemoeRouter(Gating.relu(E, K), RemoeConfig(initial=scale))
    logits_TE = torch.tensor(rows, dtype=torch.float64).reshape(-1, E)
    assignment = router(logits_TE, RouteContext(valid_T=torch.tensor(valid, dtype=torch.bool))).validate()
    for row, real, ids, weights in zip(
        rows, valid, assignment.expert_ids.tolist(), assignment.weights.tolist(), strict=True
    ):
        assert ids == [e if real and row[e] > 0 else E for e in range(E)]
        assert weights == [row[e] if real and row[e] > 0 else 0.0 for e in range(E)]
    assert float(assignment.losses["l1"]) == pytest.approx(
        slow_loss(rows, valid, K, float(router.l1_scale)), rel=1e-9, abs=1e-300
    )
    active = sum(value > 0 for row, real in zip(rows, valid, strict=True) if real for value in row)
    assert assignment.stats["surplus"].dtype == torch.int64
    assert int(assignment.stats["surplus"]) == active - K * sum(valid)


@settings(max_examples=100, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), min_size=1, max_size=12),
    K=st.integers(1, 5),
)
def test_the_coefficient_follows_the_sparsity(loads: list[tuple[int, int]], K: int) -> None:
    """lambda_i = lambda_(i-1) * alpha ** sign((1 - K / E) - S_(i-1)), S the share of inactive pairs; in fractions."""
    E = 5
    router = RemoeRouter(Gating.relu(E, K), RemoeConfig(initial=0.5, factor=2.0))
    expected = Fraction(1, 2)
    for active, tokens in loads:
        active = min(active, E * tokens)
        router.update({"surplus": torch.tensor(active - K * tokens)})
        if tokens:
            missing = (1 - Fraction(K, E)) - (1 - Fraction(active, E * tokens))
            expected *= Fraction(2) ** ((missing > 0) - (missing < 0))
    assert float(router.l1_scale) == float(expected)
    assert router.l1_scale.dtype == torch.float32


def test_a_step_without_tokens_changes_no_bit() -> None:
    router = RemoeRouter(Gating.relu(4, 2), RemoeConfig(initial=0.3))
    before = router.l1_scale.clone()
    router.update(router(torch.zeros(0, 4)).stats)
    assert torch.equal(router.l1_scale, before)


@pytest.mark.parametrize(("surplus", "end"), [(1, MOST), (-1, LEAST)])
def test_the_coefficient_stays_in_reach(surplus: int, end: float) -> None:
    router = RemoeRouter(Gating.relu(4, 2))
    for _ in range(300):
        router.update({"surplus": torch.tensor(surplus)})
    assert float(router.l1_scale) == pytest.approx(end)
    for _ in range(115):
        router.update({"surplus": torch.tensor(-surplus)})
    assert float(router.l1_scale) == pytest.approx(end * 1.2 ** (-115 * surplus), rel=1e-4)


def test_large_loads_differ_by_one_pair() -> None:
    router = RemoeRouter(Gating.relu(4, 2), RemoeConfig(initial=1.0))
    surplus = torch.tensor(2**40 + 1) - 2**40
    router.update({"surplus": surplus})
    assert float(router.l1_scale) == pytest.approx(1.2)


def test_the_layer_is_continuous_where_an_expert_joins() -> None:
    """A top-k layer jumps where the K-th and the next expert change places; this one moves by as much as its logits."""
    torch.manual_seed(0)
    layer = MoELayer(RemoeRouter(Gating.relu(4, 2)), hidden_size=4, expert_size=8).double()
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4))
    x_D = torch.tensor([1.0, 0.5, -1.0, 0.0], dtype=torch.float64)
    outputs = []
    for last in (-1e-7, 1e-7):
        x_D[3] = last
        hidden, assignment = layer(x_D.unsqueeze(0))
        outputs.append((hidden.detach(), int(assignment.load_E.sum())))
    (before, few), (after, many) = outputs
    assert (few, many) == (2, 3)
    assert float((before - after).abs().max()) < 1e-6


def test_gradients_are_those_of_the_formulas() -> None:
    torch.manual_seed(1)
    router = RemoeRouter(Gating.relu(5, 2), RemoeConfig(initial=0.7))
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assignment = router(logits_TE)
    weights_grad_TE, loss_grad_TE = (
        torch.autograd.grad(value, logits_TE, retain_graph=True)[0]
        for value in (assignment.weights.sum(), assignment.losses["l1"])
    )
    active_TE = (logits_TE > 0).double()
    assert torch.equal(weights_grad_TE, active_TE)
    expected_TE = 0.7 * active_TE * 5 * active_TE.sum(dim=0) / (2 * 6) / 6
    torch.testing.assert_close(loss_grad_TE, expected_TE, rtol=1e-6, atol=0)


def test_closed_groups_are_inactive() -> None:
    gating = Gating.relu(6, 2, num_groups=3, kept_groups=1)
    logits_TE = torch.tensor([[1.0, 1.0, 5.0, 3.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert RemoeRouter(gating)(logits_TE).validate().expert_ids.tolist() == [[6, 6, 2, 3, 6, 6], [6] * 6]


def test_a_broken_row_shows() -> None:
    logits_TE = torch.tensor([[1.0, float("nan"), -1.0], [float("nan")] * 3])
    assignment = RemoeRouter(Gating.relu(3, 1))(logits_TE)
    assert int(assignment.nonfinite) == 2
    assert bool(assignment.weights.isnan().any(dim=1).all())


def test_padding_counts_nowhere() -> None:
    router = RemoeRouter(Gating.relu(3, 1), RemoeConfig(initial=1.0))
    logits_TE = torch.tensor([[1.0, 2.0, -1.0], [float("nan")] * 3, [0.5, -1.0, -1.0]])
    padded = router(logits_TE, RouteContext(valid_T=torch.tensor([True, False, True]))).validate()
    plain = router(logits_TE[[0, 2]])
    assert torch.equal(padded.losses["l1"], plain.losses["l1"])
    assert int(padded.stats["surplus"]) == int(plain.stats["surplus"]) == 1


@pytest.mark.parametrize(
    ("gating", "named"),
    [
        (Gating.softmax(4, 2), "score='softmax', renormalize=True"),
        (Gating.relu(4, 2, renormalize=True), "renormalize=True"),
        (Gating.relu(4, 2, correction_bias=True), "correction_bias=True"),
        (Gating.softmax_after_topk(4, 2), "score='identity'"),
    ],
)
def test_other_weights_are_refused(gating: Gating, named: str) -> None:
    with pytest.raises(ConfigError, match=r"fix .*Gating\.relu") as error:
        moerouters.build("remoe", gating)
    assert f"gating with {named}" in str(error.value)


@pytest.mark.parametrize("wrong", [{"initial": 0.0}, {"initial": 1e5}, {"factor": 1.0}, {"factor": 0.5}, {"alpha": 1}])
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RemoeConfig.model_validate(wrong)

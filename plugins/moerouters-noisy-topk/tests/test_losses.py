"""Importance, expected load and their variation against the paper's definitions in loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters import Gating
from moerouters_noisy_topk.losses import expected_load, importance, squared_variation

Rows = list[list[float]]


def slow_load(logits: Rows, noisy: Rows, std: Rows, valid: list[bool], K: int) -> list[float]:
    """Appendix A: Load_i = sum_x Phi((logit_i - kth_excluding(noisy, K, i)) / std_i)."""
    E = len(logits[0]) if logits else 0
    load = [0.0] * E
    for t, real in enumerate(valid):
        for i in range(E):
            others = sorted((noisy[t][e] for e in range(E) if e != i), reverse=True)
            bar = others[K - 1]
            chance = 0.5 * math.erfc(-(logits[t][i] - bar) / std[t][i] / math.sqrt(2))
            load[i] += chance if real else 0.0
    return load


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, Rows, Rows, list[bool], int]:
    E, T = draw(st.integers(2, 5)), draw(st.integers(1, 4))

    def rows(low: float, high: float) -> Rows:
        row = st.lists(st.floats(low, high), min_size=E, max_size=E)
        return draw(st.lists(row, min_size=T, max_size=T))

    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T))
    return rows(-3, 3), rows(-4, 4), rows(0.01, 3), valid, draw(st.integers(1, E - 1))


@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_the_load_is_that_of_appendix_a(batch: tuple[Rows, Rows, Rows, list[bool], int]) -> None:
    logits, noisy, std, valid, K = batch
    tensors = [torch.tensor(rows, dtype=torch.float64) for rows in (logits, noisy, std)]
    load_E = expected_load(*tensors, torch.tensor(valid), Gating.softmax(len(logits[0]), K))
    assert load_E.tolist() == pytest.approx(slow_load(logits, noisy, std, valid, K), rel=1e-9, abs=1e-12)


def test_the_load_is_the_chance_to_be_chosen_with_other_noise() -> None:
    """Drawn 40000 times anew for one expert, the noise of the others kept."""
    random = torch.Generator().manual_seed(0)
    logits_E, std_E = torch.randn(5, generator=random), torch.rand(5, generator=random) + 0.3
    noisy_E = logits_E + std_E * torch.randn(5, generator=random)
    chances_E = expected_load(
        logits_E.unsqueeze(0), noisy_E.unsqueeze(0), std_E.unsqueeze(0), torch.ones(1, dtype=torch.bool),
        Gating.softmax(5, 2),
    )  # fmt: skip
    for expert in range(5):
        draws_NE = noisy_E.repeat(40_000, 1)
        draws_NE[:, expert] = logits_E[expert] + std_E[expert] * torch.randn(40_000, generator=random)
        seen = (draws_NE.topk(2, dim=1).indices == expert).any(dim=1).double().mean()
        assert float(chances_E[expert]) == pytest.approx(float(seen), abs=0.01)


def test_the_load_is_differentiated_rightly() -> None:
    random = torch.Generator().manual_seed(1)
    logits_TE, noise_TE = (torch.randn(4, 5, dtype=torch.float64, generator=random) for _ in "ab")
    std_TE = torch.rand(4, 5, dtype=torch.float64, generator=random) + 0.2
    valid_T = torch.tensor([True, False, True, True])

    def load(logits_TE: torch.Tensor, std_TE: torch.Tensor) -> torch.Tensor:
        return expected_load(logits_TE, logits_TE + noise_TE * std_TE, std_TE, valid_T, Gating.softmax(5, 2))

    assert torch.autograd.gradcheck(load, (logits_TE.requires_grad_(), std_TE.requires_grad_()))


def test_importance_sums_weights_of_tokens_that_count() -> None:
    weights_TK = torch.tensor([[0.7, 0.3], [float("nan"), float("nan")], [1.0, 0.0]])
    ids_TK = torch.tensor([[2, 0], [1, 0], [2, 3]])
    sums_E = importance(weights_TK, ids_TK, torch.tensor([True, False, True]), 3)
    torch.testing.assert_close(sums_E, torch.tensor([0.3, 0.0, 1.7]))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0.001, 100), min_size=1, max_size=6))
def test_variation(values: list[float]) -> None:
    mean = sum(values) / len(values)
    expected = sum((value - mean) ** 2 for value in values) / len(values) / mean**2
    got = squared_variation(torch.tensor(values, dtype=torch.float64)).item()
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_variation_has_a_gradient_at_balance(value: float) -> None:
    values_E = torch.full((4,), value, requires_grad=True)
    loss = squared_variation(values_E)
    (gradient_E,) = torch.autograd.grad(loss, values_E)
    assert loss.item() == 0
    assert not gradient_E.any()

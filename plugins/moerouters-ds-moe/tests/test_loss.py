"""The mutual-information loss against loops over tokens and experts, in exact arithmetic where it has a known value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters_ds_moe.loss import entropy, mutual_information_loss


def alone(sums: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return sums, tokens


def loss_of(p_TE: Tensor, valid_T: Tensor | None = None) -> float:
    valid_T = torch.ones(len(p_TE), dtype=torch.bool) if valid_T is None else valid_T
    return float(mutual_information_loss(p_TE, valid_T, alone))


def by_loops(rows: list[list[float]]) -> float:
    """Eq. 4 and 5, as written."""

    def h(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    if not rows:
        return 0.0
    marginal = [sum(row[e] for row in rows) / len(rows) for e in range(len(rows[0]))]
    return -h(marginal) + sum(map(h, rows)) / len(rows)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_equations(data: st.DataObject) -> None:
    E, T = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6))
    logits = data.draw(st.lists(st.floats(-30, 30), min_size=T * E, max_size=T * E))
    valid = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    p_TE = torch.tensor(logits, dtype=torch.float64).reshape(T, E).softmax(dim=-1)
    rows = [row for row, real in zip(p_TE.tolist(), valid, strict=True) if real]
    found = loss_of(p_TE, torch.tensor(valid, dtype=torch.bool))
    assert found == pytest.approx(by_loops(rows), abs=1e-12)
    assert -math.log(E) - 1e-12 <= found <= 1e-12


def test_known_values() -> None:
    one_hot_balanced = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert loss_of(one_hot_balanced) == pytest.approx(-math.log(4), abs=1e-15)
    collapsed = torch.eye(4, dtype=torch.float64)[:1].expand(6, 4)
    uniform = torch.full((6, 4), 0.25, dtype=torch.float64)
    assert loss_of(collapsed) == pytest.approx(0, abs=1e-15)
    assert loss_of(uniform) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_where_probabilities_underflow(dtype: torch.dtype) -> None:
    logits_TE = torch.tensor([[0.0, -1e4, 1e4], [0.0, 0.0, 0.0], [300.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    loss = mutual_information_loss(logits_TE.softmax(dim=-1), torch.ones(3, dtype=torch.bool), alone)
    (gradient_TE,) = torch.autograd.grad(loss * 65536, logits_TE)
    assert bool(gradient_TE.isfinite().all())


def test_descent_spreads_tokens_over_experts_and_sharpens_each() -> None:
    logits_TE = 0.1 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before_TE = logits_TE.softmax(dim=-1)
    for _ in range(300):
        leaf = logits_TE.clone().requires_grad_()
        loss = mutual_information_loss(leaf.softmax(dim=-1), torch.ones(64, dtype=torch.bool), alone)
        logits_TE = logits_TE - 8.0 * torch.autograd.grad(loss, leaf)[0]
    after_TE = logits_TE.softmax(dim=-1)
    assert loss_of(before_TE) > -0.01 and loss_of(after_TE) < -1.2
    assert float(entropy(before_TE).mean()) > 1.3 and float(entropy(after_TE).mean()) < 0.2
    assert float(entropy(after_TE.mean(dim=0))) > 1.3

"""Both losses against loops, and where they are worth what."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_top_p.losses import balance_loss, dynamic_loss

Rows = list[list[float]]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, list[bool], list[int]]:
    E, T = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    logits = draw(st.lists(st.lists(st.floats(-9, 9), min_size=E, max_size=E), min_size=T, max_size=T))
    rows = torch.tensor(logits, dtype=torch.float64).reshape(T, E).softmax(dim=1).tolist()
    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T))
    return rows, valid, draw(st.lists(st.integers(0, 9), min_size=E, max_size=E))


@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_losses_are_those_of_the_loops(batch: tuple[Rows, list[bool], list[int]]) -> None:
    rows, valid, load = batch
    E, real = len(load), [row for row, is_real in zip(rows, valid, strict=True) if is_real]
    tokens = max(len(real), 1)
    entropy = sum(-value * math.log(value) for row in real for value in row) / tokens
    balance = sum(E * load[e] / max(sum(load), 1) * sum(row[e] for row in real) / tokens for e in range(E))
    probabilities_TE = torch.tensor(rows, dtype=torch.float64).reshape(-1, E)
    valid_T = torch.tensor(valid, dtype=torch.bool)
    assert dynamic_loss(probabilities_TE, valid_T).item() == pytest.approx(entropy, rel=1e-9, abs=1e-12)
    got = balance_loss(probabilities_TE, torch.tensor(load), valid_T)
    assert got.item() == pytest.approx(balance, rel=1e-9, abs=1e-12)


def test_their_values_at_the_ends() -> None:
    E, valid_T = 8, torch.ones(3, dtype=torch.bool)
    flat_TE, sure_TE = torch.full((3, E), 1 / E), torch.eye(E)[[0, 0, 0]]
    assert dynamic_loss(flat_TE, valid_T).item() == pytest.approx(math.log(E))
    assert dynamic_loss(sure_TE, valid_T).item() == 0
    assert balance_loss(flat_TE, torch.full((E,), 5), valid_T).item() == pytest.approx(1)
    assert balance_loss(sure_TE, torch.tensor([3] + [0] * (E - 1)), valid_T).item() == pytest.approx(E)


@pytest.mark.parametrize("spread", [0.0, 1.0, 50.0, 1e4])
def test_entropy_has_a_gradient_everywhere(spread: float) -> None:
    """Probabilities that underflow have the logarithm -inf."""
    logits_TE = (torch.linspace(-1, 1, 6) * spread).expand(3, 6).clone().requires_grad_()
    loss = dynamic_loss(logits_TE.softmax(dim=1), torch.tensor([True, False, True]))
    (gradient_TE,) = torch.autograd.grad(loss * 65536, logits_TE)
    assert bool(torch.isfinite(gradient_TE).all())
    assert not gradient_TE[1].any()


def test_entropy_is_differentiated_rightly() -> None:
    logits_TE = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid_T = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda x: dynamic_loss(x.softmax(dim=1), valid_T), (logits_TE,))

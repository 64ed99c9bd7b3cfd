"""The loss against loops over tokens and experts, and its scale."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters import Gating, RouteContext
from moerouters_null_experts.config import NullExpertsConfig
from moerouters_null_experts.router import NullExpertsRouter


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(value - max(row)) for value in row]
    return [part / sum(parts) for part in parts]


def loss_by_the_paper(logits: list[list[float]], ids: list[list[int]], valid: list[bool], *, num_null: int) -> float:
    """E sum_i f_i P_i with f_i the share of slots; the last num_null experts each with the mean of theirs."""
    tokens = [t for t, real in enumerate(valid) if real]
    if not tokens:
        return 0.0
    E = len(logits[0])
    counts = [float(sum(i in ids[t] for t in tokens)) for i in range(E - num_null)]
    empty = sum(i >= E - num_null for t in tokens for i in ids[t])
    counts += [empty / max(num_null, 1)] * num_null
    total = 0.0
    for i in range(E):
        P = sum(softmax(logits[t])[i] for t in tokens) / len(tokens)
        total += E * counts[i] / max(sum(counts), 1) * P
    return total


def loss_of(
    logits: list[list[float]], ids: list[list[int]], valid: list[bool], E: int, config: dict[str, object]
) -> Tensor:
    K = len(ids[0]) if ids else 1
    router = NullExpertsRouter(Gating.softmax(E, K), NullExpertsConfig.model_validate({"alpha": 1.0, **config}))
    ctx = RouteContext(
        valid_T=torch.tensor(valid, dtype=torch.bool),
        forced_ids_TK=torch.tensor(ids, dtype=torch.int64).reshape(-1, K),
    )
    loss: Tensor = router(torch.tensor(logits, dtype=torch.float64).reshape(-1, E), ctx).losses["balance"]
    return loss


@settings(max_examples=100, deadline=None)
@given(data=st.data(), E=st.integers(2, 6), T=st.integers(0, 6), gate=st.booleans())
def test_the_loss_follows_the_paper(data: st.DataObject, E: int, T: int, gate: bool) -> None:
    num_null = data.draw(st.integers(1, E - 1), label="num_null") if gate else 0
    K = data.draw(st.integers(1, E - num_null), label="K")
    quarter = st.integers(-12, 12).map(lambda n: n / 4)
    logits = data.draw(st.lists(st.lists(quarter, min_size=E, max_size=E), min_size=T, max_size=T))
    chosen = st.lists(st.integers(0, E - num_null - 1), min_size=K, max_size=K, unique=True)
    emptied = st.tuples(chosen, st.integers(0, K)).map(lambda drawn: drawn[0][: drawn[1]] + [E] * (K - drawn[1]))
    ids = data.draw(st.lists(emptied, min_size=T, max_size=T))
    valid = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    share = min(0.25, num_null / (2 * K)) if gate else 0.25
    config = {"source": "gate", "num_null": num_null, "null_share": share} if gate else {}
    found = loss_of(logits, ids, valid, E, config).item()
    assert found == pytest.approx(loss_by_the_paper(logits, ids, valid, num_null=num_null), rel=1e-12, abs=1e-12)


def test_null_experts_share_their_load() -> None:
    """Who of them the gate prefers costs nothing: only their sum does."""
    ids, valid, config = [[0, 4], [1, 4]], [True, True], {"source": "gate", "num_null": 2}
    one = loss_of([[0.0, 0.0, 3.0, -3.0]] * 2, ids, valid, 4, config)
    other = loss_of([[0.0, 0.0, -3.0, 3.0]] * 2, ids, valid, 4, config)
    even = loss_of([[0.0] * 4] * 2, ids, valid, 4, config)
    assert one.item() == other.item()
    assert even.item() == pytest.approx(1.0)


def test_the_scale_is_alpha_at_balance_and_e_alpha_at_collapse() -> None:
    assert loss_of([[0.0] * 4] * 4, [[0], [1], [2], [3]], [True] * 4, 4, {"alpha": 0.5}).item() == pytest.approx(0.5)
    collapsed = loss_of([[60.0, 0.0, 0.0, 0.0]] * 3, [[0]] * 3, [True] * 3, 4, {"alpha": 0.5})
    assert collapsed.item() == pytest.approx(2.0)


def test_gradients_are_slopes() -> None:
    torch.manual_seed(0)
    config = NullExpertsConfig(source="gate", num_null=2, alpha=1.0)
    router = NullExpertsRouter(Gating.softmax(6, 2), config)
    logits_TE = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ctx = RouteContext(valid_T=torch.arange(5) != 2, forced_ids_TK=router(logits_TE).expert_ids_TK)
    assert torch.autograd.gradcheck(lambda x: router(x, ctx).losses["balance"], (logits_TE,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [{}, {"source": "gate", "num_null": 1}], ids=["shared", "gate"])
def test_the_loss_is_computed_in_float32_or_better(dtype: torch.dtype, config: dict[str, object]) -> None:
    router = NullExpertsRouter(Gating.softmax(4, 2), NullExpertsConfig.model_validate({"alpha": 0.1, **config}))
    logits_TE = torch.randn(6, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = router(logits_TE).losses["balance"]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert logits_TE.grad is not None and logits_TE.grad.abs().sum() > 0

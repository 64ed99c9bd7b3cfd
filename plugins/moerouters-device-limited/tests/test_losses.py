"""The losses against loops over tokens, experts and devices, with the symbols of the paper, and their scale."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters import Gating, RouteContext
from moerouters_device_limited.config import DeviceLimitedConfig
from moerouters_device_limited.router import make_router

ALPHAS = {"expert_alpha": 0.5, "device_alpha": 0.25, "communication_alpha": 2.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A micro-batch and its assignment as plain lists; the id E is an empty slot."""

    D: int
    M: int
    E: int
    score: str
    logits: list[list[float]]
    ids: list[list[int]]
    valid: list[bool]


def probabilities(row: list[float], score: str) -> list[float]:
    if score == "softmax":
        parts = [math.exp(value - max(row)) for value in row]
    else:
        parts = [1 / (1 + math.exp(-value)) for value in row]
    return [part / sum(parts) for part in parts]


def losses_by_the_paper(case: Case) -> dict[str, float]:
    """Eq. 23 to 31 of arXiv:2405.04434; K_r T are the slots that hold an expert."""
    tokens = [t for t, real in enumerate(case.valid) if real]
    T, D, M, E = len(tokens), case.D, case.M, case.E
    members = [range(d * (E // D), (d + 1) * (E // D)) for d in range(D)]
    pairs = sum(e < E for t in tokens for e in case.ids[t])
    f = [E / max(pairs, 1) * sum(i in case.ids[t] for t in tokens) for i in range(E)]
    P = [sum(probabilities(case.logits[t], case.score)[i] for t in tokens) / max(T, 1) for i in range(E)]
    expert = sum(f[i] * P[i] for i in range(E))
    device = communication = 0.0
    for d in range(D):
        mass = sum(P[j] for j in members[d])
        device += sum(f[j] for j in members[d]) / len(members[d]) * mass
        sent = sum(any(e in members[d] for e in case.ids[t]) for t in tokens)
        communication += D / max(M * T, 1) * sent * mass
    found = {"expert": ALPHAS["expert_alpha"] * expert}
    if D > 1:  # with one device these are constants
        found["device"] = ALPHAS["device_alpha"] * device
        found["communication"] = ALPHAS["communication_alpha"] * communication
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    D, size, T = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    E = D * size
    M = draw(st.integers(1, D))
    K = draw(st.integers(1, M * size))
    row = st.lists(st.integers(-12, 12).map(lambda quarters: quarters / 4), min_size=E, max_size=E)
    # Any experts, also those that the limit would have refused, and empty slots: a forced assignment may hold them.
    ids = st.lists(st.integers(0, E - 1), min_size=K, max_size=K, unique=True)
    emptied = st.tuples(ids, st.integers(0, K)).map(lambda drawn: drawn[0][: drawn[1]] + [E] * (K - drawn[1]))
    return Case(
        D=D,
        M=M,
        E=E,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        logits=draw(st.lists(row, min_size=T, max_size=T)),
        ids=draw(st.lists(emptied, min_size=T, max_size=T)),
        valid=draw(st.lists(st.booleans(), min_size=T, max_size=T)),
    )


def losses_of(case: Case, **config: object) -> dict[str, Tensor]:
    K = len(case.ids[0]) if case.ids else 1
    gating = Gating._make(num_experts=case.E, top_k=K, score=case.score)
    alphas = ALPHAS | {"num_devices": case.D, "max_devices": case.M} | config
    logits_TE = torch.tensor(case.logits, dtype=torch.float64).reshape(-1, case.E)
    ctx = RouteContext(
        valid_T=torch.tensor(case.valid, dtype=torch.bool),
        forced_ids_TK=torch.tensor(case.ids, dtype=torch.int64).reshape(-1, K),
    )
    router = make_router(gating, DeviceLimitedConfig.model_validate(alphas))
    return dict(router(logits_TE, ctx).losses)


@settings(max_examples=120, deadline=None)
@given(case=cases())
@example(case=Case(D=1, M=1, E=1, score="softmax", logits=[], ids=[], valid=[]))
def test_losses_follow_the_paper(case: Case) -> None:
    found = {name: loss.item() for name, loss in losses_of(case).items()}
    assert found == pytest.approx(losses_by_the_paper(case), rel=1e-12, abs=1e-12)


def circulant(E: int) -> list[list[float]]:
    """E tokens whose logits are the same, each turned by one expert."""
    falling = [2.0 - 0.7 * place for place in range(E)]
    return [[falling[(e - t) % E] for e in range(E)] for t in range(E)]


def test_each_loss_is_its_coefficient_at_perfect_balance() -> None:
    """8 experts on 4 devices; token t takes experts t and t + 2, which never share a device: M = 2 are reached."""
    ids = [[t, (t + 2) % 8] for t in range(8)]
    case = Case(D=4, M=2, E=8, score="softmax", logits=circulant(8), ids=ids, valid=[True] * 8)
    found = {name: loss.item() for name, loss in losses_of(case).items()}
    assert found == pytest.approx({"expert": 0.5, "device": 0.25, "communication": 2.0})


def test_at_collapse_they_grow_to_e_d_and_d_over_m_times_that() -> None:
    logits = [[40.0] + [-40.0] * 7] * 5
    case = Case(D=4, M=2, E=8, score="softmax", logits=logits, ids=[[0]] * 5, valid=[True] * 5)
    found = {name: loss.item() for name, loss in losses_of(case).items()}
    assert found == pytest.approx({"expert": 0.5 * 8, "device": 0.25 * 4, "communication": 2.0 * 4 / 2})


def test_experts_may_be_balanced_where_devices_are_not_reached_alike() -> None:
    """`communication` sees what the other two cannot: device 0 serves every token with both of its experts."""
    ids = [[0, 1], [0, 1], [2, 4], [3, 5]]  # loads 2 2 1 1 1 1: devices 0, 1, 2 hold two experts each
    uniform = Case(D=3, M=3, E=6, score="softmax", logits=[[0.0] * 6] * 4, ids=ids, valid=[True] * 4)
    assert losses_of(uniform)["communication"].item() == pytest.approx(2.0 * (2 + 2 + 2) / 3 / 4)
    assert losses_of(uniform)["device"].item() == pytest.approx(0.25)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_are_slopes(score: str) -> None:
    torch.manual_seed(0)
    gating = Gating._make(num_experts=6, top_k=2, score=score)
    config = DeviceLimitedConfig.model_validate({"num_devices": 3, "max_devices": 2, **ALPHAS})
    router = make_router(gating, config)
    logits_TE = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ctx = RouteContext(valid_T=torch.arange(5) != 2, forced_ids_TK=router(logits_TE).expert_ids_TK)
    for name in ("expert", "device", "communication"):
        assert torch.autograd.gradcheck(lambda x, name=name: router(x, ctx).losses[name], (logits_TE,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_better(dtype: torch.dtype) -> None:
    config = DeviceLimitedConfig(num_devices=2, max_devices=1)
    logits_TE = torch.randn(6, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_router(Gating.softmax(4, 2), config)(logits_TE).losses
    assert {loss.dtype for loss in found.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    torch.stack(list(found.values())).sum().backward()
    assert logits_TE.grad is not None and logits_TE.grad.abs().sum() > 0


def test_a_coefficient_of_zero_leaves_its_loss_out() -> None:
    case = Case(D=2, M=1, E=4, score="softmax", logits=[[0.0] * 4], ids=[[0, 1]], valid=[True])
    assert losses_of(case, expert_alpha=0, device_alpha=0).keys() == {"communication"}
    assert losses_of(case, expert_alpha=0, device_alpha=0, communication_alpha=0) == {}

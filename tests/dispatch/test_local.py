"""The plan and the local back-end against loops over pairs."""

import pytest
import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.plan import make_plan
from moerouters.kernels.counts import count_experts

E, D = 4, 3


def assignment_of(kind: AssignmentKind, tokens: int) -> Assignment:
    """A random one with empty places."""
    random = torch.Generator().manual_seed(tokens)
    weights = torch.rand(tokens, 2, generator=random, dtype=torch.float64)
    expert_ids = torch.stack([torch.randperm(E + 1, generator=random)[:2] for _ in range(tokens)] or [torch.zeros(2)])
    expert_ids = expert_ids[:tokens].long()
    if kind is AssignmentKind.DENSE:
        expert_ids = torch.arange(E).expand(tokens, E)
        weights = torch.rand(tokens, E, generator=random, dtype=torch.float64)
    token_ids_N = None
    if kind is AssignmentKind.PAIRS:
        mixed = torch.randperm(tokens * 2, generator=random)
        token_ids_N = torch.arange(tokens).repeat_interleave(2)[mixed]
        expert_ids, weights = expert_ids.reshape(-1)[mixed], weights.reshape(-1)[mixed]
    weights = weights.masked_fill(expert_ids == E, 0)
    return Assignment(
        kind=kind,
        num_tokens=tokens,
        num_experts=E,
        expert_ids=expert_ids,
        weights=weights,
        token_ids_N=token_ids_N,
        load_E=count_experts(expert_ids, E),
        tokens=torch.tensor(tokens),
        nonfinite=torch.tensor(0),
    ).validate()


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", AssignmentKind)
def test_plan_groups_pairs_by_expert(kind: AssignmentKind, tokens: int) -> None:
    assignment = assignment_of(kind, tokens)
    plan = make_plan(assignment)
    token_ids, expert_ids, _ = (part.tolist() for part in assignment.pairs())
    expected = sorted(range(len(expert_ids)), key=lambda n: expert_ids[n])  # stable; empty places last
    assert plan.order_N.tolist() == expected
    assert plan.order_N[plan.inverse_N].tolist() == list(range(len(expert_ids)))
    assert plan.token_ids_N.tolist() == token_ids
    assert torch.equal(plan.kept_load_E, assignment.load_E)
    assert plan.slots_per_token == {"slots": 2, "dense": E, "pairs": None}[kind]


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", AssignmentKind)
def test_there_and_back(kind: AssignmentKind, tokens: int) -> None:
    """Experts that scale by e + 1; the oracle walks over pairs. Values and gradients."""
    assignment = assignment_of(kind, tokens)
    plan, local = make_plan(assignment), LocalDispatcher()
    x_TD = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = assignment.weights.clone().requires_grad_()

    arrival = local.dispatch(x_TD, plan).wait()
    x_RD, load_e = arrival.x_RD, arrival.load_e
    experts_R = torch.repeat_interleave(torch.arange(E), load_e)
    scale_R1 = torch.cat([experts_R + 1, torch.zeros(len(x_RD) - len(experts_R))]).unsqueeze(1)
    y_TD = local.combine(x_RD * scale_R1, arrival, weights).wait()

    rows = [torch.zeros(D, dtype=torch.float64) for _ in range(tokens)]
    token_ids, expert_ids, _ = assignment.pairs()
    flat_weights = weights.reshape(-1)
    for n, (t, e) in enumerate(zip(token_ids.tolist(), expert_ids.tolist(), strict=True)):
        if e < E:
            rows[t] = rows[t] + flat_weights[n] * x_TD[t] * (e + 1)
    expected_TD = torch.stack(rows) if rows else x_TD * 0
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-14)
    if tokens:
        for mine, right in zip(gradients(y_TD, x_TD, weights), gradients(expected_TD, x_TD, weights), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


def gradients(y_TD: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y_TD.square().sum(), inputs, materialize_grads=True, allow_unused=True)


def test_combining_happens_in_the_dtype_of_the_weights() -> None:
    """Also under autocast, whose batched matrix product would round the weights to bfloat16."""
    assignment = assignment_of(AssignmentKind.SLOTS, 9)
    weights = assignment.weights.float()
    local = LocalDispatcher()
    arrival = local.dispatch(torch.zeros(9, D), make_plan(assignment)).wait()
    y_RD = torch.randn(18, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    outside = local.combine(y_RD, arrival, weights).wait()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = local.combine(y_RD, arrival, weights).wait()
    assert outside.dtype == inside.dtype == torch.float32
    assert torch.equal(inside, outside)

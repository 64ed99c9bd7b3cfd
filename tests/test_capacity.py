"""limit_capacity against a queue per expert."""

import pytest
import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind, Gating, RouteContext, Router, Selection, limit_capacity
from moerouters.errors import ConfigError

T, E, K = 12, 3, 2


class AsPairs(Router):
    """Top-k, handed out as pairs in shuffled order, one of them empty."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = adjusted_TE.topk(K, dim=-1).indices
        tokens_TK = torch.arange(len(ids_TK)).unsqueeze(1).expand_as(ids_TK)
        order = torch.randperm(ids_TK.numel(), generator=torch.Generator().manual_seed(3))
        expert_ids_N = ids_TK.reshape(-1)[order]
        expert_ids_N[4] = E
        return Selection.pairs(tokens_TK.reshape(-1)[order], expert_ids_N)


def route(kind: str, logits_TE: Tensor | None = None) -> Assignment:
    if logits_TE is None:
        logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.0, -1.0])
    router = AsPairs if kind == "pairs" else Router
    ctx = RouteContext(valid_T=torch.arange(len(logits_TE)) != 5)
    return router(Gating.softmax(E, K))(logits_TE, ctx).validate()


def queue_oracle(assignment: Assignment, capacity: int, policy: str) -> list[bool]:
    """Which places are dropped, place by place."""
    _, expert_ids, weights = (part.tolist() for part in assignment.pairs())
    places = list(range(len(expert_ids)))
    if policy == "weight":
        places.sort(key=lambda n: -weights[n])
    elif assignment.kind is AssignmentKind.SLOTS:
        places.sort(key=lambda n: n % K)
    taken = [0] * (E + 1)
    dropped = [False] * len(places)
    for n in places:
        if expert_ids[n] < E:
            dropped[n] = taken[expert_ids[n]] >= capacity
            taken[expert_ids[n]] += 1
    return dropped


@pytest.mark.parametrize("capacity", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("policy", ["position", "weight"])
@pytest.mark.parametrize("kind", ["slots", "pairs"])
def test_who_stays(kind: str, policy: str, capacity: int) -> None:
    assignment = route(kind)
    limited = limit_capacity(assignment, capacity, policy).validate()
    dropped = torch.tensor(queue_oracle(assignment, capacity, policy)).reshape(assignment.expert_ids.shape)
    assert torch.equal(limited.expert_ids, assignment.expert_ids.masked_fill(dropped, E))
    assert torch.equal(limited.weights, assignment.weights.masked_fill(dropped, 0))
    assert int(limited.dropped) == int(dropped.sum())
    assert torch.equal(limited.load_E, assignment.load_E)
    kept = limited.expert_ids[limited.expert_ids < E].bincount(minlength=E)
    assert int(kept.max()) <= capacity


def test_equal_weights_are_kept_by_token() -> None:
    logits_TE = torch.zeros(6, E)
    limited = limit_capacity(route("slots", logits_TE), 2, "weight")
    assert limited.expert_ids[:, 0].tolist() == [0, 0, E, E, E, E]


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_dropped_weights_get_no_gradient(policy: str) -> None:
    assignment = route("slots")
    weights = assignment.weights.detach().requires_grad_()
    limited = limit_capacity(
        Assignment(
            **{name: getattr(assignment, name) for name in assignment.__dataclass_fields__} | {"weights": weights}
        ),
        2,
        policy,
    )
    (gradient,) = torch.autograd.grad(limited.weights.sum(), weights)
    dropped = (limited.expert_ids == E) & (assignment.expert_ids < E)
    assert torch.equal(gradient != 0, ~dropped)


def test_drops_add_up() -> None:
    assignment = route("slots")
    twice = limit_capacity(limit_capacity(assignment, 4), 2)
    assert int(twice.dropped) == int(limit_capacity(assignment, 2).dropped)


def test_no_tokens() -> None:
    limited = limit_capacity(Router(Gating.softmax(E, K))(torch.zeros(0, E)), 3)
    assert limited.expert_ids.shape == (0, K)
    assert int(limited.dropped) == 0


@pytest.mark.parametrize(("capacity", "policy"), [(-1, "position"), (3, "random")])
def test_wrong_arguments(capacity: int, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"limit_capacity was given capacity={capacity}, policy='{policy}'"):
        limit_capacity(route("slots"), capacity, policy)

"""Assignments: every invariant is checked, and every kind becomes slots."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from moerouters import Assignment, AssignmentKind, Gating, RouteContext, Router, Selection
from moerouters.errors import AssignmentError, ContextError

E = 4


def slots(**changes: Any) -> Assignment:
    good = Assignment(
        kind=AssignmentKind.SLOTS,
        num_tokens=3,
        num_experts=E,
        expert_ids=torch.tensor([[0, 1], [2, E], [E, E]]),
        weights=torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]),
        load_E=torch.tensor([1, 1, 1, 0]),
        tokens=torch.tensor(2),
        nonfinite=torch.tensor(0),
    )
    return replace(good, **changes)


def pairs(**changes: Any) -> Assignment:
    good = slots(
        kind=AssignmentKind.PAIRS,
        token_ids_N=torch.tensor([2, 0, 1, 2, 0]),
        expert_ids=torch.tensor([3, 1, E, 0, 0]),
        weights=torch.tensor([0.5, 0.25, 0.0, 0.125, 1.0]),
        load_E=torch.tensor([2, 1, 0, 1]),
    )
    return replace(good, **changes)


def test_good_ones_pass_and_come_back() -> None:
    for good in (slots(), pairs(), slots(dropped=torch.tensor(3), load_E=torch.tensor([2, 2, 2, 0]))):
        assert good.validate() is good


RULES: dict[str, tuple[Assignment, str]] = {
    "id too large": (slots(expert_ids=torch.tensor([[0, 5], [2, E], [E, E]])), r"token 0: expert_ids = \[0, 5\]"),
    "id negative": (slots(expert_ids=torch.tensor([[0, 1], [-1, E], [E, E]])), r"token 1: (.|\n)*ids lie in \[0, 4\]"),
    "token too large": (pairs(token_ids_N=torch.tensor([2, 0, 1, 3, 0])), r"token ids lie in \[0, T\)"),
    "token negative": (pairs(token_ids_N=torch.tensor([2, 0, -1, 2, 0])), r"token ids lie in \[0, T\)"),
    "weight NaN": (slots(weights=torch.tensor([[torch.nan, 0.2], [1, 0], [0, 0]])), "combine weights are finite"),
    "weight inf": (slots(weights=torch.tensor([[torch.inf, 0.2], [1, 0], [0, 0]])), "combine weights are finite"),
    "weight negative": (slots(weights=torch.tensor([[-0.5, 0.2], [1, 0], [0, 0]])), "combine weights are not negative"),
    "empty with a weight": (
        slots(weights=torch.tensor([[0.5, 0.2], [1, 0.1], [0, 0]])),
        "an empty place carries weight 0",
    ),
    "an expert twice": (
        slots(expert_ids=torch.tensor([[1, 1], [2, E], [E, E]])),
        "token 0: (.|\n)*no expert stands twice at one token",
    ),
    "an expert twice in pairs": (
        pairs(expert_ids=torch.tensor([3, 1, E, 3, 0])),
        "token 2: (.|\n)*no expert stands twice",
    ),
    "a wrong load": (
        slots(load_E=torch.tensor([1, 1, 2, 0])),
        r"load_E = \[1, 1, 2, 0\], but the ids count \[1, 1, 1, 0\]",
    ),
    "slots of rank 1": (slots(expert_ids=torch.tensor([0, 1, 2])), r"of kind 'slots' have shape \[3\] with T=3, E=4"),
    "slots for other tokens": (slots(num_tokens=4), r"have shape \[3, 2\] with T=4"),
    "more slots than experts": (
        slots(expert_ids=torch.full((3, 5), E), weights=torch.zeros(3, 5)),
        r"have shape \[3, 5\] with T=3, E=4",
    ),
    "dense and narrow": (slots(kind=AssignmentKind.DENSE), "of kind 'dense' have shape"),
    "pairs without tokens": (pairs(token_ids_N=None), "of kind 'pairs' have shape"),
    "weights of another shape": (slots(weights=torch.ones(3, 1)), r"weights have shape \[3, 1\], expert_ids \[3, 2\]"),
    "ids of another dtype": (slots(expert_ids=slots().expert_ids.int()), r"expert_ids are torch\.int32"),
    "load of another dtype": (slots(load_E=torch.ones(E)), r"load_E is torch\.float32 of shape \[4\]"),
    "load of another length": (slots(load_E=torch.tensor([1, 1, 1])), r"load_E is torch\.int64 of shape \[3\]"),
    "a loss with a shape": (slots(losses={"x": torch.zeros(1)}), "a loss is not 0-d"),
}


@pytest.mark.parametrize(("broken", "message"), RULES.values(), ids=RULES.keys())
def test_every_rule_is_checked(broken: Assignment, message: str) -> None:
    with pytest.raises(AssignmentError, match=message):
        broken.validate()


def test_the_first_broken_place_is_shown() -> None:
    with pytest.raises(AssignmentError) as caught:
        RULES["an expert twice"][0].validate()
    assert str(caught.value).splitlines() == [
        "token 0: expert_ids = [1, 1], weights = [0.75, 0.25].",
        "  cause  no expert stands twice at one token (E = 4)",
        "  fix    mend the router's select, or the gating's weigh",
    ]


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        slots().num_tokens = 4
    with pytest.raises(FrozenInstanceError):
        RouteContext().num_sequences = 4


def test_pairs_of_slots_go_token_by_token() -> None:
    token_ids_N, expert_ids_N, weights_N = slots().pairs()
    assert token_ids_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert expert_ids_N.tolist() == [0, 1, 2, E, E, E]
    assert weights_N.tolist() == [0.75, 0.25, 1, 0, 0, 0]


def test_pairs_refuse_to_be_read_as_slots() -> None:
    assert torch.equal(slots().expert_ids_TK, slots().expert_ids)
    assert torch.equal(slots().weights_TK, slots().weights)
    for name in ("expert_ids_TK", "weights_TK"):
        with pytest.raises(AssignmentError, match="this assignment is a list of pairs, it has no expert_ids_TK"):
            getattr(pairs(), name)


def test_with_slots() -> None:
    ids_TK, weights_TK = pairs().with_slots(2)
    assert ids_TK.tolist() == [[1, 0], [E, E], [3, 0]]
    assert weights_TK.tolist() == [[0.25, 1], [0, 0], [0.5, 0.125]]
    assert pairs().with_slots()[0].tolist() == [[1, 0, E, E], [E, E, E, E], [3, 0, E, E]]
    assert pairs().with_slots(1)[0].tolist() == [[1], [E], [3]]
    assert torch.equal(slots().with_slots()[0], slots().expert_ids)


@pytest.mark.parametrize("assignment", [slots(), pairs()], ids=["slots", "pairs"])
def test_to_slots_knows_no_empty_slots(assignment: Assignment) -> None:
    ids_TK, weights_TK = assignment.to_slots()
    own_ids_TK, own_weights_TK = assignment.with_slots()
    taken_TK = own_ids_TK < E
    assert bool(((ids_TK >= 0) & (ids_TK < E)).all())
    assert torch.equal(ids_TK[taken_TK], own_ids_TK[taken_TK])
    assert torch.equal(weights_TK, own_weights_TK)
    assert not weights_TK[~taken_TK].any()


def test_fillers_spread_over_the_experts() -> None:
    empty = slots(
        num_tokens=8,
        expert_ids=torch.full((8, 2), E),
        weights=torch.zeros(8, 2),
        load_E=torch.zeros(E, dtype=torch.int64),
    )
    assert empty.validate().to_slots()[0].flatten().bincount().tolist() == [4] * E


def test_weights_of_pairs_stay_differentiable_as_slots() -> None:
    weights = pairs().weights.clone().requires_grad_()
    slopes_TK = torch.arange(6.0).reshape(3, 2)
    (gradient,) = torch.autograd.grad((pairs(weights=weights).to_slots(2)[1] * slopes_TK).sum(), weights)
    assert gradient.tolist() == [4, 0, 0, 5, 1]


def test_no_tokens_in_any_kind() -> None:
    empty = Router(Gating.softmax(E, 2))(torch.zeros(0, E))
    assert empty.to_slots()[0].shape == (0, 2)
    none = torch.zeros(0, dtype=torch.int64)
    no_pairs = pairs(
        num_tokens=0, token_ids_N=none, expert_ids=none, weights=torch.zeros(0), load_E=torch.zeros(E).long()
    )
    assert no_pairs.validate().to_slots()[0].shape == (0, E)


def test_selections() -> None:
    dense = Selection.dense(num_tokens=2, num_experts=3, device=torch.device("cpu"))
    assert dense.kind is AssignmentKind.DENSE
    assert dense.expert_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_context_says_what_it_misses() -> None:
    ctx = RouteContext(token_ids_T=torch.tensor([1]))
    assert ctx.need("token_ids_T", router="mine").tolist() == [1]
    with pytest.raises(ContextError) as caught:
        ctx.need("noise_key", router="mine")
    assert str(caught.value).splitlines() == [
        "router 'mine' needs noise_key, and the RouteContext has none.",
        "  cause  this router's choice or loss depends on it; it is never guessed",
        "  fix    pass RouteContext(noise_key=...) to the layer or router",
    ]

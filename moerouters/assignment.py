"""Assignment: which experts get which tokens with which weight, as a router hands it out; its invariants, as checks.

The checks synchronise with the device and are never called in the hot path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.errors import AssignmentError


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which experts get which tokens with which weight, and the losses and stats that go with it.

    `kind` says how to read `expert_ids` and `weights`, which have one shape: [T, K] for SLOTS, [T, E] for DENSE (slot
    e is expert e), [N] for PAIRS, whose tokens stand in `token_ids_N`. The id `num_experts` marks an empty place.
    """

    kind: AssignmentKind
    num_tokens: int
    num_experts: int
    expert_ids: Tensor
    weights: Tensor
    token_ids_N: Tensor | None = None
    load_E: Tensor
    """int64 [E], routed pairs per expert before any dropping; padding counts nowhere."""
    tokens: Tensor
    """int64 0-d, tokens that are neither padding nor non-finite."""
    nonfinite: Tensor
    """int64 0-d, tokens whose logits hold NaN or infinity."""
    dropped: Tensor | None = None
    """int64 0-d, pairs that `limit_capacity` took away; None where no capacity was set."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """0-d losses, already scaled by the router's own coefficients."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """What `Router.update` needs; adds up over micro-batches and ranks. Empty when the assignment was forced."""

    @property
    def expert_ids_TK(self) -> Tensor:
        """int64 [T, K]; for PAIRS convert with `to_slots` first."""
        if self.kind is AssignmentKind.PAIRS:
            raise AssignmentError(
                "this assignment is a list of pairs, it has no expert_ids_TK.",
                why="an expert-choice or threshold router gives tokens a varying number of experts",
                fix="use token_ids_N, expert_ids and weights, or to_slots()",
            )
        return self.expert_ids

    @property
    def weights_TK(self) -> Tensor:
        """[T, K], in the order of `expert_ids_TK`."""
        self.expert_ids_TK  # noqa: B018  (raises for pairs)
        return self.weights

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """token_ids_N, expert_ids_N, weights_N of every place, empty ones included; what a DispatchPlan is made of."""
        if self.token_ids_N is not None:
            return self.token_ids_N, self.expert_ids, self.weights
        tokens_T = torch.arange(self.num_tokens, device=self.expert_ids.device)
        token_ids_N = tokens_T.unsqueeze(1).expand_as(self.expert_ids).reshape(-1)
        return token_ids_N, self.expert_ids.reshape(-1), self.weights.reshape(-1)

    def with_slots(self, num_slots: int | None = None) -> tuple[Tensor, Tensor]:
        """(expert_ids_TK, weights_TK) of any kind; empty slots keep the id E.

        num_slots is the width for PAIRS (default E, which always suffices); a token's pairs past it are left out.
        """
        if self.kind is AssignmentKind.PAIRS:
            return _pairs_to_slots(self, num_slots or self.num_experts)
        return self.expert_ids, self.weights

    def to_slots(self, num_slots: int | None = None) -> tuple[Tensor, Tensor]:
        """`with_slots` for code that knows no empty slots: an empty slot gets a valid id and weight 0.

        The filler ids are spread round robin, so the wasted work does not pile up on one expert.
        """
        ids_TK, weights_TK = self.with_slots(num_slots)
        empty_TK = ids_TK == self.num_experts
        places_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).reshape(ids_TK.shape)
        filler_TK = places_TK % self.num_experts
        return torch.where(empty_TK, filler_TK, ids_TK), weights_TK.masked_fill(empty_TK, 0)

    def validate(self) -> Assignment:
        """Check every invariant on the host and return self; raise AssignmentError at the first that is broken."""
        validate_assignment(self)
        return self


def _pairs_to_slots(assignment: Assignment, num_slots: int) -> tuple[Tensor, Tensor]:
    token_ids_N, expert_ids_N, weights_N = assignment.pairs()
    T, E = assignment.num_tokens, assignment.num_experts
    # Empty pairs sort behind all others as token T; a pair's slot is its distance to the first pair of its token.
    keys_N = torch.where(expert_ids_N == E, T, token_ids_N)
    sorted_N, order_N = torch.sort(keys_N, stable=True)
    slot_N = torch.arange(sorted_N.numel(), device=sorted_N.device) - torch.searchsorted(sorted_N, sorted_N)
    kept_N = (sorted_N < T) & (slot_N < num_slots)
    # One spill row and column at the end take what is empty or past the bound.
    place_N = torch.where(kept_N, sorted_N * num_slots + slot_N, T * num_slots)
    ids = torch.full((T * num_slots + 1,), E, dtype=torch.int64, device=sorted_N.device)
    ids = ids.scatter(0, place_N, torch.where(kept_N, expert_ids_N.index_select(0, order_N), E))
    weights = weights_N.new_zeros(T * num_slots + 1)
    weights = weights.index_add(0, place_N, weights_N.index_select(0, order_N) * kept_N)
    return ids[:-1].reshape(T, num_slots), weights[:-1].reshape(T, num_slots)


def validate_assignment(assignment: Assignment) -> None:
    """Raise AssignmentError naming the first broken invariant and the first place where it breaks.

    Checked: shapes, int64 ids in [0, E], finite non-negative weights, weight 0 in empty places, no expert twice at one
    token, load_E equal to the counts (before dropping), losses and counts 0-d. Synchronises with the device.
    """
    _check_shapes(assignment)
    E = assignment.num_experts
    token_ids_N, expert_ids_N, weights_N = (t.detach() for t in assignment.pairs())
    _refuse((expert_ids_N < 0) | (expert_ids_N > E), assignment, f"ids lie in [0, {E}], and {E} marks an empty place")
    _refuse((token_ids_N < 0) | (token_ids_N >= assignment.num_tokens), assignment, "token ids lie in [0, T)")
    _refuse(~torch.isfinite(weights_N), assignment, "combine weights are finite")
    _refuse(weights_N < 0, assignment, "combine weights are not negative")
    empty_N = expert_ids_N == E
    _refuse(empty_N & (weights_N != 0), assignment, "an empty place carries weight 0")
    # Sorting (token, expert) keys brings duplicates together; empty places get keys of their own.
    places_N = torch.arange(expert_ids_N.numel(), device=expert_ids_N.device)
    keys_N = torch.where(empty_N, -1 - places_N, token_ids_N * E + expert_ids_N)
    sorted_N, order_N = torch.sort(keys_N, stable=True)
    twice_N = torch.zeros_like(empty_N)
    twice_N[order_N[1:]] = sorted_N[1:] == sorted_N[:-1]
    _refuse(twice_N, assignment, "no expert stands twice at one token")
    if assignment.dropped is None:
        counted_E = torch.bincount(expert_ids_N[~empty_N], minlength=E)
        if not torch.equal(counted_E, assignment.load_E):
            raise AssignmentError(
                f"load_E = {assignment.load_E.tolist()}, but the ids count {counted_E.tolist()}.",
                why="load_E is the number of places per expert",
                fix="count the ids that are returned, after masking padding",
            )


def _check_shapes(assignment: Assignment) -> None:
    ids, weights = assignment.expert_ids, assignment.weights
    T, E = assignment.num_tokens, assignment.num_experts
    expected = {
        AssignmentKind.SLOTS: ids.dim() == 2 and ids.shape[0] == T and ids.shape[1] <= E,
        AssignmentKind.DENSE: tuple(ids.shape) == (T, E),
        AssignmentKind.PAIRS: ids.dim() == 1 and assignment.token_ids_N is not None,
    }[assignment.kind]
    rules = {
        f"expert_ids of kind '{assignment.kind}' have shape {list(ids.shape)} with T={T}, E={E}": expected,
        f"weights have shape {list(weights.shape)}, expert_ids {list(ids.shape)}": weights.shape == ids.shape,
        f"expert_ids are {ids.dtype}": ids.dtype == torch.int64,
        f"load_E is {assignment.load_E.dtype} of shape {list(assignment.load_E.shape)}": (
            assignment.load_E.dtype == torch.int64 and tuple(assignment.load_E.shape) == (E,)
        ),
        "a loss is not 0-d": all(loss.dim() == 0 for loss in assignment.losses.values()),
    }
    for saw, holds in rules.items():
        if not holds:
            raise AssignmentError(
                f"{saw}.",
                why="SLOTS are [T, K] with K <= E, DENSE [T, E], PAIRS [N]; ids and load_E are int64, losses 0-d",
                fix="return what the contract of Router.select says",
            )


def _refuse(bad_N: torch.Tensor, assignment: Assignment, rule: str) -> None:
    if not bool(bad_N.any()):
        return
    place = int(bad_N.nonzero()[0])
    token_ids_N, expert_ids_N, weights_N = assignment.pairs()
    token = int(token_ids_N[place])
    at_token = token_ids_N == token
    raise AssignmentError(
        f"token {token}: expert_ids = {expert_ids_N[at_token].tolist()}, weights = {weights_N[at_token].tolist()}.",
        why=f"{rule} (E = {assignment.num_experts})",
        fix="mend the router's select, or the gating's weigh",
    )

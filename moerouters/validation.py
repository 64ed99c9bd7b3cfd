"""Host-side checks of an Assignment: shared by `Assignment.validate`, the eager guard and the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moerouters.capabilities import AssignmentKind
from moerouters.errors import AssignmentError

if TYPE_CHECKING:
    from moerouters.types import Assignment


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

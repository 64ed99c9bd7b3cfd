"""From tokens through experts and back: one pass over a dispatcher, whole or in chunks that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.dispatch.agreement import expect_results
from moerouters.dispatch.base import Arrival, Dispatcher, Pending
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.places import Places
from moerouters.dispatch.plan import make_plan
from moerouters.types import Assignment

Experts = Callable[[Tensor, Tensor], Tensor]
"""From (x_RD, load_e) to y_RD."""


def through_experts(
    dispatcher: Dispatcher,
    x_TD: Tensor,
    assignment: Assignment,
    experts: Experts,
    *,
    capacity: int | None = None,
    chunks: int = 1,
    beside: Callable[[Tensor], Tensor] | None = None,
    places: Places | None = None,
) -> Tensor:
    """y_TD, for every token the weighted sum of its experts' results; in the weights' dtype.

    beside: a shared expert, computed while tokens travel, and added. chunks: the tokens go in that many parts, so one
    part's experts work while another travels; results are the same but for the order of sums in weight gradients. Every
    rank makes the same number of exchanges, whatever tokens it has. capacity, places: see make_plan.
    """
    if isinstance(dispatcher, LocalDispatcher) and places is None and dispatcher.is_dense(experts, assignment):
        y_TD = dispatcher.through_all(experts, x_TD, assignment)
        return y_TD if beside is None else y_TD + beside(x_TD)
    if isinstance(dispatcher, LocalDispatcher) and dispatcher.fuses(experts, x_TD, assignment):
        plan = make_plan(assignment, capacity=capacity, places=places)
        y_TD = dispatcher.through(experts, x_TD, plan, assignment.weights)
        return y_TD if beside is None else y_TD + beside(x_TD)

    parts = [(x_TD, assignment)] if chunks == 1 else list(_split(x_TD, assignment, chunks))

    def dispatched(index: int) -> Pending[Arrival]:
        x_tD, part = parts[index]
        return dispatcher.dispatch(x_tD, make_plan(part, capacity=capacity, places=places))

    coming = dispatched(0)
    beside_TD = None if beside is None else beside(x_TD)
    leaving: list[Pending[Tensor]] = []
    for index, (_, part) in enumerate(parts):
        arrival = coming.wait()
        if index + 1 < len(parts):  # the next part travels while this one is computed; more at once only cost memory
            coming = dispatched(index + 1)
        y_RD = experts(arrival.x_RD, arrival.load_e)
        expect_results(y_RD, arrival.x_RD, getattr(dispatcher, "site", ""))
        leaving.append(dispatcher.combine(y_RD, arrival, part.weights))
    arrived = [y.wait() for y in leaving]
    if len(arrived) == 1:
        y_TD = arrived[0]
    elif assignment.kind is AssignmentKind.PAIRS:
        y_TD = torch.stack(arrived).sum(dim=0)
    else:
        y_TD = torch.cat(arrived)
    return y_TD if beside_TD is None else y_TD + beside_TD


def _split(x_TD: Tensor, assignment: Assignment, chunks: int) -> Iterator[tuple[Tensor, Assignment]]:
    """Equal parts: of the tokens, or of free pairs, each of which may belong to any token."""
    places = assignment.expert_ids.shape[0]
    for index in range(chunks):
        part = slice(index * places // chunks, (index + 1) * places // chunks)
        ids, weights = assignment.expert_ids[part], assignment.weights[part]
        if assignment.token_ids_N is not None:
            tokens_N = assignment.token_ids_N[part]
            yield x_TD, replace(assignment, expert_ids=ids, weights=weights, token_ids_N=tokens_N)
        else:
            yield x_TD[part], replace(assignment, num_tokens=len(ids), expert_ids=ids, weights=weights)

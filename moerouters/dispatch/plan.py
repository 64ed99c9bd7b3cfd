"""DispatchPlan: how routed pairs are ordered by expert, as data. Pure, no communication, no host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.dispatch.places import Places
from moerouters.kernels.counting_sort import counting_sort
from moerouters.kernels.permute import gather_rows
from moerouters.types import Assignment


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """The N pairs of an assignment, stably sorted by expert; empty pairs stand last and belong to no expert.

    Experts are numbered so that each rank of a group holds a contiguous block; so rows in this order are also sorted by
    rank, and what goes to one rank is one slice. Where a placement says who lives where, they are numbered by place,
    and every replica counts as an expert.
    """

    num_tokens: int
    num_experts: int
    slots_per_token: int | None
    """K (E for dense) where pair n belongs to token n // K; None for free pairs."""
    capacity: int | None = None
    """What `limit_capacity` left per expert at most, known on the host; None where nothing was limited."""
    token_ids_N: Tensor
    """int64, token of pair n, in the assignment's own order."""
    expert_ids_N: Tensor
    """int64, expert of pair n; E for an empty one."""
    order_N: Tensor
    """int64, order_N[r] is the pair that row r carries."""
    inverse_N: Tensor
    """int64, inverse_N[order_N[r]] = r."""
    kept_load_E: Tensor
    """int64, rows per expert; the rows of expert e are [kept_load_E[:e].sum(), kept_load_E[:e+1].sum())."""
    weights: Tensor
    """The assignment's, for a back-end that sends them along with the rows; `combine` gets them too."""

    def loads_by_rank(self, num_ranks: int) -> Tensor:
        """int64 [num_ranks, e]: rows for each expert of each rank."""
        return self.kept_load_E.reshape(num_ranks, -1)

    def rows(self, x_TD: Tensor, num_rows: int | None = None) -> Tensor:
        """[R, D]: the tokens in the order of this plan, the first `num_rows` of them."""
        if num_rows is None and self.slots_per_token is not None:
            return gather_rows(x_TD, self.order_N, self.inverse_N, self.slots_per_token)
        token_ids_R = self.token_ids_N.index_select(0, self.order_N[:num_rows])
        return x_TD.index_select(0, token_ids_R)


def make_plan(assignment: Assignment, *, capacity: int | None = None, places: Places | None = None) -> DispatchPlan:
    """Order the pairs of an assignment by expert. `capacity` is what its experts were limited to, if they were; places:
    where they live, if not in order of their ids."""
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    num_experts = assignment.num_experts
    if places is not None:
        num_experts, expert_ids_N = places.num_places, places(expert_ids_N)
    pairs = counting_sort(expert_ids_N, num_experts)
    by_slot = assignment.kind is not AssignmentKind.PAIRS
    return DispatchPlan(
        num_tokens=assignment.num_tokens,
        num_experts=num_experts,
        slots_per_token=assignment.expert_ids.shape[1] if by_slot else None,
        capacity=capacity,
        token_ids_N=token_ids_N,
        expert_ids_N=expert_ids_N,
        order_N=pairs.order_N,
        inverse_N=pairs.inverse_N,
        kept_load_E=pairs.load_E,
        weights=assignment.weights,
    )

"""The `local` back-end: all experts on this rank, nothing is sent anywhere."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.dispatch.base import Arrival, Ready
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.weighted_sum import weighted_sum
from moerouters.experts import GroupedExperts
from moerouters.kernels.expert_mlp import is_fused
from moerouters.kernels.routes import AllExperts, Routes
from moerouters.types import Assignment


class LocalDispatcher:
    """Gather rows by expert; combine by slot, or by token where pairs are free."""

    num_ranks = 1
    replicated = False

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Ready[Arrival]:
        return Ready(Arrival(x_RD=plan.rows(x_TD), load_e=plan.kept_load_E, plan=plan))

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Ready[Tensor]:
        return Ready(weighted_sum(y_RD, arrival.plan, weights))

    def fuses(self, experts: object, x_TD: Tensor, assignment: Assignment) -> TypeGuard[GroupedExperts]:
        """Whether `through` can take the place of dispatch, experts and combine."""
        return _ours(experts) and assignment.kind is not AssignmentKind.PAIRS and is_fused(x_TD)

    def through(self, experts: GroupedExperts, x_TD: Tensor, plan: DispatchPlan, weights_TK: Tensor) -> Tensor:
        """y_TD by one operator, which writes neither gathered rows nor, for backward, results of experts."""
        # A call of the module, so that its hooks run: FSDP2 brings the weights in one.
        y_TD: Tensor = experts(x_TD, plan.kept_load_E, Routes(weights_TK, plan.order_N, plan.inverse_N))
        return y_TD

    def is_dense(self, experts: object, assignment: Assignment) -> TypeGuard[GroupedExperts]:
        """Whether `through_all` can take the place of all that: every token has a slot at every expert."""
        return assignment.kind is AssignmentKind.DENSE and _ours(experts)

    def through_all(self, experts: GroupedExperts, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """y_TD by one wide network, without a plan; in half precision too, where sums over experts are rounded once."""
        y_TD: Tensor = experts(x_TD, assignment.load_E, AllExperts(assignment.weights))
        return y_TD


def _ours(experts: object) -> bool:
    return isinstance(experts, GroupedExperts) and type(experts).forward is GroupedExperts.forward

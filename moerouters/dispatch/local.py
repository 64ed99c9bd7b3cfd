"""The `local` back-end: all experts on this rank, nothing is sent anywhere."""

from __future__ import annotations

from torch import Tensor

from moerouters.dispatch.base import Arrival, Ready
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.weighted_sum import weighted_sum


class LocalDispatcher:
    """Gather rows by expert; combine by slot, or by token where pairs are free."""

    num_ranks = 1
    replicated = False

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Ready[Arrival]:
        return Ready(Arrival(x_RD=plan.rows(x_TD), load_e=plan.kept_load_E, plan=plan))

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Ready[Tensor]:
        return Ready(weighted_sum(y_RD, arrival.plan, weights))

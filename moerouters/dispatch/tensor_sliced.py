"""The `tensor_sliced` back-end: PPMoE (arXiv:2304.11414), index slicing and one all-reduce instead of an all-to-all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import EnterRegion, LeaveRegion, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.replicas import ReplicaCheck
from moerouters.dispatch.site import Site
from moerouters.dispatch.weighted_sum import weighted_sum


class TensorSlicedDispatcher(OverRanks):
    """Every rank holds the same tokens, as in a tensor-parallel group, and computes the rows of its own experts.

    Dispatch moves nothing; combine is one all-reduce of y_TD. Shapes are static: each rank carries all N rows, its own
    first, and none waits for the device.

    Tokens and weights enter by the f of tensor parallelism, whose backward sums over ranks, so that each rank has the
    whole gradient of the input and of the gate. What every rank computes alike from the gate's output, such as an
    auxiliary loss, stays outside and counts once; it must not be divided by the number of ranks.

    Before that, ranks compare what they hold, and `dispatch` raises DispatchError where it differs (see ReplicaCheck).
    """

    replicated = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._expect_same_tokens = ReplicaCheck(site)

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        self._expect_same_tokens(x_TD, plan)
        entering = start(x_TD, EnterRegion(self.site))
        own_first = _starting_at(here, plan)
        load_e = plan.kept_load_E[here]
        # The f is left when rows are wanted, so that in backward its sum travels beside the shared expert's work.
        return Later(lambda: Arrival(x_RD=own_first.rows(entering.wait()), load_e=load_e, plan=own_first))

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        weights = start(weights, EnterRegion(self.site)).wait()
        # Rows of other ranks' experts are zeros here, and so is what they give to the gradient of the weights.
        return start(weighted_sum(y_RD, arrival.plan, weights), LeaveRegion(self.site))


def _starting_at(here: slice, plan: DispatchPlan) -> DispatchPlan:
    """The same plan with rows turned round: those of the experts `here`, of later ones, empty ones, of earlier ones."""
    rows = plan.order_N.numel()
    before = plan.kept_load_E[: here.start].sum()
    turned_N = (torch.arange(rows, device=before.device) + before) % max(rows, 1)
    order_N = plan.order_N.index_select(0, turned_N)
    return replace(plan, order_N=order_N, inverse_N=(plan.inverse_N - before) % max(rows, 1))

"""The `all_to_all` back-end: each row goes to the rank of its expert and comes back; nothing is dropped or padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, header
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import AllToAll, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.dispatch.weighted_sum import weighted_sum


@dataclass(frozen=True)
class _WayBack:
    send: list[int]
    receive: list[int]
    inverse_R: Tensor
    """From rows by expert to rows as they came, by rank."""


class AllToAllDispatcher(OverRanks):
    """Ranks hold different tokens. One small exchange of counts, read on the host, then one of rows, each way."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        self.site.experts_here(plan.num_experts)
        loads_WE = plan.loads_by_rank(self.num_ranks)
        arriving_We = _exchange_counts(loads_WE, x_TD, self.site)
        # The only wait for the device: sizes of slices have to be known on the host.
        send, receive = torch.stack([loads_WE.sum(dim=1), arriving_We.sum(dim=1)]).tolist()
        rows = start(plan.rows(x_TD, sum(send)), AllToAll(self.site, send=send, receive=receive))
        order_R, load_e = _by_expert(arriving_We, sum(receive))

        def arrive() -> Arrival:
            inverse_R = torch.empty_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
            x_RD = rows.wait().index_select(0, order_R)
            return Arrival(x_RD=x_RD, load_e=load_e, plan=plan, way_back=_WayBack(send, receive, inverse_R))

        return Later(arrive)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        way, plan = arrival.way_back, arrival.plan
        # Empty pairs went nowhere: zeros come back for them.
        back = AllToAll(self.site, send=way.receive, receive=way.send, pad_to=plan.order_N.numel())
        rows = start(y_RD.index_select(0, way.inverse_R), back)
        return Later(lambda: weighted_sum(rows.wait(), plan, weights))


def _exchange_counts(loads_WE: Tensor, x_TD: Tensor, site: Site) -> Tensor:
    """int64 [num_ranks, e]: the rows that each rank sends to each expert here. Raises DispatchError where ranks
    disagree on the form of a row."""
    sent = torch.cat([loads_WE, header(x_TD, loads_WE.device).expand(site.num_ranks, HEADER)], dim=1).contiguous()
    came = torch.empty_like(sent)
    with site.guarded("the exchange of counts"):
        dist.all_to_all_single(came, sent, group=site.group)
    expect_agreement(came[:, -HEADER:], x_TD, site)
    return came[:, :-HEADER]


def _by_expert(arriving_We: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """order_R, from rows by rank (and by expert within a rank) to rows by expert, stable; and load_e."""
    ranks, experts = arriving_We.shape
    ids_We = torch.arange(experts, device=arriving_We.device).expand(ranks, experts)
    ids_R = torch.repeat_interleave(ids_We.reshape(-1), arriving_We.reshape(-1), output_size=num_rows)
    return torch.sort(ids_R, stable=True).indices, arriving_We.sum(dim=0)

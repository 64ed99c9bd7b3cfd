"""The `all_gather` back-end: every rank sees the tokens of all ranks and takes those that chose its experts.

It moves each token once to every rank, whatever K is; `all_to_all` moves it once per chosen expert. So this is for
small worlds: it gains where K exceeds the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, gather_headers, header
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import AllGather, ReduceScatter, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site


@dataclass(frozen=True)
class _Sizes:
    """What the host knows of all ranks."""

    tokens: int
    """The most that any rank has; every rank sends that many, its last ones are padding."""
    pairs: int
    """The most that any rank has, likewise."""
    rows: int
    """Of all ranks, for the experts here."""


@dataclass(frozen=True)
class _WayBack:
    sizes: _Sizes
    places_R: Tensor
    """Where the pair of a row stands among the pairs of all ranks."""
    token_ids_R: Tensor
    """Which of the tokens of all ranks a row is."""


class AllGatherDispatcher(OverRanks):
    """Ranks hold different tokens, of which there may be unequal numbers.

    Each way there is one collective of rows: a gather of tokens, and a reduce-scatter of what each rank's experts add
    to them, in the dtype of the weights. Sizes go ahead and are read on the host; ids and weights are gathered too.
    """

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        sizes, load_e = _gather_sizes(x_TD, plan, here, self.site)
        own_N2 = torch.stack([plan.token_ids_N, plan.expert_ids_N], dim=1)
        pairs = start(_padded(own_N2, sizes.pairs, fill=plan.num_experts), AllGather(self.site))
        rows = start(_padded(x_TD, sizes.tokens), AllGather(self.site))

        def arrive() -> Arrival:
            way = _find_rows(pairs.wait(), here, sizes)
            x_RD = rows.wait().index_select(0, way.token_ids_R)
            return Arrival(x_RD=x_RD, load_e=load_e, plan=plan, way_back=way)

        return Later(arrive)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        way: _WayBack = arrival.way_back
        weights_M = start(_padded(weights.reshape(-1), way.sizes.pairs), AllGather(self.site)).wait()
        weighted_RD = y_RD.to(weights.dtype) * weights_M.index_select(0, way.places_R).unsqueeze(1)
        sums_SD = weighted_RD.new_zeros(self.num_ranks * way.sizes.tokens, y_RD.shape[1])
        home = start(sums_SD.index_add(0, way.token_ids_R, weighted_RD), ReduceScatter(self.site))
        return Later(lambda: home.wait()[: arrival.plan.num_tokens])


def _gather_sizes(x_TD: Tensor, plan: DispatchPlan, here: slice, site: Site) -> tuple[_Sizes, Tensor]:
    """Also load_e, int64 [e]. Raises DispatchError where ranks disagree on the form of a row."""
    load_E = plan.kept_load_E
    numbers = torch.tensor([plan.num_tokens, plan.order_N.numel()], dtype=torch.int64, device=load_E.device)
    came_WS = gather_headers(torch.cat([header(x_TD, load_E.device), numbers, load_E]), site)
    # The only wait for the device: how much is padded, and how many rows there are, has to be known on the host.
    known_WS = came_WS.cpu()
    expect_agreement(known_WS[:, :HEADER], x_TD, site)
    tokens, pairs = known_WS[:, HEADER : HEADER + 2].amax(dim=0).tolist()
    loads_We, known_We = (table_WS[:, HEADER + 2 :][:, here] for table_WS in (came_WS, known_WS))
    return _Sizes(tokens, pairs, int(known_We.sum())), loads_We.sum(dim=0)


def _find_rows(pairs_M2: Tensor, here: slice, sizes: _Sizes) -> _WayBack:
    """The pairs of the experts here among those of all ranks, grouped by expert, then by rank, then as their rank had
    them."""
    token_ids_M, expert_ids_M = pairs_M2.unbind(dim=1)
    is_here_M = (expert_ids_M >= here.start) & (expert_ids_M < here.stop)
    # Those of other experts, empty ones and padding stand last.
    order_M = torch.sort(torch.where(is_here_M, expert_ids_M, here.stop), stable=True).indices
    places_R = order_M[: sizes.rows]
    ranks_R = places_R // max(sizes.pairs, 1)
    return _WayBack(sizes, places_R, ranks_R * sizes.tokens + token_ids_M.index_select(0, places_R))


def _padded(rows: Tensor, length: int, fill: int = 0) -> Tensor:
    padding = rows.new_full((length - rows.shape[0], *rows.shape[1:]), fill)
    return torch.cat([rows, padding])

"""The `hierarchical` back-end: a token crosses to each node that has experts for it once, and fans out there.

Ranks are numbered node by node. A row goes first to the rank with the sender's place on the other node, then to ranks
of that node; once each, however many experts want it. Results are summed on their rank, then in the node, so one row
per token and node comes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, header
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import AllToAll, start
from moerouters.dispatch.nodes import node_sites
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.kernels.counting_sort import counting_sort
from moerouters.kernels.counts import count_experts


@dataclass(frozen=True)
class _Traffic:
    """What one hop exchanges with each rank of its group: rows and pairs sent, rows and pairs that come."""

    counts_4G: Tensor
    """int64, on the device."""
    known: list[list[int]]
    """The same, on the host."""

    def rows(self, site: Site) -> AllToAll:
        return AllToAll(site, send=self.known[0], receive=self.known[2])

    def pairs(self, site: Site) -> AllToAll:
        return AllToAll(site, send=self.known[1], receive=self.known[3])

    def rows_back(self, site: Site) -> AllToAll:
        return AllToAll(site, send=self.known[2], receive=self.known[0])


@dataclass(frozen=True)
class _Hop:
    """Rows on their way to the ranks of one group, and the pairs of a row and a place there that they go for."""

    site: Site
    traffic: _Traffic
    rows_S: Tensor
    """int64, which of the rows here are sent, by rank."""
    pairs_P: Tensor
    """int64, which of the pairs here go with them, by rank."""
    codes_P: Tensor
    """int64, of these pairs: row, counted within what its rank gets, * places of a rank + place of that rank."""

    def rows(self, x_MD: Tensor) -> Pending[Tensor]:
        return start(x_MD.index_select(0, self.rows_S), self.traffic.rows(self.site))

    def values(self, values_N: Tensor) -> Pending[Tensor]:
        """Of the pairs that come, from values of the pairs here."""
        return start(values_N.index_select(0, self.pairs_P), self.traffic.pairs(self.site))

    def pairs(self, per_rank: int) -> tuple[Tensor, Tensor]:
        """The pairs that come, as (which of the rows that come, which place of this rank)."""
        codes_P = start(self.codes_P, self.traffic.pairs(self.site)).wait()
        _, _, rows_G, pairs_G = self.traffic.counts_4G
        first_G = rows_G.cumsum(0) - rows_G
        first_P = torch.repeat_interleave(first_G, pairs_G, output_size=len(codes_P))
        return first_P + codes_P // per_rank, codes_P % per_rank

    def back(self, y_RD: Tensor) -> Pending[Tensor]:
        """What becomes of the rows that came, to where they came from."""
        return start(y_RD, self.traffic.rows_back(self.site))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a row and a place, sorted by rank of the place, then row, then place; empty ones stand last."""

    order_N: Tensor
    rows_N: Tensor
    places_N: Tensor
    keys_N: Tensor
    """(rank * number of rows + row) * places of a rank + place of that rank."""
    per_rank: int

    @classmethod
    def sort(cls, rows_N: Tensor, places_N: Tensor, *, num_rows: int, per_rank: int) -> _Pairs:
        """Rank g has the per_rank places from g * per_rank on; an empty pair has the place after the last one."""
        keys_N = (places_N // per_rank * num_rows + rows_N) * per_rank + places_N % per_rank
        keys_N, order_N = torch.sort(keys_N, stable=True)
        rows_N, places_N = rows_N.index_select(0, order_N), places_N.index_select(0, order_N)
        return cls(order_N, rows_N, places_N, keys_N, per_rank)

    def rows_by(self, block: int, blocks: int) -> Tensor:
        """int64 [blocks]: how many rows have a pair in each block of `block` places; it divides those of a rank."""
        return count_experts(torch.where(_is_first(self.keys_N // block), self.places_N // block, blocks), blocks)

    def hop(self, site: Site, traffic: _Traffic) -> _Hop:
        """Every row to every rank of the site that has a place for it."""
        (num_rows, num_pairs), device = map(sum, traffic.known[:2]), self.keys_N.device
        sent_N = _is_first(self.keys_N // self.per_rank).cumsum(0) - 1
        rows_S = self.rows_N.index_select(0, torch.searchsorted(sent_N, torch.arange(num_rows, device=device)))
        first_G = traffic.counts_4G[0].cumsum(0) - traffic.counts_4G[0]
        places_P = self.places_N[:num_pairs]
        within_P = sent_N[:num_pairs] - first_G.index_select(0, places_P // self.per_rank)
        codes_P = within_P * self.per_rank + places_P % self.per_rank
        return _Hop(site, traffic, rows_S, self.order_N[:num_pairs], codes_P)


@dataclass(frozen=True)
class _WayBack:
    between: _Hop
    inside: _Hop
    rows_R: Tensor
    """int64, which of the rows that came a row of the experts is."""
    pairs_R: Tensor
    """And which of the pairs that came."""


class HierarchicalDispatcher(OverRanks):
    """Ranks hold different tokens, on nodes with equally many of them. Each way two exchanges of rows, beside small
    ones of counts, pairs and weights; the host waits for the device once.

    Rows travel in the dtype that experts got or gave, and are summed in that of the weights: in bfloat16 a result is
    rounded up to twice more than by `all_to_all`. node_size: neighbouring ranks that share a node; else the site's mesh
    or LOCAL_WORLD_SIZE says it (see `node_sites`).
    """

    def __init__(self, site: Site, *, node_size: int | None = None) -> None:
        super().__init__(site)
        self.between, self.inside = node_sites(site, node_size)

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        e = here.stop - here.start
        of_node = e * self.inside.num_ranks
        pairs = _Pairs.sort(plan.token_ids_N, plan.expert_ids_N, num_rows=plan.num_tokens, per_rank=of_node)
        to_nodes, to_ranks, load_e = self._exchange_counts(pairs, e, plan, x_TD)
        between = pairs.hop(self.between, to_nodes)
        rows = between.rows(x_TD)
        # While they travel: which of the rows that come go on to which ranks of this node.
        num_rows = sum(to_nodes.known[2])
        inside = _Pairs.sort(*between.pairs(of_node), num_rows=num_rows, per_rank=e).hop(self.inside, to_ranks)
        rows_P, experts_P = inside.pairs(e)
        pairs_R = counting_sort(experts_P, e).order_N
        way = _WayBack(between, inside, rows_P.index_select(0, pairs_R), pairs_R)

        def arrive() -> Arrival:
            x_RD = inside.rows(rows.wait()).wait().index_select(0, way.rows_R)
            return Arrival(x_RD=x_RD, load_e=load_e, plan=plan, way_back=way)

        return Later(arrive)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        way: _WayBack = arrival.way_back
        between, inside = way.between, way.inside
        weights_P = inside.values(between.values(weights.reshape(-1)).wait()).wait()
        weighted_RD = y_RD.to(weights.dtype) * weights_P.index_select(0, way.pairs_R).unsqueeze(1)

        def summed(rows_SD: Tensor, rows_S: Tensor, num_rows: int) -> Tensor:
            """[num_rows, D]: to each row what belongs to it."""
            sums_MD = rows_SD.new_zeros(num_rows, rows_SD.shape[1], dtype=weights.dtype)
            return sums_MD.index_add(0, rows_S, rows_SD.to(weights.dtype))

        of_rank = summed(weighted_RD, way.rows_R, sum(inside.traffic.known[2])).to(y_RD.dtype)
        of_node = summed(inside.back(of_rank).wait(), inside.rows_S, sum(between.traffic.known[2])).to(y_RD.dtype)
        home = between.back(of_node)
        return Later(lambda: summed(home.wait(), between.rows_S, arrival.plan.num_tokens))

    def _exchange_counts(
        self, pairs: _Pairs, experts: int, plan: DispatchPlan, x_TD: Tensor
    ) -> tuple[_Traffic, _Traffic, Tensor]:
        """Traffic between nodes and inside this one, and load_e, int64 [e]. Raises DispatchError where any two ranks
        disagree on the form of a row."""
        nodes, ranks, e = self.between.num_ranks, self.inside.num_ranks, experts
        # By node: rows for it, rows for each of its ranks, pairs for each of its experts. A rank there adds up those of
        # its place on every node: what it will send on.
        own_H = header(x_TD, x_TD.device)
        rows_N = pairs.rows_by(ranks * e, nodes).unsqueeze(1)
        load_Ne = plan.loads_by_rank(nodes)
        sent_NC = torch.cat([rows_N, pairs.rows_by(e, nodes * ranks).view(nodes, -1), load_Ne], dim=1)
        came_NC, headers_NH = _swap(sent_NC, own_H.expand(nodes, HEADER), self.between)
        rows_L, load_Le = came_NC[:, 1 : 1 + ranks].sum(dim=0), came_NC[:, 1 + ranks :].sum(dim=0).view(ranks, e)
        sent_LC = torch.cat([rows_L.unsqueeze(1), load_Le], dim=1)
        came_LC, headers_LX = _swap(sent_LC, headers_NH.reshape(1, -1).expand(ranks, -1), self.inside)
        headers_WH = headers_LX.view(ranks, nodes, HEADER).transpose(0, 1).reshape(-1, HEADER)

        between_4N = torch.stack(
            [rows_N.squeeze(1), load_Ne.sum(dim=1), came_NC[:, 0], came_NC[:, 1 + ranks :].sum(dim=1)]
        )
        inside_4L = torch.stack([rows_L, load_Le.sum(dim=1), came_LC[:, 0], came_LC[:, 1:].sum(dim=1)])
        # The only wait for the device: sizes of slices have to be known on the host.
        tables = (between_4N, inside_4L, headers_WH)
        flat = torch.cat([table.reshape(-1) for table in tables]).cpu()
        known_4N, known_4L, known_WH = torch.split(flat, [table.numel() for table in tables])
        expect_agreement(known_WH.view(-1, HEADER), x_TD, self.site)
        between = _Traffic(between_4N, known_4N.view(4, -1).tolist())
        return between, _Traffic(inside_4L, known_4L.view(4, -1).tolist()), came_LC[:, 1:].sum(dim=0)


def _is_first(values_N: Tensor) -> Tensor:
    """bool [N]: whether a value differs from the one before."""
    is_first_N = torch.ones_like(values_N, dtype=torch.bool)
    is_first_N[1:] = values_N[1:] != values_N[:-1]
    return is_first_N


def _swap(counts_GC: Tensor, headers_GH: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Row g of both to rank g of the site; what came from the ranks, in the same form."""
    sent = torch.cat([counts_GC, headers_GH], dim=1).contiguous()
    came = torch.empty_like(sent)
    with site.guarded("the exchange of counts"):
        dist.all_to_all_single(came, sent, group=site.group)
    return came[:, : counts_GC.shape[1]], came[:, counts_GC.shape[1] :]

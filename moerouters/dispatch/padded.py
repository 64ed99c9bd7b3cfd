"""The `padded` back-end: every expert gets a block of `capacity` rows from every rank, full or not.

All shapes follow from the capacity, so nothing waits for the device and CUDA graphs can capture a step. The fixed
buffers are those of GShard (arXiv:2006.16668, Sec. 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, gather_headers, header
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import AllToAll, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.dispatch.weighted_sum import weighted_sum
from moerouters.errors import ConfigError, DispatchError


@dataclass(frozen=True)
class _WayBack:
    capacity: int
    slots_N: Tensor
    """int64, where in the buffer [num_experts * capacity] a pair lies; one past its end for an empty pair."""


class PaddedDispatcher(OverRanks):
    """Ranks hold different tokens and the same capacity. One exchange of full blocks each way, of equal size.

    Needs an assignment that `limit_capacity` cut (a layer's capacity_factor): what was dropped is in
    `assignment.dropped`, and in `Handle.dropped` after a step. `Arrival.load_e` is the same for every batch and lies on
    the CPU; rows that carry no token are zeros, and get no gradient.

    Ranks compare capacity, width, dtype and autocast before they send, in an exchange of a few numbers. The host reads
    them where nothing waits for a device (a CPU), and where this rank has not sent that form before; else an assertion
    on the device does.

    `dispatch` raises ConfigError without a capacity, and DispatchError, naming ranks, where they disagree or an expert
    has more rows than its capacity (on a GPU this is an assertion on the device).
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._headers: dict[tuple[Any, ...], Tensor] = {}
        """By form of a block, those that all ranks had at some time."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        W, e, C = self.num_ranks, here.stop - here.start, _capacity(plan, self.site)
        self._agree(x_TD, C)
        _expect_room(plan, C, self.site)
        slots_N = _slots(plan, C)
        rows = start(_filled(x_TD, plan, slots_N, C), self._blocks(e * C))
        load_e = torch.full((e,), W * C, dtype=torch.int64, device="cpu")

        def arrive() -> Arrival:
            x_RD = _swap_blocks(rows.wait(), W, e)
            return Arrival(x_RD=x_RD, load_e=load_e, plan=plan, way_back=_WayBack(C, slots_N))

        return Later(arrive)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        plan, way, e = arrival.plan, arrival.way_back, len(arrival.load_e)
        # One row of zeros after the buffer: what empty pairs read.
        back = self._blocks(e * way.capacity, pad_to=plan.num_experts * way.capacity + 1)
        rows = start(_swap_blocks(y_RD, e, self.num_ranks), back)
        # Pairs find their rows where these came to lie, without sorting them into the order of the plan first.
        as_it_came = replace(plan, inverse_N=way.slots_N)
        return Later(lambda: weighted_sum(rows.wait(), as_it_came, weights))

    def _blocks(self, rows: int, *, pad_to: int | None = None) -> AllToAll:
        """The exchange of one block of `rows` with every rank."""
        sizes = [rows] * self.num_ranks
        return AllToAll(self.site, send=sizes, receive=sizes, pad_to=pad_to)

    def _agree(self, x_TD: Tensor, capacity: int) -> None:
        """Raise DispatchError unless every rank sends blocks of this form."""
        device = x_TD.device
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        form = (capacity, x_TD.shape[1], x_TD.dtype, cast, device)
        known_H = self._headers.get(form)
        own_H = _header(x_TD, capacity) if known_H is None else known_H
        headers_WH = gather_headers(own_H, self.site)
        if known_H is not None and device.type != "cpu":
            torch._assert_async((headers_WH == own_H).all(), f"ranks disagree on the form of a block on {self.site}")
            return
        expect_agreement(headers_WH[:, :HEADER], x_TD, self.site)
        _expect_capacity(headers_WH[:, HEADER], capacity, self.site)
        self._headers[form] = own_H


def _header(x_TD: Tensor, capacity: int) -> Tensor:
    """int64 [HEADER + 1]; kept for the next batch, since making it waits for a GPU."""
    return torch.cat([header(x_TD, x_TD.device), torch.tensor([capacity], dtype=torch.int64, device=x_TD.device)])


def _capacity(plan: DispatchPlan, site: Site) -> int:
    if plan.capacity is None:
        raise ConfigError(
            "the padded back-end got an assignment without a capacity.",
            where=str(site),
            why="its buffers hold a fixed number of rows per expert",
            fix="set capacity_factor on the layer, or choose all_to_all, which drops nothing",
        )
    return plan.capacity


def _expect_capacity(capacities_W: Tensor, own: int, site: Site) -> None:
    """Raise DispatchError, naming the ranks, unless all are `own`. Reads them on the host."""
    found = capacities_W.tolist()
    different = [f"rank {rank} has {capacity}" for rank, capacity in enumerate(found) if capacity != own]
    if different:
        raise DispatchError(
            f"ranks disagree on the capacity of an expert: {'; '.join(different)}; here it is {own}.",
            where=str(site),
            why="blocks of one size are exchanged, and a layer computes its capacity from the tokens of its own rank",
            fix="give every rank the same number of tokens (leave out a last, smaller batch), or choose all_to_all",
        )


def _expect_room(plan: DispatchPlan, capacity: int, site: Site) -> None:
    """On a GPU an assertion that nobody waits for; on a CPU the same raises here."""
    what = f"an expert has more rows than its capacity of {capacity} on {site}"
    try:
        torch._assert_async((plan.kept_load_E <= capacity).all(), what)
    except RuntimeError as error:
        raise DispatchError(
            f"{what}.",
            why="a row without a place of its own would overwrite another's",
            fix="limit the assignment to the capacity that the plan is made with: limit_capacity(assignment, capacity)",
        ) from error


def _slots(plan: DispatchPlan, capacity: int) -> Tensor:
    """int64 [N]: expert * capacity + place in the expert's queue; num_experts * capacity for an empty pair."""
    first_row_E = plan.kept_load_E.cumsum(0) - plan.kept_load_E
    empty_N = plan.expert_ids_N == plan.num_experts
    experts_N = plan.expert_ids_N.masked_fill(empty_N, 0)  # any expert: what it gives is masked below
    slots_N = experts_N * capacity + plan.inverse_N - first_row_E.index_select(0, experts_N)
    return slots_N.masked_fill(empty_N, plan.num_experts * capacity)


def _filled(x_TD: Tensor, plan: DispatchPlan, slots_N: Tensor, capacity: int) -> Tensor:
    """[num_experts * capacity, D]: tokens in their slots, zeros in those that nobody has."""
    T, size = x_TD.shape[0], plan.num_experts * capacity
    nobody = torch.full((size + 1,), T, dtype=torch.int64, device=x_TD.device)
    tokens_S = nobody.scatter(0, slots_N, plan.token_ids_N)[:size]  # the last is where empty pairs went
    return torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])]).index_select(0, tokens_S)


def _swap_blocks(rows: Tensor, outer: int, inner: int) -> Tensor:
    """From blocks [outer, inner, capacity] of rows to [inner, outer, capacity]: by rank to by expert, and back."""
    width = rows.shape[1]
    if not rows.shape[0]:
        return rows
    return rows.reshape(outer, inner, -1, width).transpose(0, 1).reshape(-1, width)

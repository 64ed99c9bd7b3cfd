"""The `tensor_sliced` back-end: PPMoE (arXiv:2304.11414), index slicing and one all-reduce instead of an all-to-all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, gather_headers, header
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import EnterRegion, LeaveRegion, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.dispatch.weighted_sum import weighted_sum
from moerouters.errors import DispatchError


class TensorSlicedDispatcher(OverRanks):
    """Every rank holds the same tokens, as in a tensor-parallel group, and computes the rows of its own experts.

    Dispatch moves nothing; combine is one all-reduce of y_TD. Shapes are static: each rank carries all N rows, its own
    first, and none waits for the device.

    Tokens and weights enter by the f of tensor parallelism, whose backward sums over ranks, so that each rank has the
    whole gradient of the input and of the gate. What every rank computes alike from the gate's output, such as an
    auxiliary loss, stays outside and counts once; it must not be divided by the number of ranks.

    Before that, ranks gather a few numbers to compare what they hold. Where it differs, `dispatch` raises
    DispatchError; on a GPU it does so when a width and dtype come for the first time, later the device asserts it.
    """

    replicated = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._headers: dict[tuple[Any, ...], Tensor] = {}
        """Of the forms of a token that all ranks were seen to share."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        self._agree(x_TD, plan)
        entering = start(x_TD, EnterRegion(self.site))
        own_first = _starting_at(here, plan)
        load_e = plan.kept_load_E[here]
        # The f is left when rows are wanted, so that in backward its sum travels beside the shared expert's work.
        return Later(lambda: Arrival(x_RD=own_first.rows(entering.wait()), load_e=load_e, plan=own_first))

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        weights = start(weights, EnterRegion(self.site)).wait()
        # Rows of other ranks' experts are zeros here, and so is what they give to the gradient of the weights.
        return start(weighted_sum(y_RD, arrival.plan, weights), LeaveRegion(self.site))

    def _agree(self, x_TD: Tensor, plan: DispatchPlan) -> None:
        """Raise DispatchError unless all ranks have as many tokens, of one form, with the same experts."""
        kind, device = x_TD.device.type, x_TD.device
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        form = (device, x_TD.shape[1], x_TD.dtype, cast)
        known_H = self._headers.get(form)
        header_H = header(x_TD, device) if known_H is None else known_H  # made on the host: a copy to the device
        own_H = torch.cat([header_H, _held(plan)])
        headers_WH = gather_headers(own_H, self.site)
        if known_H is not None and kind != "cpu":
            torch._assert_async((headers_WH == own_H).all(), f"ranks hold different tokens on {self.site}")
            return
        expect_agreement(headers_WH[:, :HEADER], x_TD, self.site)
        _expect_replicas(headers_WH[:, HEADER:].tolist(), self.site)
        self._headers[form] = header_H


def _starting_at(here: slice, plan: DispatchPlan) -> DispatchPlan:
    """The same plan with rows turned round: those of the experts `here`, of later ones, empty ones, of earlier ones."""
    rows = plan.order_N.numel()
    before = plan.kept_load_E[: here.start].sum()
    turned_N = (torch.arange(rows, device=before.device) + before) % max(rows, 1)
    order_N = plan.order_N.index_select(0, turned_N)
    return replace(plan, order_N=order_N, inverse_N=(plan.inverse_N - before) % max(rows, 1))


def _held(plan: DispatchPlan) -> Tensor:
    """int64 [3]: tokens, pairs, and a checksum of the pairs; ranks with other tokens would add up unlike rows."""
    pairs_N = plan.token_ids_N * (plan.num_experts + 1) + plan.expert_ids_N
    checksum = (torch.arange(1, pairs_N.numel() + 1, device=pairs_N.device) * pairs_N).sum()
    return torch.stack([torch.full_like(checksum, plan.num_tokens), torch.full_like(checksum, len(pairs_N)), checksum])


def _expect_replicas(held_W: list[list[int]], site: Site) -> None:
    if all(held == held_W[0] for held in held_W):
        return
    tokens_W = [tokens for tokens, _, _ in held_W]
    what = f"numbers of tokens {tokens_W}" if len(set(tokens_W)) > 1 else "experts for their tokens"
    raise DispatchError(
        f"the ranks of a tensor-parallel group have different {what}.",
        where=str(site),
        why="'tensor_sliced' adds up over ranks what experts make of the same tokens",
        fix="give every rank of the group the same input, bit by bit; for distinct tokens choose 'all_to_all'",
    )

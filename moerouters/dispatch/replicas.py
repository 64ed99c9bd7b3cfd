"""Ranks that should hold the same tokens must: what they make of each token is added up, or pieced together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.dispatch.agreement import HEADER, expect_agreement, gather_headers, header
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.errors import DispatchError


class ReplicaCheck:
    """Before each pass, ranks gather a few numbers to compare what they hold.

    Where it differs, a call raises DispatchError; on a GPU it does so when a width and dtype come for the first time,
    later the device asserts it. site: for messages, and the ranks that hold the same tokens, if replicas does not name
    them. others: where there are several groups of replicas, those with this rank's place in them; so all ranks raise.
    """

    def __init__(self, site: Site, *, replicas: Site | None = None, others: Site | None = None) -> None:
        self.site, self.replicas, self.others = site, site if replicas is None else replicas, others
        self._headers: dict[tuple[Any, ...], Tensor] = {}
        """Of the forms of a token that all ranks were seen to share."""

    def __call__(self, x_TD: Tensor, plan: DispatchPlan) -> None:
        kind, device = x_TD.device.type, x_TD.device
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        form = (device, x_TD.shape[1], x_TD.dtype, cast)
        known_H = self._headers.get(form)
        header_H = header(x_TD, device) if known_H is None else known_H  # made on the host: a copy to the device
        own_X = torch.cat([header_H, _held(plan)])
        found_RX = gather_headers(own_X, self.replicas)
        if self.others is not None:
            found_RX = gather_headers(found_RX.reshape(-1), self.others)
        found_GRX = found_RX.view(-1, self.replicas.num_ranks, own_X.numel())
        if known_H is not None and kind != "cpu":
            alike = (found_GRX[..., :HEADER] == header_H).all() & (found_GRX == found_GRX[:, :1])[..., HEADER:].all()
            torch._assert_async(alike, f"ranks hold different tokens on {self.site}")
            return
        headers_WH = found_GRX[..., :HEADER].reshape(-1, HEADER)
        expect_agreement(headers_WH, x_TD, self.site, first=self.site.rank // len(headers_WH) * len(headers_WH))
        for held_R in found_GRX[..., HEADER:].tolist():
            _expect_replicas(held_R, self.site)
        self._headers[form] = header_H


def _held(plan: DispatchPlan) -> Tensor:
    """int64 [3]: tokens, pairs, and a checksum of the pairs; ranks with other tokens would add up unlike rows."""
    pairs_N = plan.token_ids_N * (plan.num_experts + 1) + plan.expert_ids_N
    checksum = (torch.arange(1, pairs_N.numel() + 1, device=pairs_N.device) * pairs_N).sum()
    return torch.stack([torch.full_like(checksum, plan.num_tokens), torch.full_like(checksum, len(pairs_N)), checksum])


def _expect_replicas(held_R: list[list[int]], site: Site) -> None:
    if all(held == held_R[0] for held in held_R):
        return
    tokens_R = [tokens for tokens, _, _ in held_R]
    what = f"numbers of tokens {tokens_R}" if len(set(tokens_R)) > 1 else "experts for their tokens"
    raise DispatchError(
        f"the ranks of a tensor-parallel group have different {what}.",
        where=str(site),
        why="each of them computes a part of what experts make of the same tokens",
        fix="give every rank of the group the same input, bit by bit; for distinct tokens choose 'all_to_all'",
    )

"""The online form as a router, and the choice between the two forms of `bip`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Routing, StateAlgebra
from moerouters.capabilities import LoadScope
from moerouters.errors import ConfigError
from moerouters_bip.bids import bids_of_routing
from moerouters_bip.columns import LocalColumns
from moerouters_bip.config import BipConfig
from moerouters_bip.dual import centred, expert_threshold
from moerouters_bip.online import mixed, online_prices
from moerouters_bip.router import BipRouter, DualRouter


class OnlineBipRouter(DualRouter):
    """In training each token is routed by a q that only the tokens before it have moved; their order matters.

    Every forward starts from the committed q, which the step moves to the token-weighted mean of the q after the last
    tokens of all micro-batches and ranks. Further state: `settled`, 1 once q was learned; until then it weighs nothing.

    Raises ConfigError for expert groups.
    """

    capabilities = Capabilities(state=StateAlgebra.MEAN_OF_SOLVES, load_scope=LoadScope.LOCAL)
    reads: ClassVar[frozenset[str]] = frozenset({"adjusted_TE", "cutoff_T"})
    config: BipConfig
    settled: Tensor

    def __init__(self, gating: Gating, config: BipConfig) -> None:
        if gating.settings.kept_groups < gating.settings.num_groups:
            raise ConfigError(
                "router 'bip' with form='online' cannot keep to expert groups.",
                where=f"num_groups={gating.settings.num_groups}, kept_groups={gating.settings.kept_groups}",
                why="its loop over tokens knows the order of all scores alone",
                fix="use form='batch', or the router 'quantile', which is causal as well",
            )
        super().__init__(gating, config)
        self.register_state("settled")

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor | None:
        return None if self.training else -self.dual_E

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training:
            return scores_TE
        assert ctx.valid_T is not None
        gating, variant = self.gating, self.config.variant
        return scores_TE - online_prices(
            scores_TE, self.dual_E, ctx.valid_T, top_k=gating.top_k, memory=self._memory, variant=variant
        )

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        # A token's bids follow from what it was routed by, so all of them are known, and q after the last token.
        variant, top_k = self.config.variant, self.gating.top_k
        bids_ET, tokens = bids_of_routing(routing, ctx, self.gating, variant=variant)
        kept_E = self.dual_E.to(bids_ET.dtype)
        bids = LocalColumns(bids_ET, tokens, centre_E=kept_E, most=bids_ET.shape[1] * top_k // bids_ET.shape[0] + 1)
        q_E = mixed(expert_threshold(bids, kept_E, top_k=top_k, variant=variant), tokens, kept_E, self._memory)
        return self.solved(centred(q_E, tokens) if variant == "centred" else q_E, ctx)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.settled.copy_(torch.where(stats["tokens"] > 0, 1.0, self.settled))

    @property
    def _memory(self) -> Tensor:
        return self.config.memory * self.settled


def bip_router(gating: Gating, config: BipConfig = BipConfig()) -> DualRouter:
    """The router of config.form."""
    return OnlineBipRouter(gating, config) if config.form == "online" else BipRouter(gating, config)

"""The router `quantile`: one dual step per optimizer step, on what the step before was routed by. Causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Routing, StateAlgebra
from moerouters.capabilities import MaxViolation
from moerouters_bip.bids import bids_of_routing
from moerouters_bip.columns import LocalColumns
from moerouters_bip.config import QuantileConfig
from moerouters_bip.dual import centred, expert_threshold
from moerouters_bip.histogram import BinnedValues, counts_of
from moerouters_bip.router import DualRouter


def capabilities_of(config: QuantileConfig) -> Capabilities:
    """What a router with this config promises.

    The bound on balance is a fifth above the worst MaxVio of 144 histories (8 and 16 experts, 256 tokens, softmax and
    sigmoid, both estimators, ema 0 and 0.5): 1.03, most of it the chance of 32 tokens an expert.
    """
    together = config.estimator == "histogram"
    return Capabilities(
        state=StateAlgebra.ADDITIVE if together else StateAlgebra.MEAN_OF_SOLVES,
        load_scope=LoadScope.GLOBAL if together else LoadScope.LOCAL,
        balance=MaxViolation(at_most=1.25, after_steps=10) if config.ema <= 0.5 else None,
    )


class QuantileRouter(DualRouter):
    """Tokens go by the committed q. After the step q is what would have balanced it, had the tokens' thresholds stayed.

    With p_t between the K-th and the (K+1)-th largest s_t - q, and n tokens, the next q of an expert lies between the
    n K / E-th and the next largest of s - p over the tokens, less the mean over experts: the first step that `bip`
    takes, one batch late.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"cutoff_T"})
    config: QuantileConfig

    def __init__(self, gating: Gating, config: QuantileConfig = QuantileConfig()) -> None:
        super().__init__(gating, config)
        self.capabilities = capabilities_of(config)

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        bids_ET, tokens = bids_of_routing(routing, ctx, self.gating)
        q_E = self.dual_E.to(bids_ET.dtype)
        if self.config.estimator == "histogram":
            return {"bids_EB": counts_of(bids_ET, q_E), "tokens": tokens}
        top_k, (E, T) = self.gating.top_k, bids_ET.shape
        bids = LocalColumns(bids_ET, tokens, centre_E=q_E, most=T * top_k // E + 1)
        return self.solved(centred(expert_threshold(bids, q_E, top_k=top_k), tokens), ctx)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        if self.config.estimator != "histogram":
            return super().update(stats)
        bids = BinnedValues(stats["bids_EB"], stats["tokens"], centre_E=self.dual_E)
        found_E = expert_threshold(bids, self.dual_E, top_k=self.gating.top_k)
        self.commit(centred(found_E, bids.tokens).double(), bids.tokens)

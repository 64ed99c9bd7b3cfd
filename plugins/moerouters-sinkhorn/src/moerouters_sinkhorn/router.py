"""The sinkhorn router: selection by the rows of a plan whose columns are balanced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, Selection, StateAlgebra
from moerouters.capabilities import MaxViolation
from moerouters_sinkhorn.config import SinkhornConfig
from moerouters_sinkhorn.plan import sinkhorn_potential

SLOPE = 0.25
"""Of a sigmoid at 0: how much of a biased score one unit of a logit is taken to be."""


def capabilities_of(config: SinkhornConfig) -> Capabilities:
    """What a router with this config promises."""
    bounded = config.temperature == 1 and config.iterations >= 4
    return Capabilities(
        state=StateAlgebra.MEAN_OF_SOLVES if config.eval == "potentials" else StateAlgebra.STATELESS,
        load_scope=LoadScope.LOCAL,
        causal=False,
        balance=MaxViolation(at_most=0.5) if bounded else None,
    )


class SinkhornRouter(Router):
    """Chooses by the Sinkhorn-normalised logits of this forward's tokens in training; weights stay the gating's.

    State under eval="potentials", float32 [E]: `potential_E`, what the logits of each expert were lowered by, as the
    token-weighted mean over the forwards of the last step. Training starts from it, eval mode chooses by it.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    potential_E: Tensor

    def __init__(self, gating: Gating, config: SinkhornConfig = SinkhornConfig()) -> None:
        super().__init__(gating)
        self.config = config
        self.capabilities = capabilities_of(config)
        if self._learning:
            self.register_state("potential_E", gating.num_experts)

    @property
    def _learning(self) -> bool:
        return self.config.eval == "potentials"

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        assert ctx.logits_TE is not None
        # A model's own correction bias is added to scores, so there it is these that have to be balanced.
        biased = self.gating.settings.correction_bias
        logits_TE = adjusted_TE / SLOPE if biased else ctx.logits_TE.detach()
        start_E = self.potential_E.to(logits_TE.dtype) if self._learning else logits_TE.new_zeros(logits_TE.shape[1])
        potential_E = start_E
        if self.training:
            potential_E = sinkhorn_potential(
                logits_TE,
                start_E,
                iterations=self.config.iterations,
                temperature=self.config.temperature,
                valid_T=ctx.valid_T,
            )
        lowered_TE = adjusted_TE - SLOPE * potential_E if biased else self.gating.score(logits_TE - potential_E)
        # With nothing learned yet, the scores to the bit: on the way through logits near ties might change places.
        chosen_by_TE = torch.where((potential_E == 0).all(), adjusted_TE, lowered_TE)
        return replace(super().select(chosen_by_TE, ctx), solved=potential_E)

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if not self._learning:
            return {}
        potential_E = routing.selection.solved
        assert potential_E is not None and ctx.valid_T is not None
        tokens = ctx.valid_T.sum()
        return {"potential_times_tokens_E": potential_E.double() * tokens, "tokens": tokens}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        tokens = stats["tokens"]
        mean_E = stats["potential_times_tokens_E"] / tokens.clamp_min(1)
        self.potential_E.copy_(torch.where(tokens > 0, mean_E, self.potential_E.double()))

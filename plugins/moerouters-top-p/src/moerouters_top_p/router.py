"""TopPRouter: as many experts as it takes to hold a share p of a token's probability."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, Selection
from moerouters_top_p.config import TopPConfig
from moerouters_top_p.losses import balance_loss, dynamic_loss
from moerouters_top_p.mass import needed


def capabilities_of(config: TopPConfig) -> Capabilities:
    """What a router with this config promises."""
    return Capabilities(
        load_scope=LoadScope.LOCAL if config.alpha else LoadScope.NONE,
        balanced_losses={"balance": config.alpha} if config.alpha else {},
    )


class TopPRouter(Router):
    """A confident token gets one expert, a doubtful one many: the fewest, by falling score, that hold a share p of the
    gating's probabilities (arXiv:2403.07652).

    The assignment has `max_experts` slots (E by default), of which those past p are empty; every token has at least one
    expert. K of the gating plays no part. With a correction bias the biased scores give the order, and the
    probabilities of the unbiased ones the shares; with groups only the kept ones count.

    Losses, each only with a coefficient above 0: `balance` and `dynamic`.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: TopPConfig = TopPConfig()) -> None:
        super().__init__(gating)
        self.config = config
        self.capabilities = capabilities_of(config)
        self._num_slots = min(config.max_experts or gating.num_experts, gating.num_experts)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        assert ctx.logits_TE is not None and ctx.valid_T is not None  # the template fills them in
        E = self.gating.num_experts
        open_TE = self.gating.limit(adjusted_TE)
        candidates_TE = (open_TE > -float("inf")) & ctx.valid_T.unsqueeze(1)
        probabilities_TE = torch.where(candidates_TE, self.gating.probabilities(ctx.logits_TE), 0.0)
        ranked_TK = self.gating.top(open_TE, self._num_slots)
        chosen_TK = needed(probabilities_TE, ranked_TK, self.config.p)
        return Selection.slots(torch.where(chosen_TK, ranked_TK, E))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        config, valid_T = self.config, ctx.valid_T
        assert valid_T is not None
        if not (config.alpha or config.beta):
            return {}
        # Rows that do not count become zeros first: whatever they hold, NaN included, no gradient passes through it.
        logits_TE = torch.where(valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        probabilities_TE = self.gating.probabilities(logits_TE)
        found: dict[str, Tensor] = {}
        if config.alpha:
            found["balance"] = config.alpha * balance_loss(probabilities_TE, routing.load_E, valid_T)
        if config.beta:
            found["dynamic"] = config.beta * dynamic_loss(probabilities_TE, valid_T)
        return found

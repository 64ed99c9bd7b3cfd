"""The base-layers router: in training all experts get the same number of tokens, those that suit them best."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Selection
from moerouters.capabilities import MaxViolation
from moerouters.errors import ConfigError
from moerouters_base_layers.assign import balanced_assignment
from moerouters_base_layers.config import BaseLayersConfig


class BaseLayersRouter(Router):
    """Balanced assignment in training, greedy top-K in eval (arXiv:2103.16716).

    The paper has K = 1; here every token gets K different experts, and every expert floor(n K / E) or ceil(n K / E) of
    the n tokens of this forward. Nothing is learned between steps, and there is no loss.

    Raises ConfigError for a gating that closes expert groups per token: closed experts could not get their share.
    """

    # Loads differ by one at most, so MaxVio is below E / (n K): 0.05 from 20 pairs per expert on.
    capabilities = Capabilities(load_scope=LoadScope.LOCAL, causal=False, balance=MaxViolation(at_most=0.05))
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: BaseLayersConfig = BaseLayersConfig()) -> None:
        super().__init__(gating)
        self.config = config
        settings = gating.settings
        if settings.kept_groups < settings.num_groups:
            raise ConfigError(
                "router 'base-layers' cannot keep to expert groups.",
                where=f"gating with num_groups={settings.num_groups}, kept_groups={settings.kept_groups}",
                why="all experts get the same load in every batch, also those whose groups no token would keep",
                fix="leave the groups out (num_groups=1), or take a router that balances by a bias",
            )

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        if not self.training:
            return super().select(adjusted_TE, ctx)
        K, E = self.gating.top_k, self.gating.num_experts
        assert ctx.valid_T is not None and ctx.logits_TE is not None
        # A model's own correction bias is added to scores; there are no biased logits.
        by_logits = self.config.objective == "logits" and not self.gating.settings.correction_bias
        values_TE = ctx.logits_TE if by_logits else adjusted_TE
        chosen_TE = balanced_assignment(values_TE, top_k=K, rounds=self.config.rounds, valid_T=ctx.valid_T)
        ids_TK = self.gating.top(torch.where(chosen_TE, adjusted_TE, -float("inf")), K)
        return Selection.slots(torch.where(ctx.valid_T.unsqueeze(1), ids_TK, E))

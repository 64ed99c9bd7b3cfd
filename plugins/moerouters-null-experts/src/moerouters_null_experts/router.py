"""NullExpertsRouter: a slot that a null expert won stays empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, Selection, StateAlgebra
from moerouters.errors import ConfigError
from moerouters.gating import take_along_experts
from moerouters_null_experts.budget import budget_step
from moerouters_null_experts.config import NullExpertsConfig
from moerouters_null_experts.losses import balance_loss, shared_load


def capabilities_of(config: NullExpertsConfig) -> Capabilities:
    """What a router with this config promises.

    With source="gate" load_E says nothing of null experts, and balance cannot be read from it.
    """
    declares = config.alpha > 0 and config.source == "shared"
    return Capabilities(
        state=StateAlgebra.ADDITIVE,
        load_scope=LoadScope.GLOBAL,
        balanced_losses={"balance": config.alpha} if declares else {},
    )


class NullExpertsRouter(Router):
    """Top-k over real and null experts; weights are the gating's, of the real experts that were chosen.

    State, float32: `expert_bias_E` [E], added to the scores of real experts for the choice, starts at 0; and
    `experts_per_token` [1], real experts per token in the last step, for the log (0 before the first).

    Raises ConfigError where null experts or their share do not fit the gating.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    expert_bias_E: Tensor
    experts_per_token: Tensor

    def __init__(self, gating: Gating, config: NullExpertsConfig = NullExpertsConfig()) -> None:
        super().__init__(gating)
        self.config = config
        self.capabilities = capabilities_of(config)
        self.num_null = gating.top_k if config.num_null is None else config.num_null
        self.num_real = gating.num_experts - (self.num_null if config.source == "gate" else 0)
        self.wanted = (1 - config.null_share) * gating.top_k
        """Real experts per token, K_e."""
        _expect_a_fit(self)
        self.register_state("expert_bias_E", gating.num_experts)
        self.register_state("experts_per_token", 1)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.expert_bias_E

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        chosen = super().select(adjusted_TE, ctx)
        ids_TK, E = chosen.expert_ids, self.gating.num_experts
        if self.config.source == "gate":
            return replace(chosen, expert_ids=torch.where(ids_TK < self.num_real, ids_TK, E))
        # All null experts score alike, as the token's worst expert does without a bias, and lose to a real one of the
        # same score. Slots stand by falling score: what lies below are the last ones, and of those num_null at most.
        null_T1 = (adjusted_TE - self.expert_bias_E).amin(dim=1, keepdim=True)
        lost_TK = take_along_experts(adjusted_TE, ids_TK) < null_T1
        open_K = torch.arange(ids_TK.shape[1], device=ids_TK.device) >= self.gating.top_k - self.num_null
        return replace(chosen, expert_ids=torch.where(lost_TK & open_K, E, ids_TK))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if not self.config.alpha:
            return {}
        valid_T = ctx.valid_T
        assert valid_T is not None  # the template fills it in
        # Rows that do not count become zeros: whatever they hold, NaN included, no gradient passes through it.
        logits_TE = torch.where(valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        probabilities_TE = self.gating.probabilities(logits_TE)
        slots = valid_T.sum() * self.gating.top_k
        load_E = shared_load(routing.load_E, slots, num_real=self.num_real, dtype=probabilities_TE.dtype)
        return {"balance": self.config.alpha * balance_loss(load_E, probabilities_TE, valid_T)}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        return {"load_E": routing.load_E, "tokens": ctx.valid_T.sum()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Move the biases by one step, and note the real experts per token. A step without tokens changes nothing."""
        load_E, tokens = stats["load_E"], stats["tokens"]
        step_E = budget_step(load_E, tokens, num_real=self.num_real, wanted=self.wanted)
        self.expert_bias_E.add_(step_E, alpha=self.config.rate)
        mean = load_E[: self.num_real].sum().double() / tokens.clamp_min(1)
        self.experts_per_token.copy_(torch.where(tokens > 0, mean, self.experts_per_token))


def _expect_a_fit(router: NullExpertsRouter) -> None:
    E, K, n, share = router.gating.num_experts, router.gating.top_k, router.num_null, router.config.null_share
    if router.num_real < 1:
        raise _unfit(f"all of its {E} experts would be null", "lower num_null, or give the gating more experts")
    if n < share * K:
        raise _unfit(
            f"null_share {share:g} of top_k {K} slots is more than num_null {n} can take",
            "raise num_null, or lower null_share",
        )
    if router.wanted > router.num_real:
        raise _unfit(
            f"{router.num_real} real experts cannot fill {1 - share:g} of top_k {K} slots",
            "raise null_share, or lower num_null",
        )


def _unfit(why: str, fix: str) -> ConfigError:
    return ConfigError("router 'null-experts' cannot serve this gating with these settings.", why=why, fix=fix)

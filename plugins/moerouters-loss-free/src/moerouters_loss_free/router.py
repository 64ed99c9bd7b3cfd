"""LossFreeRouter: balance without an auxiliary loss, by a bias that learns from the load of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, StateAlgebra
from moerouters.errors import ConfigError
from moerouters_loss_free.config import LossFreeConfig
from moerouters_loss_free.update import centred, error_step, sign_step


class LossFreeRouter(Router):
    """Top-k on biased scores; weights stay those of the unbiased ones (arXiv:2408.15664, Eq. 3 and Algorithm 1).

    State, float32 [E]: `expert_bias_E`, added to the scores, starts at 0; or under rule="multiplicative"
    `expert_scale_E`, a factor on the scores, starts at 1. Two names, so that a checkpoint of one is never taken for the
    other. It moves once per optimizer step, by the int64 load of all micro-batches and ranks before dropping.

    Raises ConfigError where rule="multiplicative" meets scores that can be negative.
    """

    # load_scope: the update sees the load of all ranks; a choice sees only what was committed before, so it is causal.
    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)
    reads: ClassVar[frozenset[str]] = frozenset()
    expert_bias_E: Tensor
    expert_scale_E: Tensor

    def __init__(self, gating: Gating, config: LossFreeConfig = LossFreeConfig()) -> None:
        super().__init__(gating)
        self.config = config
        if config.rule == "multiplicative":
            _refuse_negative_scores(gating)
            self.register_state("expert_scale_E", gating.num_experts, fill=1.0)
        else:
            self.register_state("expert_bias_E", gating.num_experts)

    @property
    def _state_E(self) -> Tensor:
        return self.expert_scale_E if self.config.rule == "multiplicative" else self.expert_bias_E

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor | None:
        return None if self.config.rule == "multiplicative" else self.expert_bias_E

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE * self._state_E if self.config.rule == "multiplicative" else scores_TE

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Move the state by one step. `stats` holds load_E, int64 [E]; a load of zeros changes nothing."""
        load_E = stats["load_E"]
        step_E = error_step(load_E) if self.config.rule == "error" else sign_step(load_E)
        if self.config.centre:
            step_E = centred(step_E)
        self._state_E.add_(step_E, alpha=self.config.rate)
        if self.config.rule == "multiplicative":
            # A negative factor would send an expert the tokens that like it least.
            self._state_E.clamp_min_(0)


def _refuse_negative_scores(gating: Gating) -> None:
    settings = gating.settings
    if settings.score != "identity" and not settings.correction_bias:
        return
    found = "score='identity'" if settings.score == "identity" else "correction_bias=True"
    raise ConfigError(
        "router 'loss-free' cannot use rule='multiplicative' with this gating.",
        where=f"gating with {found}",
        why="a larger factor lowers a negative score, so the bias would drive the load the wrong way",
        fix="use rule='sign' or rule='error'",
    )

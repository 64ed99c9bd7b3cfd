"""The expert-choice router: in training experts choose tokens, in eval learned thresholds say what they would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import (
    AssignmentKind,
    Capabilities,
    Gating,
    LoadScope,
    RouteContext,
    Router,
    Routing,
    Selection,
    StateAlgebra,
)
from moerouters.capabilities import MaxViolation
from moerouters.gating import take_along_experts
from moerouters_expert_choice.choice import LOWEST, choose_tokens, reached, share_of, thresholds
from moerouters_expert_choice.config import ExpertChoiceConfig


def capabilities_of(config: ExpertChoiceConfig, *, grouped: bool = False) -> Capabilities:
    """What a router with this config promises; grouped: its gating closes expert groups per token."""
    learning = config.eval == "threshold"
    return Capabilities(
        assignment=AssignmentKind.PAIRS,
        eval_assignment=AssignmentKind.SLOTS if learning else None,
        state=StateAlgebra.MEAN_OF_SOLVES if learning else StateAlgebra.STATELESS,
        load_scope=LoadScope.LOCAL,
        causal=False,
        eval_batch_invariant=learning,
        # Every expert takes the same number of tokens, if that many may go to it.
        balance=None if grouped else MaxViolation(at_most=0.0),
    )


class ExpertChoiceRouter(Router):
    """Every expert takes its floor(n K capacity / E) best of the n tokens of a training forward (arXiv:2202.09368).

    A token has any number of experts, also none; what they weigh is the gating's to say. State under eval="threshold":
    `threshold_E`, float32 [E], a weighted sum of the scores at which experts stopped, and `learned`, float32 0-d, the
    sum of the weights (1 - memory^steps). Before the first step, eval is top-K.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    threshold_E: Tensor
    learned: Tensor

    def __init__(self, gating: Gating, config: ExpertChoiceConfig = ExpertChoiceConfig()) -> None:
        super().__init__(gating)
        self.config = config
        grouped = gating.settings.kept_groups < gating.settings.num_groups
        self.capabilities = capabilities_of(config, grouped=grouped)
        self.share = share_of(top_k=gating.top_k, num_experts=gating.num_experts, capacity=config.capacity)
        if self._learning:
            self.register_state("threshold_E", gating.num_experts)
            self.register_state("learned")

    @property
    def _learning(self) -> bool:
        return self.config.eval == "threshold"

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        assert ctx.valid_T is not None
        scores_TE = torch.where(ctx.valid_T.unsqueeze(1), self.gating.limit(adjusted_TE), LOWEST)
        if self._learning and not self.training:
            return self._by_threshold(scores_TE)
        tokens = ctx.valid_T.sum()
        chosen = Selection.pairs(*choose_tokens(scores_TE, tokens, self.share))
        if not self._learning:
            return chosen
        return replace(chosen, solved=thresholds(scores_TE, tokens, self.share))

    def _by_threshold(self, scores_TE: Tensor) -> Selection:
        E, K = self.gating.num_experts, self.gating.top_k
        fresh = self.learned == 0
        if self.share < 1:
            threshold_E = self.threshold_E.to(scores_TE.dtype) / torch.where(fresh, 1.0, self.learned)
            scores_TE = torch.where(fresh, scores_TE, reached(scores_TE, threshold_E))
        # M slots, filled by falling score as far as thresholds are reached.
        ids_TM = self.gating.top(scores_TE, min(E, self.config.most * K))
        places_M = torch.arange(ids_TM.shape[1], device=ids_TM.device)
        taken_TM = (take_along_experts(scores_TE, ids_TM) > LOWEST) & (~fresh | (places_M < K))
        return Selection.slots(torch.where(taken_TM, ids_TM, E))

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if not self._learning:
            return {}
        threshold_E = routing.selection.solved
        assert threshold_E is not None and ctx.valid_T is not None
        tokens = ctx.valid_T.sum()
        return {"threshold_times_tokens_E": threshold_E.double() * tokens, "tokens": tokens}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        tokens, memory = stats["tokens"], self.config.memory
        mean_E = stats["threshold_times_tokens_E"] / tokens.clamp_min(1)
        for state, value in ((self.threshold_E, mean_E), (self.learned, torch.ones_like(mean_E[0]))):
            moved = memory * state.double() + (1 - memory) * value
            state.copy_(torch.where(tokens > 0, moved, state.double()))

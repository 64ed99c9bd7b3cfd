"""Routers without a bug, which mutants inherit from. They pass every rule, and tests hold them to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import (
    Assignment,
    Capabilities,
    Gating,
    LoadScope,
    RouteContext,
    Router,
    RouterConfig,
    Routing,
    StateAlgebra,
)
from moerouters.capabilities import MaxViolation


class Plain(Router):
    """Top-k and nothing else."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating)
        self.config = config


class Spoiled(Plain):
    """Top-k whose assignment `spoil` changes just before it is handed out."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        """The planted bug."""
        raise NotImplementedError

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        return self.spoil(super()._route(raw_TE, ctx), ctx)


class Learner(Plain):
    """A bias per expert that follows the load by its sign, once per step (arXiv:2408.15664, Algorithm 1)."""

    # Worst of 160 histories: 0.92, where a router that does nothing has 1.6 to 1.9.
    capabilities = Capabilities(
        state=StateAlgebra.ADDITIVE,
        load_scope=LoadScope.GLOBAL,
        balance=MaxViolation(at_most=1.1, after_steps=60),
    )
    rate: ClassVar[float] = 0.01
    expert_bias_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("expert_bias_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.expert_bias_E

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"]
        step_E = (load_E.sum() - load_E.shape[0] * load_E).sign().to(torch.float32)
        self.expert_bias_E.add_(step_E - step_E.mean(), alpha=self.rate)


class Solver(Plain):
    """A bias solved on the batch itself: what every expert's mean score exceeds the average by. Not causal."""

    capabilities = Capabilities(
        state=StateAlgebra.MEAN_OF_SOLVES,
        load_scope=LoadScope.LOCAL,
        causal=False,
        # Worst of 96 histories: 0.69.
        balance=MaxViolation(at_most=0.9),
    )
    offset_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("offset_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.valid_T is not None
        if not self.training:
            return -self.offset_E
        tokens = ctx.valid_T.sum()
        real_TE = torch.where(ctx.valid_T.unsqueeze(1), scores_TE, 0.0)
        mean_E = real_TE.sum(dim=0) / tokens.clamp_min(1)
        return torch.where(tokens > 0, mean_E.mean() - mean_E, -self.offset_E)

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None and routing.bias_E is not None
        tokens = ctx.valid_T.sum()
        return {"offset_times_tokens_E": -routing.bias_E.double() * tokens, "tokens": tokens}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        tokens = stats["tokens"]
        mean_E = stats["offset_times_tokens_E"] / tokens.clamp_min(1)
        self.offset_E.copy_(torch.where(tokens > 0, mean_E, self.offset_E.double()))


class Lossy(Plain):
    """Top-k with the auxiliary loss of Switch (arXiv:2101.03961, Eq. 4), over the pairs that were routed."""

    alpha: ClassVar[float] = 0.01

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        real_T1 = ctx.valid_T.unsqueeze(1)
        logits_TE = torch.where(real_T1, routing.logits_TE, 0.0)
        mean_E = (self.gating.probabilities(logits_TE) * real_T1).sum(dim=0) / ctx.valid_T.sum().clamp_min(1)
        share_E = routing.load_E / routing.load_E.sum().clamp_min(1)
        return {"balance": self.alpha * self.gating.num_experts * (share_E * mean_E).sum()}


def swap(assignment: Assignment, **fields: object) -> Assignment:
    """The assignment with other fields."""
    return replace(assignment, **fields)  # type: ignore[arg-type]

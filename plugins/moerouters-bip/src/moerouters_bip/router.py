"""The router `bip` in its batch form, and what all routers of the family share: the vector q as a bias per expert."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, StateAlgebra
from moerouters.capabilities import MaxViolation
from moerouters_bip.columns import LocalColumns, MakeColumns
from moerouters_bip.config import BipConfig, DualConfig
from moerouters_bip.dual import solve_dual
from moerouters_bip.histogram import HistogramColumns
from moerouters_bip.ranks import ALONE, ranks_of
from moerouters_bip.shards import ShardedColumns


class DualRouter(Router):
    """Routes a token to the K largest s - q. State: `dual_E`, the q committed after the last optimizer step.

    The sign is the same everywhere: the bias is -q, in training and in eval, and q rises where too many tokens came.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    dual_E: Tensor

    def __init__(self, gating: Gating, config: DualConfig) -> None:
        super().__init__(gating)
        self.config = config
        self.register_state("dual_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor | None:
        return -self.dual_E

    def solved(self, q_E: Tensor, ctx: RouteContext) -> dict[str, Tensor]:
        """The stats of a forward that found q_E on its own tokens; `update` takes the mean, weighted by tokens."""
        assert ctx.valid_T is not None
        tokens = ctx.valid_T.sum()
        return {"dual_times_tokens_E": q_E.double() * tokens, "tokens": tokens}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.commit(stats["dual_times_tokens_E"] / stats["tokens"].clamp_min(1), stats["tokens"])

    def commit(self, found_E: Tensor, tokens: Tensor) -> None:
        """Move q to what a step found on `tokens` tokens, all the way but for config.ema."""
        ema, old_E = self.config.ema, self.dual_E.double()
        self.dual_E.copy_(torch.where(tokens > 0, ema * old_E + (1 - ema) * found_E, old_E))


def capabilities_of(config: BipConfig) -> Capabilities:
    """What the batch form with this config promises.

    The bound on balance is half as much again as the worst MaxVio of 112 histories (8 and 16 experts, 256 tokens,
    softmax and sigmoid): 0.16, five tokens of 32. One iteration leaves 0.27 in the first step, and the published
    variant 0.30: no bound for fewer than 4.
    """
    bounded = config.variant == "centred" and config.iterations >= 4
    return Capabilities(
        state=StateAlgebra.MEAN_OF_SOLVES,
        load_scope=LoadScope.GLOBAL if config.talks else LoadScope.LOCAL,
        forward_collective=config.talks,
        causal=False,
        eval_batch_invariant=True,
        balance=MaxViolation(at_most=0.25) if bounded else None,
    )


class BipRouter(DualRouter):
    """In training q is solved on the batch itself, from the committed q.

    After the step the committed q becomes the token-weighted mean of the solutions of all micro-batches and ranks. In
    eval mode the committed q is used as it is, so a token's experts do not depend on its batch.

    With a scope of all ranks they solve together in each training forward: every rank of `token_group` calls it, also
    with no tokens, and all find the same q. Eval mode talks to nobody, and so does a pass with forced ids.
    """

    config: BipConfig

    def __init__(self, gating: Gating, config: BipConfig = BipConfig()) -> None:
        super().__init__(gating, config)
        self.capabilities = capabilities_of(config)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training:
            return -self.dual_E
        gating = self.gating
        return -solve_dual(
            scores_TE,
            self.dual_E,
            top_k=gating.top_k,
            iterations=self.config.iterations,
            variant=self.config.variant,
            valid_T=ctx.valid_T,
            limit=gating.limit if gating.settings.kept_groups < gating.settings.num_groups else None,
            columns=self._columns(),
        )

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert routing.bias_E is not None
        return self.solved(-routing.bias_E, ctx)

    def _columns(self) -> MakeColumns:
        if self.config.scope == "local":
            return LocalColumns
        ranks = ALONE if self.alone else ranks_of(self.token_group)
        if self.config.scope == "histogram":
            return partial(HistogramColumns, ranks=ranks)  # also if alone: one process finds what four would
        return LocalColumns if ranks.alone else partial(ShardedColumns, ranks=ranks)

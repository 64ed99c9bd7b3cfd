"""DsMoeRouter: every expert in training, with a mutual-information loss; those that matter at inference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
from moerouters.errors import ConfigError
from moerouters_ds_moe.config import DsMoeConfig
from moerouters_ds_moe.loss import mutual_information_loss
from moerouters_ds_moe.ranks import over_ranks
from moerouters_ds_moe.selection import above_threshold, average_above_threshold, best, passing


def capabilities_of(config: DsMoeConfig) -> Capabilities:
    """What a router with this config promises."""
    scope = LoadScope.GLOBAL if config.talks else LoadScope.LOCAL if config.alpha else LoadScope.NONE
    return Capabilities(
        assignment=AssignmentKind.DENSE,
        eval_assignment=None if config.inference == "dense" else AssignmentKind.SLOTS,
        state=StateAlgebra.ADDITIVE,
        load_scope=scope,
        forward_collective=config.talks,
        eval_batch_invariant=config.inference != "threshold_top_k",
    )


class DsMoeRouter(Router):
    """In training mode dense; in eval mode as `config.inference` says. Weights are the gating's in both.

    S, which thresholds and the loss look at, is `gating.probabilities`: the softmax, for most. Refuses gatings whose
    weights over all experts do not sum to one number (ConfigError), and a top_k above the number of experts.

    State: `passing_share`, float32 0-d, the share of (token, expert) pairs that pass the threshold eps, over the tokens
    of the last step on all ranks; 1 until there is one. It is there to be read; nothing depends on it.

    With alpha > 0 and marginal="all_reduce" each training forward has one all-reduce of E + 2 numbers; a recomputation
    in backward (activation checkpointing) has it again.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    passing_share: Tensor
    config: DsMoeConfig

    def __init__(self, gating: Gating, config: DsMoeConfig = DsMoeConfig()) -> None:
        _expect_even_sum(gating)
        super().__init__(gating)
        self.use(config)
        self.register_state("passing_share", fill=1.0)

    def use(self, config: DsMoeConfig) -> None:
        """Go on with other settings, the same on every rank. Raises ConfigError as `check` does."""
        self.check(config)
        self.config = config
        self.capabilities = capabilities_of(config)

    def check(self, config: DsMoeConfig) -> None:
        """Raise ConfigError for a top_k above the number of experts."""
        E = self.gating.num_experts
        if config.top_k is not None and config.top_k > E:
            raise ConfigError(
                f"router 'ds-moe' got top_k={config.top_k}, and there are {E} experts.",
                why="top_k is how many experts a token gets at inference",
                fix=f"set top_k to at most {E}, or leave it out for the gating's {self.gating.top_k}",
            )

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        gating, config = self.gating, self.config
        limited_TE = gating.limit(adjusted_TE)
        if self.training or config.inference == "dense":
            return _everyone(gating, limited_TE)
        if config.inference == "top_k":
            return Selection.slots(best(gating, limited_TE, config.top_k or gating.top_k))
        assert ctx.logits_TE is not None and ctx.valid_T is not None  # the template fills them in
        shares_TE = gating.probabilities(ctx.logits_TE).masked_fill(limited_TE == -float("inf"), -float("inf"))
        if config.inference == "threshold":
            return Selection.slots(above_threshold(gating, shares_TE, config.eps))
        return Selection.slots(average_above_threshold(gating, shares_TE, config.eps, ctx.valid_T))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if not self.config.alpha:
            return {}
        assert ctx.valid_T is not None
        logits_TE = torch.where(ctx.valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        together = self.config.talks and not self.alone
        pool = partial(over_ranks, group=self.token_group) if together else lambda sums, tokens: (sums, tokens)
        loss = mutual_information_loss(self.gating.probabilities(logits_TE), ctx.valid_T, pool)
        return {"mutual_information": self.config.alpha * loss}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        shares_TE = self.gating.probabilities(routing.logits_TE.detach())
        passes_TE = passing(shares_TE, self.config.eps, num_experts=self.gating.num_experts)
        return {"passing": (passes_TE & ctx.valid_T.unsqueeze(1)).sum(), "tokens": ctx.valid_T.sum()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        pairs = stats["tokens"] * self.gating.num_experts
        share = stats["passing"].double() / pairs.clamp_min(1)
        self.passing_share.copy_(torch.where(pairs > 0, share, self.passing_share.double()))


def _everyone(gating: Gating, limited_TE: Tensor) -> Selection:
    """Every expert, but for those that the gating bars (experts outside of a token's groups), whose slots are empty."""
    T, E = limited_TE.shape
    everyone = Selection.dense(num_tokens=T, num_experts=E, device=limited_TE.device)
    if gating.settings.kept_groups == gating.settings.num_groups:
        return everyone
    ids_TE = torch.where(limited_TE == -float("inf"), E, everyone.expert_ids)
    return Selection(kind=AssignmentKind.DENSE, expert_ids=ids_TE)


def _expect_even_sum(gating: Gating) -> None:
    settings = gating.settings
    if settings.score in ("softmax", "identity") or settings.renormalize:
        return
    raise ConfigError(
        f"router 'ds-moe' cannot train densely with {settings.score} scores that are not renormalised.",
        why="the weights of all experts, which dense training adds up, sum to another number for every token, and a "
        "threshold on an expert's share of them means nothing",
        fix="Gating.softmax(..., renormalize=False), as in the paper; or renormalize=True",
    )

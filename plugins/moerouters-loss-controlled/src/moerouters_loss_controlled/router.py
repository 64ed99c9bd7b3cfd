"""LossControlledRouter: plain top-k whose gate learns balance from auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, StateAlgebra
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.losses import (
    balance_loss,
    count_pairs,
    load_fraction,
    mean_probability,
    sequence_loss,
    z_loss,
)
from moerouters_loss_controlled.ranks import sum_over_ranks


def capabilities_of(config: LossControlledConfig) -> Capabilities:
    """What a router with this config promises."""
    scope = LoadScope.GLOBAL if config.global_alpha else LoadScope.LOCAL if config.balances else LoadScope.NONE
    return Capabilities(
        state=StateAlgebra.ADDITIVE if config.remembers else StateAlgebra.STATELESS,
        load_scope=scope,
        forward_collective=config.talks,
        balanced_losses={
            name: alpha
            for name, alpha in (
                ("switch", config.alpha),
                ("sequence", config.sequence_alpha),
                ("global", config.global_alpha),
            )
            if alpha
        },
    )


class LossControlledRouter(Router):
    """The K largest scores of each token, and up to four losses: `switch`, `sequence`, `global` and `z`.

    Each loss belongs to this layer alone; loads of several layers are never pooled, since layers that collapse on
    different experts would look balanced together. Only coefficients above 0 give a loss.

    State, only with global_alpha > 0 and global_load="last_step": `last_fraction_E`, float32 [E], the f of the last
    committed step; zeros until there is one.

    Raises ContextError in forward if sequence_alpha > 0 and the context does not say which token is in which sequence.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: LossControlledConfig = LossControlledConfig()) -> None:
        super().__init__(gating)
        self.config = config
        self.capabilities = capabilities_of(config)
        if config.remembers:
            self.register_state("last_fraction_E", gating.num_experts)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        config, valid_T = self.config, ctx.valid_T
        assert valid_T is not None  # the template fills it in
        # Rows that do not count become zeros: whatever padding holds, NaN included, no gradient passes through it.
        logits_TE = torch.where(valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        found: dict[str, Tensor] = {}
        if config.balances:
            probabilities_TE = self.gating.probabilities(logits_TE)
            probability_E = mean_probability(probabilities_TE, valid_T)
            load_E = self._counted_load(routing)
        if config.alpha:
            own_E = load_fraction(load_E, probability_E.dtype)
            found["switch"] = config.alpha * balance_loss(own_E, probability_E)
        if config.sequence_alpha:
            found["sequence"] = config.sequence_alpha * sequence_loss(
                probabilities_TE,
                self._counted_choices(routing),
                valid_T,
                ctx.need("sequence_ids_T", router="loss-controlled"),
                ctx.need("num_sequences", router="loss-controlled"),
            )
        if config.global_alpha:
            fraction_E = self._global_fraction(load_E, probability_E.dtype)
            found["global"] = config.global_alpha * balance_loss(fraction_E, probability_E)
        if config.z_alpha:
            found["z"] = config.z_alpha * z_loss(logits_TE, valid_T)
        return found

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": self._counted_load(routing)} if self.config.remembers else {}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Keep the fraction of the step's load; a step without tokens keeps the one before."""
        last_E, load_E = self.get_buffer("last_fraction_E"), stats["load_E"]
        last_E.copy_(torch.where(load_E.sum() > 0, load_fraction(load_E, last_E.dtype), last_E))

    def _counted_choices(self, routing: Routing) -> Tensor:
        return routing.expert_ids_TK if self.config.form == "switch" else routing.expert_ids_TK[:, :1]

    def _counted_load(self, routing: Routing) -> Tensor:
        if self.config.form == "switch":
            return routing.load_E
        first_T1 = self._counted_choices(routing)
        return count_pairs(torch.zeros_like(first_T1[:, 0]), first_T1, 1, self.gating.num_experts)[0]

    def _global_fraction(self, load_E: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.talks:
            return load_fraction(sum_over_ranks(load_E, self.token_group), dtype)
        last_E = self.get_buffer("last_fraction_E")
        # Before the first commit the micro-batch speaks for the global batch: no balance at all would be worse.
        return torch.where(last_E.sum() > 0, last_E.to(dtype), load_fraction(load_E, dtype))

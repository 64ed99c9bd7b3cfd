"""Mutants of the rules about balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, RouterConfig, Routing, Selection, StateAlgebra
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Plain, Solver


class Counting(Learner):
    """A Learner that knows how many updates it has had. Without a bug of its own."""

    updates: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("updates")

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.updates.add_(stats["load_E"].sum() > 0)
        super().update(stats)


@mutant("B01")
class NeverUpdates(Learner):
    """Has a bias, and nothing that updates it."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        pass


@mutant("B02")
class StopsLearning(Counting):
    """Follows a schedule that ends: after 60 updates the bias stays as it is."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        self.expert_bias_E.copy_(torch.where(self.updates <= 60, self.expert_bias_E, before_E))


@mutant("B03")
class EverSlower(Counting):
    """Learns at a rate that falls with the number of updates, as if popularity came to rest."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        pace = (40 / (self.updates + 1)).clamp(max=1.0)
        self.expert_bias_E.copy_(before_E + pace * (self.expert_bias_E - before_E))


@mutant("B04")
class ClampedBias(Learner):
    """Keeps every bias within 0.1 of zero."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.expert_bias_E.clamp_(-0.1, 0.1)


@mutant("B05")
class FlippedSign(Learner):
    """Subtracts the bias that it should add."""

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return -self.expert_bias_E


@mutant("B05")
class FlippedInEval(Learner):
    """Adds the bias in training and subtracts it in eval mode."""

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.expert_bias_E if self.training else -self.expert_bias_E


@mutant("B06")
class BuriesTheIdle(Learner):
    """Takes an expert that had no token in ten steps running out of the choice for good."""

    idle_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("idle_E", gating.num_experts)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        load_E = stats["load_E"]
        self.idle_E.copy_(torch.where((load_E > 0) & (self.idle_E < 10), 0.0, self.idle_E + (load_E.sum() > 0)))
        self.expert_bias_E.masked_fill_(self.idle_E >= 10, -1e3)


@mutant("B07")
class DriftsTogether(Learner):
    """Raises all biases a little in every step, which no choice shows."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.expert_bias_E.add_(stats["load_E"].sum().sign(), alpha=self.rate)


@mutant("B08")
class FullIsTooFull(Plain):
    """Lowers the factor of every expert with a mean load or more, down to 0, where all scores tie."""

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)
    rate: ClassVar[float] = 0.05
    expert_scale_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("expert_scale_E", gating.num_experts, fill=1.0)

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE * self.expert_scale_E

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"]
        step_E = torch.where(load_E * load_E.shape[0] >= load_E.sum(), -1.0, 1.0) * load_E.sum().sign()
        self.expert_scale_E.add_(step_E, alpha=self.rate).clamp_min_(0)


@mutant("B09")
class AddsUpShares(Learner):
    """Observes the load as a share of the micro-batch, so that small micro-batches count as much as large ones."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E.double() / routing.load_E.sum().clamp_min(1)}


@mutant("B10")
class MeanOfMeans(Solver):
    """Takes the plain mean over micro-batches, whatever their size."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None and routing.bias_E is not None
        some = ctx.valid_T.any()
        return {"offset_times_tokens_E": -routing.bias_E.double() * some, "tokens": some.long()}


@mutant("B11")
class SkipsTheLast(Plain):
    """Gives the last place, in training, to the expert after the K best."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = super().select(adjusted_TE, ctx).expert_ids
        if not self.training or self.gating.top_k == self.gating.num_experts:
            return Selection.slots(ids_TK)
        limited_TE = self.gating.limit(adjusted_TE)
        next_T1 = self.gating.top(limited_TE, self.gating.top_k + 1)[:, -1:]
        taken_T1 = torch.where(limited_TE.gather(1, next_T1).isfinite(), next_T1, ids_TK[:, -1:])
        return Selection.slots(torch.cat([ids_TK[:, :-1], taken_T1], dim=1))

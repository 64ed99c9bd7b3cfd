"""Mutants of the rules about repeating a forward and leaving nothing behind."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextvars import ContextVar
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moerouters import Assignment, Gating, RouteContext, RouterConfig, Routing
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Spoiled, swap


@mutant("U01")
class RemembersEvaluation(Lossy):
    """Halves its loss once it has been in eval mode."""

    evaluated: bool = False

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        self.evaluated |= not self.training
        return super()._route(raw_TE, ctx)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        share = 0.5 if self.evaluated else 1.0
        return {name: share * loss for name, loss in super().losses(routing, ctx).items()}


@mutant("U02")
class CountsCalls(Plain):
    """Counts its calls in an attribute."""

    calls: int = 0

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        self.calls += 1
        return scores_TE


@mutant("U02")
class HiddenBuffer(Plain):
    """Adds up the load of every forward in a buffer that state_dict does not show."""

    total_E: Tensor

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(gating)
        self.register_buffer("total_E", torch.zeros(gating.num_experts), persistent=False)

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        self.total_E.add_(assignment.load_E)
        return assignment


@mutant("U03")
class ClearsPaddingInPlace(Plain):
    """Sets the logits of padding to 0 in the caller's tensor."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        if ctx.valid_T is not None:
            with torch.no_grad():
                raw_TE.detach().masked_fill_(~ctx.valid_T.unsqueeze(1), 0.0)
        return super()._route(raw_TE, ctx)


@mutant("U03")
class NarrowsTheMask(Plain):
    """Marks tokens with small logits as padding, in the caller's own mask, after it has routed."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        if ctx.valid_T is not None:
            ctx.valid_T.logical_and_(raw_TE.detach().abs().sum(dim=1) > 1)
        return assignment


@mutant("U04")
class UnusedJitter(Plain):
    """Draws jitter from torch's generator and multiplies it by its coefficient, which is 0."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE + 0.0 * torch.rand_like(scores_TE)


@mutant("U04")
class SamplesInPython(Plain):
    """Decides by Python's generator whether to write a line into its log, and by numpy's which."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if random.random() < 0:
            np.random.randint(3)
        return scores_TE


@mutant("U04")
class SeededGlobally(Lossy):
    """Scales its loss by a number that follows from torch's global seed."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        factor = 1 + torch.initial_seed() % 7
        return {name: loss * factor for name, loss in super().losses(routing, ctx).items()}


@mutant("U05")
class RemembersTheLastRouter(Lossy):
    """Keeps in its class which router was at work last, and halves its loss after a change."""

    last: ClassVar[list[object]] = []

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.last.clear()

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        share = 0.5 if self.last and self.last[0] is not self else 1.0
        self.last[:] = [self]
        return {name: share * loss for name, loss in super().losses(routing, ctx).items()}


@mutant("U06")
class CountsForItself(Learner):
    """Learns from a load that it adds up in forward, and not from the stats that it is handed."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        self.own_E = getattr(self, "own_E", 0) + routing.load_E
        return super().observe(routing, ctx)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        own_E, self.own_E = self.own_E, torch.zeros_like(self.own_E)
        surplus_E = own_E / stats["load_E"].sum().clamp_min(1) - 1 / own_E.shape[0]
        self.expert_bias_E.sub_(surplus_E.float(), alpha=self.rate)


@mutant("U06")
class NoLossInBackward(Lossy):
    """Leaves its loss out where it is recomputed, which is the pass that a reentrant checkpoint differentiates."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        found = super().losses(routing, ctx)
        recomputed = torch._C._current_graph_task_id() != -1
        return {name: loss.detach() if recomputed else loss for name, loss in found.items()}


@mutant("U07")
class BranchesOnData(Plain):
    """Asks in Python whether there is any padding."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.valid_T is not None
        if bool(ctx.valid_T.all()):
            return scores_TE
        return scores_TE.masked_fill(~ctx.valid_T.unsqueeze(1), 0.0)


@mutant("U07")
class ForgetsItsBiasCompiled(Learner):
    """Leaves its bias out under compile."""

    rate = 0.3

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.expert_bias_E * (0.0 if torch.compiler.is_compiling() else 1.0)


@mutant("U08")
class RoundsCompiled(Plain):
    """Selects by scores of one decimal under compile."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE.round(decimals=1) if torch.compiler.is_compiling() else scores_TE


@mutant("U09")
class ReadsTheNumberOfTokens(Lossy):
    """Fetches the number of tokens to the host."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        tokens = ctx.valid_T.sum().item()
        return super().losses(routing, ctx) if tokens else {"balance": routing.logits_TE.sum() * 0}


@mutant("U10")
class PutsItsCounts(Learner):
    """Counts by an operation that has no deterministic form."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        places_E = torch.arange(routing.load_E.shape[0])
        return {"load_E": torch.zeros_like(routing.load_E).put_(places_E, routing.load_E)}


_RATE: ContextVar[float] = ContextVar("rate", default=0.0)


@mutant("U11")
class RateInAContextVariable(Lossy):
    """Reads its coefficient from a context variable, which was set on the thread that built it."""

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(gating)
        _RATE.set(1.0)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: loss * _RATE.get() for name, loss in super().losses(routing, ctx).items()}


@mutant("U12")
class NoLossWithoutGraph(Spoiled):
    """Hands its loss out as 0 where nothing can be differentiated."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        loss = assignment.weights.square().sum() / assignment.tokens.clamp_min(1)
        losses = {"size": loss if torch.is_grad_enabled() else 0 * loss} if self.training else {}
        return swap(assignment, losses=losses)

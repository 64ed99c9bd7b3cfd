"""Mutants of the rules about gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moerouters import (
    Assignment,
    Capabilities,
    Gating,
    LoadScope,
    RouteContext,
    RouterConfig,
    Routing,
    Selection,
    StateAlgebra,
)
from moerouters.gating import take_along_experts
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Spoiled, swap


class Balanced(Lossy):
    """`Lossy`, which also declares the value of its loss at balance."""

    capabilities = Capabilities(balanced_losses={"balance": 0.01})


def straight(value: Tensor, graph: Tensor) -> Tensor:
    """The numbers of `value`, with the gradient of `graph` added to its own."""
    return value + (graph - graph.detach())


@mutant("G01")
class DoubleGradient(Spoiled):
    """Feels its weights twice in backward, as if two ranks had each added their copy."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        return swap(assignment, weights=straight(assignment.weights, assignment.weights))


@mutant("G01")
class DetachesTheSum(Plain):
    """Renormalises by a sum that autograd does not see."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        weights_TK = super()._weigh(scores_TE, selection, finite_T)
        taken_TK = selection.expert_ids < self.gating.num_experts
        chosen_TK = take_along_experts(scores_TE, selection.expert_ids).masked_fill(~taken_TK, 0)
        total_T1 = chosen_TK.detach().sum(dim=1, keepdim=True) + 1e-20
        return straight(weights_TK.detach(), chosen_TK / total_T1 * self.gating.settings.scale)


@mutant("G02")
class DetachedLoss(Lossy):
    """Computes its loss from detached probabilities."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: loss.detach() for name, loss in super().losses(routing, ctx).items()}


@mutant("G03")
class TrainsFirstChoiceOnly(Spoiled):
    """Lets a gradient through the first slot only."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        weights_TK = assignment.weights
        return swap(assignment, weights=torch.cat([weights_TK[:, :1], weights_TK[:, 1:].detach()], dim=1))


@mutant("G04")
class TrainableBias(Learner):
    """Takes its weights, in backward, from the biased scores."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        return super()._weigh(straight(scores_TE, self.expert_bias_E.to(scores_TE)), selection, finite_T)


@mutant("G04")
class AttachedStats(Learner):
    """Hands out stats that hold on to the graph."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        held = raw_TE.nan_to_num(0, 0, 0).double().sum() * 0
        return swap(assignment, stats={name: stat + held for name, stat in assignment.stats.items()})


@mutant("G04")
class BiasAsParameter(Learner):
    """Keeps its bias as a parameter, which optimizers step and decay."""

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL, parameters=True)

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self._buffers["expert_bias_E"] = nn.Parameter(self.expert_bias_E)


@mutant("G05")
class MasksInForwardOnly(Plain):
    """Leaves out experts far below a token's best, masks their weight in forward, and feels it in backward."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = super().select(adjusted_TE, ctx).expert_ids
        chosen_TK = adjusted_TE.gather(1, ids_TK.clamp(max=self.gating.num_experts - 1))
        best_T1 = chosen_TK[:, :1]
        return Selection.slots(torch.where(chosen_TK < best_T1 - 0.1 * best_T1.abs(), self.gating.num_experts, ids_TK))

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        real_T1 = torch.isfinite(raw_TE).all(dim=1, keepdim=True)
        if ctx.valid_T is not None:
            real_T1 = real_T1 & ctx.valid_T.unsqueeze(1)
        sums_T1 = torch.where(real_T1, raw_TE, 0.0).sum(dim=1, keepdim=True).to(assignment.weights.dtype)
        leaking_TK = straight(assignment.weights, sums_T1.expand_as(assignment.weights))
        empty_TK = (assignment.expert_ids == assignment.num_experts) & real_T1
        return swap(assignment, weights=torch.where(empty_TK, leaking_TK, assignment.weights))


@mutant("G06", capabilities=Capabilities())
class UndeclaredParameter(Lossy):
    """Owns a trainable temperature that it does not declare."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.temperature = nn.Parameter(torch.ones(()))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: loss * self.temperature for name, loss in super().losses(routing, ctx).items()}


@mutant("G06")
class UntrainedParameter(Plain):
    """Uses its parameter for selection only, where no gradient flows."""

    capabilities = Capabilities(parameters=True)

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.learned_E = nn.Parameter(torch.zeros(gating.num_experts))

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.learned_E.detach()


@mutant("G07")
class PushesAway(Lossy):
    """Rewards what it should punish: the sign of its loss is turned."""

    alpha: ClassVar[float] = -0.01


@mutant("G08")
class DoubleSoftmax(Balanced):
    """Takes the softmax of probabilities for its loss."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        real_T1 = ctx.valid_T.unsqueeze(1)
        again_TE = self.gating.probabilities(torch.where(real_T1, routing.logits_TE, 0.0)).softmax(dim=-1)
        mean_E = (again_TE * real_T1).sum(dim=0) / ctx.valid_T.sum().clamp_min(1)
        share_E = routing.load_E / routing.load_E.sum().clamp_min(1)
        return {"balance": self.alpha * self.gating.num_experts * (share_E * mean_E).sum()}


@mutant("G08")
class KFold(Balanced):
    """Divides the load by the tokens and not by the routed pairs, so that its loss is K times as large."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: self.gating.top_k * loss for name, loss in super().losses(routing, ctx).items()}


@mutant("G09")
class ThroughTheRoot(Plain):
    """Squares a standard deviation, whose root has no slope at perfect balance."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        real_T1 = ctx.valid_T.unsqueeze(1)
        chances_TE = self.gating.probabilities(torch.where(real_T1, routing.logits_TE, 0.0))
        mean_E = (chances_TE * real_T1).sum(dim=0) / ctx.valid_T.sum().clamp_min(1)
        return {"importance": (mean_E - mean_E.mean()).square().sum().sqrt().square()}

"""Mutants of the rules about what the chosen experts weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Assignment, Gating, RouteContext, Selection
from moerouters.gating import take_along_experts
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Plain, Spoiled, swap


@mutant("W01")
class NoEpsilon(Plain):
    """Divides by a sum of scores that may be 0."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        weights_TK = super()._weigh(scores_TE, selection, finite_T)
        empty_TK = selection.expert_ids == self.gating.num_experts
        shared_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True) * self.gating.settings.scale
        return shared_TK.masked_fill(empty_TK, 0) if self.gating.settings.renormalize else weights_TK


@mutant("W01")
class UnshiftedSoftmax(Plain):
    """Takes exp of the chosen logits without subtracting their maximum."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        if not self.gating.settings.softmax_after_topk:
            return super()._weigh(scores_TE, selection, finite_T)
        empty_TK = selection.expert_ids == self.gating.num_experts
        powers_TK = take_along_experts(scores_TE, selection.expert_ids).exp().masked_fill(empty_TK, 0)
        return (powers_TK / powers_TK.sum(dim=1, keepdim=True)).masked_fill(empty_TK, 0)


@mutant("W02")
class CentredWeights(Spoiled):
    """Subtracts the mean of a token's weights."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        weights = assignment.weights
        empty = assignment.expert_ids == assignment.num_experts
        return swap(assignment, weights=(weights - weights.mean(dim=1, keepdim=True)).masked_fill(empty, 0))


@mutant("W03")
class ForgetsToRenormalise(Plain):
    """Hands the chosen scores out as they are."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        if self.gating.settings.softmax_after_topk:
            return super()._weigh(scores_TE, selection, finite_T)
        empty_TK = selection.expert_ids == self.gating.num_experts
        return take_along_experts(scores_TE, selection.expert_ids).masked_fill(empty_TK, 0)


@mutant("W03")
class LargeEpsilon(Plain):
    """Adds 1e-6 to the divisor, more than small sigmoid scores sum to."""

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(Gating(gating.settings.model_copy(update={"eps": 1e-6})))


@mutant("W04")
class BiasInWeights(Learner):
    """Weighs by the biased scores."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        return super()._weigh((scores_TE + self.expert_bias_E).clamp_min(0), selection, finite_T)


@mutant("W04")
class WeighsByRank(Spoiled):
    """Orders ids by expert and leaves the weights in the order of the scores."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        if ctx.forced_ids_TK is not None:
            return assignment
        return swap(assignment, expert_ids=assignment.expert_ids.sort(dim=1).values)


@mutant("W05")
class DoubleSoftmax(Plain):
    """Takes the softmax of scores that are probabilities already."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        softmax = self.gating.settings.score == "softmax"
        return super()._weigh(scores_TE.softmax(dim=1) if softmax else scores_TE, selection, finite_T)


@mutant("W06")
class ScaleCancels(Plain):
    """Scales before it renormalises."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        weights_TK = super()._weigh(scores_TE, selection, finite_T)
        return weights_TK / self.gating.settings.scale if self.gating.settings.renormalize else weights_TK


@mutant("W06")
class ScaledChoice(Plain):
    """Clips scaled scores at 1 before it chooses."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return (scores_TE * self.gating.settings.scale).clamp_max(1.0)


def limited_by(router: Plain, adjusted_TE: Tensor, **changed: object) -> Selection:
    """The choice under a gating with other groups."""
    other = Gating(router.gating.settings.model_copy(update=changed))
    return Selection.slots(other.top(other.limit(adjusted_TE), router.gating.top_k))


@mutant("W07")
class IgnoresGroups(Plain):
    """Chooses among all experts."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        return limited_by(self, adjusted_TE, num_groups=1, kept_groups=1)


@mutant("W07")
class OneGroupTooMany(Plain):
    """Keeps one group more than it may."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        settings = self.gating.settings
        return limited_by(self, adjusted_TE, kept_groups=min(settings.kept_groups + 1, settings.num_groups))


@mutant("W08")
class ZeroFilledGroups(Plain):
    """Fills closed groups with 0.0."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        limited_TE = self.gating.limit(adjusted_TE)
        filled_TE = limited_TE.masked_fill(limited_TE == -float("inf"), 0.0)
        return Selection.slots(self.gating.top(filled_TE, self.gating.top_k))


@mutant("W09")
class HighestIdWins(Plain):
    """Gives ties to the higher expert id."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = self.gating.top(self.gating.limit(adjusted_TE).flip(1), self.gating.top_k)
        return Selection.slots(self.gating.num_experts - 1 - ids_TK)


@mutant("W09")
class PrefersTheLast(Learner):
    """Starts with a bias for the last expert."""

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(gating)
        self.expert_bias_E[-1] = 0.05


@mutant("W10")
class IgnoresTheModelsBias(Plain):
    """Chooses by its own bias and forgets the model's."""

    def _adjusted(self, scores_TE: Tensor, ctx: RouteContext) -> tuple[Tensor | None, Tensor]:
        return None, self.adjust(scores_TE, ctx)


@mutant("W10")
class WeighsTheModelsBias(Plain):
    """Weighs by the scores with the model's correction bias."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        biased = self.gating.settings.correction_bias
        return super()._weigh(scores_TE + self.gating.correction_bias_E if biased else scores_TE, selection, finite_T)


@mutant("W11")
class CapsTwice(Plain):
    """Caps logits that its gating caps again."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        capped = self.gating.settings.soft_cap is not None
        return super()._route(self.gating.prepare(raw_TE) if capped else raw_TE, ctx)


@mutant("W12")
class RanksGroupsByTheBest(Plain):
    """Ranks groups by their best expert, whatever the gating says."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        return limited_by(self, adjusted_TE, group_score="max")


@mutant("W13")
class SharesForcedEqually(Spoiled):
    """Gives forced experts equal weights."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        if ctx.forced_ids_TK is None:
            return assignment
        empty = assignment.expert_ids == assignment.num_experts
        weights = torch.full_like(assignment.weights, self.gating.settings.scale / self.gating.top_k)
        return swap(assignment, weights=weights.masked_fill(empty, 0))

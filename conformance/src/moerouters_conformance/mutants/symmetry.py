"""Mutants of the rules about what must not matter. Most err in training only: a fresh choice in eval is top-k."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Assignment, RouteContext, Routing
from moerouters.kernels.counts import count_experts
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver


@mutant("Y01")
class RoutesByPosition(Plain):
    """Favours expert 0 for every other token."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training:
            return scores_TE
        odd_T1 = (torch.arange(scores_TE.shape[0]) % 2).unsqueeze(1)
        return scores_TE + 0.5 * odd_T1 * (torch.arange(scores_TE.shape[1]) == 0)


@mutant("Y02")
class CountsTheFirstHalf(Learner):
    """Learns from the first half of the tokens only."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        ids_TK = routing.expert_ids_TK
        half_TK = ids_TK[: (ids_TK.shape[0] + 1) // 2]
        return {"load_E": count_experts(half_TK, self.gating.num_experts)}


@mutant("Y02")
class WeighsEarlyTokens(Lossy):
    """Lets early tokens count more in its loss."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        falling_T = torch.arange(routing.logits_TE.shape[0], 0, -1)
        peak_T = self.gating.probabilities(routing.logits_TE).amax(dim=1)
        return {"peak": torch.where(ctx.valid_T, peak_T * falling_T, 0.0).sum() / falling_T.sum().clamp_min(1)}


@mutant("Y03")
class FavoursLowIds(Plain):
    """Breaks ties by a slope over the ids that is large enough to break more than ties."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        slope_E = torch.linspace(0.2, 0, scores_TE.shape[1])
        return scores_TE + slope_E if self.training else scores_TE


@mutant("Y04")
class MixesUpExperts(Learner):
    """Moves each bias by the step of its neighbour."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update({"load_E": stats["load_E"].roll(1)})


@mutant("Y04")
class LearnsForSome(Learner):
    """Updates the biases of the first half of the experts only."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        half = self.gating.num_experts // 2
        self.expert_bias_E[half:] = before_E[half:]


@mutant("Y05")
class LooksPastScores(Plain):
    """Keeps tokens off experts whose raw logit exceeds 2."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        self.hot_TE = raw_TE > 2
        return super()._route(raw_TE, ctx)

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE - 2.0 * self.hot_TE if self.training else scores_TE


@mutant("Y06")
class SumsOverTheBatch(Solver):
    """Takes the sum over tokens for the mean."""

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.valid_T is not None
        bias_E = super().bias_E(scores_TE, ctx)
        return bias_E * ctx.valid_T.sum().clamp_min(1) if self.training else bias_E


@mutant("Y06")
class AvoidsRepeats(Plain):
    """Sends a token that it has seen before in the batch to other experts."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training:
            return scores_TE
        same_TT = (scores_TE.unsqueeze(0) == scores_TE.unsqueeze(1)).all(dim=2)
        return torch.where(same_TT.tril(-1).any(dim=1, keepdim=True), -scores_TE, scores_TE)


@mutant("Y07")
class StepsByCounts(Learner):
    """Moves the bias by the number of tokens that are missing, not by their share."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"].float()
        self.expert_bias_E.add_(load_E.mean() - load_E, alpha=self.rate)


@mutant("Y08")
class SumsItsLoss(Lossy):
    """Sums its loss over tokens."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        return {name: loss * ctx.valid_T.sum() for name, loss in super().losses(routing, ctx).items()}


@mutant("Y09")
class DividesByTheBound(Lossy):
    """Divides by the number of sequences that there could be."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        sequences = ctx.num_sequences or 1
        return {name: loss / sequences for name, loss in super().losses(routing, ctx).items()}


@mutant("Y09")
class TiltsSequences(Plain):
    """Favours another expert in every sequence."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training or ctx.sequence_ids_T is None:
            return scores_TE
        own_TE = ctx.sequence_ids_T.unsqueeze(1) % scores_TE.shape[1] == torch.arange(scores_TE.shape[1])
        return scores_TE + 0.3 * own_TE


@mutant("Y10")
class RemainderToTheFirst(Learner):
    """Expects one token more from the first experts where tokens do not divide evenly."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"]
        E = load_E.shape[0]
        wanted_E = load_E.sum() // E + (torch.arange(E) < load_E.sum() % E)
        self.expert_bias_E.add_((wanted_E - load_E).sign().to(torch.float32), alpha=self.rate)


@mutant("Y10")
class SixtyFourBits(Learner):
    """Counts experts by the bits of one word, where expert 64 is expert 0."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        E = self.gating.num_experts
        words_E = torch.arange(E) % 64
        load_E = torch.zeros(E, dtype=torch.int64).index_add(0, words_E, routing.load_E)
        return {"load_E": torch.where(torch.arange(E) < 64, load_E, 0)}

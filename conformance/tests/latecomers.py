"""Routers with one subtle bug each, written without a look at the rules: what the suite finds here is an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Gating, RouteContext, RouterConfig, Routing, Selection
from moerouters.gating import take_along_experts
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver


def masked_logits(routing: Routing, ctx: RouteContext) -> Tensor:
    """[T, E] logits, 0 in the rows of padding and of broken tokens."""
    assert ctx.valid_T is not None
    return torch.where(ctx.valid_T.unsqueeze(1), routing.logits_TE, 0.0)


class RoundsBigLoads(Learner):
    """Compares int64 loads with their mean in float32, so past 2**24 an imbalance of a few tokens reads as none."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"].float()
        step_E = (load_E.mean() - load_E).sign()
        self.expert_bias_E.add_(step_E - step_E.mean(), alpha=self.rate)


class RemainderToTheFirst(Learner):
    """Hands the remainder of tokens over experts to the lowest ids, so near balance the step depends on numbering."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"]
        E = load_E.shape[0]
        total = load_E.sum()
        extra_E = torch.arange(E, device=load_E.device) < total % E
        step_E = (total // E + extra_E - load_E).sign().to(torch.float32)
        self.expert_bias_E.add_(step_E - step_E.mean(), alpha=self.rate)


class SharedVelocity(Learner):
    """Smooths its step with a velocity that lives in a dict on the class: layers mix, and no checkpoint holds it."""

    velocities: ClassVar[dict[int, Tensor]] = {}
    momentum: ClassVar[float] = 0.5

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"]
        step_E = (load_E.sum() - load_E.shape[0] * load_E).sign().to(torch.float32)
        old_E = self.velocities.get(load_E.shape[0], torch.zeros_like(step_E))
        velocity_E = self.momentum * old_E + (1 - self.momentum) * (step_E - step_E.mean())
        seen = load_E.sum() > 0
        self.velocities[load_E.shape[0]] = torch.where(seen, velocity_E, old_E)
        self.expert_bias_E.add_(torch.where(seen, velocity_E, 0.0), alpha=self.rate)


class SixtyFourBits(Learner):
    """Packs a token's experts into the bits of one int64 before counting: right up to E = 64, wrong above."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        bits_T = torch.bitwise_left_shift(torch.ones_like(routing.expert_ids_TK), routing.expert_ids_TK).sum(dim=1)
        experts_E = torch.arange(self.gating.num_experts, device=bits_T.device)
        return {"load_E": (torch.bitwise_right_shift(bits_T.unsqueeze(1), experts_E) & 1).sum(dim=0)}


class ScalesByBatch(Learner):
    """Scales the learned bias by the batch's mean best score: once it is not 0, a choice depends on other tokens."""

    # The scaled bias moves more slowly, so the bound of the base is not promised.
    capabilities = Learner.capabilities.model_copy(update={"balance": None})

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.valid_T is not None
        best_T = torch.where(ctx.valid_T, scores_TE.amax(dim=-1), 0.0)
        return self.expert_bias_E * (best_T.sum() / ctx.valid_T.sum().clamp_min(1))


class WeighsByPaddedLength(Solver):
    """Weighs the solution of a micro-batch by its length with padding instead of by its real tokens."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None and routing.bias_E is not None
        tokens = torch.ones_like(ctx.valid_T, dtype=torch.int64).sum()
        return {"offset_times_tokens_E": -routing.bias_E.double() * tokens, "tokens": tokens}


class ShrinksPastZero(Solver):
    """Shrinks the solved bias by 1 - 2 / tokens without a floor: a lone token is pushed the wrong way."""

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        bias_E = super().bias_E(scores_TE, ctx)
        assert ctx.valid_T is not None
        if not self.training:
            return bias_E
        tokens = ctx.valid_T.sum()
        return torch.where(tokens > 0, bias_E * (1 - 2 / tokens.clamp_min(1)), bias_E)


class CachesTokensByLength(Lossy):
    """Keeps the count of real tokens in a cache keyed by T: the next batch of that length reuses it."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self._tokens: dict[int, Tensor] = {}

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        logits_TE = masked_logits(routing, ctx)
        T, E = logits_TE.shape
        if T not in self._tokens:
            self._tokens[T] = ctx.valid_T.sum().clamp_min(1)
        p_TE = self.gating.probabilities(logits_TE) * ctx.valid_T.unsqueeze(1)
        share_E = routing.load_E / routing.load_E.sum().clamp_min(1)
        return {"balance": self.alpha * E * (share_E * p_TE.sum(dim=0) / self._tokens[T]).sum()}


class SqueezesLoneToken(Lossy):
    """Squeezes the probabilities before the sum over tokens, so with T = 1 it sums over experts: no gradient left."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        p_TE = self.gating.probabilities(masked_logits(routing, ctx)) * ctx.valid_T.unsqueeze(1)
        mean_E = p_TE.squeeze().sum(dim=0) / ctx.valid_T.sum().clamp_min(1)
        share_E = routing.load_E / routing.load_E.sum().clamp_min(1)
        return {"balance": self.alpha * self.gating.num_experts * (share_E * mean_E).sum()}


class PaddedZLoss(Plain):
    """Masks padding before the logsumexp of its z-loss, not after: each adds log(E)**2; the gradient is right."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        z_T = masked_logits(routing, ctx).logsumexp(dim=-1)
        return {"z": 1e-3 * z_T.square().sum() / ctx.valid_T.sum().clamp_min(1)}


class LeadOverNobody(Plain):
    """Penalises the lead of the last chosen expert over the best refused: with K = E none is, and the loss is inf."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        scores_TE = self.gating.score(masked_logits(routing, ctx))
        T, E = scores_TE.shape
        taken = torch.zeros(T, E + 1, dtype=torch.bool, device=scores_TE.device)
        taken_TE = taken.scatter(1, routing.expert_ids_TK, True)[:, :E]
        last_T = take_along_experts(scores_TE, routing.expert_ids_TK).amin(dim=-1)
        refused_T = scores_TE.masked_fill(taken_TE, -float("inf")).amax(dim=-1)
        lead_T = torch.where(ctx.valid_T, last_T - refused_T, 0.0)
        return {"lead": 1e-3 * lead_T.sum() / ctx.valid_T.sum().clamp_min(1)}


class DetachedSum(Plain):
    """Renormalises the weights by a detached sum: values are right, the gradient lacks the quotient's second term."""

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        settings = self.gating.settings
        if not settings.renormalize or settings.softmax_after_topk:
            return super()._weigh(scores_TE, selection, finite_T)
        empty_TK = selection.expert_ids == settings.num_experts
        chosen_TK = take_along_experts(scores_TE, selection.expert_ids).masked_fill(empty_TK, 0)
        sums_T1 = chosen_TK.sum(dim=-1, keepdim=True).detach() + settings.eps
        weights_TK = chosen_TK / torch.where(empty_TK.all(dim=-1, keepdim=True), 1.0, sums_T1) * settings.scale
        return torch.where(finite_T.unsqueeze(1) | empty_TK, weights_TK, float("nan"))


class TiesByJitter(Plain):
    """Breaks ties by taking 1e-6 times the expert's id off its score, which turns near ties around as well."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        ids_E = torch.arange(scores_TE.shape[1], dtype=scores_TE.dtype, device=scores_TE.device)
        return scores_TE - 1e-6 * ids_E


class RenormalizesBeforeDropping(Plain):
    """Leaves out experts far below a token's best, yet divides the weights by the sum that still holds them."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        best_T1 = scores_TE.amax(dim=-1, keepdim=True)
        return scores_TE.masked_fill(scores_TE < best_T1 - 0.5 * best_T1.abs(), -float("inf"))

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        weights_TK = super()._weigh(scores_TE, selection, finite_T)
        settings = self.gating.settings
        if not settings.renormalize or settings.softmax_after_topk:
            return weights_TK
        empty_TK = selection.expert_ids == settings.num_experts
        short_T = empty_TK.any(dim=-1) & ~empty_TK.all(dim=-1) & finite_T
        ranked_TE = scores_TE.detach()
        if settings.correction_bias:
            ranked_TE = ranked_TE + self.gating.correction_bias_E
        wanted_TK = self.gating.top(self.gating.limit(ranked_TE), settings.top_k)
        wanted_T = take_along_experts(scores_TE, wanted_TK).sum(dim=-1)
        kept_T = take_along_experts(scores_TE, selection.expert_ids).masked_fill(empty_TK, 0).sum(dim=-1)
        ratio_T = torch.where(short_T, kept_T, 1.0) / torch.where(short_T, wanted_T, 1.0)
        return weights_TK * ratio_T.unsqueeze(1)


LATECOMERS: tuple[type, ...] = (
    RoundsBigLoads,
    RemainderToTheFirst,
    SharedVelocity,
    SixtyFourBits,
    ScalesByBatch,
    WeighsByPaddedLength,
    ShrinksPastZero,
    CachesTokensByLength,
    SqueezesLoneToken,
    PaddedZLoss,
    LeadOverNobody,
    DetachedSum,
    TiesByJitter,
    RenormalizesBeforeDropping,
)

"""Mutants of the rules about rows that are no tokens, and about sequences that share a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from moerouters import Assignment, Capabilities, Gating, RouteContext, Routing, Selection
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver, swap


class PerSequence(Lossy):
    """Lossy whose loss is the mean over the sequences of each one's own; healthy as it is."""

    def weights_S(self, tokens_S: Tensor, ctx: RouteContext) -> Tensor:
        """How much each sequence counts."""
        return (tokens_S > 0) / (tokens_S > 0).sum().clamp_min(1)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        sequence_ids_T, S = ctx.need("sequence_ids_T", router="mutant"), ctx.need("num_sequences", router="mutant")
        logits_TE = torch.where(ctx.valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        scores_TE = self.gating.probabilities(logits_TE).square() * ctx.valid_T.unsqueeze(1)
        sums_S = scores_TE.new_zeros(S).index_add(0, sequence_ids_T, scores_TE.sum(dim=1))
        tokens_S = torch.zeros(S, dtype=torch.int64).index_add(0, sequence_ids_T, ctx.valid_T.long())
        return {"balance": (sums_S / tokens_S.clamp_min(1) * self.weights_S(tokens_S, ctx)).sum()}


@mutant("P01")
class RoutesPadding(Plain):
    """Routes padding as if it were tokens."""

    def _without_padding(self, selection: Selection, real_T: Tensor) -> Selection:
        return selection


@mutant("P02")
class MultipliesByTheMask(Lossy):
    """Takes padding out of its loss by a factor of 0, which NaN survives."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        sizes_T = ctx.need("hidden_TD", router="mutant").square().mean(dim=1) * ctx.valid_T
        return {"size": sizes_T.sum() / ctx.valid_T.sum().clamp_min(1)}


@mutant("P02")
class AllHiddenStates(Lossy):
    """Adds the mean square of all hidden states to its loss, those of padding included."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        hidden_TD = ctx.need("hidden_TD", router="mutant")
        size = hidden_TD.square().sum() / max(1, hidden_TD.numel())
        return {name: loss + size for name, loss in super().losses(routing, ctx).items()}


@mutant("P03")
class MeanOverRows(Lossy):
    """Divides its loss by the number of rows and not of tokens."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        share = ctx.valid_T.sum() / max(1, ctx.valid_T.shape[0])
        return {name: loss * share for name, loss in super().losses(routing, ctx).items()}


@mutant("P03")
class CountsRows(Solver):
    """Reports the number of rows as the tokens that its solution stands for."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        rows = torch.tensor(routing.logits_TE.shape[0])
        return super().observe(routing, ctx) | {"tokens": rows}


@mutant("P04")
class CutsAtTheLength(Lossy):
    """Takes the number of tokens for the length of the batch, as if all padding stood at its end."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        front_T = torch.arange(ctx.valid_T.shape[0]) < ctx.valid_T.sum()
        return super().losses(routing, replace(ctx, valid_T=ctx.valid_T & front_T))


@mutant("P05")
class DecaysAnyway(Learner):
    """Lets its bias decay at every update, also when there was no token."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.expert_bias_E.mul_(0.9)


@mutant("P05")
class RootOfZero(Lossy):
    """Takes the root of a mean that is 0 without tokens, where its slope is infinite."""

    capabilities = Capabilities(parameters=True)

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(gating)
        self.factor = nn.Parameter(torch.ones(()))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: (self.factor * loss).sqrt() for name, loss in super().losses(routing, ctx).items()}


@mutant("P06")
class ValueWithoutPadding(Plain):
    """Lets a gradient through to padding, at a value of 0."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        if ctx.valid_T is None:
            return assignment
        padding_TE = torch.where(ctx.valid_T.unsqueeze(1), 0.0, raw_TE.float().nan_to_num(0.0, 0.0, 0.0))
        leak = padding_TE.sum()
        return swap(assignment, weights=assignment.weights + (leak - leak.detach()))


@mutant("P07")
class MasksTheResult(Lossy):
    """Masks padding after the operation that makes NaN of it, and not before: 0 * NaN is left for backward."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        sizes_T = ctx.need("hidden_TD", router="mutant").square().sum(dim=1).sqrt() * routing.logits_TE.square().sum(1)
        return {"size": torch.where(ctx.valid_T, sizes_T, 0.0).sum() / ctx.valid_T.sum().clamp_min(1)}


@mutant("P08")
class MasksExperts(Lossy):
    """Multiplies the mask on without an axis of its own wherever the shapes let it."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        real_T1, T = ctx.valid_T.unsqueeze(1), ctx.valid_T.shape[0]
        scores_TE = self.gating.probabilities(torch.where(real_T1, routing.logits_TE, 0.0))
        masked_TE = scores_TE * (ctx.valid_T if scores_TE.shape[1] == T else real_T1)
        return {"size": masked_TE.square().sum() / ctx.valid_T.sum().clamp_min(1)}


@mutant("P09")
class HalfWithAMask(Lossy):
    """Weighs its loss by one half as soon as it is handed a mask."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        factor = 1.0 if ctx.valid_T is None else 0.5
        return replace(assignment, losses={name: factor * loss for name, loss in assignment.losses.items()})


@mutant("P10")
class BiasForTheFirst(Learner):
    """Applies its bias only to the sequence that the batch begins with."""

    rate = 0.1

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return torch.zeros_like(self.expert_bias_E)

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if ctx.sequence_ids_T is None:
            return scores_TE + self.expert_bias_E
        return scores_TE + self.expert_bias_E * (ctx.sequence_ids_T == ctx.sequence_ids_T[:1]).unsqueeze(1)


@mutant("P11")
class CountsSequencesOfPadding(PerSequence):
    """Counts sequences that hold nothing but padding into its mean."""

    def weights_S(self, tokens_S: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.sequence_ids_T is not None
        there_S = torch.zeros_like(tokens_S).index_add(0, ctx.sequence_ids_T, torch.ones_like(ctx.sequence_ids_T))
        return (there_S > 0) / (there_S > 0).sum().clamp_min(1)

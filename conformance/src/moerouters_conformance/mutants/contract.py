"""Mutants of the rules about what an assignment looks like."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind, Capabilities, Gating, RouteContext, Routing, Selection
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver, Spoiled, swap


@mutant("C01", capabilities=Capabilities(assignment=AssignmentKind.SLOTS))
class DenseUndeclared(Plain):
    """Hands out every expert for every token and declares slots."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)


@mutant("C01")
class DenseInEval(Plain):
    """Hands out other shapes in eval than in training, and declares one."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        if self.training:
            return super().select(adjusted_TE, ctx)
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)


@mutant("C02")
class NarrowIds(Spoiled):
    """Packs ids into int32."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        return swap(assignment, expert_ids=assignment.expert_ids.to(torch.int32))


@mutant("C03")
class MinusOne(Spoiled):
    """Marks empty places by -1."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        ids = assignment.expert_ids
        return swap(assignment, expert_ids=torch.where(ids == assignment.num_experts, -1, ids))


@mutant("C04")
class FirstTwice(Plain):
    """Fills the second place with the best expert again where scores are equal."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = super().select(adjusted_TE, ctx).expert_ids.clone()
        if ids_TK.shape[1] > 1:
            top_TK = adjusted_TE.gather(1, ids_TK)
            ids_TK[:, 1] = torch.where(top_TK[:, 1] == top_TK[:, 0], ids_TK[:, 0], ids_TK[:, 1])
        return Selection.slots(ids_TK)


@mutant("C05")
class HeavyEmpties(Spoiled):
    """Leaves its weight on a place that padding emptied."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        empty = assignment.expert_ids == assignment.num_experts
        return swap(assignment, weights=assignment.weights.masked_fill(empty, 0.5))


@mutant("C06")
class CountsPadding(Spoiled):
    """Counts padding into the load."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        empty = (assignment.expert_ids == assignment.num_experts).sum()
        load_E = assignment.load_E.clone()
        load_E[0] += empty
        return swap(assignment, load_E=load_E)


@mutant("C07")
class EveryRowIsAToken(Spoiled):
    """Reports the number of rows as the number of tokens."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        return swap(assignment, tokens=torch.tensor(assignment.num_tokens))


@mutant("C08")
class MeanOfNothing(Lossy):
    """Divides by the number of tokens in a batch that may have none."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        if ctx.valid_T.shape[0]:
            return super().losses(routing, ctx)
        return {"balance": self.gating.probabilities(routing.logits_TE).mean()}


@mutant("C09")
class LossPerExpert(Lossy):
    """Returns its loss per expert, unsummed."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {name: loss.expand(self.gating.num_experts) for name, loss in super().losses(routing, ctx).items()}


@mutant("C09")
class OverflowingLoss(Lossy):
    """Takes exp of the logits for a z-loss, without subtracting their maximum."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        total_T = routing.logits_TE.exp().sum(dim=1).log()
        return {"z": torch.where(ctx.valid_T, total_T.square(), 0.0).sum() * 1e-3}


@mutant("C10")
class SkipsEmptyBatches(Learner):
    """Observes nothing in a batch without tokens."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return super().observe(routing, ctx) if routing.scores_TE.shape[0] else {}


@mutant("C11")
class LearnsFromEvaluation(Learner):
    """Observes in eval mode too."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        return assignment if self.training else swap(assignment, stats={"load_E": assignment.load_E})


@mutant("C12")
class NoNextScore(Learner):
    """Learns from the (K+1)-th score, which stands at -inf when every expert is chosen."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        E, K = self.gating.num_experts, self.gating.top_k
        falling_TE = routing.scores_TE.sort(dim=1, descending=True).values
        missing = torch.full_like(falling_TE[:, :1], -float("inf"))
        cutoff_T = torch.cat([falling_TE, missing], dim=1)[:, min(K, E)]
        return super().observe(routing, ctx) | {"cutoff": cutoff_T.sum().double()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        if self.gating.num_experts > 1:
            self.expert_bias_E.add_(0 * stats["cutoff"].float())


@mutant("C13")
class DividesByOthers(Learner):
    """Divides by the number of the other experts."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        others = torch.tensor(float(self.gating.num_experts - 1))
        self.expert_bias_E.mul_(others / others)


@mutant("C14")
class ByteIds(Spoiled):
    """Keeps ids in 16 bits on the way."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        ids = assignment.expert_ids
        wrapped = torch.where(ids == assignment.num_experts, ids, ids % 65536)
        load_E = torch.bincount(wrapped[wrapped < assignment.num_experts], minlength=assignment.num_experts)
        return swap(assignment, expert_ids=wrapped, load_E=load_E)


@mutant("C15")
class AssumesContiguous(Plain):
    """Reads the logits' memory as if rows followed each other."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        return super()._route(raw_TE.as_strided(raw_TE.shape, (raw_TE.shape[1], 1)), ctx)


@mutant("C16")
class NarrowWeights(Spoiled):
    """Hands weights out in bfloat16 when it was given bfloat16."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        self.narrow = raw_TE.dtype == torch.bfloat16
        return super()._route(raw_TE, ctx)

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        return swap(assignment, weights=assignment.weights.bfloat16()) if self.narrow else assignment


@mutant("C17")
class MatmulLoss(Lossy):
    """Computes its loss by a matrix product under the caller's autocast."""

    def forward_under_autocast(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            rounded = {
                name: (loss.reshape(1, 1) @ loss.new_ones(1, 1))[0, 0] for name, loss in assignment.losses.items()
            }
        return swap(assignment, losses=rounded)

    def __call__(self, logits_TE: Tensor, ctx: RouteContext = RouteContext()) -> Assignment:
        self.autocast = torch.is_autocast_enabled("cpu")
        assignment: Assignment = super().__call__(logits_TE, ctx)
        return assignment

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        return self.forward_under_autocast(raw_TE, ctx)


@mutant("C18")
class SolvesOverBrokenRows(Solver):
    """Takes the mean over all rows, broken ones included."""

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training or not scores_TE.shape[0]:
            return -self.offset_E
        mean_E = scores_TE.mean(dim=0)
        return mean_E.mean() - mean_E


@mutant("C19")
class SelectsAnyway(Plain):
    """Forgets that ids were forced."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        from dataclasses import replace

        return super()._route(raw_TE, replace(ctx, forced_ids_TK=None))


@mutant("C19")
class ObservesReplays(Learner):
    """Observes forced assignments."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        assignment = super()._route(raw_TE, ctx)
        return swap(assignment, stats={"load_E": assignment.load_E}) if self.training else assignment


@mutant("C20")
class DifferentiatesItself(Plain):
    """Differentiates its own weights in forward, which fails where autograd is off."""

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        logits_TE = raw_TE if raw_TE.requires_grad else raw_TE.detach().requires_grad_()
        assignment = super()._route(logits_TE, ctx)
        torch.autograd.grad(assignment.weights.sum(), logits_TE, retain_graph=True)
        return assignment


@mutant("C21")
class DefaultDtypeState(Learner):
    """Makes its state in torch's default dtype."""

    def __init__(self, gating: Gating, *args: object) -> None:
        super().__init__(gating)
        self._buffers["expert_bias_E"] = torch.zeros(gating.num_experts)

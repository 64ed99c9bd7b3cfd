"""Mutants of the rules about what a token's route may depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Assignment, Capabilities, LoadScope, RouteContext, StateAlgebra
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Solver, Spoiled, swap


@mutant("A01")
class ClaimsToBeCausal(Solver):
    """Solves over the batch that it routes, and declares causal=True."""

    capabilities = Capabilities(state=StateAlgebra.MEAN_OF_SOLVES, load_scope=LoadScope.LOCAL)


@mutant("A02")
class BiasGrowsWithTheBatch(Learner):
    """Applies more of its bias the more tokens share the batch, in eval."""

    rate = 0.3

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        T = scores_TE.shape[0]
        return self.expert_bias_E * (1.0 if self.training else T / 4)


@mutant("A03")
class DecodesWithoutBias(Learner):
    """Leaves its bias out on the short path for a single token."""

    rate = 0.1

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        single = scores_TE.shape[0] == 1 and not self.training
        return torch.zeros_like(self.expert_bias_E) if single else self.expert_bias_E


@mutant("A04")
class PrefillsWithoutBias(Learner):
    """Leaves its bias out of batches above 3 tokens in eval, which it takes for prompts."""

    rate = 0.1

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        prompt = scores_TE.shape[0] > 3 and not self.training
        return torch.zeros_like(self.expert_bias_E) if prompt else self.expert_bias_E


@mutant("A05")
class StraightThrough(Spoiled):
    """Lets the gradient of the batch's mean weight pass through every weight, at a value of 0."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        weights = assignment.weights
        if not self.training or not weights.numel():
            return assignment
        leak = weights.mean() - weights.mean().detach()
        return swap(assignment, weights=torch.where(weights > 0, weights + leak, weights))

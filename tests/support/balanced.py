"""A small router with an aux loss, a stat and a state, for tests that are not about any balancer in particular."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Router, Routing
from moerouters.capabilities import LoadScope, StateAlgebra

ALPHA = 0.1
RATE = 0.05


class Balanced(Router):
    """Switch loss with ALPHA and DeepSeek's sign rule with RATE, at once."""

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)
    reads = frozenset()

    def __init__(self, gating: Gating) -> None:
        super().__init__(gating)
        self.register_state("b_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.b_E

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        E = self.gating.num_experts
        tokens = ctx.valid_T.sum().clamp_min(1)
        mean_E = (
            torch.where(ctx.valid_T.unsqueeze(1), self.gating.probabilities(routing.logits_TE), 0.0).sum(0) / tokens
        )
        share_E = routing.load_E.to(mean_E.dtype) / routing.load_E.sum().clamp_min(1)
        return {"switch": ALPHA * E * (share_E * mean_E).sum()}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"].double()
        self.b_E.add_(RATE * torch.sign(load_E.mean() - load_E))


def balanced(num_experts: int = 4, top_k: int = 2) -> Balanced:
    """Over softmax gating."""
    return Balanced(Gating.softmax(num_experts, top_k))

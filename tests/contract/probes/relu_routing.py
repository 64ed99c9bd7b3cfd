"""ReMoE (arXiv:2412.14711): relu gates, load-weighted L1 loss whose coefficient steers the mean number of experts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, Selection, StateAlgebra


class ReluRouting(Router):
    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)
    reads = frozenset()

    def __init__(self, gating: Gating) -> None:
        super().__init__(gating)
        self.register_state("l1_scale", fill=1e-2)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        E = self.gating.num_experts
        return Selection.slots(torch.where(adjusted_TE > 0, torch.arange(E, device=adjusted_TE.device), E))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        tokens = ctx.valid_T.sum().clamp_min(1)
        share_E = routing.load_E * self.gating.num_experts / (self.gating.top_k * tokens)
        scores_TE = torch.where(ctx.valid_T.unsqueeze(1), routing.scores_TE, 0.0)
        return {"l1": self.l1_scale * (share_E * scores_TE).sum() / tokens}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"surplus": routing.load_E.sum() - self.gating.top_k * ctx.valid_T.sum()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.l1_scale.mul_(1.2 ** torch.sign(stats["surplus"]))


def make(top_k: int = 2) -> Router:
    return ReluRouting(Gating.relu(8, top_k))

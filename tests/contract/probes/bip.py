"""BIP (arXiv:2502.15451), unclipped and centred: the dual is solved in the forward, from the committed vector."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, StateAlgebra


class Bip(Router):
    capabilities = Capabilities(state=StateAlgebra.MEAN_OF_SOLVES, load_scope=LoadScope.LOCAL, causal=False)
    reads = frozenset()

    def __init__(self, gating: Gating) -> None:
        super().__init__(gating)
        self.register_state("q_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        q_E, K, E = self.q_E, self.gating.top_k, self.gating.num_experts
        rank = (ctx.valid_T.sum() * K // E).reshape(1)
        for _ in range(2 if self.training and K < E and scores_TE.shape[0] else 0):
            open_TE = self.gating.limit(scores_TE - q_E)
            p_T1 = open_TE.topk(K + 1, dim=-1).values[:, K:]
            counts_TE = ctx.valid_T.unsqueeze(1) & torch.isfinite(open_TE - p_T1)
            margins_TE = torch.where(counts_TE, scores_TE - p_T1, -float("inf"))
            solved_E = margins_TE.sort(dim=0, descending=True).values.index_select(0, rank).squeeze(0)
            q_E = torch.where(torch.isfinite(solved_E), solved_E, q_E)
        return q_E.mean() - q_E

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"q_tokens_E": -routing.bias_E * ctx.valid_T.sum(), "tokens": ctx.valid_T.sum()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.q_E.copy_(torch.where(stats["tokens"] > 0, stats["q_tokens_E"] / stats["tokens"], self.q_E))


def make(top_k: int = 2) -> Router:
    return Bip(Gating.sigmoid(8, top_k, num_groups=4, kept_groups=2 if top_k < 4 else 4))

"""Sinkhorn selection (S-BASE, arXiv:2202.01169; as in Megatron-LM): balanced scores choose in training."""

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Router


class Sinkhorn(Router):
    capabilities = Capabilities(causal=False)
    reads = frozenset()

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.training:
            return scores_TE
        cost_TE = torch.where(ctx.valid_T.unsqueeze(1), scores_TE, 0.0)
        column_E = scores_TE.new_ones(self.gating.num_experts)
        for _ in range(8):
            row_T1 = ctx.valid_T.unsqueeze(1) / ((cost_TE * column_E).sum(dim=1, keepdim=True) + 1e-8)
            column_E = ctx.valid_T.sum() / ((cost_TE * row_T1).sum(dim=0) + 1e-8)
        return cost_TE * column_E


def make(top_k: int = 2) -> Router:
    return Sinkhorn(Gating.sigmoid(8, top_k))

"""DS-MoE in training (arXiv:2404.05567, Eq. 3 to 5): every expert sees every token, a mutual-information loss."""

import torch
from torch import Tensor

from moerouters import AssignmentKind, Capabilities, Gating, RouteContext, Router, Routing, Selection


class DenseTraining(Router):
    capabilities = Capabilities(assignment=AssignmentKind.DENSE)
    reads = frozenset()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        tokens = ctx.valid_T.sum().clamp_min(1)
        p_TE = self.gating.probabilities(routing.logits_TE)
        p_TE = torch.where(ctx.valid_T.unsqueeze(1), p_TE, 0.0)
        marginal = _entropy(p_TE.sum(dim=0) / tokens)
        return {"mutual_information": 0.01 * (_entropy(p_TE) / tokens - marginal)}


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-8).log()).sum()


def make(top_k: int = 2) -> Router:
    return DenseTraining(Gating.softmax(8, top_k, renormalize=False))

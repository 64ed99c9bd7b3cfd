"""DS-MoE in inference (arXiv:2404.05567, section 2): every expert with E * score > 0.48, however many that are."""

import torch
from torch import Tensor

from moerouters import Gating, RouteContext, Router, Selection


class Threshold(Router):
    reads = frozenset()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        E = self.gating.num_experts
        return Selection.slots(torch.where(adjusted_TE * E > 0.48, torch.arange(E, device=adjusted_TE.device), E))


def make(top_k: int = 2) -> Router:
    return Threshold(Gating.softmax(8, top_k, renormalize=False))

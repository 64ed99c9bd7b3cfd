"""Hash layers (arXiv:2106.04426): the vocabulary id alone decides, nothing is learned."""

import torch
from torch import Tensor

from moerouters import Gating, RouteContext, Router, Selection


class HashTokens(Router):
    reads = frozenset()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        token_ids_T = ctx.need("token_ids_T", router="hash")
        first_T1 = (token_ids_T * 0x9E3779B1 >> 15).unsqueeze(1)
        steps_K = torch.arange(self.gating.top_k, device=token_ids_T.device)
        return Selection.slots((first_T1 + steps_K) % self.gating.num_experts)


def make(top_k: int = 2) -> Router:
    return HashTokens(Gating.softmax(8, top_k))

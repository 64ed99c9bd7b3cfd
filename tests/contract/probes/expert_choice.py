"""Expert choice (arXiv:2202.09368, section 3.2): every expert takes its best T * K / E tokens."""

import torch
from torch import Tensor

from moerouters import AssignmentKind, Capabilities, Gating, RouteContext, Router, Selection


class ExpertChoice(Router):
    capabilities = Capabilities(assignment=AssignmentKind.PAIRS, causal=False, eval_batch_invariant=False)
    reads = frozenset()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        (T, E), K = adjusted_TE.shape, self.gating.top_k
        ranked_TE = adjusted_TE.masked_fill(~ctx.valid_T.unsqueeze(1), -float("inf"))
        # The host knows a bound; how many of these places are filled follows from the data.
        bound = T * K // E
        tokens_CE = ranked_TE.sort(dim=0, descending=True, stable=True).indices[:bound]
        filled_C1 = torch.arange(bound, device=tokens_CE.device).unsqueeze(1) < ctx.valid_T.sum() * K // E
        experts_CE = torch.where(filled_C1, torch.arange(E, device=tokens_CE.device), E)
        return Selection.pairs(tokens_CE.reshape(-1), experts_CE.reshape(-1))


def make(top_k: int = 2) -> Router:
    return ExpertChoice(Gating.softmax(8, top_k, renormalize=False))

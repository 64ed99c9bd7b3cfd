"""Noisy top-k gating with a load loss (arXiv:1701.06538, Eq. 3 to 5 and appendix A); the noise has its own weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters import Capabilities, Gating, RouteContext, Router, Routing
from moerouters.noise import normal_noise


class NoisyTopK(Router):
    capabilities = Capabilities(parameters=True)
    reads = frozenset()

    def __init__(self, gating: Gating, hidden_size: int) -> None:
        super().__init__(gating)
        self.noise_ED = nn.Parameter(torch.zeros(gating.num_experts, hidden_size))

    def _noisy(self, logits_TE: Tensor, ctx: RouteContext) -> tuple[Tensor, Tensor]:
        hidden_TD = torch.where(ctx.valid_T.unsqueeze(1), ctx.need("hidden_TD", router="noisy-topk"), 0.0)
        spread_TE = F.softplus(F.linear(hidden_TD.to(logits_TE.dtype), self.noise_ED.to(logits_TE.dtype)))
        noise_TE = normal_noise(ctx.need("noise_key", router="noisy-topk"), tuple(logits_TE.shape))
        return logits_TE + noise_TE * spread_TE, spread_TE

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self._noisy(scores_TE, ctx)[0] if self.training else scores_TE

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if (K := self.gating.top_k) == self.gating.num_experts:
            return {}
        noisy_TE, spread_TE = self._noisy(routing.logits_TE, ctx)
        last_in_T1, first_out_T1 = noisy_TE.topk(K + 1, dim=-1).values[:, K - 1 :].split(1, dim=-1)
        bar_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
        chance_TE = torch.special.ndtr((routing.logits_TE - bar_TE) / spread_TE)
        load_E = torch.where(ctx.valid_T.unsqueeze(1), chance_TE, 0.0).sum(dim=0)
        return {"load": 0.1 * load_E.var(correction=0) / (load_E.mean().square() + 1e-10)}


def make(top_k: int = 2) -> Router:
    return NoisyTopK(Gating.softmax_after_topk(8, top_k), hidden_size=6)

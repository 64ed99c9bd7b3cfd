"""Quantile balancing from the last step (histogram form, as trained in Kimi K3): causal, one additive integer stat."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, StateAlgebra
from moerouters.kernels.counts import count_experts


class LaggedQuantile(Router):
    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)

    def __init__(self, gating: Gating, bins: int = 512) -> None:
        super().__init__(gating)
        self.bins = bins
        self.register_state("beta_E", gating.num_experts)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return -self.beta_E

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        B, E = self.bins, self.gating.num_experts
        margins_TE = routing.adjusted_TE - routing.bias_E - routing.cutoff_T.unsqueeze(1)
        bins_TE = ((margins_TE + 1) * (B / 2)).clamp(0, B - 1).long() + B * torch.arange(E, device=margins_TE.device)
        usable_T1 = (ctx.valid_T & torch.isfinite(routing.cutoff_T)).unsqueeze(1)
        bins_TE = torch.where(usable_T1, bins_TE, E * B)
        return {"histogram_EB": count_experts(bins_TE, E * B).reshape(E, B)}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        below_EB = stats["histogram_EB"].cumsum(dim=1)
        wanted_E1 = below_EB[:, -1:] * (1 - self.gating.top_k / self.gating.num_experts)
        beta_E = (below_EB < wanted_E1).sum(dim=1) * (2 / self.bins)
        self.beta_E.copy_(torch.where(below_EB[0, -1] > 0, beta_E - beta_E.mean(), self.beta_E))


def make(top_k: int = 2) -> Router:
    return LaggedQuantile(Gating.sigmoid(8, top_k))

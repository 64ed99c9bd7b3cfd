"""Routed tokens and experts for tests of the operators on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moerouters.kernels.expert_mlp import routed_mlp, routed_mlp_torch
from moerouters.kernels.grouped_gemm import Activation
from moerouters.kernels.routes import Routes

LOADS = ("random", "one hot expert", "upper half empty", "holes", "nothing", "every expert")


@dataclass(frozen=True)
class Routed:
    """Arguments of `routed_mlp`; the floats require gradients."""

    x_TD: Tensor
    weights_TK: Tensor
    order_N: Tensor
    up_eFD: Tensor
    down_eDF: Tensor
    load_e: Tensor
    activation: Activation

    @property
    def routes(self) -> Routes:
        return Routes(self.weights_TK, self.order_N, self.order_N.argsort())

    @property
    def wanted(self) -> list[Tensor]:
        return [self.x_TD, self.up_eFD, self.down_eDF, self.weights_TK]

    def run(self) -> Tensor:
        return routed_mlp(self.x_TD, self.routes, self.up_eFD, self.down_eDF, self.load_e, self.activation)

    def run_torch(self) -> Tensor:
        return routed_mlp_torch(self.x_TD, self.routes, self.up_eFD, self.down_eDF, self.load_e, self.activation)


def routed(
    load: str = "random",
    *,
    tokens: int = 9,
    num_experts: int = 4,
    top_k: int = 2,
    width: int = 3,
    expert_width: int = 5,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float64,
) -> Routed:
    random = torch.Generator().manual_seed(tokens)
    E, K = num_experts, num_experts if load == "every expert" else top_k
    ids_TK = torch.rand(tokens, E // 2 if load == "upper half empty" else E, generator=random).topk(K).indices
    if load == "one hot expert":
        ids_TK = torch.where(torch.arange(K) == 0, 0, ids_TK.clamp(min=1))
    if load == "holes":
        ids_TK = ids_TK.reshape(-1).index_fill(0, torch.arange(0, tokens * K, 3), E).reshape(tokens, K)
    if load == "nothing":
        ids_TK = torch.full_like(ids_TK, E)
    weights_TK = torch.rand(tokens, K, generator=random, dtype=torch.float64).masked_fill(ids_TK == E, 0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    return Routed(
        x_TD=randn(tokens, width),
        weights_TK=weights_TK.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
        order_N=torch.sort(ids_TK.reshape(-1), stable=True).indices,
        up_eFD=randn(E, (2 if activation == "swiglu" else 1) * expert_width, width),
        down_eDF=randn(E, width, expert_width),
        load_e=torch.bincount(ids_TK.reshape(-1), minlength=E + 1)[:E],
        activation=activation,
    )

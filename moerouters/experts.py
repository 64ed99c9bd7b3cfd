"""The experts of one layer, as stacked weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moerouters.kernels.dense_mlp import dense_mlp
from moerouters.kernels.expert_mlp import expert_mlp, routed_mlp
from moerouters.kernels.grouped_gemm import Activation
from moerouters.kernels.routes import AllExperts, Routes


class GroupedExperts(nn.Module):
    """E feed-forward networks without biases; rows come grouped by expert.

    swiglu: down @ (silu(gate @ x) * (up @ x)); gelu: down @ gelu(up @ x). Weights: `up_eFD` ([e, 2F, D] for swiglu,
    gate first) and `down_eDF`.
    """

    slices = 1
    """Into how many each expert is cut, one of which is here."""

    def __init__(
        self, num_experts: int, *, hidden_size: int, expert_size: int, activation: Activation = "swiglu"
    ) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * expert_size if activation == "swiglu" else expert_size
        self.up_eFD = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.down_eDF = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in) per expert, as nn.Linear; depends on torch's global generator, like nn.Linear."""
        for weight in (self.up_eFD, self.down_eDF):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    @property
    def num_experts(self) -> int:
        """On this rank."""
        return self.up_eFD.shape[0]

    def here(self) -> tuple[Tensor, Tensor]:
        """Both weights as far as this rank computes with them, [e, 2F or F, D] and [e, D, F]."""
        return self.up_eFD, self.down_eDF

    def forward(self, x_MD: Tensor, load_e: Tensor, routes: Routes | AllExperts | None = None) -> Tensor:
        """[R, D] rows through their experts; load_e int64 [e] says how many rows each has. Other rows give zeros.

        With routes, x_MD are tokens [T, D], and the result is for every token the weighted sum over its slots, in the
        dtype of the weights; Routes only where `is_fused` says so of the tokens.
        """
        dtype = x_MD.dtype
        if torch.is_autocast_enabled(x_MD.device.type):
            dtype = torch.get_autocast_dtype(x_MD.device.type)
        up_eFD, down_eDF = self.here()
        weights = (up_eFD.to(dtype), down_eDF.to(dtype))
        if routes is None:
            return expert_mlp(x_MD.to(dtype), *weights, load_e, self.activation)
        if isinstance(routes, AllExperts):
            return dense_mlp(x_MD.to(dtype), routes.weights_TE, *weights, self.activation)
        return routed_mlp(x_MD.to(dtype), routes, *weights, load_e, self.activation)

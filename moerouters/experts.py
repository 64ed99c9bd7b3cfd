"""The experts of one layer, as stacked weights."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.kernels.grouped_linear import grouped_linear

Activation = Literal["swiglu", "gelu"]


class GroupedExperts(nn.Module):
    """E feed-forward networks without biases; rows come grouped by expert.

    swiglu: down @ (silu(gate @ x) * (up @ x)); gelu: down @ gelu(up @ x). Weights: `up_eFD` ([e, 2F, D] for swiglu,
    gate first) and `down_eDF`.
    """

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

    def forward(self, x_RD: Tensor, load_e: Tensor) -> Tensor:
        """[R, D] rows through their experts; load_e int64 [e] says how many rows each has. Other rows give zeros."""
        dtype = x_RD.dtype
        if torch.is_autocast_enabled(x_RD.device.type):
            dtype = torch.get_autocast_dtype(x_RD.device.type)
        up_RF = grouped_linear(x_RD.to(dtype), self.up_eFD.to(dtype), load_e)
        if self.activation == "swiglu":
            gate_RF, up_RF = up_RF.chunk(2, dim=-1)
            hidden_RF = F.silu(gate_RF) * up_RF
        else:
            hidden_RF = F.gelu(up_RF)
        return grouped_linear(hidden_RF, self.down_eDF.to(dtype), load_e)

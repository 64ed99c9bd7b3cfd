"""The last step of combine: for every token the sum of weight * row over its pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.dispatch.plan import DispatchPlan
from moerouters.kernels.launch import triton_serves
from moerouters.kernels.permute import combine_rows


def weighted_sum(y_RD: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """y_TD in the weights' dtype. y_RD holds the rows of all N pairs in the plan's order; those of empty pairs (weight
    0) are finite. `weights` is in the assignment's shape."""
    if plan.slots_per_token is not None and triton_serves(y_RD, weights):
        return combine_rows(y_RD, plan.order_N, plan.inverse_N, weights)
    # Weighted in the weights' dtype (float32): K bf16 products summed in bf16 lose two bits.
    y_ND = y_RD.index_select(0, plan.inverse_N).to(weights.dtype)
    if plan.slots_per_token is not None:
        y_TKD = y_ND.reshape(plan.num_tokens, plan.slots_per_token, y_ND.shape[1])
        with no_autocast(y_RD.device):
            return torch.bmm(weights.unsqueeze(1), y_TKD).squeeze(1)
    y_TD = y_ND.new_zeros(plan.num_tokens, y_ND.shape[1])
    return y_TD.index_add(0, plan.token_ids_N, y_ND * weights.unsqueeze(1))

"""The `local` back-end: all experts on this rank, nothing is sent anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.dispatch.plan import DispatchPlan


class LocalDispatcher:
    """Gather rows by expert; combine by slot, or by token where pairs are free."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        token_ids_R = plan.token_ids_N.index_select(0, plan.order_N)
        return x_TD.index_select(0, token_ids_R), plan.kept_load_E

    def combine(self, y_RD: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
        # Weighted in the weights' dtype (float32): K bf16 products summed in bf16 lose two bits.
        y_ND = y_RD.index_select(0, plan.inverse_N).to(weights.dtype)
        if plan.slots_per_token is not None:
            y_TKD = y_ND.reshape(plan.num_tokens, plan.slots_per_token, y_ND.shape[1])
            with no_autocast(y_RD.device):
                return torch.bmm(weights.unsqueeze(1), y_TKD).squeeze(1)
        y_TD = y_ND.new_zeros(plan.num_tokens, y_ND.shape[1])
        return y_TD.index_add(0, plan.token_ids_N, y_ND * weights.unsqueeze(1))

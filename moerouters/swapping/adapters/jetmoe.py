"""JetMoeTopKGating, of experts and of attention experts: hands out slots grouped by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.swapping.adapters.base import Adapter, Body, expect_slots, linear, parts, setting
from moerouters.swapping.reading import Cast, Reading
from moerouters.swapping.stock import Stock


class JetMoeAdapter(Adapter):
    """Returns (slots in the order of their experts, their tokens, their weights, a list of E loads, logits [T, E]).

    Weights are a softmax over the chosen logits.
    """

    def read(self, stock: Stock) -> Reading:
        return Reading(
            num_experts=setting(stock, "num_experts"),
            top_k=setting(stock, "top_k"),
            projection=linear(stock, "layer"),
            before=(Cast(to="float32"),),
            score="identity",
            after=("softmax", "float32"),
            weights_dtype="hidden",
        )

    def results(self, returned: Any) -> tuple[Any, ...]:
        return parts(returned, 5)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        *_, loads, logits_TE = self.results(returned)
        return torch.tensor(loads, device=logits_TE.device)

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> tuple[Any, ...]:
        logits_TE, weights_TK, ids_TK = self.routed(body, hidden_states)
        K = body.gating.top_k
        expect_slots(ids_TK, K, "attention experts give a token as many queries as the model has slots")
        order_N = ids_TK.flatten().sort(0).indices
        loads = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[1]).tolist()
        tokens_N = order_N.div(K, rounding_mode="trunc")
        return order_N, tokens_N, weights_TK.flatten()[order_N], loads, logits_TE

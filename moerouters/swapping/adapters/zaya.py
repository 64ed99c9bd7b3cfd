"""ZayaRouter: an MLP with a state that travels from layer to layer, and a class that is no expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moerouters.kernels.counts import count_experts
from moerouters.swapping.adapters.base import Adapter, Body, linear, parts, setting
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock

_LOGITS = "router_mlp.out_proj"


class ZayaAdapter(Adapter):
    """Returns (logits [T, C], weights [T, 1], ids [T, 1], state [B, S, R]).

    Of the C classes the last means to skip the experts; it goes out as id 0 with weight 0. To a balancer it is a class
    like the others: whoever evens loads out lets the C-th part of the tokens skip.
    """

    def read(self, stock: Stock) -> Reading:
        return Reading(
            num_experts=setting(stock, "num_router_classes"),
            top_k=setting(stock, "top_k"),
            projection=linear(stock, _LOGITS),
            score="softmax",
            score_dtype="own",
            correction_bias="balancing_biases",
            weights_dtype="own",
        )

    def run(self, stock: Stock, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> tuple[Any, ...]:
        """Without a state from a layer below, and with one."""
        width: int = setting(stock, "router_hidden_size")
        hidden_1TD = hidden_TD.unsqueeze(0)
        state_1TR = torch.linspace(-1, 1, len(hidden_TD) * width).reshape(1, -1, width).to(hidden_TD)
        alone = self.results(stock.run(tensors, hidden_1TD))
        return alone + self.results(stock.run({**tensors, "block.router_states": state_1TR}, hidden_1TD))

    def results(self, returned: Any) -> tuple[Any, ...]:
        return parts(returned, 4)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        logits_TC, weights_TK, ids_TK, _ = self.results(returned)
        skip = logits_TC.shape[1] - 1
        return count_experts(ids_TK.masked_fill(weights_TK == 0, skip), skip + 1)

    def forward(
        self, body: Body, hidden_states: Tensor, router_states: Tensor | None = None, *handed_in: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        module: Any = body
        state_BSR = module.down_proj(hidden_states)
        if module.use_eda and router_states is not None:
            state_BSR = state_BSR + router_states * module.router_states_scale
        logits_BSC = module.router_mlp(state_BSR)
        logits_TC = logits_BSC.reshape(-1, logits_BSC.shape[-1])
        weights_TK, ids_TK = body.route(logits_TC, hidden_states.reshape(-1, hidden_states.shape[-1]))
        skip_TK = ids_TK == body.gating.num_experts - 1
        weights_TK = weights_TK.to(logits_TC.dtype).masked_fill(skip_TK, 0)
        return logits_TC, weights_TK, ids_TK.masked_fill(skip_TK, 0), state_BSR.clone()

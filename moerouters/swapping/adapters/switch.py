"""SwitchTransformersTop1Router: one expert per token, until its capacity in the sequence is used up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.swapping.adapters.base import (
    Adapter,
    Body,
    FirstAmongEquals,
    expect_slots,
    jitter_,
    linear,
    parts,
    setting,
)
from moerouters.swapping.gating import project
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotUnderstood


class SwitchGating(FirstAmongEquals):
    """Probabilities are computed in float32, and compared in the dtype of the hidden states."""

    hidden_dtype: torch.dtype = torch.float32
    """Of the latest forward."""

    def score(self, logits_TE: Tensor) -> Tensor:
        scores_TE = super().score(logits_TE)
        return scores_TE.to(self.hidden_dtype).to(scores_TE.dtype)


class SwitchAdapter(Adapter):
    """Returns (one-hot ids [B, S, E], weights [B, S, 1], logits [B, S, E]).

    Whoever chose, the stock rule drops what exceeds `expert_capacity` in a sequence: the ids of the last are all zeros.
    """

    gating = SwitchGating

    def read(self, stock: Stock) -> Reading:
        if setting(stock, "dtype") != torch.float32:
            raise NotUnderstood(f"its router_dtype is {stock.module.dtype}, only float32 is known")
        return Reading(
            num_experts=setting(stock, "num_experts"),
            top_k=1,
            projection=linear(stock, "classifier").model_copy(update={"dtype": "float32"}),
            score="softmax",
            weights_dtype="hidden",
        )

    def run(self, stock: Stock, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> tuple[Any, ...]:
        """In the dtype of the hidden states and in bfloat16. With copies, since the stock router casts its tensors."""
        found: tuple[Any, ...] = ()
        for hidden_1TD in (hidden_TD.unsqueeze(0), hidden_TD.unsqueeze(0).bfloat16()):
            found += self.results(stock.run({name: each.clone() for name, each in tensors.items()}, hidden_1TD))
        return found

    def results(self, returned: Any) -> tuple[Any, ...]:
        return parts(returned, 3)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        """What was dropped is not counted."""
        one_hot_BSE: Tensor = self.results(returned)[0]
        return one_hot_BSE.flatten(0, -2).sum(dim=0)

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> tuple[Tensor, ...]:
        module: Any = body
        gating = body.gating
        assert isinstance(gating, SwitchGating)
        gating.hidden_dtype = hidden_states.dtype
        *BS, D = hidden_states.shape
        hidden_TD = hidden_states.to(torch.float32).reshape(-1, D)
        if module.training:
            jitter_(hidden_TD, module.jitter_noise)
        logits_TE = project(gating.reading, hidden_TD, gating.tensors)
        weights_T1, ids_T1 = body.route(logits_TE, hidden_TD)
        expect_slots(ids_T1, 1, "it hands out one weight per token")
        one_hot = F.one_hot(ids_T1.reshape(BS), logits_TE.shape[1])
        kept = one_hot.cumsum(dim=-2) <= module.expert_capacity
        return one_hot * kept, weights_T1.to(gating.hidden_dtype).reshape(*BS, 1), logits_TE.reshape(*BS, -1)

"""Llama4Router: hands out dense scores, by which the experts' inputs are multiplied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moerouters.swapping.adapters.base import Adapter, Body, linear, parts, setting
from moerouters.swapping.gating import ModelGating, cast
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock


class Llama4Gating(ModelGating):
    """Takes the sigmoid where the stock router does: of all experts, -inf where one was not chosen. With AVX-512 its
    last bit depends on where in memory a value stands."""

    def _finish(self, chosen_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        chosen_TK = cast(chosen_TK, self._dtype(self.reading.score_dtype))
        all_TE = chosen_TK.new_full((chosen_TK.shape[0], self.num_experts), -float("inf"))
        # Largest, not last: an empty slot has the id of an expert that may stand in another slot, and a smaller logit.
        all_TE = all_TE.scatter_reduce(1, expert_ids_TK, chosen_TK, "amax")
        return all_TE.float().sigmoid().gather(1, expert_ids_TK)


class Llama4Adapter(Adapter):
    """The router is the nn.Linear itself; it returns (scores [T, E], logits [T, E]).

    Scores are the sigmoid of the chosen logits and 0 elsewhere. Every expert runs on every token, most on zeros.
    """

    gating = Llama4Gating

    def read(self, stock: Stock) -> Reading:
        return Reading(
            num_experts=setting(stock, "num_experts"),
            top_k=setting(stock, "top_k"),
            projection=linear(stock),
            score="identity",
            score_dtype="own",
            after=("sigmoid", "float32"),
            weights_dtype="own",
        )

    def results(self, returned: Any) -> tuple[Any, ...]:
        return parts(returned, 2)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        scores_TE: Tensor = self.results(returned)[0]
        return (scores_TE > 0).sum(dim=0)

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> tuple[Tensor, Tensor]:
        logits_TE, weights_TK, ids_TK = self.routed(body, hidden_states)
        # Added, not written: an empty slot has weight 0 and the id of an expert that may stand in another slot.
        return logits_TE.new_zeros(logits_TE.shape).scatter_add(1, ids_TK, weights_TK), logits_TE

"""InklingTopkRouter: routed and shared experts share one sum of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.kernels.counts import count_experts
from moerouters.swapping.adapters.base import Adapter, Body, parts, setting
from moerouters.swapping.gating import ModelGating, project
from moerouters.swapping.reading import Normalize, Projection, Reading, Scaled, Times
from moerouters.swapping.stock import Stock


class InklingReading(Reading):
    """The last `shared` rows of the projection are of experts that every token gets."""

    shared: int

    def __str__(self) -> str:
        return f"{super().__str__()}, with {self.shared} shared in the sum"


class InklingGating(ModelGating):
    """Weights are sigmoids of the chosen and shared logits over the sum of all of them, in logarithms."""

    reading: InklingReading

    logits_TA: Tensor | None = None
    """[T, E + shared], all logits of the forward that is running; a router knows the first E."""

    def weigh(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        if self.logits_TA is None:  # a router called on its own: there are no shared experts
            return super().weigh(scores_TE, expert_ids_TK)
        return self.weigh_all(self.logits_TA, expert_ids_TK, expert_ids_TK == self.num_experts)[0]

    def weigh_full(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return self.weigh(scores_TE, expert_ids_TK)

    def weigh_all(self, logits_TA: Tensor, ids_TK: Tensor, empty_TK: Tensor) -> tuple[Tensor, Tensor]:
        """([T, K] weights, [T, shared] gammas); empty slots have no part in the sum."""
        E = self.num_experts
        chosen_TK = logits_TA[:, :E].gather(1, ids_TK.clamp(max=E - 1))
        chosen_TK = chosen_TK.masked_fill(empty_TK, torch.finfo(torch.bfloat16).min)
        log_scores = F.logsigmoid(torch.cat([chosen_TK, logits_TA[:, E:]], dim=-1))
        weights = torch.exp(log_scores - torch.logsumexp(log_scores, dim=-1, keepdim=True))
        for step in self.reading.finish:
            if isinstance(step, Times):
                weights = weights * step.factor
            elif isinstance(step, Scaled):
                weights = weights * self.tensors(step.parameter).float()
        weights_TK, gammas = weights.tensor_split([ids_TK.shape[1]], dim=-1)
        return weights_TK.masked_fill(empty_TK, 0), gammas


class InklingAdapter(Adapter):
    """Returns (logits of routed experts [T, E], weights [T, K], ids [T, K], gammas of shared experts [T, shared])."""

    gating = InklingGating

    def read(self, stock: Stock) -> InklingReading:
        return InklingReading(
            num_experts=setting(stock, "num_experts"),
            top_k=setting(stock, "top_k"),
            projection=Projection(weight="weight", dtype="float32", autocast=False),
            score="sigmoid",
            correction_bias="e_score_correction_bias",
            sorted=False,
            finish=(
                Normalize(),
                Times(factor=setting(stock, "route_scale")),
                Scaled(parameter="global_scale", per_expert=False),
            ),
            weights_dtype="hidden",
            shared=setting(stock, "n_shared_experts"),
        )

    def results(self, returned: Any) -> tuple[Any, ...]:
        return parts(returned, 4)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        logits_TE, _, ids_TK, _ = self.results(returned)
        return count_experts(ids_TK, logits_TE.shape[1])

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> tuple[Tensor, ...]:
        gating = body.gating
        assert isinstance(gating, InklingGating)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TA = project(gating.reading, hidden_TD, gating.tensors)
        logits_TE = logits_TA[:, : gating.num_experts]
        gating.logits_TA = logits_TA
        try:
            weights_TK, ids_TK = body.route(logits_TE, hidden_TD)
        finally:
            gating.logits_TA = None
        # The id of an empty slot is a filler by now; its weight of 0 tells.
        _, gammas = gating.weigh_all(logits_TA, ids_TK, weights_TK == 0)
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK, gammas.to(hidden_TD.dtype)

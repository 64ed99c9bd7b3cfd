"""PhimoeTopKRouter: sparsemixer, arXiv:2409.12136. Two experts, each weighed among the logits close to its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.swapping.adapters.base import Adapter, Body, FirstAmongEquals, jitter_, linear, setting
from moerouters.swapping.gating import ModelGating
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock


class SparsemixerReading(Reading):
    """Weights are a softmax over the logits that lie close below the chosen one, or above it."""

    jitter: float
    """A logit is left out if it lies further below than 2 * jitter, relative to the larger magnitude."""

    def __str__(self) -> str:
        return f"top {self.top_k} of {self.num_experts}, sparsemixer weights with jitter {self.jitter:g}"


class SparsemixerGating(FirstAmongEquals):
    """An expert's weight is its softmax among the logits that pass the threshold, without better ones that were chosen.

    The stock threshold is relative to the largest logit left, which is the chosen one. Here it is relative to the
    chosen logit whichever that is, so no choice of a balancer weighs 0. In what order the experts were chosen does not
    matter. For (token, expert) pairs the weights are a softmax over the chosen logits.
    """

    reading: SparsemixerReading

    logits_dtype: torch.dtype = torch.float32
    """Of the latest forward; the threshold is taken in it. Autocast makes it narrower than `own`."""

    def weigh(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        E = self.num_experts
        logits_T1E = scores_TE.to(self.logits_dtype).unsqueeze(1)
        empty_TK = expert_ids_TK == E
        ids_TK1 = expert_ids_TK.clamp(max=E - 1).unsqueeze(2)
        logits_TKE = logits_T1E.expand(-1, expert_ids_TK.shape[1], -1)
        with torch.no_grad():
            own_TK1 = logits_TKE.gather(2, ids_TK1)
            far_TKE = (own_TK1 - logits_TKE) / logits_TKE.abs().clamp(min=own_TK1) > 2 * self.reading.jitter
            lower_id_TKE = torch.arange(E, device=ids_TK1.device) < ids_TK1
            better_TKE = (logits_TKE > own_TK1) | (logits_TKE == own_TK1) & lower_id_TKE
            spill_TE = empty_TK.new_zeros(len(scores_TE), E + 1)  # the last column takes what is empty
            chosen_T1E = spill_TE.scatter(1, expert_ids_TK, True)[:, :E].unsqueeze(1)
        near_TKE = logits_TKE.masked_fill(far_TKE | (better_TKE & chosen_T1E), -float("inf"))
        weights_TK = near_TKE.to(self.own_0.dtype).softmax(dim=-1).gather(2, ids_TK1).squeeze(2)
        return weights_TK.to(scores_TE.dtype).masked_fill(empty_TK, 0)

    def weigh_full(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return self.weigh(scores_TE, expert_ids_TK)


class PhimoeAdapter(Adapter):
    """The router is the nn.Linear itself.

    In training the stock router samples among the logits that pass and estimates the gradient by Heun's method. Both
    belong to its own way of choosing: swapped, the weights are those of eval mode, with their plain gradient. Its noise
    on the hidden states stays.
    """

    gating = SparsemixerGating

    def read(self, stock: Stock) -> SparsemixerReading:
        return SparsemixerReading(
            num_experts=setting(stock, "num_experts"),
            top_k=2,  # whatever num_experts_per_tok says
            projection=linear(stock),
            score="identity",
            score_dtype="own",
            after=("softmax", "own"),
            weights_dtype="own",
            jitter=setting(stock, "router_jitter_noise"),
        )

    def logits(self, body: Body, hidden_TD: Tensor) -> Tensor:
        logits_TE = super().logits(body, hidden_TD)
        gating = body.gating
        assert isinstance(gating, SparsemixerGating)
        gating.logits_dtype = logits_TE.dtype
        return logits_TE

    def weights_dtype(self, gating: ModelGating, hidden: Tensor, logits: Tensor) -> torch.dtype:
        return logits.new_empty(0, 1).softmax(dim=-1).dtype  # autocast widens it on some devices

    def hidden(self, body: Body, hidden_TD: Tensor) -> Tensor:
        module: Any = body
        if module.training:
            jitter_(hidden_TD, module.input_jitter_noise)
        return hidden_TD

"""Adapter: how a class of stock routers takes its input and hands its results out. One is enough for nearly all."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moerouters.swapping.gating import ModelGating, project
from moerouters.swapping.read import read, triple
from moerouters.swapping.reading import Cast, Reading
from moerouters.swapping.stock import Stock


class Body(Protocol):
    """What an adapter sees of a swapped router."""

    @property
    def gating(self) -> ModelGating: ...

    def route(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """([T, K] weights, at least float32; [T, K] ids), with padding routed as the stock router does."""
        ...


class Adapter:
    """Takes [B, S, D] or [T, D], returns (logits [T, E], weights [T, K], ids [T, K])."""

    gating: type[ModelGating] = ModelGating

    def read(self, stock: Stock) -> Reading:
        """Raises NotUnderstood."""
        return read(stock)

    def results(self, returned: Any) -> tuple[Any, ...]:
        """What a stock router returned, for comparison; raises NotUnderstood for another form."""
        return triple(returned)

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> Any:
        """The swapped router's forward."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        gating = body.gating
        logits_TE = project(gating.reading, hidden_TD, gating.tensors)
        weights_TK, ids_TK = body.route(logits_TE, hidden_TD)
        return logits_TE, weights_TK.to(weights_dtype(gating, hidden_TD, logits_TE)), ids_TK


def weights_dtype(gating: ModelGating, hidden: Tensor, logits: Tensor) -> Any:
    """In which the stock router hands its weights out."""
    reading = gating.reading
    if reading.weights_dtype != "own":
        return hidden.dtype if reading.weights_dtype == "hidden" else torch.float32
    widened = any(isinstance(step, Cast) for step in reading.before)
    return gating.own_0.dtype if widened else logits.dtype

"""Gemma4TextRouter, DiffusionGemmaTextRouter: the product is taken of normed and scaled hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moerouters.swapping.adapters.base import Adapter, Body
from moerouters.swapping.read import read
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock


class GemmaAdapter(Adapter):
    """logits = proj(norm(hidden) * scale * D ** -0.5). Index 0 of the triple holds probabilities."""

    def read(self, stock: Stock) -> Reading:
        return read(stock, prepared=True)

    def hidden(self, body: Body, hidden_TD: Tensor) -> Tensor:
        module: Any = body
        prepared_TD: Tensor = module.norm(hidden_TD) * module.scale * module.scalar_root_size
        return prepared_TD

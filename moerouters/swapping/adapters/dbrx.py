"""DbrxRouter: hands out logits only; the block around it chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moerouters.errors import UnsupportedError
from moerouters.kernels.counts import count_experts
from moerouters.swapping.adapters.base import Adapter, Body, jitter_, linear, setting
from moerouters.swapping.gating import ModelGating
from moerouters.swapping.reading import Norm, Reading
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotUnderstood

_CHOOSES = "route_tokens_to_experts"
"""The block's method from logits to (weights, ids)."""


class DbrxGating(ModelGating):
    """Keeps the choice between the router's forward and the moment the block asks for it."""

    chosen: tuple[Tensor, Tensor] | None = None

    def hand_over(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """([T, K] weights, [T, K] ids) of the router's latest forward, once."""
        chosen, self.chosen = self.chosen, None
        if chosen is None:
            raise UnsupportedError(
                f"{_CHOOSES} was called without the router before it.",
                why="a swapped router chooses in its own forward, where it knows padding and hidden states",
                fix="call the router, then this method on its logits; or unswap the layer",
            )
        return chosen


class DbrxAdapter(Adapter):
    """While swapped, `hand_over` of the router's gating hides the block's method that chooses."""

    gating = DbrxGating

    def read(self, stock: Stock) -> Reading:
        block: Any = stock.block
        if not hasattr(block, _CHOOSES):
            raise NotUnderstood(f"the block around it has no `{_CHOOSES}`")
        p = block.moe_normalize_expert_weights
        return Reading(
            num_experts=setting(stock, "layer.out_features"),
            top_k=block.top_k,
            projection=linear(stock, "layer"),
            score="softmax",
            score_dtype="own",
            finish=() if p is None else (Norm(p=p),),
            weights_dtype="own",
        )

    def run(self, stock: Stock, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> tuple[Any, ...]:
        router = getattr(stock.module, "router", None)
        logits_TE = stock.run(tensors, hidden_TD)
        block: Any = stock.block
        choose = block.route_tokens_to_experts if router is None else router.gating.hand_over
        return logits_TE, *choose(logits_TE)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        block: Any = stock.block
        router = getattr(stock.module, "router", None)
        # Of a swapped router only seen: the block has yet to take it.
        _, ids_TK = block.route_tokens_to_experts(returned) if router is None else router.gating.chosen
        return count_experts(ids_TK, returned.shape[1])

    def enter(self, body: Body) -> None:
        gating = body.gating
        assert isinstance(gating, DbrxGating)
        setattr(_block(body), _CHOOSES, gating.hand_over)

    def leave(self, body: Body) -> None:
        _block(body).__dict__.pop(_CHOOSES, None)

    def hidden(self, body: Body, hidden_TD: Tensor) -> Tensor:
        module: Any = body
        if module.training:
            jitter_(hidden_TD, module.moe_jitter_eps)
        return hidden_TD

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> Tensor:
        gating = body.gating
        assert isinstance(gating, DbrxGating)
        logits_TE, weights_TK, ids_TK = self.routed(body, hidden_states)
        gating.chosen = weights_TK, ids_TK
        return logits_TE


def _block(body: Body) -> nn.Module:
    stock = body.gating.tensors
    assert isinstance(stock, Stock)
    return stock.block

"""Adapter: how a class of stock routers takes its input and hands its results out. One is enough for nearly all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from moerouters.errors import UnsupportedError
from moerouters.kernels.counts import count_experts
from moerouters.kernels.topk import topk_lowest_id
from moerouters.swapping.gating import ModelGating, cast, project
from moerouters.swapping.read import read, triple
from moerouters.swapping.reading import Projection, Reading
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotARouter, NotUnderstood


class Body(Protocol):
    """What an adapter sees of a swapped router: the stock router's own attributes too, but those are no common ones."""

    @property
    def gating(self) -> ModelGating: ...

    def route(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """([T, K] weights, at least float32; [T, K] ids), with padding routed as the stock router does."""
        ...


class Adapter:
    """Takes [B, S, D] or [T, D], returns (logits [T, E], weights [T, K], ids [T, K])."""

    gating: type[ModelGating] = ModelGating
    ON_THE_WAY: ClassVar = ("forward", "routed", "logits", "hidden", "weights_dtype")
    """The methods that a forward goes through. With these as they are here, `ModelGating.serve` can stand for all."""

    def read(self, stock: Stock) -> Reading:
        """Raises NotUnderstood."""
        return read(stock)

    def run(self, stock: Stock, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> tuple[Any, ...]:
        """All that a router, stock or swapped, gives for these tensors in eval mode; it is what has to be proven."""
        return self.results(stock.run(tensors, hidden_TD))

    def results(self, returned: Any) -> tuple[Any, ...]:
        """What a router returned, for comparison; raises NotUnderstood for another form."""
        return triple(returned)

    def load_E(self, stock: Stock, returned: Any) -> Tensor:
        """int64 [E]: to how many tokens each expert was given, by what a router returned. Raises NotUnderstood."""
        logits_TE, _, ids_TK = self.results(returned)
        return count_experts(ids_TK.long(), logits_TE.shape[-1])

    def part(self, name: str) -> str | None:
        """Where a layer splits its tokens between routers: the part that the router of that name sees. None for all."""
        return None

    def split(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """bool [B, S] by part: the tokens that it gets, row by row, when the model is called with these arguments.

        A part that is left out gets all.
        """
        return {}

    def enter(self, body: Body) -> None:
        """The module was swapped in a model: what has to change around it."""

    def leave(self, body: Body) -> None:
        """The module is about to become the stock router again."""

    def hidden(self, body: Body, hidden_TD: Tensor) -> Tensor:
        """[T, D]: what the router's matrix is multiplied with."""
        return hidden_TD

    def logits(self, body: Body, hidden_TD: Tensor) -> Tensor:
        """[T, E] in the dtype of the stock router."""
        gating = body.gating
        return project(gating.reading, self.hidden(body, hidden_TD), gating.tensors)

    def routed(self, body: Body, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K], ids [T, K]) in the dtypes of the stock router."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        gating = body.gating
        logits_TE = self.logits(body, hidden_TD)
        weights_TK, ids_TK = body.route(logits_TE, hidden_TD)
        return logits_TE, cast(weights_TK, self.weights_dtype(gating, hidden_TD, logits_TE)), ids_TK

    def weights_dtype(self, gating: ModelGating, hidden: Tensor, logits: Tensor) -> torch.dtype:
        """In which the stock router hands its weights out."""
        reading = gating.reading
        if reading.weights_dtype != "own":
            return hidden.dtype if reading.weights_dtype == "hidden" else torch.float32
        widened = any(step.kind == "cast" for step in reading.before)
        return gating.own_0.dtype if widened else logits.dtype

    def forward(self, body: Body, hidden_states: Tensor, *handed_in: Any, **named: Any) -> Any:
        """The swapped router's forward."""
        logits_TE, weights_TK, ids_TK = self.routed(body, hidden_states)
        if body.gating.reading.returns == "scores":
            return body.gating.score(body.gating.prepare(logits_TE)), weights_TK, ids_TK
        return logits_TE, weights_TK, ids_TK


class FirstAmongEquals(ModelGating):
    """For stock routers that choose by max or argmax: among equal scores the first expert; torch.topk takes any."""

    def top(self, values: Tensor, k: int) -> Tensor:
        return topk_lowest_id(values, k)

    def choose(self, scores_TE: Tensor, adjusted_TE: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK = self.top(self.limit(adjusted_TE), self.top_k)
        return self.weigh_full(scores_TE, ids_TK), ids_TK


# For adapters that know their class by its name, and read its attributes instead of watching it.


def setting(stock: Stock, name: str) -> Any:
    """The attribute of that name (dots lead further inside) of the stock router. Raises NotUnderstood without one."""
    found: Any = stock.module
    for part in name.split("."):
        if not hasattr(found, part):
            raise NotUnderstood(f"it has no `{name}`, as its class had in the releases that are known")
        found = getattr(found, part)
    return found


def linear(stock: Stock, name: str = "") -> Projection:
    """The product that the nn.Linear of that name takes; without a name the router itself is one."""
    place = f"{name}." if name else ""
    has_bias = setting(stock, f"{place}bias") is not None
    return Projection(weight=f"{place}weight", bias=f"{place}bias" if has_bias else None)


def parts(returned: Any, count: int) -> tuple[Any, ...]:
    """`returned`, a tuple of that many. Raises NotARouter for another form."""
    if not (isinstance(returned, tuple) and len(returned) == count):
        form = f"{len(returned)} results" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise NotARouter(f"it returns {form}, where its class returned {count} in the releases that are known")
    return returned


def jitter_(hidden_states: Tensor, width: float | None) -> None:
    """Noise of the model, 1 +- width, as stock routers make it in training: in place, so the experts see it too."""
    if width:
        hidden_states *= torch.empty_like(hidden_states).uniform_(1 - width, 1 + width)


def expect_slots(ids_TK: Tensor, expected: int, why: str) -> None:
    """Raise UnsupportedError for another number of slots than the block around the router can take."""
    if ids_TK.shape[1] != expected:
        raise UnsupportedError(
            f"the router gives {ids_TK.shape[1]} slots per token, this block takes {expected}.",
            why=why,
            fix="choose a router that gives every token the same number of experts, or leave the layer out of the swap",
        )

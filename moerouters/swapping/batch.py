"""What a swapped router must know of the batch and the model does not tell it: padding, sequences, token ids.

A hook on the model that is called with `attention_mask` makes a Batch and adds it to the keyword arguments, which
decoder layers pass on to their attention. There another hook takes it out again and gives it to the layer's router. So
it comes by the same way in the first pass and in the recomputation of activation checkpointing, and it survives
torch.compile. Where a layer does not pass keywords on, routers keep the Batch of the latest forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moerouters.types import RouteContext

KEY = "moerouters_batch"


class Batch(NamedTuple):
    """One call of the model: B sequences of S tokens."""

    valid_BS: Tensor | None
    """bool, False for padding; None where nothing is padded or the mask is not [B, S]."""
    token_ids_BS: Tensor | None
    size: int
    length: int
    noise_key: Tensor | None
    """int64 [1], which pass this is; training only."""

    def context(self, num_tokens: int, hidden_TD: Tensor | None) -> RouteContext:
        """For a router that sees all B * S tokens in their order; one that sees others is told nothing."""
        if num_tokens != self.size * self.length:
            return RouteContext(hidden_TD=hidden_TD)
        device = None if hidden_TD is None else hidden_TD.device
        rows_B1 = torch.arange(self.size, device=device).unsqueeze(1)
        return RouteContext(
            valid_T=None if self.valid_BS is None else self.valid_BS.reshape(-1),
            sequence_ids_T=rows_B1.expand(self.size, self.length).reshape(-1),
            num_sequences=self.size,
            token_ids_T=None if self.token_ids_BS is None else self.token_ids_BS.reshape(-1),
            hidden_TD=hidden_TD,
            noise_key=self.noise_key,
        )


class BatchHooks:
    """The hooks of one model that is called with an attention mask, and of its layers that hold swapped routers."""

    def __init__(self, base: nn.Module, routers: Mapping[str, nn.Module]) -> None:
        """`routers` by their names inside `base`; each gets a `batch`."""
        self._routers = list(routers.values())
        self._passes = torch.zeros(1, dtype=torch.int64)
        parameters = inspect.signature(base.forward).parameters
        self._names = list(parameters)
        self._passes_on = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._handles = [base.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if self._passes_on:
            for layer, inside in _layers(base, routers).items():
                hand_over = partial(_hand_over, inside)
                self._handles += [
                    child.register_forward_pre_hook(hand_over, with_kwargs=True) for child in layer.children()
                ]

    def remove(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        batch = self._batch(given, training=base.training)
        for router in self._routers:
            router.batch = batch  # type: ignore[assignment]  # a plain attribute, no module
        return args, kwargs | {KEY: batch} if self._passes_on and batch is not None else kwargs

    def _batch(self, given: dict[str, Any], *, training: bool) -> Batch | None:
        token_ids_BS, embedded_BSD = given.get("input_ids"), given.get("inputs_embeds")
        shaped = token_ids_BS if token_ids_BS is not None else embedded_BSD
        if shaped is None or shaped.dim() < 2:
            return None
        B, S = int(shaped.shape[0]), int(shaped.shape[1])
        mask = given.get("attention_mask")
        # While decoding with a cache the mask also covers what came before; this pass is its end.
        valid_BS = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == B and mask.shape[1] >= S:
            valid_BS = mask[:, -S:].bool()
        noise_key = None
        if training:
            self._passes = self._passes.to(shaped.device) + 1
            noise_key = self._passes
        return Batch(valid_BS, token_ids_BS, B, S, noise_key)


def _hand_over(routers: list[nn.Module], child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the Batch out of what a layer passes on, and give it to the layer's routers."""
    if KEY not in kwargs:
        return None
    batch = kwargs.pop(KEY)
    for router in routers:
        # Only where another forward came in between: a compiled checkpoint must not write to what is outside of it.
        if router.batch is not batch:
            router.batch = batch
    return args, kwargs


def _layers(base: nn.Module, routers: Mapping[str, nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """Decoder layers, the elements of a list of modules, with the routers inside each."""
    found: dict[nn.Module, list[nn.Module]] = {}
    for name, router in routers.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found.setdefault(base.get_submodule(".".join(parts[: number + 1])), []).append(router)
    return found

"""What a swapped router must know of the batch and the model does not tell it: padding, sequences, token ids.

A hook on the model that is called with `attention_mask` makes a Batch and adds it to the keyword arguments, which
decoder layers pass on to their attention. There another hook takes it out again and gives it to the layer's router. So
it comes by the same way in the first pass and in the recomputation of activation checkpointing, and it survives
torch.compile. Where a layer does not pass keywords on, routers keep the Batch of the latest forward.

Where a layer splits its tokens between routers, their adapter says how, and each gets the Batch of its own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moerouters.types import RouteContext

if TYPE_CHECKING:
    from moerouters.swapping.module import SwappedRouter

    Placed = tuple[SwappedRouter, str | None]
    """A router, and which part of the tokens it sees."""

KEY = "moerouters_batch"


class Batch(NamedTuple):
    """One call of the model: B sequences of S tokens, or those of them that a layer sends to one of its routers."""

    valid_BS: Tensor | None
    """bool, False for padding; None where nothing is padded or the mask is not [B, S]."""
    token_ids_BS: Tensor | None
    size: int
    length: int
    noise_key: Tensor | None
    """int64 [1], which pass this is; training only."""
    index_T: Tensor | None = None
    """int64, ascending: the router's tokens among the B * S; None for all."""
    tells_sequences: bool = True
    """Whether routers learn which sequence a token belongs to."""
    parts: dict[str, Batch] | None = None
    """The tokens of routers that do not see all, by the part that adapters name."""

    def of(self, part: str | None) -> Batch:
        """What routers of that part see: all tokens, unless this call was split."""
        return self if part is None or self.parts is None else self.parts.get(part, self)

    def context(self, num_tokens: int, hidden_TD: Tensor | None) -> RouteContext:
        """For a router that sees these tokens in their order, row by row; one that sees others is told nothing."""
        if num_tokens != (self.size * self.length if self.index_T is None else self.index_T.shape[0]):
            return RouteContext(hidden_TD=hidden_TD)
        device = None if hidden_TD is None else hidden_TD.device
        rows_B1 = torch.arange(self.size, device=device).unsqueeze(1)
        return RouteContext(
            valid_T=self._chosen(self.valid_BS),
            sequence_ids_T=self._chosen(rows_B1.expand(self.size, self.length)) if self.tells_sequences else None,
            num_sequences=self.size if self.tells_sequences else None,
            token_ids_T=self._chosen(self.token_ids_BS),
            hidden_TD=hidden_TD,
            noise_key=self.noise_key,
        )

    def _chosen(self, values_BS: Tensor | None) -> Tensor | None:
        """[T] of [B, S]."""
        if values_BS is None:
            return None
        values_T = values_BS.reshape(-1)
        return values_T if self.index_T is None else values_T[self.index_T]


class BatchHooks:
    """The hooks of one model that is called with an attention mask, and of its layers that hold swapped routers."""

    def __init__(self, base: nn.Module, routers: Mapping[str, SwappedRouter]) -> None:
        """`routers` by their names inside `base`; each gets a `batch`."""
        self._placed = [(router, router.adapter.part(name)) for name, router in routers.items()]
        self._splitters = list(dict.fromkeys(router.adapter for router, part in self._placed if part is not None))
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
        for router, part in self._placed:
            # Without a look at the one before, which a compiled model would have to guard against.
            router.batch = None if batch is None else batch.of(part)
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
        batch = Batch(valid_BS, token_ids_BS, B, S, noise_key)
        return batch._replace(parts=self._parts(batch, given)) if self._splitters else batch

    def _parts(self, batch: Batch, given: dict[str, Any]) -> dict[str, Batch]:
        """The Batch of every part into which layers split the tokens of this call."""
        # A tape cuts the tokens of n sequences into n rows of one length, and a part of them need not have that form.
        taped = any(router.tape is not None for router, _ in self._placed)
        found = {}
        for adapter in self._splitters:
            for part, chosen_BS in adapter.split(given).items():
                if chosen_BS.shape == (batch.size, batch.length):  # of any other shape the model itself raises
                    index_T = chosen_BS.reshape(-1).nonzero().squeeze(1)
                    found[part] = batch._replace(index_T=index_T, tells_sequences=not taped)
        return found


def _hand_over(placed: list[Placed], child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the Batch out of what a layer passes on, and give it to the layer's routers."""
    if KEY not in kwargs:
        return None
    batch = kwargs.pop(KEY)
    for router, part in placed:
        own = batch.of(part)
        # Only where another forward came in between: a compiled checkpoint must not write to what is outside of it.
        if router.batch is not own:
            router.batch = own
    return args, kwargs


def _layers(base: nn.Module, routers: Mapping[str, SwappedRouter]) -> dict[nn.Module, list[Placed]]:
    """Decoder layers, the elements of a list of modules, with the routers inside each."""
    found: dict[nn.Module, list[Placed]] = {}
    for name, router in routers.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            layer = base.get_submodule(".".join(parts[: number + 1]))
            found.setdefault(layer, []).append((router, router.adapter.part(name)))
    return found

"""record_logits: keep what the routers of a model compute, while somebody runs it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moerouters.errors import TraceError, UnsupportedError
from moerouters.inspecting.logits_trace import NOBODY, About, LayerLogits, LogitsTrace, needed_tensors
from moerouters.kernels.accumulate import inside_backward
from moerouters.swapping.adapters import ADAPTERS, adapter_for
from moerouters.swapping.adapters.base import Adapter
from moerouters.swapping.find import Found, find
from moerouters.swapping.gating import ModelGating
from moerouters.swapping.module import SwappedRouter
from moerouters.swapping.reading import Reading
from moerouters.swapping.swap import examine


@contextmanager
def record_logits(model: nn.Module) -> Iterator[LogitsRecorder]:
    """Record the router logits of every forward inside the block; the model computes and stays what it was.

    Every token counts once, also where activation checkpointing repeats a forward inside a backward pass. Padding is
    left out if `model` itself is called, with an attention mask [B, S]. Routers that cannot be understood are left out,
    see `left_out`. Raises UnsupportedError if none is left.
    """
    recorder = LogitsRecorder()
    for found in find(model):
        record = examine(model, found)
        if record.reading is None:
            recorder.left_out[found.name] = record.reason or ""
        else:
            recorder._layers[found.name] = _kept(found, record.reading)
    enter = partial(recorder._enter, list(inspect.signature(model.forward).parameters))
    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    for kept in recorder._layers.values():
        hooks.append(kept.module.register_forward_hook(partial(recorder._listen, kept), with_kwargs=True))
    try:
        if not recorder._layers:
            raise UnsupportedError(
                f"no router of {type(model).__name__} can be recorded.",
                where="\n".join(f"{name}: {reason}" for name, reason in recorder.left_out.items()),
                why="a router is recorded only if its gating was understood and reproduced bit for bit",
                fix="`moerouters inspect` lists what was found",
            )
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Kept:
    """What is kept of one router."""

    module: nn.Module
    adapter: Adapter
    gating: ModelGating
    tensors: dict[str, Tensor]
    hidden_dtype: torch.dtype = torch.float32
    logits: list[Tensor] = field(default_factory=list)


class _Listener:
    """Stands in for a swapped router while its adapter computes logits, and keeps them. Else it is like the module."""

    training = False
    """Noise on hidden states was made by the module, in place; it must not be made again."""

    def __init__(self, kept: _Kept, valid_T: Tensor | None) -> None:
        self._kept = kept
        self._valid_T = valid_T

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept.module, name)

    @property
    def gating(self) -> ModelGating:
        return self._kept.gating

    def route(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        real_TE = logits_TE
        if self._valid_T is not None and self._valid_T.numel() == logits_TE.shape[0]:
            real_TE = logits_TE[self._valid_T.to(logits_TE.device)]
        self._kept.logits.append(real_TE.to("cpu", copy=True))
        return self.gating.choose_as_stock(logits_TE)


class LogitsRecorder:
    """What `record_logits` hands out."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        """Routers that are not recorded, with the reason."""
        self._layers: dict[str, _Kept] = {}
        self._valid_T: Tensor | None = None
        self._token_ids: list[Tensor] = []
        self._sequence_ids: list[Tensor] = []
        self._sequences = 0

    def trace(self, about: About = NOBODY) -> LogitsTrace:
        """Everything recorded so far; routers that saw no token are left out. Raises TraceError if that is all."""
        counts = {name: sum(map(len, kept.logits)) for name, kept in self._layers.items()}
        tokens = max(counts.values(), default=0)
        if tokens == 0:
            raise TraceError(
                "no router has seen a token.",
                where=", ".join(counts),
                why="the model was not run, or on nothing but padding",
                fix="run the model inside the block of record_logits",
            )
        for name in [name for name, count in counts.items() if count == 0]:
            self.left_out[name] = "it saw no token"
        known = {
            name: torch.cat(parts)
            for name, parts in (("token_ids_T", self._token_ids), ("sequence_ids_T", self._sequence_ids))
            if parts and sum(map(len, parts)) == tokens
        }
        layers = {name: _layer(kept) for name, kept in self._layers.items() if counts[name]}
        return LogitsTrace(layers=layers, about=about, **known)

    def _enter(self, names: list[str], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the padding, the sequences and the ids of a call of the model."""
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        ids_BS, mask = given.get("input_ids"), given.get("attention_mask")
        shaped = ids_BS if ids_BS is not None else given.get("inputs_embeds")
        self._valid_T = None
        if not isinstance(shaped, Tensor) or shaped.dim() < 2:
            return
        B, S = shaped.shape[:2]
        valid_T = torch.ones(B * S, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == B and mask.shape[1] >= S:
            valid_T = mask[:, -S:].bool().reshape(-1).cpu()
            self._valid_T = valid_T
        rows_T = torch.arange(B).repeat_interleave(S) + self._sequences
        self._sequences += B
        self._sequence_ids.append(rows_T[valid_T])
        if isinstance(ids_BS, Tensor):
            self._token_ids.append(ids_BS.reshape(-1).cpu()[valid_T])

    def _listen(self, kept: _Kept, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> None:
        # After the forward: what it returned need not be logits, so they are computed again from its input.
        if inside_backward():
            return
        hidden = args[0] if args else next(iter(kwargs.values()))
        kept.hidden_dtype = hidden.dtype
        with torch.no_grad():
            kept.adapter.forward(_Listener(kept, self._valid_T), *args, **kwargs)


def _kept(found: Found, reading: Reading) -> _Kept:
    module = found.module
    adapter = module.adapter if isinstance(module, SwappedRouter) else adapter_for(module)
    tensors = {name: found.stock(name).detach().to("cpu", copy=True) for name in needed_tensors(reading)}
    if isinstance(module, SwappedRouter) and reading.correction_bias is not None:
        # The stock tensor holds the sum with what the router has learned; the trace is to hold the model's own part.
        stock_E = tensors[reading.correction_bias]
        own_E = module.gating.correction_bias_E.detach().cpu().reshape(stock_E.shape)
        tensors[reading.correction_bias] = own_E.to(stock_E.dtype)
    gating = adapter.gating(reading, found.stock).to(found.stock(reading.projection.weight).device)
    return _Kept(module=module, adapter=adapter, gating=gating, tensors=tensors)


def _layer(kept: _Kept) -> LayerLogits:
    reading, module = kept.gating.reading, kept.module
    stock_class = module.stock_class if isinstance(module, SwappedRouter) else type(module)
    adapter = next((cls.__name__ for cls in stock_class.__mro__ if cls.__name__ in ADAPTERS), "")
    return LayerLogits(
        logits_TE=torch.cat(kept.logits),
        reading=reading,
        weight_dtype=kept.gating.own_0.dtype,
        hidden_dtype=kept.hidden_dtype,
        tensors=kept.tensors,
        stock_class=stock_class.__name__,
        adapter=adapter,
    )

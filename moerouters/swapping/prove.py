"""Prove a Reading: the rebuilt router gives the bits of the stock one, on the model's tensors and on others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moerouters.router import Router
from moerouters.swapping.adapters.base import Adapter
from moerouters.swapping.module import install
from moerouters.swapping.read import hidden_size, probe_like
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotUnderstood

_TOKENS = 64


class _TopK(Router):
    """What `topk` is; the plug-in itself is imported where it is named."""

    reads: ClassVar[frozenset[str]] = frozenset()


def prove(stock: Stock, reading: Reading, adapter: Adapter) -> None:
    """Swap a copy of the router for `topk` and compare with the stock one, bit for bit, in float32 and in the model's
    own dtypes. Raises NotUnderstood with the first difference."""
    width = hidden_size(stock)
    for tensors in _tensor_sets(stock):
        rebuilt = _rebuilt(stock, tensors, reading, adapter)
        for hidden_TD in _probes(width, tensors[reading.projection.weight]):
            expected = _run(adapter, stock, tensors, hidden_TD)
            found = adapter.run(rebuilt, tensors, hidden_TD)
            for place, (want, have) in enumerate(zip(expected, found, strict=True)):
                _expect_same(f"result {place}", want, have)


def _run(adapter: Adapter, stock: Stock, tensors: Mapping[str, Tensor], hidden_TD: Tensor) -> tuple[Any, ...]:
    try:
        return adapter.run(stock, tensors, hidden_TD)
    except RuntimeError as error:
        raise NotUnderstood(f"the stock router itself fails on {hidden_TD.dtype} tensors: {error}") from error


def _rebuilt(stock: Stock, tensors: Mapping[str, Tensor], reading: Reading, adapter: Adapter) -> Stock:
    """A copy of the stock router with these tensors, in which `topk` chooses."""
    module = copy.deepcopy(stock.module).eval()
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if name in dict(module.named_parameters()):
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        elif name in dict(module.named_buffers()):
            setattr(module.get_submodule(owner), leaf, tensor)
    copied = Stock(module, stock.block, handed_in=tensors)
    router = _TopK(adapter.gating(reading, copied)).to(tensors[reading.projection.weight].device)
    install(module, router, adapter, name="topk", hidden_size=hidden_size(stock))
    return copied


def _tensor_sets(stock: Stock) -> Iterator[dict[str, Tensor]]:
    """The model's tensors as they are and in float32, and random ones of both: fresh gates are often all zeros."""
    real = stock.tensors()
    generator = torch.Generator().manual_seed(1)
    random = {
        name: probe_like(value, generator).to(value) if value.is_floating_point() else value
        for name, value in real.items()
    }
    for tensors in (real, random):
        yield tensors
        widened = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        if any(widened[name].dtype != tensors[name].dtype for name in tensors):
            yield widened


def _probes(hidden_size: int, like: Tensor) -> Iterator[Tensor]:
    """Hidden states: ordinary, small and large ones, a token repeated, all zeros (every score ties), a single token."""
    generator = torch.Generator().manual_seed(2)
    some_TD = torch.randn(_TOKENS, hidden_size, generator=generator)
    for made in (some_TD, 0.01 * some_TD, 30 * some_TD, some_TD[:1].expand(5, -1), 0 * some_TD[:9], some_TD[:1]):
        yield made.to(like)


def _expect_same(name: str, want: Any, have: Any) -> None:
    if not (isinstance(want, Tensor) and isinstance(have, Tensor)):
        if want != have:
            raise NotUnderstood(f"{name} is {have!r} rebuilt, {want!r} in the stock router")
        return
    if want.dtype != have.dtype or want.shape != have.shape:
        raise NotUnderstood(
            f"{name} is {have.dtype} {list(have.shape)} rebuilt, {want.dtype} {list(want.shape)} in the stock router"
        )
    differs = (want != have) & ~(want.isnan() & have.isnan())
    if differs.any():
        place = tuple(differs.nonzero()[0].tolist())
        raise NotUnderstood(
            f"{name} differs first at {list(place)}: {have[place].item()!r} rebuilt, {want[place].item()!r} in the "
            f"stock router ({want.dtype})"
        )

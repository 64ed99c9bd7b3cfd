"""Find the routers of a model by structure: what its recorders watch, and what stands beside its experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moerouters.swapping.adapters import known_by_name
from moerouters.swapping.module import SwappedRouter
from moerouters.swapping.read import read
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotARouter, NotUnderstood


@dataclass(frozen=True, kw_only=True)
class Found:
    """A router in a model."""

    name: str
    """Of the module."""
    stock: Stock

    @property
    def module(self) -> nn.Module:
        return self.stock.module

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer: the first number in the name."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def find(model: nn.Module) -> list[Found]:
    """Routers of the model in the order of its modules, swapped ones included.

    A module is one if it stands beside experts and returns what routers return, or if the model's recorders watch it,
    or if its class is listed in `adapters`. Nothing is guessed from a part of a name.
    """
    recorded = tuple(recorded_classes(model))
    found: dict[str, Found] = {}
    for block_name, block in model.named_modules():
        beside = any(are_experts(child) for child in block.children())
        for child_name, child in block.named_children():
            name = f"{block_name}.{child_name}" if block_name else child_name
            stock = Stock(child, block)
            known = isinstance(child, SwappedRouter) or known_by_name(child)
            if known or isinstance(child, recorded) or (beside and _returns_ids(stock)):
                found[name] = Found(name=name, stock=stock)
    # Some recorders watch the block around a router.
    around = {name for name in found for other in found if other.startswith(f"{name}.")}
    return [each for name, each in found.items() if name not in around]


def are_experts(module: nn.Module) -> bool:
    """Whether the module was made by transformers' `use_experts_implementation`, which marks it."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _returns_ids(stock: Stock) -> bool:
    if are_experts(stock.module):
        return False
    try:
        read(stock)
    except NotARouter:
        return False
    except NotUnderstood:
        pass
    return True


def recorded_classes(model: nn.Module) -> Iterator[type[nn.Module]]:
    """Classes whose results the model, or a model inside it, records as router logits."""
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                yield target

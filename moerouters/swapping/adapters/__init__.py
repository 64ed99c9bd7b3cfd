"""Adapters by the name of the stock class, and the classes that no adapter can serve, each with its reason."""

from __future__ import annotations

from torch import nn

from moerouters.swapping.adapters.base import Adapter

ADAPTERS: dict[str, Adapter] = {}

REFUSED: dict[str, str] = {
    "DeepseekV4HashRouter": "it looks experts up by token id in a fixed table, so there is nothing to balance",
    "NllbMoeTop2Router": "it hands out a dense mask limited by a capacity, with a second expert that may be sampled",
    "SwitchTransformersTop1Router": "it hands out a one-hot mask limited by a capacity, not expert ids",
}

_GENERAL = Adapter()


def adapter_for(module: nn.Module) -> Adapter:
    """The adapter of the module's class, or of one that it was derived from; nearly always the general one."""
    return next((ADAPTERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in ADAPTERS), _GENERAL)


def refusal(module: nn.Module) -> str | None:
    """Why the module's class cannot be swapped, if it is one of REFUSED."""
    return next((REFUSED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in REFUSED), None)


def known_by_name(module: nn.Module) -> bool:
    """Whether the module is a router because its class is listed here."""
    return adapter_for(module) is not _GENERAL or refusal(module) is not None

"""Adapters by the name of the stock class, and the classes that no adapter can serve, each with its reason."""

from __future__ import annotations

from torch import nn

from moerouters.swapping.adapters.base import Adapter
from moerouters.swapping.adapters.dbrx import DbrxAdapter
from moerouters.swapping.adapters.ernie import ErnieVLAdapter
from moerouters.swapping.adapters.gemma import GemmaAdapter
from moerouters.swapping.adapters.inkling import InklingAdapter
from moerouters.swapping.adapters.jetmoe import JetMoeAdapter
from moerouters.swapping.adapters.llama4 import Llama4Adapter
from moerouters.swapping.adapters.phimoe import PhimoeAdapter
from moerouters.swapping.adapters.switch import SwitchAdapter
from moerouters.swapping.adapters.zaya import ZayaAdapter

ADAPTERS: dict[str, Adapter] = {
    "DbrxRouter": DbrxAdapter(),
    "DiffusionGemmaTextRouter": GemmaAdapter(),
    "Ernie4_5_VLMoeMoeTopKRouter": ErnieVLAdapter(),
    "Gemma4TextRouter": GemmaAdapter(),
    "InklingTopkRouter": InklingAdapter(),
    "JetMoeTopKGating": JetMoeAdapter(),
    "Llama4Router": Llama4Adapter(),
    "PhimoeTopKRouter": PhimoeAdapter(),
    "SwitchTransformersTop1Router": SwitchAdapter(),
    "ZayaRouter": ZayaAdapter(),
}

REFUSED: dict[str, str] = {
    "DeepseekV4HashRouter": "it looks experts up by token id in a fixed table, so there is nothing to balance",
    "NllbMoeTop2Router": (
        "its block runs expert 1 on first choices and expert 0 on the rest, whichever experts were chosen, "
        "so there is nothing to balance"
    ),
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

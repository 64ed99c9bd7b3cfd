"""Surroundings: the hooks around a model's swapped routers, kept on the model so that they are copied with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from moerouters.swapping.batch import BatchHooks
from moerouters.swapping.find import recorded_classes
from moerouters.swapping.module import SwappedRouter
from moerouters.swapping.stock_aux import StockAux

_NAME = "moerouters_surroundings"


class Surroundings:
    """All hooks of one model."""

    def __init__(self) -> None:
        self._hooks: list[BatchHooks | StockAux] = []

    @classmethod
    def of(cls, model: nn.Module) -> Surroundings:
        """Those of the model, made on first use."""
        if _NAME not in model.__dict__:
            model.__dict__[_NAME] = cls()
        found = model.__dict__[_NAME]
        assert isinstance(found, cls)
        return found

    def renew(self, model: nn.Module, *, keep_stock_aux: bool) -> None:
        """Put hooks around the routers that are swapped now; none are left where there is none.

        Those of a part of the model, which was swapped as a model of its own, make way for the whole model's.
        """
        for part in model.modules():
            earlier = part.__dict__.pop(_NAME, None)
            for hook in () if earlier is None else earlier._hooks:
                hook.remove()
        model.__dict__[_NAME] = self
        self._hooks = []
        for base in _innermost(model):
            routers = {name: each for name, each in base.named_modules() if isinstance(each, SwappedRouter)}
            self._hooks.append(BatchHooks(base, routers))
        if not keep_stock_aux:
            self._hooks += _stock_aux(model)
        if not self._hooks:
            del model.__dict__[_NAME]


def _innermost(model: nn.Module) -> list[nn.Module]:
    """For each swapped router the nearest module around it that is called with tokens and an attention mask."""
    found: dict[nn.Module, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, SwappedRouter):
            parts = name.split(".")
            around = (model.get_submodule(".".join(parts[:i])) for i in reversed(range(len(parts))))
            nearest = next((each for each in around if _takes(each, "attention_mask", "inputs_embeds")), None)
            if nearest is not None:
                found[nearest] = None
    return list(found)


def _stock_aux(model: nn.Module) -> Iterator[StockAux]:
    """For each model with a head that may add its own aux loss over swapped routers."""
    for head in model.modules():
        if not _takes(head, "labels", "output_router_logits"):
            continue
        recorded = tuple(recorded_classes(head))
        routers = [_router_of(each) for each in head.modules() if isinstance(each, recorded)]
        if any(isinstance(each, SwappedRouter) for each in routers):
            inside = [each for each in _innermost(head) if each is not head]
            yield StockAux(head, inside, routers)


def _router_of(recorded: nn.Module) -> nn.Module:
    """The recorded module, or the swapped router in it: JetMoe records its attention, which routes too."""
    return next((each for each in recorded.modules() if isinstance(each, SwappedRouter)), recorded)


def _takes(module: nn.Module, *names: str) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return all(name in parameters for name in names)

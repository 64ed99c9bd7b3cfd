"""The aux loss that a stock model computes by itself: it has to count nothing for layers that another router serves.

Transformers pools the logits of all layers into one loss and adds it, times a coefficient, in the forward of the model
with the head. For a swapped layer the balancer decides; a second loss beside it would pull elsewhere.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import nn

from moerouters.swapping.module import SwappedRouter

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the latter in JetMoe


class StockAux:
    """Hooks of one model that takes labels.

    With every recorded router swapped, the coefficient is 0 for the length of a forward, and the loss is reported as 0.
    With some of them, the pool holds the others only; the caller still gets the logits of all.
    """

    def __init__(self, head: nn.Module, recorders: list[nn.Module], recorded: list[nn.Module]) -> None:
        """`recorders` are the modules inside that return router_logits, `recorded` the routers in their order."""
        self._recorded = recorded
        self._held: list[tuple[Any, str, Any]] = []
        self._whole: tuple[Any, Any] | None = None
        """Logits of all layers, and those that took their place for the length of a forward."""
        # always_call: a forward that fails must not leave the coefficient at 0.
        self._handles = [
            head.register_forward_pre_hook(self._before),
            head.register_forward_hook(self._after, always_call=True),
            *(each.register_forward_hook(self._without_swapped) for each in recorders if each is not head),
        ]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    @property
    def _all_swapped(self) -> bool:
        return all(isinstance(router, SwappedRouter) for router in self._recorded)

    def _before(self, head: nn.Module, args: Any) -> None:
        self._whole = None
        if self._all_swapped:
            config = getattr(head, "config", None)
            for owner, name in product((head, config, getattr(config, "text_config", None)), _COEFFICIENTS):
                if owner is not None and isinstance(getattr(owner, name, None), float):
                    self._held.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, 0.0)

    def _without_swapped(self, base: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "router_logits", None)
        if not self._all_swapped and isinstance(logits, tuple) and len(logits) == len(self._recorded):
            pairs = zip(logits, self._recorded, strict=True)
            output.router_logits = tuple(each for each, router in pairs if not isinstance(router, SwappedRouter))
            self._whole = logits, output.router_logits

    def _after(self, head: nn.Module, args: Any, output: Any) -> Any:
        while self._held:
            owner, name, value = self._held.pop()
            setattr(owner, name, value)
        whole, self._whole = self._whole, None
        if isinstance(output, tuple):  # return_dict=False: of what was replaced only the object is known
            return tuple(whole[0] if whole is not None and each is whole[1] else each for each in output)
        if output is None:  # the forward raised
            return None
        if whole is not None:
            output.router_logits = whole[0]
        elif self._all_swapped and isinstance(getattr(output, "aux_loss", None), torch.Tensor):
            output.aux_loss = torch.zeros_like(output.aux_loss)
        return None

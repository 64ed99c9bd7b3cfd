"""Count where a model's own routers send the tokens of a text: nothing is swapped, refused routers count as well."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moerouters.inspecting.inspection import LayerLoad, TextLoads, layer_number
from moerouters.inspecting.sources import OpenModel
from moerouters.inspecting.text import Text, run_over
from moerouters.metrics import dead_experts, load_cv, max_violation, min_violation
from moerouters.swapping.adapters import adapter_for
from moerouters.swapping.find import Found, find
from moerouters.swapping.understand import NotUnderstood


def loads_on(opened: OpenModel, text: Text) -> TextLoads:
    """Run the model over the text and count where its routers send it."""
    with LoadCounter(opened.model) as counter:
        run_over(opened, text)
    return TextLoads(
        text=text.name,
        sha256=text.sha256,
        tokens=text.ids_T.numel(),
        tokenizer=text.tokenizer,
        layers=tuple(_layer(name, load_E.cpu()) for name, load_E in counter.loads.items()),
        left_out=counter.left_out,
    )


class LoadCounter:
    """Inside its block, every forward of the model is counted."""

    def __init__(self, model: nn.Module) -> None:
        self.loads: dict[str, Tensor] = {}
        """int64 [E], by the name of the router module."""
        self.left_out: dict[str, str] = {}
        """Routers whose results are of no known form."""
        self._found = find(model)  # which runs routers, so it has to come before the hooks

    def __enter__(self) -> LoadCounter:
        self._hooks = [found.module.register_forward_hook(partial(self._count, found)) for found in self._found]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, found: Found, module: nn.Module, args: Any, returned: Any) -> None:
        try:
            load_E = adapter_for(module).load_E(found.stock, returned)
        except NotUnderstood as problem:
            self.left_out[found.name] = str(problem)
            return
        self.loads[found.name] = self.loads.get(found.name, torch.zeros_like(load_E)) + load_E


def _layer(name: str, load_E: Tensor) -> LayerLoad:
    return LayerLoad(
        name=name,
        layer=layer_number(name),
        load=tuple(load_E.tolist()),
        max_vio=float(max_violation(load_E)),
        min_vio=float(min_violation(load_E)),
        dead_experts=int(dead_experts(load_E)),
        cv=float(load_cv(load_E)),
    )

"""Which routers an offline evaluation compares, built for the layers of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moerouters import registry
from moerouters.errors import ConfigError, MoeroutersError
from moerouters.inspecting.logits_trace import LayerLogits, LogitsTrace
from moerouters.lab.overrides import parse_routers
from moerouters.router import Router

BASELINE = "topk"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A router with its config, as it was asked for."""

    label: str
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def build(self, layer: LayerLogits, device: torch.device | str = "cpu") -> Router:
        """For one layer, in train mode."""
        gating = layer.gating(device)
        router = registry.build(self.name, gating, config=self.overrides).train().to(device)
        stages = ("adjust", "select", "bias_E")
        # As in a swapped model: groups are filled with -inf for whoever changes scores.
        gating.exact = all(getattr(type(router), stage) is getattr(Router, stage) for stage in stages)
        return router


PLAIN = Chosen(label=BASELINE, name=BASELINE)


def chosen_routers(text: str | None, trace: LogitsTrace) -> tuple[list[Chosen], dict[str, str]]:
    """The routers of `--routers`, or all installed ones; and of those the ones that cannot serve, with the reason."""
    if text is not None:
        chosen = [Chosen(label=label, name=name, overrides=changes) for label, name, changes in parse_routers(text)]
        labels = [each.label for each in chosen]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"{twice[0]!r} is named twice.", where="--routers", why="the rows would be the same")
        return chosen, {}
    chosen, skipped = [], {}
    for name in registry.available():
        each = Chosen(label=name, name=name)
        try:
            for layer in trace.layers.values():
                each.build(layer)
        except MoeroutersError as error:
            skipped[name] = str(error)
        else:
            chosen.append(each)
    return chosen, skipped

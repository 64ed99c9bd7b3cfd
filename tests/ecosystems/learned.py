"""A model whose routers have learned something, and the file that an engine serves it with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import moerouters
from moerouters import Gating, MoELayer


def saved_layers(router: str, path: Path, *, num_experts: int, top_k: int, hidden_size: int) -> nn.ModuleList:
    """Three layers in eval mode, each with another state, which lies in `path` as well."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(
        MoELayer(moerouters.build(router, Gating.softmax(num_experts, top_k)), hidden_size=hidden_size, expert_size=4)
        for _ in range(3)
    )
    for layer in model.layers.eval():
        layer.router.get_buffer(layer.router.state_names()[0]).uniform_(-0.2, 0.2)
    moerouters.save_router_state(model, path)
    return model.layers

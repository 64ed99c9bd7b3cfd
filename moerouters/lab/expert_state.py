"""Checkpoints of spread experts hold all of them: gathered when a run is saved, cut when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moerouters.sharding import expert_parameters


def with_experts(
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
    change: Callable[[Tensor], Tensor],
    *,
    model: nn.Module,
    optimizer: Optimizer,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both state dicts with `change` applied to the weights of this rank's experts and to their moments.

    change maps [experts, ...] to [other number of experts, ...]; it is called in the same order on every rank.
    """
    owned = {id(parameter) for parameter in expert_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in owned}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = {index for index, parameter in enumerate(parameters) if id(parameter) in owned}
    weights = {name: change(value) if name in names else value for name, value in model_state.items()}
    moments = {
        index: {key: change(value) if index in indices and value.dim() else value for key, value in slots.items()}
        for index, slots in optimizer_state["state"].items()
    }
    return weights, optimizer_state | {"state": moments}

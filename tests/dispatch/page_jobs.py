"""What a rank does with the Python of docs/distributed.md."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from moerouters import MoELayer


def run_page(rank: int, scripts: dict[str, str], folder: str) -> dict[str, Any]:
    """Run the scripts one after the other, on a pool whose process group is there already."""
    names: dict[str, Any] = {"folder": folder}
    with patch("torch.distributed.init_process_group"):
        _execute(scripts, "train.py", names)
    layer: MoELayer = names["layer"]
    seen = {
        "load": int(names["handle"].loads[""].sum()),
        "shared": layer.gate.weight.sum().item(),
        "own": layer.experts.up_eFD.sum().item(),
    }
    names["handle"].remove()
    _execute(scripts, "fsdp.py", names)
    names["layer"].zero_grad()
    x_TD = _backward(names["layer"], source=rank)
    seen |= {"fsdp": _norms(names["layer"], mesh_of_experts=names["mesh"]), "alone": _alone(names, x_TD)}
    _execute(scripts, "mesh3d.py", names)
    for part in (names["layer"], names["layer"].experts):
        part.set_force_sum_reduction_for_comms(True)
    x_TD = _backward(names["layer"], source=rank // 2)
    seen |= {"mesh3d": [_norm(_whole(p.grad)) for p in _weights(names["layer"])], "mesh3d alone": _alone(names, x_TD)}
    _execute(scripts, "checkpoint.py", names)
    return seen


def _execute(scripts: dict[str, str], name: str, names: dict[str, Any]) -> None:
    exec(compile(scripts[name], name, "exec"), names)


def _backward(layer: MoELayer, *, source: int) -> torch.Tensor:
    """What goes in."""
    torch.manual_seed(5 + source)
    x_TD = torch.randn(16, 32)
    layer(x_TD).hidden.square().mean().backward()
    return x_TD


def _weights(layer: MoELayer) -> list[torch.nn.Parameter]:
    return [layer.gate.weight, layer.experts.up_eFD, layer.experts.down_eDF]


def _alone(names: dict[str, Any], x_TD: torch.Tensor) -> list[float]:
    """Norms of the gradients that one process has for the mean loss of all ranks."""
    every = [torch.empty_like(x_TD) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x_TD)
    torch.manual_seed(0)
    layer = MoELayer(names["router"], hidden_size=32, expert_size=64)
    torch.stack([layer(x).hidden.square().mean() for x in every]).mean().backward()  # type: ignore[no-untyped-call]
    return [_norm(parameter.grad) for parameter in _weights(layer)]


def _norms(layer: MoELayer, mesh_of_experts: Any) -> list[float]:
    gate, *experts = [_whole(parameter.grad) for parameter in _weights(layer)]
    found = [_norm(gate)]
    for gradient in experts:
        square = gradient.square().sum()
        dist.all_reduce(square, group=mesh_of_experts["expert"].get_group())
        found.append(square.sqrt().item())
    return found


def _whole(gradient: Any) -> torch.Tensor:
    whole: torch.Tensor = gradient.full_tensor()
    return whole


def _norm(gradient: Any) -> float:
    return float(gradient.norm())

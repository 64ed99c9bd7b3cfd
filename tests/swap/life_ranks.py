"""What the ranks of test_life_ranks.py do: a module that a spawned process can import."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from moerouters import attach, swap

from .life import LOUD, batch, learned, prepared, sgd, tiny, train

STEPS = 2
CASES = [
    ("qwen", "loss-free", "none"),
    ("mixtral", "loss-controlled", "none"),
    ("deepseek", "loss-free", "non-reentrant"),
    ("ernie", "loss-free", "none"),  # its correction bias is a parameter, so FSDP2 shards it
]


def batch_of(rank: int, step: int) -> dict[str, Tensor]:
    """As many labels on every rank, so that the mean over ranks is the mean over tokens."""
    return batch(10 * step + rank, padding="right")


def swapped(name: str, router: str, checkpointing: str) -> PreTrainedModel:
    model = prepared(tiny(name), checkpointing=checkpointing)
    swap(model, router, config=LOUD[router])
    return model


def sharded(model: PreTrainedModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def replicated(model: PreTrainedModel) -> nn.Module:
    return DistributedDataParallel(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


def trained(rank: int, wrap: Any, name: str, router: str, checkpointing: str) -> dict[str, Any]:
    model = swapped(name, router, checkpointing)
    wrapped = wrap(model)
    optimizer = sgd(model)
    handle = attach(optimizer, wrapped)
    loads: list[dict[str, list[int]]] = []
    losses = train(
        wrapped,
        optimizer,
        [batch_of(rank, step) for step in range(STEPS)],
        after_step=lambda: loads.append({layer: load_E.tolist() for layer, load_E in handle.loads.items()}),
    )
    return {"losses": losses, "loads": loads, "learned": learned(model), "weights": weights(model)}


def everything(rank: int) -> dict[str, Any]:
    """One start of the processes for all."""
    found: dict[str, Any] = {f"fsdp-{'-'.join(case)}": trained(rank, sharded, *case) for case in CASES}
    return found | {f"ddp-{'-'.join(case)}": trained(rank, replicated, *case) for case in CASES}

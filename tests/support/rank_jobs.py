"""What the ranks of tests/test_ranks.py do: a module that a spawned process can import."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moerouters import MoELayer, attach
from moerouters.errors import NonFiniteLogits
from moerouters.reduce import reduce_sums
from support.balanced import balanced

WIDTH = 4


class Model(nn.Module):
    """Two MoE layers; losses come out beside the hidden states."""

    def __init__(self, loss_mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MoELayer(balanced(), hidden_size=WIDTH, expert_size=3, loss_mode=loss_mode) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        aux = x.new_zeros(())
        for layer in self.layers:
            hidden, assignment = layer(x)
            x = x + hidden
            if layer.loss_mode == "collect":
                aux = aux + sum(assignment.losses.values())
        return x, aux


def tokens_of(rank: int, step: int) -> Tensor:
    """Rank 1 has no tokens in the second step."""
    count = 0 if (rank, step) == (1, 1) else 5 + rank
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def data_parallel(rank: int) -> dict[str, Any]:
    """Two steps under DDP in both loss modes, then a step whose logits are broken on rank 1 only."""
    results: dict[str, Any] = {}
    for loss_mode in ("collect", "inject"):
        model = Model(loss_mode)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = attach(optimizer, wrapped)
        loads, biases = [], []
        for step in range(2):
            hidden, aux = wrapped(tokens_of(rank, step))
            (hidden.square().sum() + aux).backward()
            optimizer.step()
            optimizer.zero_grad()
            loads.append({name: load_E.tolist() for name, load_E in handle.loads.items()})
            biases.append([layer.router.b_E.tolist() for layer in model.layers])
        x = tokens_of(rank, 0)
        x[0, 0] = torch.nan if rank == 1 else 0.0
        wrapped(x)
        try:
            optimizer.step()
            error = ""
        except NonFiniteLogits as raised:
            error = str(raised).splitlines()[0]
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        results[loss_mode] = {"loads": loads, "biases": biases, "error": error, "weights": weights}
    return results


def own_tokens_only(rank: int) -> list[int]:
    """The load that a rank sees whose token group is itself: ranks that hold the same tokens."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    model = Model("collect")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(optimizer, model, token_group=groups[rank])
    model(tokens_of(rank, 0))[1].backward()
    optimizer.step()
    return handle.loads["layers.0"].tolist()


def reduced(rank: int) -> dict[str, Any]:
    """Sums of several dtypes and shapes, met in another order on every rank; and how many collectives that took."""
    calls = []
    original = dist.all_reduce

    def counting(tensor: Tensor, **kwargs: Any) -> Any:
        calls.append(str(tensor.dtype))
        return original(tensor, **kwargs)

    dist.all_reduce = counting
    try:
        sums = {
            "a": {"load": torch.tensor([1, 2]) + rank, "mean": torch.tensor(0.5)},
            "b": {"load": torch.tensor([[2**53 + 1]]), "mean": torch.tensor([1.0, 2.0]) * rank},
        }
        if rank:
            sums = {layer: dict(reversed(sums[layer].items())) for layer in reversed(sums)}
        found = reduce_sums(sums, None)
    finally:
        dist.all_reduce = original
    return {"found": found, "given": sums, "calls": calls}


def everything(rank: int) -> dict[str, Any]:
    """One start of the processes for all."""
    return {"training": data_parallel(rank), "own": own_tokens_only(rank), "reduced": reduced(rank)}

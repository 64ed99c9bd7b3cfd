"""The ranks of a data-parallel run; one alone where torch.distributed does not run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.router import Router


@dataclass(frozen=True)
class Ranks:
    """Who this process is. Every method is a collective: all ranks call it, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """This rank's slice of a batch whose rows all ranks can draw; empty where there are too few."""
        return rows[self.rank :: self.size]

    def require_divides(self, micro_batch_size: int) -> None:
        """Raise ConfigError unless every rank gets as many sequences as the next."""
        if micro_batch_size % self.size:
            raise ConfigError(
                f"{micro_batch_size} sequences cannot be shared evenly by {self.size} ranks.",
                why="the mean of the ranks' gradients is the gradient of the batch only if all have as many tokens",
                fix=f"--set micro_batch_size={-(-micro_batch_size // self.size) * self.size}",
            )

    def sum(self, value: Tensor) -> Tensor:
        """The elementwise sum over ranks, on every rank."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Return when every rank is here. A rank that ends before the first has written takes the others with it."""
        if self.size > 1:
            dist.barrier()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over ranks, in one flat all-reduce."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def require_same_state(self, model: nn.Module) -> None:
        """Raise MoeroutersError unless all ranks hold the same bits in every router and in every weight."""
        if self.size == 1:
            return
        own = torch.tensor([_fingerprint(_router_state(model)), _fingerprint(model.state_dict().values())])
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        table = torch.stack(everyone)
        for what, column in zip(("balancer state", "weights"), table.t(), strict=True):
            odd = [rank for rank, value in enumerate(column.tolist()) if value != int(column[0])]
            if odd:
                raise MoeroutersError(
                    f"after training, ranks {odd} hold other {what} than rank 0.",
                    why="data-parallel ranks apply the same updates to the same state",
                    fix="a router must change only in update(stats), and by what is in stats",
                )


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the job that torchrun started, for as long as the block lasts; alone without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    started = not dist.is_initialized()
    if started:
        # gloo beside nccl: fingerprints and stop requests live on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            dist.destroy_process_group()


def _router_state(model: nn.Module) -> list[Tensor]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [value for router in routers for value in router.state_dict().values()]


def _fingerprint(tensors: Iterable[Tensor]) -> int:
    """A signed 64-bit digest of the tensors' bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)

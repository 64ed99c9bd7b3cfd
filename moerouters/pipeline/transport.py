"""How tensors get from a rank to another, and what both ends know of them beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.errors import PipelineError

MAX_DIMS = 8
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Work(Protocol):
    """What is under way. `wait` raises RuntimeError where it failed or took longer than the group allows."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


class Transport:
    """Point-to-point messages over a process group; two between the same ranks arrive in order.

    A subclass may do something else with sends and receives, for instance delay them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[Work]:
        """Begin all of them as one batch; one Work for each send, then one for each receive. Peers are group ranks."""
        ops = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for tensor, peer in sends]
        ops += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for tensor, peer in receives]
        if not ops:
            return []
        works: list[Work] = list(dist.batch_isend_irecv(ops))
        # NCCL gives one for the whole batch.
        return works if len(works) == len(ops) else works[:1] * len(ops)


@dataclass(frozen=True, slots=True)
class Form:
    """What a receiver has to know of a value to make room for it, and whether its gradient goes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def header(self, device: torch.device) -> Tensor:
        """int64 [3 + MAX_DIMS]. Raises PipelineError for a tensor that none can describe."""
        if len(self.shape) > MAX_DIMS or self.dtype not in _DTYPES:
            raise PipelineError(
                f"a stage gives {self}, which cannot be sent.",
                why=f"it has up to {MAX_DIMS} dimensions and a plain dtype",
                fix="let the stage give it another form",
            )
        numbers = [_DTYPES.index(self.dtype), int(self.requires_grad), len(self.shape), *self.shape]
        return torch.tensor(numbers + [0] * (3 + MAX_DIMS - len(numbers)), dtype=torch.int64, device=device)

    @classmethod
    def parse(cls, header: Tensor) -> Form:
        """The reverse of `header`; waits for the device."""
        dtype, requires_grad, dims, *sizes = header.tolist()
        return cls(tuple(sizes[:dims]), _DTYPES[dtype], bool(requires_grad))

    def __str__(self) -> str:
        end = "" if self.requires_grad else ", without gradient"
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}{end}"

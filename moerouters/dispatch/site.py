"""Site: where an exchange happens - rank, layer, back-end - so that its failure can be told from others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moerouters.dispatch.diagnosis import whereabouts
from moerouters.errors import ConfigError, DispatchError


@dataclass(frozen=True, eq=False)
class Site:
    """One layer's end of a process group. Copies of a layer share it: a group cannot be copied."""

    group: dist.ProcessGroup
    layer: str = ""
    """Name of the layer in its model, for messages."""
    backend: str = ""
    """Name of the dispatcher, for messages."""
    mesh: DeviceMesh | None = None
    """The ranks of the group in more than one dimension, for a back-end that tells them apart; None: in one."""

    @property
    def num_ranks(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        """Of this process within the group."""
        return self.group.rank()

    def experts_here(self, num_experts: int) -> slice:
        """The block of experts that lives on this rank. Raises ConfigError where ranks would hold unequal numbers."""
        if num_experts % self.num_ranks:
            raise ConfigError(
                f"{num_experts} experts cannot be split over {self.num_ranks} ranks.",
                where=str(self),
                why="every rank of the group holds the same number of experts",
                fix="take a group whose size divides the number of experts",
            )
        count = num_experts // self.num_ranks
        return slice(self.rank * count, (self.rank + 1) * count)

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Turn what a collective raises into a DispatchError that names this site."""
        try:
            yield
        except DispatchError:
            raise
        except RuntimeError as error:
            raise self.failed(doing, error) from error

    def failed(self, doing: str, error: Exception) -> DispatchError:
        """What to raise when a collective failed. Waits a second for word from the other ranks."""
        return DispatchError(
            f"{doing} failed on {self}.",
            where="\n".join(filter(None, [whereabouts(self.group, f"{doing}{self._place}"), self._numbering()])),
            why=_first_line(error),
            fix="look for the rank that raised, was killed or is late: its own output says why; this one only waited",
        )

    @property
    def _place(self) -> str:
        layer = f", layer '{self.layer}'" if self.layer else ""
        backend = f", back-end '{self.backend}'" if self.backend else ""
        return f"{layer}{backend}"

    def _numbering(self) -> str:
        """Which ranks of the job a smaller group is made of, for who looks for their output."""
        everybody = dist.get_process_group_ranks(self.group)
        if len(everybody) == dist.get_world_size():
            return ""
        return f"ranks 0-{len(everybody) - 1} of this group are {', '.join(map(str, everybody))} of the job"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.num_ranks}{self._place}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self


def _first_line(error: Exception) -> str:
    """What the collective said, without the line of gloo's source that it begins with. ASCII, as all our texts."""
    lines = str(error).encode("ascii", "ignore").decode().strip().splitlines()
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", lines[0]) if lines else type(error).__name__

"""Where a step runs, for its errors: which rank of which schedule, and what the others say."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.distributed as dist

from moerouters.dispatch.diagnosis import whereabouts
from moerouters.errors import PipelineError


@dataclass(frozen=True, eq=False)
class Site:
    """One rank's end of a pipeline."""

    group: dist.ProcessGroup
    schedule: str

    def failed(self, doing: str, error: Exception) -> PipelineError:
        """What to raise where others failed this rank. Waits a second for word from them."""
        return PipelineError(
            f"{self} stopped: {doing}.",
            where=whereabouts(self.group, doing),
            why=_first_line(error),
            fix="look for the rank that raised, was killed or is late: its own output says why; this one only waited",
        )

    def tell(self, doing: str) -> None:
        """Let the ranks that wait for this one read where it failed."""
        whereabouts(self.group, doing, limit_s=0.1)

    def __str__(self) -> str:
        return f"rank {self.group.rank()} of {self.group.size()}, schedule '{self.schedule}',"


def _first_line(error: Exception) -> str:
    """Without the line of gloo's source that it begins with, and without its pictures."""
    lines = str(error).encode("ascii", "ignore").decode().strip().splitlines()
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", lines[0]) if lines else type(error).__name__

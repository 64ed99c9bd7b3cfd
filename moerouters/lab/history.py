"""What a run remembers of every step: the raw material of metrics and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_SCHEMA = "moerouters.history/1"


@dataclass(kw_only=True)
class History:
    """One entry per optimizer step, each a CPU tensor."""

    loads: list[Tensor] = field(default_factory=list)
    """int64 [L, E]: the load that one `update` saw, over all micro-batches and ranks."""
    micro_max_vio: list[Tensor] = field(default_factory=list)
    """float64 [A, L]: MaxVio of each of the A forward passes."""
    train_loss: list[Tensor] = field(default_factory=list)
    """float64 0-d: cross-entropy in nats per byte, without aux losses."""
    step_ms: list[Tensor] = field(default_factory=list)
    router_ms: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loads)

    def tensors(self) -> dict[str, Tensor]:
        """Each list stacked over steps; empty for a history without a step."""
        return {f.name: torch.stack(getattr(self, f.name)) for f in fields(self)} if self.loads else {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> History:
        """The inverse of `tensors`."""
        return cls(**{name: list(value.unbind()) for name, value in tensors.items()})

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file(self.tensors(), path, metadata={"schema": _SCHEMA})

    @classmethod
    def load(cls, path: Path) -> History:
        """Read what `save` wrote."""
        return cls.of(load_file(path))

"""What a run remembers of every step: the raw material of metrics and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_SCHEMA = "moerouters.history/1"


class Series:
    """CPU tensors of one shape and dtype, that of the first, in one piece of memory that doubles when it is full.

    A list of small tensors, five more each step, lets the heap of a training process grow by 300 KB a step: they come
    to lie between the large ones, whose memory then has no use as a whole.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self._rows = rows
        self._count = 0 if rows is None else len(rows)

    def append(self, value: Tensor) -> None:
        if self._rows is None:
            self._rows = value.new_empty((64, *value.shape), device="cpu")
        if self._count == len(self._rows):
            longer = self._rows.new_empty((2 * self._count + 1, *self._rows.shape[1:]))
            longer[: self._count] = self._rows
            self._rows = longer
        self._rows[self._count] = value
        self._count += 1

    def stacked(self) -> Tensor:
        """[steps, ...], a view; not of a series without an entry."""
        assert self._rows is not None
        return self._rows[: self._count]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return self.stacked()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.stacked().unbind() if self._count else ())


@dataclass(kw_only=True)
class History:
    """One entry per optimizer step, each a CPU tensor."""

    loads: Series = field(default_factory=Series)
    """int64 [L, E]: the load that one `update` saw, over all micro-batches and ranks."""
    micro_max_vio: Series = field(default_factory=Series)
    """float64 [A, L]: MaxVio of each of the A forward passes."""
    train_loss: Series = field(default_factory=Series)
    """float64 0-d: cross-entropy in nats per byte, without aux losses."""
    step_ms: Series = field(default_factory=Series)
    router_ms: Series = field(default_factory=Series)

    def __len__(self) -> int:
        return len(self.loads)

    def tensors(self) -> dict[str, Tensor]:
        """Each series [steps, ...]; empty for a history without a step."""
        return {f.name: getattr(self, f.name).stacked().clone() for f in fields(self)} if len(self) else {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> History:
        """The inverse of `tensors`."""
        return cls(**{name: Series(value) for name, value in tensors.items()})

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file(self.tensors(), path, metadata={"schema": _SCHEMA})

    @classmethod
    def load(cls, path: Path) -> History:
        """Read what `save` wrote."""
        return cls.of(load_file(path))

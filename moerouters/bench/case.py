"""What a benchmark is made of: a Request says what to time, a Case is one table row after another of the same work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from moerouters.bench.shapes import Shape
from moerouters.bench.timing import Ratio, ratio_of

Run = Callable[[], object]
"""The work, once."""
Build = Callable[[], Run]
Subject = Literal["layer", "router", "dispatch", "balance"]
Dtype = Literal["float32", "bfloat16"]


class Request(BaseModel):
    """What one process is to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: Subject
    shapes: tuple[Shape, ...]
    impls: tuple[str, ...] | None = None
    """Which implementations beside the baselines; None: all."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    rounds: int = Field(default=15, ge=2)
    threads: int = Field(default=2, ge=1)
    ranks: int = Field(default=1, ge=1)
    memory: bool = True
    """Whether peaks are measured as well."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


class Unavailable(Exception):
    """An implementation cannot run here; the text says why."""


class Case:
    """Implementations that do the same work at one shape. Subclasses offer `builds`.

    Nothing is allocated before the first build, so that a process may be forked per implementation to look at memory.
    """

    baselines: tuple[str, ...] = ()
    """Implementations that are timed whatever is asked for: ratios are to them."""
    passes: str
    """Name of the pass: `forward`, `forward+backward`, ..."""
    dtype: Dtype
    """The request's, unless it does not matter here."""

    def __init__(self, request: Request, shape: Shape) -> None:
        self.request = request
        self.shape = shape
        self.device = torch.device(request.device)
        if not hasattr(self, "dtype"):
            self.dtype = request.dtype

    def builds(self) -> Mapping[str, Build]:
        """By implementation, what makes it ready to run. It raises Unavailable where it cannot."""
        raise NotImplementedError

    def wanted(self) -> dict[str, Build]:
        """Of `builds`, what the request asks for."""
        asked = self.request.impls
        return {
            name: build
            for name, build in self.builds().items()
            if asked is None or name in asked or name in self.baselines
        }

    def over(self, name: str, samples: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
        """Ratios of an implementation, by what they are to. `samples` are seconds per round."""
        return {peer: ratio_of(samples[name], samples[of]) for peer, of in self.peers(samples).items() if of != name}

    def peers(self, samples: Mapping[str, Sequence[float]]) -> dict[str, str]:
        """What ratios are called, and the implementation that they are to."""
        return {name: name for name in self.baselines if name in samples}

    def values(self, name: str, seconds: float) -> dict[str, float]:
        """Further figures of an implementation: arithmetic or bytes per second, ..."""
        return {}

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.request.subject} {self.shape.name} {self.passes}"

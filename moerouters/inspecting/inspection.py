"""What `moerouters inspect` finds out about a model: one row per router, and the load of its experts on a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny
from torch import nn

from moerouters.inspecting.outline import Alike
from moerouters.swapping.find import find
from moerouters.swapping.reading import Reading
from moerouters.swapping.swap import LayerRecord, examine


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RouterRow(_Part):
    """One router of the model."""

    name: str
    """Of the module."""
    layer: int | None
    """Number of the decoder layer."""
    stock_class: str
    num_experts: int | None
    top_k: int | None
    status: Literal["proven", "refused", "skipped"]
    """`proven`: rebuilt from its Reading it gives the stock router's bits, so it can be swapped."""
    gating: str | None
    """The Reading, as a line for people."""
    reading: SerializeAsAny[Reading] | None
    reason: str | None
    """Why it was refused or skipped."""
    correction_bias: str | None
    """Name of the model's own bias for selection."""
    router: str | None
    """Name of the plug-in that chooses now, if the model was swapped."""

    @classmethod
    def of(cls, record: LayerRecord) -> RouterRow:
        reading = record.reading
        status: Literal["proven", "refused", "skipped"]
        status = "refused" if record.status == "refused" else "skipped" if record.status == "skipped" else "proven"
        return cls(
            name=record.name,
            layer=layer_number(record.name),
            stock_class=record.stock_class,
            num_experts=None if reading is None else reading.num_experts,
            top_k=None if reading is None else reading.top_k,
            status=status,
            gating=None if reading is None else str(reading),
            reading=reading,
            reason=record.reason,
            correction_bias=None if reading is None else reading.correction_bias,
            router=record.router,
        )

    def renamed(self, name: str) -> RouterRow:
        """The row of a router that is built like this one."""
        return self.model_copy(update={"name": name, "layer": layer_number(name)})


class LayerLoad(_Part):
    """Where the tokens of the text went in one layer."""

    name: str
    layer: int | None
    load: tuple[int, ...]
    """Tokens per expert."""
    max_vio: float
    min_vio: float
    dead_experts: int
    cv: float


class TextLoads(_Part):
    """The load of every layer on one text."""

    text: str
    sha256: str
    """Of the token ids, as int64."""
    tokens: int
    tokenizer: str
    layers: tuple[LayerLoad, ...]
    left_out: dict[str, str]
    """Routers whose results are of no known form, with what they return."""


class Inspection(_Part):
    """What `moerouters inspect --json` writes. A field changes its meaning only with a new `schema_version`."""

    schema_version: int = 1
    model: str
    architecture: str
    transformers: str
    weights: Literal["loaded", "random"]
    missing: tuple[str, ...]
    """Tensors that the checkpoint lacks."""
    routers: tuple[RouterRow, ...]
    loads: TextLoads | None = None

    @property
    def swappable(self) -> int:
        return sum(row.status == "proven" for row in self.routers)


def inspect_routers(model: nn.Module, alike: Alike | None = None) -> tuple[RouterRow, ...]:
    """Read and prove every router of the model, without changing it. `alike` names layers that an outline left out."""
    rows: list[RouterRow] = []
    for found in find(model):
        row = RouterRow.of(examine(model, found))
        rows.append(row)
        for kept, others in (alike or {}).items():
            if row.name.startswith(f"{kept}."):
                rows += [row.renamed(other + row.name.removeprefix(kept)) for other in others]
    return tuple(sorted(rows, key=lambda row: (pattern(row.name), row.layer or 0)))


def folded(rows: Iterable[RouterRow]) -> list[list[RouterRow]]:
    """Rows that differ in nothing but the number of their layer, together."""
    groups: dict[str, list[RouterRow]] = {}
    for row in rows:
        kind = row.model_copy(update={"name": pattern(row.name), "layer": None})
        groups.setdefault(kind.model_dump_json(), []).append(row)
    return list(groups.values())


def ranges(numbers: Sequence[int]) -> str:
    """`3-60`, `0, 2-5`, or `1, 3, ..., 47` for rising numbers in equal steps."""
    steps = {right - left for left, right in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def layer_number(name: str) -> int | None:
    """The first number in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def pattern(name: str) -> str:
    """The name with a star for the number of the layer."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)

"""Which expert lives on which rank, as data: one record per layer, checked when it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moerouters.errors import ConfigError


class LayerPlacement(BaseModel):
    """Where the experts of one layer live. Every rank has as many slots; every expert stands in at least one.

    Place p = rank * slots + slot numbers all of them. In that numbering each rank holds a contiguous block, which is
    what dispatchers take for granted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: tuple[tuple[int, ...], ...]
    """By rank, then by slot, the expert that lives there. One that stands in several slots has replicas."""

    @model_validator(mode="after")
    def _whole(self) -> LayerPlacement:
        sizes = {len(slots) for slots in self.experts}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(f"every rank holds the same number of experts, at least one; here it is {sorted(sizes)}")
        named = set(self.by_place)
        wrong = sorted(set(range(max(named) + 1)) ^ named)
        if wrong:
            raise ValueError(f"experts are numbered from 0, and each lives somewhere; look at {wrong[:5]}")
        return self

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> LayerPlacement:
        """Rank r of n has the r-th n-th of the experts: what `shard_experts` does without a placement."""
        return cls.of_places(range(num_experts), num_ranks)

    @classmethod
    def of_places(cls, experts: Sequence[int], num_ranks: int) -> LayerPlacement:
        """From the expert of every place."""
        slots = -(-len(experts) // num_ranks)
        return cls(experts=tuple(tuple(map(int, experts[r * slots : (r + 1) * slots])) for r in range(num_ranks)))

    @property
    def by_place(self) -> tuple[int, ...]:
        """The expert of every place."""
        return tuple(expert for slots in self.experts for expert in slots)

    @property
    def num_ranks(self) -> int:
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        return max(self.by_place) + 1

    @property
    def num_places(self) -> int:
        return len(self.by_place)

    @property
    def copies(self) -> tuple[int, ...]:
        """In how many places each expert stands."""
        count = Counter(self.by_place)
        return tuple(count[expert] for expert in range(self.num_experts))

    @property
    def replicated(self) -> bool:
        """Whether any expert stands in more than one place."""
        return self.num_places > self.num_experts


class PlacementMap(BaseModel):
    """The placement of a model, by name of its layers. What `moerouters place --output` writes.

    A field changes its meaning only with a new schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["moerouters.placement/1"] = Field(default="moerouters.placement/1", alias="schema")
    ranks: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    """Machines; neighbouring ranks share one."""
    layers: dict[str, LayerPlacement] = Field(min_length=1)
    note: str = ""
    """How it was made."""

    @model_validator(mode="after")
    def _fits(self) -> PlacementMap:
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks cannot be spread evenly over {self.nodes} nodes")
        other = {name: layer.num_ranks for name, layer in self.layers.items() if layer.num_ranks != self.ranks}
        if other:
            raise ValueError(f"the map is for {self.ranks} ranks, and layers are for others: {other}")
        return self

    @property
    def replicated(self) -> bool:
        """Whether any expert of any layer has replicas."""
        return any(layer.replicated for layer in self.layers.values())

    def renamed(self, names: Sequence[str]) -> PlacementMap:
        """The same for a model whose layers have these names, in this order. Raises ConfigError for another number."""
        if len(names) != len(self.layers) or len(set(names)) != len(names):
            raise ConfigError(
                f"{len(self.layers)} placed layers cannot take {len(set(names))} different names.",
                where=", ".join(self.layers),
                why="layers are renamed one by one, in order",
                fix="name each MoELayer of the model once",
            )
        return self.model_copy(update={"layers": dict(zip(names, self.layers.values(), strict=True))})

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PlacementMap:
        """Read what `save` wrote. Raises ConfigError for anything else."""
        from moerouters.registry.configs import field_errors

        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"cannot read the placement '{path}'.",
                why="\n".join(field_errors(error)[:5]) if isinstance(error, ValidationError) else str(error),
                fix="pass a file that `moerouters place --output` wrote",
            ) from error

"""What a cluster can do, as data: links, arithmetic, memory; from a JSON or TOML file, or one of the presets.

Time of a message is latency + bytes / bandwidth (Hockney, Parallel Computing 20, 1994); each further one that a rank
starts at the same time adds `message_s` (the gap of LogGP, Alexandrov et al., SPAA 1995).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moerouters.errors import ConfigError
from moerouters.registry.configs import field_errors

Floats = NDArray[np.float64]
Collective = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Link(_Record):
    """What connects one rank with others."""

    latency_s: float = Field(ge=0)
    """Until the first byte of an exchange is there: launch, handshake, wire."""
    message_s: float = Field(default=0.0, ge=0)
    """For every further rank that is sent to."""
    bytes_per_s: float = Field(gt=0)
    """Out of a rank and, at the same time, into it."""

    def seconds(self, peers: int, num_bytes: Floats) -> Floats:
        """For sending to so many ranks so many bytes in all; without anybody to send to, none."""
        if peers <= 0:
            return 0 * num_bytes
        return self.latency_s + (peers - 1) * self.message_s + num_bytes / self.bytes_per_s


class Cluster(_Record):
    """Nodes of equal ranks. All rates are what one rank gets and sustains, not peaks."""

    schema_: Literal["moerouters.cluster/1"] = Field(default="moerouters.cluster/1", alias="schema")
    name: str
    source: str = ""
    """Where the numbers are from, and which are assumed."""
    ranks_per_node: int = Field(ge=1)
    intra: Link
    """Between ranks of a node."""
    inter: Link | None = None
    """Between nodes; None where there is one."""
    flops_per_s: float = Field(gt=0)
    """Of the experts' matrix products."""
    float32_flops_per_s: float | None = Field(default=None, gt=0)
    """Of the gate's projection, which is in float32; None: as fast as experts."""
    memory_bytes_per_s: float = Field(gt=0)
    """Of gathering and summing rows: bytes that the formulas count, over the time that it takes."""
    memory_bytes: float | None = Field(default=None, gt=0)
    """Of a rank; None: no limit is looked at."""
    host_wait_s: float = Field(default=0.0, ge=0)
    """For the host to learn a number from the device, and to fill the device's queue again."""
    forward_s: float = Field(default=0.0, ge=0)
    """Of a layer's forward with hardly a token: what the host does."""
    backward_s: float = Field(default=0.0, ge=0)
    processors: float | None = Field(default=None, ge=1)
    """That the ranks of a node share, for arithmetic and copies alike: how many ranks' worth of work it does at a time.
    None: every rank has a device of its own."""
    efficiency: dict[Collective, float] = {}
    """By how much a collective misses the bandwidth of its link; 1 where nothing is said."""

    @model_validator(mode="after")
    def _positive(self) -> Cluster:
        if any(value <= 0 for value in self.efficiency.values()):
            raise ValueError("an efficiency is above 0")
        return self

    def share(self, ranks: int) -> float:
        """Part of its rates that a rank keeps when `ranks` of a node are at work."""
        return 1.0 if self.processors is None else min(1.0, self.processors / ranks)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


PRESETS = {
    cluster.name: cluster
    for cluster in (
        Cluster(
            name="h100-nvl8-ib400",
            source="H100 SXM, 8 a node, a 400 Gb/s port each. bf16: 525 TFLOP/s is torch._grouped_mm as published for "
            "H100 (torchao PR 2490, recomputed), 3.0 TB/s a measured copy; 45 GB/s of the port's 50 is what DeepEP "
            "sustains between nodes; 360 GB/s of NVLink's 450, 50 of 67 TFLOP/s in float32 and all latencies are "
            "assumed; what the host does is taken to be hidden",
            ranks_per_node=8,
            intra=Link(latency_s=2.5e-5, message_s=1e-6, bytes_per_s=3.6e11),
            inter=Link(latency_s=3e-5, message_s=1e-6, bytes_per_s=4.5e10),
            flops_per_s=5.25e14,
            float32_flops_per_s=5e13,
            memory_bytes_per_s=3.0e12,
            memory_bytes=8e10,
            host_wait_s=4e-5,
        ),
        Cluster(
            name="v100-nvl8-ib100",
            source="The machines of PPMoE (arXiv:2304.11414): V100, 8 a node. 125 TFLOP/s, 300 GB/s of NVLink and "
            "100 Gb/s of InfiniBand are the peaks its cost model takes, the port for each GPU; 900 GB/s of memory and "
            "15.7 TFLOP/s in float32 are the data sheet's; latencies are assumed, and what the host does hidden",
            ranks_per_node=8,
            intra=Link(latency_s=2.5e-5, message_s=1e-6, bytes_per_s=3e11),
            inter=Link(latency_s=3e-5, message_s=1e-6, bytes_per_s=1.25e10),
            flops_per_s=1.25e14,
            float32_flops_per_s=1.57e13,
            memory_bytes_per_s=9e11,
            memory_bytes=3.2e10,
            host_wait_s=4e-5,
        ),
    )
}


def find_cluster(name: str) -> Cluster:
    """A preset, or what a JSON or TOML file says. Raises ConfigError for neither."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".json", ".toml"):
        raise ConfigError(
            f"there is no cluster '{name}'.",
            why=f"there is: {', '.join(PRESETS)}; or a .json or .toml file",
            fix="`moerouters simulate --calibrate --output FILE` measures this machine",
        )
    try:
        if path.suffix == ".toml":
            return Cluster.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        return Cluster.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the cluster '{name}'.",
            why="\n".join(field_errors(error)[:5]) if isinstance(error, ValidationError) else str(error),
            fix="`moerouters simulate --calibrate --output FILE` writes one to begin with",
        ) from error
